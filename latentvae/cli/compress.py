"""`latentvae compress` and `latentvae decompress`: photographs as small files and back, one or a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentvae import codec, images, measure
from latentvae.base.errors import CodecError, LatentVAEError
from latentvae.base.files import check_file, whole_file
from latentvae.cli import jobs
from latentvae.cli.jobs import Job
from latentvae.cli.options import counted, tell
from latentvae.cli.session import Session, image_channels, takes

if TYPE_CHECKING:
    import torch

SUFFIX = ".lvae"
CANNOT_WRITE = "{path} cannot be written ({reason}): use a folder that exists, yours."

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there; in a folder, what is not as asked for.")
]


@takes("model", ..., "lpips_net", "lpips_weights", "device", "tile_size", "scratch", "json")
def compress(
    session: Session,
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="An image, or a folder of them.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT.lvae", help="The file to write; of a folder, the folder for all.")
    ],
    quality: Annotated[
        int,
        typer.Option(
            "--quality",
            "-q",
            min=1,
            max=100,
            help="1: smallest file, 100: best picture; 14 more halve the steps of the latents' rounding.",
        ),
    ] = 50,
    compare: Annotated[
        bool | None,
        typer.Option(
            help="Say what JPEG and WebP take at the same LPIPS too; tries seven files of each. Default: of "
            "folders.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compress an image, or a folder; prints the bits per pixel of whole files, and what decoding them gives.

    A folder's images become OUT/KEY.lvae. Called again, it goes on: what this model has made of an image at
    this quality is kept.
    """
    folder = _kind_of(photo) == "folder"
    files = session.find_images([photo])
    # before the model is loaded: arguments in the wrong order would cost the photograph
    if folder:
        planned = jobs.plan(files, photo, output, SUFFIX, CodecError)
    else:
        _check_file(output, overwrite)
        planned = [Job(files[0], output, photo.name)]
    session.load()  # in fp32: the hash in the file is that of the exact weights
    todo = jobs.remaining(planned, _made_by(session, quality), overwrite, CodecError) if folder else planned
    lpips, reason = session.find_lpips()
    comparing = folder if compare is None else compare
    if reason and comparing:
        reason = f"{reason} So JPEG and WebP, which are compared at equal LPIPS, are left out."
    run = _Compression(session, measure.metrics.Metrics(lpips, reason), quality, lpips if comparing else None)
    places = {job.source: job for job in todo}
    for path, image, info in session.read_images([job.source for job in todo]):
        try:
            run.add(places[path], image, info)
        except LatentVAEError as error:
            if not folder:
                raise
            session.skip(path, LatentVAEError(f"{path}: {error}"))
    kept = len(planned) - len(todo)
    if folder:
        run.tell_all(output, kept)
    elif run.rows:
        run.tell_one()
    session.finish(len(run.rows) + kept)


@takes("model", "device", "tile_size", "scratch", ..., "json", default="the bundled one it was made by")
def decompress(
    session: Session,
    source: Annotated[
        Path, typer.Argument(metavar="IN.lvae", help="A compressed image, or a folder of them.")
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.png",
            help="The image to write: .png, .jpg or .webp; of a folder, the folder for all, as PNG.",
        ),
    ],
    overwrite: Overwrite = False,
) -> None:
    """Decompress an image that `latentvae compress` wrote, or a folder of them.

    It takes the model that compressed them: a bundled one is found by itself, any other is --model.
    A folder's files become OUT/KEY.png. Called again, it goes on: pictures of the right size that are not
    older than their files are kept.
    """
    if _kind_of(source) == "folder":
        _decompress_all(session, source, output, overwrite)
        return
    _check_picture(output, overwrite)
    # before the model: a damaged file is refused at once
    _load_maker(session, codec.compression.read_lvae(source)[0])
    result = _decompress(session, Job(source, output, source.name))
    tell(result, [f"{output}: {result['width']}x{result['height']} px"], session.json)


def _decompress_all(session: Session, source: Path, output: Path, overwrite: bool) -> None:
    files = images.listing.list_files(source, (SUFFIX,))
    if not files:
        raise CodecError(f"no {SUFFIX} file in the folder {source}: name what `latentvae compress` wrote.")
    planned = jobs.plan(files, source, output, ".png", CodecError, SUFFIX)
    todo = jobs.remaining(planned, _is_its_picture, overwrite, CodecError)
    _load_maker(session, next(filter(None, (_header(job.source) for job in todo)), None))
    done, kept = [], len(planned) - len(todo)
    for job in todo:
        try:
            done.append(_decompress(session, job))
        except LatentVAEError as error:
            session.skip(job.source, error)
    result = {"folder": str(output), "files": done, "kept": kept, "skipped": session.skipped}
    tell(result, [f"{counted(len(done), 'picture')} in {output}{_kept(kept)}."], session.json)
    session.finish(len(done) + kept)


def _load_maker(session: Session, header: codec.container.Header | None) -> None:
    """Load the model that is named, else the bundled one that made a file, where it has one."""
    if session.model is None and header is not None:
        session.model = codec.compression.bundled_model(header.weights)
    session.load()


def _header(file: Path) -> codec.container.Header | None:
    """The header of a compressed image; None of one that is damaged, which is named when its turn comes."""
    try:
        return codec.compression.read_lvae(file)[0]
    except CodecError:
        return None


def _decompress(session: Session, job: Job) -> dict[str, Any]:
    """Write one picture; what a report says of it."""
    header, payload = codec.compression.read_lvae(job.source)
    # other weights would decode something, and nobody could tell
    codec.compression.check_model(session.vae, header)
    image_channels(session.vae)
    session.fit(job.source, *header.padded)  # height and width with the padding, which is decoded too
    images.saving.save_image(codec.compression.decode_payload(session.vae, header, payload), job.target)
    return {"file": str(job.target), "width": header.width, "height": header.height}


def _made_by(session: Session, quality: int) -> Callable[[Job], bool]:
    """Whether a file is what this model makes of its image, as far as its header and its age tell."""

    def made(job: Job) -> bool:
        try:
            header, _ = codec.compression.read_lvae(job.target)
            codec.compression.check_model(session.vae, header)
        except CodecError:
            return False
        return header.quality == quality and job.is_younger

    return made


def _is_its_picture(job: Job) -> bool:
    """Whether a picture is that of its file, as far as its size and its age tell."""
    header = _header(job.source)
    if header is None:
        return False
    return images.reading.read_size(job.target) == (header.width, header.height) and job.is_younger


@dataclass
class _Compression:
    """Images that are compressed one by one, and what is said of them; `rival`: compared with JPEG, WebP."""

    session: Session
    metrics: measure.metrics.Metrics
    quality: int
    rival: measure.lpips.LPIPS | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, job: Job, image: torch.Tensor, info: images.reading.ImageInfo) -> None:
        """Write the file of an image (C, H, W), and measure it."""
        vae = self.session.vae
        original = image[None].to(vae.device)  # (1, C, H, W)
        data = codec.compression.compress(vae, original, quality=self.quality)
        # durable: the photograph may be deleted once this is there
        with whole_file(job.target, CodecError, CANNOT_WRITE, durable=True) as partial:
            partial.write_bytes(data)
        # measured on what the file gives, and not on what the encoder has in hand
        decoded = codec.compression.decode_payload(vae, *codec.compression.unpack(data))
        (figures,) = self.metrics.add(job.name, original, decoded)
        row: dict[str, Any] = {"file": str(job.target), "width": info.width, "height": info.height}
        # of the whole file: header and padding count
        row |= {"bytes": len(data), "bpp": 8 * len(data) / (info.width * info.height)}
        row |= {"quality": self.quality, "psnr": figures.psnr, "ssim": figures.ssim, "lpips": figures.lpips}
        if self.rival is not None and figures.lpips is not None:
            row["at_equal_lpips"] = _rivals(self.rival, original, figures.lpips)
        self.rows.append({**row, "notes": info.notes})

    def tell_one(self) -> None:
        """Print the figures of one image."""
        (row,), summary = self.rows, self.metrics.summary()
        notes = [*row["notes"], *summary.notes]
        shown = [f"{row['bytes']:,} bytes", f"{row['bpp']:.4f} bpp (whole file)"]
        figures = {name: row[name] for name in ("psnr", "ssim", "lpips")}
        shown += [f"{name.upper()} {value:.4g}" for name, value in figures.items() if value is not None]
        if "at_equal_lpips" in row:
            at = ", ".join(f"{name} {_bytes(size)}" for name, size in row["at_equal_lpips"].items())
            shown.append(f"bytes at this LPIPS: {at}")
        result = {**row, "lpips_net": summary.protocol.lpips_net, "notes": notes}
        lines = [f"{row['file']}: {', '.join(shown)}", *(f"note: {note}" for note in notes)]
        tell(result, lines, self.session.json)

    def tell_all(self, output: Path, kept: int) -> None:
        """Print the table of a folder."""
        total = sum(row["bytes"] for row in self.rows)
        result: dict[str, Any] = {"folder": str(output), "files": self.rows, "kept": kept, "bytes": total}
        lines = [f"{counted(len(self.rows), 'file')} in {output}{_kept(kept)}, {total:,} bytes."]
        if self.rows:
            summary = self.metrics.summary()
            result |= {"lpips_net": summary.protocol.lpips_net, "notes": list(summary.notes)}
            lines = [*_table(self.rows, self.rival is not None, output), "", *lines]
            lines += [f"note: {note}" for note in summary.notes]
        tell({**result, **self.session.passed_over}, lines, self.session.json)


def _rivals(lpips: measure.lpips.LPIPS, original: torch.Tensor, wanted: float) -> dict[str, int | None]:
    """Bytes of JPEG and WebP at the same LPIPS of an image (1, C, H, W)."""
    picture, metrics = images.saving.to_pil(original), measure.metrics.Metrics(lpips)

    def distance(data: bytes) -> float:
        decoded = images.reading.load_image(data, channels=original.shape[1])[None].to(original.device)
        return float(metrics.add("", original, decoded)[0].lpips or 0.0)

    return {name: codec.rivals.size_at(picture, name, distance, wanted) for name in codec.rivals.FORMATS}


def _table(rows: list[dict[str, Any]], compared: bool, output: Path) -> list[str]:
    """Every file with its figures, and the sums of those that all formats reach."""
    names = [Path(row["file"]).relative_to(output).as_posix() for row in rows]
    wide = max(len(name) for name in [*names, "all"])
    lines = [f"{'file':<{wide}}  {'size':>11}  {'bytes':>10}  {'bpp':>6}  {'PSNR':>5}  {'LPIPS':>6}"]
    lines[0] += f"  {'JPEG':>10}  {'WebP':>10}  bytes at this LPIPS" if compared else ""
    for name, row in zip(names, rows, strict=True):
        lpips = "-" if row["lpips"] is None else f"{row['lpips']:.4f}"
        size = f"{row['width']}x{row['height']}"
        line = f"{name:<{wide}}  {size:>11}  {row['bytes']:>10,}  {row['bpp']:>6.3f}  {row['psnr']:>5.2f}"
        found = row.get("at_equal_lpips", dict.fromkeys(codec.rivals.FORMATS)) if compared else {}
        lines.append(f"{line}  {lpips:>6}" + "".join(f"  {_bytes(each):>10}" for each in found.values()))
    alike = [row for row in rows if compared and None not in row.get("at_equal_lpips", {"": None}).values()]
    if len(alike) > 1:
        sums = [sum(row["at_equal_lpips"][name] for row in alike) for name in codec.rivals.FORMATS]
        what = "all" if len(alike) == len(rows) else f"{len(alike)} that all reach"
        total = f"{sum(row['bytes'] for row in alike):>{wide + 25 - len(what)},}"
        lines.append(f"{what}{total}" + " " * 23 + "".join(f"  {each:>10,}" for each in sums))
    return lines


def _bytes(size: int | None) -> str:
    return "not reached" if size is None else f"{size:,}"


def _kept(count: int) -> str:
    return f", {count} that were there already" if count else ""


def _kind_of(path: Path) -> str:
    """ "folder", "file", or nothing.

    Raises:
        CodecError: one may not look there, or the name is too long.
    """
    try:
        # exists() and is_dir() raise where a name is too long or a folder is closed
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except OSError as error:
        raise CodecError(f"{path} cannot be used ({error.strerror or error}): choose another.") from error


def _check_file(path: Path, overwrite: bool) -> None:
    """Refuse to write over what may be a photograph, or over an earlier file without being told to.

    Raises:
        CodecError: a name that does not end in .lvae, a folder, or a file that is there.
    """
    if path.suffix.lower() != SUFFIX or _kind_of(path) == "folder":
        raise CodecError(f"{path} came as the file to write; wanted a name that ends in {SUFFIX}.")
    check_file(path, overwrite=overwrite, error=CodecError)


def _check_picture(path: Path, overwrite: bool) -> None:
    """Refuse, before anything is decoded, a picture that could not be written or would cost another.

    Raises:
        CodecError: a name that ends in no format there is, a folder that is not there, or a file that is.
    """
    if path.suffix.lower() not in images.saving.SAVE_OPTIONS:
        known = ", ".join(images.saving.SAVE_OPTIONS)
        raise CodecError(f"{path} came as the picture to write; wanted a name that ends in {known}.")
    if _kind_of(path.parent) != "folder" or _kind_of(path) == "folder":
        raise CodecError(f"{path} cannot be written: use a folder that exists, and a new name in it.")
    check_file(path, overwrite=overwrite, error=CodecError)

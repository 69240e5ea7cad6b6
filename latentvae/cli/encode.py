"""`latentvae encode`: images to a store of latents."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latentvae import images, models, runtime, store
from latentvae.base.errors import LatentVAEError, NoMemoryError
from latentvae.cli.options import EXIT_INTERRUPTED, EXIT_SKIPPED, counted, tell
from latentvae.cli.session import Session, takes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Fixed, because tiles change the last bits: a store must not depend on how much memory happens to be free.
TILE = 1024
TILED_MEMORY = 1e9
SHOWN = 20  # vanished, dropped or damaged ones, and captions, that are named; --json has all


NoUpscale = Annotated[
    bool,
    typer.Option(
        "--no-upscale",
        help="With --size: smaller images keep their size, cropped to multiples of 8 latents (64 px).",
    ),
]


Size = Annotated[
    int | None,
    typer.Option(
        help="Scale and crop to aspect ratios of about SIZE x SIZE pixels. Default: images as they are."
    ),
]


Rehash = Annotated[
    bool,
    typer.Option("--rehash", help="Read all files again: finds those replaced at the same size and time."),
]


Folder = Annotated[
    Path,
    typer.Argument(help="Folder of the latents: new, or to be brought up to date.", metavar="STORE"),
]


BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Images up to 512 x 512 pixels at once; of larger ones fewer. Default: 8."),
]


@takes("model", ..., "device", "precision", "json")
def encode(
    session: Session,
    photos: Annotated[list[Path], typer.Argument(help="Images or folders.", show_default=False)],
    folder: Folder,
    dtype: Annotated[Literal["bf16", "fp32", "fp16"], typer.Option(help="Of the stored moments.")] = "bf16",
    size: Size = None,
    crop: Annotated[bool, typer.Option("--crop", help="Crop the middle SIZE x SIZE instead.")] = False,
    no_upscale: NoUpscale = False,
    flips: Annotated[bool, typer.Option("--flips", help="Store the mirror images' latents too.")] = False,
    batch_size: BatchSize = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Images in a shard. Default: 1024.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Take images out whose files are gone.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try images again that failed, though they are unchanged.")
    ] = False,
    rehash: Rehash = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Write STORE/preview.png: images beside their decoded latents.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Batches at once on a CPU. Default: one per core, if memory allows."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that load images.")] = None,
) -> None:
    """Encode images to a store of latents to train from; run again, it only does what has changed.

    Several processes share the work: torchrun --nproc-per-node 8 -m latentvae.cli encode PHOTOS... STORE.
    A caption or label is taken from NAME.txt, NAME.json or metadata.jsonl beside the image.
    """
    if os.environ.get("RANK", "0") == "0":  # the first process speaks for all
        for line in store.handing.found_caches(photos):
            typer.echo(line, err=True)
    vae, weights = _prepare(session)
    # a batch holds at most so many pixels, however large its images are
    threads = threads or runtime.memory.batches_at_once(vae, 512, 512 * (batch_size or 8))
    with _pausable():
        report = store.encoding.encode_folder(
            vae,
            photos,
            folder,
            dtype=dtype,
            size=size,
            crop=crop,
            no_upscale=no_upscale,
            flips=flips,
            batch_size=batch_size,
            shard_size=shard_size,
            prune=prune,
            retry_failed=retry_failed,
            rehash=rehash,
            weights_sha256=weights,
            workload=store.encoding.Workload(threads, workers, _room_for(vae, threads), progress=True),
        )
    if os.environ.get("RANK", "0") == "0":  # the first process speaks for all
        _draw(vae, folder, preview and bool(report.images))
        _tell(report, folder, session.json)


def _draw(vae: AutoencoderKL, folder: Path, wanted: bool) -> None:
    """The contact sheet; after the run, so that it shows what is on disk, decoded."""
    if wanted:
        sheet = store.verification.contact_sheet(folder, vae)
        images.saving.save_picture(sheet, folder / store.verification.PREVIEW)


@contextmanager
def _pausable() -> Iterator[None]:
    """Ctrl-C is how long runs are paused, so it is no failure and needs no stack trace."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped: finished shards are kept, and the same command goes on after them.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _prepare(session: Session) -> tuple[AutoencoderKL, str]:
    """The model, its weights rounded to a precision, and their hash from before."""
    vae = runtime.devices.load_model(session.model, _own_device(session.device), "fp32")
    # before they are rounded: `decode` compares the hash with that of weights that are not
    weights = models.fingerprint.weight_hash(vae)
    dtype = runtime.devices.DTYPES[session.precision]
    if vae.dtype != dtype:
        models.loading.cast(vae, dtype)
    tile_large(vae)
    return vae, weights


def _own_device(device: str | None) -> str:
    """Of this process: each process of a machine gets a GPU of its own."""
    device = device or runtime.devices.best_device()
    # torchrun sets LOCAL_RANK: without it every process would take GPU 0
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def tile_large(vae: AutoencoderKL) -> None:
    """Have images with a side above `TILE` tiled exactly, however much memory there is."""
    runtime.tiling.switch.enable_exact_tiling(vae, TILE, memory=TILED_MEMORY)


def _room_for(vae: AutoencoderKL, threads: int) -> store.encoding.Room:
    """Have large images encoded alone, where several at once would not fit into memory."""

    def room(path: Path, height: int, width: int) -> AbstractContextManager[object] | None:
        # on a GPU one batch is worked on at a time
        many = threads if vae.device.type == "cpu" else 1
        needed = plan_peak(vae, height, width)
        free = runtime.memory.SHARE * runtime.memory.free_memory(vae.device)
        if needed > free:
            raise NoMemoryError(
                f"{path} of {width}x{height} px takes about {needed / 1e9:.1f} GB in tiles, and "
                f"{free / 1e9:.1f} GB can be had: make it smaller, or encode with --size."
            )
        # any context will do: that there is one says that the image is encoded while nothing else is
        return None if many * needed <= free else nullcontext()

    return room


def plan_peak(vae: AutoencoderKL, height: int, width: int) -> int:
    """Bytes above the weights that encoding an image takes, tiled as the VAE is set to."""
    return runtime.tiling.planning.plan(vae, height, width).encode.peak_bytes


def _tell(report: store.encoding.EncodeReport, folder: Path, as_json: bool) -> None:
    """Print what was done, and end with exit code 3 where images failed or a package is missing for some.

    Raises:
        LatentVAEError: all images failed.
    """
    left_out = [images.kinds.describe(report.left_out)] if report.left_out else []
    for line in [*left_out, *(f"failed: {failure.reason}" for failure in report.failures), *_changes(report)]:
        typer.echo(line, err=True)  # standard output is for the result
    if report.failures and not report.images:
        raise LatentVAEError(
            f"none of the {len(report.failures)} images could be encoded; the first: "
            f"{report.failures[0].reason}"
        )
    rate = f", {report.images_per_second:.1f} images/s" if report.encoded else ""
    waited = f", {report.waiting:.0%} of the time waiting for data" if report.encoded else ""
    left = [note for note in report.captions if " left out: " in note]
    dropped = f" {counted(len(left), 'caption')} left out, as named above." if left else ""
    done = f"{counted(report.encoded, 'file')} done now{rate}{waited}.{dropped}"
    line = f"{counted(report.images, 'image')} in {folder}; {done}"
    tell({"store": str(folder), **report.as_dict()}, [line], as_json)
    if report.failures:
        failed = counted(len(report.failures), "image")
        typer.echo(f"{failed} could not be encoded, as named above.", err=True)
    if report.failures or images.kinds.wants_extra(report.left_out):
        sys.stdout.flush()  # the result goes before the message of the exit, also into a pipe
        raise typer.Exit(EXIT_SKIPPED)


def _changes(report: store.encoding.EncodeReport) -> Iterator[str]:
    """What became of images that were in the store, and of captions; many are counted."""
    for what, names in (
        ("gone, still in the store (--prune takes them out)", report.vanished),
        ("gone, taken out", report.dropped),
        ("was damaged and has been encoded again", report.repaired),
        ("caption", report.captions),
        ("caption of no image", report.unclaimed),
    ):
        yield from (f"{what}: {name}" for name in names[:SHOWN])
        if len(names) > SHOWN:
            yield f"{what}: {len(names) - SHOWN} more"

"""`latentvae encode`: images to a store of latents."""

from __future__ import annotations

import copy
import io
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentvae import images, models, runtime, store
from latentvae.base.addresses import place
from latentvae.base.errors import LatentVAEError, NoMemoryError, StoreError
from latentvae.cli.options import EXIT_INTERRUPTED, EXIT_SKIPPED, counted, tell
from latentvae.cli.session import Session, takes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Fixed, because tiles change the last bits: a store must not depend on how much memory happens to be free.
TILE = 1024
TILED_MEMORY = 1e9
SHOWN = 20  # vanished, dropped or damaged ones, and captions, that are named; --json has all

Dtype = Annotated[
    Literal["bf16", "fp32", "fp16"], typer.Option(help="Of the stored moments: fp32 takes twice the room.")
]
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
Preview = Annotated[
    bool, typer.Option("--preview", help="Write STORE/preview.png: images beside their decoded latents.")
]
Rehash = Annotated[
    bool,
    typer.Option("--rehash", help="Read all files again: finds those replaced at the same size and time."),
]
Folder = Annotated[
    str,
    typer.Argument(
        help="Folder of the latents, or its address: new, or to be brought up to date.", metavar="STORE"
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images up to 512 x 512 pixels at once, of larger ones fewer; a batch that is not full is "
        "filled up. Default: 1 on a CPU, else 8.",
    ),
]
Sources = Annotated[
    list[str],
    typer.Argument(
        help="Folders, images, .tar shards, .parquet files, saved datasets, lists (.jsonl, .csv), patterns.",
        metavar="SOURCES...",
        show_default=False,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        help="Which column holds the images (tables, lists), or the extension of the members to take (tars). "
        "Default: found by itself."
    ),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Try images again that failed, though they are unchanged.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Batches at once on a CPU. Default: one per core, if memory allows.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads that read images. Default: one per core, at most 16.")
]
PartOf = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="RANK/WORLD",
        help="Encode one part of several, counted from 0: 0/8 to 7/8. Default: as torchrun's RANK and "
        "WORLD_SIZE or a Slurm array say, else all.",
    ),
]
Finish = Annotated[
    bool,
    typer.Option("--finish", help="Encode nothing: write store.json once all parts are done, or name them."),
]
EngineName = Annotated[
    Literal["local", "ray"],
    typer.Option(help="Who encodes: this process, or the nodes of a Ray cluster, and this one writes."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="The cluster: auto, ray://HOST:10001. Default: $RAY_ADDRESS, else the one that runs on this "
        "machine, else a new one here."
    ),
]
RayGpus = Annotated[
    float | None,
    typer.Option(min=0, help="GPUs of a task, 0.5 for two on one. Default: 1 where the cluster has some."),
]


@takes("model", ..., "device", "precision", "json")
def encode(
    session: Session,
    sources: Sources,
    folder: Folder,
    dtype: Dtype = "bf16",
    size: Size = None,
    crop: Annotated[bool, typer.Option("--crop", help="Crop the middle SIZE x SIZE instead.")] = False,
    no_upscale: NoUpscale = False,
    flips: Annotated[bool, typer.Option("--flips", help="Store the mirror images' latents too.")] = False,
    column: Column = None,
    batch_size: BatchSize = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Images in a shard. Default: 1024.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Take images out whose files are gone.")] = False,
    retry_failed: RetryFailed = False,
    rehash: Rehash = False,
    preview: Preview = False,
    threads: Threads = None,
    workers: Workers = None,
    part: PartOf = None,
    finish: Finish = False,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = None,
) -> None:
    """Encode images to a store of latents to train from; run again, it only does what has changed.

    In parts: --part 0/2 and --part 1/2 at any time and anywhere; the last of them completes the store.
    A caption or label is taken from NAME.txt, NAME.json or metadata.jsonl beside the image, or from columns.
    """
    if finish:
        return _tell(store.encoding.finish_store(sources, folder, column=column), folder, session.json)
    own = store.parts.parse(part) if part else store.parts.of_environment()
    _tell_caches(sources, own)
    if engine == "ray":
        vae, weights, work = _cluster(session, threads, workers, ray_address, ray_gpus, own)
        batch_size = _batch_size(work.engine, folder, batch_size)
    else:
        vae, weights, work = _machine(session, threads, workers, (folder, batch_size), own)
    with _pausable(), _result_alone(engine):
        report = store.encoding.encode_folder(
            vae,
            sources,
            folder,
            dtype=dtype,
            size=size,
            crop=crop,
            no_upscale=no_upscale,
            flips=flips,
            column=column,
            batch_size=batch_size,
            shard_size=shard_size,
            prune=prune,
            retry_failed=retry_failed,
            rehash=rehash,
            weights_sha256=weights,
            workload=work,
        )
    _draw(vae, folder, preview and bool(report.images) and not (report.missing or report.others))
    _tell(report, folder, session.json)


def _tell_caches(sources: list[str], part: store.parts.Part) -> None:
    """Name what other tools have cached among the images; the first part speaks for all."""
    for line in store.handing.found_caches(sources) if part.rank == 0 else ():
        typer.echo(line, err=True)


def _has_bar() -> bool:
    """Of several processes on a terminal one shows its progress."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _draw(vae: AutoencoderKL, folder: str, wanted: bool) -> None:
    """The contact sheet; after the run, so that it shows what is on disk, decoded."""
    if not wanted:
        return
    sheet, file = store.verification.contact_sheet(folder, vae), place(folder) / store.verification.PREVIEW
    if isinstance(file, Path):
        images.saving.save_picture(sheet, file)
        return
    drawn = io.BytesIO()
    sheet.save(drawn, "PNG")
    file.write_bytes(drawn.getvalue())


@contextmanager
def _pausable() -> Iterator[None]:
    """Ctrl-C is how long runs are paused, so it is no failure and needs no stack trace."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped: finished shards are kept, and the same command goes on after them.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _result_alone(engine: str) -> AbstractContextManager[object]:
    """Keep standard output for the result: Ray says there what becomes of its nodes."""
    return redirect_stdout(sys.stderr) if engine == "ray" else nullcontext()


def _machine(
    session: Session,
    threads: int | None,
    workers: int | None,
    sizes: tuple[str, int | None],
    part: store.parts.Part,
) -> tuple[AutoencoderKL, str, store.encoding.Workload]:
    """What encodes in this process: the model, the hash of its weights, and how it works."""
    vae, weights = _prepare(session)
    folder, asked = sizes
    rows = store.settings.rows_at_once(vae, store.remote.settings(place(folder)), asked)
    # a batch holds at most so many pixels, however large its images are
    threads = threads or runtime.memory.batches_at_once(vae, 512, 512 * rows)
    work = store.encoding.Workload(threads, workers, _room_for(vae, threads), _has_bar(), part)
    return vae, weights, work


def _prepare(session: Session) -> tuple[AutoencoderKL, str]:
    """The model, its weights rounded to a precision, and their hash from before."""
    vae = runtime.devices.load_model(session.chosen, session.device, "fp32")
    # before they are rounded: `decode` compares the hash with that of weights that are not
    weights = models.fingerprint.weight_hash(vae)
    _round(vae, session.precision)
    return vae, weights


def _cluster(
    session: Session,
    threads: int | None,
    workers: int | None,
    address: str | None,
    gpus: float | None,
    part: store.parts.Part,
) -> tuple[AutoencoderKL, str, store.encoding.Workload]:
    """The same for a cluster of Ray, whose processes get the model as it was loaded.

    Raises:
        StoreError: a part of several, or no cluster.
    """
    if part != store.parts.WHOLE:
        raise StoreError(
            f"--engine ray came for part {part} of several: Ray divides the work itself. Give one of both."
        )
    if session.device is not None:
        raise StoreError(
            "--device came with --engine ray, whose nodes have their own: give --ray-gpus, 0 for none."
        )
    vae = models.loading.load(session.chosen)
    weights = models.fingerprint.weight_hash(vae)
    equip = partial(equip_node, precision=session.precision, threads=threads, workers=workers)
    engine = store.cluster.Ray(copy.deepcopy(vae), equip, address, threads, gpus)
    models.loading.cast(vae, runtime.devices.DTYPES[session.precision])
    return vae, weights, store.encoding.Workload(progress=_has_bar(), part=part, engine=engine)


def _batch_size(engine: Any, folder: str, asked: int | None) -> int | None:
    """As asked for; a new store of nodes with GPUs has their default, though the model here is on a CPU."""
    new = asked is None and store.remote.settings(place(folder)) is None
    return store.settings.BATCH_SIZE if new and engine.gpus else asked


def equip_node(
    vae: AutoencoderKL, precision: str, threads: int | None, workers: int | None
) -> tuple[AutoencoderKL, store.encoding.Workload]:
    """Make the model ready in a process of a cluster, as `encode` does on one machine."""
    cores, has_gpu = store.cluster.own_share()
    device = runtime.devices.usable_device(None if has_gpu else "cpu")
    vae = runtime.optimize.optimize(vae.to(device).eval())
    _round(vae, precision)
    threads = threads or cores
    return vae, store.encoding.Workload(threads, workers or threads, _room_for(vae, threads))


def _round(vae: AutoencoderKL, precision: str) -> None:
    dtype = runtime.devices.DTYPES[precision]
    if vae.dtype != dtype:
        models.loading.cast(vae, dtype)
    tile_large(vae)


def tile_large(vae: AutoencoderKL) -> None:
    """Have images with a side above `TILE` tiled exactly, however much memory there is."""
    runtime.tiling.switch.enable_exact_tiling(vae, TILE, memory=TILED_MEMORY)


def _room_for(vae: AutoencoderKL, threads: int) -> store.encoding.Room:
    """Have large images encoded alone, where several at once would not fit into memory."""

    def room(name: str, height: int, width: int) -> AbstractContextManager[object] | None:
        # on a GPU one batch is worked on at a time
        many = threads if vae.device.type == "cpu" else 1
        needed = plan_peak(vae, height, width)
        free = runtime.memory.SHARE * runtime.memory.free_memory(vae.device)
        if needed > free:
            raise NoMemoryError(
                f"{name} of {width}x{height} px takes about {needed / 1e9:.1f} GB in tiles, and "
                f"{free / 1e9:.1f} GB can be had: make it smaller, or encode with --size."
            )
        # any context will do: that there is one says that the image is encoded while nothing else is
        return None if many * needed <= free else nullcontext()

    return room


def plan_peak(vae: AutoencoderKL, height: int, width: int) -> int:
    """Bytes above the weights that encoding an image takes, tiled as the VAE is set to."""
    return runtime.tiling.planning.plan(vae, height, width).encode.peak_bytes


def _tell(report: store.encoding.EncodeReport, folder: str, as_json: bool) -> None:
    """Print what was done, and end with exit code 3 where images failed or a package is missing for some.

    Raises:
        LatentVAEError: all images failed.
    """
    left_out = [images.kinds.describe(report.left_out)] if report.left_out else []
    for line in [*left_out, *(f"failed: {failure.reason}" for failure in report.failures), *_changes(report)]:
        typer.echo(line, err=True)  # standard output is for the result
    if report.failures and not report.images:
        count, first = len(report.failures), report.failures[0].reason
        if count == 1:
            raise LatentVAEError(f"the only image could not be encoded: {first}")
        raise LatentVAEError(f"none of the {count} images could be encoded; the first: {first}")
    rate = f", {report.images_per_second:.1f} images/s" if report.encoded else ""
    waited = f", {report.waiting:.0%} of the time waiting for data" if report.encoded else ""
    left = [note for note in report.captions if " left out: " in note]
    dropped = f" {counted(len(left), 'caption')} left out, as named above." if left else ""
    done = f"{counted(report.encoded, 'file')} done now{rate}{waited}.{dropped}"
    part = "" if report.part == str(store.parts.WHOLE) else f"part {report.part}: "
    where = str(place(folder))
    line = f"{part}{counted(report.images, 'image')} in {where}; {done}"
    tell({"store": where, **report.as_dict()}, [line, *_unfinished(report)], as_json)
    if report.failures:
        failed = counted(len(report.failures), "image")
        typer.echo(f"{failed} could not be encoded, as named above.", err=True)
    if report.failures or images.kinds.wants_extra(report.left_out):
        sys.stdout.flush()  # the result goes before the message of the exit, also into a pipe
        raise typer.Exit(EXIT_SKIPPED)


def _unfinished(report: store.encoding.EncodeReport) -> Iterator[str]:
    """What is left to do before there is a store."""
    if report.others:
        yield f"store.json is not written yet: {', '.join(report.others)} still at it; the last to end does."
    elif report.missing:
        still = store.encoding.describe(report.missing)
        yield f"store.json is not written yet: {still} The last of them does it, or --finish."


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

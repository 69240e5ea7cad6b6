"""`latentvae doctor`: whether a model survives half precision, and a rescaled copy that does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentvae import measure, models, pipelines
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import check_folder, whole_file
from latentvae.cli.options import ModelArgument, SameModel, tell
from latentvae.cli.session import Session, read_sidecar, takes
from latentvae.cli.speed import tell_speed

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

    from latentvae.measure.diagnosis import Diagnosis, DtypeReport
    from latentvae.pipelines.doctor.rescaling import Rescaling

EXIT_OVERFLOWS = 5
TABLE_LAYERS = 8  # rows; --json has all layers
THIN_HEADROOM = 2.0  # other images than the probes may well give twice their largest values


@takes(..., "device", "json")
def doctor(
    session: Session,
    model: ModelArgument = None,
    same: SameModel = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Image or folder to probe with, beside the synthetic extremes; may be given several times. "
            "Default: a sample picture."
        ),
    ] = None,
    size: Annotated[
        int, typer.Option(min=16, help="Side of the probes, pixels; of images, the centre is taken.")
    ] = 256,
    fix: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a rescaled copy: the same in fp32, finite in fp16, force_upcast False."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Let --fix replace an earlier export.")] = False,
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Instead, the fastest way on this CPU for --size: measured, and kept."),
    ] = False,
) -> None:
    """Say whether fp16 and bf16 give what fp32 gives: each layer's largest value, overflows, error in dB.

    Ends with exit code 5 where fp16 overflows or is inexact, unless --fix wrote a copy where it is neither.
    """
    session.model = name = model or same or models.shipped.DEFAULT_MODEL
    if speed:
        if images or fix:
            raise LatentVAEError("--speed came with --images or --fix, which it has no use for: drop them.")
        return tell_speed(session, size)
    _check_fix(fix, overwrite)
    # in fp32: what the halves are compared with
    vae = session.load()
    probes, count = _read_probes(session, images, size)
    diagnosis, rescaling, problem = _examine(vae, probes, rescaled=fix is not None)
    if fix is not None and rescaling is not None:
        _write(rescaling, fix, name, overwrite)
    fixed = _fix_as_dict(rescaling, fix, problem) if fix else None
    result = {"model": name, **diagnosis.as_dict(), "fix": fixed, **session.passed_over}
    tell(result, [*_report(name, diagnosis), *_outcome(diagnosis, rescaling, fix, problem)], session.json)
    # with a copy that works the verb has done what it was asked, whatever the source is like
    if rescaling is None and not diagnosis.fp16_works:
        raise typer.Exit(EXIT_OVERFLOWS)
    session.finish(count)


def _examine(
    vae: AutoencoderKL, probes: dict[str, torch.Tensor], rescaled: bool
) -> tuple[Diagnosis, Rescaling | None, str | None]:
    """The model's diagnosis; if asked for, the rescaled copy, or why there is none."""
    doctor = pipelines.doctor
    if not rescaled:
        return measure.diagnosis.diagnose(vae, probes), None, None
    try:
        rescaling = doctor.rescaling.rescale(vae, probes)
    # the diagnosis is printed all the same: it says where to look
    except doctor.rescaling.UnfixableError as error:
        return error.diagnosis, None, str(error)
    return rescaling.before, rescaling, None


def _check_fix(folder: Path | None, overwrite: bool) -> None:
    """Refuse a folder that the export would refuse, before minutes are spent.

    Raises:
        LatentVAEError: it holds something that is not to be replaced.
    """
    if folder is None or not folder.exists():
        return
    if overwrite and folder.is_dir():
        check_folder(folder, "export", models.loading.SIDECAR, instead="Choose another --fix")
    elif not folder.is_dir() or any(folder.iterdir()):
        raise LatentVAEError(
            f"--fix {folder} is there already; wanted a new or empty folder. Choose another, or pass "
            "--overwrite to replace an earlier export."
        )


def _read_probes(
    session: Session, named: list[Path] | None, size: int
) -> tuple[dict[str, torch.Tensor], int]:
    """Synthetic extremes and the centres of images, by name, and how many images there are.

    Raises:
        LatentVAEError: none of the images can be read, or the model takes other channels than images have.
    """
    channels = session.vae.config["in_channels"]
    # synthetic extremes have any number of channels, so that such a model can be examined too
    if channels not in (1, 3) and named:
        raise LatentVAEError(f"this model takes {channels} channels; image files have 1 or 3. Omit --images.")
    found = named or [models.shipped.SAMPLE_PICTURE]
    # the sample picture is a photograph, and no measurement
    readable = channels in (1, 3) and (named or models.loading.window_of(session.vae) is None)
    paths = session.find_images(found) if readable else []
    centres = session.read_centres(paths, session.vae, size)
    # the sample picture lies in the package: its folder says nothing to people
    probes = {str(path) if named else path.name: image for path, image in centres}
    return {**probes, **measure.diagnosis.synthetic_probes(channels, size)}, len(probes)


def _write(rescaling: Rescaling, folder: Path, source: str, overwrite: bool) -> None:
    """Export the copy, its card and sidecar those of the source where it has them, saying what was done."""
    # licence and data are those of the source, because its weights are
    sidecar = read_sidecar(source)
    models.exporting.export(
        rescaling.vae, folder, provenance=_provenance(rescaling, source, sidecar), overwrite=overwrite
    )
    if sidecar.get("latent_statistics"):  # the latents are the source's, so its figures hold
        path = folder / models.loading.SIDECAR
        written = json.loads(path.read_text(encoding="utf-8"))
        written["latent_statistics"] = sidecar["latent_statistics"]
        with whole_file(path) as partial:
            partial.write_text(json.dumps(written, indent=1), encoding="utf-8")


def _provenance(rescaling: Rescaling, source: str, sidecar: dict[str, Any]) -> models.card.Provenance:
    """The source's, and what was done to it."""
    known = {
        field.name: sidecar[field.name] for field in fields(models.card.Provenance) if field.name in sidecar
    }
    origin = models.card.Provenance(**known)
    if source.count("/") == 1 and not Path(source).exists():
        origin.base_model = source  # a hub id
    done = "nothing had to be rescaled"
    if rescaling.scales:
        # scales are powers of two, so that no weight is rounded
        done = f"{len(rescaling.scales)} scales changed for a headroom of {rescaling.headroom:g}"
    origin.training += (
        f" Then `latentvae doctor --fix`: {done}, force_upcast False; the largest error of its fp32 "
        f"reconstructions against the source's is {rescaling.images_error:.2g} of their range."
    )
    return origin


def _fix_as_dict(rescaling: Rescaling | None, folder: Path, problem: str | None) -> dict[str, Any]:
    """What --fix did, as JSON values."""
    if rescaling is None:
        return {"output": None, "problem": problem}
    return {
        "output": str(folder),
        "problem": None,
        "headroom": rescaling.headroom,
        "scales": rescaling.scales,
        "images_error": rescaling.images_error,
        "moments_error": rescaling.moments_error,
        "after": rescaling.after.as_dict(),
    }


def _report(name: str, diagnosis: Diagnosis) -> list[str]:
    """The diagnosis for people: hottest layers, dtypes, verdict."""
    layers = diagnosis.hottest(TABLE_LAYERS)
    rows = [("layer", "kind", "largest", "headroom")]
    # from the hottest: fp16 fails there first
    rows += [(one.name, one.kind, f"{one.largest:.4g}", f"{one.headroom:.3g}x") for one in layers]
    return [
        f"{name}: {len(diagnosis.probes)} probes ({', '.join(diagnosis.probes)})",
        "",
        *_table(rows),
        f"(largest absolute value in fp32, of {len(diagnosis.layers)} layers; headroom to fp16's 65504)",
        "",
        *_dtype_lines(diagnosis),
    ]


def _dtype_lines(diagnosis: Diagnosis) -> list[str]:
    """One row for each dtype, and where it overflows."""
    reports = list(diagnosis.dtypes.values())
    rows = [("against fp32", "finite", "latents error", "images dB", "first overflow")]
    for one in reports:
        error, psnr = one.worst_latents_error, one.worst_psnr  # None where the dtype gave no finite value
        first = one.first_overflow
        cells = ("-" if error is None else f"{error:.2g}", "-" if psnr is None else f"{psnr:.1f}")
        rows.append((one.dtype, "no" if first else "yes", *cells, first.layer if first else "-"))
    return [
        *_table(rows),
        "(of the worst probe; latents: |difference| / |latents|; images decoded from fp32's latents: PSNR)",
        f"(arithmetic {reports[0].arithmetic})",
        *(line for one in reports for line in _overflow_lines(one)),
    ]


def _overflow_lines(dtype: DtypeReport) -> list[str]:
    """Each overflow of a dtype in a sentence."""
    return [
        f"{dtype.dtype}, {what}: {one.layer} ({one.kind}) overflows first, "
        + ("its weights do already" if one.in_weights else f"for the probe {one.probe!r}")
        for what, one in (("encoding", dtype.encode_overflow), ("decoding", dtype.decode_overflow))
        if one
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned columns, the first row a heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _outcome(
    diagnosis: Diagnosis, rescaling: Rescaling | None, folder: Path | None, problem: str | None
) -> list[str]:
    """The verdict, and what --fix did."""
    lines = ["", f"verdict: {verdict(diagnosis)}", f"force_upcast: {_upcast(diagnosis)}"]
    if problem:
        return [*lines, f"--fix: {problem} Nothing was written."]
    if rescaling is None:
        return lines
    scales = [f"  {layer}: times {scale:g}" for layer, scale in rescaling.scales.items()]
    largest = rescaling.after.hottest(1)[0]
    return [
        *lines,
        "",
        f"--fix: wrote {folder}, force_upcast False; {len(scales)} scales changed"
        + (f" for a headroom of {rescaling.headroom:g} (each at its first layer):" if scales else "."),
        *scales,
        f"in fp32 it differs by {rescaling.images_error:.2g} of the range of the reconstructions and by "
        f"{rescaling.moments_error:.2g} of the moments' (allowed: 1e-4)",
        f"in fp16 it is finite, {rescaling.after.dtypes['fp16'].worst_psnr:.1f} dB from fp32; largest value "
        f"{largest.largest:.4g} ({largest.headroom:.3g}x headroom) at {largest.name}",
    ]


def verdict(diagnosis: Diagnosis) -> str:
    """Whether fp16 works, in a sentence."""
    fp16, top = diagnosis.dtypes["fp16"], diagnosis.hottest(1)[0]
    if fp16.first_overflow:
        return f"fp16 overflows at {fp16.first_overflow.layer}: use bf16 or fp32, or try --fix OUT."
    if not diagnosis.fp16_works:
        wanted = measure.diagnosis.MIN_PSNR
        return f"fp16 is finite, but only {fp16.worst_psnr:.1f} dB from fp32 (wanted: {wanted:g}): use fp32."
    # finite on the probes is not finite on everything
    if top.headroom < THIN_HEADROOM:
        return (
            f"fp16 works, but barely: {top.name} has a headroom of {top.headroom:.3g}x; --fix OUT adds some."
        )
    return f"fp16 works: the least headroom is {top.headroom:.3g}x, at {top.name}."


def _upcast(diagnosis: Diagnosis) -> str:
    """The config's force_upcast against what it should be."""
    # diffusers decodes in fp32 where it is True, whatever dtype the pipeline has
    current, wanted = diagnosis.force_upcast, diagnosis.wanted_force_upcast
    if current == wanted:
        return f"{current}, as it should be."
    cost = "pipelines decode in fp32 needlessly" if current else "pipelines decode in fp16"
    return f"{current}, should be {wanted} ({cost})" + ("; --fix OUT sets it." if current else ".")

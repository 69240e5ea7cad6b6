"""`latentvae convert`: a VAE from any format to another, weights and config as they are."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from latentvae import models, runtime
from latentvae.base.errors import LatentVAEError
from latentvae.cli.options import Format, Json, Program, tell


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="As --model of the other verbs.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder, or file ending in .safetensors.")],
    to: Annotated[
        Format | None,
        typer.Option(
            help="diffusers: a folder. ldm: one file in LDM's names, for other programs. "
            "single-file: one file in diffusers' names, and its config as .json beside it."
        ),
    ] = None,
    program: Annotated[
        Program | None,
        typer.Option(
            "--for",
            help="One file in LDM's names that this program reads right: quant convolutions are folded away "
            "or added as it has them, or it is refused.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Type of the weights. Default: as in IN.")
    ] = None,
    prefix: Annotated[
        Literal["", "first_stage_model.", "vae."],
        typer.Option(help="Before LDM's names, to merge into a whole checkpoint."),
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    json: Json = False,
) -> None:
    """Convert a VAE, and prove it by reading it back. No weight changes but by --dtype and --for."""
    to = _format(to, program, prefix)
    formats = models.formats
    formats.writing.check_targets(output, to, overwrite)  # before a large file is read
    # as it is stored: no weight may change but by --dtype
    vae = models.loading.load(source, dtype=None)
    wanted = runtime.devices.DTYPES[dtype] if dtype else vae.dtype
    done: list[str] = []
    if program:
        vae, done = formats.adapting.adapt(vae, program)
    formats.writing.save(vae, output, to, dtype=wanted, prefix=prefix, overwrite=overwrite)
    # diffusers itself takes every config; the other programs guess parts of it
    notes = formats.programs.program_notes(vae.config) if to != "diffusers" else []
    name = str(wanted).removeprefix("torch.")
    result = {"output": str(output), "format": to, "dtype": name, "adapted": done, "notes": notes}
    by = "in stock diffusers" if formats.writing.stock_reads(vae.config, to) else "bit by bit"
    first = f"Wrote {output}, read back {by} without a difference."
    tell(result, [first, *([f"For {program}: {'; '.join(done)}."] if done else []), *notes], json)


def _format(to: Format | None, program: Program | None, prefix: str) -> Format:
    """The format that was asked for, by name or by a program, which reads bare LDM names.

    Raises:
        LatentVAEError: neither, or both and they do not fit.
    """
    if program and (to not in (None, "ldm") or prefix):
        raise LatentVAEError(f"--for {program} writes bare LDM names. Leave --to and --prefix out.")
    if not program and to is None:
        raise LatentVAEError("which format? Pass --to diffusers, ldm or single-file, or --for PROGRAM.")
    return to or "ldm"

"""`latentvae convert`: a VAE from any format to another, weights and config as they are."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from latentvae import models, runtime
from latentvae.cli.options import Json, tell


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="As --model of the other verbs.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder, or file ending in .safetensors.")],
    to: Annotated[
        Literal["diffusers", "ldm", "single-file"],
        typer.Option(
            help="diffusers: a folder. ldm: one file in LDM's names, for ComfyUI and A1111. "
            "single-file: one file in diffusers' names, and its config as .json beside it."
        ),
    ],
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Of the weights. Default: as in IN.")
    ] = None,
    prefix: Annotated[
        Literal["", "first_stage_model.", "vae."],
        typer.Option(help="Before LDM's names, to merge into a whole checkpoint."),
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    json: Json = False,
) -> None:
    """Convert a VAE, and prove it by reading it back in stock diffusers. No weight changes but by --dtype."""
    models.formats.writing.check_targets(output, to, overwrite)  # before a large file is read
    # as it is stored: no weight may change but by --dtype
    vae = models.loading.load(source, dtype=None)
    wanted = runtime.devices.DTYPES[dtype] if dtype else vae.dtype
    models.formats.writing.save(vae, output, to, dtype=wanted, prefix=prefix, overwrite=overwrite)
    # diffusers itself takes every config; the other programs guess parts of it
    notes = models.formats.programs.program_notes(vae.config) if to != "diffusers" else []
    name = str(wanted).removeprefix("torch.")
    result = {"output": str(output), "format": to, "dtype": name, "notes": notes}
    tell(result, [f"Wrote {output}, read back in stock diffusers without a difference.", *notes], json)

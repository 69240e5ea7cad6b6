"""`latentvae info`: what a model is."""

from json import loads as parse
from pathlib import Path
from typing import Any

import typer

from latentvae.cli.options import Json, ModelArgument, SameModel
from latentvae.cli.session import print_json
from latentvae.models.exporting import SIDECAR
from latentvae.models.loading import DEFAULT_MODEL, WEIGHTS_DIR, bundled, describe, load


def info(
    model: ModelArgument = None,
    same: SameModel = None,
    json: Json = False,
) -> None:
    """Print a model's config, parameters, compression ratio, channels and latent statistics."""

    model = model or same or DEFAULT_MODEL
    figures = describe(load(model))
    figures["latent_statistics"] = latent_statistics(model)
    figures["bundled_models"] = bundled()
    if json:
        print_json(figures)
        return
    for line in lines(figures):
        typer.echo(line)


def latent_statistics(model: str) -> dict[str, Any] | None:
    """Per-channel figures from the sidecar of an export; None for models that have none."""

    for folder in (WEIGHTS_DIR / model, Path(model), Path(model) / "vae"):
        if (folder / SIDECAR).is_file():
            return parse((folder / SIDECAR).read_text(encoding="utf-8")).get("latent_statistics")
    return None


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures as aligned text."""
    config, ratio = figures["config"], figures["spatial_compression_ratio"]
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "encoder, decoder": f"{figures['encoder_parameters']:,}, {figures['decoder_parameters']:,}",
        "compression": f"{ratio} x {ratio} pixels to one latent",
        "latent channels": config["latent_channels"],
        "image channels": config["in_channels"],
        "latent size": f"1 value to {figures['values_ratio']:g} of the image",
        "scaling_factor": config["scaling_factor"],
        "shift_factor": config["shift_factor"],
        "bundled models": ", ".join(figures["bundled_models"]) or "none",
    }
    if figures["latent_statistics"]:
        for key in ("latents_mean", "latents_std"):
            values = figures["latent_statistics"][key]
            rows[f"{key} per channel"] = " ".join(f"{value:.4g}" for value in values)
    width = max(len(name) for name in rows)
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in rows}
    return [
        *(f"{name:<{width}}  {value}" for name, value in rows.items()),
        "config:",
        *(f"  {key}: {value}" for key, value in settings.items()),
    ]

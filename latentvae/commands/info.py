"""`latentvae info`: what a model is."""

from typing import Annotated, Any

import typer

from latentvae.commands.common import Json, print_json


def info(
    model: Annotated[
        str | None, typer.Argument(help="As --model of the other verbs.", show_default="f8c4-small")
    ] = None,
    json: Json = False,
) -> None:
    """Print a model's config, parameters, compression ratio, channels and latent statistics."""
    from latentvae.model import bundled, describe, load

    figures = describe(load(model))
    figures["bundled_models"] = bundled()
    if json:
        print_json(figures)
        return
    for line in lines(figures):
        typer.echo(line)


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
    width = max(len(name) for name in rows)
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in rows}
    return [
        *(f"{name:<{width}}  {value}" for name, value in rows.items()),
        "config:",
        *(f"  {key}: {value}" for key, value in settings.items()),
    ]

"""`latentvae info`: what a model is, an .lvae file, or a store of latents."""

from pathlib import Path
from typing import Any

from latentvae import codec, models, store
from latentvae.base.addresses import Place, place
from latentvae.cli.options import Json, ModelArgument, SameModel, tell
from latentvae.cli.session import read_sidecar


def info(
    model: ModelArgument = None,
    same: SameModel = None,
    json: Json = False,
) -> None:
    """Print a model's config, parameters, compression ratio, channels and latent statistics.

    Of a compressed image, IN.lvae: its model, quality and size. Of a store (a folder that `latentvae encode`
    wrote, or its address): its images, its VAE, and what its latents are like.
    """
    # named here, because the sidecar is looked for under it
    model = model or same or models.shipped.DEFAULT_MODEL
    if Path(model).suffix.lower() == ".lvae":
        file = codec.compression.describe(model)
        tell(file, _file_lines(file), json)
        return
    folder = place(model)
    # a run that has not ended has no manifest yet, and is no model either
    if (folder / store.format.MANIFEST).is_file() or (folder / store.journal.FOLDER).is_dir():
        figures = _of_store(folder)
        tell(figures, _store_lines(figures), json)
        return
    figures = models.loading.describe(models.loading.load(model))
    figures["latent_statistics"] = read_sidecar(model).get("latent_statistics")
    figures["bundled_models"] = models.shipped.bundled()
    figures["other_programs"] = models.formats.programs.program_notes(figures["config"])
    tell(figures, _lines(figures), json)


def _file_lines(file: dict[str, Any]) -> list[str]:
    """What an .lvae file says of itself, as aligned text."""
    model = file["model"]
    if model is None:
        known = file["released"]
        model = f"{known[0]} of release {known[1]}" if known else "none that is bundled"
    rows = {
        "model": f"{model} (weights {file['weights']}...)",
        "quality": f"{file['quality']} of 100",
        "image": f"{file['width']}x{file['height']} px, {file['image_channels']} channels",
        "latent channels": file["latent_channels"],
        "size": f"{file['bytes']:,} bytes, {file['bpp']:.4f} bpp",
        "format version": file["version"],
    }
    return [f"{name:<15}  {value}" for name, value in rows.items()]


def _lines(figures: dict[str, Any]) -> list[str]:
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
    # keys with an underscore are those of diffusers itself
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in rows}
    return [
        *(f"{name:<{width}}  {value}" for name, value in rows.items()),
        "config:",
        *(f"  {key}: {value}" for key, value in settings.items()),
        "in LDM's names, for other programs:",
        *(f"  {note}" for note in figures["other_programs"]),
    ]


def _of_store(folder: Place) -> dict[str, Any]:
    """A store's figures as JSON values."""
    manifest = store.format.read_manifest(folder)
    # stores of earlier versions have none, and reading their moments takes a while
    statistics = manifest.statistics
    if statistics is None and isinstance(folder, Path):
        statistics = store.statistics.compute(folder, manifest)
    figures = manifest.model_dump(mode="json", exclude={"shards", "statistics"})
    figures |= {"images": manifest.count, "shards": len(manifest.shards)}
    if statistics is not None:
        figures |= {"statistics": statistics.model_dump(), **store.statistics.unscaled(statistics, manifest)}
    return figures


def _store_lines(figures: dict[str, Any]) -> list[str]:
    """The figures as aligned text, those of the latents as a table."""
    policy, names = figures["preprocessing"], ("images", "shards", "dtype", "precision", "flips")
    rows = {name: figures[name] for name in names} | {
        "images are": policy["policy"] + (f" {policy['size']}" if policy["size"] else ""),
        "weights_sha256": figures["weights_sha256"],
        "scaling_factor": figures["scaling_factor"],
        "shift_factor": figures["shift_factor"],
    }
    width = max(len(name) for name in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    if "statistics" not in figures:
        return lines
    statistics, percentiles = figures["statistics"], figures["statistics"]["percentiles"]
    columns = {
        "mean": statistics["mean"],
        "std": statistics["std"],
        **{f"{name} %": values for name, values in percentiles.items()},
        "latents_mean": figures["latents_mean"],
        "latents_std": figures["latents_std"],
    }
    lines += ["scaled latents by channel (latents_mean, latents_std: of unscaled ones, for a VAE's config):"]
    lines += ["  channel" + "".join(f"  {name:>12}" for name in columns)]
    for channel, values in enumerate(zip(*columns.values(), strict=True)):
        lines.append(f"  {channel:>7}" + "".join(f"  {value:>12.4g}" for value in values))
    return lines

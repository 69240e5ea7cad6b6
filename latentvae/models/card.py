"""Model cards: what a model is, where its weights come from, and what it was measured to do."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from diffusers import AutoencoderKL

from latentvae.models.formats.programs import program_notes
from latentvae.models.loading import spatial_compression_ratio

# An absolute path in a text: not the end of a relative one, a fraction or a URL.
ABSOLUTE_PATH = re.compile(r"""(?<![\w.~:/\\-])(?:[A-Za-z]:[\\/]|/)[^\s'",;:)]+""")


HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
PLACE = '"path/to/this/folder"'  # in the example; an upload puts its own there
FIGURES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "rate_bpp": "rate (KL), bits per pixel"}


@dataclass
class Provenance:
    """Where weights come from; goes into the model card and the sidecar."""

    name: str = "latentvae model"
    licence: str = "unknown"
    base_model: str | None = None
    trained_on: str = "not stated"
    training: str = "not stated"
    metrics: dict[str, Any] = field(default_factory=dict)  # MetricsSummary.as_dict()
    config: dict[str, Any] = field(default_factory=dict)  # the run's resolved configuration
    # of one-channel samples that became [-1, 1]; None: photographs, whose range their files' type says
    intensity_range: tuple[float, float] | None = None


def is_hub_id(name: str) -> bool:
    """Whether `name` is OWNER/NAME on the hub, as a card's base_model must be, and no file or folder here."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def without_paths(provenance: Provenance) -> Provenance:
    """A copy in which absolute paths are cut to their last part: an export is published, a home is not."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [cut(item) for item in value]
        # wholly a path, spaces and all; in a sentence only what the pattern finds
        if isinstance(value, str | Path) and Path(value).is_absolute():
            return Path(value).name
        if isinstance(value, str):
            return ABSOLUTE_PATH.sub(lambda match: re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], value)
        return value

    return Provenance(**cut(asdict(provenance)))


def protocol_lines(metrics: dict[str, Any]) -> list[str]:
    """How the figures were made, as a Markdown list."""
    return [f"- {name}: {value}" for name, value in metrics.get("protocol", {}).items() if value is not None]


def channel_lines(statistics: dict[str, Any] | None) -> list[str]:
    """The figures of each latent channel, as a Markdown table; empty where none were measured."""
    if statistics is None:
        return []
    figures = zip(statistics["latents_mean"], statistics["latents_std"], strict=True)
    rows = [f"| {number} | {mean:.4g} | {std:.4g} |" for number, (mean, std) in enumerate(figures)]
    return ["| channel of latents | mean | standard deviation |", "|---|---|---|", *rows, ""]


def range_lines(limits: tuple[float, float] | None) -> list[str]:
    """How samples become images, where that is not what their files' type says."""
    if limits is None:
        return []
    low, high = limits
    return [
        f"Intensities: images are `2 * (samples - {low:g}) / {high - low:g} - 1`, clipped to [-1, 1].",
        "",
    ]


def model_card(vae: AutoencoderKL, provenance: Provenance, statistics: dict[str, Any] | None = None) -> str:
    """A Hugging Face model card in Markdown, with front matter; `statistics` as in the sidecar."""
    config = vae.config
    # the hub reads the front matter: what the model is found by, and how its example is shown
    front = {"library_name": "diffusers", "license": provenance.licence, "pipeline_tag": "image-to-image"}
    parent = provenance.base_model
    # the hub links to it: of the name of a folder, or of a model bundled here, it would make a wrong id
    if parent and is_hub_id(parent):
        front["base_model"] = parent
    ratio, parameters = spatial_compression_ratio(vae), sum(p.numel() for p in vae.parameters())
    means = provenance.metrics.get("mean", {})
    rows = [
        f"| {FIGURES.get(name, name)} | {value:.4g} |"
        for name, value in means.items()
        if isinstance(value, float)
    ]
    figures = ["| figure | mean |", "|---|---|", *rows, "", *protocol_lines(provenance.metrics)]
    return "\n".join(
        [
            "---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---", "",
            f"# {provenance.name}", "",
            f"A KL-regularised image VAE (`diffusers.AutoencoderKL`): {ratio}x{ratio} pixels to "
            f"one latent of {config['latent_channels']} channels, {parameters / 1e6:.1f} M parameters.",
            "",
            "```python",
            "from diffusers import AutoencoderKL", "",
            f"vae = AutoencoderKL.from_pretrained({PLACE})",
            "```", "",
            "## Latents", "",
            f"`scaled_latents = (latents - {config['shift_factor']:g}) * {config['scaling_factor']:.6g}`. "
            "Per-channel figures are in `latentvae.json`.", "",
            *channel_lines(statistics),
            "## Other programs", "",
            *(f"- {note}" for note in program_notes(config)), "",
            "## Training", "",
            f"Data: {provenance.trained_on}", "",
            *range_lines(provenance.intensity_range),
            f"Run: {provenance.training}", "",
            *([f"Parent: {parent}", ""] if parent else []),
            "## Figures", "",
            *(figures if rows else ["Not measured."]), "",
            "## Licence", "",
            f"Weights: {provenance.licence}.", "",
        ]
    )  # fmt: skip

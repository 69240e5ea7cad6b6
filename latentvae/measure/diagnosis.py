"""Whether a VAE survives half precision: how near each layer comes to overflow, and what it costs in dB."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import ImageError, ModelError
from latentvae.measure.activations import LOGITS, Call, ProbeOutputs, run_watched, stock_copy
from latentvae.models.loading import spatial_compression_ratio

FP16_MAX = torch.finfo(torch.float16).max  # 65504
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EMULATED = (
    "emulated: weights and every result rounded; convolutions and matrix products sum in fp32, as on GPUs"
)
MIN_PSNR = 40.0  # dB between fp16's images and fp32's: an error of 2.5 of 255, about the least that is seen


@dataclass(frozen=True)
class Layer:
    """The largest absolute value that a layer gives in fp32 over the probes."""

    name: str
    kind: str  # its class; "logits" for attention's
    largest: float

    @property
    def headroom(self) -> float:
        """How many times larger the values could be in fp16."""
        return FP16_MAX / self.largest if self.largest else math.inf


@dataclass(frozen=True)
class Overflow:
    """The first layer, in order of execution, that gives an infinite or NaN value, and for which probe."""

    layer: str
    kind: str
    probe: str
    in_weights: bool  # the weights themselves do not fit into the dtype


@dataclass(frozen=True)
class DtypeReport:
    """One dtype against fp32: where it overflows, and its error on each probe (None: not finite)."""

    dtype: str
    arithmetic: str  # native, or how it was emulated
    encode_overflow: Overflow | None
    decode_overflow: Overflow | None
    latents_error: dict[str, float | None]  # by probe: |latents - fp32's| / |fp32's|
    psnr: dict[str, float | None]  # by probe, dB, of images decoded from fp32's latents; inf: identical

    @property
    def first_overflow(self) -> Overflow | None:
        """In the encoder, or else in the decoder; None where all is finite."""
        return self.encode_overflow or self.decode_overflow

    @property
    def worst_psnr(self) -> float | None:
        """Of the worst probe, dB; None where an image is not finite."""
        values = [value for value in self.psnr.values() if value is not None]
        return min(values) if len(values) == len(self.psnr) else None

    @property
    def worst_latents_error(self) -> float | None:
        """Of the worst probe; None where latents are not finite."""
        values = [value for value in self.latents_error.values() if value is not None]
        return max(values) if len(values) == len(self.latents_error) else None

    def as_dict(self) -> dict[str, Any]:
        """JSON values: inf becomes None, which `first_overflow` tells from what is not finite."""
        return {
            **asdict(self),
            "first_overflow": asdict(self.first_overflow) if self.first_overflow else None,
            "psnr": {probe: _finite(value) for probe, value in self.psnr.items()},
            "worst_psnr": _finite(self.worst_psnr),
            "worst_latents_error": self.worst_latents_error,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured."""

    probes: tuple[str, ...]
    layers: tuple[Layer, ...]  # in order of execution
    dtypes: dict[str, DtypeReport]  # bf16, fp16
    force_upcast: bool  # what the model's config says
    outputs: dict[str, ProbeOutputs] = field(repr=False, compare=False)  # in fp32, by probe

    @property
    def fp16_works(self) -> bool:
        """Whether fp16 is finite on every probe, and its images are within MIN_PSNR of fp32's."""
        fp16 = self.dtypes["fp16"]
        return fp16.first_overflow is None and fp16.worst_psnr is not None and fp16.worst_psnr >= MIN_PSNR

    @property
    def wanted_force_upcast(self) -> bool:
        """What the config should say: True makes pipelines decode in fp32."""
        return not self.fp16_works

    def hottest(self, count: int) -> list[Layer]:
        """The layers of the largest values, largest first."""
        return sorted(self.layers, key=lambda layer: -layer.largest)[:count]

    def as_dict(self) -> dict[str, Any]:
        """JSON values: an infinite headroom becomes None."""
        return {
            "probes": list(self.probes),
            "layers": [{**asdict(layer), "headroom": _finite(layer.headroom)} for layer in self.layers],
            "dtypes": {name: report.as_dict() for name, report in self.dtypes.items()},
            "fp16_works": self.fp16_works,
            "force_upcast": {"current": self.force_upcast, "wanted": self.wanted_force_upcast},
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def synthetic_probes(channels: int, size: int = 256) -> dict[str, torch.Tensor]:
    """Images that no photograph is like, (1, C, H, W) each: noise, flat black and white, a checkerboard."""
    noise = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0)).round()
    cell = torch.arange(size) // 8
    board = (cell[:, None] + cell + torch.arange(channels)[:, None, None]) % 2  # saturated colours
    flat = torch.ones(1, channels, size, size)
    return {"noise": noise * 2 - 1, "black": -flat, "white": flat, "checkerboard": board[None] * 2.0 - 1}


def wants_upcast(vae: AutoencoderKL) -> bool:
    """What a model's config should say as force_upcast: whether fp16 overflows or is inexact.

    By the synthetic probes at 8 x 8 latents, a second's work for a small model: `latentvae doctor` looks at
    more and larger ones, and at a photograph.

    Raises:
        ModelError: the model is not finite in fp32.
    """
    probes = synthetic_probes(vae.config["in_channels"], 8 * spatial_compression_ratio(vae))
    # as one batch: norms are each image's own
    return diagnose(vae, {"synthetic extremes": torch.cat([*probes.values()])}).wanted_force_upcast


@torch.no_grad()
def diagnose(vae: AutoencoderKL, probes: Mapping[str, torch.Tensor] | None = None) -> Diagnosis:
    """Run probe images through `vae` in fp32, bf16 and fp16, on the device it is on.

    Every dtype decodes fp32's latents, so that an encoder that overflows hides nothing of the decoder.

    Args:
        vae: any AutoencoderKL; not changed.
        probes: images (B, C, H, W) in [-1, 1] by name. Default: `synthetic_probes`.

    Raises:
        ModelError: no AutoencoderKL, or one that is not finite in fp32.
        ImageError: probes of other channels than the model's, or not in [-1, 1].
    """
    if not isinstance(vae, AutoencoderKL):
        raise ModelError(f"a {type(vae).__name__} came; wanted a diffusers AutoencoderKL.")
    probes = synthetic_probes(vae.config["in_channels"]) if probes is None else probes
    _check_probes(probes)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 is no more exact than fp16
        model = stock_copy(vae)
        outputs = run_watched(model, probes, title="fp32")
        layers = _layers(model, outputs)
        dtypes = {
            name: _compare(stock_copy(vae, dtype), name, probes, outputs) for name, dtype in HALVES.items()
        }
    upcast = bool(vae.config.get("force_upcast", True))
    return Diagnosis(tuple(probes), tuple(layers), dtypes, upcast, outputs)


def _check_probes(probes: Mapping[str, torch.Tensor]) -> None:
    if not probes:
        raise ImageError("no probe images came; wanted one or more, or None for the synthetic ones.")
    for name, images in probes.items():
        if not images.abs().max() <= 1.001:  # NaN is not
            raise ImageError(f"the probe {name!r} has values outside [-1, 1]; scale it as load_image does.")


def _layers(vae: AutoencoderKL, outputs: Mapping[str, ProbeOutputs]) -> list[Layer]:
    """Every layer with its largest value over the probes.

    Raises:
        ModelError: one is not finite in fp32.
    """
    largest: dict[str, float] = {}
    for probe, output in outputs.items():
        call = output.encode_overflow or output.decode_overflow
        if call is not None:
            raise ModelError(
                f"the model is broken: in fp32 already, {call.layer} gives infinite or NaN values for the "
                f"probe {probe!r}. Download or export it again."
            )
        for name, value in output.largest.items():
            largest[name] = max(value, largest.get(name, 0.0))
    return [Layer(name, _kind(vae, name), value) for name, value in largest.items()]


def _kind(vae: AutoencoderKL, name: str) -> str:
    return LOGITS if name.endswith(f".{LOGITS}") else type(vae.get_submodule(name)).__name__


def _compare(
    vae: AutoencoderKL, dtype: str, probes: Mapping[str, torch.Tensor], reference: Mapping[str, ProbeOutputs]
) -> DtypeReport:
    """Run a model of one dtype and compare it with fp32's outputs."""
    latents = {name: wanted.posterior.mode() for name, wanted in reference.items()}
    outputs = run_watched(vae, probes, latents, title=dtype)
    latents_error: dict[str, float | None] = {}
    psnr: dict[str, float | None] = {}
    for name, wanted in reference.items():
        distance = (outputs[name].posterior.mode() - latents[name]).norm()
        latents_error[name] = _finite(float(distance / latents[name].norm()))
        error = (outputs[name].images.clamp(-1, 1) - wanted.images.clamp(-1, 1)).square().mean()
        finite = outputs[name].images.isfinite().all()
        psnr[name] = float(10 * torch.log10(4 / error)) if finite else None
    return DtypeReport(
        dtype,
        EMULATED if vae.device.type == "cpu" else "native",
        _first_overflow(vae, {name: output.encode_overflow for name, output in outputs.items()}),
        _first_overflow(vae, {name: output.decode_overflow for name, output in outputs.items()}),
        latents_error,
        psnr,
    )


def _first_overflow(vae: AutoencoderKL, calls: Mapping[str, Call | None]) -> Overflow | None:
    """The earliest call over the probes."""
    found = [(call, probe) for probe, call in calls.items() if call]
    if not found:
        return None
    (_, layer), probe = min(found)
    module = vae.get_submodule(layer)
    in_weights = any(not tensor.isfinite().all() for tensor in module.parameters())
    return Overflow(layer, type(module).__name__, probe, in_weights)

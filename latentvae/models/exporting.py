"""Write a VAE as a folder that stock diffusers loads, and prove it by loading it."""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.base.files import check_folder, whole_folder
from latentvae.models.card import Provenance, model_card, without_paths
from latentvae.models.formats.adapting import adapt
from latentvae.models.formats.programs import Program
from latentvae.models.formats.writing import save
from latentvae.models.latents import LatentStatistics, reconstruct
from latentvae.models.loading import SIDECAR, spatial_compression_ratio

SHARD_SIZE = re.compile(r"[1-9]\d*[KMG]B")
FOR_PIPELINES = {"sample_size", "force_upcast"}  # of a config: say nothing of weights or latents
MIN_SAMPLE_SIZE = 256  # diffusers derives its tile size from sample_size; smaller ones make tiny tiles


def fold_latent_mean(vae: AutoencoderKL, mean: list[float]) -> AutoencoderKL:
    """A copy of `vae` whose latents are those of `vae` minus `mean`, and whose reconstructions are the same.

    The mean goes into the biases of the two 1x1 convolutions around the latents, exactly: encoder side
    `b - mean` on the means' half, decoder side `b + W mean`. So pipelines that ignore shift_factor are right.

    Args:
        vae: with quant_conv and post_quant_conv.
        mean: one figure per latent channel.

    Raises:
        ModelError: the model lacks one of the two convolutions.
    """
    folded = copy.deepcopy(vae)
    if folded.quant_conv is None or folded.post_quant_conv is None:
        raise ModelError(
            "the latent mean cannot be folded into a model without quant_conv and post_quant_conv."
        )
    quant, post = folded.quant_conv, folded.post_quant_conv  # (2c, 2c, 1, 1) and (c, c, 1, 1)
    assert quant.bias is not None
    assert post.bias is not None
    # in float64: exact to 1e-15, so that nothing but the biases' own rounding is left
    shift = torch.tensor(mean, dtype=torch.float64, device=quant.bias.device)
    with torch.no_grad():
        # the moments' first half are means, the second log-variances, which a shift leaves alone
        quant.bias[: len(mean)] = (quant.bias[: len(mean)].double() - shift).to(quant.bias.dtype)
        through = post.weight.double()[:, :, 0, 0] @ shift
        post.bias.copy_((post.bias.double() + through).to(post.bias.dtype))
    return folded


def with_statistics(vae: AutoencoderKL, statistics: LatentStatistics) -> AutoencoderKL:
    """A copy of `vae` whose config scales its latents to zero mean and unit variance in every pipeline.

    With both quant convolutions the channel means are folded in and shift_factor is 0. Without them the shift
    is exported, one number for all channels, and only pipelines that read shift_factor are right.
    """
    if vae.quant_conv is not None and vae.post_quant_conv is not None:
        folded = fold_latent_mean(vae, statistics.latents_mean)
        shift, scaling = 0.0, statistics.scaling_factor
    else:
        folded = copy.deepcopy(vae)
        shift, scaling = statistics.shift_factor, 1 / statistics.pooled_std
    # latents_mean/std stay None: SDXL would apply them on top of scaling_factor
    folded.register_to_config(shift_factor=shift, scaling_factor=scaling, latents_mean=None, latents_std=None)
    return folded


def join_halves(vae: AutoencoderKL, other: AutoencoderKL) -> AutoencoderKL:
    """A copy of `vae` with the decoder of `other`: two halves of one latent space that learned apart.

    Raises:
        ModelError: the two are of different shapes, or of spaces with different factors.
    """
    differing = [
        f"{key} ({vae.config[key]} and {value})"
        for key, value in other.config.items()
        if not key.startswith("_") and key not in FOR_PIPELINES and vae.config.get(key) != value
    ]
    if differing:
        raise ModelError(
            f"the decoder does not fit the encoder: they differ in {', '.join(differing)}. Take two runs of "
            "one preset and one space."
        )
    joined = copy.deepcopy(vae)
    joined.decoder.load_state_dict(other.decoder.state_dict())
    if joined.post_quant_conv is not None:
        joined.post_quant_conv.load_state_dict(other.post_quant_conv.state_dict())
    return joined


def export(
    vae: AutoencoderKL,
    folder: str | Path,
    *,
    statistics: LatentStatistics | None = None,
    provenance: Provenance | None = None,
    half: bool = False,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    programs: Sequence[Program] = (),
    force_upcast: bool | None = None,
) -> Path:
    """Write config.json, fp32 and fp16 weights, a model card and a sidecar; then load and compare.

    Args:
        vae: any AutoencoderKL; not changed.
        folder: becomes the model: `AutoencoderKL.from_pretrained(folder)` loads it.
        statistics: of a model trained from scratch, to be folded in; None keeps the model's own factors, as a
            fine-tuned model must.
        provenance: for the model card.
        half: write fp16 weights only, as the one file: half the size, and what every loader finds first.
        overwrite: replace an earlier export.
        max_shard_size: such as "300MB": weights larger than that are split into several files.
        programs: each gets a file of its own beside the model, PROGRAM.safetensors, that it reads right.
        force_upcast: whether fp16 pipelines must decode in fp32, as measure/diagnosis.py's `wants_upcast`
            says; None keeps what the config has.

    Returns:
        The folder.

    Raises:
        LatentVAEError: the folder holds something else or cannot be written, the size is none, a program
            cannot read such a model right, or the reload differs.
    """
    folder = Path(folder)
    check_folder(folder, "export", SIDECAR, overwrite=overwrite, instead="Choose another --output")
    if max_shard_size and not SHARD_SIZE.fullmatch(max_shard_size):
        raise LatentVAEError(f"max_shard_size {max_shard_size!r} is no size; wanted one such as 300MB.")
    prepared = prepare_export(vae, statistics)
    if force_upcast is not None:
        prepared.register_to_config(force_upcast=force_upcast)
    if half:
        prepared = prepared.half().float()  # what a reload in fp32 gives
    with whole_folder(folder, message="cannot write {path}: {reason}. Choose another --output.") as partial:
        _write(prepared, partial, statistics, without_paths(provenance or Provenance()), half, max_shard_size)
        for program in programs:
            adapted, _ = adapt(prepared, program)
            dtype = torch.float16 if half else torch.float32
            save(adapted, partial / f"{program}.safetensors", "ldm", dtype=dtype)
        verify_export(prepared, partial)
    return folder


def prepare_export(vae: AutoencoderKL, statistics: LatentStatistics | None) -> AutoencoderKL:
    """The copy that `export` writes: fp32, on the CPU, factors set, no path in it.

    `sample_size` is a multiple of the spatial compression ratio, 256 or more.
    """
    # contiguous: a speed-up may have put weights in another memory format, which safetensors does not store
    prepared = copy.deepcopy(vae).float().cpu().to(memory_format=torch.contiguous_format)
    prepared = prepared.eval().requires_grad_(False)
    if statistics is not None:  # in fp32: biases rounded to half precision would not cancel
        prepared = with_statistics(prepared, statistics)
    size, ratio = prepared.config["sample_size"], spatial_compression_ratio(prepared)
    wanted = max(MIN_SAMPLE_SIZE, size if isinstance(size, int) else min(size))
    prepared.register_to_config(
        sample_size=-(-wanted // ratio) * ratio,  # diffusers' tiling divides it by the ratio
        shift_factor=prepared.config["shift_factor"] or 0.0,
        _name_or_path="",
    )
    return prepared


def verify_export(vae: AutoencoderKL, folder: Path) -> None:
    """Load an export with stock diffusers and compare it with `vae`, weight by weight and on an image.

    Raises:
        LatentVAEError: keys are missing or extra, a weight differs, or a reconstruction does.
    """
    loaded, report = AutoencoderKL.from_pretrained(str(folder), output_loading_info=True)
    keys = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    if keys:
        raise LatentVAEError(
            f"the export in {folder} does not reload: {keys[0]!r} is missing, extra or misshaped."
        )
    for key, tensor in vae.state_dict().items():
        if not torch.equal(tensor, loaded.state_dict()[key]):
            raise LatentVAEError(f"the export in {folder} reloads with another {key!r} than was written.")
    # on noise of 8 x 8 latents: small for any model, and no layer is left out
    size = 8 * spatial_compression_ratio(vae)
    channels = vae.config["in_channels"]
    probe = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = (
        (reconstruct(vae, probe).reconstructions - reconstruct(loaded.eval(), probe).reconstructions)
        .abs()
        .max()
    )
    if error != 0:  # the same weights in the same code: any difference is a fault
        raise LatentVAEError(
            f"the export in {folder} reconstructs a probe image with an error of {error:.3g}."
        )
    variant = "fp16" if any(folder.glob("*.fp16*.safetensors")) else None
    in_half = AutoencoderKL.from_pretrained(str(folder), variant=variant)  # infinite values stay so in fp32
    bad = [key for key, tensor in in_half.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise LatentVAEError(f"{bad[0]!r} overflows in the fp16 weights of {folder}.")


def exported_statistics(vae: AutoencoderKL, statistics: LatentStatistics) -> dict[str, Any]:
    """The statistics of the exported model's own latents, with the mean that was folded into its biases."""
    factors = {key: vae.config[key] for key in ("scaling_factor", "shift_factor")}
    measured = {**statistics.as_dict(), **factors}
    if vae.quant_conv is None or vae.post_quant_conv is None:
        return measured
    mean = statistics.latents_mean
    return {**measured, "latents_mean": [0.0] * len(mean), "folded_mean": mean}


def _write(
    vae: AutoencoderKL,
    folder: Path,
    statistics: LatentStatistics | None,
    provenance: Provenance,
    half: bool,
    max_shard_size: str | None,
) -> None:
    # None would not be diffusers' default
    options = {"max_shard_size": max_shard_size} if max_shard_size else {}
    # fp32 for who trains on, fp16 as the variant that pipelines ask for
    in_half = copy.deepcopy(vae).half()
    if half:
        in_half.save_pretrained(folder, safe_serialization=True, **options)
    else:
        vae.save_pretrained(folder, safe_serialization=True, **options)
        in_half.save_pretrained(folder, safe_serialization=True, variant="fp16", **options)
    figures = exported_statistics(vae, statistics) if statistics else None
    sidecar = {
        "format": 1,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "spatial_compression_ratio": spatial_compression_ratio(vae),
        "latent_statistics": figures,
        **vars(provenance),
    }
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, default=str), encoding="utf-8")
    (folder / "README.md").write_text(model_card(vae, provenance, figures), encoding="utf-8")

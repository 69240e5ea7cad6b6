"""What a diffusers pipeline asks of its VAE, and whether this one has it.

What can be told from a pipeline's own attributes and methods is told so; the rest stands in the table of
facts. First how a pipeline is read, then one check for each thing it may want.
"""

import inspect
from types import CodeType
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline

from latentvae.base.errors import LatentVAEError
from latentvae.models.latents import Scaling
from latentvae.models.spaces import Autoencoder, latent_shape, space_name
from latentvae.pipelines.agree import Agreement, Use, measure_agreement

COMPONENTS = ("vae", "vqvae")  # the second: LDMTextToImagePipeline
DENOISERS = ("unet", "transformer")

# Facts of diffusers' sources that no attribute tells; classes by the start of their names.
TAKES_IMAGE_LATENTS = "StableDiffusionLatentUpscale"  # its UNet takes 2C channels and gives C + 1
COMPUTE_WITH_8 = ("LDMTextToImage", "Lumina", "HunyuanDiT", "DreamLite")  # whatever the VAE's compression is
SETS_FACTOR = "StableDiffusionUpscale"  # its constructor writes this into the VAE's config:
FIXED_FACTOR = 0.08333
UNETS_OF_INPAINTING = (4, 9)  # SD's and SDXL's raise for others


class SwapError(LatentVAEError):
    """A VAE that cannot work in this pipeline."""


class LatentSpaceError(SwapError):
    """A VAE whose latents the pipeline's denoiser was not trained on; `agreement` has the figures, if any."""

    def __init__(self, message: str, agreement: Agreement | None = None) -> None:
        super().__init__(message)
        self.agreement = agreement


# --- how a pipeline is read


def find_vae(pipe: Any) -> tuple[str, Any]:
    """The name of a pipeline's VAE component, and what is there now.

    Raises:
        SwapError: not a diffusers pipeline, or one without a VAE.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise SwapError(f"{type(pipe).__name__} came; wanted a diffusers pipeline.")
    names = [name for name in COMPONENTS if name in pipe.components]
    if not names:
        raise SwapError(
            f"{type(pipe).__name__} has no VAE: its components are {', '.join(sorted(pipe.components))}. "
            "Wanted a pipeline of a latent diffusion model."
        )
    return names[0], getattr(pipe, names[0])


def names_read(pipeline: type) -> frozenset[str]:
    """Every attribute that the methods of a pipeline class name, its parents' below DiffusionPipeline too.

    Told from the compiled methods, so it holds for pipelines this package has never heard of.
    """
    found: set[str] = set()
    for parent in pipeline.__mro__:
        if not issubclass(parent, DiffusionPipeline) or parent is DiffusionPipeline:
            continue
        for value in vars(parent).values():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(function):  # torch.no_grad wraps __call__
                found |= _names(inspect.unwrap(function).__code__)
    return frozenset(found)


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def is_kind(pipe: Any, *starts: str) -> bool:
    """Whether the class of a pipeline, or one that it inherits from, has a name that starts so."""
    return any(cls.__name__.startswith(starts) for cls in type(pipe).__mro__)


def pipeline_scaling(pipe: Any, vae: Autoencoder) -> Scaling:
    """What this pipeline does to the latents of a VAE before its denoiser sees them.

    SD, SDXL, DiT, LDM and PixArt ignore shift_factor. SDXL uses latents_mean and latents_std where there are
    both, and scaling_factor besides.
    """
    reads, (mean, std) = names_read(type(pipe)), latent_moments(vae)
    scaling = Scaling.of(vae.config)
    if "latents_mean" in reads and mean and std:
        # (latents - mean) / std * scaling_factor: both, as SDXL's code has it
        means, stds = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return Scaling(means, scaling.factor / stds)
    return scaling if "shift_factor" in reads else Scaling(0.0, scaling.factor)


def latent_moments(vae: Any) -> tuple[Any, Any]:
    """latents_mean and latents_std of a config: a list each, or None."""
    return vae.config.get("latents_mean"), vae.config.get("latents_std")


def find_denoiser(pipe: Any) -> tuple[str, Any]:
    """The component that works on latents, and its name."""
    found = [(name, getattr(pipe, name, None)) for name in DENOISERS]  # SD3 and Flux have transformers
    return next(((name, model) for name, model in found if model is not None), ("unet", None))


def packs(pipe: Any) -> bool:
    """Whether the pipeline makes one token of 2 x 2 latent pixels, as Flux does."""
    return hasattr(type(pipe), "_pack_latents")


def latent_channels(pipe: Any) -> int:
    """How many latent channels the denoiser works on.

    It may take more (masks and images beside the latents: inpainting takes 2C + 1, upscaling C + 3) and may
    give more (DiT and PixArt a variance for each channel), but no pipeline does both.
    """
    config = find_denoiser(pipe)[1].config
    taken = config["in_channels"]
    if is_kind(pipe, TAKES_IMAGE_LATENTS):
        return taken // 2
    # what is beside the latents comes in and not out, a variance goes out and not in
    fewest = min(taken, config.get("out_channels") or taken)
    # a token of 2 x 2 pixels holds four times the channels
    return fewest // 4 if packs(pipe) else fewest


# --- the checks


def check_fit(pipe: Any, vae: Autoencoder, old: Any) -> None:
    """Refuse a VAE with which the pipeline would fail, or silently make wrong pictures.

    Raises:
        SwapError: says what the VAE has, what the pipeline wants, and what to do.
    """
    # nothing is computed here: what is wrong comes out in an instant, before two VAEs are compared
    check_channels(pipe, vae, old)
    check_compression(pipe, vae)
    check_scaling(pipe, vae, old)
    check_attributes(pipe, vae, old)
    check_hooks(vae)


def check_channels(pipe: Any, vae: Autoencoder, old: Any) -> None:
    """Latents against the denoiser, images against RGB."""
    images = (vae.config["in_channels"], vae.config["out_channels"])
    if images != (3, 3):
        raise SwapError(
            f"this VAE takes images of {images[0]} channels and gives {images[1]}; pipelines make RGB "
            "pictures. Use a VAE of 3 and 3."
        )
    name, denoiser = find_denoiser(pipe)
    if denoiser is None:
        return
    taken, given = denoiser.config["in_channels"], denoiser.config.get("out_channels")
    wanted, have = latent_channels(pipe), vae.config["latent_channels"]
    if wanted != have:
        raise SwapError(
            f"this VAE has {have} latent channels, but the {name} of {type(pipe).__name__} works on {wanted} "
            f"(it takes {taken} and gives {given or taken}{', in patches of 2 x 2' if packs(pipe) else ''}). "
            f"Use a VAE of {wanted} latent channels, or a {name} that was trained on {have}.{_both(old, vae)}"
        )
    if "Inpaint" in type(pipe).__name__ and name == "unet" and taken not in UNETS_OF_INPAINTING:
        raise SwapError(
            f"the unet takes {taken} channels, but {type(pipe).__name__} works with 4 or 9 only: it is made "
            "for 4 latent channels. No VAE can change that."
        )


def check_compression(pipe: Any, vae: Autoencoder) -> None:
    """Pipelines that compute sizes with 8 whatever the VAE."""
    factor = latent_shape(vae)[1]
    if factor != 8 and is_kind(pipe, *COMPUTE_WITH_8):
        raise SwapError(
            f"this VAE compresses each side by {factor}, but {type(pipe).__name__} computes with 8 whatever "
            "its VAE: pictures would have another size than asked for. Use an f8 VAE."
        )


def check_scaling(pipe: Any, vae: Autoencoder, old: Any) -> None:
    """Scaling and shift that the pipeline would ignore, use twice, or change."""
    config, reads, kind = vae.config, names_read(type(pipe)), type(pipe).__name__
    # what the present VAE has too, the denoiser was trained with: ignored all along, it stays so
    before = old.config if isinstance(old, AutoencoderKL) else {}
    shift, factor = config["shift_factor"] or 0.0, config["scaling_factor"]
    if not factor:
        raise SwapError(
            f"this VAE has scaling_factor {factor}, by which {kind} divides. Export it with statistics."
        )
    if shift and "shift_factor" not in reads and shift != before.get("shift_factor"):
        raise SwapError(
            f"this VAE has shift_factor {shift:g}, which {kind} ignores: its latents would be off by that. "
            + _fold_advice(vae)
        )
    mean, std = latent_moments(vae)
    both = mean is not None and std is not None
    if both and "latents_mean" not in reads and mean != before.get("latents_mean"):
        raise SwapError(
            f"this VAE has latents_mean and latents_std, which {kind} ignores. Export it with `latentvae "
            "export`, which folds the mean into the weights, or set both to None where scaling_factor alone "
            "is right."
        )
    if both and "latents_mean" in reads:
        _check_moments(kind, mean, std, factor)
    if is_kind(pipe, SETS_FACTOR) and isinstance(vae, AutoencoderTiny):
        raise SwapError(
            f"{kind} writes scaling_factor {FIXED_FACTOR} into its VAE whenever it is loaded, and latents "
            "of an AutoencoderTiny come scaled: they would be scaled twice. Use an AutoencoderKL."
        )
    if is_kind(pipe, SETS_FACTOR) and factor != FIXED_FACTOR:
        raise SwapError(
            f"this VAE has scaling_factor {factor:g}, but {kind} writes {FIXED_FACTOR} into its VAE whenever "
            "it is loaded: a saved pipeline would make other pictures. Call "
            f"vae.register_to_config(scaling_factor={FIXED_FACTOR}), and train the UNet with it."
        )


def _fold_advice(vae: Autoencoder) -> str:
    """How to get rid of a shift."""
    if isinstance(vae, AutoencoderTiny):
        return "An AutoencoderTiny's come scaled and shifted: call vae.register_to_config(shift_factor=0.0)."
    if vae.quant_conv is None or vae.post_quant_conv is None:
        return (
            "It cannot be folded into a model without quant_conv and post_quant_conv: use a pipeline that "
            "reads it (SD3, Flux), or train with both."
        )
    return (
        "Fold it into the weights: vae = latentvae.models.exporting.fold_latent_mean(vae, "
        "[vae.config.shift_factor] * vae.config.latent_channels), then "
        "vae.register_to_config(shift_factor=0.0); reconstructions stay."
    )


def _check_moments(kind: str, mean: list[float], std: list[float], factor: float) -> None:
    """SDXL's latents_mean and latents_std, which it views as four channels and uses with scaling_factor."""
    if len(mean) != 4 or len(std) != 4:
        raise SwapError(
            f"this VAE has latents_mean of {len(mean)} channels; {kind} takes 4 and no other number. Export "
            "it with `latentvae export`, which folds the mean into the weights, or set both to None."
        )
    # a factor near 1 beside the deviations is right, and so are deviations near 1 beside a factor
    rms = (sum(value * value for value in std) / 4) ** 0.5
    if not 0.9 < factor < 1.1 and 0.5 < factor * rms < 2:
        raise SwapError(
            f"this VAE has scaling_factor {factor:g} and latents_std of about {rms:.3g}, which say the same; "
            f"{kind} uses both, so its latents would be scaled twice. Set latents_mean and latents_std to "
            "None, or scaling_factor to 1."
        )


def check_attributes(pipe: Any, vae: Autoencoder, old: Any) -> None:
    """Parts of a VAE that the pipeline takes for granted."""
    reads, kind = names_read(type(pipe)), type(pipe).__name__
    if isinstance(vae, AutoencoderTiny) and "latent_dist" in reads:
        raise SwapError(
            f"{kind} reads the latent_dist that its VAE encodes to, and an AutoencoderTiny has none. Use an "
            "AutoencoderKL."
        )
    if "post_quant_conv" not in reads or getattr(vae, "post_quant_conv", None) is not None:
        return
    dtype = getattr(old, "dtype", None)  # which the new one will get
    if is_kind(pipe, SETS_FACTOR):
        raise SwapError(f"this VAE has no post_quant_conv, whose dtype {kind} reads. Use a VAE that has one.")
    if dtype == torch.float16 and vae.config["force_upcast"]:
        raise SwapError(
            f"this VAE has no post_quant_conv, whose dtype {kind} reads when it computes a float16 VAE in "
            "float32 (force_upcast). Use bfloat16, or call vae.register_to_config(force_upcast=False) if "
            "`latentvae doctor` finds that float16 works."
        )


def check_hooks(vae: Autoencoder) -> None:
    """A VAE that another pipeline offloads."""
    if any(hasattr(module, "_hf_hook") for module in vae.modules()) or vae.device.type == "meta":
        raise SwapError(
            "this VAE carries the offloading hooks of another pipeline. Call remove_all_hooks() on that one "
            "first."
        )


def usual_use(pipe: Any) -> Use:
    """Whether a pipeline only decodes (text to image), or encodes too (image to image, inpainting)."""
    return "both" if "encode" in names_read(type(pipe)) else "decode"


def check_latent_space(pipe: Any, vae: Autoencoder, old: Any, device: torch.device, use: Use) -> None:
    """Refuse a VAE with other latents than those the denoiser was trained on: those of the present VAE.

    Args:
        pipe: the pipeline.
        vae: the new VAE.
        old: the present one; AutoencoderKL or AutoencoderTiny.
        device: where to compute.
        use: "decode" asks that it draws the present VAE's latents, "both" also that its latents are those.

    Raises:
        LatentSpaceError: with the agreement, and the ways to proceed.
    """
    name = find_denoiser(pipe)[0]
    ways = (
        "Ways on: fine-tune only the decoder of the present VAE, or distil into its latents (`latentvae "
        f"train`): both keep its latent space. Or pass allow_new_latent_space=True, if the {name} is or will "
        "be trained on the latents of this VAE."
    )
    if not isinstance(old, AutoencoderKL | AutoencoderTiny):
        what = "no VAE" if old is None else f"a {type(old).__name__}"
        raise LatentSpaceError(
            f"the pipeline has {what} now, with which an AutoencoderKL cannot be compared: it is not known "
            f"whether the {name} was trained on the latents of this VAE. {ways}"
        )
    shapes = [latent_shape(each) for each in (old, vae)]
    if shapes[0] != shapes[1]:
        raise LatentSpaceError(
            f"the {name} was trained on other latents than this VAE's: those have {shapes[0][0]} channels at "
            f"1/{shapes[0][1]} of the side, these {shapes[1][0]} at 1/{shapes[1][1]}.{_both(old, vae)} {ways}"
        )
    # scaled as this pipeline will: a factor that it ignores cannot tell two VAEs apart
    scalings = (pipeline_scaling(pipe, old), pipeline_scaling(pipe, vae))
    agreement = measure_agreement(old, vae, scalings, device=device)
    if agreement.fits(use):
        return
    if use == "both" and agreement.decodes:
        ways = 'It draws the latents of the present VAE, so for text to image pass use="decode". ' + ways
    if isinstance(vae, AutoencoderTiny) and scalings[1] != (0.0, 1.0):
        ways = (
            f"This AutoencoderTiny says scaling_factor {vae.config['scaling_factor']:g} and shift_factor "
            f"{vae.config['shift_factor']:g}, but such models usually give scaled latents, which a pipeline "
            "then scales again: vae.register_to_config(scaling_factor=1.0, shift_factor=0.0). " + ways
        )
    raise LatentSpaceError(
        f"the {name} was trained on other latents than this VAE's, B beside A, the pipeline's: {agreement}. "
        f"{ways}",
        agreement,
    )


def _both(old: Any, vae: Autoencoder) -> str:
    """A sentence that names the latent spaces of the present VAE and the new one."""
    if not isinstance(old, AutoencoderKL | AutoencoderTiny):
        return ""
    return f" By their configs the pipeline's VAE speaks {space_name(old)}, the new one {space_name(vae)}."

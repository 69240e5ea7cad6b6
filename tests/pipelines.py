"""Tiny random diffusers pipelines of every kind, made from configs, and how to call each.

Nothing here imports latentvae: a process that cannot import it reloads what these made.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMTextToImagePipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 16  # of every text encoder
LENGTH = 16  # tokens of a prompt
SIDE = 64  # pixels
PROMPT = "a cat"


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, and letters that end a word."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase]
    tokens += [f"{letter}</w>" for letter in string.ascii_lowercase]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def clip(projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T5EncoderModel(config).eval()


def bert_tokenizer() -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, "cat"]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def bert() -> LDMBertModel:
    config = LDMBertConfig(
        vocab_size=40,
        encoder_layers=1,
        encoder_ffn_dim=WIDTH,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=WIDTH,
    )
    return LDMBertModel(config).eval()


def unet(in_channels: int = 4, out_channels: int = 4, context: int = WIDTH, **options: Any) -> Any:
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=context,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def ddim(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def stable_diffusion(kind: Any, vae: Any, in_channels: int = 4) -> Any:
    return kind(
        vae=vae,
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(in_channels),
        scheduler=ddim(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def upscale(vae: Any) -> Any:
    return StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(),
        scheduler=ddim(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        max_noise_level=350,
    )


def latent_upscale(vae: Any) -> Any:
    return StableDiffusionLatentUpscalePipeline(
        vae=vae,
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(8, 5, time_cond_proj_dim=128 + WIDTH, time_embedding_type="positional"),
        scheduler=EulerDiscreteScheduler(prediction_type="sample"),
    )


def sdxl(kind: Any, vae: Any, in_channels: int = 4) -> Any:
    text_and_time = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
    }
    return kind(
        vae=vae,
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(in_channels, context=2 * WIDTH, **text_and_time),
        scheduler=ddim(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        add_watermarker=False,
    )


def sd3(kind: Any, vae: Any) -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    t5_wide = T5EncoderModel(
        T5Config(vocab_size=40, d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )
    return kind(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_wide.eval(),
        tokenizer_3=t5_tokenizer(),
    )


def flux(kind: Any, vae: Any, in_channels: int = 64) -> Any:
    transformer = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
    )


def dit(vae: Any) -> Any:
    transformer = DiTTransformer2DModel(
        sample_size=SIDE // 8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer.eval(), vae=vae, scheduler=DDIMScheduler())


def pixart(kind: Any, vae: Any) -> Any:
    transformer = PixArtTransformer2DModel(
        sample_size=SIDE // 8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae,
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(),
    )


def ldm(vae: Any) -> Any:
    return LDMTextToImagePipeline(
        vqvae=vae, bert=bert(), tokenizer=bert_tokenizer(), unet=unet(), scheduler=ddim(clip_sample=False)
    )


def picture(side: int = SIDE) -> torch.Tensor:
    """(1, 3, side, side) in [0, 1], as pipelines take tensors."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    return torch.stack((x, y, (6 * x * y).sin().abs()))[None]


def mask() -> torch.Tensor:
    """(1, 1, SIDE, SIDE): the left half is painted anew."""
    return (torch.arange(SIDE) < SIDE // 2).float().expand(1, 1, SIDE, SIDE)


@dataclass(frozen=True)
class Case:
    """One kind of pipeline."""

    build: Callable[[Any], Any]  # takes the VAE
    arguments: Callable[[], dict[str, Any]] = dict
    channels: int = 4
    shift: bool = False  # adds shift_factor
    component: str = "vae"
    gives_latents: bool = True  # knows output_type="latent"
    fixed: dict[str, Any] = field(default_factory=dict)  # what the config of its VAE must say

    def make(self, vae: Any = None) -> Any:
        """A random pipeline, always the same one, silent."""
        vae = vae or stock_vae(self.channels)
        torch.manual_seed(1)  # whatever was drawn for the VAE
        pipe = self.build(vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, output_type: str = "pt") -> torch.Tensor:
        """The picture (or the latents) that two or three steps give, always from the same noise."""
        arguments = {"num_inference_steps": 2, **self.arguments()}
        generator = torch.Generator().manual_seed(0)
        return pipe(generator=generator, output_type=output_type, **arguments).images


def stock_vae(channels: int = 4, seed: int = 7, **options: Any) -> AutoencoderKL:
    """What such pipelines come with: a random f8 VAE."""
    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "latent_channels": channels,
        "sample_size": 256,
        "scaling_factor": 0.3611 if channels == 16 else 0.18215,
        "shift_factor": 0.1159 if channels == 16 else None,
    }
    return AutoencoderKL(**{**settings, **options}).eval()


def prompted(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "prompt": PROMPT,
        **{key: value() if callable(value) else value for key, value in more.items()},
    }


SIZE = {"height": SIDE, "width": SIDE}
IMAGE = {"image": picture, "strength": 0.8, "num_inference_steps": 3}
PAINT = {"image": picture, "mask_image": mask, "strength": 0.8, "num_inference_steps": 3}
T5 = {"max_sequence_length": LENGTH}
PIXART = {"use_resolution_binning": False, "clean_caption": False, **SIZE}

CASES = {
    "StableDiffusion": Case(lambda vae: stable_diffusion(StableDiffusionPipeline, vae), prompted(**SIZE)),
    "StableDiffusionImg2Img": Case(
        lambda vae: stable_diffusion(StableDiffusionImg2ImgPipeline, vae), prompted(**IMAGE)
    ),
    "StableDiffusionInpaint": Case(
        lambda vae: stable_diffusion(StableDiffusionInpaintPipeline, vae, 9), prompted(**PAINT, **SIZE)
    ),
    "StableDiffusionUpscale": Case(
        upscale, prompted(image=lambda: picture(SIDE // 8)), fixed={"scaling_factor": 0.08333}
    ),
    "StableDiffusionLatentUpscale": Case(latent_upscale, prompted(image=picture)),
    "StableDiffusionXL": Case(lambda vae: sdxl(StableDiffusionXLPipeline, vae), prompted(**SIZE)),
    "StableDiffusionXLImg2Img": Case(
        lambda vae: sdxl(StableDiffusionXLImg2ImgPipeline, vae), prompted(**IMAGE)
    ),
    "StableDiffusionXLInpaint": Case(
        lambda vae: sdxl(StableDiffusionXLInpaintPipeline, vae, 9), prompted(**PAINT, **SIZE)
    ),
    "StableDiffusion3": Case(
        lambda vae: sd3(StableDiffusion3Pipeline, vae), prompted(**T5, **SIZE), channels=16, shift=True
    ),
    "StableDiffusion3Img2Img": Case(
        lambda vae: sd3(StableDiffusion3Img2ImgPipeline, vae),
        prompted(**T5, **IMAGE),
        channels=16,
        shift=True,
    ),
    "Flux": Case(lambda vae: flux(FluxPipeline, vae), prompted(**T5, **SIZE), channels=16, shift=True),
    "FluxImg2Img": Case(
        lambda vae: flux(FluxImg2ImgPipeline, vae), prompted(**T5, **IMAGE, **SIZE), channels=16, shift=True
    ),
    "FluxInpaint": Case(
        lambda vae: flux(FluxInpaintPipeline, vae), prompted(**T5, **PAINT, **SIZE), channels=16, shift=True
    ),
    "DiT": Case(dit, lambda: {"class_labels": [3]}, gives_latents=False),
    "PixArtAlpha": Case(
        lambda vae: pixart(PixArtAlphaPipeline, vae), prompted(**PIXART, max_sequence_length=LENGTH)
    ),
    "PixArtSigma": Case(
        lambda vae: pixart(PixArtSigmaPipeline, vae), prompted(**PIXART, max_sequence_length=LENGTH)
    ),
    "LDMTextToImage": Case(ldm, prompted(**SIZE), component="vqvae", gives_latents=False),
}


# of the spaces that bundled models speak: text to image, and image to image
FAMILIES = {
    "sd": ("StableDiffusion", "StableDiffusionImg2Img"),
    "sdxl": ("StableDiffusionXL", "StableDiffusionXLImg2Img"),
    "sd3": ("StableDiffusion3", "StableDiffusion3Img2Img"),
    "flux": ("Flux", "FluxImg2Img"),
}


_cpu_offload = accelerate.cpu_offload


def cpu_offload(model: Any, device: torch.device, **options: Any) -> Any:
    """accelerate's, for "cpu": a parameter moved to diffusers' "cpu:0" is no parameter any more."""
    return _cpu_offload(model, torch.device(device.type), **options)


def by_hand(case: Case, vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The picture in [0, 1] that a pipeline must make of its last latents."""
    if latents.ndim == 3:  # Flux's tokens of 2 x 2 pixels, (B, tokens, 4 C)
        side = int(latents.shape[1] ** 0.5)
        parts = latents.view(len(latents), side, side, -1, 2, 2)
        latents = parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor if case.shift else 0)
    with torch.no_grad():
        return (vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)

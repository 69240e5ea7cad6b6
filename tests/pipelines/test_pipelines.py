"""Swapping a VAE into a pipeline: what is refused and why, what is set, and the examples of the page."""

import copy
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    FluxFillPipeline,
    FluxPipeline,
    LDMTextToImagePipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from pipelines import CASES, by_hand, cpu_offload, flux, stable_diffusion, stock_vae, unet

import latentvae
from latentvae.base.errors import ModelError
from latentvae.models.exporting import fold_latent_mean
from latentvae.pipelines.checks import (
    LatentSpaceError,
    SwapError,
    latent_channels,
    names_read,
    pipeline_scaling,
)
from latentvae.pipelines.swap import swap

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
SD, XL, SD3 = (CASES[name] for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3"))


def new(**options: Any) -> Any:
    """A VAE as latentvae makes them."""
    torch.manual_seed(3)
    return latentvae.build("tiny", **{"scaling_factor": 0.7, **options}).eval()


def other_decoder(vae: Any) -> Any:
    """A decoder-only fine-tuning: the latents are the same."""
    tuned = copy.deepcopy(vae)
    with torch.no_grad():
        tuned.decoder.conv_out.weight.mul_(1.01)
    return tuned


# --- what a pipeline does


@pytest.mark.parametrize("name", CASES)
def test_latent_channels_of_every_pipeline(name: str) -> None:
    assert latent_channels(CASES[name].make()) == CASES[name].channels


def test_latent_channels_beside_images() -> None:
    fill = flux(FluxFillPipeline, stock_vae(16), in_channels=384)
    assert latent_channels(fill) == 16


@pytest.mark.parametrize(
    ("pipeline", "shift", "moments", "post_quant_conv"),
    [
        (StableDiffusionPipeline, False, False, False),
        (StableDiffusionInpaintPipeline, False, False, False),
        (StableDiffusionXLPipeline, False, True, True),
        (StableDiffusion3Pipeline, True, False, False),
        (FluxPipeline, True, False, False),
        (DiTPipeline, False, False, False),
        (PixArtAlphaPipeline, False, False, False),
        (PixArtSigmaPipeline, False, False, False),
        (LDMTextToImagePipeline, False, False, False),
    ],
)
def test_what_pipelines_read(pipeline: Any, shift: bool, moments: bool, post_quant_conv: bool) -> None:
    reads = names_read(pipeline)
    assert ("shift_factor" in reads) == shift
    assert ("latents_mean" in reads) == moments
    assert ("post_quant_conv" in reads) == post_quant_conv
    assert "scaling_factor" in reads


def test_scaling_of_sdxl_with_moments() -> None:
    mean, std = [0.1, -0.2, 0.3, 0.4], [6.0, 5.0, 7.0, 5.5]
    vae = stock_vae(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    pipe = XL.make(vae)
    latents = XL.run(pipe, output_type="latent")
    with torch.no_grad():
        wanted = vae.decode(pipeline_scaling(pipe, vae).unscale(latents)).sample
    assert ((wanted / 2 + 0.5).clamp(0, 1) - XL.run(pipe)).abs().max() < 1e-6


@pytest.mark.parametrize("case", [SD, SD3], ids=["ignores", "adds"])
def test_scaling_with_a_shift(case: Any) -> None:
    vae = stock_vae(case.channels, shift_factor=0.5)
    pipe = case.make(vae)
    latents = case.run(pipe, output_type="latent")
    with torch.no_grad():
        wanted = vae.decode(pipeline_scaling(pipe, vae).unscale(latents)).sample
    assert ((wanted / 2 + 0.5).clamp(0, 1) - case.run(pipe)).abs().max() < 1e-5


# --- scaling and shift


@pytest.mark.parametrize(
    "name", ["StableDiffusion", "StableDiffusionXL", "DiT", "PixArtAlpha", "LDMTextToImage"]
)
def test_shift_that_would_be_ignored_is_refused_until_folded(name: str) -> None:
    pipe, vae = CASES[name].make(), new(shift_factor=0.4)
    with pytest.raises(SwapError, match=r"shift_factor 0\.4, which .* ignores.*fold_latent_mean"):
        swap(pipe, vae, allow_new_latent_space=True)
    folded = fold_latent_mean(vae, [vae.config.shift_factor] * vae.config.latent_channels)
    folded.register_to_config(shift_factor=0.0)
    swap(pipe, folded, allow_new_latent_space=True)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    mode = latentvae.encode(vae, image)[0].mode()
    seen = pipeline_scaling(pipe, folded).scale(latentvae.encode(folded, image)[0].mode())
    assert torch.allclose(seen, latentvae.scale(vae, mode), atol=1e-5)


def test_shift_that_cannot_be_folded_says_so() -> None:
    vae = new(shift_factor=0.4, use_quant_conv=False)
    with pytest.raises(SwapError, match="cannot be folded into a model without quant_conv"):
        swap(SD.make(), vae, allow_new_latent_space=True)


def test_shift_of_the_present_vae_stays_ignored() -> None:
    old = stock_vae(shift_factor=0.2)
    pipe, vae = SD.make(old), other_decoder(old)
    assert swap(pipe, vae) is old
    assert vae.config.shift_factor == 0.2


@pytest.mark.parametrize("name", ["StableDiffusion3", "Flux"])
def test_missing_shift_becomes_zero_where_it_is_added(name: str) -> None:
    case = CASES[name]
    pipe, vae = case.make(), new(latent_channels=16)
    vae.register_to_config(shift_factor=None)
    swap(pipe, vae, allow_new_latent_space=True)
    assert vae.config.shift_factor == 0.0
    latents = case.run(pipe, output_type="latent")
    assert (by_hand(case, vae, latents) - case.run(pipe)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (XL, {"latents_mean": [0.0] * 4, "latents_std": [5.5] * 4, "scaling_factor": 0.18}, "scaled twice"),
        (XL, {"latents_mean": [0.0] * 3, "latents_std": [5.5] * 3}, "of 3 channels; .* takes 4"),
        (SD, {"latents_mean": [0.0] * 4, "latents_std": [5.5] * 4}, "which StableDiffusionPipeline ignores"),
        (SD, {"scaling_factor": 0.0}, "scaling_factor 0"),
    ],
)
def test_factors_that_would_go_wrong(case: Any, options: dict[str, Any], message: str) -> None:
    pipe = case.make()
    with pytest.raises(SwapError, match=message):
        swap(pipe, stock_vae(seed=9, **options), allow_new_latent_space=True)


def test_moments_beside_a_factor_of_their_own_are_taken() -> None:
    vae = stock_vae(seed=9, latents_mean=[0.0] * 4, latents_std=[6.5] * 4, scaling_factor=0.5)
    pipe = XL.make()
    swap(pipe, vae, allow_new_latent_space=True)
    assert XL.run(pipe).isfinite().all()


def test_upscaler_would_change_the_factor_on_reload(tmp_path: Path) -> None:
    case = CASES["StableDiffusionUpscale"]
    pipe, vae = case.make(), new()
    with pytest.raises(SwapError, match=r"scaling_factor 0\.7, but .* writes 0\.08333"):
        swap(pipe, vae, allow_new_latent_space=True)
    case.make(vae)  # the reason
    assert vae.config.scaling_factor == 0.08333


# --- shapes


def test_latent_channels_fail_before_any_step() -> None:
    pipe = SD.make()
    pipe.unet.forward = None  # a call would fail otherwise
    with pytest.raises(SwapError, match=r"has 16 latent channels, but the unet .* works on 4 .*takes 4"):
        swap(pipe, new(latent_channels=16), allow_new_latent_space=True)


def test_inpainting_with_other_unets_is_refused() -> None:
    pipe = stable_diffusion(StableDiffusionInpaintPipeline, stock_vae(16))
    pipe.unet = unet(33, 16)
    with pytest.raises(SwapError, match=r"takes 33 channels, but .* works with 4 or 9 only"):
        swap(pipe, new(latent_channels=16), allow_new_latent_space=True)


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(SwapError, match="takes images of 1 channels"):
        swap(SD.make(), new(in_channels=1, out_channels=1), allow_new_latent_space=True)


@pytest.mark.parametrize(("levels", "factor"), [(2, 2), (3, 4), (5, 16)])
def test_compression_sets_what_depends_on_it(levels: int, factor: int) -> None:
    case = CASES["StableDiffusionInpaint"]
    pipe, vae = case.make(), new(block_out_channels=(16,) * levels)
    pipe.image_processor = type(pipe.image_processor)(vae_scale_factor=8, resample="nearest")
    with pytest.raises(LatentSpaceError, match=rf"4 channels at 1/8 of the side, these 4 at 1/{factor}\."):
        swap(pipe, vae)
    swap(pipe, vae, allow_new_latent_space=True)
    assert pipe.vae_scale_factor == factor
    assert pipe.image_processor.config.vae_scale_factor == factor
    assert pipe.image_processor.config.resample == "nearest"  # a choice of the user's
    assert pipe.mask_processor.config.vae_scale_factor == factor
    assert pipe.mask_processor.config.do_binarize
    assert not pipe.mask_processor.config.do_normalize
    assert case.run(pipe).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", ["Flux", "FluxInpaint", "StableDiffusion3Img2Img"])
def test_processors_are_those_of_a_pipeline_built_with_it(name: str) -> None:
    case = CASES[name]
    options = {"latent_channels": 16, "block_out_channels": (16, 16, 32)}
    pipe, built = case.make(), case.make(new(**options))
    swap(pipe, new(**options), allow_new_latent_space=True)
    for attribute in ("image_processor", "mask_processor"):
        if hasattr(built, attribute):
            assert dict(getattr(pipe, attribute).config) == dict(getattr(built, attribute).config)
    assert pipe.vae_scale_factor == built.vae_scale_factor == 4
    assert torch.equal(case.run(pipe), case.run(built))


def test_ldm_computes_with_eight_whatever_its_vae() -> None:
    with pytest.raises(
        SwapError, match=r"compresses each side by 4, but LDMTextToImagePipeline computes with 8"
    ):
        swap(CASES["LDMTextToImage"].make(), new(block_out_channels=(16, 16, 32)), True)


# --- dtype, device, attributes


def test_dtype_follows_and_float16_warns(caplog: pytest.LogCaptureFixture) -> None:
    pipe, vae = SD.make().to(torch.bfloat16), new()
    swap(pipe, vae, allow_new_latent_space=True)
    assert vae.dtype == torch.bfloat16
    assert "overflows" not in caplog.text
    pipe.to(torch.float16, silence_dtype_warnings=True)
    fresh = new().train()
    fresh.register_to_config(force_upcast=True)
    swap(pipe, fresh, allow_new_latent_space=True)
    assert fresh.dtype == torch.float16
    assert not fresh.training
    assert "float16 overflows" in caplog.text


def test_post_quant_conv_is_wanted_where_it_is_read() -> None:
    bare = new(use_post_quant_conv=False)
    bare.register_to_config(force_upcast=True)
    with pytest.raises(SwapError, match="no post_quant_conv"):
        swap(XL.make().to(torch.float16), bare, allow_new_latent_space=True)
    swap(XL.make(), copy.deepcopy(bare), allow_new_latent_space=True)
    bare.register_to_config(force_upcast=False)
    swap(XL.make().to(torch.float16), bare, allow_new_latent_space=True)
    upscaler = CASES["StableDiffusionUpscale"].make()
    with pytest.raises(SwapError, match="no post_quant_conv"):
        swap(upscaler, new(use_post_quant_conv=False, scaling_factor=0.08333), allow_new_latent_space=True)


def test_slicing_and_tiling_are_carried_over() -> None:
    pipe, vae = SD.make(), new()
    pipe.vae.enable_slicing()
    swap(pipe, vae, allow_new_latent_space=True)
    assert vae.use_slicing
    assert not vae.use_tiling


# --- what is no VAE, no pipeline, or offloaded in another way


def test_other_things_are_refused() -> None:
    with pytest.raises(ModelError, match="VQModel came"):
        swap(SD.make(), VQModel())  # type: ignore[arg-type]
    with pytest.raises(SwapError, match="Linear came; wanted a diffusers pipeline"):
        swap(torch.nn.Linear(1, 1), new())
    model = UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        norm_num_groups=4,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    with pytest.raises(SwapError, match=r"has no VAE: its components are scheduler, unet\."):
        swap(DDPMPipeline(unet=model, scheduler=DDIMScheduler()), new())


@pytest.mark.parametrize(("old", "what"), [(VQModel(), "a VQModel"), (None, "no VAE")])
def test_what_cannot_be_compared_needs_the_flag(old: Any, what: str) -> None:
    pipe, vae = SD.make(), new()
    pipe.vae = old
    with pytest.raises(LatentSpaceError, match=f"{what} now, with which .* cannot be compared"):
        swap(pipe, vae)
    assert pipe.vae is old
    assert swap(pipe, vae, allow_new_latent_space=True) is old
    assert torch.equal(SD.run(pipe), SD.run(SD.make(new())))


def test_an_autoencoder_tiny_is_compared() -> None:
    pipe = SD.make()
    pipe.vae = old = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(LatentSpaceError, match="trained on other latents") as caught:
        swap(pipe, new())
    assert caught.value.agreement is not None
    assert pipe.vae is old


def test_text_to_image_only_asks_for_the_decoder() -> None:
    pipe, again = SD.make(), CASES["StableDiffusionImg2Img"].make()
    vae = copy.deepcopy(pipe.vae)
    torch.nn.init.zeros_(vae.encoder.conv_in.weight)  # latents of its own that mean nothing
    with pytest.raises(LatentSpaceError, match='pass use="decode"'):
        swap(again, copy.deepcopy(vae))
    with pytest.raises(LatentSpaceError):
        swap(pipe, copy.deepcopy(vae), use="both")
    with pytest.raises(SwapError, match="use='draw' came"):
        swap(again, copy.deepcopy(vae), use="draw")  # type: ignore[arg-type]
    swap(again, copy.deepcopy(vae), use="decode")
    assert swap(pipe, vae) is not vae


def test_a_name_is_loaded() -> None:
    pipe = SD.make()
    with pytest.raises(LatentSpaceError, match="trained on other latents"):
        swap(pipe, "f8c4-small")
    swap(pipe, "f8c4-small", allow_new_latent_space=True)
    assert pipe.vae.config.block_out_channels == [32, 64, 128, 256]


def test_same_object_is_no_swap() -> None:
    pipe = SD.make()
    assert swap(pipe, pipe.vae) is pipe.vae


def test_hooks_and_maps_that_cannot_be_put_back_are_refused() -> None:
    elsewhere = SD.make(new())
    elsewhere.enable_model_cpu_offload(device="cpu")
    pipe = SD.make()
    with pytest.raises(SwapError, match="hooks of another pipeline"):
        swap(pipe, elsewhere.vae, allow_new_latent_space=True)
    elsewhere.remove_all_hooks()
    pipe.hf_device_map = {"vae": 0}
    with pytest.raises(SwapError, match="device map"):
        swap(pipe, elsewhere.vae, allow_new_latent_space=True)
    pipe.hf_device_map = None
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(SwapError, match="groups of layers"):
        swap(pipe, elsewhere.vae, allow_new_latent_space=True)


# --- latent spaces


@pytest.mark.parametrize("offload", [None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_latent_spaces_are_told_apart_when_offloaded(
    offload: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate, "cpu_offload", cpu_offload)
    pipe = SD.make()
    vae = other_decoder(pipe.vae)
    before = SD.run(pipe)
    if offload:
        getattr(pipe, offload)(device="cpu")
    old, processor = pipe.vae, pipe.image_processor
    with pytest.raises(
        LatentSpaceError, match=r"trained on other latents .*agreement -?\d\.\d+ of 1"
    ) as caught:
        swap(pipe, stock_vae(seed=8))
    assert not caught.value.agreement.same
    assert "allow_new_latent_space=True" in str(caught.value)
    assert pipe.vae is old
    assert pipe.image_processor is processor
    assert hasattr(old, "_hf_hook") == (offload is not None)
    assert torch.equal(SD.run(pipe), before)
    assert swap(pipe, vae) is old
    assert hasattr(vae, "_hf_hook") == (offload is not None)
    assert 0 < (SD.run(pipe) - before).abs().max() < 0.1


def test_agreement_is_of_latents_as_the_pipeline_scales_them() -> None:
    pipe = SD.make()
    vae = other_decoder(pipe.vae)
    vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    with pytest.raises(LatentSpaceError) as caught:
        swap(pipe, vae)
    assert caught.value.agreement.scale_ratio == pytest.approx(2, rel=1e-5)
    assert caught.value.agreement.correlation == pytest.approx(1, abs=1e-6)


# --- the page


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipelines that the examples load, and their VAEs with other decoders."""
    root = tmp_path_factory.mktemp("examples")
    names = {
        "sd": "StableDiffusion",
        "sdxl": "StableDiffusionXL",
        "sd3": "StableDiffusion3",
        "flux": "Flux",
        "dit": "DiT",
        "sd-inpaint": "StableDiffusionInpaint",
    }
    for folder, name in names.items():
        pipe = CASES[name].make()
        pipe.save_pretrained(root / "path/to" / folder)
        other_decoder(pipe.vae).save_pretrained(root / "path/to" / f"{folder}-decoder")
    for name in ("photo.png", "mask.png"):
        Image.new("RGB", (64, 64), "grey").save(root / name)
    return root


@pytest.mark.parametrize("number", range(len(examples())))
def test_examples_run(
    number: int, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = examples()[number]
    assert 5 <= len([line for line in example.splitlines() if line]) <= 10
    monkeypatch.chdir(models)
    (models / "cat.png").unlink(missing_ok=True)
    exec(example, {})
    if "cat.png" in example:
        assert Image.open(models / "cat.png").size[0] >= 64
    elif "flux-to-train" in example:
        reloaded = FluxPipeline.from_pretrained("flux-to-train")
        assert reloaded.vae.config.block_out_channels == [32, 64, 128, 256]
    else:
        assert "trained on other latents" in capsys.readouterr().out

"""The four latent spaces in tiny pipelines: models by name, wrong pairs, AutoencoderTiny on either side."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from PIL import Image
from pipelines import CASES, FAMILIES, by_hand, stock_vae
from vaes import tiny_autoencoder

from latentvae.base.errors import LatentVAEError
from latentvae.models import shipped
from latentvae.models.presets import SPACES
from latentvae.models.spaces import space_name
from latentvae.pipelines.agree import agree
from latentvae.pipelines.checks import LatentSpaceError, SwapError
from latentvae.pipelines.preview import preview
from latentvae.pipelines.swap import swap

KINDS = [(space, kind) for space, kinds in FAMILIES.items() for kind in kinds]
SD = CASES["StableDiffusion"]


def of_space(name: str) -> Any:
    """A random VAE with the channels and factors of a space; those of two spaces share nothing."""
    space = SPACES[name]
    factors = {"scaling_factor": space.scaling_factor, "shift_factor": space.shift_factor}
    return stock_vae(space.latent_channels, seed=20 + list(SPACES).index(name), **factors)


def other_decoder(vae: Any) -> Any:
    """The same latents, drawn a little differently."""
    with torch.no_grad():
        (vae.decoder.conv_out if hasattr(vae.decoder, "conv_out") else vae.decoder.layers[-1]).weight.mul_(
            1.01
        )
    return vae


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as that of the bundled models, with one of each space."""
    root = tmp_path_factory.mktemp("weights")
    for name in SPACES:
        of_space(name).save_pretrained(root / f"{name}-small")
    return root


@pytest.fixture(autouse=True)
def on_the_shelf(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "WEIGHTS_DIR", shelf)


@pytest.mark.parametrize(("space", "kind"), KINDS)
def test_the_model_of_the_space_goes_in_by_name_and_draws_previews(space: str, kind: str) -> None:
    case = CASES[kind]
    given = other_decoder(of_space(space))
    pipe = case.make(given)
    seen: list[Image.Image] = []
    with preview(pipe, on_picture=lambda step, picture: seen.append(picture)) as each:
        assert each.vae is not given
        assert torch.equal(each.vae.decoder.conv_out.weight, of_space(space).decoder.conv_out.weight)
        arguments = {"num_inference_steps": 2, **case.arguments(), "callback_on_step_end": each}
        pipe(generator=torch.Generator().manual_seed(0), **arguments)
        assert 0 < each.share < 1
    assert [picture.size for picture in seen] == [(64, 64)] * pipe.num_timesteps
    assert swap(pipe, f"{space}-small") is given
    assert torch.equal(case.run(pipe), case.run(case.make(of_space(space))))


@pytest.mark.parametrize(
    ("space", "other"),
    [("sd", "sdxl"), ("sdxl", "sd"), ("sd3", "flux"), ("flux", "sd3"), ("sd", "flux"), ("sd3", "sdxl")],
)
def test_a_model_of_another_space_is_refused_and_both_are_named(space: str, other: str) -> None:
    given = of_space(space)
    pipe = CASES[FAMILIES[space][0]].make(given)
    with pytest.raises(SwapError) as caught:
        swap(pipe, f"{other}-small")
    assert pipe.vae is given
    messages = [str(caught.value)]
    if SPACES[space].latent_channels == SPACES[other].latent_channels:
        found = agree(given, of_space(other))
        assert not any((found.same, found.decodes, found.encodes))
        messages.append(str(found))
    else:
        with pytest.raises(LatentVAEError, match="cannot be one latent space") as unlike:
            agree(given, of_space(other))
        with pytest.raises(SwapError, match="Name one of the pipeline's space") as drawn:
            preview(pipe, vae=f"{other}-small")
        messages += [str(unlike.value), str(drawn.value)]
    for message in messages:
        assert re.search(rf"\b{space}\b.*\b{other}\b|\b{other}\b.*\b{space}\b", message), message


# --- AutoencoderTiny


@pytest.mark.parametrize(
    "kind", [*(kind for _, kind in KINDS), "StableDiffusionInpaint", "DiT", "LDMTextToImage"]
)
def test_a_tiny_autoencoder_decodes_a_pipelines_latents_as_they_are(kind: str) -> None:
    case = CASES[kind]
    pipe, tiny = case.make(), tiny_autoencoder(case.channels)
    old = swap(pipe, tiny, allow_new_latent_space=True)
    assert (tiny.config.scaling_factor, tiny.config.shift_factor) == (1, 0)
    picture = case.run(pipe)
    assert torch.equal(picture, case.run(case.make(tiny_autoencoder(case.channels))))
    if case.gives_latents:
        assert (by_hand(case, tiny, case.run(pipe, output_type="latent")) - picture).abs().max() < 1e-5
    assert swap(pipe, old, allow_new_latent_space=True) is tiny
    assert torch.equal(case.run(pipe), case.run(case.make()))


def test_a_tiny_autoencoder_is_compared_on_either_side() -> None:
    own = tiny_autoencoder()
    pipe = SD.make(own)
    assert swap(pipe, other_decoder(tiny_autoencoder())) is own
    with pytest.raises(LatentSpaceError, match=r"an AutoencoderTiny, which does not name its space, B's sd;"):
        swap(pipe, of_space("sd"))
    with pytest.raises(LatentSpaceError, match=r"A's space is sd, B's an AutoencoderTiny"):
        swap(SD.make(of_space("sd")), tiny_autoencoder())


def test_a_tiny_autoencoder_that_would_be_scaled_twice_is_refused_with_the_remedy() -> None:
    pipe = SD.make(tiny_autoencoder())
    with pytest.raises(LatentSpaceError, match=r"scales again: .*scaling_factor=1\.0, shift_factor=0\.0"):
        swap(pipe, tiny_autoencoder(scaling_factor=0.18215))
    with pytest.raises(SwapError, match=r"come scaled and shifted: .*shift_factor=0\.0"):
        swap(pipe, tiny_autoencoder(shift_factor=0.1))
    with pytest.raises(SwapError, match=r"writes scaling_factor 0\.08333 .*Use an AutoencoderKL"):
        swap(CASES["StableDiffusionUpscale"].make(), tiny_autoencoder(), allow_new_latent_space=True)


class ReadsDistributions(StableDiffusionPipeline):
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(image).latent_dist.mode()


def test_a_pipeline_that_reads_distributions_refuses_a_tiny_autoencoder() -> None:
    pipe = SD.make()
    pipe.__class__ = ReadsDistributions
    with pytest.raises(SwapError, match="ReadsDistributions reads the latent_dist"):
        swap(pipe, tiny_autoencoder(), allow_new_latent_space=True)


@pytest.mark.parametrize(
    ("kind", "pipeline"), [("StableDiffusion", StableDiffusionPipeline), ("Flux", FluxPipeline)]
)
def test_a_pipeline_with_a_tiny_autoencoder_is_saved_and_loaded(
    kind: str, pipeline: Any, tmp_path: Path
) -> None:
    case = CASES[kind]
    tiny_autoencoder(case.channels).save_pretrained(tmp_path / "taesd")
    pipe = case.make()
    swap(pipe, str(tmp_path / "taesd"), allow_new_latent_space=True)  # by its folder
    assert "(taesd)" in space_name(pipe.vae)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = pipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert (case.run(loaded) - case.run(pipe)).abs().max() < 1e-5

"""Pictures of every step, in pipelines of every way of predicting, without changing what they draw."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from pipelines import CASES

from latentvae.base.errors import LatentVAEError
from latentvae.models.spaces import decode_scaled
from latentvae.pipelines.preview import predicted_clean, preview

KINDS = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
SCHEDULERS = {
    "DDIMScheduler": ("epsilon", "v_prediction", "sample"),
    "DDPMScheduler": ("epsilon", "v_prediction", "sample"),
    "EulerDiscreteScheduler": ("epsilon", "v_prediction"),
    "HeunDiscreteScheduler": ("epsilon", "v_prediction"),
    "DPMSolverMultistepScheduler": ("epsilon", "v_prediction"),
    "UniPCMultistepScheduler": ("epsilon", "v_prediction"),
    "FlowMatchEulerDiscreteScheduler": ("flow",),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in SCHEDULERS.items() for kind in kinds]
)
def test_the_clean_latents_come_back_from_a_perfect_denoiser(name: str, kind: str) -> None:
    options = {} if kind == "flow" else {"prediction_type": kind}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(12)
    clean, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    at = 5
    timestep = scheduler.timesteps[at]
    if kind == "flow":
        noisy = scheduler.scale_noise(clean, timestep[None], noise)
        output = noise - clean
    else:
        noisy = scheduler.add_noise(clean, noise, timestep[None])
        kept = scheduler.alphas_cumprod[int(timestep)].double()
        if name.startswith(("Euler", "Heun")):  # whose times are between those of the table
            kept = 1 / (1 + scheduler.sigmas[scheduler.index_for_timestep(timestep)].double() ** 2)
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        output = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]
    found = predicted_clean(scheduler, output, timestep, noisy)
    assert (found - clean).abs().max() < 2e-3  # schedulers keep their own tables in float32


def run(kind: str, pipe: Any, **more: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, **CASES[kind].arguments(), **more}
    return pipe(generator=torch.Generator().manual_seed(1), output_type="pt", **arguments).images


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_a_picture_and_the_result_is_the_same(kind: str, tmp_path: Path) -> None:
    pipe = CASES[kind].make()
    plain = run(kind, pipe)
    seen: list[int] = []
    with preview(pipe, tmp_path, on_picture=lambda step, picture: seen.append(step)) as each:
        assert torch.equal(run(kind, pipe, callback_on_step_end=each), plain)
        assert 0 < each.share < 1
    assert "step" not in vars(pipe.scheduler)  # as it was
    assert seen == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:04d}.png" for step in seen]
    width, height = Image.open(tmp_path / "step-0000.png").size
    assert (width, height) == (plain.shape[-1], plain.shape[-2])


@pytest.mark.parametrize("kind", ["StableDiffusion3", "Flux"])
def test_a_flow_has_arrived_with_its_last_step(kind: str) -> None:
    pipe = CASES[kind].make()
    with preview(pipe) as each:
        picture = run(kind, pipe, callback_on_step_end=each)
    latents = each._clean if each._clean.ndim == 4 else each._unpack(each._clean)
    with torch.no_grad():
        shown = (decode_scaled(pipe.vae, latents) / 2 + 0.5).clamp(0, 1)
    assert (shown - picture).abs().max() < 1e-4


def test_only_some_steps_and_none_of_a_number_that_means_nothing(tmp_path: Path) -> None:
    pipe = CASES["StableDiffusion"].make()
    with preview(pipe, tmp_path, every=2) as each:
        run("StableDiffusion", pipe, callback_on_step_end=each)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000.png", "step-0002.png"]
    with pytest.raises(LatentVAEError, match="every=0"):
        preview(pipe, every=0)

"""Pictures of every step, in pipelines of every way of predicting, without changing what they draw."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from pipelines import CASES, stock_vae
from torchvision.transforms.functional import to_tensor

from latentvae.base.errors import LatentVAEError
from latentvae.pipelines.preview import _counts_in_sigmas, _sigma, predicted_clean, preview

KINDS = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": ("epsilon", "v_prediction", "sample"),
    "DDPMScheduler": ("epsilon", "v_prediction", "sample"),
    "PNDMScheduler": ("epsilon", "v_prediction"),
    "EulerDiscreteScheduler": ("epsilon", "v_prediction"),
    "EulerAncestralDiscreteScheduler": ("epsilon", "v_prediction"),
    "HeunDiscreteScheduler": ("epsilon", "v_prediction"),
    "KDPM2DiscreteScheduler": ("epsilon",),
    "DPMSolverMultistepScheduler": ("epsilon", "v_prediction"),
    "DPMSolverSinglestepScheduler": ("epsilon", "v_prediction"),
    "UniPCMultistepScheduler": ("epsilon", "v_prediction"),
    "FlowMatchEulerDiscreteScheduler": ("flow",),
}
KARRAS = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


@pytest.mark.parametrize(
    ("name", "kind", "karras"),
    [(name, kind, False) for name, kinds in SCHEDULERS.items() for kind in kinds]
    + [(name, "epsilon", True) for name in KARRAS],
)
def test_a_perfect_denoiser_is_told_its_clean_latents_at_every_step(
    name: str, kind: str, karras: bool
) -> None:
    """It leads there, and what is predicted must be those latents from the first step to the last."""
    options: dict[str, Any] = {} if kind == "flow" else {"prediction_type": kind}
    scheduler = getattr(diffusers, name)(**options, **({"use_karras_sigmas": True} if karras else {}))
    scheduler.set_timesteps(8)
    torch.manual_seed(0)
    clean = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    unit = not _counts_in_sigmas(scheduler)
    sample = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    sample = sample * (1.0 if kind == "flow" else float(scheduler.init_noise_sigma))
    worst = 0.0
    for timestep in scheduler.timesteps:
        if kind == "flow":
            output = (sample - clean) / _sigma(scheduler, timestep)
        else:
            if hasattr(scheduler, "sigmas"):
                sigma = _sigma(scheduler, timestep).double()
                kept = 1 / (1 + sigma**2)
            else:
                kept = scheduler.alphas_cumprod[int(timestep)].double()
                sigma = ((1 - kept) / kept).sqrt()
            scaled = sample if unit else sample * kept.sqrt()  # of unit variance
            noise = (scaled - kept.sqrt() * clean) / (1 - kept).sqrt()
            velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
            output = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]
        found = predicted_clean(scheduler, output, timestep, sample)
        worst = max(worst, float((found - clean).abs().max()))
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0].double()
    assert worst < 5e-3  # schedulers keep their own tables in float32


def test_a_scheduler_that_does_not_tell_is_refused_before_anything_runs() -> None:
    pipe = CASES["StableDiffusion"].make()
    pipe.scheduler = diffusers.IPNDMScheduler()
    with pytest.raises(LatentVAEError, match="IPNDMScheduler does not say what the clean latents"):
        preview(pipe)


@pytest.mark.slow
def test_a_preview_ends_when_the_next_begins_and_follows_another_scheduler(tmp_path: Path) -> None:
    pipe = CASES["StableDiffusion"].make()
    first = preview(pipe, tmp_path / "first")
    second = preview(pipe, tmp_path / "second")
    run("StableDiffusion", pipe, callback_on_step_end=second)
    assert first.picture is None
    first.close()  # which does not end the second
    assert pipe.scheduler.step is second._step
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    run("StableDiffusion", pipe, callback_on_step_end=second)
    second.close()
    assert "step" not in vars(pipe.scheduler)


def test_a_picture_that_fails_is_one_picture_less(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = CASES["StableDiffusion"].make()
    wanted = run("StableDiffusion", pipe)
    with preview(pipe, tmp_path, vae=stock_vae(seed=3)) as each:
        with torch.no_grad():
            each.vae.decoder.conv_out.bias.fill_(float("nan"))
        assert torch.equal(run("StableDiffusion", pipe, callback_on_step_end=each), wanted)
    assert sum("no preview of step" in record.message for record in caplog.records) == 1
    pipe.vae.half().register_to_config(force_upcast=True)
    with pytest.raises(LatentVAEError, match="force_upcast"):
        preview(pipe)


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
    seen: list[Any] = []
    with preview(pipe, on_picture=lambda step, picture: seen.append(picture)) as each:
        picture = run(kind, pipe, callback_on_step_end=each)
    shown = to_tensor(seen[-1])[None]
    assert (shown - picture).abs().max() < 0.003  # 8 bits


def test_only_some_steps_and_none_of_a_number_that_means_nothing(tmp_path: Path) -> None:
    pipe = CASES["StableDiffusion"].make()
    with preview(pipe, tmp_path, every=2) as each:
        run("StableDiffusion", pipe, callback_on_step_end=each)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000.png", "step-0002.png"]
    with pytest.raises(LatentVAEError, match="every=0"):
        preview(pipe, every=0)

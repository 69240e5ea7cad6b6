"""What a GPU computes, beside the CPU: `pytest -m gpu -n 0`. Without one it runs on the CPU, to rehearse."""

import math
from pathlib import Path

import pytest
import torch
from training_runs import write_photos

import latentvae
from latentvae.models.latents import decode, encode
from latentvae.models.loading import load
from latentvae.training.loop import train
from latentvae.training.recipes import load_config
from latentvae.training.record import read_records

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
GPU = torch.accelerator.current_accelerator(check_available=True)
DEVICE = GPU or torch.device("cpu")
# of the range of 2, against the CPU's fp32: TF32 is off outside training
ERRORS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth pictures (1, 3, 96, 160)."""
    y, x = torch.meshgrid(torch.arange(96) / 9, torch.arange(160) / 11, indexing="ij")
    return torch.stack([torch.sin(x + y), torch.cos(x), torch.sin(y)])[None] * 0.8


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("dtype", list(ERRORS))
def test_latents_and_pictures_are_those_of_the_cpu(
    images: torch.Tensor, dtype: torch.dtype, optimized: bool
) -> None:
    exact = load("f8c4-small")
    vae = load("f8c4-small").to(DEVICE, dtype)
    vae = latentvae.optimize(vae) if optimized else vae
    with torch.no_grad():
        latents = encode(exact, images)[0].mean
        picture = decode(exact, latents)
        found = encode(vae, images.to(DEVICE, dtype))[0].mean.float().cpu()
        drawn = decode(vae, latents.to(DEVICE)).cpu()
    assert (found - latents).abs().max() < ERRORS[dtype] * latents.abs().max()
    assert (drawn - picture).square().mean().sqrt() < ERRORS[dtype]


def test_tiles_are_the_whole(images: torch.Tensor) -> None:
    vae = load("f8c4-small").to(DEVICE)
    with torch.no_grad():
        latents = encode(vae, images.to(DEVICE))[0].mean
        whole = decode(vae, latents)
        tiled = decode(latentvae.enable_exact_tiling(vae, tile_size=64), latents)
    assert not torch.equal(whole, tiled)  # tiles there were
    assert (whole - tiled).abs().max() < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_with_the_discriminator_ends_well(tmp_path: Path, precision: str, compiled: bool) -> None:
    if GPU is None and (compiled or precision == "fp16"):
        pytest.skip("a CPU compiles for minutes, and scales no losses")
    settings = [
        *(f"data.train={write_photos(tmp_path / 'photos')}", f"output={tmp_path / 'run'}", "data.workers=2"),
        *("data.val_images=2", "data.val_size=32", "data.crop=32", "loss.perceptual_weight=0"),
        *("train.max_steps=24", "train.batch_size=4", "train.log_every=1", "train.save_every=12"),
        *("train.tracker=none", f"train.precision={precision}", f"train.compile={compiled}"),
        *("adversarial.disc_weight=0.5", "adversarial.width=16", "adversarial.layers=2", "optim.lr=3e-3"),
        *("adversarial.disc_start=4", "adversarial.disc_ramp=0", "optim.warmup_steps=2"),
    ]
    exported = train(load_config("tiny", settings))
    steps = [each for each in read_records(tmp_path / "run" / "metrics.jsonl") if "rec_loss" in each]
    losses = [each["rec_loss"] for each in steps if math.isfinite(each["rec_loss"])]
    assert len(losses) == 24
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert all(tensor.isfinite().all() for tensor in load(exported).state_dict().values())
    if precision == "fp16":  # a few steps find the scale
        assert steps[-1]["loss_scale"] > 1
        assert steps[-1].get("skipped_steps", 0) < 12

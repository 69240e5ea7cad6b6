"""fp16 with a scaler of losses, on the CPU: torch has both there, and Accelerate offers them on GPUs only."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from training_runs import ROOT, SETTINGS, assert_same, finish, launch, records, write_photos

from latentvae.base.errors import ConfigError
from latentvae.training import checkpoint, machine
from latentvae.training.data.batches import training_batches
from latentvae.training.losses import Terms
from latentvae.training.recipes import load_config
from latentvae.training.setup import Run, set_up
from latentvae.training.step import optimizer_step

FEW = (
    *SETTINGS,
    "adversarial.disc_start=0",
    "adversarial.disc_ramp=0",
    "regularise.equivariance.probability=0",
)


def scale_on_the_cpu(accelerator: Accelerator) -> None:
    """What Accelerate does with precision fp16 on a GPU; in the place of the check that refuses it here."""
    if accelerator.mixed_precision == "fp16":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=3)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "check_scaler", scale_on_the_cpu)
    return write_photos(tmp_path / "photos")


def start(photos: Path, precision: str, *settings: str) -> Run:
    chosen = (f"data.train={photos}", f"output={photos.parent / precision}", *FEW, *settings)
    AcceleratorState._reset_state(True)  # precision is of all Accelerators of a process
    return set_up(load_config("tiny", [*chosen, f"train.precision={precision}"]), None)


def step(run: Run) -> Terms:
    batches = iter(training_batches(run.config, run.sequence, 0, 0, 1))
    return optimizer_step(run, [next(batches) for _ in range(run.config.train.accumulation)])


def rescale(run: Run, scale: float) -> None:
    assert run.state.scaler is not None
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": scale})


def test_fp16_is_refused_where_accelerate_would_compute_in_fp32(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision=fp16 is for GPUs.*cpu; use auto"):
        start(write_photos(tmp_path / "photos"), "fp16")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_norms_and_the_adaptive_weight_are_those_of_fp32_whatever_the_scale(
    photos: Path, accumulation: int
) -> None:
    passes = (f"train.accumulation={accumulation}", "train.batch_size=2")
    exact = step(start(photos, "fp32", *passes))
    for scale in (2.0**10, 2.0**14):
        run = start(photos, "fp16", *passes)
        rescale(run, scale)
        terms = step(run)
        assert run.state.skipped_steps == 0
        assert terms["loss_scale"] == scale
        for name in ("grad_norm", "d_grad_norm", "adaptive_weight", "total"):
            assert terms[name] == pytest.approx(exact[name].item(), rel=0.02), name


def test_gradients_that_vanish_in_fp16_are_kept_by_the_scale(photos: Path) -> None:
    """A millionth of the loss: fp16 rounds its gradients to zero, but for the scale."""
    norms = []
    for scale in (1.0, 2.0**16):
        run = start(photos, "fp16", "adversarial.disc_weight=0")
        rescale(run, scale)
        nll = run.loss.reconstruction
        run.loss.reconstruction = lambda *images, nll=nll: tuple(  # type: ignore[method-assign]
            each if isinstance(each, dict) else each * 1e-6 for each in nll(*images)
        )
        norms.append(step(run)["grad_norm"].item())
    assert norms[0] < 0.9 * norms[1]


def test_a_step_that_overflows_changes_nothing_and_halves_the_scale(photos: Path) -> None:
    run = start(photos, "fp16")
    assert run.state.adversary is not None
    networks = [run.state.vae, run.state.ema.model, run.state.adversary.discriminator]
    before = [tensor.clone() for network in networks for tensor in network.state_dict().values()]
    rescale(run, 2.0**40)
    step(run)
    after = [tensor for network in networks for tensor in network.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not run.state.optimizer.state
    assert run.state.scaler is not None
    assert run.state.scaler.get_scale() == 2.0**39
    # skipped, but not bad: the scale has a way to go
    assert (run.state.step, run.state.skipped_steps, run.state.bad_steps) == (1, 1, 0)
    rescale(run, 2.0**18)
    while run.state.skipped_steps == run.state.step:
        step(run)
    assert 2.0**10 < run.state.scaler.get_scale() < 2.0**18
    # what no scale can help is bad
    rescale(run, 1.0)
    with torch.no_grad():
        run.state.vae.decoder.conv_out.bias.fill_(torch.inf)
    step(run)
    assert run.state.bad_steps == 1


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_with_its_scale_to_the_same_bits(photos: Path) -> None:
    run = start(photos, "fp16")
    rescale(run, 2.0**12)
    for _ in range(4):
        step(run)
    assert run.state.scaler is not None
    saved = run.state.scaler.state_dict()
    assert (saved["scale"], saved["_growth_tracker"]) == (2.0**13, 1)  # grown once after three steps
    folder = checkpoint.write_whole(run.state, run.checkpoints, run.config.model_dump(), 2, run.accelerator)

    def onwards() -> list[torch.Tensor]:
        for _ in range(2):  # after which it grows again
            step(run)
        assert run.state.scaler is not None
        assert run.state.scaler.get_scale() == 2.0**14
        return [tensor.clone() for network in run.state.networks for tensor in network.state_dict().values()]

    straight = onwards()
    rescale(run, 1.0)
    checkpoint.restore(run.state, folder)
    assert run.state.scaler.state_dict() == saved
    assert all(torch.equal(one, other) for one, other in zip(straight, onwards(), strict=True))


TRAIN = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import torch
from test_training_fp16 import scale_on_the_cpu
from latentvae.cli.main import main
from latentvae.training import machine
torch.set_num_threads(1)
machine.check_scaler = scale_on_the_cpu
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_are_stopped_and_resumed_to_the_same_bits_and_scale(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    script = tmp_path / "run.py"
    script.write_text(TRAIN.format(tests=str(ROOT / "tests"), here=str(Path(__file__).parent)))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), "train")

    def run(output: Path, *more: str) -> None:
        settings = ("train.precision=fp16", "train.batch_size=2", "train.max_steps=6", "train.save_every=3")
        chosen = (
            *SETTINGS,
            "adversarial.disc_start=2",
            f"data.train={photos}",
            f"output={output}",
            *settings,
        )
        arguments = [argument for setting in chosen for argument in ("--set", setting)]
        finish(launch([sys.executable, *launcher, "--config", "tiny", *arguments, *more]))

    run(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    run(tmp_path / "stopped", "--resume", str(tmp_path / "stopped" / "checkpoints" / "step-00000003"))
    assert_same(tmp_path / "straight", tmp_path / "stopped", 6)
    scales = [record["loss_scale"] for record in records(tmp_path / "straight") if "loss_scale" in record]
    assert len(set(scales)) > 1  # it moved, and so the resume had something to lose

"""The training loop as a whole, on small photographs: it learns, stops, resumes bitwise, and exports."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file

from latentvae.base.errors import ConfigError, LatentVAEError, MissingWeightsError
from latentvae.images.reading import find_images, load_image
from latentvae.measure.diagnosis import diagnose, synthetic_probes
from latentvae.measure.lpips import WEIGHTS_ENV
from latentvae.models.exporting import export
from latentvae.models.latents import compute_latent_statistics, encode
from latentvae.models.loading import load
from latentvae.models.presets import build
from latentvae.training import checkpoint, loop, progress
from latentvae.training.checks import check_exported
from latentvae.training.config import Config, TrainConfig
from latentvae.training.data import batches as data_module
from latentvae.training.data.crops import split_sources, validation_images
from latentvae.training.draws import sample_noise
from latentvae.training.loop import TrainingInterrupted, stop_on_signal, train
from latentvae.training.optim import EMA
from latentvae.training.recipes import load_config
from latentvae.training.record import Record
from latentvae.training.setup import set_up
from latentvae.training.step import optimizer_step

STEPS = 12
TIMING = {"images_per_second", "data_wait", "seconds", "memory_gb"}
ROOT = Path(__file__).parents[2]


def write_photos(folder: Path, count: int = 10) -> Path:
    """Smooth pictures of 48 x 40 pixels, each a little different."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:40, :48]
    for i in range(count):
        waves = (
            128 + 100 * np.sin(x / 7 + i) + 20 * np.cos(y / 5),
            128 + 90 * np.cos((x + y) / 9 + i),
            3 * x + i,
        )
        Image.fromarray(np.stack(waves, -1).clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def forget_accelerate() -> None:
    """Its state is shared by all Accelerators of a process, precision included."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, so that sums add up in one order; no LPIPS weights of this machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(WEIGHTS_ENV, raising=False)
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget_accelerate()
    yield
    forget_accelerate()


def settings(photos: Path, output: Path, *more: str) -> list[str]:
    return [
        *(
            "model.preset=tiny",
            f"data.train={photos}",
            f"output={output}",
            "data.crop=32",
            "data.val_size=32",
        ),
        *("data.val_images=2", "data.workers=0", "loss.perceptual_weight=0", "optim.lr=3e-3"),
        *("optim.warmup_steps=2", f"train.max_steps={STEPS}", "train.batch_size=4", "train.tracker=none"),
        *("train.precision=fp32", "train.log_every=1", "train.validate_every=6", "train.save_every=6"),
        *more,
    ]


def configure(photos: Path, output: Path, *more: str) -> Config:
    return load_config(None, settings(photos, output, *more))


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def advance(config: Config, steps: int, resume: str | None = None) -> loop.Run:
    """A run after so many optimizer steps, without validation, saving and export."""
    forget_accelerate()
    run = set_up(config, resume)
    accelerator = run.accelerator
    incoming = iter(
        data_module.training_batches(
            config, run.sequence, run.state.step, accelerator.process_index, accelerator.num_processes
        )
    )
    for _ in range(steps):
        optimizer_step(run, loop.take(run, incoming))
    return run


def weights(run: loop.Run) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in run.state.vae.parameters()])


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in double precision, where equal computations agree however their sums are ordered."""
    use_float64(monkeypatch.setattr)


def use_float64(replace) -> None:
    replace(TrainConfig, "dtype", property(lambda config: torch.float64))


# --- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def straight(
    request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """The configuration of a run that went from the first step to the export without a stop."""
    forget_accelerate()
    output = tmp_path_factory.mktemp(request.param) / "run"
    config = configure(photos, output, f"train.precision={request.param}")
    assert train(config) == output / "vae"
    return config


def test_the_loss_falls_and_the_validation_improves(straight):
    figures = records(Path(straight.output))
    totals = [record["total"] for record in figures if "total" in record]
    assert len(totals) == STEPS
    assert sum(totals[-3:]) < 0.85 * sum(totals[:3])
    psnr = {record["step"]: record["val_psnr"] for record in figures if "val_psnr" in record}
    assert psnr[12] > psnr[6]


def test_metrics_hold_every_step_and_every_validation(straight):
    figures = records(Path(straight.output))
    assert [record["step"] for record in figures] == [*range(1, 7), 6, *range(7, 13), 12]
    steps = [record for record in figures if "total" in record]
    for record in steps:
        assert record["rec_loss"] > 0
        assert record["kl_loss"] > 0
        assert record["perceptual_loss"] == 0
        assert record["grad_norm"] > 0
        # the total is the weighted sum of the terms, per value of the image
        terms = record["rec_loss"] + straight.loss.kl_weight * record["kl_loss"]
        assert record["total"] == pytest.approx(terms / (3 * 32 * 32), rel=1e-3)
    assert steps[0]["lr"] == pytest.approx(3e-3 / 3)
    assert steps[2]["lr"] == pytest.approx(3e-3)
    assert steps[-1]["lr"] < 2e-4
    for line in (Path(straight.output) / "metrics.jsonl").read_text().splitlines():
        assert "val_psnr" in line or json.loads(line)["images_per_second"] > 0


def test_a_grid_of_originals_and_reconstructions_is_drawn(straight):
    folder = Path(straight.output) / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000006.png", "step-00000012.png"]
    with Image.open(folder / "step-00000012.png") as picture:
        assert picture.width > 2 * 128
        assert len(picture.getcolors(1 << 20)) > 100


def test_the_export_loads_in_stock_diffusers_with_the_averaged_weights(straight):
    from diffusers import AutoencoderKL

    output = Path(straight.output)
    vae = AutoencoderKL.from_pretrained(output / "vae")
    averaged = load_file(output / "checkpoints" / "step-00000012" / "ema.safetensors")
    loaded = vae.state_dict()
    assert loaded.keys() == averaged.keys()
    folded = {"quant_conv.bias", "post_quant_conv.bias"}  # the latent mean is in them
    assert all(torch.equal(loaded[key], averaged[key]) for key in loaded.keys() - folded)
    last = load_file(output / "checkpoints" / "step-00000012" / "model.safetensors")
    assert not torch.equal(last["decoder.conv_in.weight"], averaged["decoder.conv_in.weight"])


def test_the_export_says_of_half_precision_what_the_doctor_says(straight):
    vae = load(Path(straight.output) / "vae")
    assert vae.config["force_upcast"] is False
    assert diagnose(vae, synthetic_probes(3, 64)).wanted_force_upcast is False


def test_a_model_trained_from_scratch_has_latents_of_mean_zero_and_deviation_one(straight):
    vae = load(Path(straight.output) / "vae")
    assert vae.config["shift_factor"] == 0
    trained_on, _ = split_sources(straight.data)
    crops = validation_images(trained_on, straight.data, 3)
    statistics = compute_latent_statistics(vae, [image[None] for _, image in crops])
    assert vae.config["scaling_factor"] == pytest.approx(statistics.scaling_factor, rel=1e-4)
    assert np.abs(statistics.latents_mean).max() < 1e-4 * max(statistics.latents_std)


def test_the_resolved_configuration_is_saved_with_run_checkpoint_and_export(straight):
    output = Path(straight.output)
    assert load_config(output / "config.yaml") == straight
    saved = json.loads((output / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert Config.model_validate(saved["config"]) == straight
    sidecar = json.loads((output / "vae" / "latentvae.json").read_text())
    exported = Config.model_validate(sidecar["config"])
    assert exported.optim == straight.optim
    assert exported.data.train == Path(straight.data.train).name  # without the folders of this machine


def test_weights_are_float32_whatever_the_precision_of_autocast(straight):
    place = Path(straight.output) / "checkpoints" / "step-00000012"
    for name in ("model", "ema", "optimizer"):
        assert {tensor.dtype for tensor in load_file(place / f"{name}.safetensors").values()} == {
            torch.float32
        }


# --- resuming ----------------------------------------------------------------------------------------------


def resumable(config: Config, output: Path) -> Config:
    """A copy of a run as a kill after step 6 left it: some later figures are written, one of them half."""
    shutil.copytree(config.output, output)
    shutil.rmtree(output / "vae")
    shutil.rmtree(output / "checkpoints" / "step-00000012")
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:10]) + lines[10][: len(lines[10]) // 2])
    return config.model_copy(update={"output": str(output)})


def assert_same_checkpoint(one: Path, other: Path) -> None:
    for name in ("model", "ema", "optimizer"):
        left, right = (load_file(place / f"{name}.safetensors") for place in (one, other))
        assert left.keys() == right.keys()
        assert not [key for key in left if not torch.equal(left[key], right[key])], name


def test_twelve_steps_equal_six_and_a_resume_to_twelve_bitwise(straight, tmp_path):
    config = resumable(straight, tmp_path / "resumed")
    train(config, resume="latest")
    before, after = Path(straight.output), Path(config.output)
    assert_same_checkpoint(before / "checkpoints/step-00000012", after / "checkpoints/step-00000012")
    assert records(after) == records(before)
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (after / "vae" / name).read_bytes() == (before / "vae" / name).read_bytes()


@pytest.mark.parametrize("straight", ["fp32"], indirect=True)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_still_ends_the_same(straight, tmp_path, caplog):
    config = resumable(straight, tmp_path / "resumed")
    folder = tmp_path / "resumed" / "checkpoints"
    shutil.copytree(folder / "step-00000006", folder / "step-00000009")
    (folder / "step-00000009" / "ema.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        run = advance(config, STEPS - 6, resume="latest")
    assert "step-00000009" in caplog.text
    expected = load_file(Path(straight.output) / "checkpoints/step-00000012/model.safetensors")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in run.state.vae.state_dict().items())


@pytest.mark.parametrize("straight", ["fp32"], indirect=True)
def test_a_finished_run_can_be_lengthened_and_exported_again(straight, tmp_path):
    config = resumable(straight, tmp_path / "resumed")
    config.train = config.train.model_copy(update={"max_steps": 6})
    assert (train(config, resume="latest") / "config.json").is_file()  # nothing left to do but export
    assert [record["step"] for record in records(tmp_path / "resumed")] == [*range(1, 7), 6]
    config.train = config.train.model_copy(update={"max_steps": 7})
    forget_accelerate()
    train(config, resume="latest")
    assert [record["step"] for record in records(tmp_path / "resumed")] == [*range(1, 7), 6, 7, 7]


@pytest.mark.parametrize("straight", ["fp32"], indirect=True)
@pytest.mark.parametrize("step", [6, STEPS])
def test_a_validation_that_a_kill_prevented_is_made_up_for(straight, tmp_path, step):
    """It comes after saving, so a run that is ended in between goes on from a step not measured."""
    config = straight.model_copy(update={"output": str(tmp_path / "killed")})
    shutil.copytree(straight.output, config.output)
    if step < STEPS:
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step-{STEPS:08d}")
    place = tmp_path / "killed" / "metrics.jsonl"
    lines = [(json.loads(line), line) for line in place.read_text(encoding="utf-8").splitlines()]
    kept = [line for record, line in lines if record["step"] < step or "total" in record]
    place.write_text("\n".join(kept) + "\n", encoding="utf-8")
    train(config, resume="latest")
    assert records(tmp_path / "killed") == records(Path(straight.output))


def test_a_resume_uses_the_learning_rate_of_the_new_configuration(straight, tmp_path):
    """That is what the message after a gradient that is not finite says to do."""
    config = resumable(straight, tmp_path / "resumed")
    config.optim = config.optim.model_copy(update={"lr": 1e-9})
    before = load_file(tmp_path / "resumed/checkpoints/step-00000006/model.safetensors")
    run = advance(config, 1, resume="latest")
    after = run.state.vae.state_dict()
    moved = max(float((after[key] - before[key]).abs().max()) for key in before)
    assert moved < 1e-7
    assert run.state.optimizer.param_groups[0]["lr"] < 1e-9


def test_an_output_with_checkpoints_is_refused_unless_it_is_resumed(straight, tmp_path):
    before = records(Path(straight.output))
    with pytest.raises(ConfigError, match=r"holds a run's checkpoints.*--resume latest"):
        train(straight)
    other = shutil.copytree(
        Path(straight.output) / "checkpoints" / "step-00000006", tmp_path / "other" / "step-00000006"
    )
    with pytest.raises(ConfigError, match="holds a run's checkpoints"):  # a resume, but of another run
        train(straight, resume=str(other))
    assert records(Path(straight.output)) == before


def test_a_resume_of_nothing_is_refused(photos, tmp_path):
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        train(configure(photos, tmp_path / "run"), resume="latest")
    assert not (tmp_path / "run").exists()


def test_auto_starts_where_there_is_nothing_and_continues_where_there_is_something(photos, tmp_path):
    once = configure(photos, tmp_path / "run", "train.max_steps=2")
    train(once, resume="auto")
    before = records(tmp_path / "run")
    forget_accelerate()
    train(configure(photos, tmp_path / "run", "train.max_steps=3"), resume="auto")
    assert records(tmp_path / "run")[: len(before)] == before
    assert [line["step"] for line in records(tmp_path / "run") if "total" in line] == [1, 2, 3]


def test_slurms_signal_is_one_that_asks_to_stop_and_workers_leave_it_to_the_main_process():
    assert signal.SIGUSR1 in data_module.STOP_SIGNALS or os.name == "nt"


# --- signals -----------------------------------------------------------------------------------------------

STOPPED_AT_5 = """
import os, subprocess, sys, time
from latentvae.cli.main import main
from latentvae.training import record

step = record.Record.step
def step_and_signal(self, state, *rest):
    if state.step == 5:
        whom = os.getpid() if sys.argv[1] == "alone" else -os.getpgrp()
        subprocess.run(["kill", "-TERM", "--", str(whom)], check=True, start_new_session=True)
        time.sleep(0.5)
    return step(self, state, *rest)
record.Record.step = step_and_signal
main(sys.argv[2:])
"""


def child_environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("straight", ["fp32"], indirect=True)
@pytest.mark.parametrize(
    ("whom", "workers"), [pytest.param("alone", 0, marks=pytest.mark.slow), ("group", 2)]
)
def test_sigterm_saves_and_exits_with_4_and_the_resumed_run_ends_as_if_nothing_had_been(
    straight, photos, tmp_path, whom, workers
):
    """`timeout` and Slurm signal every process of the run, the ones that decode images included."""
    output = tmp_path / "run"
    config = configure(photos, output, f"data.workers={workers}")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED_AT_5, whom, "train", "--config", tmp_path / "run.yaml", "--json"],
        env=child_environment(),
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
        check=False,
    )
    assert stopped.returncode == 4, stopped.stderr
    saved = output / "checkpoints" / "step-00000005"
    assert json.loads(stopped.stdout) == {"checkpoint": str(saved), "interrupted": True}
    assert "--resume latest" in stopped.stderr
    assert checkpoint.damage(saved) is None
    assert not (output / "vae").exists()
    train(config, resume="latest")
    assert_same_checkpoint(
        Path(straight.output) / "checkpoints/step-00000012", output / "checkpoints/step-00000012"
    )
    assert records(output) == records(Path(straight.output))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", data_module.STOP_SIGNALS)
def test_the_first_signal_asks_to_stop_and_a_later_one_acts_as_usual(number, monkeypatch):
    usual, stop = [], threading.Event()
    before = signal.signal(number, lambda *_: usual.append(number))
    try:
        with stop_on_signal(stop):
            signal.raise_signal(number)
            assert stop.is_set()
            signal.raise_signal(number)  # the same, which the launcher forwards
            assert usual == []
            monkeypatch.setattr(loop, "SAME_SIGNAL", 0.0)
            time.sleep(0.01)
            signal.raise_signal(number)
            assert usual == [number]
        signal.raise_signal(number)
        assert usual == [number, number]
    finally:
        signal.signal(number, before)


def test_a_request_to_stop_saves_after_the_step_and_keeps_the_earlier_figures(photos, tmp_path, monkeypatch):
    config = configure(photos, tmp_path / "run")
    monkeypatch.setattr(loop, "stop_requested", lambda run, clock: run.state.step == 2)
    with pytest.raises(TrainingInterrupted, match="--resume latest") as stop:
        train(config)
    assert stop.value.checkpoint == tmp_path / "run/checkpoints/step-00000002"
    assert checkpoint.newest(tmp_path / "run/checkpoints") == stop.value.checkpoint
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_a_run_in_pieces_of_borrowed_time_ends_as_one_run_does_bit_for_bit(photos, tmp_path):
    """The time is over after each step: two stops, then the export."""
    length = ("train.max_steps=3", "optim.decay_steps=1")
    train(configure(photos, tmp_path / "whole", *length))
    pieces = configure(photos, tmp_path / "pieces", *length, "train.max_minutes=0.00001")
    for step, resume in ((1, None), (2, "latest")):
        forget_accelerate()
        with pytest.raises(
            TrainingInterrupted, match=r"train.max_minutes=1e-05 are over.*--resume latest"
        ) as stop:
            train(pieces, resume)
        assert stop.value.checkpoint.name == f"step-{step:08d}"
        assert json.loads((tmp_path / "pieces/status.json").read_text())["state"] == "interrupted"
    forget_accelerate()
    assert train(pieces, "latest").is_dir()
    last = "checkpoints/step-00000003"
    assert_same_checkpoint(tmp_path / "whole" / last, tmp_path / "pieces" / last)
    assert records(tmp_path / "whole") == records(tmp_path / "pieces")


def test_the_time_of_a_piece_is_counted_though_its_last_step_is_not_logged(photos, tmp_path):
    with pytest.raises(TrainingInterrupted):
        train(configure(photos, tmp_path / "run", "train.log_every=5", "train.max_minutes=0.00001"))
    (line,) = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["step"] == 1
    assert json.loads(line)["seconds"] > 0


def test_without_a_limit_the_clock_is_never_over(monkeypatch):
    clocks = [loop.Clock(None), loop.Clock(2)]
    now = loop.time.monotonic()
    monkeypatch.setattr(loop.time, "monotonic", lambda: now + 119)
    assert [clock.over for clock in clocks] == [False, False]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now + 121)
    assert [clock.over for clock in clocks] == [False, True]


class Elsewhere:
    """Batches of which the third never comes, as a worker of a DataLoader may be held up."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        incoming = iter(self.batches)
        yield next(incoming)
        yield next(incoming)
        while True:
            self.while_waiting()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_request_to_stop_is_heeded_while_images_are_waited_for(photos, tmp_path, monkeypatch, processes):
    run = set_up(configure(photos, tmp_path / "run"), None)
    monkeypatch.setattr(loop, "set_up", lambda *_: run)
    run.batches = Elsewhere(run.batches)
    take, taken = loop.take, []

    def take_and_ask(*arguments):
        taken.append(run.state.step)
        if run.state.step == 2:
            run.stop.set()
            # the other processes wait for this one's gradients: it cannot save without them
            monkeypatch.setattr(type(run.accelerator), "num_processes", processes)
        return take(*arguments)

    monkeypatch.setattr(loop, "take", take_and_ask)
    monkeypatch.setattr(loop, "STOP_WAIT", 0.05)
    if processes == 1:
        with pytest.raises(TrainingInterrupted, match="by a signal") as stop:
            train(run.config)
        assert stop.value.checkpoint == checkpoint.newest(run.checkpoints)
        assert stop.value.checkpoint.name == "step-00000002"
    else:
        with pytest.raises(LatentVAEError, match=r"waiting for images after step 2; nothing had been saved"):
            train(run.config)
    assert taken == [0, 1, 2]


def test_a_stop_at_the_last_step_is_no_stop(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "stop_requested", lambda run, clock: run.state.step == 2)
    assert train(configure(photos, tmp_path / "run", "train.max_steps=2")).is_dir()


# --- noise and averages ------------------------------------------------------------------------------------


def test_posterior_noise_depends_on_seed_and_position_alone():
    shape = (4, 3, 5)
    together = sample_noise(7, torch.tensor([3, 1_000_000_007, 5]), shape)
    torch.manual_seed(123)
    alone = [sample_noise(7, torch.tensor([position]), shape)[0] for position in (3, 1_000_000_007, 5)]
    assert torch.equal(together, torch.stack(alone))
    assert together.shape == (3, *shape)
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(sample_noise(8, torch.tensor([3]), shape)[0], together[0])
    assert not torch.equal(sample_noise(8, torch.tensor([2]), shape)[0], together[0])


def test_posterior_noise_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    sample_noise(0, torch.arange(4), (4, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_posterior_noise_is_standard_normal_and_independent():
    noise = sample_noise(0, torch.arange(400), (4, 8, 8)).double().flatten(1)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    neighbours = (noise[1:] * noise[:-1]).mean(1)  # each has deviation 1 / 16
    assert neighbours.abs().max() < 5 / 16
    assert abs(float(neighbours.mean())) < 5 / 16 / 20


def test_the_average_leaves_unchanged_weights_bitwise():
    model = torch.nn.Linear(50, 50)
    ema = EMA(model, 0.999)
    for step in range(1, 30):
        ema.update(model, step)
    assert torch.equal(ema.model.weight, model.weight)
    assert torch.equal(ema.model.bias, model.bias)


def test_the_averages_decay_warms_up_to_its_value():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9)
    torch.nn.init.ones_(model.weight)
    ema.update(model, 1)
    assert float(ema.model.weight.detach()) == pytest.approx(1 - 2 / 11)
    ema.model.weight.data.zero_()
    ema.update(model, 1000)
    assert float(ema.model.weight.detach()) == pytest.approx(1 - 0.9)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    assert model.training


def test_the_average_moves_once_per_optimizer_step(photos, tmp_path):
    config = configure(photos, tmp_path / "run", "train.accumulation=3", "train.batch_size=1")
    first = advance(config, 0)
    start = [p.detach().clone() for p in first.state.ema.model.parameters()]
    run = advance(config, 1)
    pairs = zip(start, run.state.vae.parameters(), run.state.ema.model.parameters(), strict=True)
    for begin, trained, average in pairs:
        assert torch.equal(average, begin.lerp(trained.detach(), 1 - 2 / 11))


# --- equal computations ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "change",
    [
        ["train.batch_size=4", "train.accumulation=2"],
        ["train.channels_last=false"],
        ["train.gradient_checkpointing=true"],
        ["data.in_memory=true"],
    ],
)
def test_how_a_step_is_computed_does_not_change_it(photos, tmp_path, change):
    whole = advance(configure(photos, tmp_path / "a", "train.batch_size=8"), 3)
    other = advance(configure(photos, tmp_path / "b", "train.batch_size=8", *change), 3)
    assert whole.state.step == other.state.step == 3
    start = advance(configure(photos, tmp_path / "c"), 0)
    moved = (weights(whole) - weights(start)).abs().max()
    assert moved > 1e-3
    assert (weights(whole) - weights(other)).abs().max() < 1e-8 * moved


def test_accumulation_equals_one_large_batch_in_float32(photos, tmp_path):
    """Only roughly: where the true gradient is zero, AdamW makes steps of rounding errors."""
    few = ["optim.name=adamw", "optim.lr=1e-5", "train.max_steps=3"]
    whole = advance(configure(photos, tmp_path / "a", "train.batch_size=8", *few), 3)
    split = advance(configure(photos, tmp_path / "b", "train.batch_size=4", "train.accumulation=2", *few), 3)
    assert (weights(whole) - weights(split)).abs().max() < 1e-5


def test_seeds_differ(photos, tmp_path):
    one = advance(configure(photos, tmp_path / "a"), 0)
    two = advance(configure(photos, tmp_path / "b", "seed=1"), 0)
    assert not torch.equal(weights(one), weights(two))


TWO_PROCESSES = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import torch
from safetensors.torch import save_file
import test_training_loop as tests
torch.set_num_threads(1)
if sys.argv[3] == "float64":
    tests.use_float64(setattr)
run = tests.advance(tests.load_config(None, sys.argv[4:]), 3)
assert run.accelerator.num_processes == 2
assert type(run.model).__name__ == "DistributedDataParallel"
save_file({"weights": tests.weights(run)}, Path(sys.argv[2]) / f"{run.accelerator.process_index}.safetensors")
run.accelerator.end_training()
"""


def run_two_processes(code: str, *arguments: object) -> tuple[list[int], str]:
    """Exit codes and standard error of two ranks, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=child_environment(**common, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=250)[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(errors)


def weights_of_two(folder: Path, precision: str, chosen: list[str]) -> list[torch.Tensor]:
    """The weights of both ranks after three steps."""
    codes, errors = run_two_processes(TWO_PROCESSES, Path(__file__).parent, folder, precision, *chosen)
    assert codes == [0, 0], errors
    return [load_file(folder / f"{rank}.safetensors")["weights"] for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_two_processes_equal_one_in_float64(photos, tmp_path):
    passes = "train.accumulation=2"
    alone = weights(advance(configure(photos, tmp_path / "alone", "train.batch_size=4", passes), 3))
    chosen = settings(photos, tmp_path / "both", "train.batch_size=2", passes)
    first, second = weights_of_two(tmp_path, "float64", chosen)
    assert torch.equal(first, second)
    assert (first - alone).abs().max() < 1e-9


@pytest.mark.slow
def test_two_processes_equal_one_in_float32_with_adamw(photos, tmp_path):
    few = ["optim.name=adamw", "optim.lr=1e-5", "train.max_steps=3"]
    alone = weights(advance(configure(photos, tmp_path / "alone", "train.batch_size=4", *few), 3))
    chosen = settings(photos, tmp_path / "both", "train.batch_size=2", *few)
    first, second = weights_of_two(tmp_path, "float32", chosen)
    assert torch.equal(first, second)
    assert (first - alone).abs().max() < 1e-5


TWO_TRAIN = """
import os, signal, sys
import torch
from latentvae.cli.main import main
from latentvae.training import loop
torch.set_num_threads(1)

if sys.argv[1] == "stop":
    step = loop.optimizer_step
    def step_and_signal(run, incoming):
        terms = step(run, incoming)
        if run.state.step == 3 and run.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms
    loop.optimizer_step = step_and_signal
main(["train", *sys.argv[2:]])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_two_processes_stop_together_when_one_is_told_to_and_resume_bitwise(photos, tmp_path):
    def launch(name: str, how: str, *more: str) -> list[int]:
        steps = ("train.max_steps=5", "train.batch_size=2", "train.save_every=2", "train.validate_every=2")
        config = configure(photos, tmp_path / name, *steps)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        codes, errors = run_two_processes(TWO_TRAIN, how, "--config", tmp_path / "run.yaml", *more)
        assert codes[0] in (0, 4), errors
        return codes

    assert launch("straight", "go") == [0, 0]
    assert launch("stopped", "stop") == [4, 4]
    assert (
        checkpoint.newest(tmp_path / "stopped/checkpoints") == tmp_path / "stopped/checkpoints/step-00000003"
    )
    assert launch("stopped", "go", "--resume", "latest") == [0, 0]
    places = [tmp_path / name / "checkpoints" / "step-00000005" for name in ("straight", "stopped")]
    assert_same_checkpoint(*places)
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    assert (tmp_path / "stopped" / "vae" / "config.json").is_file()


# --- fine-tuning -------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_parent_and_keeps_its_factors(photos, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    parent = build("tiny", scaling_factor=0.5, shift_factor=0.25, latent_channels=6)
    export(parent, tmp_path / "parent")
    gentle = [f"model.init={tmp_path / 'parent'}", "train.max_steps=2", "optim.lr=1e-9"]
    exported = train(configure(photos, tmp_path / "run", *gentle))
    child = AutoencoderKL.from_pretrained(exported)
    assert (child.config["scaling_factor"], child.config["shift_factor"]) == (0.5, 0.25)
    assert child.config["latents_mean"] is None
    image = load_image(find_images(photos)[0])[None]
    assert torch.allclose(encode(child, image)[0].mode(), encode(parent, image)[0].mode(), atol=1e-4)
    sidecar = json.loads((exported / "latentvae.json").read_text())
    assert sidecar["base_model"] == "parent"  # not where it lay on this machine
    assert sidecar["latent_statistics"] is None


def test_fine_tuning_with_a_crop_that_the_parent_would_cut_is_refused(photos, tmp_path):
    """The preset's ratio says nothing about the parent's."""
    deep = build("tiny", block_out_channels=(8, 8, 8, 8, 8, 8, 8))  # 64 pixels to one latent
    export(deep, tmp_path / "deep")
    with pytest.raises(ConfigError, match=r"data\.crop=32.*64"):
        train(configure(photos, tmp_path / "run", f"model.init={tmp_path / 'deep'}"))


# --- what stops a run before it starts, or in it -----------------------------------------------------------


def test_missing_lpips_weights_stop_training_before_anything_runs(photos, tmp_path):
    config = configure(photos, tmp_path / "run", "loss.perceptual_weight=1", "loss.perceptual_net=squeeze")
    with pytest.raises(MissingWeightsError) as error:
        train(config)
    message = str(error.value)
    assert WEIGHTS_ENV in message
    assert "torchvision.models.squeezenet1_1(weights='DEFAULT')" in message
    assert message.endswith("--set loss.perceptual_weight=0 trains without LPIPS.")
    assert not (tmp_path / "run").exists()


def write_squeeze(folder: Path) -> Path:
    """A file of random SqueezeNet features."""
    from torchvision import models

    folder.mkdir()
    features = models.squeezenet1_1(weights=None).features.state_dict()
    save_file(features, folder / "squeezenet1_1_random.safetensors")
    return folder / "squeezenet1_1_random.safetensors"


@pytest.mark.parametrize("by", ["file", "folder"])
def test_training_with_lpips_from_a_path_measures_with_the_net_that_is_there(photos, tmp_path, by):
    path = write_squeeze(tmp_path / "lpips")
    given = path if by == "file" else path.parent
    lpips = ["loss.perceptual_weight=0.5", "loss.perceptual_net=squeeze", f"loss.perceptual_weights={given}"]
    config = configure(photos, tmp_path / "run", "train.max_steps=2", *lpips)
    exported = train(config)
    figures = records(tmp_path / "run")
    first = figures[0]
    assert first["perceptual_loss"] > 0
    terms = first["rec_loss"] / (3 * 32 * 32) + 0.5 * first["perceptual_loss"]
    assert first["total"] == pytest.approx(terms, rel=1e-3)
    assert figures[-1]["val_lpips"] > 0
    sidecar = json.loads((exported / "latentvae.json").read_text())
    assert sidecar["metrics"]["protocol"]["lpips_net"] == "squeeze"


def test_crops_too_small_for_lpips_are_refused_before_anything_is_written(photos, tmp_path):
    path = write_squeeze(tmp_path / "lpips")
    lpips = ["loss.perceptual_weight=1", "loss.perceptual_net=squeeze", f"loss.perceptual_weights={path}"]
    with pytest.raises(ConfigError, match=r"data\.crop=16.*17"):
        train(configure(photos, tmp_path / "run", "data.crop=16", *lpips))
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(photos, tmp_path):
    config = configure(photos, tmp_path / "run", "loss.kl_weight=3e38", "train.max_bad_steps=1")
    before = weights(advance(config, 0))
    forget_accelerate()
    run = set_up(config, None)
    batches = iter(data_module.training_batches(config, run.sequence, 0, 0, 1))
    optimizer_step(run, loop.take(run, batches))
    with pytest.raises(LatentVAEError, match="not finite in 1 steps in a row"):
        loop.check_finite(run)
    assert torch.equal(weights(run), before)
    assert run.state.skipped_steps == 1


@pytest.mark.parametrize("resume", [None, "latest"])
def test_an_output_below_a_file_is_refused(photos, tmp_path, resume):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LatentVAEError, match="file"):
        train(configure(photos, tmp_path / "file" / "run"), resume=resume)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="wants a folder in which root can make none")
def test_an_output_that_only_the_disk_refuses_is_refused_by_name(photos):
    with pytest.raises(ConfigError, match="/proc/latentvae cannot be written to"):
        train(configure(photos, Path("/proc/latentvae")))


def test_an_export_that_could_not_be_written_is_refused_before_training(photos, tmp_path):
    (tmp_path / "run" / "vae").mkdir(parents=True)
    (tmp_path / "run" / "vae" / "thesis.txt").write_text("mine")
    with pytest.raises(LatentVAEError, match="vae"):
        train(configure(photos, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "vae" / "thesis.txt").read_text() == "mine"


def test_unusable_images_are_named_once_and_counted(photos, tmp_path, caplog):
    folder = shutil.copytree(photos, tmp_path / "mixed")
    (folder / "03.png").write_bytes(b"broken")
    config = configure(folder, tmp_path / "run", "train.max_steps=6", "train.validate_every=100")
    with caplog.at_level(logging.WARNING):
        advanced = advance(config, 6)  # three epochs
    assert advanced.state.skipped_images >= 2
    run = [record for record in caplog.records if "03.png" in record.getMessage()]
    assert len(run) == 1
    assert "passed over" in run[0].getMessage()


def test_a_tracker_gets_the_settings_and_one_id_over_resumes(tmp_path):
    started = []
    accelerator = SimpleNamespace(
        is_main_process=True,
        log_with=[SimpleNamespace(value="wandb")],
        init_trackers=lambda project, config, init_kwargs: started.append((config, init_kwargs)),
        get_tracker=lambda name: None,
    )
    settings = load_config("tiny", ["data.train=photos", "optim.betas=[0.5, 0.9]"]).model_dump(mode="json")
    for step in (0, 5):  # the second continues the first
        Record(tmp_path, accelerator, step, settings)
    (config, first), (_, second) = started
    assert config["optim.lr"] == settings["optim"]["lr"]
    assert config["data.train"] == "photos"
    assert config["optim.betas"] == "[0.5, 0.9]"
    assert first == second
    assert first["wandb"]["resume"] == "allow"
    Record(tmp_path / "another", accelerator, 0, settings)
    assert started[-1][1] != first


def test_the_tensorboard_tracker_gets_figures_and_pictures(photos, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configure(photos, tmp_path / "run", "train.max_steps=2", "train.tracker=tensorboard"))
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    tags = log.Tags()
    assert {"train/total", "train/lr", "val/psnr"} <= set(tags["scalars"])
    assert tags["images"]
    figures = records(tmp_path / "run")
    assert log.Scalars("train/total")[0].value == pytest.approx(figures[0]["total"])


def test_a_run_says_what_it_validates_and_ends_early_where_nothing_gets_better(
    photos, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setattr(progress, "NOTICED", {"psnr": 100.0, "lpips": 1.0})
    sets = ("train.validate_every=2", "train.save_every=100", "train.patience=1", "train.max_steps=50")
    with caplog.at_level(logging.INFO):
        exported = train(configure(photos, tmp_path / "run", *sets))
    assert exported.is_dir()
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 2", "step 4"]
    assert "held-out images" in lines[1]
    assert "lpips=" not in said  # the bar: LPIPS is off
    assert "better figure: 1 (train.patience). Ending at step 4." in said
    assert "to train on, 2 held out for validation" in caplog.text
    assert "Validation: " in caplog.text
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "step-00000004"
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"


def test_a_validation_that_fails_costs_no_step(photos, tmp_path, monkeypatch):
    def fail(run):
        raise OSError("disk full")

    monkeypatch.setattr(loop, "validate", fail)
    with pytest.raises(OSError, match="disk full"):
        train(configure(photos, tmp_path / "run", "train.validate_every=2", "train.save_every=2"))
    assert checkpoint.newest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-00000002"
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_a_stop_does_not_wait_for_a_validation(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate", lambda run: pytest.fail("validated"))
    monkeypatch.setattr(loop, "stop_requested", lambda run, clock: True)
    with pytest.raises(TrainingInterrupted):
        train(configure(photos, tmp_path / "run", "train.validate_every=1"))


@pytest.mark.parametrize("damage", [Path.unlink, lambda place: place.write_text("")])
def test_a_lost_status_hides_no_error(photos, tmp_path, monkeypatch, damage):
    def fail(run):
        damage(run.folder / "status.json")
        raise OSError("disk full")

    monkeypatch.setattr(loop, "validate", fail)
    with pytest.raises(OSError, match="disk full"):
        train(configure(photos, tmp_path / "run", "train.validate_every=1"))


def test_an_output_may_lie_beside_the_images(photos, tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(photos, tmp_path / folder)
    train(configure(f"{tmp_path}/{{a,b}}", tmp_path / "run", "train.max_steps=3"))
    forget_accelerate()
    with pytest.raises(ConfigError, match=r"lies in .*/b, the folder of data.train"):
        train(configure(f"{tmp_path}/{{a,b}}", tmp_path / "b" / "run", "train.max_steps=3"))


def test_weights_beside_other_programs_manifests_are_no_checkpoint(tmp_path):
    export(build("tiny"), tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text("{}")
    check_exported("init", str(tmp_path / "model"))


def test_a_checkpoint_is_no_model_to_start_from(photos, tmp_path):
    run = tmp_path / "run"
    train(configure(photos, run))
    forget_accelerate()
    newest = checkpoint.newest(run / "checkpoints")
    for name in (newest, newest / "ema.safetensors"):
        with pytest.raises(ConfigError, match=r"latentvae export .* -o FOLDER"):
            train(configure(photos, tmp_path / "other", f"model.init={name}"))
        forget_accelerate()


def test_a_resume_that_trains_other_parameters_is_refused(photos, tmp_path):
    run = configure(photos, tmp_path / "run")
    train(run)
    forget_accelerate()
    changed = run.model_copy(update={"model": run.model.model_copy(update={"freeze": ["encoder.conv_in.*"]})})
    with pytest.raises(ConfigError, match=r"encoder.conv_in.bias, for one\). Keep model.freeze"):
        train(changed, "latest")

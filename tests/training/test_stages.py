"""A run in stages: settings over settings, weights handed on, and stops that change no bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from training_runs import SETTINGS, assert_same, command, finish, launch, write_photos

from latentvae.base.errors import ConfigError
from latentvae.training import loop
from latentvae.training.adversary import WEIGHTS
from latentvae.training.checkpoint import listing
from latentvae.training.loop import Run, train
from latentvae.training.recipes import load_config
from latentvae.training.stages import stage_config

FIRST = "{name: low, steps: 4, overrides: {train: {save_every: 1}}}"
SECOND = (
    "{name: decoder, steps: 3, overrides: {model: {mode: decoder_only}, data: {crop: 48}, "
    "adversarial: {disc_start: 0}, train: {save_every: 1}}}"
)
THIRD = "{name: end, steps: 2, overrides: {regularise: {latent_noise: 0.1}, adversarial: {disc_start: 0}}}"
STAGES = f"stages=[{FIRST}, {SECOND}]"
ALL = f"stages=[{FIRST}, {SECOND}, {THIRD}]"
COMMON = ("train.batch_size=2", "train.precision=fp32", "adversarial.disc_start=1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def configure(photos: Path, output: Path, *more: str):
    return load_config("tiny", [f"data.train={photos}", f"output={output}", *SETTINGS, *COMMON, *more])


def test_a_stage_has_the_runs_settings_and_its_own_over_them(photos: Path, tmp_path: Path) -> None:
    config = configure(photos, tmp_path, ALL, "seed=7", "model.overrides={layers_per_block: 1}")
    low, decoder, end = (config.stage(number) for number in range(3))
    assert [each.train.max_steps for each in (low, decoder, end)] == [4, 3, 2]
    assert [each.data.crop for each in (low, decoder, end)] == [32, 48, 32]
    assert [each.seed for each in (low, decoder, end)] == [7, 8, 9], "other crops in each"
    assert low.model.init is None
    assert low.model.overrides == {"layers_per_block": 1}
    assert decoder.model.init == str(tmp_path / "stages" / "01-low" / "vae")
    assert decoder.model.overrides == {}
    assert not low.stages
    assert end.model.mode == "full", "a stage's settings are its own"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[{name: a, steps: 2}, {name: a, steps: 2}]", "a name of its own"),
        ("[{name: a b, steps: 2}]", "string should match"),
        (
            "[{name: a, steps: 2, overrides: {data: {cropp: 3}}}]",
            "unknown setting 'data.cropp'. Did you mean",
        ),
        (
            "[{name: a, steps: 2, overides: {}}]",
            r"unknown setting 'stages\.0\.overides'\. Did you mean 'overrides'",
        ),
        ("[{name: a, steps: 2, overrides: {train: 5}}]", "train: input should be a valid dictionary"),
        ("[{name: a, steps: 2}, {name: b, steps: 2, overrides: {model: x}}]", "model: input should be"),
        ("[{name: a, steps: 2}, {name: b, steps: 2, overrides: {distil: [1]}}]", "distil: input should be"),
        ("[{name: a, steps: 2, overrides: {data: {crop: 33}}}]", "stages, a: data.crop=33 is not a multiple"),
        ("[{name: a, steps: 2, overrides: {output: x}}]", "output is the run's"),
        ("[{name: a, steps: 2, overrides: {train: {max_steps: 3}}}]", "train.max_steps is the run's"),
        (
            "[{name: a, steps: 2}, {name: b, steps: 2, overrides: {model: {init: x}}}]",
            "model.init is the run",
        ),
        ("[{name: a, steps: 2, overrides: {train: {precision: bf16}}}]", "the same in all"),
        ("[{name: a, steps: 2, overrides: {model: {mode: decoder_only}}}]", "name it in model.init"),
    ],
)
def test_settings_of_stages_are_checked_before_anything_loads(
    photos: Path, tmp_path: Path, stages: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?i){said}"):
        configure(photos, tmp_path, f"stages={stages}")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So that sums add up in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages that nobody stopped."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert train(configure(photos, output, ALL)) == output / "vae"
    return output


@pytest.mark.slow
def test_stages_end_in_one_export_whose_card_names_all(straight: Path) -> None:
    AutoencoderKL.from_pretrained(straight / "vae")
    card = (straight / "vae" / "README.md").read_text()
    for words in ("low: 4 steps in", "decoder: 3 steps in", "end: 2 steps in"):
        assert words in card
    sidecar = json.loads((straight / "vae" / "latentvae.json").read_text())
    assert [stage["name"] for stage in json.loads(json.dumps(sidecar))["config"]["stages"]] == [
        "low",
        "decoder",
        "end",
    ]
    assert (straight / "discriminator" / WEIGHTS).is_file()
    assert json.loads((straight / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_figures_go_on_over_the_stages(straight: Path) -> None:
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "total" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [line["step"] for line in lines if "val_psnr" in line] == [4, 7, 9]
    assert [line["stage"] for line in lines if "val_psnr" in line] == ["low", "decoder", "end"]


@pytest.mark.slow
def test_the_decoders_stage_leaves_the_latents_of_the_stage_before(straight: Path) -> None:
    first, second = (
        AutoencoderKL.from_pretrained(straight / "stages" / name / "vae") for name in ("01-low", "02-decoder")
    )
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    moments = [vae.encode(images).latent_dist.parameters for vae in (first, second)]
    assert torch.equal(*moments)
    assert first.config["scaling_factor"] == second.config["scaling_factor"]
    assert not torch.equal(first.decoder.conv_in.weight, second.decoder.conv_in.weight)
    # the discriminator went on too
    config = load_config(straight / "stages" / "02-decoder" / "config.yaml")
    assert config.adversarial.init == str(straight / "stages" / "01-low" / "discriminator")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("01-low", 2), ("02-decoder", 0), ("02-decoder", 2)])
def test_a_run_that_was_stopped_in_a_stage_goes_on_to_the_same_bits(
    photos: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int
) -> None:
    real = loop.optimizer_step

    def stopping(run: Run, batches: list) -> dict:
        if run.folder.name == stage and run.state.step == step:
            raise RuntimeError("killed")
        return real(run, batches)

    output = tmp_path / "stopped"
    monkeypatch.setattr(loop, "optimizer_step", stopping)
    with pytest.raises(RuntimeError, match="killed"):
        train(configure(photos, output, ALL), "auto")
    assert json.loads((output / "status.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="Add --resume latest"):
        train(configure(photos, output, ALL))
    train(configure(photos, output, ALL), "latest")
    for name, last in (("01-low", 4), ("02-decoder", 3), ("03-end", 2)):
        assert_same(straight / "stages" / name, output / "stages" / name, last)
    assert "low: 4 steps in" in (output / "vae" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_walk_through_the_stages_together(photos: Path, tmp_path: Path) -> None:
    finish(launch(command(photos, tmp_path / "two", 2, *COMMON, STAGES)))
    assert (tmp_path / "two" / "vae" / "config.json").is_file()
    assert len(listing(tmp_path / "two" / "stages" / "02-decoder" / "checkpoints")) > 0


def test_stages_of_another_run_are_not_mixed(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "stages" / "01-other").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds the stages 01-other"):
        train(configure(photos, tmp_path / "run", STAGES), "auto")
    with pytest.raises(ConfigError, match="no stage has begun"):
        train(configure(photos, tmp_path / "empty", STAGES), "latest")


def test_a_stage_without_an_adversary_hands_none_on(photos: Path, tmp_path: Path) -> None:
    config = configure(photos, tmp_path, STAGES)
    assert stage_config(config, 1).adversarial.init is None
    place = tmp_path / "stages" / "01-low" / "discriminator"
    place.mkdir(parents=True)
    (place / WEIGHTS).touch()
    assert stage_config(config, 1).adversarial.init == str(place)

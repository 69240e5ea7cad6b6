"""Checkpoints: whole or not there, everything restored bitwise, the newest that verifies."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import latentvae
from latentvae.base.errors import ConfigError, ModelError
from latentvae.models.presets import build
from latentvae.training import checkpoint
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import OptimConfig
from latentvae.training.optim import EMA, build_optimizer

ALONE = SimpleNamespace(is_main_process=True, process_index=0, wait_for_everyone=lambda: None)
FILES = {
    *("model.safetensors", "ema.safetensors", "optimizer.safetensors"),
    *("state.json", "config.json", "manifest.json"),
}
SMALL = {"block_out_channels": (8, 8)}  # the smallest model with every kind of parameter


def new_state(
    seed: int, layout: torch.memory_format = torch.channels_last, name: str = "muon"
) -> TrainingState:
    torch.manual_seed(seed)
    vae = build("tiny", **SMALL).to(memory_format=layout)
    return TrainingState(vae, EMA(vae, 0.9), build_optimizer(vae, OptimConfig(name=name)))


def train_a_step(state: TrainingState) -> None:
    """An update with gradients that depend on the step and on torch's generator."""
    for parameter in state.vae.parameters():
        parameter.grad = torch.randn_like(parameter) * (state.step + 1)
    state.optimizer.step()
    state.step += 1
    state.ema.update(state.vae, state.step)


def trained(steps: int, **options: object) -> TrainingState:
    state = new_state(0, **options)
    for _ in range(steps):
        train_a_step(state)
    return state


def tensors(state: TrainingState) -> dict[str, torch.Tensor]:
    """Every tensor that a run continues from."""
    found = {f"vae.{k}": v for k, v in state.vae.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in state.ema.model.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{k}": v for k, v in slots.items()}
    return found


def assert_same(one: TrainingState, other: TrainingState) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing
    assert {n: t.dtype for n, t in left.items()} == {n: t.dtype for n, t in right.items()}
    assert (one.step, one.skipped_images) == (other.step, other.skipped_images)


def save(state: TrainingState, folder: Path, keep: int = 10) -> Path:
    return checkpoint.write_whole(state, folder, {"seed": 0}, keep, ALONE)


def save_steps(folder: Path, *steps: int, keep: int = 10) -> list[Path]:
    state = trained(1)
    made = []
    for step in steps:
        state.step = step
        made.append(save(state, folder, keep))
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# --- round trip --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_everything_comes_back_bitwise_and_the_next_steps_are_the_same(tmp_path, layout, name):
    state = trained(3, layout=layout, name=name)
    state.skipped_images = 17
    place = save(state, tmp_path)
    other = new_state(99, layout, name)
    checkpoint.restore(other, place)
    assert_same(state, other)
    rng = torch.get_rng_state()
    train_a_step(state)
    train_a_step(state)
    torch.set_rng_state(rng)  # both draw the same gradients
    train_a_step(other)
    train_a_step(other)
    assert_same(state, other)


def test_a_state_before_its_first_step_comes_back(tmp_path):
    state, other = new_state(0), new_state(1)
    checkpoint.restore(other, save(state, tmp_path))
    assert_same(state, other)


def test_the_memory_layout_is_the_runs_own_not_the_files(tmp_path):
    place = save(trained(1, layout=torch.contiguous_format), tmp_path)
    other = new_state(1, torch.channels_last)
    checkpoint.restore(other, place)
    kernels = [p for p in other.vae.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert_same(trained(1, layout=torch.contiguous_format), other)


def test_hyperparameters_are_the_new_configurations(tmp_path):
    place = save(trained(2), tmp_path)
    vae = new_state(1).vae
    optimizer = build_optimizer(vae, OptimConfig(lr=0.125, weight_decay=0.5, betas=(0.7, 0.8)))
    other = TrainingState(vae, EMA(vae, 0.9), optimizer)
    checkpoint.restore(other, place)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0}
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.7, 0.8)}
    assert_same(trained(2), other)


@pytest.mark.parametrize(("saved", "wanted"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_is_refused_by_name(tmp_path, saved, wanted):
    place = save(trained(1, name=saved), tmp_path)
    with pytest.raises(ConfigError, match=r"optim\.name"):
        checkpoint.restore(new_state(1, name=wanted), place)


def test_another_model_is_refused_naming_the_key(tmp_path):
    place = save(trained(1), tmp_path)
    vae = build("tiny", **SMALL, latent_channels=7)
    other = TrainingState(vae, EMA(vae, 0.9), build_optimizer(vae, OptimConfig()))
    with pytest.raises(ModelError, match=r"model\.safetensors.*(7|14).*Keep model\.preset"):
        checkpoint.restore(other, place)


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """Versions before the rate followed from the step also saved a scheduler and parameter groups."""
    place = save(trained(2), tmp_path)
    saved = json.loads((place / "state.json").read_text())
    saved |= {"scheduler": {"last_epoch": 2}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    (place / "state.json").write_text(json.dumps(saved))
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((place / "state.json").read_bytes()).hexdigest()
    (place / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.newest(tmp_path) == place
    other = new_state(1)
    checkpoint.restore(other, place)
    assert_same(trained(2), other)


# --- what is written ---------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_files_that_others_read(tmp_path):
    place = save(trained(2), tmp_path)
    assert place == tmp_path / "step-00000002"
    assert set(names(place)) == FILES
    manifest = json.loads((place / "manifest.json").read_text())
    assert set(manifest) == FILES - {"manifest.json"}
    saved = json.loads((place / "state.json").read_text())
    assert (saved["step"], saved["config"]) == (2, {"seed": 0})
    assert names(tmp_path) == ["step-00000002"]  # nothing temporary stays


@pytest.mark.parametrize("which", ["model", "ema"])
def test_the_folder_alone_is_a_model(tmp_path, which):
    state = trained(2)
    place = save(state, tmp_path)
    loaded = latentvae.load(place / f"{which}.safetensors")
    expected = (state.vae if which == "model" else state.ema.model).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert not torch.equal(state.vae.quant_conv.weight, state.ema.model.quant_conv.weight)


def test_only_the_main_process_writes_so_the_others_need_not_see_its_folder(tmp_path):
    other = SimpleNamespace(is_main_process=False, process_index=1, wait_for_everyone=lambda: None)
    checkpoint.write_whole(trained(1), tmp_path / "of-process-0", {}, 2, other)
    assert not (tmp_path / "of-process-0").exists()


def test_saving_a_step_again_replaces_it(tmp_path):
    state = trained(1)
    save(state, tmp_path)
    with torch.no_grad():
        state.vae.quant_conv.bias.fill_(7)
    place = save(state, tmp_path)
    assert names(tmp_path) == ["step-00000001"]
    assert load_file(place / "model.safetensors")["quant_conv.bias"].eq(7).all()
    assert checkpoint.damage(place) is None


@pytest.fixture(scope="module")
def saved_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_steps(folder, 1, 2)
    return folder


@pytest.fixture
def pair(saved_pair: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two whole checkpoints, the older first, to be damaged."""
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    return tmp_path / "step-00000001", tmp_path / "step-00000002"


# --- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_flipped_bit_anywhere_falls_back_to_the_one_before_and_says_so(pair, tmp_path, caplog, name, place):
    old, new = pair
    assert checkpoint.newest(tmp_path) == new
    size = (new / name).stat().st_size
    flip(new / name, int(place * size) if place != -1 else size - 1)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == old
    assert "step-00000002" in caplog.text
    if name != "manifest.json":
        assert name in caplog.text


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_or_cut_off_file_falls_back_to_the_one_before(pair, tmp_path, name):
    old, new = pair
    data = (new / name).read_bytes()
    (new / name).write_bytes(data[: len(data) // 2])
    assert checkpoint.newest(tmp_path) == old
    (new / name).write_bytes(b"")
    assert checkpoint.newest(tmp_path) == old
    (new / name).unlink()
    assert checkpoint.newest(tmp_path) == old


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"state.json": 5}'])
def test_a_manifest_that_is_json_but_no_manifest_counts_as_damage(pair, tmp_path, text):
    old, new = pair
    (new / "manifest.json").write_text(text)
    assert checkpoint.newest(tmp_path) == old


def test_without_a_whole_checkpoint_there_is_no_newest(pair, tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") is None
    for place in pair:
        (place / "ema.safetensors").unlink()
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("moment", ["_write_state", "_seal"])
def test_a_save_that_dies_half_way_leaves_the_one_before_as_newest(tmp_path, monkeypatch, moment):
    (old,) = save_steps(tmp_path, 1)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, die)
        with pytest.raises(KeyboardInterrupt):
            save_steps(tmp_path, 2)
    assert names(tmp_path) == [".step-00000002.partial", "step-00000001"]
    assert checkpoint.newest(tmp_path) == old
    assert checkpoint.listing(tmp_path) == [old]
    (new,) = save_steps(tmp_path, 2)  # what was left is in nobody's way
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.newest(tmp_path) == new


def test_leftovers_of_any_step_are_pruned_by_the_next_save(tmp_path):
    (tmp_path / ".step-00000007.partial").mkdir()
    (tmp_path / ".step-00000007.partial" / "model.safetensors").write_bytes(b"half")
    (new,) = save_steps(tmp_path, 8)
    assert names(tmp_path) == [new.name]


def test_nothing_is_deleted_before_the_new_checkpoint_has_its_name(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, keep=1)
    seen = []
    prune = checkpoint.prune
    monkeypatch.setattr(
        checkpoint, "prune", lambda folder, *rest: (seen.append(names(folder)), prune(folder, *rest))
    )
    save_steps(tmp_path, 2, keep=1)
    assert seen == [["step-00000001", "step-00000002"]]
    assert names(tmp_path) == ["step-00000002"]


# --- pruning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_order_is_by_number(tmp_path, keep):
    save_steps(tmp_path, 2, 10, 100, 1000, keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (2, 10, 100, 1000)[-keep:]]


@pytest.mark.parametrize("keep", [1, 2])
def test_after_going_back_to_an_older_checkpoint_the_new_ones_are_kept(tmp_path, keep):
    """A run resumed from step 2 of 2, 5, 8 saves step 3: that is the newest now, and not to be pruned."""
    save_steps(tmp_path, 2, 5, 8)
    (made,) = save_steps(tmp_path, 3, keep=keep)
    assert made.is_dir()
    assert checkpoint.newest(tmp_path) == made
    assert names(tmp_path) == ["step-00000002", "step-00000003"][-keep:]


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "step-notes.txt").write_text("mine")
    save_steps(tmp_path, 1, 2, keep=1)
    assert names(tmp_path) == ["best", "step-00000002", "step-notes.txt"]


# --- what --resume names -----------------------------------------------------------------------------------


def test_latest_and_a_path_are_resolved(tmp_path):
    old, new = save_steps(tmp_path, 1, 2)
    assert checkpoint.resolve("latest", tmp_path) == new
    assert checkpoint.resolve(str(old), tmp_path) == old


def test_auto_is_the_newest_or_a_new_run_but_never_prunes_what_is_damaged(tmp_path):
    (tmp_path / ".step-00000001.partial").mkdir()  # of a run that was killed while it first saved
    assert checkpoint.resolve("auto", tmp_path) is None
    old, new = save_steps(tmp_path, 1, 2)
    assert checkpoint.resolve("auto", tmp_path) == new
    flip(new / "ema.safetensors", 1000)
    assert checkpoint.resolve("auto", tmp_path) == old
    flip(old / "ema.safetensors", 1000)
    with pytest.raises(ConfigError, match="--resume auto: no complete checkpoint"):
        checkpoint.resolve("auto", tmp_path)


def test_what_cannot_be_resumed_is_refused_with_the_reason_and_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match=r"no complete checkpoint.*Start without --resume"):
        checkpoint.resolve("latest", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"nowhere.*has no manifest\.json.*--resume latest"):
        checkpoint.resolve(str(tmp_path / "nowhere"), tmp_path)
    (place,) = save_steps(tmp_path, 1)
    flip(place / "ema.safetensors", 1000)
    with pytest.raises(ConfigError, match=r"ema\.safetensors does not match its sha256"):
        checkpoint.resolve(str(place), tmp_path)
    with pytest.raises(ConfigError, match=r"no complete checkpoint.*Move those away to start anew"):
        checkpoint.resolve("latest", tmp_path)  # a start without --resume would be refused beside it

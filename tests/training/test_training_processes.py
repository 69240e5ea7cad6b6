"""What processes agree on, with a process group of one and what others would say made up."""

from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState

from latentvae.base.errors import LatentVAEError
from latentvae.models.presets import build
from latentvae.training import processes
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import OptimConfig
from latentvae.training.optim import EMA, build_optimizer


class TwoProcesses:
    """An Accelerator whose second process holds other weights."""

    num_processes = 2
    device = torch.device("cpu")
    drifted = True

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own, own + self.drifted])


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> TrainingState:
    PartialState()  # Accelerate's logger wants it
    vae = build("tiny", block_out_channels=(8, 8)).to(memory_format=torch.channels_last)
    state = TrainingState(vae, EMA(vae, 0.9), build_optimizer(vae, OptimConfig()), step=1)
    for parameter in vae.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    # the first process has everything one higher
    monkeypatch.setattr(processes, "broadcast", lambda tensor: tensor + 1)
    return state


def everything(state: TrainingState) -> list[torch.Tensor]:
    slots = [tensor for slot in state.optimizer.state.values() for tensor in slot.values()]
    tensors = [*state.vae.state_dict().values(), *state.ema.model.state_dict().values(), *slots]
    return [tensor.clone() for tensor in tensors]


def test_drift_on_equal_hardware_ends_the_run(state, monkeypatch):
    monkeypatch.setattr(processes, "gather_object", lambda own: own * 2)
    with pytest.raises(LatentVAEError, match=r"processes \[1\] hold other weights than process 0 at step 1"):
        processes.check_agreement(state, TwoProcesses())
    assert state.realigned == 0


def test_drift_on_different_hardware_gives_all_the_first_ones_state_and_is_counted(
    state, monkeypatch, caplog
):
    monkeypatch.setattr(processes, "gather_object", lambda own: [*own, "another card"])
    before = everything(state)
    processes.check_agreement(state, TwoProcesses())
    assert state.realigned == 1
    assert "another card" in caplog.text
    for old, new in zip(before, everything(state), strict=True):
        assert torch.equal(old + 1, new)
    assert state.vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_processes_that_agree_change_nothing(state, monkeypatch):
    monkeypatch.setattr(TwoProcesses, "drifted", False)
    before = everything(state)
    processes.check_agreement(state, TwoProcesses())
    assert all(map(torch.equal, before, everything(state)))


def test_a_checksum_sees_every_bit_of_every_network():
    networks = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    before = processes.checksum(networks)
    with torch.no_grad():
        networks[1].bias[1] = torch.nextafter(networks[1].bias[1], torch.tensor(9.0))
    assert processes.checksum(networks) != before


def test_only_the_first_process_looks_for_a_checkpoint_and_all_hear_what_it_found(tmp_path, monkeypatch):
    """Another process, whose machine sees neither the checkpoint nor the folder of it."""
    asked = []
    monkeypatch.setattr(processes, "find_start", lambda *arguments: asked.append(arguments))
    said = iter([[Path("runs/checkpoints/step-00000002"), None], [f".seen-{'0' * 32}"]])
    monkeypatch.setattr(processes, "broadcast_object_list", lambda found: next(said))
    heard = []
    monkeypatch.setattr(processes, "gather_object", lambda own: heard.append(own) or [True, *own])
    other = TwoProcesses()
    other.is_main_process, other.wait_for_everyone = False, lambda: None
    PartialState()
    config = processes.Config(output=str(tmp_path / "run"))
    with pytest.raises(processes.ConfigError, match=r"processes \[1\] do not have runs/checkpoints/step"):
        processes.agree_on_start(config, "auto", other)
    assert (asked, heard) == ([], [[False], [""]])
    assert not (tmp_path / "run").exists()

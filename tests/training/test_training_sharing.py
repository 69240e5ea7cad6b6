"""The module as processes share it."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from latentvae.models.presets import build
from latentvae.training.adversary import Adversary
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import Config
from latentvae.training.module import TrainableVAE
from latentvae.training.optim import EMA, build_optimizer
from latentvae.training.setup import settle_buckets


@pytest.fixture
def process_group(tmp_path: Path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def would_rebuild(module: DistributedDataParallel, *inputs: torch.Tensor) -> bool:
    """Whether the next backward pass would be the first, after which buckets are sorted anew."""
    outputs = module(*inputs)
    torch.stack([each.sum() for each in outputs if each is not None]).sum().backward()
    return bool(module.reducer._rebuild_buckets())


@pytest.mark.parametrize(("step", "played"), [(3, False), (4, False), (5, True)])
def test_settling_sorts_the_buckets_of_what_has_trained_and_leaves_no_gradient(process_group, step, played):
    config = Config.model_validate(
        {
            "data": {"train": "photos", "crop": 32},
            "adversarial": {"disc_weight": 0.5, "disc_start": 4, "width": 16, "layers": 2},
            "train": {"precision": "fp32", "batch_size": 3},
        }
    )
    vae = build("tiny")
    adversary = Adversary.build(config, 3, torch.device("cpu"))
    state = TrainingState(vae, EMA(vae, 0.9), build_optimizer(vae, config.optim), adversary, step=step)
    model = DistributedDataParallel(TrainableVAE(vae))
    adversary.model = DistributedDataParallel(adversary.discriminator)
    seen = []
    vae.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    settle_buckets(config, state, model, Accelerator(cpu=True))

    assert all(p.grad is None for module in (vae, adversary.discriminator) for p in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())
    # what a step sees, or compiled blocks would be compiled for these two passes alone
    assert [images.shape for images in seen] == [(3, 3, 32, 32)] * 2
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
    images, noise = torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4, 4)
    assert not would_rebuild(model, images, noise)
    assert would_rebuild(adversary.model, images) is not played
    assert would_rebuild(DistributedDataParallel(TrainableVAE(vae)), images, noise)  # had it not settled

"""What the tests share: a tiny model, a folder of pictures, and the same numbers on every run."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported

import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

pytest_plugins = ["demo_server"]  # fixtures of the tests in demo/
SIZES = [(97, 131), (113, 101), (151, 99), (128, 96), (96, 160), (119, 143)]  # width, height


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    """One thread and one seed, so that a failure comes back; tiny models are no faster with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if "accelerate" in sys.modules:  # its state, precision included, is shared by all of a process
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


@pytest.fixture
def tiny_vae() -> "AutoencoderKL":
    """An untrained f8c4 VAE of 0.25 M parameters, always the same one."""
    import latentvae

    torch.manual_seed(0)
    return latentvae.build("tiny").eval()


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three PNG and three JPEG pictures of gratings and shading, each of another size. Do not write here."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(textured(width, height, number)).save(
            folder / f"photo{number}.{'png' if number % 2 else 'jpg'}"
        )
    return folder


def textured(width: int, height: int, seed: int) -> np.ndarray:
    """uint8 (H, W, 3): a diagonal grating over shading, with a little noise, in colours of its own."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width, 0:1][:2]  # (H, W, 1) each
    wave = np.sin(random.uniform(0.1, 0.6, 3) * x + random.uniform(0.1, 0.6, 3) * y)
    shade = random.uniform(-1, 1, 3) * x / width + random.uniform(-1, 1, 3) * y / height
    noise = random.normal(0, 0.1, (height, width, 3))
    return np.clip(128 + 60 * (wave + shade + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data beside the repository: photographs and LPIPS weights."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}")
    return folder

"""Files of released versions are read by every later one: two small ones are kept here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import latentvae
from latentvae.base.errors import CodecError
from latentvae.codec import compression
from latentvae.codec.container import read_lvae
from latentvae.images.tensors import to_uint8
from latentvae.models.fingerprint import weight_hash
from latentvae.models.loading import load
from latentvae.models.shipped import bundled

FILES = Path(__file__).parent / "golden"


def fixed_model() -> AutoencoderKL:
    """`tiny` with weights from integer arithmetic: the same on every machine and with every torch."""
    vae, seed = latentvae.build("tiny").eval(), 1
    with torch.no_grad():
        for parameter in vae.parameters():
            numbers = (np.arange(parameter.numel(), dtype=np.int64) * 7919 + seed * 104729) % 2048
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            scale = 2.0 ** -round(np.log2(fan_in) / 2)  # a power of two, so that nothing is rounded
            values = torch.from_numpy(numbers.astype(np.float32) / 1024 - 1) * scale
            parameter.copy_(values.view_as(parameter) + (parameter.ndim == 1))
            seed += 1
    return vae


def test_a_file_of_version_1_is_read_and_gives_its_picture() -> None:
    vae = fixed_model()
    images = compression.decompress(vae, (FILES / "v1-tiny.lvae").read_bytes())
    with Image.open(FILES / "v1-tiny.png") as picture:
        wanted = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert images.shape == (1, 3, 37, 45)
    assert (to_uint8(images[0]).int() - wanted.int()).abs().max() <= 1


def test_a_file_of_a_released_model_is_read_or_says_which_release_has_it() -> None:
    """Kept for whoever replaces f8c4-small: its line in RELEASED has to stay."""
    header, payload = read_lvae(FILES / "v1-f8c4-small.lvae")
    name, release = compression.RELEASED[header.weights.hex()]
    assert name == "f8c4-small"
    vae = load("f8c4-small")
    if weight_hash(vae).startswith(header.weights.hex()):
        compression.check_model(vae, header)
        assert compression.decode_payload(vae, header, payload).shape == (1, 3, 37, 45)
    else:
        with pytest.raises(CodecError, match=f"the {name} of release {release}"):
            compression.check_model(vae, header)


def test_what_is_bundled_is_in_the_list_of_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name for name, _ in compression.RELEASED.values()}
    assert set(bundled()) <= names, "add the new model's hash to RELEASED (latentvae/codec/compression.py)"


def test_weights_that_were_replaced_are_named_with_their_release(monkeypatch: pytest.MonkeyPatch) -> None:
    header, _ = read_lvae(FILES / "v1-tiny.lvae")
    monkeypatch.setitem(compression.RELEASED, header.weights.hex(), ("old-small", "0.0.9"))
    with pytest.raises(CodecError, match=r"the old-small of release 0\.0\.9, since replaced"):
        compression.check_model(fixed_model_of_another_kind(), header)


def fixed_model_of_another_kind() -> AutoencoderKL:
    torch.manual_seed(3)
    return latentvae.build("tiny").eval()

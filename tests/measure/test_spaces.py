"""A student beside its teacher: figures by hand, pictures crossed, what is refused; spaces by name."""

import copy
import json
from typing import Any

import pytest
import torch

import latentvae
from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.measure.spaces import WAYS, compare_spaces
from latentvae.models.presets import SPACES, find_space
from latentvae.models.spaces import decode_scaled, encode_scaled, latent_shape, space_of, take_factors


@pytest.fixture
def images() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [(f"{side}.png", torch.rand(3, side, side + 9) * 2 - 1) for side in (32, 41)]  # padded, too


def test_a_model_agrees_with_itself(tiny_vae: Any, images: list[tuple[str, torch.Tensor]]) -> None:
    found = compare_spaces(tiny_vae, copy.deepcopy(tiny_vae), images)
    assert found.r2 == found.correlation == pytest.approx(1, abs=1e-9)
    assert found.offsets == pytest.approx((0, 0, 0, 0), abs=1e-9)
    assert found.image_count == 2
    assert set(found.pictures) == set(WAYS)
    assert len({summary.psnr for summary in found.pictures.values()}) == 1
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["pictures"]["student_teacher"]["psnr"] == pytest.approx(
        found.pictures["student_teacher"].psnr
    )
    assert "R2 of scaled latents 1.0000" in found.table()


def test_an_offset_shows_in_scaled_units_and_in_r2_but_not_in_the_correlation(
    tiny_vae: Any, images: list[tuple[str, torch.Tensor]]
) -> None:
    tiny_vae.register_to_config(scaling_factor=0.5)
    student = copy.deepcopy(tiny_vae)
    with torch.no_grad():
        student.quant_conv.bias[2] += 3.0
    found = compare_spaces(student, tiny_vae, images, ways=("teacher_student",))
    assert found.offsets == pytest.approx((0, 0, 1.5, 0), abs=1e-5)
    assert found.correlation == pytest.approx(1, abs=1e-6)
    scaled = torch.cat(
        [
            encode_scaled(tiny_vae, image[None, :, :32, :40]).movedim(1, -1).flatten(0, 2)
            for _, image in images
        ]
    )
    assert found.r2 == pytest.approx(1 - (1.5**2 / 4) / float(scaled.var(0).mean()), rel=0.3)
    assert set(found.pictures) == {"teacher_student"}


def test_other_shapes_and_no_images_are_refused(tiny_vae: Any) -> None:
    with pytest.raises(LatentVAEError, match="4 channels at 1/8 of the side, the teacher's 16 at 1/8"):
        compare_spaces(tiny_vae, latentvae.build("tiny", latent_channels=16), [])
    with pytest.raises(LatentVAEError, match="no images"):
        compare_spaces(tiny_vae, tiny_vae, [])


def test_scaled_latents_are_those_that_pipelines_see(tiny_vae: Any) -> None:
    take_factors(tiny_vae, find_space("flux"))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        scaled = encode_scaled(tiny_vae, images)
        mode = tiny_vae.encode(images).latent_dist.mode()
        assert torch.allclose(scaled, (mode - 0.1159) * 0.3611, atol=1e-6)
        assert torch.allclose(decode_scaled(tiny_vae, scaled), tiny_vae.decode(mode).sample, atol=1e-4)
        assert encode_scaled(tiny_vae.bfloat16(), images).dtype == torch.float32


def test_a_space_is_told_by_its_factors_and_channels(tiny_vae: Any) -> None:
    assert latent_shape(tiny_vae) == (4, 8)
    assert space_of(tiny_vae) is None
    for name in ("sd", "sdxl"):
        assert space_of(take_factors(tiny_vae, SPACES[name])) == SPACES[name]
    take_factors(tiny_vae, SPACES["sd3"])
    assert space_of(tiny_vae) is None  # of another number of channels
    with pytest.raises(ModelError, match=r"unknown latent space 'sdxxl'\. Did you mean 'sdxl'"):
        find_space("sdxxl")

"""Bundled models that speak the latent space of others: their factors, teachers, and pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CASES, FAMILIES

import latentvae
from latentvae.models.presets import SPACES
from latentvae.models.spaces import load_autoencoder, space_of
from latentvae.pipelines.agree import agree
from latentvae.pipelines.checks import LatentSpaceError
from latentvae.pipelines.preview import preview
from latentvae.pipelines.swap import swap

TEACHERS = {"sd": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux": "taef1"}
BUNDLED = [name for name in SPACES if f"{name}-small" in latentvae.bundled()]


@pytest.fixture(scope="module")
def teachers(shared: Path) -> Path:
    folder = shared / "teachers"
    if not folder.is_dir():
        pytest.skip(f"needs the teachers in {folder}")
    return folder


def test_all_spaces_have_a_model() -> None:
    assert set(SPACES) == set(BUNDLED)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_config_says_the_space(name: str) -> None:
    assert space_of(latentvae.load(f"{name}-small")) == SPACES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLED)
def test_a_student_speaks_its_teachers_space_and_no_other(name: str, teachers: Path) -> None:
    student = latentvae.load(f"{name}-small")
    found = agree(load_autoencoder(teachers / TEACHERS[name]), student)
    assert found.fits("both"), str(found)
    for other, space in SPACES.items():
        if other != name and space.latent_channels == SPACES[name].latent_channels:
            wrong = agree(load_autoencoder(teachers / TEACHERS[other]), student)
            assert not wrong.decodes, str(wrong)
            assert not wrong.encodes, str(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["StableDiffusion", "StableDiffusionImg2Img"])
def test_a_pipeline_of_the_space_takes_it_by_name_and_one_of_another_does_not(
    kind: str, teachers: Path
) -> None:
    case = CASES[kind]
    pipe = case.make()
    pipe.vae = old = load_autoencoder(teachers / "taesd")
    assert swap(pipe, "sd-small") is old
    assert torch.isfinite(case.run(pipe)).all()
    pipe.vae = load_autoencoder(teachers / "taesdxl")
    with pytest.raises(LatentSpaceError, match="trained on other latents"):
        swap(pipe, "sd-small")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in BUNDLED for kind in FAMILIES[name]])
def test_teacher_and_student_take_each_others_place(name: str, kind: str, teachers: Path) -> None:
    case, student = CASES[kind], latentvae.load(f"{name}-small")
    pipe = case.make(student)
    assert swap(pipe, str(teachers / TEACHERS[name])) is student
    assert torch.isfinite(case.run(pipe)).all()
    assert swap(pipe, f"{name}-small").config.scaling_factor == 1
    assert torch.equal(case.run(pipe), case.run(case.make(student)))


@pytest.mark.slow
def test_previews_take_the_small_sibling_where_it_draws_the_same(teachers: Path, tmp_path: Path) -> None:
    pipe: Any = CASES["StableDiffusion"].make()
    with preview(pipe, tmp_path) as each:  # a random VAE with SD's factors, which are also the defaults
        assert each.vae is pipe.vae
    pipe.vae = latentvae.load("sd-small")
    with preview(pipe, tmp_path) as each:
        assert each.vae is not pipe.vae
        assert each.vae.config.block_out_channels == [16, 96, 112, 128]

"""A student in its teacher's latent space: linear start, halves apart, targets, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from latentvae.base.errors import ConfigError, ModelError
from latentvae.images.sources import open_source
from latentvae.images.tensors import from_uint8
from latentvae.measure.spaces import compare_spaces
from latentvae.models.exporting import export
from latentvae.models.latents import Scaling
from latentvae.models.loading import load
from latentvae.models.presets import build, find_space
from latentvae.models.spaces import decode_scaled, encode_scaled, load_autoencoder, space_of
from latentvae.training import validation
from latentvae.training.config import DistilConfig
from latentvae.training.data.teacher_cache import MANIFEST, TeacherCache, provenance
from latentvae.training.distillation import Teacher, linear_start, original_share
from latentvae.training.loop import train
from latentvae.training.module import TrainableVAE, freeze
from latentvae.training.recipes import load_config
from latentvae.training.setup import set_up


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny as TAESD is one, of 4 channels at 1/8."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def init(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    return export(build("tiny"), tmp_path / "init")


def settings(photos: Path, output: Path, teacher: Path, init: Path | None, *more: str) -> list[str]:
    return [
        f"data.train={photos}",
        f"output={output}",
        "model.mode=distil",
        f"model.teacher={teacher}",
        *([f"model.init={init}"] if init else []),
        "data.val_images=2",
        "data.val_size=64",
        "data.crop=32",
        "data.workers=0",
        "train.max_steps=12",
        "train.batch_size=4",
        "train.validate_every=12",
        "train.save_every=12",
        "train.tracker=none",
        "train.precision=fp32",
        "train.log_every=4",
        "optim.warmup_steps=2",
        *more,
    ]


def run(*arguments: Any) -> tuple[Any, list[dict[str, Any]]]:
    config = load_config("tiny", settings(*arguments))
    vae = load(train(config))
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return vae, [json.loads(line) for line in lines]


def linear_relative(vae: Any, seed: int = 5) -> tuple[Any, Teacher]:
    """A teacher whose latents are those of `vae` through one matrix and an offset."""
    torch.manual_seed(seed)
    other = build("tiny")
    other.load_state_dict(vae.state_dict())
    matrix = torch.eye(4) + 0.3 * torch.randn(4, 4)
    with torch.no_grad():
        weight, bias = vae.quant_conv.weight[:4, :, 0, 0], vae.quant_conv.bias[:4]
        matrix = matrix.to(weight)
        other.to(weight.dtype)
        other.quant_conv.weight[:4] = (matrix @ weight)[..., None, None]
        other.quant_conv.bias[:4] = matrix @ bias + torch.tensor([1.0, -2.0, 0.5, 3.0]).to(weight)
    return other, Teacher(other, Scaling.of(other.config), -10.0)


def test_a_linear_relative_is_met_exactly_and_its_latents_decoded_as_the_own(tiny_vae: Any) -> None:
    vae = tiny_vae.double()
    other, teacher = linear_relative(vae)
    images = torch.rand(2, 3, 48, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mode()).sample
        assert linear_start(vae, teacher, [images]) == pytest.approx(1, abs=1e-9)
        theirs = other.encode(images).latent_dist.mode()
        assert (vae.encode(images).latent_dist.mode() - theirs).abs().max() < 1e-6
        assert (vae.decode(theirs).sample - before).abs().max() < 1e-6


def test_who_speaks_the_space_already_stays(tiny_vae: Any) -> None:
    state = {key: value.clone() for key, value in tiny_vae.state_dict().items()}
    teacher = Teacher(tiny_vae, Scaling.of(tiny_vae.config), -10.0)
    assert linear_start(tiny_vae, teacher, [torch.rand(1, 3, 32, 32)]) == 1
    assert all(torch.equal(value, state[key]) for key, value in tiny_vae.state_dict().items())


def test_a_model_without_quant_convolutions_takes_the_maps_in_those_beside_them(tiny_vae: Any) -> None:
    for convolution in (tiny_vae.quant_conv, tiny_vae.post_quant_conv):
        torch.nn.init.dirac_(convolution.weight), torch.nn.init.zeros_(convolution.bias)
    bare = build("tiny", use_quant_conv=False, use_post_quant_conv=False).double()
    bare.load_state_dict(tiny_vae.double().state_dict(), strict=False)
    _, teacher = linear_relative(tiny_vae)
    images = torch.rand(2, 3, 48, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        big = torch.rand(1, 3, 128, 128, dtype=torch.float64) * 2 - 1
        before = bare.decoder.conv_in(bare.encode(big).latent_dist.mode())
        assert linear_start(bare, teacher, [images]) == pytest.approx(1, abs=1e-9)
        assert (bare.encode(images).latent_dist.mode() - teacher.moments(images)[:, :4]).abs().max() < 1e-6
        after = bare.decoder.conv_in(teacher.moments(big)[:, :4])
        inside = (..., slice(1, -1), slice(1, -1))  # zeros pad the latents before the offset
        assert (after - before)[inside].abs().max() < 1e-6


@pytest.mark.slow
def test_latents_come_nearer_and_the_export_has_the_spaces_factors(
    photo_folder: Path, tmp_path: Path, tiny_teacher: Path, init: Path
) -> None:
    vae, records = run(
        photo_folder, tmp_path / "run", tiny_teacher, init, "model.space=sd", "train.max_steps=40"
    )
    assert space_of(vae) == find_space("sd")
    fits = [record["latent_r2"] for record in records if "latent_r2" in record]
    assert fits[-1] > fits[0]
    validated = [record for record in records if "val_r2" in record][-1]
    both = ("teacher_student", "student_teacher", "teacher_teacher")
    assert {"val_correlation", "val_psnr", *(f"val_{way}_psnr" for way in both)} <= set(validated)
    offsets = [validated[f"val_offset_{channel}"] for channel in range(4)]
    assert validated["val_offset"] == max(map(abs, offsets)) > 0
    images = [("noise", torch.rand(3, 40, 40) * 2 - 1)]
    assert compare_spaces(vae, load_autoencoder(tiny_teacher), images).image_count == 1


def test_the_teachers_own_pictures_are_measured_once(
    photo_folder: Path, tmp_path: Path, tiny_teacher: Path, init: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    compare = validation.compare_spaces
    monkeypatch.setattr(
        validation, "compare_spaces", lambda *given: asked.append(given[5]) or compare(*given)
    )
    more = ("model.space=sd", "train.validate_every=6")
    _, records = run(photo_folder, tmp_path / "run", tiny_teacher, init, *more)
    assert [way for ways in asked for way in ways].count("teacher_teacher") == 1
    alone = [record["val_teacher_teacher_psnr"] for record in records if "val_r2" in record]
    assert len(alone) == 2
    assert alone[0] == alone[1]


@pytest.mark.slow
def test_a_students_variance_becomes_the_stated_one_where_the_teacher_has_none(
    photo_folder: Path, tmp_path: Path, tiny_teacher: Path, init: Path
) -> None:
    logvar = -6.0
    steps = ("train.max_steps=40", "train.validate_every=40", "train.save_every=40", "optim.lr=1e-2")
    more = ("model.space=sd", f"distil.logvar={logvar}", "distil.learn=encoder", "train.ema_decay=0", *steps)
    vae, _ = run(photo_folder, tmp_path / "run", tiny_teacher, init, *more)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    before, after = (abs(mean_logvar(each, images) - logvar) for each in (load(init), vae))
    assert after < 0.5 * before


def mean_logvar(vae: Any, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float(vae.encode(images).latent_dist.logvar.mean())


def test_the_variance_of_a_teacher_that_has_one_is_what_is_learned(tiny_vae: Any) -> None:
    teacher = Teacher(tiny_vae, Scaling.of(tiny_vae.config), -10.0)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        wanted = tiny_vae.encode(images).latent_dist.logvar
    assert torch.equal(teacher.moments(images).chunk(2, 1)[1], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("from_hub", [False, True])
def test_an_autoencoder_kl_teaches_from_its_folder_or_under_its_hub_id(
    from_hub: bool, photo_folder: Path, tmp_path: Path, init: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(6)
    folder = tmp_path / "vae"
    teacher = build("tiny", scaling_factor=0.18215)
    teacher.register_to_config(shift_factor=None)  # as in the configs of SD's
    teacher.save_pretrained(folder)
    name = str(folder)
    if from_hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        repository, name = (
            tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse",
            "stabilityai/sd-vae-ft-mse",
        )
        shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    vae, records = run(photo_folder, tmp_path / "run", name, init)
    assert vae.config.scaling_factor == 0.18215
    fits = [record["latent_r2"] for record in records if "latent_r2" in record]
    assert fits[-1] > 0  # the linear start; the init's own latents are below
    assert [record for record in records if "val_r2" in record]


@pytest.mark.parametrize(("learn", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_the_other_half_stays_bit_for_bit(
    learn: str, other: str, photo_folder: Path, tmp_path: Path, tiny_teacher: Path, init: Path
) -> None:
    more = ("model.space=sd", f"distil.learn={learn}", "distil.linear_start=false")
    vae, records = run(photo_folder, tmp_path / "run", tiny_teacher, init, *more)
    before = load(init).state_dict()
    same = {key: torch.equal(value, before[key]) for key, value in vae.state_dict().items()}
    assert all(equal for key, equal in same.items() if key.startswith(other))
    assert not all(equal for key, equal in same.items() if key.startswith(learn))
    assert same["quant_conv.weight"] == (learn == "decoder")
    assert same["post_quant_conv.weight"] == (learn == "encoder")
    assert all(record["total"] > 0 for record in records if "total" in record)


def test_the_target_turns_from_the_teachers_picture_to_the_original() -> None:
    turning = DistilConfig(turn_step=100, turn_steps=50)
    assert [original_share(turning, step) for step in (0, 100, 125, 150, 900)] == [0, 0, 0.5, 1, 1]
    assert original_share(DistilConfig(), 10**6) == 0
    assert original_share(DistilConfig(target="original"), 0) == 1


def test_pictures_and_moments_of_a_tiny_teacher_are_in_the_spaces_units(tiny_teacher: Path) -> None:
    space, model = find_space("flux"), load_autoencoder(tiny_teacher)
    teacher = Teacher(model, Scaling(space.shift_factor, space.scaling_factor), -7.0)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, logvar = teacher.moments(images).chunk(2, 1)
    assert torch.equal(logvar, torch.full_like(logvar, -7.0))
    scaled = encode_scaled(model, images)
    assert torch.allclose((mean - space.shift_factor) * space.scaling_factor, scaled, atol=1e-6)
    assert torch.allclose(teacher.pictures(mean), decode_scaled(model, scaled).clamp(-1, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "does not say how its latent space is scaled: add model.space"),
        (("model.space=sd3",), "16 latent channels"),
        (("model.space=sd", "adversarial.disc_weight=0.5", "distil.learn=encoder"), "judges pictures"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    more: tuple[str, ...], message: str, photo_folder: Path, tmp_path: Path, tiny_teacher: Path, init: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(photo_folder, tmp_path / "run", tiny_teacher, init, *more)


def test_settings_of_a_distillation_need_one(photo_folder: Path, tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(ConfigError, match=r"name the model in model\.init"):
        run(photo_folder, tmp_path / "run", tiny_teacher, None, "model.space=sd", "distil.learn=decoder")
    with pytest.raises(ConfigError, match=r"model.space=sd is of a teacher"):
        load_config("tiny", ["model.space=sd"])


@pytest.mark.slow
def test_a_kept_teacher_is_cut_as_the_images_are_and_is_not_asked_again(
    photo_folder: Path, tmp_path: Path, tiny_teacher: Path, init: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    more = ("model.space=sd", f"distil.cache={cache}", "data.horizontal_flip=false")
    run(photo_folder, tmp_path / "run", tiny_teacher, init, *more)
    files = sorted(cache.glob("*.safetensors"))
    assert len(files) == 4  # two of six are held out

    config = load_config("tiny", settings(photo_folder, tmp_path / "again", tiny_teacher, init, *more))
    written = [file.stat().st_mtime_ns for file in files]
    prepared = set_up(config, None)
    assert [file.stat().st_mtime_ns for file in files] == written
    batch = next(iter(prepared.batches))
    teacher = prepared.model.teacher
    whole = [prepared.sequence.image(index) for index in range(4)]
    for crop, moments, picture in zip(batch.pixel_values, *batch.teacher, strict=True):
        places = [
            (image, top, left)
            for image in map(from_uint8, whole)
            for top in range(0, image.shape[1] - 31, 8)
            for left in range(0, image.shape[2] - 31, 8)
            if torch.equal(image[:, top : top + 32, left : left + 32], from_uint8(crop))
        ]
        ((image, top, left),) = places
        height, width = (side // 8 * 8 for side in image.shape[1:])
        of_all = teacher.moments(image[None, :, :height, :width])
        found = of_all[0, :, top // 8 : top // 8 + 4, left // 8 : left // 8 + 4]
        assert torch.allclose(moments, found, atol=1e-5)
        drawn = teacher.pictures(of_all.chunk(2, 1)[0])[0, :, top : top + 32, left : left + 32]
        assert (picture - drawn).abs().max() < 0.01  # kept in 8 bits


def test_a_cache_of_another_teacher_is_refused(
    photo_folder: Path, tmp_path: Path, tiny_teacher: Path, init: Path
) -> None:
    cache = TeacherCache(tmp_path / "cache", 8)
    made = {"teacher": "one", "space": "sd", "images": "a"}
    cache.claim(made, write=True)
    cache.claim(made, write=False)
    with pytest.raises(ConfigError, match="made with other teacher"):
        cache.claim({**made, "teacher": "another"}, write=False)
    with pytest.raises(ConfigError, match="made with other space, images"):
        cache.claim({**made, "space": "sdxl", "images": "b"}, write=False)
    (tmp_path / "cache" / MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        cache.claim(made, write=False)
    with pytest.raises(ConfigError, match="holds other files"):
        TeacherCache(photo_folder, 8).claim(made, write=True)
    with pytest.raises(ConfigError, match="mirror image"):
        load_config("tiny", settings(photo_folder, tmp_path, tiny_teacher, init, f"distil.cache={tmp_path}"))


def test_a_cache_knows_its_images_however_their_folder_is_written(
    photo_folder: Path, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    ways = [photos, "photos", "./photos/", "link", photos / ".." / "photos"]
    config = load_config("tiny", settings(photos, tmp_path, tiny_teacher, None, "model.space=sd"))
    made = [provenance(open_source(way), config, "teacher", 8) for way in ways]
    assert all(each == made[0] for each in made)
    first = sorted(photos.iterdir())[0]
    os.utime(first, (1, 1))
    assert provenance(open_source(photos), config, "teacher", 8) != made[0]


def test_a_damaged_file_of_the_cache_is_named(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, 8)
    cache.path(3).write_bytes(b"no tensors")
    for index in (3, 4):
        with pytest.raises(ConfigError, match=cache.path(index).name):
            cache.crop(index, 0, 0, 32)


def test_a_run_does_not_go_on_under_another_teacher(
    photo_folder: Path, tmp_path: Path, tiny_teacher: Path, init: Path
) -> None:
    chosen = settings(photo_folder, tmp_path / "run", tiny_teacher, init, "model.space=sd")
    train(load_config("tiny", chosen))
    with pytest.raises(ConfigError, match=r"model\.space=sd, and now it is sdxl"):
        train(load_config("tiny", [*chosen, "model.space=sdxl", "train.max_steps=14"]), "latest")


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_half_whose_quant_convolution_learns_is_run(tiny_vae: Any, half: str) -> None:
    freeze(tiny_vae, [f"{half}.*"])  # by hand, and not the convolution beside it
    teacher = Teacher(tiny_vae, Scaling.of(tiny_vae.config), -10.0)
    outputs = TrainableVAE(tiny_vae, teacher)(torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, 4))
    assert outputs.moments.requires_grad
    assert outputs.reconstructions.requires_grad


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("distil.learn=decoder",), "there is none"),
        (("model.mode=distil", "model.teacher=f8c4-small", "regularise.mask.probability=0.5"), "hidden too"),
        (
            ("model.mode=distil", "model.teacher=f8c4-small", "distil.target=original", "distil.turn_step=5"),
            "begins with",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", list(more))


def test_an_incomplete_tiny_autoencoder_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_teacher, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["something.else"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="no complete AutoencoderTiny"):
        load_autoencoder(folder)

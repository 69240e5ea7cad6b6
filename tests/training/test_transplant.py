"""A teacher's layers in a student's resnets: what comes out is what the teacher makes of it."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import nn

from latentvae.base.errors import ConfigError
from latentvae.models.latents import Scaling
from latentvae.models.loading import load
from latentvae.models.presets import build
from latentvae.training.config import DistilConfig, OptimConfig
from latentvae.training.distillation import Teacher
from latentvae.training.loop import train
from latentvae.training.optim import build_optimizer, set_learning_rate
from latentvae.training.recipes import load_config
from latentvae.training.transplant import is_transplanted, stays_fixed, transplant

# room for all of a teacher's 64 channels twice, and so exact but for SiLU near 0
ROOMY = {"block_out_channels": (8, 132, 132, 132)}


@torch.no_grad()
def teacher_of(channels):
    """Random weights under which every layer counts, and whose latents have unit variance."""
    torch.manual_seed(0)
    tiny = AutoencoderTiny(latent_channels=channels).eval().requires_grad_(False)
    for module in tiny.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    latents = tiny.encode(torch.rand(4, 3, 64, 64) * 2 - 1).latents
    tiny.encoder.layers[-1].weight /= latents.std()
    tiny.encoder.layers[-1].bias -= latents.mean() / latents.std()
    return Teacher(tiny, Scaling(0.25, 0.5), logvar=-7.0)


@pytest.fixture(scope="module", params=[4, 16])
def pair(request):
    teacher = teacher_of(request.param)
    tiny = teacher.model
    for i in (5, 9):  # the last blocks of two levels have no room in a student's encoder
        for parameter in tiny.encoder.layers[i].conv[4].parameters():
            parameter.zero_()
    vae = build(f"f8c{request.param}-deep", **ROOMY).eval()
    return vae, teacher, transplant(vae, teacher, torch.rand(4, 3, 64, 64) * 2 - 1)


def r2(got, wanted):
    return 1 - float((got - wanted).square().sum() / (wanted - wanted.mean((0, 2, 3), True)).square().sum())


@pytest.mark.slow
@torch.no_grad()
def test_the_decoder_is_the_teachers_up_to_its_last_level(pair):
    vae, teacher, _ = pair
    scaled = teacher.model.encode(torch.rand(3, 3, 48, 80) * 2 - 1).latents
    kept = []
    hook = vae.decoder.up_blocks[2].upsamplers[0].register_forward_hook(lambda *a: kept.append(a[2]))
    vae.decode(teacher.scaling.unscale(scaled))
    hook.remove()
    wanted = nn.Sequential(*teacher.model.decoder.layers[:-2])(3 * torch.tanh(scaled / 3))
    got = kept[0][:, :64]
    assert r2(got * (wanted.std() / got.std()), wanted) > 0.97
    assert kept[0][:, -2:].abs().max() < 1e-3 * 5100  # the anchors stay inside


@pytest.mark.slow
def test_the_encoder_is_the_teachers_once_its_first_level_is(pair):
    vae, _, r2_of_latents = pair
    assert r2_of_latents > 0.9  # borders of strided convolutions are not the teacher's
    moments = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist
    assert torch.all(moments.logvar == -7)


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_by_least_squares():
    teacher, images, found = teacher_of(4), torch.rand(2, 3, 64, 64) * 2 - 1, []
    for width in (80, 112):
        vae = build("f8c4-deep", block_out_channels=(8, width, width, width))
        found.append(transplant(vae, teacher, images))
    assert found[0] < found[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_num_groups": 8}, "norm_num_groups is 1"),
        ({"layers_per_block": 2}, "layers_per_block is 5 or more"),
        ({"block_out_channels": (16, 64, 112, 128)}, "at least 68"),
        ({"block_out_channels": (16, 96, 128)}, "four levels"),
    ],
)
def test_a_student_of_another_shape_is_refused(changes, named):
    teacher = Teacher(AutoencoderTiny(), Scaling(0.0, 1.0), logvar=-10.0)
    with pytest.raises(ConfigError, match=named):
        transplant(build("f8c4-deep", **changes), teacher, torch.zeros(1, 3, 64, 64))


def test_a_teacher_that_is_no_tiny_autoencoder_is_refused():
    teacher = Teacher(build("tiny"), Scaling(0.0, 1.0), logvar=-10.0)
    with pytest.raises(ConfigError, match="AutoencoderKL"):
        transplant(build("f8c4-deep"), teacher, torch.zeros(1, 3, 64, 64))


def test_transplanted_layers_wait_and_learn_at_their_own_rate():
    vae = build("f8c4-deep", **ROOMY)
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(not stays_fixed(name))
    config = OptimConfig(lr=1.0, warmup_steps=0, schedule="constant")
    optimizer = build_optimizer(
        vae, config, DistilConfig(transplant=True, transplanted_lr=0.25, hold_steps=3)
    )
    names = {id(parameter): name for name, parameter in vae.named_parameters()}
    for step, rate in ((2, 0.0), (3, 0.25)):
        set_learning_rate(optimizer, config, step, 10)
        for group in optimizer.param_groups:
            moved = {is_transplanted(names[id(parameter)]) for parameter in group["params"]}
            assert moved in ({True}, {False})
            assert group["lr"] == (rate if moved == {True} else 1.0)
    trained = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert not [name for name in trained if stays_fixed(name)]
    assert "decoder.conv_norm_out.weight" in trained


@pytest.mark.slow
def test_a_run_begins_as_its_teacher_and_goes_on_from_its_checkpoint(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((144, 128), Image.Resampling.BICUBIC).save(photos / f"{index}.png")
    teacher_of(4).model.save_pretrained(tmp_path / "teacher")
    settings = [
        f"data.train={photos}",
        f"model.teacher={tmp_path / 'teacher'}",
        "model.overrides={block_out_channels: [8, 80, 80, 80]}",
        "data.crop=32",
        "data.val_images=2",
        "data.val_size=64",
        "loss.perceptual_weight=0",
        "train.batch_size=2",
        "train.tracker=none",
        "train.precision=fp32",
        "distil.hold_steps=2",
    ]

    def run(output, steps, resume=None):
        more = [f"output={tmp_path / output}", f"train.max_steps={steps}", "optim.schedule=constant"]
        return load(train(load_config("sd-small", [*settings, *more]), resume=resume)).state_dict()

    held, straight = run("one", 2), run("two", 4)
    resumed = run("one", 4, resume="latest")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    changed = {name for name in held if not torch.equal(held[name], straight[name])}
    assert "decoder.mid_block.resnets.0.conv1.weight" in changed
    assert not {name for name in changed if stays_fixed(name)}
    with pytest.raises(ConfigError, match="none of 4 training images"):
        train(load_config("sd-small", [*settings, "data.short_side=64", f"output={tmp_path / 'no'}"]))

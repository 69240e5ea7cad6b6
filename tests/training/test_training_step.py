"""One optimizer step: what it moves, what it leaves alone, and what it does with NaN."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.exc import FailOnRecompileLimitHit

from latentvae.base.errors import ConfigError, LatentVAEError
from latentvae.images.reading import load_image
from latentvae.images.saving import save_image
from latentvae.images.tensors import from_uint8
from latentvae.models.exporting import export
from latentvae.models.latents import encode
from latentvae.models.loading import load
from latentvae.models.presets import build
from latentvae.training import checkpoint, machine
from latentvae.training.data.batches import CropBatch, training_batches
from latentvae.training.draws import draw_inputs
from latentvae.training.loop import Clock, advice_on_compiling, loop, save_checkpoint, train
from latentvae.training.losses import adaptive_weight, d_loss, g_loss, latent_cosine
from latentvae.training.machine import with_precision
from latentvae.training.recipes import load_config
from latentvae.training.setup import Run, set_up
from latentvae.training.step import latent_terms, optimizer_step

SETTINGS = [
    "data.val_images=2",
    "data.val_size=32",
    "data.crop=32",
    "data.workers=0",
    "loss.perceptual_weight=0",
    "optim.warmup_steps=0",
    "train.max_steps=4",
    "train.batch_size=2",
    "train.precision=fp32",
    "train.tracker=none",
]
GAN = [
    "adversarial.disc_weight=0.5",
    "adversarial.disc_ramp=0",
    "adversarial.width=16",
    "adversarial.layers=2",
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def start(photos: Path, *settings: str) -> tuple[Run, list[CropBatch]]:
    """A run that is set up, and the batches of its first step."""
    output = photos.parent / "run"
    config = load_config("tiny", [f"data.train={photos}", f"output={output}", *SETTINGS, *settings])
    run = set_up(config, None)
    batches = iter(training_batches(config, run.sequence, 0, 0, 1))
    return run, [next(batches) for _ in range(config.train.accumulation)]


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def test_hinge_losses_and_adaptive_weight_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert d_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2))
    assert g_loss(fake).item() == pytest.approx(1.5)
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.5])).item() == pytest.approx(5 / 0.5001)
    assert adaptive_weight(torch.ones(1) * 1e9, torch.zeros(1)).item() == 1e4


def test_nothing_of_the_discriminator_runs_before_disc_start(photos: Path) -> None:
    run, batches = start(photos, *GAN, "adversarial.disc_start=1")
    assert run.state.adversary is not None
    before = snapshot(run.state.adversary.discriminator)
    terms = optimizer_step(run, batches)
    assert "g_loss" not in terms
    assert not changed(before, run.state.adversary.discriminator)
    assert "g_loss" in optimizer_step(run, batches)
    assert changed(before, run.state.adversary.discriminator)


def test_both_optimizers_step_every_batch_and_leave_no_gradient(photos: Path) -> None:
    run, batches = start(photos, *GAN)
    assert run.state.adversary is not None
    vae, discriminator = snapshot(run.state.vae), snapshot(run.state.adversary.discriminator)
    optimizer_step(run, batches)
    assert len(changed(vae, run.state.vae)) > 0.9 * len(vae)
    assert len(changed(discriminator, run.state.adversary.discriminator)) > 0.9 * len(discriminator)
    for module in (run.state.vae, run.state.adversary.discriminator):
        assert all(parameter.grad is None for parameter in module.parameters())


def test_processes_meet_three_times_a_step_besides_the_gradients(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the KL per channel, for both gradients of the adaptive weight, for whether all is finite."""
    run, batches = start(photos, *GAN)
    batches[0].skipped.append("3.png: broken")
    sent = []
    reduce = run.accelerator.reduce
    monkeypatch.setattr(
        run.accelerator,
        "reduce",
        lambda tensor, *how, **more: sent.append(tensor) or reduce(tensor, *how, **more),
    )
    optimizer_step(run, batches)
    assert len(sent) == 3
    assert run.state.skipped_images == 1


def test_g_loss_reaches_the_vae_only_and_d_loss_the_discriminator_only(photos: Path) -> None:
    run, batches = start(photos, *GAN)
    adversary = run.state.adversary
    assert adversary is not None
    inputs = draw_inputs(run, batches[0])
    outputs = run.model(*inputs.arguments)
    adversary.generator_loss(outputs.reconstructions).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())
    assert run.state.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    run.state.vae.zero_grad()
    adversary.backward(run.accelerator, inputs.target, outputs.reconstructions, 1.0)
    assert all(parameter.grad is None for parameter in run.state.vae.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in adversary.discriminator.parameters())


def test_kl_reaches_the_encoder_only(photos: Path) -> None:
    run, batches = start(photos)
    inputs = draw_inputs(run, batches[0])
    rest, _ = latent_terms(run, run.model(*inputs.arguments), inputs.target[0].numel(), inputs.images)
    rest.backward()
    reached = {name.split(".")[0] for name, p in run.state.vae.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "quant_conv"}


def test_free_bits_spare_cheap_channels(photos: Path) -> None:
    run, batches = start(photos, "loss.free_bits=1000")
    inputs = draw_inputs(run, batches[0])
    rest, terms = latent_terms(run, run.model(*inputs.arguments), inputs.target[0].numel(), inputs.images)
    assert rest.item() == 0
    assert terms["kl_loss"].item() > 0


@pytest.mark.parametrize("settings", [(), tuple(GAN)], ids=["plain", "gan"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    photos: Path, settings: tuple[str, ...]
) -> None:
    run, batches = start(photos, *settings)
    before = snapshot(run.state.vae)
    batches[0].pixel_values = from_uint8(batches[0].pixel_values)
    good = batches[0].pixel_values.clone()
    batches[0].pixel_values[0, 0, 0, 0] = torch.nan
    optimizer_step(run, batches)
    assert not changed(before, run.state.vae)
    assert not changed(before, run.state.ema.model)
    assert (run.state.step, run.state.skipped_steps, run.state.bad_steps) == (1, 1, 1)
    batches[0].pixel_values.copy_(good)
    optimizer_step(run, batches)
    assert changed(before, run.state.vae)
    assert (run.state.step, run.state.skipped_steps, run.state.bad_steps) == (2, 1, 0)


def test_nan_in_a_row_stops_with_the_last_checkpoint_intact(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = start(photos, "train.max_steps=9", "train.save_every=2", "train.max_bad_steps=3")
    batches = training_batches(run.config, run.sequence, 0, 0, 1)

    def poisoned() -> list[CropBatch]:
        each = list(batches)
        for batch in each[2:]:
            batch.pixel_values = torch.full(batch.pixel_values.shape, torch.nan)
        return each

    with pytest.raises(LatentVAEError, match="3 steps in a row"):
        loop(run, poisoned(), Clock(None))  # type: ignore[arg-type]
    (saved,) = [p for p in run.checkpoints.iterdir() if p.name == "step-00000002"]
    assert all(tensor.isfinite().all() for tensor in load(saved / "ema.safetensors").state_dict().values())


def test_decoder_only_leaves_latents_bitwise_and_keeps_the_factors(photos: Path, tmp_path: Path) -> None:
    parent = build("tiny", scaling_factor=0.4321)
    export(parent, tmp_path / "parent")
    settings = [
        f"model.init={tmp_path / 'parent'}",
        "model.mode=decoder_only",
        f"output={tmp_path / 'child'}",
    ]
    exported = train(load_config("tiny", [f"data.train={photos}", *SETTINGS, *settings]))
    child = load(exported)
    images = torch.rand(1, 3, 40, 24) * 2 - 1
    with torch.no_grad():
        one, other = encode(parent.eval(), images)[0], encode(child, images)[0]
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.logvar, other.logvar)
    assert child.config["scaling_factor"] == 0.4321
    assert changed(snapshot(parent.decoder), child.decoder)


@pytest.mark.slow
def test_distillation_takes_the_teachers_factors_and_approaches_its_latents(
    photos: Path, tmp_path: Path
) -> None:
    teacher = build("tiny", block_out_channels=(8, 8, 16, 16), scaling_factor=0.5)
    export(teacher, tmp_path / "teacher")
    settings = [
        f"model.teacher={tmp_path / 'teacher'}",
        "model.mode=distil",
        "train.max_steps=60",
        f"output={tmp_path / 'student'}",
        "train.log_every=1",
    ]
    student = load(train(load_config("tiny", [f"data.train={photos}", *SETTINGS, *settings])))
    assert student.config["scaling_factor"] == 0.5
    records = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").open()]
    losses = [record["distil_loss"] for record in records if "distil_loss" in record]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_student_learns_the_bundled_models_latents_of_a_photograph(tmp_path: Path) -> None:
    photo = load_image(files("latentvae.models.assets") / "chelsea.png")
    for row, column in np.ndindex(2, 3):  # the last tile is held out
        tile = photo[:, 150 * row : 150 * (row + 1), 150 * column : 150 * (column + 1)]
        (tmp_path / "photos").mkdir(exist_ok=True)
        save_image(tile, tmp_path / "photos" / f"{row}{column}.png")
    held_out = tile[None, :, :144, :144]
    settings = [
        *(f"data.train={tmp_path / 'photos'}", f"output={tmp_path / 'run'}", *SETTINGS),
        *("model.mode=distil", "model.teacher=f8c4-small", "data.val_images=1", "data.crop=64"),
        *("model.overrides={block_out_channels: [16, 32, 64, 128]}", "optim.lr=2e-3"),
        *("train.max_steps=400", "train.batch_size=8", "train.ema_decay=0.98"),
    ]
    student, teacher = load(train(load_config("tiny", settings))), load("f8c4-small")
    with torch.no_grad():
        posteriors = [encode(vae, held_out)[0] for vae in (student, teacher)]
    assert latent_cosine(*posteriors) > 0.95


def test_a_teacher_of_another_latent_shape_is_refused_with_both_shapes(photos: Path, tmp_path: Path) -> None:
    export(build("tiny", latent_channels=8), tmp_path / "teacher")
    with pytest.raises(ConfigError, match=r"4 latent channels.* 8 at 8.*latent_channels=8"):
        start(photos, f"model.teacher={tmp_path / 'teacher'}", "model.mode=distil")


def test_a_frozen_encoder_and_the_discriminator_go_together(photos: Path, tmp_path: Path) -> None:
    export(build("tiny"), tmp_path / "parent")
    run, batches = start(photos, *GAN, f"model.init={tmp_path / 'parent'}", "model.mode=decoder_only")
    before = snapshot(run.state.vae)
    optimizer_step(run, batches)
    assert changed(before, run.state.vae)
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed(before, run.state.vae))


def test_what_does_not_go_together_is_refused_before_the_start(photos: Path) -> None:
    with pytest.raises(ConfigError, match="in_channels=1 and out_channels=3"):
        start(photos, "model.overrides={in_channels: 1}")


@pytest.mark.slow
def test_a_compiled_step_with_the_discriminator_is_the_same_step(photos: Path) -> None:
    results = []
    for compiled in ("false", "true"):
        run, batches = start(photos, *GAN, "train.precision=fp64", f"train.compile={compiled}")
        assert run.config.train.compile is (compiled == "true")
        terms = optimizer_step(run, batches)
        results.append((terms, snapshot(run.state.vae)))
        blocks = run.state.vae.decoder.up_blocks
        assert all((block._compiled_call_impl is not None) is (compiled == "true") for block in blocks)
    (terms, weights), (compiled_terms, compiled_weights) = results
    assert terms["adaptive_weight"] > 0
    for name, value in terms.items():
        assert torch.allclose(value, compiled_terms[name], rtol=1e-9), name
    assert weights.keys() == compiled_weights.keys()
    assert all(torch.allclose(weights[key], compiled_weights[key], atol=1e-9) for key in weights)


def test_every_block_of_five_levels_finds_room_in_the_compilers_memory(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    compiled = []
    monkeypatch.setattr(machine, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled.extend([block]))
    widths = "model.overrides={block_out_channels: [8, 8, 8, 8, 8], norm_num_groups: 4}"
    vae = start(photos, widths, "train.compile=true")[0].state.vae
    assert len(vae.encoder.down_blocks) == 5
    assert len(compiled) == 12
    # five of one kind, each for a first batch, for any batch, and without gradients
    assert torch._dynamo.config.recompile_limit >= 5 * 3
    assert torch._dynamo.config.fail_on_recompile_limit_hit


def test_a_block_that_is_not_compiled_ends_the_run_with_the_way_out() -> None:
    refused = pytest.raises(LatentVAEError, match=r"a block was not compiled.*train\.compile=false")
    with refused, advice_on_compiling():
        raise FailOnRecompileLimitHit("recompile_limit reached")


def test_compiling_where_nothing_can_compile_is_refused_with_the_reason(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(function: object) -> object:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler found.*train\.compile=false"):
        start(photos, "train.compile=true")


def test_automatic_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny", ["data.train=photos"])
    assert config.train.precision == "auto"
    for fast, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("latentvae.training.machine.has_fast_bfloat16", lambda device, fast=fast: fast)
        assert with_precision(config).train.precision == wanted
    exact = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp64"})})
    assert with_precision(exact).train.precision == "fp64"


def test_a_discriminators_state_comes_back_from_a_checkpoint(photos: Path) -> None:
    run, batches = start(photos, *GAN)
    optimizer_step(run, batches)
    saved = save_checkpoint(run)
    assert run.state.adversary is not None
    before = snapshot(run.state.adversary.discriminator)
    slots = run.state.adversary.optimizer.state_dict()["state"]
    optimizer_step(run, batches)
    checkpoint.restore(run.state, saved)
    assert not changed(before, run.state.adversary.discriminator)
    restored = run.state.adversary.optimizer.state_dict()["state"]
    assert slots.keys() == restored.keys()
    assert all(torch.equal(restored[i]["step"], torch.tensor(1.0)) for i in restored)


def test_frozen_patterns_stay_and_wrong_ones_are_named(photos: Path) -> None:
    run, batches = start(photos, "model.freeze=['decoder.*']")
    before = snapshot(run.state.vae)
    optimizer_step(run, batches)
    moved = changed(before, run.state.vae)
    assert moved
    assert not any(name.startswith("decoder.") for name in moved)
    with pytest.raises(ConfigError, match="no parameter matches 'decodr"):
        start(photos, "model.freeze=['decodr.*']", f"output={photos.parent / 'other'}")


def test_masked_input_is_judged_on_all_pixels(photos: Path) -> None:
    run, batches = start(photos, "regularise.mask.probability=1")
    inputs = draw_inputs(run, batches[0])
    seen, target = inputs.arguments[0], inputs.target
    assert (seen == 0).float().mean() > 0.01
    assert torch.equal(target, from_uint8(batches[0].pixel_values))
    visible = seen != 0
    assert torch.equal(seen[visible], target[visible])

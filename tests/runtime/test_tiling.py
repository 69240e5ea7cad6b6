"""Exact tiling: what the model gives without tiles, in memory set by the tile and a store."""

import copy
import logging
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from latentvae.base.errors import ImageError, LatentVAEError, ModelError
from latentvae.models.presets import block_types
from latentvae.runtime.optimize import optimize
from latentvae.runtime.patches import patch, patched, restore
from latentvae.runtime.tiling import layers, maps, stages
from latentvae.runtime.tiling.planning import plan
from latentvae.runtime.tiling.switch import enable_exact_tiling

TILE = 16
# a read reaches 2 px beyond a tile on each side, and a downsampler's one line further and one of its zeros
LARGEST = TILE + 6

# widths, layers per block, attention, quant convs, image height, image width
STRUCTURES = [
    ((8,), 2, True, True, 21, 35),
    ((8, 4), 1, True, False, 40, 23),
    ((4, 12), 3, False, True, 41, 37),
    ((8, 8, 16), 1, True, True, 64, 30),
    ((12, 4, 8), 2, False, False, 39, 71),
    ((4, 8, 12, 8), 2, True, False, 83, 50),
    ((8, 8, 8, 8), 1, False, True, 33, 90),
    ((4, 4, 8, 8, 8), 1, True, True, 95, 49),
    ((8, 4, 4, 4, 4), 2, False, False, 17, 81),
    ((16, 4, 4), 1, False, False, 60, 144),
]


def make(
    widths: tuple[int, ...] = (8, 8, 16),
    layers: int = 1,
    attention: bool = True,
    quant: bool = True,
    dtype: torch.dtype = torch.float64,
) -> AutoencoderKL:
    """A small VAE with random weights, also in the norms, whose own are ones and zeros."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=4,
        mid_block_add_attention=attention,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **block_types(widths),
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vae.to(dtype).eval().requires_grad_(False)


def inputs(vae: AutoencoderKL, height: int = 40, width: int = 52, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Images, and latents of about their size."""
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    images = torch.rand(batch, 3, height, width, dtype=vae.dtype) * 2 - 1
    return images, torch.randn(batch, 4, -(-height // factor), -(-width // factor), dtype=vae.dtype)


def both(vae: AutoencoderKL, images: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Moments and images."""
    return vae.encode(images).latent_dist.parameters, vae.decode(latents).sample


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest, relative to the range of `other`."""
    assert one.shape == other.shape
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / (other.max() - other.min()))


class Watch:
    """Notes the inputs of every 3x3 convolution of a VAE, without a hook: those would see tiles."""

    all: ClassVar[list["Watch"]] = []

    def __init__(self, vae: AutoencoderKL) -> None:
        self.shapes: dict[str, list[torch.Size]] = {}
        self.modules = dict(vae.named_modules())
        self.all.append(self)

    def note(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        for name, module in self.modules.items():
            if isinstance(module, nn.Conv2d) and module.weight is weight:
                self.shapes.setdefault(name, []).append(x.shape)

    def calls(self, name: str) -> int:
        return len(self.shapes.get(name, []))

    @property
    def largest(self) -> int:
        return max(side for shapes in self.shapes.values() for shape in shapes for side in shape[2:])


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `Watch` see every convolution, whatever calls it."""
    conv2d = nn.functional.conv2d

    def noted(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if weight.shape[2:] == (3, 3):
            for watch in Watch.all:
                watch.note(x, weight)
        return conv2d(x, weight, *rest, **options)

    monkeypatch.setattr(nn.functional, "conv2d", noted)
    monkeypatch.setattr(Watch, "all", [])


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_tiled_equals_stock_in_tiles(structure: Any) -> None:
    *shape, height, width = structure
    vae = make(*shape)
    images, latents = inputs(vae, height, width)
    expected = both(vae, images, latents)
    watch = Watch(vae)
    enable_exact_tiling(vae, TILE)
    for result, wanted in zip(both(vae, images, latents), expected, strict=True):
        assert difference(result, wanted) < 1e-9
    course = plan(vae, height, width)
    assert watch.largest <= LARGEST
    assert watch.calls("decoder.conv_out") == 2 * course.decode.stages[-1].tiles > 2  # a batch of 2
    assert watch.calls("encoder.conv_in") > 4


@pytest.mark.parametrize("structure", STRUCTURES[1:6], ids=str)
def test_storing_and_computing_again_give_the_same(structure: Any) -> None:
    *shape, height, width = structure
    vae = make(*shape)
    images, latents = inputs(vae, height, width, batch=1)
    expected = both(vae, images, latents)
    watch = Watch(vae)
    courses = []
    for memory in (0.0, math.inf):
        enable_exact_tiling(vae, TILE, memory=memory)
        for result, wanted in zip(both(vae, images, latents), expected, strict=True):
            assert difference(result, wanted) < 1e-9
        courses.append((plan(vae, height, width), watch.calls("encoder.conv_in")))
        watch.shapes.clear()
    (least, calls), (most, fewest) = courses
    assert calls > fewest == next(stage.tiles for stage in most.encode.stages if stage.name == "conv_in")
    for again, stored in ((least.encode, most.encode), (least.decode, most.decode)):
        assert any(stage.name.startswith("statistics") for stage in again.stages)
        assert not any(stage.name.startswith("statistics") for stage in stored.stages)
        assert again.peak_bytes < stored.peak_bytes
        assert again.tflop > stored.tflop


def test_the_memory_given_is_kept_to_with_as_little_computed_again_as_it_allows() -> None:
    vae = make((16, 32, 32), 2)
    least, most = (plan(vae, 96, 96, tile_size=TILE, memory=memory).decode for memory in (0, math.inf))
    middle = (least.peak_bytes + most.peak_bytes) / 2
    between = plan(vae, 96, 96, tile_size=TILE, memory=middle).decode
    assert between.peak_bytes <= middle
    assert most.tflop < between.tflop < least.tflop


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back by rows on Linux alone")
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("memory", [0.0, math.inf])
def test_rows_that_were_given_back_are_not_read_again(
    structure: Any, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    *shape, height, width = structure
    vae = make(*shape)
    images, latents = inputs(vae, height, width, batch=1)
    expected = both(vae, images, latents)
    given_back = []

    def spoil(stored: layers.Stored, rows: int) -> None:  # the system gives back whole pages only
        if stored.pages is not None:
            stored.whole()[:, :, :rows] = math.nan
            given_back.append(rows)

    monkeypatch.setattr(layers.Stored, "give_back", spoil)
    enable_exact_tiling(vae, TILE, memory=memory)
    for result, wanted in zip(both(vae, images, latents), expected, strict=True):
        assert difference(result, wanted) < 1e-9
    assert height < 2 * TILE or max(given_back) >= TILE / 2


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back by rows on Linux alone")
def test_memory_is_given_back_up_to_a_page() -> None:
    tensor, pages = maps.Scratch(torch.device("cpu"), torch.float32).empty(8, 500, 40)  # rows of 1280 bytes
    stored = layers.Stored("a map", (8, 500, 40), tensor.fill_(1), None, pages)
    stored.give_back(401)
    rows = tensor.amax((0, 1, 3))
    pages_of_rows = 401 * 1280 // mmap.PAGESIZE * mmap.PAGESIZE
    assert not rows[: pages_of_rows // 1280].any()  # pages that come anew hold zeros
    assert rows[401:].all()
    *_, folder = maps.Scratch(Path(tempfile.gettempdir()), torch.float32).empty(8, 500, 40)
    assert folder is None


def test_a_map_takes_its_sources_room_as_it_is_written() -> None:
    vae = make((32, 64), 1, attention=False)
    memory, folder = (
        plan(vae, 256, 256, tile_size=TILE, scratch=place, memory=0)
        for place in (torch.device("cpu"), Path())
    )
    last = 32 * 256 * 256 * 8  # of its float64 values
    assert folder.decode.store_bytes == 1.5 * last  # beside it the 64 channels of half the sides
    rows = (TILE + 4) / 256 if sys.platform == "linux" else 0.5
    assert last < memory.decode.store_bytes <= (1 + rows) * last
    assert memory.encode.peak_bytes <= folder.encode.peak_bytes


def test_statistics_of_values_far_from_zero_survive_float32() -> None:
    values = torch.randn(1, 8, 64, 64, dtype=torch.float64) * torch.logspace(-2, 1, 8)[:, None, None] + 1000
    moments = maps.Statistics()
    for row in maps.rows_of_boxes(Size(64, 64), 17):
        for box in row:
            moments.add(box.of(values.float()))
    exact = values.float().double().view(4, -1)
    mean, variance = moments.of_groups(4)
    torch.testing.assert_close(mean[::2], exact.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance[::2], exact.var(1, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_of_half_values_rounds_once(dtype: torch.dtype) -> None:
    values = (torch.randn(1, 8, 16, 16) * 3 + 2).to(dtype)
    norm = nn.GroupNorm(4, 8, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    moments = maps.Statistics()
    moments.add(values)
    exact = nn.functional.silu(norm(values.double())).to(dtype)
    same = layers.Norm(norm, nn.SiLU(), moments)(values) == exact
    assert same.float().mean() > 0.98


class Size:
    """Of a map."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width


def test_a_mapped_store_gives_the_same_bits_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = make()
    arguments = inputs(vae)
    expected = both(enable_exact_tiling(vae, TILE), *arguments)
    sizes = []
    monkeypatch.setattr(maps, "_map_file", lambda *a, real=maps._map_file: (sizes.append(a[1]), real(*a))[1])
    read = layers.Conv.read

    def looking(self: layers.Conv, box: maps.Box) -> torch.Tensor:
        sizes.append(sum(1 for _ in tmp_path.iterdir()))
        return read(self, box)

    monkeypatch.setattr(layers.Conv, "read", looking)
    for place in ("cpu", tmp_path):
        enable_exact_tiling(vae, TILE, scratch=place)
        for result, wanted in zip(both(vae, *arguments), expected, strict=True):
            assert torch.equal(result, wanted)
    assert sum(size > 0 for size in sizes) > 10  # so many maps were in files
    assert 0 in sizes  # looked while they were in use: no name in the folder
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_leaves_no_file(tmp_path: Path) -> None:
    program = f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        from test_tiling import *
        vae = make()
        enable_exact_tiling(vae, TILE, scratch={str(tmp_path)!r})
        made = []
        real = maps._map_file
        maps._map_file = lambda *a: (made.append(a), real(*a))[1]
        read = layers.Conv.read
        def die(self, box):
            if self.name == "conv_out":
                print(len(made), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, box)
        layers.Conv.read = die
        vae.decode(inputs(vae)[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert int(result.stdout) > 3
    assert not list(tmp_path.iterdir())


def test_float32_agrees_with_stock(tmp_path: Path) -> None:
    vae = make((8, 8, 16, 16), 2, dtype=torch.float32)
    arguments = inputs(vae, 120, 90, 1)
    expected = both(vae, *arguments)
    for result, wanted in zip(both(enable_exact_tiling(vae, 32), *arguments), expected, strict=True):
        assert difference(result, wanted) < 1e-5
        assert result.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_close_as_stock(dtype: torch.dtype) -> None:
    vae = make((8, 8, 16), dtype=torch.float32)
    arguments = inputs(vae, 40, 40, 1)
    exact = both(vae, *arguments)
    vae.to(dtype)
    arguments = tuple(argument.to(dtype) for argument in arguments)
    stock = both(vae, *arguments)
    for result, half, wanted in zip(
        both(enable_exact_tiling(vae, TILE), *arguments), stock, exact, strict=True
    ):
        assert result.dtype == dtype
        assert difference(result, wanted) < 1.5 * difference(half, wanted) + 1e-3


def test_channels_last_inputs_and_weights_change_nothing() -> None:
    vae = make()
    arguments = inputs(vae)
    expected = both(vae, *arguments)
    enable_exact_tiling(vae.to(memory_format=torch.channels_last), TILE)
    arguments = tuple(argument.to(memory_format=torch.channels_last) for argument in arguments)
    for result, wanted in zip(both(vae, *arguments), expected, strict=True):
        assert difference(result, wanted) < 1e-9


def test_contiguous_maps_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout on GPUs in float32."""
    from latentvae.runtime.tiling import switch as tiling

    vae = make()
    arguments = inputs(vae)
    expected = both(vae, *arguments)
    layouts = []
    conv2s = [module.weight for name, module in vae.named_modules() if name.endswith("conv2")]
    conv2d = nn.functional.conv2d

    def looking(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if any(weight is one for one in conv2s):
            layouts.append(x.is_contiguous())
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(nn.functional, "conv2d", looking)
    monkeypatch.setattr(tiling, "_layout", lambda *_: torch.contiguous_format)
    for result, wanted in zip(both(enable_exact_tiling(vae, TILE), *arguments), expected, strict=True):
        assert difference(result, wanted) < 1e-9
    assert all(layouts)
    layouts.clear()
    monkeypatch.undo()
    monkeypatch.setattr(nn.functional, "conv2d", looking)
    both(vae, *arguments)
    assert not any(layouts)  # on a CPU, channels last are faster


def test_autocast_computes_in_its_type() -> None:
    vae = make(dtype=torch.float32)
    arguments = inputs(vae, batch=1)
    exact = both(vae, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        stock = both(vae, *arguments)
        result = both(enable_exact_tiling(vae, TILE), *arguments)
    for ours, half, wanted in zip(result, stock, exact, strict=True):
        assert ours.dtype == half.dtype == torch.bfloat16
        assert difference(ours, wanted) < 1.5 * difference(half, wanted) + 1e-3


def test_other_activations_are_the_models_own() -> None:
    vae = make()
    for module in vae.modules():
        if hasattr(module, "nonlinearity"):
            module.nonlinearity = nn.GELU()
    arguments = inputs(vae, batch=1)
    expected = both(vae, *arguments)
    for result, wanted in zip(both(enable_exact_tiling(vae, TILE), *arguments), expected, strict=True):
        assert difference(result, wanted) < 1e-9


def test_with_optimize_in_either_order_the_numbers_stay() -> None:
    vae = make()
    arguments = inputs(vae)
    expected = both(vae, *arguments)
    watch = Watch(vae)
    for switch_on in ((optimize, enable_exact_tiling), (enable_exact_tiling, optimize)):
        for function in switch_on:
            function(vae, **({"tile_size": TILE} if function is enable_exact_tiling else {}))
        watch.shapes.clear()
        for result, wanted in zip(both(vae, *arguments), expected, strict=True):
            assert difference(result, wanted) < 1e-9
        assert watch.largest <= LARGEST
        assert watch.calls("decoder.conv_out") > 4
        assert patched(vae, "optimize")
        restore(vae)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_refused_at_any_size(value: float) -> None:
    vae = enable_exact_tiling(make(), TILE)
    for size in (40, 8):
        images, latents = inputs(vae, size, size, 1)
        images[0, 0, 3, 3] = latents[0, 0, 1, 1] = value
        with pytest.raises(ImageError, match="latents came with NaN"):
            vae.decode(latents)
        with pytest.raises(ImageError, match="images came with NaN"):
            vae.encode(images)


def test_activations_that_overflow_name_their_stage() -> None:
    vae = enable_exact_tiling(make(attention=False, dtype=torch.float16), TILE)
    vae.decoder.up_blocks[1].resnets[0].conv1.weight.mul_(1e5)
    with pytest.raises(LatentVAEError, match=r"up_blocks\.1\.resnets\.0\.conv1.*float16.*bfloat16"):
        vae.decode(inputs(vae)[1])


def test_restore_gives_stock_back() -> None:
    vae = make()
    arguments = inputs(vae)
    before, state = dict(vae.__dict__), {name: set(module.__dict__) for name, module in vae.named_modules()}
    expected = both(vae, *arguments)
    enable_exact_tiling(vae, TILE)
    assert patched(vae) == ["encoder", "decoder"]
    assert restore(vae) is vae
    assert {name: set(module.__dict__) for name, module in vae.named_modules()} == state
    assert vae.__dict__.keys() == before.keys()
    for result, wanted in zip(both(vae, *arguments), expected, strict=True):
        assert torch.equal(result, wanted)


def test_a_deep_copy_tiles_with_its_own_weights() -> None:
    vae = enable_exact_tiling(make(), TILE)
    arguments = inputs(vae)
    expected = both(vae, *arguments)
    twin = copy.deepcopy(vae)
    watch = Watch(twin)
    for parameter in vae.parameters():
        parameter.zero_()
    for result, wanted in zip(both(twin, *arguments), expected, strict=True):
        assert torch.equal(result, wanted)
    assert watch.largest <= LARGEST
    assert both(vae, *arguments)[1].abs().max() == 0
    assert twin.tiled_decode.__self__ is twin


def test_class_config_and_saved_files_stay(tmp_path: Path) -> None:
    vae = make()
    config, keys = dict(vae.config), list(vae.state_dict())
    enable_exact_tiling(vae, TILE)
    assert type(vae) is AutoencoderKL
    assert dict(vae.config) == config
    assert list(vae.state_dict()) == keys
    vae.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float64)
    latents = inputs(vae)[1]
    assert difference(vae.decode(latents).sample, again.decode(latents).sample) < 1e-9


def test_small_images_go_the_ordinary_way() -> None:
    vae = make()
    arguments = inputs(vae, TILE, TILE)
    expected = both(vae, *arguments)
    watch = Watch(enable_exact_tiling(vae, TILE))
    for result, wanted in zip(both(vae, *arguments), expected, strict=True):
        assert torch.equal(result, wanted)
    assert watch.calls("decoder.conv_out") == watch.calls("encoder.conv_in") == 1
    assert not plan(vae, TILE, TILE).decode.stages
    for half in (vae.encoder, vae.decoder):
        patch(half, lambda self, sample: 0 * type(self).forward(self, sample), "optimize")
    assert both(vae, *arguments)[1].abs().max() == 0  # optimize's way, not stock's
    assert both(vae, *arguments)[0].std((0, 2, 3)).max() == 0


def test_gradients_go_the_ordinary_way_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    vae = make().requires_grad_(True)
    latents = inputs(vae)[1]
    wanted = torch.autograd.grad(vae.decode(latents).sample.sum(), vae.decoder.conv_in.weight)[0]
    enable_exact_tiling(vae, TILE)
    with caplog.at_level(logging.WARNING):
        result = torch.autograd.grad(vae.decode(latents).sample.sum(), vae.decoder.conv_in.weight)[0]
    assert torch.equal(result, wanted)
    assert "not tiled" in caplog.text
    vae.requires_grad_(False)
    watch = Watch(vae)
    vae.decode(latents)
    assert watch.largest <= LARGEST


def test_diffusers_own_tiling_does_not_tile_as_well() -> None:
    vae = make()
    images, latents = inputs(vae)
    expected = both(vae, images, latents)
    enable_exact_tiling(vae, TILE)
    vae.enable_tiling()
    vae.enable_slicing()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 4
    for result, wanted in zip(both(vae, images, latents), expected, strict=True):
        assert difference(result, wanted) < 1e-9
    restore(vae)
    assert difference(vae.decode(latents).sample, expected[1]) > 1e-3  # diffusers' own tiles are back


def test_sequential_offloading_keeps_its_weights_away_between_calls() -> None:
    from accelerate import cpu_offload

    vae = make()
    arguments = inputs(vae)
    expected = both(vae, *arguments)
    enable_exact_tiling(vae, TILE)
    cpu_offload(vae, execution_device=torch.device("cpu"))
    watch = Watch(vae)
    for result, wanted in zip(both(vae, *arguments), expected, strict=True):
        assert difference(result, wanted) < 1e-9
    assert watch.largest <= LARGEST
    assert all(parameter.is_meta for parameter in vae.parameters())


@pytest.mark.slow
def test_a_pipeline_gives_the_same_image_and_is_saved_as_stock(tmp_path: Path) -> None:
    pipe, text = pipeline(), torch.randn(1, 4, 8)
    wanted = picture(pipe, text)
    optimize(pipe.vae)
    watch = Watch(enable_exact_tiling(pipe.vae, TILE))
    torch.testing.assert_close(picture(pipe, text), wanted, rtol=0, atol=1e-5)
    assert watch.largest <= LARGEST
    assert watch.calls("decoder.conv_out") > 4
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save(text, tmp_path / "text.pt")
    program = """
        import sys
        sys.modules["latentvae"] = None  # importing it is an error
        import torch
        from diffusers import StableDiffusionPipeline
        absent = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")
        pipe = StableDiffusionPipeline.from_pretrained("pipe", **dict.fromkeys(absent))
        options = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        text = torch.load("text.pt")
        image = pipe(prompt_embeds=text, guidance_scale=1, num_inference_steps=2, **options).images
        torch.save(image, "image.pt")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.load(tmp_path / "image.pt"), wanted, rtol=0, atol=1e-6)


def picture(pipe: Any, text: torch.Tensor) -> torch.Tensor:
    """What a pipeline draws for the embedding of a text, (1, 3, H, W) in [0, 1]."""
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe(prompt_embeds=text, guidance_scale=1, num_inference_steps=2, **options).images


def pipeline() -> Any:
    """Stable Diffusion of the smallest size, without its text encoder."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    vae = make(dtype=torch.float32)
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_plan_counts_the_tiles_that_run_and_prints() -> None:
    vae = make(widths=(8, 8, 16), layers=2)
    images, latents = inputs(vae, 60, 60, 1)
    enable_exact_tiling(vae, TILE, memory=0)
    walked: list[stages.Stage] = []
    before = plan(vae, 60, 60)
    for course, run in (
        (before.encode, lambda: vae.encode(images)),
        (before.decode, lambda: vae.decode(latents)),
    ):
        walked.clear()
        with pytest.MonkeyPatch.context() as patches:
            note = stages.TiledRun._note
            patches.setattr(
                stages.TiledRun,
                "_note",
                lambda self, *a, note=note: (note(self, *a), walked.append(self.stages[-1]))[0],
            )
            run()
        assert tuple(walked) == course.stages
        assert course.tiles == sum(stage.tiles for stage in walked) > 100
    pixels = latents.shape[2] * latents.shape[3]
    assert before.decode.attention_tflop == pytest.approx((4 * pixels**2 * 16 + 8 * pixels * 16**2) / 1e12)
    for part in ("60 x 60 px", "encode: ", "decode: ", "mid_block.attentions.0", "statistics of"):
        assert part in str(before)


def test_progress_counts_up_to_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    vae = enable_exact_tiling(make(), TILE)
    capsys.readouterr()
    vae.decode(inputs(vae)[1])
    assert capsys.readouterr().err == ""
    enable_exact_tiling(vae, TILE, progress=True).decode(inputs(vae)[1])
    error = capsys.readouterr().err
    assert "decode: 100%" in error
    assert "TFLOP" in error


def test_what_is_no_vae_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Linear came; wanted a diffusers\.AutoencoderKL"):
        enable_exact_tiling(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="Linear"):
        plan(nn.Linear(1, 1), 64, 64)  # type: ignore[arg-type]


def test_unsupported_blocks_are_named() -> None:
    def refuse(vae: AutoencoderKL, words: str) -> None:
        with pytest.raises(ModelError, match=words):
            enable_exact_tiling(vae)
        assert not patched(vae)

    blocks = {**block_types((8, 8)), "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")}
    refuse(
        AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks),
        r"decoder\.up_blocks\.1, a AttnUpDecoderBlock2D; wanted UpDecoderBlock2D",
    )
    vae = make()
    vae.encoder.mid_block.resnets[0].norm2 = nn.LayerNorm(8)
    refuse(vae, r"encoder\.mid_block\.resnets\.0\.norm2, a LayerNorm; wanted GroupNorm")
    vae = make()
    vae.decoder.conv_out = nn.Conv2d(8, 3, 5, padding=2)
    refuse(vae, r"decoder\.conv_out, Conv2d.*wanted a 3x3")
    vae = make()
    vae.decoder.up_blocks[0].resnets[0].dropout.p = 0.5
    refuse(vae, "dropout 0.5")


@pytest.mark.parametrize("tile_size", [8, 15, 0, -4, 64.0, None])
def test_a_tile_that_cannot_be_is_refused(tile_size: Any) -> None:
    with pytest.raises(LatentVAEError, match=f"tile_size={tile_size} came; wanted .* from 16"):
        enable_exact_tiling(make(), tile_size)


def test_a_store_folder_that_cannot_be_used_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = make()
    with pytest.raises(LatentVAEError, match="nowhere does not exist"):
        enable_exact_tiling(vae, TILE, scratch=tmp_path / "nowhere")
    with monkeypatch.context() as patches:
        patches.setattr(maps.tempfile, "TemporaryFile", raise_denied)
        with pytest.raises(LatentVAEError, match=r"cannot be written to \(Permission denied\)"):
            enable_exact_tiling(vae, TILE, scratch=tmp_path)
    assert not patched(vae)
    enable_exact_tiling(vae, TILE, scratch=tmp_path)
    watch = Watch(vae)
    usage = maps.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(maps.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LatentVAEError, match=r"has 0\.00 GB of free room; .* are wanted"):
        vae.decode(inputs(vae)[1])
    assert not watch.shapes


def raise_denied(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_the_caller_keeps_its_input() -> None:
    vae = enable_exact_tiling(make(), TILE, memory=0)
    arguments = inputs(vae)
    copies = tuple(argument.clone() for argument in arguments)
    both(vae, *arguments)
    assert all(torch.equal(one, other) for one, other in zip(arguments, copies, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize("memory", [0.0, math.inf])
def test_memory_peaks_where_the_plan_says(memory: float) -> None:
    # a process of its own, whose allocator gives every large block back: what is counted is what is held
    program = "from test_tiling import peaks_to_plan; print(*peaks_to_plan(float('" + str(memory) + "')))"
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
    }
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    shares = [float(share) for share in result.stdout.split()]
    assert all(0.75 < share < 1.15 for share in shares), shares


def peaks_to_plan(memory: float) -> list[float]:
    """Measured to planned peak, of decoding and of encoding."""
    vae = make((64, 64, 64, 64), dtype=torch.float32)  # four levels: attention of 20,480 pixels takes seconds
    images, latents = inputs(vae, 1024, 1280, 1)
    enable_exact_tiling(vae, 512, memory=memory)  # tiles so large that libraries' own buffers hardly count
    course = plan(vae, 1024, 1280)
    both(vae, images, latents)  # code that is compiled at first use is no part of the plan
    return [
        anonymous_peak(lambda: vae.decode(latents)) / course.decode.peak_bytes,
        anonymous_peak(lambda: vae.encode(images)) / course.encode.peak_bytes,
    ]


def anonymous_peak(function: Callable[[], Any]) -> int:
    """The most anonymous memory beyond what there was before, in bytes."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024

    done, seen = threading.Event(), [anonymous()]

    def watch() -> None:
        while not done.is_set():
            seen.append(anonymous())
            time.sleep(0.003)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
    finally:
        done.set()
        thread.join()
    del result
    return max(seen) - seen[0]

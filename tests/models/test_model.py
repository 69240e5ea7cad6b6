"""Presets have the documented shapes, and loading accounts for every weight or says what is wrong."""

import copy
import json
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from vaes import tiny_autoencoder

import latentvae
from latentvae.base.errors import ModelError
from latentvae.models import loading as model
from latentvae.models import shipped
from latentvae.models.presets import PRESETS, preset_config
from latentvae.models.spaces import load_autoencoder

# latent channels, factor, and parameters in millions: at least, at most
SHAPES = {
    "f8c4": (4, 8, 83, 84),
    "f8c16": (16, 8, 83, 84.5),
    "f16c16": (16, 16, 80, 100),
    "f8c4-small": (4, 8, 5, 12),
    "f8c16-small": (16, 8, 5, 12),
    "f8c4-deep": (4, 8, 5, 10),
    "f8c16-deep": (16, 8, 5, 10),
    "tiny": (4, 8, 0.1, 0.5),
}


@pytest.fixture
def folder(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    """A diffusers folder with the tiny model in it."""
    tiny_vae.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_bundled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty place for bundled weights."""
    monkeypatch.setattr(shipped, "WEIGHTS_DIR", tmp_path / "weights")
    return tmp_path / "weights"


def assert_same(loaded: AutoencoderKL, vae: AutoencoderKL) -> None:
    """Bit for bit the same weights under the same names."""
    state, wanted = loaded.state_dict(), vae.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def rewrite(file: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a safetensors file."""
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()} | change
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)


# --- presets ---------------------------------------------------------------------------------------------


def test_every_preset_is_in_the_table_of_shapes():
    assert SHAPES.keys() == PRESETS.keys()


@pytest.mark.parametrize("preset", SHAPES)
def test_a_preset_has_its_documented_shape_and_size(preset):
    channels, factor, least, most = SHAPES[preset]
    with torch.device("meta"):
        vae = latentvae.build(preset)
        moments = vae.encode(torch.empty(2, 3, 64, 96)).latent_dist.parameters
        images = vae.decode(moments[:, :channels]).sample
    assert type(vae) is AutoencoderKL
    assert moments.shape == (2, 2 * channels, 64 // factor, 96 // factor)
    assert images.shape == (2, 3, 64, 96)
    assert least * 1e6 <= sum(p.numel() for p in vae.parameters()) <= most * 1e6
    assert model.spatial_compression_ratio(vae) == factor
    assert vae.config.sample_size >= 256  # diffusers derives its tile size from it
    # both are where the latent mean is folded in; SD3's and FLUX's spaces have neither
    bare = preset == "f8c16-deep"
    assert (vae.quant_conv is None, vae.post_quant_conv is None) == (bare, bare)


def test_no_norm_group_is_a_single_channel():
    for preset, config in PRESETS.items():
        assert min(config["block_out_channels"]) >= 2 * config["norm_num_groups"], preset


def test_small_presets_have_no_attention():
    with torch.device("meta"):
        small, big = latentvae.build("f8c4-small"), latentvae.build("f8c4")
    assert not any("attentions" in key for key in small.state_dict())
    assert any("attentions" in key for key in big.state_dict())


def test_overrides_take_effect_and_leave_the_preset_as_it_was():
    before = preset_config("tiny")
    vae = latentvae.build(
        "tiny", latent_channels=7, in_channels=1, out_channels=1, block_out_channels=[8, 16]
    )
    moments = vae.encode(torch.zeros(1, 1, 16, 16)).latent_dist.parameters
    assert moments.shape == (1, 14, 8, 8)
    assert vae.config.block_out_channels == (8, 16)
    assert preset_config("tiny") == before


def test_build_is_drawn_from_torchs_generator():
    torch.manual_seed(3)
    first = latentvae.build("tiny")
    torch.manual_seed(3)
    assert_same(latentvae.build("tiny"), first)


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ModelError, match=r"'f8c4-smal'\. Did you mean 'f8c4-small'\?.*f16c16"):
        latentvae.build("f8c4-smal")
    with pytest.raises(ModelError, match=r"unknown preset 'zzz'\. Presets: f8c4, "):
        latentvae.build("zzz")


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ModelError, match=r"'latent_chanels'\. Did you mean 'latent_channels'\?"):
        latentvae.build("tiny", latent_chanels=8)


def test_widths_that_the_groups_do_not_divide_are_named():
    with pytest.raises(ModelError, match=r"\[20, 36\] cannot be divided into norm_num_groups=8"):
        latentvae.build("tiny", block_out_channels=(16, 20, 36))


def test_an_unknown_activation_is_refused_with_the_nearest():
    with pytest.raises(ModelError, match=r"unknown act_fn 'sillu'\. Did you mean 'silu'\?"):
        preset_config("tiny", act_fn="sillu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_num_groups", 0),
        ("latent_channels", "4"),
        ("latent_channels", 4.0),
        ("latent_channels", True),
        ("block_out_channels", 64),
        ("block_out_channels", []),
        ("block_out_channels", [64, "128"]),
        ("use_quant_conv", 1),
        ("scaling_factor", "1"),
        ("act_fn", None),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_before_anything_is_built(key, value):
    with pytest.raises(ModelError, match=f"{key}=.* wanted one like"):
        preset_config("tiny", **{key: value})


# --- loading ---------------------------------------------------------------------------------------------


def test_a_folder_loads_bit_for_bit_ready_to_use(folder, tiny_vae):
    loaded = latentvae.load(folder)
    assert type(loaded) is AutoencoderKL
    assert_same(loaded, tiny_vae)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())  # a parent for fine-tuning
    for key, value in preset_config("tiny").items():
        assert loaded.config[key] == (list(value) if isinstance(value, tuple) else value), key
    assert_same(latentvae.load(str(folder)), tiny_vae)


def test_a_loaded_model_does_not_change_with_its_file(folder, tiny_vae):
    loaded = latentvae.load(folder)
    with torch.no_grad():
        loaded.encoder.conv_in.weight.zero_()
    assert_same(latentvae.load(folder), tiny_vae)


def test_a_pipeline_folder_loads_its_vae(folder, tiny_vae):
    folder.rename(folder.parent / "vae")
    assert_same(latentvae.load(folder.parent), tiny_vae)


def test_a_file_loads_with_the_config_beside_it(folder, tiny_vae):
    (folder / model.WEIGHTS_NAME).rename(folder / "other name.safetensors")
    assert_same(latentvae.load(folder / "other name.safetensors"), tiny_vae)


def test_a_file_loads_with_the_config_in_its_metadata(folder, tiny_vae, tmp_path):
    config = (folder / "config.json").read_text()
    save_file(tiny_vae.state_dict(), tmp_path / "alone.safetensors", metadata={"config": config})
    assert_same(latentvae.load(tmp_path / "alone.safetensors"), tiny_vae)


def test_a_file_prefers_its_own_config_to_the_one_beside_it(folder, tmp_path):
    other = latentvae.build("tiny", latent_channels=6)
    other.save_config(tmp_path / "other")
    config = (tmp_path / "other" / "config.json").read_text()
    save_file(other.state_dict(), folder / "six.safetensors", metadata={"config": config})
    assert_same(latentvae.load(folder / "six.safetensors"), other)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_load(tiny_vae, tmp_path, variant):
    tiny_vae.save_pretrained(tmp_path, max_shard_size="300KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / model.WEIGHTS_NAME).exists()
    assert_same(latentvae.load(tmp_path), tiny_vae)


def test_a_folder_with_only_half_precision_loads_in_the_dtype_asked_for(tiny_vae, tmp_path):
    half = tiny_vae.half()
    half.save_pretrained(tmp_path, variant="fp16")
    loaded = latentvae.load(tmp_path)
    assert loaded.dtype == torch.float32
    assert_same(loaded, half.float())


def test_full_precision_is_preferred_to_a_variant(folder, tiny_vae):
    latentvae.build("tiny").half().save_pretrained(folder, variant="fp16")
    assert_same(latentvae.load(folder), tiny_vae)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_that_of_every_weight(folder, tiny_vae, dtype):
    loaded = latentvae.load(folder, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_same(loaded, tiny_vae.to(dtype))


def test_a_bundled_model_loads_by_name_and_by_default(tiny_vae, no_bundled):
    assert latentvae.bundled() == []
    tiny_vae.save_pretrained(no_bundled / model.DEFAULT_MODEL)
    (no_bundled / "half-copied").mkdir()
    assert latentvae.bundled() == [model.DEFAULT_MODEL]
    assert_same(latentvae.load(), tiny_vae)
    assert_same(latentvae.load(model.DEFAULT_MODEL), tiny_vae)


def test_attention_under_the_names_of_2022_loads(tmp_path):
    vae = latentvae.build("tiny", mid_block_add_attention=True)
    vae.save_pretrained(tmp_path)
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in vae.state_dict().items():
        for new, word in new_to_old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{word}.")  # noqa: PLW2901
        old[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
    save_file(old, tmp_path / model.WEIGHTS_NAME)
    assert_same(latentvae.load(tmp_path), vae)


# --- what does not load ----------------------------------------------------------------------------------


def test_a_missing_key_is_named(folder):
    rewrite(folder / model.WEIGHTS_NAME, {"quant_conv.bias": None})
    with pytest.raises(ModelError, match=r"lacks 'quant_conv\.bias'.*1 of \d+ keys"):
        latentvae.load(folder)


def test_an_extra_key_is_named(folder):
    rewrite(folder / model.WEIGHTS_NAME, {"discriminator.bias": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"has 'discriminator\.bias', which the model has not"):
        latentvae.load(folder)


def test_a_renamed_key_is_named_with_its_nearest_match(folder):
    bias = load_file(folder / model.WEIGHTS_NAME)["quant_conv.bias"]
    rewrite(folder / model.WEIGHTS_NAME, {"quant_conv.bias": None, "quant_conv.bais": bias})
    with pytest.raises(ModelError, match=r"'quant_conv\.bais'.* Did you mean 'quant_conv\.bias'\?"):
        latentvae.load(folder)


def test_a_misshaped_key_is_named_with_both_shapes(folder):
    rewrite(folder / model.WEIGHTS_NAME, {"quant_conv.bias": torch.zeros(9)})
    with pytest.raises(ModelError, match=r"'quant_conv\.bias' of shape \(9,\); the model's is \(8,\)"):
        latentvae.load(folder)


@pytest.mark.parametrize("damage", ["missing", "extra", "misshaped", "truncated", "gone", "index"])
def test_a_damaged_shard_is_named(tiny_vae, tmp_path, damage):
    tiny_vae.save_pretrained(tmp_path, max_shard_size="300KB")
    index = tmp_path / f"{model.WEIGHTS_NAME}.index.json"
    key, name = min(json.loads(index.read_text())["weight_map"].items())
    shard, wanted = tmp_path / name, name
    match damage:
        case "missing":
            rewrite(shard, {key: None})
            wanted = f"lacks '{key}'"
        case "extra":
            rewrite(shard, {"extra": torch.zeros(1)})
            wanted = "has 'extra'"
        case "misshaped":
            rewrite(shard, {key: torch.zeros(3, 1)})
            wanted = f"'{key}' of shape"
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-10])
        case "gone":
            shard.unlink()
        case "index":
            index.write_text("{}")
            wanted = index.name
    with pytest.raises(ModelError, match=wanted):
        latentvae.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_no_stack_trace(folder, keep):
    file = folder / model.WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:keep])
    for source in (folder, file):
        with pytest.raises(ModelError, match=r"not a readable safetensors file.*again"):
            latentvae.load(source)


def test_another_class_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderTiny"}))
    for source in (folder, folder / model.WEIGHTS_NAME):
        with pytest.raises(
            ModelError, match=r"describes AutoencoderTiny; wanted an AutoencoderKL, .*`sd-small`"
        ):
            latentvae.load(source)


@pytest.mark.parametrize("name", [*model.OTHERS, "VQModel"])
def test_classes_that_are_not_taken_are_refused_with_what_would_be(folder, name):
    (folder / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match=r"wanted an AutoencoderKL, .*SDXL.*FLUX\.1") as raised:
        latentvae.load(folder)
    assert str(raised.value).endswith(model.OTHERS.get(name, "have."))


def test_the_table_of_classes_names_all_that_have_a_word_of_their_own():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page.partition("## Which autoencoders")[2].partition("\n\n\n")[0].partition("\n## ")[0]
    assert not [name for name in ("AutoencoderKL", *model.OTHERS) if f"`{name}`" not in table]


@pytest.mark.parametrize("text", ["[1]", "{}", "{bad", "\xff"])
def test_a_config_that_is_none_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        latentvae.load(folder)


@pytest.mark.parametrize(
    "setting", [{"block_out_channels": "abc"}, {"norm_num_groups": 7}, {"down_block_types": ["Nope"]}]
)
def test_a_config_that_makes_no_model_is_named(folder, setting):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(ModelError, match="makes no AutoencoderKL"):
        latentvae.load(folder)


def test_metadata_that_is_no_json_is_named(folder, tiny_vae):
    save_file(tiny_vae.state_dict(), folder / "x.safetensors", metadata={"config": "{bad"})
    with pytest.raises(ModelError, match=r"metadata of .*x\.safetensors is not valid JSON"):
        latentvae.load(folder / "x.safetensors")


def test_a_folder_or_file_without_a_config_is_named(folder, tmp_path):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json\. Wanted a folder"):
        latentvae.load(folder)
    with pytest.raises(ModelError, match=r"no config in its metadata.*Put the model's config\.json beside"):
        latentvae.load(folder / model.WEIGHTS_NAME)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        latentvae.load(tmp_path / "empty")


def test_a_folder_without_weights_is_named(folder):
    (folder / model.WEIGHTS_NAME).unlink()
    with pytest.raises(ModelError, match=f"no weights. Wanted {model.WEIGHTS_NAME}"):
        latentvae.load(folder)


def test_pickled_weights_are_refused_unread_with_a_way_out(folder, tmp_path):
    (folder / model.WEIGHTS_NAME).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    (tmp_path / "model.ckpt").write_bytes(b"not even a pickle")
    for source in (folder, tmp_path / "model.ckpt"):
        with pytest.raises(ModelError, match=r"pickled weights.*safetensors\.torch\.save_file"):
            latentvae.load(source)


def test_other_files_and_missing_ones_are_named_without_asking_the_hub(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ModelError, match="is no model: wanted"):
        latentvae.load("model/config.json")  # looks like owner/name, but is there
    for source in (folder / "nothing", "nothing", "f8c4-smal", "./not/here"):
        with pytest.raises(ModelError, match=r"no model .*no such file or folder"):
            latentvae.load(source)
    with pytest.raises(ModelError, match="no such file"):
        latentvae.load(folder / "nothing.safetensors")


def test_a_preset_without_weights_says_how_to_get_some(no_bundled):
    with pytest.raises(
        ModelError, match=r"'f16c16' comes without trained weights.*latentvae\.build\('f16c16'\)"
    ):
        latentvae.load("f16c16")


# --- the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub; `HF_HUB_OFFLINE` is set for all tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache: Path, name: str, folder: Path, subfolder: str) -> None:
    """Lay a folder out as the hub's client caches a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40) / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


def test_a_hub_id_offline_fails_at_once_with_a_hint(hub_cache):
    start = time.perf_counter()
    with pytest.raises(
        ModelError, match=r"'nobody/nothing'.*offline mode.*Check the name and the connection"
    ):
        latentvae.load("nobody/nothing")
    assert time.perf_counter() - start < 5  # downloading would try for minutes


def test_a_hub_without_connection_is_asked_once(hub_cache, monkeypatch):
    asked = []

    def refuse(*args):
        asked.append(args)
        raise RuntimeError("no route to host")

    monkeypatch.setattr(huggingface_hub, "file_exists", refuse)
    with pytest.raises(ModelError, match="no route to host"):
        latentvae.load("nobody/nothing")
    assert len(asked) == 1


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_cached_hub_id_loads_offline(folder, tiny_vae, hub_cache, subfolder):
    put_in_cache(hub_cache, "someone/model", folder, subfolder)
    loaded = latentvae.load("someone/model", dtype=torch.float16)
    assert_same(loaded, tiny_vae.half())
    assert not loaded.training


def test_a_cached_hub_id_with_only_half_precision_loads(tiny_vae, hub_cache, tmp_path):
    tiny_vae.half().save_pretrained(tmp_path / "half", variant="fp16")
    put_in_cache(hub_cache, "someone/half", tmp_path / "half", "")
    assert_same(latentvae.load("someone/half", dtype=torch.float16), tiny_vae)


def test_a_hub_model_of_another_class_or_with_missing_weights_is_named(folder, hub_cache):
    rewrite(folder / model.WEIGHTS_NAME, {"quant_conv.bias": None})
    put_in_cache(hub_cache, "someone/broken", folder, "")
    with pytest.raises(ModelError, match=r"someone/broken is no complete AutoencoderKL.*quant_conv\.bias"):
        latentvae.load("someone/broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderTiny"}))
    put_in_cache(hub_cache, "someone/tiny", folder, "")
    with pytest.raises(ModelError, match="describes AutoencoderTiny"):
        latentvae.load("someone/tiny")


def refuse(*_, **__):
    raise OSError("no route to host")


@pytest.mark.parametrize("subfolder", ["", "vae"])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_a_cached_hub_id_is_loaded_without_asking_the_network(
    kind, subfolder, folder, tiny_vae, hub_cache, monkeypatch, tmp_path
):
    if kind == "AutoencoderTiny":
        folder = tmp_path / "small"
        tiny_autoencoder().save_pretrained(folder)
    put_in_cache(hub_cache, "someone/model", folder, subfolder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for place in ("file_download.get_hf_file_metadata", "file_exists", "hf_api.HfApi.model_info"):
        monkeypatch.setattr(f"huggingface_hub.{place}", lambda *_, **__: pytest.fail("asked of the model"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)  # the hub's client also asks for things of its own
    assert type(load_autoencoder("someone/model")).__name__ == kind
    if kind == "AutoencoderKL":
        assert_same(latentvae.load("someone/model"), tiny_vae)


def test_any_autoencoder_of_a_pipelines_folder_and_broken_ones_by_name(tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "pipe" / "vae")
    assert load_autoencoder(tmp_path / "pipe").config.latent_channels == 4
    (tmp_path / "pipe" / "vae" / model.WEIGHTS_NAME).unlink()
    with pytest.raises(ModelError, match="could not be loaded as an AutoencoderTiny"):
        load_autoencoder(tmp_path / "pipe")
    with pytest.raises(ModelError, match="no such file"):
        load_autoencoder("somewhere/model.safetensors")  # looks like owner/name, and is none


# --- describing ------------------------------------------------------------------------------------------


def test_describe_counts_every_parameter_once_and_is_json():
    vae = latentvae.build("tiny")
    figures = model.describe(vae)
    total = sum(p.numel() for p in vae.parameters())
    assert figures["parameters"] == figures["encoder_parameters"] + figures["decoder_parameters"] == total
    assert figures["values_ratio"] == 8 * 8 * 3 / 4
    assert json.loads(json.dumps(figures))["spatial_compression_ratio"] == 8


def test_describe_works_without_quant_convs():
    figures = model.describe(latentvae.build("tiny", use_quant_conv=False, use_post_quant_conv=False))
    assert figures["parameters"] == figures["encoder_parameters"] + figures["decoder_parameters"]


# --- casting -----------------------------------------------------------------------------------------------


@pytest.fixture
def diffusers_says() -> Iterator[list[str]]:
    """What diffusers logs of its models."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def test_a_cast_is_silent_and_the_same_as_stock(tiny_vae, diffusers_says):
    wanted = copy.deepcopy(tiny_vae).to(torch.bfloat16)
    assert "kept in float32: []" in diffusers_says.pop()  # what users need not read
    assert model.cast(tiny_vae, torch.bfloat16) is tiny_vae
    assert tiny_vae.dtype == torch.bfloat16
    assert_same(tiny_vae, wanted)
    assert not diffusers_says


def test_an_export_and_an_optimized_copy_are_silent(tiny_vae, diffusers_says, tmp_path):
    latentvae.export(tiny_vae, tmp_path / "vae")
    latentvae.optimize(tiny_vae, dtype=torch.bfloat16)
    assert not [message for message in diffusers_says if "float32: []" in message]


def test_a_cast_that_diffusers_warns_of_with_reason_is_left_to_it(tiny_vae, diffusers_says, monkeypatch):
    monkeypatch.setattr(type(tiny_vae), "_keep_in_fp32_modules", ["conv_out"])
    model.cast(tiny_vae, torch.bfloat16)
    assert "['conv_out']" in diffusers_says[0]

"""Configuration of a training run: what is accepted, what is refused, and in which words."""

from pathlib import Path

import pytest
import yaml

from latentvae.base.errors import ConfigError
from latentvae.models.presets import SPACES
from latentvae.training.config import Config
from latentvae.training.recipes import load_config, recipes

RECIPES = sorted(path.stem for path in Path(__file__).parents[2].glob("train/configs/*.yaml"))


def refusal(*settings: str, source: str | Path | None = None) -> str:
    """The message with which these settings are refused."""
    with pytest.raises(ConfigError) as error:
        load_config(source, list(settings))
    return str(error.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- recipes -----------------------------------------------------------------------------------------------


def test_the_recipes_are_the_files_that_people_edit():
    assert RECIPES
    assert sorted(recipes()) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_needs_nothing_but_a_data_folder(name):
    config = load_config(name, ["data.train=photos"])
    others = {"digits": "tiny", "scan": "f8c4-small", "f8c4-small-stages": "f8c4-small"}
    preset = others.get(name, name.removesuffix("-gpu"))
    if config.model.mode == "distil":  # named by the space, of a shape that its teacher's layers fit
        assert (config.model.space, config.distil.transplant) == (name.removesuffix("-small"), True)
        preset = f"f8c{SPACES[config.model.space].latent_channels}-deep"
    assert config.model.preset == preset
    assert config.output == f"runs/{name}"
    assert config.data.train == "photos"
    assert load_config(name).data.train is None


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_its_file_says(name):
    tree = yaml.safe_load(recipes()[name].read_text(encoding="utf-8"))
    resolved = load_config(name).model_dump(mode="json")
    for section, values in tree.items():
        for key, value in values.items() if isinstance(values, dict) else []:
            assert resolved[section][key] == value, f"{section}.{key}"


def test_an_unknown_recipe_is_refused_naming_the_nearest_and_all():
    message = refusal(source="f8c4-smal")
    assert "'f8c4-smal'" in message
    assert "Did you mean 'f8c4-small'?" in message
    assert all(name in message for name in RECIPES)


def test_a_file_is_read_by_its_path(tmp_path):
    path = write(tmp_path, "seed: 5\ndata: {crop: 32, train: photos}\n")
    config = load_config(path)
    assert (config.seed, config.data.crop, config.data.train) == (5, 32, "photos")
    assert config.train == Config().train  # what the file leaves out has its default


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "", "data: [1, 2\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, text):
    path = write(tmp_path, text)
    assert str(path) in refusal(source=path)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\xfa\x00data")
    assert str(path) in refusal(source=path)


def test_a_key_that_is_there_twice_is_refused_as_the_first_would_be_lost(tmp_path):
    path = write(tmp_path, "train:\n  max_steps: 3\ndata: {crop: 32}\ntrain:\n  batch_size: 2\n")
    message = refusal(source=path)
    assert str(path) in message
    assert "'train'" in message
    assert "line 1" in message
    assert "line 4" in message
    assert "'latent_channels'" in refusal("model.overrides={latent_channels: 4, latent_channels: 8}")
    # what is taken over by << may be said again
    merged = write(
        tmp_path,
        "data: &data {crop: 32, val_size: 64}\nstages: [{name: a, steps: 300, "
        "overrides: {data: {<<: *data, crop: 48}}}]\n",
    )
    assert load_config(merged).stage(0).data.crop == 48


def test_a_section_whose_lines_are_all_commented_out_has_its_defaults(tmp_path):
    path = write(tmp_path, "data:\n#  crop: 32\n")
    assert load_config(path, ["data.val_images=3"]).data.val_images == 3
    assert load_config(path).data == Config().data


# --- unknown keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "key", "meant"),
    [
        ("train.max_step=5", "train.max_step", "max_steps"),
        ("optim.learning_rte=1", "optim.learning_rte", None),
        ("loss.kl_wieght=1", "loss.kl_wieght", "kl_weight"),
        ("ouput=x", "ouput", "output"),
        ("optmi.lr=1", "optmi", "optim"),
        ("data.in_memry=true", "data.in_memry", "in_memory"),
    ],
)
def test_an_unknown_key_is_refused_naming_the_nearest(setting, key, meant):
    message = refusal(setting)
    assert f"unknown setting {key!r}" in message
    assert (f"Did you mean {meant!r}?" in message) if meant else ("Known: name, lr, betas" in message)


def test_an_unknown_key_in_a_file_is_refused_too(tmp_path):
    path = write(tmp_path, "train:\n  batchsize: 4\n")
    message = refusal(source=path)
    assert "'train.batchsize'" in message
    assert "'batch_size'" in message


def test_an_unknown_model_setting_is_refused_naming_the_nearest():
    message = refusal("model.overrides.latent_chanels=8")
    assert "'latent_chanels'" in message
    assert "'latent_channels'" in message


def test_an_unknown_preset_is_refused_naming_the_nearest():
    message = refusal("model.preset=f8c4-smal")
    assert "'f8c4-smal'" in message
    assert "'f8c4-small'" in message


def test_all_problems_are_named_at_once():
    message = refusal("train.max_steps=many", "loss.pixl=l1", "optim.lr=0")
    assert all(key in message for key in ("train.max_steps", "loss.pixl", "optim.lr"))


# --- types and ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "train.max_steps=many",
        "train.max_steps=1.5",
        "train.max_steps=0",
        "train.batch_size=[1]",
        "train.precision=fp8",
        "train.ema_decay=1",
        "train.keep_checkpoints=0",
        "optim.lr=fast",
        "optim.lr=0",
        "optim.lr=.nan",
        "optim.lr=.inf",
        "optim.name=sgd",
        "optim.final_lr=1.5",
        "loss.kl_weight=-1",
        "loss.kl_weight=.nan",
        "loss.pixel=l3",
        "data.horizontal_flip=perhaps",
        "data.crop=8",
        "data.val_images=0",
        "seed=-1",  # numpy's generators take no negative seed: it would fail with the first crop
        "seed=0x10000000000000000",  # torch takes 64 bits
        "seed=1.5",
        "output=",
    ],
)
def test_a_wrong_type_or_range_is_refused_naming_key_and_value(setting):
    key, _, value = setting.partition("=")
    message = refusal(setting)
    assert f"{key}: " in message
    assert "came: " in message
    came = message.rpartition("came: ")[2]
    assert repr(yaml.safe_load(value)) in came


@pytest.mark.parametrize("betas", ["[0.9]", "[0.9, 1.0]", "[-0.1, 0.9]", "[0.9, 0.99, 0.5]", "0.9"])
def test_betas_are_two_numbers_from_zero_to_below_one(betas):
    assert "optim.betas" in refusal(f"optim.betas={betas}")


@pytest.mark.parametrize("section", ["data=5", "train=photos", "model=[1]"])
def test_a_section_that_is_given_a_value_is_refused(section):
    assert section.partition("=")[0] in refusal(section)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_out_channels", "5"),
        ("block_out_channels", "[]"),
        ("block_out_channels", "[16, wide]"),
        ("block_out_channels", "[20, 20]"),
        ("norm_num_groups", "0"),
        ("norm_num_groups", "eight"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_it_is_built(key, value):
    assert key in refusal("model.preset=tiny", f"model.overrides.{key}={value}")


# --- settings on the command line --------------------------------------------------------------------------


def test_settings_reach_into_sections_and_dictionaries():
    config = load_config(None, ["train.max_steps=200", "model.overrides.latent_channels=8", "seed=3"])
    assert config.train.max_steps == 200
    assert config.model.overrides == {"latent_channels": 8}
    assert config.seed == 3


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("1.0e-6", 1e-6), ("3E-4", 3e-4), ("1", 1.0), (".5", 0.5)]
)
def test_floats_are_read_however_they_are_written(text, value):
    # YAML 1.1 calls 1e-6 a string, as it has no dot
    weight = load_config(None, [f"loss.kl_weight={text}"]).loss.kl_weight
    assert isinstance(weight, float)
    assert weight == value


def test_lists_truth_values_and_null_are_read():
    config = load_config(
        "tiny", ["optim.betas=[0.8, 0.95]", "data.horizontal_flip=false", "optim.decay_steps=null"]
    )
    assert config.optim.betas == (0.8, 0.95)
    assert config.data.horizontal_flip is False
    assert config.optim.decay_steps is None
    wide = load_config("tiny", ["model.overrides.block_out_channels=[16, 32]"])
    assert list(wide.model.overrides["block_out_channels"]) == [16, 32]


def test_a_value_may_hold_equals_signs_dots_and_spaces():
    assert load_config(None, ["data.train=../my photos/a=b.c"]).data.train == "../my photos/a=b.c"


@pytest.mark.parametrize(
    "folder",
    [
        "set #2",
        "2024",
        "1.5",
        "no",
        "null",
        "~",
        "2024-01-01",
        "[a, b]",
        "{a: b}",
        "a: b",
        "'a'",
        " a ",
        "*a",
        "1:30",
    ],
)
def test_text_is_taken_as_it_stands_though_it_looks_like_another_type(folder):
    assert load_config(None, [f"data.train={folder}"]).data.train == folder
    assert load_config(None, [f"output={folder}"]).output == folder
    assert load_config(None, [f"loss.perceptual_weights={folder}"]).loss.perceptual_weights == folder


def test_numbers_are_read_as_people_write_them_and_lists_hold_text():
    config = load_config(None, ["seed=0x10", "train.max_steps= 1_000 ", "model.freeze=[no, 010, '*.norm*']"])
    assert (config.seed, config.train.max_steps) == (16, 1000)
    assert config.model.freeze == ["no", "010", "*.norm*"]
    assert "came: '1:30'" in refusal("train.max_steps=1:30")  # 90, says YAML
    assert load_config(None, ["train.batch_size=010"]).train.batch_size == 10  # and this is 8


def test_nothing_means_none():
    assert load_config("tiny", ["data.train=a", "data.train="]).data.train is None
    assert load_config("tiny", ["data.short_side="]).data.short_side is None


def test_the_last_setting_wins_and_settings_win_over_the_file(tmp_path):
    path = write(tmp_path, "train: {max_steps: 500, batch_size: 3}\n")
    config = load_config(path, ["train.max_steps=600", "train.max_steps=700"])
    assert config.train.max_steps == 700
    assert config.train.batch_size == 3  # beside it in the same section


@pytest.mark.parametrize("setting", ["train.max_steps", "train.max_steps:5", "=5", "  =5", ""])
def test_a_setting_of_another_form_is_refused_showing_the_form(setting):
    message = refusal(setting)
    assert repr(setting) in message
    assert "section.key=value" in message


@pytest.mark.parametrize("setting", ["train.=5", ".max_steps=5", "train..max_steps=5"])
def test_a_setting_with_an_empty_part_is_refused(setting):
    assert "unknown setting" in refusal(setting)


def test_a_setting_that_is_no_yaml_is_refused():
    assert "optim.betas" in refusal("optim.betas=[0.9,")


def test_a_setting_below_a_value_is_refused(tmp_path):
    path = write(tmp_path, "seed: 1\n")
    message = refusal("seed.first=2", source=path)
    assert "'seed' is a value, not a section" in message
    assert "'output' is a value" in refusal("output=here", "output.deeper=1")


def test_loading_twice_shares_nothing():
    first = load_config(None, ["model.overrides.latent_channels=8"])
    first.model.overrides["latent_channels"] = 99
    first.data.crop = 16
    assert load_config(None).model.overrides == {}
    assert load_config(None).data.crop == 64


# --- values that must fit together -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crop", "val_size"])
def test_a_crop_that_the_model_would_cut_is_refused_with_the_sizes_beside_it(name):
    message = refusal(f"data.{name}=100", "model.preset=tiny")
    assert f"data.{name}=100" in message
    assert "use 96 or 104" in message


def test_the_compression_ratio_is_that_of_the_model_with_its_overrides():
    shallow = ["model.preset=tiny", "model.overrides.block_out_channels=[16, 32]"]
    assert load_config(None, [*shallow, "data.crop=18"]).data.crop == 18
    assert "ratio 8" in refusal("model.preset=tiny", "data.crop=18")
    assert "ratio 16" in refusal("model.preset=f16c16", "data.crop=24")


@pytest.mark.parametrize(
    ("recipe", "more", "warmup", "decay"),
    [
        ("f8c4-small", ["train.max_steps=20"], 0, 12),  # of 100 and 2500 in 4100 steps
        ("f8c4-small", ["train.max_steps=1"], 0, 1),
        ("tiny", ["train.max_steps=10"], 0, None),
        ("f8c4-small", ["train.max_steps=4000"], 100, 2500),  # they fit
        ("f8c4-small", ["train.max_steps=41000"], 100, 2500),
        ("f8c4-small", ["train.max_steps=20", "optim.decay_steps=5"], 0, 5),
        ("f8c4-small", ["train.max_steps=410", "optim.warmup_steps=7"], 7, 250),
        ("f8c4-small", ["train.max_steps=410", "optim.warmup_steps=300"], 300, 110),  # 110 are left
    ],
)
def test_warmup_and_decay_follow_a_shorter_run_unless_they_are_set(recipe, more, warmup, decay, caplog):
    with caplog.at_level("INFO"):
        config = load_config(recipe, more)
    assert (config.optim.warmup_steps, config.optim.decay_steps) == (warmup, decay)
    followed = (warmup, decay) != (100, 2500)
    assert ("is shorter than the" in caplog.text) == followed  # said
    assert (f"optim.decay_steps={decay} " in caplog.text) == (followed and decay not in (None, 5))


def test_what_was_set_and_does_not_fit_is_refused_as_ever():
    assert "do not fit" in refusal("train.max_steps=20", "optim.decay_steps=30", source="f8c4-small")


def test_a_decay_that_leaves_no_warmup_is_refused_with_one_that_fits():
    message = refusal("train.max_steps=2050", "optim.decay_steps=2050", source="f8c4-small")
    assert all(text in message for text in ("warmup_steps=50 ", "set optim.decay_steps=2000 or less"))
    settings = ["train.max_steps=2050", "optim.decay_steps=2000"]
    assert load_config("f8c4-small", settings).optim.warmup_steps == 50
    assert load_config("f8c4-small", ["train.max_steps=2050", "optim.decay_steps="]).optim.decay_steps is None
    full = ["train.max_steps=99", "optim.warmup_steps=99", "optim.decay_steps=1"]
    assert "lower optim.warmup_steps" in refusal(*full)


def test_a_schedule_longer_than_the_run_is_refused():
    fits = ["train.max_steps=150", "optim.warmup_steps=100"]
    assert load_config(None, [*fits, "optim.decay_steps=50"]).optim.decay_steps == 50
    message = refusal(*fits, "optim.decay_steps=51")
    assert all(text in message for text in ("warmup_steps=100", "decay_steps=51", "max_steps=150"))
    assert "max_steps=99" in refusal("train.max_steps=99", "optim.warmup_steps=100")


# --- what is written down ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *RECIPES])
def test_the_resolved_config_round_trips_through_yaml(tmp_path, name):
    settings = ["data.train=photos", "optim.betas=[0.8, 0.95]", "loss.kl_weight=1e-7", "seed=7"]
    started = name is not None and load_config(name).model.init is not None  # whose shape is its own
    config = load_config(name, settings if started else [*settings, "model.overrides.latent_channels=6"])
    path = write(tmp_path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.short_side=64", "data.crop=96"], "no image would be large enough"),
        (["model.init=x", "model.overrides={latent_channels: 8}"], r"--set model.overrides=\{\}"),
        (["loss.free_bits=0.1", "train.accumulation=2"], "use one larger batch"),
        (
            ["data.crop=32", "data.max_aspect=2", "adversarial.disc_weight=0.5", "adversarial.layers=3"],
            "crop=32 with data.max_aspect=2 leaves a discriminator of 3 layers no patch; use 36 or more",
        ),
    ],
)
def test_settings_that_could_not_work_or_would_be_ignored_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        load_config("tiny", settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [(["data.zoom=[1, 0.5]"], "begins above its end"), (["data.zoom=[0, 1]"], "data.zoom")],
)
def test_a_zoom_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        load_config("tiny", settings)


def test_a_constant_rate_has_no_decay_that_must_fit():
    load_config("tiny", ["optim.schedule=constant", "optim.decay_steps=100000"])


def test_sizes_are_left_to_the_model_that_a_run_starts_from():
    load_config("tiny", ["model.init=x", "data.crop=68", "data.val_size=68"])

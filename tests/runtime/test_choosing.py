"""Choosing by measuring: the fastest way is taken, kept, and never where it would show."""

import copy
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from vaes import assert_close, both, build, calls, inputs

import latentvae
from latentvae.base.repeatable import same_bits
from latentvae.cli.main import app
from latentvae.runtime import choosing, measurements
from latentvae.runtime.choosing import LAYERS, OPENVINO, USUAL, Choice
from latentvae.runtime.kernels import choices, compiled
from latentvae.runtime.optimize import optimize
from latentvae.runtime.patches import restore
from latentvae.runtime.tiling.switch import enable_exact_tiling

__all__ = ["calls"]

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
WAYS = [USUAL, LAYERS, pytest.param(OPENVINO, marks=needs_openvino)]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of measurements, in a folder of the test's own; without gradients."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with torch.no_grad():
        yield tmp_path / "cache" / "latentvae" / "speed.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The halves that were measured, in turn."""
    made: list[str] = []
    function = choosing._measured

    def counted(half: Any, *args: Any) -> Choice:
        made.append(type(half).__name__)
        return function(half, *args)

    monkeypatch.setattr(choosing, "_measured", counted)
    return made


def force(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Have every half find this way the fastest; of layers the kernel that the rule would not take."""

    class Others(dict[str, bool]):
        def get(self, name: str, rule: bool) -> bool:  # type: ignore[override]
            return not rule

    monkeypatch.setattr(choosing, "_choice", lambda half, x: Choice(way, {way: 1.0}, 12, Others()))


def fastest(**options: Any) -> Any:
    return optimize(build(**options).float(), backend="fastest")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"levels": 2, "layers": 2, "attention": False, "quant": False}])
def test_whatever_is_chosen_equals_float64_stock(
    way: str, options: dict[str, Any], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, way)
    vae, stock = fastest(**options), build(**options)
    for size in ((3, 5), (6, 4)):
        data = inputs(stock, *size, batch=2)
        found = both(vae, *(x.float() for x in data))
        assert_close([x.double() for x in found], both(stock, *data), 1e-5)
    # the rule of the fixture `calls` is Winograd everywhere, and the other kernel is none
    assert ("convolve" in calls or "convolve+" in calls) == (way == USUAL)


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({USUAL: 1.0, LAYERS: 0.9, OPENVINO: 0.8}, OPENVINO),
        ({USUAL: 1.0, LAYERS: 0.8, OPENVINO: 0.9}, LAYERS),
        ({USUAL: 1.0, LAYERS: 0.97, OPENVINO: 0.96}, USUAL),  # within chance
        ({USUAL: 1.0, LAYERS: 1.5, OPENVINO: 2.0}, USUAL),
    ],
)
@needs_openvino
def test_the_fastest_way_is_taken(
    seconds: dict[str, float], wanted: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(way: Any, x: torch.Tensor) -> float:
        name = LAYERS if getattr(way, "__name__", "") == "by_layers" else USUAL
        return seconds[OPENVINO if getattr(way, "func", None) is choosing.backend.compute else name]

    monkeypatch.setattr(choosing, "_seconds", timed)
    vae = fastest(levels=2, attention=False)
    _, latents = inputs(vae)
    vae.decode(latents)
    found = choosing._choice(vae.decoder, latents)
    assert found.way == wanted
    assert found.seconds == seconds
    assert bool(found.layers)
    computed = calls.count("convolve") + calls.count("convolve+")
    vae.decode(latents)
    asked = calls.count("convolve") + calls.count("convolve+") > computed
    assert asked == (wanted == USUAL or (wanted == LAYERS and any(found.layers.values())))
    assert (vae.decoder in choosing.backend._graphs) == (wanted == OPENVINO)  # else its memory is given back


def test_large_images_are_judged_by_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, sizes = fastest(levels=2, attention=False), []
    small = 2**choosing.SMALLEST // 4  # latents of 128 x 128 px

    def timed(way: Any, x: torch.Tensor) -> float:
        sizes.append(x.shape[2] * x.shape[3])
        return 0.4 * sizes[-1] / small

    monkeypatch.setattr(choosing, "_seconds", timed)
    found = choosing._choice(vae.decoder, torch.empty(2, 4, 256, 256))  # 512 x 1024 px would take 12.8 s
    assert max(sizes) == 4 * small
    assert found.pixels == choosing.SMALLEST + 2
    assert list(choosing._found[vae.decoder]) == [(19, torch.float32, 1)]


@pytest.mark.slow
def test_it_is_measured_once_and_then_looked_up(kept: Path, measured: list[str]) -> None:
    vae = fastest(levels=2, attention=False)
    data, other = inputs(vae), inputs(vae, 60, 60)
    for _ in range(2):
        both(vae, *data)
    assert measured == ["Encoder", "Decoder"]
    both(fastest(levels=2, attention=False), *data)  # what another process would do
    both(copy.deepcopy(vae), *data)
    assert len(measured) == 2
    vae.decode(other[1])  # another size
    fastest(levels=2).decode(data[1])  # another model
    torch.set_num_threads(2)
    vae.decode(data[1])
    assert measured[2:] == ["Decoder"] * 3
    assert len(json.loads(kept.read_text())["machines"]) == 2
    restore(vae)
    assert vae.decoder not in choosing._found


@pytest.mark.slow
@pytest.mark.parametrize("other", ["machine", "torch", "openvino"])
def test_entries_of_other_machines_and_versions_are_ignored_and_stay(
    other: str, kept: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = inputs(fastest())
    fastest().decode(data[1])
    before = json.loads(kept.read_text())["machines"]
    with monkeypatch.context() as patch:
        if other == "machine":
            patch.setattr(measurements, "processor", lambda: "another processor")
        elif other == "torch":
            patch.setattr(torch, "__version__", "99.0")
        else:
            patch.setattr(measurements.metadata, "version", lambda name: "99.0")
        fastest().decode(data[1])
    fastest().decode(data[1])
    assert measured == ["Decoder"] * 2
    after = json.loads(kept.read_text())["machines"]
    assert len(after) == 2
    assert before.items() <= after.items()


def test_what_was_measured_without_a_compiler_is_not_taken_with_one(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled.library() is None:
        pytest.skip("no C++ compiler")
    data = inputs(fastest())
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "library", lambda: None)
        fastest().decode(data[1])
    for _ in range(2):
        fastest().decode(data[1])
    assert measured == ["Decoder"] * 2


WHOLE = asdict(Choice(USUAL, {USUAL: 1.0}, 14, {"conv 4 to 4, 2^9 pixels": True}))
DAMAGED = [
    *({"version": 1, "machines": machines} for machines in ([], {"a": 1}, None)),
    *({"version": version, "machines": {}} for version in (0, 2, "1")),
    *("", "{", "[]", "null", '"a"', "\x00"),
]
WRONG = [
    *({**WHOLE, "way": way} for way in ("fast", OPENVINO, None, [])),  # none of those was measured
    *(
        {**WHOLE, name: value}
        for name in ("seconds", "pixels", "layers")
        for value in (None, "a", {"a": "b"})
    ),
    *({name: WHOLE[name] for name in WHOLE if name != missing} for missing in ("way", "seconds")),
    *({**WHOLE, "more": 1}, [], 1, None, {}),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_measured_anew(content: Any, kept: Path, measured: list[str]) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text(content if isinstance(content, str) else json.dumps(content))
    vae = fastest(levels=1, attention=False)
    _, latents = inputs(vae)
    vae.decode(latents)
    assert measured == ["Decoder"]
    fastest(levels=1, attention=False).decode(latents)
    assert len(measured) == 1  # the file is whole again


def test_entries_that_nobody_wrote_are_measured_anew() -> None:
    assert Choice.of(json.loads(json.dumps(WHOLE))) == Choice(**WHOLE)
    assert [entry for entry in WRONG if Choice.of(entry) is not None] == []


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    vae = fastest(levels=1, attention=False)
    _, latents = inputs(vae)
    for _ in range(2):
        vae.decode(latents)
    assert measured == ["Decoder"]
    assert "is not kept" in caplog.text


@pytest.mark.parametrize("way", [LAYERS, pytest.param(OPENVINO, marks=needs_openvino)])
def test_stores_and_compressed_files_are_the_same_bytes(
    way: str, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_vae: Any
) -> None:
    image = latentvae.load_image(photo_folder / "photo0.jpg")[None]
    vaes = optimize(copy.deepcopy(tiny_vae)), optimize(copy.deepcopy(tiny_vae), backend="fastest")
    monkeypatch.setattr("latentvae.runtime.kernels.winograd.MIN_PIXELS", 1)
    monkeypatch.setattr("latentvae.runtime.kernels.winograd.MIN_CHANNELS", 1)
    force(monkeypatch, way)
    usual, found = (latentvae.encode(vae, image)[0].mean for vae in vaes)
    assert not torch.equal(usual, found)  # elsewhere the choice shows in the last bits
    with same_bits():
        assert torch.equal(usual, latentvae.encode(vaes[1], image)[0].mean)
    shards, files = [], []
    for number, vae in enumerate(vaes):
        latentvae.encode_folder(vae, [photo_folder], tmp_path / str(number), dtype="fp32")
        shards.append((tmp_path / str(number) / "latents-00000.safetensors").read_bytes())
        files.append(latentvae.codec.compression.compress(vae, image))
    assert shards[0] == shards[1]
    assert files[0] == files[1]
    assert not torch.equal(usual, latentvae.encode(vaes[1], image)[0].mean)


def test_tiles_are_computed_as_usual(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, LAYERS)
    vaes = [optimize(build().float()), fastest()]
    data = inputs(vaes[0], 12, 5)
    for vae in vaes:
        enable_exact_tiling(vae, tile_size=32)
    wanted, found = (both(vae, *data) for vae in vaes)
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def _hook(vae: Any) -> None:
    vae.decoder.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda module, args, output: output)


def _gradients(vae: Any) -> None:
    torch.set_grad_enabled(True)  # the fixture resets it


def _double(vae: Any) -> None:
    vae.double()


@pytest.mark.parametrize("change", [_hook, _gradients, _double])
def test_nothing_is_measured_where_only_the_usual_way_is_right(change: Any, measured: list[str]) -> None:
    vae = fastest()
    change(vae)
    _, latents = inputs(vae)
    vae.decode(latents)
    assert not measured


def test_a_measurement_leaves_random_numbers_alone() -> None:
    vae = fastest()
    _, latents = inputs(vae)
    before = torch.get_rng_state()
    vae.decode(latents)
    assert torch.equal(before, torch.get_rng_state())


def test_layers_go_by_table_rule_and_clock() -> None:
    def slow() -> torch.Tensor:
        time.sleep(0.02)
        return torch.zeros(1)

    def quick() -> torch.Tensor:
        return torch.ones(1)

    with choices.measuring() as table:
        for layer, first, second in (("a", slow, quick), ("b", quick, slow)):
            choices.run(layer, 1000, first, second, rule=True)
    assert table == {"a, 2^10 pixels": False, "b, 2^10 pixels": True}

    def chosen(layer: str, pixels: int = 1000) -> float:
        return choices.run(layer, pixels, lambda: torch.zeros(1), quick, rule=layer != "c").item()

    by_rule = [0, 0, 1]
    assert [chosen(layer) for layer in "abc"] == by_rule
    elsewhere: list[float] = []
    with choices.using(table):
        assert [chosen(layer) for layer in "abc"] == [1, 0, 1]
        assert chosen("a", 4000) == 0
        with choices.using(table, larger=2):
            assert [chosen("a", 4000), chosen("a")] == [1, 0]
        assert chosen("a") == 1
        thread = threading.Thread(target=lambda: elsewhere.extend(chosen(layer) for layer in "abc"))
        thread.start()
        thread.join()
    assert elsewhere == by_rule
    assert [chosen(layer) for layer in "abc"] == by_rule


def test_doctor_lists_what_was_found(kept: Path, measured: list[str], tmp_path: Path, tiny_vae: Any) -> None:
    latentvae.export(tiny_vae, tmp_path / "model")
    line = ["doctor", str(tmp_path / "model"), "--speed", "--size", "64"]
    first = CliRunner().invoke(app, [*line, "--json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["kept_in"] == str(kept)
    assert found["machine"] in json.loads(kept.read_text())["machines"]
    assert USUAL in found["encode"]["seconds"]
    assert found["decode"]["way"] in found["decode"]["seconds"]
    said = CliRunner().invoke(app, line)
    assert said.exit_code == 0
    assert f"decode: {found['decode']['way']} (of an image of 64 x 64 px)" in said.stdout
    assert measured == ["Encoder", "Decoder"]
    refused = CliRunner().invoke(app, [*line, "--fix", str(tmp_path / "fixed")])
    assert "--speed came with --images or --fix" in str(refused.exception)


def test_it_says_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    vae = fastest(levels=1)
    with caplog.at_level(logging.INFO):
        vae.decode(inputs(vae)[1])
    assert "is the fastest way; measured in" in caplog.text

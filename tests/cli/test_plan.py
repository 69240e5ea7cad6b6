"""`latentvae plan`: the figures of the planner, what the verbs would choose, and advice that works."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import latentvae
from latentvae.base.errors import LatentVAEError
from latentvae.cli.main import main
from latentvae.cli.plan import duration, parse_size
from latentvae.runtime import memory
from latentvae.runtime.kernels import compiled
from latentvae.runtime.tiling import fitting, planning

PIXEL = 16 * 4  # bytes of a value of the first level's map, in float32


@pytest.fixture
def model(tmp_path: Any, tiny_vae: Any) -> str:
    tiny_vae.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_peaks_of_whole_images_are_those_of_the_maps_that_live_at_once(
    tiny_vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = memory.ordinary_peak(tiny_vae, 64, 128)
    assert fitting.whole_peaks(tiny_vae, 64, 128) == {"encode": bound, "decode": bound}
    latentvae.optimize(tiny_vae)
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert fitting.whole_peaks(tiny_vae, 64, 128)["decode"] == bound
    monkeypatch.setattr(compiled, "library", object)
    # 16, 16, 32, 32 channels. Encoding: conv_in's map and two of the one resnet. Decoding: what the block was
    # given and three of the second resnet
    assert fitting.whole_peaks(tiny_vae, 64, 128) == {
        "encode": 3 * PIXEL * 64 * 128,
        "decode": 4 * PIXEL * 64 * 128,
    }
    vae = latentvae.build("f8c4")  # measured: 0.540 and 0.798 GB, of the latter 0.1 weights made ready
    assert fitting.whole_peaks(latentvae.optimize(vae), 512, 512) == {
        "encode": 536870912,
        "decode": 671088640,
    }


def test_tiles_where_the_whole_does_not_fit(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, model, "1000x600", "--memory", "0.06", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["width"], result["height"]) == (1000, 600)
    choice = result["choice"]
    assert choice["fits"]
    vae = latentvae.load(model)
    steps, in_folder = (
        planning.plan(
            vae, 600, 1000, tile_size=choice["tile_size"], scratch=place, memory=memory.SHARE * 0.06e9
        )
        for place in (None, Path())
    )
    names = [(way["verb"], way["tile_size"], way["on_disk"]) for way in result["ways"]]
    tile = choice["tile_size"]
    assert names == [
        (verb, *way) for verb in ("encode", "decode") for way in ((None, False), (tile, False), (tile, True))
    ]
    whole, in_memory, on_disk = result["ways"][3:]
    latentvae.optimize(vae)
    assert whole["peak_bytes"] == fitting.whole_peaks(vae, 600, 1000)["decode"] > 0.06e9
    assert in_memory["peak_bytes"] == steps.decode.peak_bytes
    assert on_disk["peak_bytes"] == in_folder.decode.tile_bytes
    assert on_disk["disk_bytes"] == in_folder.decode.store_bytes >= steps.decode.store_bytes
    assert in_memory["tflop"] == pytest.approx(steps.decode.tflop)
    assert whole["tflop"] < in_memory["tflop"]  # halos are computed twice
    for way in result["ways"]:
        rate = result["flop_per_second"][way["verb"]]
        assert way["seconds"] == pytest.approx(way["tflop"] * 1e12 / rate)
    # the advice is code that works
    called = re.search(r"latentvae\.(enable_exact_tiling\(.*?\))", choice["advice"])
    assert called is not None
    eval(
        called[1].replace('"FOLDER"', '"cpu"'),
        {"enable_exact_tiling": latentvae.enable_exact_tiling, "vae": vae},
    )
    assert planning.settings_of(vae.decoder).tile_size == tile


@pytest.mark.parametrize(
    ("gigabytes", "advice"),
    [(64, "It fits whole"), (0.1, "Tile it"), (0.02, 'scratch="FOLDER"'), (0.001, "It does not fit")],
)
def test_what_is_chosen_is_what_the_verbs_do(
    gigabytes: float,
    advice: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fitting, "measured_rates", lambda vae: {"encode": 1e9, "decode": 1e9})
    code, out, _ = run(capsys, model, 1024, "--memory", gigabytes)
    assert code == 0
    assert advice in out.splitlines()[-1]
    assert "estimates" in out
    assert "resnets" not in out  # stages
    if advice == "Tile it":
        tile = int(re.findall(r"tile_size=(\d+)", out)[0])
        vae = latentvae.load(model)
        monkeypatch.setattr(memory, "free_memory", lambda device: gigabytes * 1e9)
        fitting.tile_to_fit(vae, None, 1024, 1024, None, None)  # type: ignore[arg-type]
        assert planning.settings_of(vae.decoder).tile_size == tile


def test_stages_are_shown_where_they_are_asked_for(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "measured_rates", lambda vae: {"encode": 1e9, "decode": 1e9})
    arguments = (model, 512, "--memory", 8, "--tile-size", 128, "--stages")
    assert "up_blocks.0.resnets.0" in run(capsys, *arguments)[1]
    stages = json.loads(run(capsys, *arguments, "--json")[1])["stages"]
    assert [stage["name"] for stage in stages["decode"]][-1] == "conv_out"
    assert all(stage["side"] <= 128 for stage in stages["encode"])


def test_sizes_and_times() -> None:
    assert parse_size("2048") == (2048, 2048)
    assert parse_size("1920x1080") == (1080, 1920)
    for wrong in ("0", "axb", "12x", "x12", "12x0", "1.5", "-3"):
        with pytest.raises(LatentVAEError, match="is no size; wanted pixels as 2048"):
            parse_size(wrong)
    assert [duration(x) for x in (0.123, 42.4, 600, 7200)] == ["0.12 s", "42 s", "10 min", "2.0 h"]


def test_bad_memory(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, model, 512, "--memory", "0")
    assert code == 2
    assert "wanted a number of GB above 0" in err

"""The scripts that turn runs and weights into published tables: ablations, the models, diffusability."""

import json
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentvae.training.recipes import load_config

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # scripts, which import each other
ablations, diffusability, model_tables = map(import_module, ("ablations", "diffusability", "model_tables"))


def write_run(
    folder: Path, *settings: str, psnr: float = 20.0, last: int = 20, state: str = "finished"
) -> Path:
    """What `latentvae train` leaves of a run that validates every 10 steps of a half second each."""
    config = load_config("tiny", ["data.train=photos", f"output={folder}", "train.max_steps=20", *settings])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    lines: list[dict[str, Any]] = []
    for step in range(1, last + 1):
        lines.append({"step": step, "images_per_second": 2.0 * config.train.batch_size, "seconds": step / 2})
        if step % 10 == 0:
            figures = {"psnr": psnr + step / 10, "ssim": 0.5, "lpips": 0.25, "rate_bpp": 1.5}
            lines.append({"step": step, **{f"val_{name}": value for name, value in figures.items()}})
    text = (
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "cut'
    )  # a killed run's last line
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "status.json").write_text(json.dumps({"state": state, "step": last}), encoding="utf-8")
    return folder


# --- ablations ---------------------------------------------------------------------------------------------


def test_a_row_has_the_last_validation_and_the_settings_that_differ(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base")
    other = write_run(tmp_path / "other", "optim.name=adamw", "data.workers=3", "train.log_every=1", psnr=18)
    row = ablations.read_run(other, load_config(base / "config.yaml"))
    assert row["differs"] == "optim.name=adamw"  # not what leaves the weights as they are
    assert (row["psnr"], row["step"], row["of"]) == (20, 20, 20)
    assert row["seconds_per_step"] == 0.5
    assert row["minutes"] == pytest.approx(10 / 60)
    assert 200_000 < row["parameters"] < 400_000
    assert ablations.read_run(other, step=10)["psnr"] == 19
    with pytest.raises(SystemExit, match="no validation at step 7"):
        ablations.read_run(other, step=7)


def test_the_table_says_where_a_run_is_not_finished(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", last=10, state="interrupted")
    table = ablations.report([ablations.read_run(base, load_config(base / "config.yaml"))])
    assert "| base |  | 0.3 M | 10 of 20 | 21.00 | 0.250 | 1.50 | 0.50 | 0 |" in table


def test_rows_of_earlier_runs_are_kept_and_those_of_the_same_name_renewed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    ablations.write([{"name": "a", "psnr": 1}, {"name": "b", "psnr": 2}], path)
    merged = ablations.write([{"name": "c", "psnr": 4}, {"name": "a", "psnr": 3}], path)
    assert [(row["name"], row["psnr"]) for row in merged] == [("a", 3), ("b", 2), ("c", 4)]
    assert json.loads(path.read_text())["rows"] == merged


def arguments(tmp_path: Path, **more: Any) -> Namespace:
    values = {"runs": tmp_path, "train": "photos", "val": None, "config": "tiny", "steps": 20, "set": None}
    return Namespace(**{**values, "variants": None, "define": None, **more})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that would have been run; each ends with exit code 4."""
    seen: list[list[str]] = []

    def pretend(line: list[str], **options: Any) -> Namespace:
        seen.append(line)
        return Namespace(returncode=4)

    monkeypatch.setattr(ablations.subprocess, "run", pretend)
    return seen


def test_a_finished_variant_is_not_trained_again_and_a_stopped_one_goes_on(
    tmp_path: Path, calls: list[list[str]]
) -> None:
    wanted = arguments(tmp_path)
    common = [s for s in ablations.settings_of([], wanted, tmp_path / "base") if not s.startswith("output=")]
    write_run(tmp_path / "base", *common)
    assert ablations.run("base", [], wanted) == 0
    assert not calls
    (tmp_path / "base" / "status.json").write_text('{"state": "interrupted"}')
    (tmp_path / "base" / "checkpoints" / "step-00000010").mkdir()
    assert ablations.run("base", [], wanted) == 4
    assert calls[0][-2:] == ["--resume", "latest"]
    with pytest.raises(SystemExit, match=r"other settings \(loss.kl_weight=0.5\)"):
        ablations.run("base", ["loss.kl_weight=0.5"], wanted)


def test_a_stop_ends_the_round_and_an_unknown_variant_is_named(
    tmp_path: Path, calls: list[list[str]]
) -> None:
    mine = [["mine", "loss.kl_weight=0"]]
    assert ablations.train_all(arguments(tmp_path, define=mine, variants=["mine", "adamw"])) == []
    assert len(calls) == 1
    assert "loss.kl_weight=0" in calls[0]
    with pytest.raises(SystemExit, match=r"unknown variants adam\. Known: base, .*mine"):
        ablations.train_all(arguments(tmp_path, define=mine, variants=["adam"]))


def test_every_variant_is_a_config_that_can_be_run(tmp_path: Path) -> None:
    for name, variant in ablations.VARIANTS.items():
        load_config(
            "f8c4-small", ablations.settings_of(variant, arguments(tmp_path, steps=300), tmp_path / name)
        )


# --- the page of the models --------------------------------------------------------------------------------


def model(psnr: float, lpips: float) -> dict[str, Any]:
    kodak = {
        "count": 24,
        "psnr": psnr,
        "ssim": 0.7,
        "lpips": lpips,
        "rate_bpp": 1.4,
        "worst": {"name": "13", "psnr": 19.0},
    }
    return {"sets": {"kodak": kodak}, "parameters": 1, "bytes": 1}


def test_a_page_keeps_all_but_what_is_between_the_markers() -> None:
    page = "before\n<!-- goals -->\nold\n<!-- end of goals -->\nafter\n"
    once = model_tables.fill(page, "goals", r"new \1")
    assert once == "before\n<!-- goals -->\nnew \\1\n<!-- end of goals -->\nafter\n"
    assert model_tables.fill(once, "goals", r"new \1") == once
    for damaged in ("no markers", page + page):
        with pytest.raises(ValueError, match="<!-- goals -->"):
            model_tables.fill(damaged, "goals", "new")


def test_a_missed_goal_says_by_how_much_and_a_met_one_does_not() -> None:
    table = model_tables.goals({"models": {"f8c4-small": model(psnr=24.2, lpips=0.24)}})
    assert "| `f8c4-small`, trained on a CPU | 24.5 | missed by 0.30 dB | 0.25 | met |" in table
    assert "| `f8c4-small`, trained on a GPU | 27.0 | missed by 2.80 dB | 0.12 | missed by 0.120 |" in table
    assert "f8c16" not in table


def test_the_published_page_has_every_marker_and_names_what_was_not_measured(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text((ROOT / "docs" / "models.md").read_text(encoding="utf-8"), encoding="utf-8")
    missing = model_tables.write({"models": {"f8c4-small": model(25, 0.2)}, "machine": "none"}, page)
    assert set(missing) >= {"sizes", "codecs", "cards", "ablations", "diffusability"}
    assert "`f8c4-small` | 25.00 | 0.700 | 0.2000 | 1.40 | 13: 19.0 dB" in page.read_text(encoding="utf-8")


def test_the_published_page_says_what_its_figures_say() -> None:
    """After new weights the page has to be written anew, by hand it drifts."""
    page, store = ROOT / "docs" / "models.md", ROOT / "docs" / "models.json"
    figures, text = json.loads(store.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")
    parts = model_tables.PARTS.items()
    written = {name: part for name, part in parts if f"<!-- {name} -->\nNot measured yet." not in text}
    assert written
    for name, part in written.items():
        assert part(figures) in text, f"{name}: run benchmarks/models.py"


# --- diffusability -----------------------------------------------------------------------------------------


def test_the_table_has_means_over_seeds_with_half_their_distance() -> None:
    rows = [{"name": "photographs", "frechet": 0.1}]
    for probability, loss in ((0.0, 0.5), (0.0, 0.6), (0.5, 0.4), (0.5, 0.4)):
        common = {"name": "samples", "probability": probability, "psnr": 20.0, "lpips": 0.5}
        rows.append({**common, "loss": loss, "frechet": 2 * loss})
    table = diffusability.report(rows)
    assert "| photographs |  |  |  | 0.1000 |" in table
    assert "equivariance 0** | 20.00 | 0.500 | 0.5500 ± 0.0500 | 1.1000 ± 0.1000 |" in table
    assert "equivariance 0.5** | 20.00 | 0.500 | 0.4000 ± 0.0000 | 0.8000 ± 0.0000 |" in table

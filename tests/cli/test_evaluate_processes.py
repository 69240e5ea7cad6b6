"""`latentvae evaluate` over several processes gives the figures, and the exit code, of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import textured
from PIL import Image
from training_runs import THREADS_LEFT

import latentvae
from latentvae.models.exporting import export

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# rFID with a small network in the place of Inception, whose weights are not here
CODE = (
    THREADS_LEFT
    + """
import sys, torch
import torch.nn.functional as F
from latentvae.measure import rfid
class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.mix = torch.nn.Parameter(torch.randn(2048, 48, generator=draws))
    def forward(self, levels):
        return (F.adaptive_avg_pool2d(levels.float() / 255, 4).flatten(1) @ self.mix.T,)
rfid.load_inception = lambda weights=None: rfid.Inception(Small(), "0" * 64)
from latentvae.cli.main import main
main(sys.argv[1:])
"""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(latentvae.build("tiny", scaling_factor=0.5), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.fromarray(textured(48 + 8 * number, 40, number)).save(folder / f"{number}.png")
    return folder


def evaluate(world: int, *arguments: object) -> list[tuple[int, str, str]]:
    """Exit code and output of each process, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-c", CODE, "evaluate", *map(str, arguments)]
    processes = [
        subprocess.Popen(
            line,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=400) for process in processes]
    assert not any("still running" in stderr for _, stderr in said), said
    return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


def test_two_processes_give_the_figures_of_one(model: Path, photos: Path) -> None:
    arguments = (photos, "-m", model, "--rfid", "--sample", "--json")
    ((code, printed, _),) = evaluate(1, *arguments)
    assert code == 0
    both = evaluate(2, *arguments)
    assert [code for code, _, _ in both] == [0, 0], both
    assert both[1][1] == "", "the first speaks for all"
    one, two = json.loads(printed), json.loads(both[0][1])
    assert [row["name"] for row in two["images"]] == [f"{number}.png" for number in range(5)]
    assert two["rfid"] == pytest.approx(one["rfid"], rel=1e-6)
    assert one["rfid"] > 0
    assert two["rfid_protocol"] == one["rfid_protocol"]
    for name in ("psnr", "ssim", "rate_bpp"):
        assert two["mean"][name] == pytest.approx(one["mean"][name], rel=1e-6)
        assert [row[name] for row in two["images"]] == pytest.approx(
            [row[name] for row in one["images"]], rel=1e-6
        )


def test_a_skipped_image_ends_both_with_the_same_code_and_is_told_once(model: Path, photos: Path) -> None:
    (photos / "1.png").write_bytes(b"no image")  # of the second process
    both = evaluate(2, photos, "-m", model, "--json")
    assert [code for code, _, _ in both] == [3, 3], both
    report = json.loads(both[0][1])
    assert len(report["images"]) == 4
    assert [Path(each["path"]).name for each in report["skipped"]] == ["1.png"]
    assert "1 of 5 images was skipped" in both[0][2] + both[1][2]


def test_what_one_process_cannot_measure_ends_both(model: Path, photos: Path, tmp_path: Path) -> None:
    both = evaluate(2, tmp_path / "nothing", "-m", model)
    assert [code for code, _, _ in both] == [2, 2]
    for photo in photos.iterdir():
        photo.write_bytes(b"no image")
    both = evaluate(2, photos, "-m", model)
    assert [code for code, _, _ in both] == [2, 2], both

"""Every kind of diffusers pipeline with a VAE of ours in it. The table in docs/pipelines.md is made here:
`LATENTVAE_WRITE_MATRIX=1 pytest tests/pipelines/test_pipeline_matrix.py -m "slow or not slow"` writes it.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from pipelines import CASES, Case, by_hand, cpu_offload, stock_vae

import latentvae
from latentvae.pipelines.checks import LatentSpaceError, SwapError
from latentvae.pipelines.swap import swap
from latentvae.runtime.patches import patched

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
START, END = "<!-- matrix: written by tests/pipelines/test_pipeline_matrix.py -->", "<!-- end of matrix -->"
WRITING = bool(os.environ.get("LATENTVAE_WRITE_MATRIX"))
QUICK = ("StableDiffusion", "StableDiffusionXLInpaint", "StableDiffusion3", "Flux", "LDMTextToImage")
RELOAD = """
import sys
sys.modules["latentvae"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline
from pipelines import CASES
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    name = folder.replace("\\\\", "/").rpartition("/")[2]
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.save(CASES[name].run(pipe), folder + ".pt")
"""


def ours(case: Case, **options: Any) -> Any:
    """A random VAE as `latentvae` builds it, with other factors than the stock one's."""
    torch.manual_seed(3)
    settings = {"latent_channels": case.channels, "scaling_factor": 0.7, **case.fixed, **options}
    if case.shift:
        settings["shift_factor"] = 0.1
    return latentvae.build("tiny", **settings).eval()


def runs_as_stock(case: Case, folder: Path) -> None:
    image = case.run(case.make())
    assert image.shape in ((1, 3, 64, 64), (1, 3, 128, 128))
    assert image.isfinite().all()
    assert image.std() > 0.001


def runs_with_ours(case: Case, folder: Path) -> None:
    pipe, vae = case.make(), ours(case)
    stock = getattr(pipe, case.component)
    assert swap(pipe, vae, allow_new_latent_space=True) is stock
    assert getattr(pipe, case.component) is vae
    built = case.make(ours(case))
    assert pipe.config == built.config
    image = case.run(pipe)
    assert torch.equal(image, case.run(built))
    assert (image - case.run(case.make())).abs().max() > 0.01


def equals_by_hand(case: Case, folder: Path) -> None:
    pipe, vae = case.make(), ours(case)
    swap(pipe, vae, allow_new_latent_space=True)
    image = case.run(pipe)
    latents = case.run(pipe, output_type="latent") if case.gives_latents else last_latents(case, pipe)
    assert (by_hand(case, vae, latents) - image).abs().max() < 1e-5


def last_latents(case: Case, pipe: Any) -> torch.Tensor:
    """What the scheduler gave in its last step; the first of two where guidance doubles the batch."""
    given, step = [], pipe.scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        given.append(step(*args, **kwargs))
        return given[-1]

    pipe.scheduler.step = recorded
    case.run(pipe)
    del pipe.scheduler.step
    return given[-1].prev_sample[:1]


def reloads_without_us(case: Case, folder: Path) -> None:
    pipe = case.make()
    swap(pipe, ours(case), allow_new_latent_space=True)
    assert (torch.load(f"{folder}.pt") - case.run(pipe)).abs().max() < 1e-5


def offloads_models(case: Case, folder: Path) -> None:
    offloads(case, "enable_model_cpu_offload")


def offloads_layers(case: Case, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "cpu_offload", cpu_offload)
        offloads(case, "enable_sequential_cpu_offload")


def offloads(case: Case, enable: str) -> None:
    wanted = case.run(case.make(ours(case)))
    pipe, vae = case.make(), ours(case)
    meta = enable == "enable_sequential_cpu_offload"
    getattr(pipe, enable)(device="cpu")
    case.run(pipe)
    old = swap(pipe, vae, allow_new_latent_space=True)
    assert not any(hasattr(module, "_hf_hook") for module in old.modules())
    assert hasattr(vae, "_hf_hook")
    assert (vae.decoder.conv_in.weight.device.type == "meta") == meta
    if not meta:
        assert [hook.model for hook in pipe._all_hooks].count(vae) == 1
    assert all(torch.equal(case.run(pipe), wanted) for _ in range(2))  # hooks are renewed after each
    swap(pipe, old, allow_new_latent_space=True)
    assert torch.equal(case.run(pipe), case.run(case.make()))


def optimized_and_tiled(case: Case, folder: Path) -> None:
    wanted = case.run(case.make(ours(case)))
    pipe, vae = case.make(), ours(case)
    latentvae.enable_exact_tiling(latentvae.optimize(vae), tile_size=32)
    swap(pipe, vae, allow_new_latent_space=True)
    assert {"encoder", "decoder"} <= set(patched(vae, "tiling"))
    assert patched(vae, "optimize")
    image = case.run(pipe)
    assert not torch.equal(image, wanted)  # it did compute otherwise
    assert (image - wanted).abs().max() < 1e-4


def refuses_other_channels(case: Case, folder: Path) -> None:
    pipe = case.make()
    before = dict(vars(pipe))
    with pytest.raises(SwapError, match=rf"has 8 latent channels.* works on {case.channels} "):
        swap(pipe, ours(case, latent_channels=8), allow_new_latent_space=True)
    assert vars(pipe) == before


def knows_latent_spaces(case: Case, folder: Path) -> None:
    pipe = case.make()
    old = getattr(pipe, case.component)
    with pytest.raises(LatentSpaceError, match="trained on other latents"):
        swap(pipe, stock_vae(case.channels, seed=8, **case.fixed))
    assert getattr(pipe, case.component) is old
    tuned = copy.deepcopy(old)
    with torch.no_grad():
        tuned.decoder.conv_out.weight.mul_(1.01)
    assert swap(pipe, tuned) is old


COLUMNS: dict[str, Callable[[Case, Path], None]] = {
    "runs as it comes": runs_as_stock,
    "runs with ours, as if built with it": runs_with_ours,
    "equals by hand": equals_by_hand,
    "saved, reloaded without latentvae": reloads_without_us,
    "model offload": offloads_models,
    "sequential offload": offloads_layers,
    "`optimize`, exact tiling": optimized_and_tiled,
    "refuses other channels": refuses_other_channels,
    "tells latent spaces apart": knows_latent_spaces,
}


@pytest.fixture(scope="session")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """Saves pipelines with ours in them, and runs them in one process that cannot import latentvae."""
    root, done = tmp_path_factory.mktemp("pipelines"), set()

    def reload(names: list[str]) -> Path:
        missing = [name for name in names if name not in done]
        if not missing:
            return root
        for name in missing:
            pipe = CASES[name].make()
            swap(pipe, ours(CASES[name]), allow_new_latent_space=True)
            pipe.save_pretrained(root / name)
        command = [sys.executable, "-c", RELOAD, *(str(root / name) for name in missing)]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        result = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        done.update(missing)
        return root

    return reload


def check_row(name: str, root: Path) -> None:
    """Run every column of a pipeline; compare with, or write, its row of the table."""
    cells = []
    for check in COLUMNS.values():
        try:
            check(CASES[name], root / name)
        except Exception as error:
            if not WRITING:
                raise
            cells.append(f"no: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            cells.append("yes")
    if WRITING:
        write_table({**read_table(), name: cells})
    assert read_table()[name] == cells, "run with LATENTVAE_WRITE_MATRIX=1 to write the table anew"


def read_table() -> dict[str, list[str]]:
    """The rows of the committed table."""
    text = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.strip().splitlines()[2:]]
    return {name.strip("`").removesuffix("Pipeline"): cells for name, *cells in rows}


def write_table(rows: dict[str, list[str]]) -> None:
    """Put rows into the page, in the order of CASES."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    lines = ["| pipeline | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| `{name}Pipeline` | " + " | ".join(rows[name]) + " |" for name in CASES if name in rows]
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


@pytest.mark.parametrize("name", QUICK)
def test_row(name: str, reloaded: Callable[[list[str]], Path]) -> None:
    check_row(name, reloaded(list(QUICK)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_other_rows(name: str, reloaded: Callable[[list[str]], Path]) -> None:
    check_row(name, reloaded([name for name in CASES if name not in QUICK]))


def test_table_has_every_row_and_column() -> None:
    header = PAGE.read_text(encoding="utf-8").partition(START)[2].strip().splitlines()[0]
    assert header == "| pipeline | " + " | ".join(COLUMNS) + " |"
    assert list(read_table()) == list(CASES)

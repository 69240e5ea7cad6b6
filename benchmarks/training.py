"""Our training step beside the plain one of public scripts: the same model, batch and losses, in one run.

    python benchmarks/training.py --model f8c4-small --batch 16 --crop 96

plain: fp32 (on CUDA: bf16 autocast), NCHW, the lpips package on both images with autograd bookkeeping, AdamW.
ours: channels_last, the target's LPIPS features without a graph, the recipes' optimizer; bf16 is autocast
over fp32 master weights, and `train.precision=auto` takes the faster of the two. Each case is a process;
they take turns, and the ratios are those of medians. On a CPU that others use, those of CPU seconds count.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import DEVICE, machine
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from latentvae.measure.lpips import load_lpips
from latentvae.models.latents import Posterior
from latentvae.models.presets import build
from latentvae.runtime.devices import has_fast_bfloat16
from latentvae.training.config import LossConfig, OptimConfig
from latentvae.training.losses import VAELoss
from latentvae.training.machine import keep_freed_memory
from latentvae.training.module import TrainableVAE
from latentvae.training.optim import build_optimizer

Step = Callable[[], None]


def plain_step(model: str, images: torch.Tensor, weights: Path) -> Step:
    """A step as public trainers write it."""
    from lpips import LPIPS

    device = images.device
    vae = build(model).to(device).train()
    perceptual = LPIPS(net="squeeze", pnet_rand=True, verbose=False).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(images).latent_dist
            reconstructions = vae.decode(posterior.sample()).sample.float()
        rec_loss = (images - reconstructions).abs() + perceptual(images, reconstructions)
        loss = rec_loss.sum() / images.shape[0] + 1e-6 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    model: str, images: torch.Tensor, weights: Path, optimizer: str, bf16: bool, compiled: bool = False
) -> Step:
    """A step as latentvae/training takes it."""
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # both as by default: train.cudnn_benchmark, train.tf32
    if images.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device, layout = images.device, torch.channels_last
    module = TrainableVAE(build(model)).to(device).to(memory_format=layout).train()
    if compiled:
        module.compile_blocks()
    loss = VAELoss(LossConfig(pixel="l1"), load_lpips("squeeze", weights)).to(device).to(memory_format=layout)
    updates = build_optimizer(module.vae, OptimConfig.model_validate({"name": optimizer}))
    images = images.to(memory_format=layout)
    side = images.shape[-1] // 8
    noise = torch.randn(images.shape[0], module.vae.config["latent_channels"], side, side, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = module(images, noise)
            nll, _ = loss.reconstruction(images, outputs.reconstructions.float())
            kl, _ = loss.kl(Posterior(outputs.moments), images[0].numel(), step=0)
        (nll + kl).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        updates.step()
        updates.zero_grad()

    return step


CASES: dict[str, Callable[[str, torch.Tensor, Path], Step]] = {
    "plain": plain_step,
    "ours, bf16": partial(our_step, optimizer="muon", bf16=True),
    "ours, fp32": partial(our_step, optimizer="muon", bf16=False),
    "ours, AdamW": partial(our_step, optimizer="adamw", bf16=has_fast_bfloat16(DEVICE)),
}


def measure(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Images per second and peak memory in GB of one case, in this process."""
    cuda = torch.cuda.is_available()
    shape = (arguments.batch, 3, arguments.crop, arguments.crop)
    images = torch.rand(shape, device="cuda" if cuda else "cpu") * 2 - 1
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        step = CASES[case](arguments.model, images, random_backbone(Path(folder)))
    seconds, cpu = [], []
    for _ in range(arguments.warmup + arguments.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "images_per_second": arguments.batch / statistics.median(seconds[arguments.warmup :]),
        "images_per_cpu_second": arguments.batch / statistics.median(cpu[arguments.warmup :]),
        "peak_gb": (torch.cuda.max_memory_allocated() if cuda else resident) / 1e9,
    }


def random_backbone(folder: Path) -> Path:
    """Weights of SqueezeNet's shape: the time does not depend on their values."""
    path = folder / "squeezenet1_1_features.safetensors"
    save_file(squeezenet1_1(weights=None).features.state_dict(), path)
    return path


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over rounds, and their ratios to the plain step."""
    table = {
        case: {key: statistics.median(run[key] for run in rounds) for key in rounds[0]}
        for case, rounds in runs.items()
    }
    for figures in table.values():
        for key in tuple(figures):
            figures[f"{key}_ratio"] = figures[key] / table["plain"][key]
    return table


def report(table: dict[str, dict[str, float]], arguments: argparse.Namespace) -> str:
    """The table in Markdown."""
    lines = [
        f"{arguments.model}, batch {arguments.batch}, {arguments.crop} px; {machine()}",
        "",
        "| step | images/s | ratio | images a CPU second | ratio | peak GB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, figures in table.items():
        keys = ("images_per_second", "images_per_cpu_second", "peak_gb")
        lines.append(
            f"| {case} | "
            + " | ".join(f"{figures[key]:.2f} | {figures[key + '_ratio']:.2f}" for key in keys)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every case in turn, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="f8c4-small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments)))
        return
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(arguments.rounds):
        for case in CASES:
            line = [sys.executable, __file__, *sys.argv[1:], "--case", case]
            result = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
            runs[case].append(json.loads(result.stdout.splitlines()[-1]))
    table = summarise(runs)
    print(report(table, arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "cases": table, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()

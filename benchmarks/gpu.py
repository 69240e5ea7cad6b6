"""All that is to be learned of a GPU in one call of a few minutes: its tests, then training steps.

    python benchmarks/gpu.py                 f8c4-small and f8c4, 200 steps of each case, 8 minutes in all
    python benchmarks/gpu.py --rehearse      the same path with a tiny model; also without a GPU

The cases are those of training.py, and ours with `train.compile`, each in a process of its own, so that peaks
are its own. Each ends after its steps or its share of the minutes, whichever comes first, and its line is
printed at once. The share of the roof is of the VAE's own operations, forward and backward (those of LPIPS
and of the optimizer are not counted), over what one large bf16 convolution reaches on this machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from machine import DEVICE, convolution_roof, machine
from torch.utils.flop_counter import FlopCounterMode
from training import Step, our_step, plain_step, random_backbone

from latentvae.models.presets import build

ROOT = Path(__file__).parents[1]
CASES = {
    "plain": plain_step,
    "ours": partial(our_step, optimizer="muon", bf16=True),
    "ours, compiled": partial(our_step, optimizer="muon", bf16=True, compiled=True),
}
SIZES = {"f8c4-small": (64, 192), "f8c4": (12, 256), "tiny": (2, 32)}  # batch and crop
WARMUP = 10  # steps that compile and choose algorithms
TESTS = 150.0  # seconds at most


def operations(model: str) -> float:
    """FLOP of the VAE in one step, forward and backward."""
    batch, crop = SIZES[model]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vae = build(model)
        latents = vae.encode(torch.empty(batch, 3, crop, crop)).latent_dist.mean
        vae.decode(latents).sample.sum().backward()
    return float(counter.get_total_flops())


def measure(case: str, model: str, steps: int, limit: float) -> dict[str, float]:
    """Steps that were done, seconds of one, and peak memory in GB, in this process."""
    begun = time.perf_counter()
    batch, crop = SIZES[model]
    images = torch.rand(batch, 3, crop, crop, device=DEVICE) * 2 - 1
    with tempfile.TemporaryDirectory() as folder:
        step: Step = CASES[case](model, images, random_backbone(Path(folder)))
    taken: list[float] = []
    for _ in range(WARMUP + steps):
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        if time.perf_counter() - begun > limit:
            break
    seconds = taken[WARMUP:] or taken[-1:]  # short of time, the last is better than none
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else float("nan")
    return {
        "steps": len(seconds),
        "seconds": statistics.median(seconds),
        "peak": peak,
        "ready": time.perf_counter() - begun - sum(seconds),
    }


def line(model: str, case: str, roof: float, arguments: list[str], limit: float) -> str:
    """A row of the table; what fails says so in its place."""
    call = [sys.executable, __file__, *arguments, "--case", case, "--model", model, "--limit", str(limit)]
    try:
        # twice its share: the limit is looked at between steps, and compiling is one
        result = subprocess.run(call, capture_output=True, text=True, timeout=2 * limit + 60, check=False)
    except subprocess.TimeoutExpired:
        return f"| {model} | {case} | not ready in time | | | | |"
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"| {model} | {case} | failed: {reason} | | | | |"
    found = json.loads(result.stdout.splitlines()[-1])
    rate, share = SIZES[model][0] / found["seconds"], operations(model) / found["seconds"] / roof
    figures = f"{rate:.1f} | {share:.1%} | {found['peak']:.2f} | {found['ready']:.0f}"
    return f"| {model} | {case} | {found['steps']} | {figures} |"


def main() -> None:
    """Run the tests, then each case, and print what is known as soon as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rehearse", action="store_true", help="the tiny model, whatever the machine")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.model, arguments.steps, arguments.limit)))
        return
    if DEVICE.type != "cuda" and not arguments.rehearse:
        raise SystemExit("there is no CUDA GPU; --rehearse takes the same path on this machine")
    end = time.monotonic() + 60 * arguments.minutes
    print(machine(), flush=True)
    call = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider"]
    try:
        subprocess.run([*call, "tests/test_gpu.py"], cwd=ROOT, timeout=TESTS, check=False)
    except subprocess.TimeoutExpired:
        print(f"tests stopped after {TESTS:.0f} s", flush=True)
    roof = convolution_roof(torch.bfloat16)
    print(f"bf16 convolutions: {roof / 1e12:.2f} TFLOP/s\n")
    print("| model | step | steps | images/s | of the roof | peak GB | s until steps counted |")
    print("|---|---|---|---|---|---|---|", flush=True)
    models = ["tiny"] if arguments.rehearse else ["f8c4-small", "f8c4"]
    left = [(model, case) for model in models for case in CASES]
    while left:
        model, case = left[0]
        limit = max(1.0, (end - time.monotonic()) / len(left) - 10)  # starting a process takes some
        print(line(model, case, roof, ["--steps", str(arguments.steps)], limit), flush=True)
        left.pop(0)


if __name__ == "__main__":
    main()

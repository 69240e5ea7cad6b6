"""Encode and decode beside stock diffusers: time, memory, error, and the share of the convolution roof.

    python benchmarks/inference.py --sides 512 1024 --precisions fp32
    python benchmarks/inference.py --ablation       # what each switch of `optimize` is worth, at 512 px
    python benchmarks/inference.py --small          # the bundled model beside AutoencoderTiny's architecture
    python benchmarks/inference.py --plan --sides 1024 2048   # memory beside what `latentvae plan` says of it
    python benchmarks/inference.py --peers --model f8c4-small --sides 256   # beside other engines: peers.py

Each case is a process of its own, and all run in one go; ratios are against stock in the same precision's
layout as it comes (fp32, NCHW), unless a row says otherwise. Weights are random: neither time nor memory
depends on their values.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peers
import torch
from diffusers import AutoencoderTiny
from machine import DEVICE, Peak, convolution_roof, machine, seconds
from torch.utils.flop_counter import FlopCounterMode

from latentvae.models.presets import build
from latentvae.runtime import memory
from latentvae.runtime.optimize import optimize
from latentvae.runtime.tiling import fitting
from latentvae.runtime.tiling.switch import enable_exact_tiling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VERBS = ("decode", "encode")
WAYS = ("stock", "optimized", "exact tiling", "diffusers tiling")
SWITCHES = ("upsample", "norm", "residual", "winograd", "channels_last")
ABLATION = ("stock", "optimized", *(f"without {switch}" for switch in SWITCHES), "compiled")
SMALL = ("AutoencoderTiny", "f8c4-small stock", "f8c4-small optimized")
SIZES = {"SD-size": "f8c4", "FLUX-size": "f8c16"}
PLANNED = ("whole", "tiles, maps in memory", "tiles, maps on disk")
PLANNED_WITH = 16e9  # bytes that count as free, as of `latentvae plan --memory 16`
Figures = dict[str, Any]


def prepare(way: str, dtype: torch.dtype) -> Any:
    """The model of one case, ready to run."""
    torch.manual_seed(0)
    if way == "AutoencoderTiny":
        return AutoencoderTiny().to(DEVICE, dtype).to(memory_format=torch.channels_last).eval()
    preset = "f8c4-small" if way.startswith("f8c4-small") else "f8c4"
    vae = build(preset).to(DEVICE, dtype).eval()
    if way == "f8c4-small stock":
        vae.to(memory_format=torch.channels_last)
    elif way == "diffusers tiling":
        vae.enable_tiling()
    elif way.startswith("without "):
        optimize(vae, **{way.removeprefix("without "): False})
    elif way != "stock":
        optimize(vae, compile=way == "compiled")
    if way == "exact tiling":
        enable_exact_tiling(vae)
    return vae


def measure(case: Figures, output: Path) -> Figures:
    """Seconds and peak bytes of one case in this process; its result goes to `output`."""
    vae = prepare(case["way"], DTYPES[case["precision"]])
    side = case["side"]
    random = torch.Generator().manual_seed(1)
    shape = (1, 3, side, side) if case["verb"] == "encode" else (1, 4, side // 8, side // 8)
    inputs = torch.randn(shape, generator=random).clamp(-1, 1).to(DEVICE, DTYPES[case["precision"]])

    @torch.no_grad()
    def run() -> torch.Tensor:
        if case["verb"] == "decode":
            return vae.decode(inputs).sample
        encoded = vae.encode(inputs)
        return encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.parameters

    with Peak() as peak:
        start = time.perf_counter()
        result = run().float().cpu()
        first = time.perf_counter() - start
    torch.save(result, output)
    del result
    return {
        "seconds": seconds(run, case["repeats"], warmup=0) if case["repeats"] else first,
        "peak": peak.bytes,
    }


def measure_plan(case: Figures) -> Figures:
    """Bytes that one case takes in this process, and that `latentvae plan` says it takes."""
    vae = optimize(build(case["model"]).to(DEVICE, DTYPES[case["precision"]]).eval())
    side, free = case["side"], PLANNED_WITH
    found = fitting.ways(vae, side, side, 512, free, dict.fromkeys(VERBS, 1e12))
    place = (case["verb"], case["way"] != "whole", case["way"] == "tiles, maps on disk")
    (planned,) = (way for way in found if (way.verb, way.tile_size is not None, way.on_disk) == place)
    with tempfile.TemporaryDirectory() as scratch:
        if case["way"] != "whole":
            on_disk = Path(scratch) if planned.on_disk else None
            enable_exact_tiling(vae, 512, on_disk, memory=memory.SHARE * free)
        channels = 3 if case["verb"] == "encode" else vae.config["latent_channels"]
        side //= 1 if case["verb"] == "encode" else 8
        inputs = torch.zeros(1, channels, side, side, device=DEVICE, dtype=vae.dtype)
        start = time.perf_counter()
        with torch.no_grad(), Peak() as peak:
            if case["verb"] == "encode":
                vae.encode(inputs)
            else:
                vae.decode(inputs)
    return {"planned": planned.peak_bytes, "peak": peak.bytes, "seconds": time.perf_counter() - start}


def beside_plan(sides: list[int], precisions: list[str], verbs: list[str]) -> list[Figures]:
    """Each way of SD-size and FLUX-size models, in a process of its own; a table as it goes."""
    print("| model | case | planned GB | measured GB | planned / measured |\n|---|---|---|---|---|")
    results = []
    for model, side, precision, verb in itertools.product(SIZES, sides, precisions, verbs):
        for way in PLANNED:
            case = {"model": SIZES[model], "side": side, "precision": precision, "verb": verb, "way": way}
            line = [sys.executable, __file__, "--case", json.dumps(case)]
            child = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
            name = f"| {model} | {verb} {side} {precision} {way} |"
            if child.returncode:
                print(f"{name} ended with {child.returncode} | | |", flush=True)
                continue
            results.append({**case, **json.loads(child.stdout.splitlines()[-1])})
            planned, peak = results[-1]["planned"], results[-1]["peak"]
            print(f"{name} {planned / 1e9:.2f} | {peak / 1e9:.2f} | {planned / peak:.2f} |", flush=True)
    return results


def flop(verb: str, side: int) -> float:
    """What stock computes, counted on tensors without data."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        vae = build("f8c4")
        if verb == "encode":
            vae.encode(torch.empty(1, 3, side, side))
        else:
            vae.decode(torch.empty(1, 4, side // 8, side // 8))
    return float(counter.get_total_flops())


def in_child(case: Figures, folder: Path) -> Figures:
    """One case in a process of its own, with its error against stock fp32."""
    name = f"{case['verb']}-{case['side']}-{case['precision']}-{case['way']}.pt"
    line = [sys.executable, __file__, "--case", json.dumps(case), "--output", str(folder / name)]
    child = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:  # out of memory, most likely: said in the table
        return {**case, "failed": f"ended with {child.returncode}"}
    figures = {**case, **json.loads(child.stdout.splitlines()[-1])}
    reference = folder / f"{case['verb']}-{case['side']}-fp32-stock.pt"
    if reference.exists() and case["way"] not in SMALL:
        wanted, got = torch.load(reference), torch.load(folder / name)
        figures["error"] = ((got - wanted).abs().max() / (wanted.max() - wanted.min())).item()
    if name != reference.name:
        (folder / name).unlink()
    return figures


def rows(results: list[Figures], roofs: dict[str, float]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| case | s | x stock fp32 | peak GB | x | error of range | of the roof |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in results:
        name = f"{each['verb']} {each['side']} {each['precision']} {each['way']}"
        if "failed" in each:
            lines.append(f"| {name} | {each['failed']} | | | | | |")
            continue
        first = next(r for r in results if (r["verb"], r["side"]) == (each["verb"], each["side"]))
        faster, leaner = (first.get(key, 0) / max(each[key], 1e-9) for key in ("seconds", "peak"))
        share = ""
        if each["way"] not in SMALL:
            rate = flop(each["verb"], each["side"]) / each["seconds"]
            share = f"{rate / roofs[each['precision']]:.0%}"
        error = f"{each['error']:.1e}" if "error" in each else ""
        lines.append(
            f"| {name} | {each['seconds']:.2f} | {faster:.2f} | {each['peak'] / 1e9:.2f} | {leaner:.2f} "
            f"| {error} | {share} |"
        )
    return lines


def cases(arguments: argparse.Namespace) -> list[Figures]:
    """What is measured, the case that others are compared with first."""
    ways = SMALL if arguments.small else ABLATION if arguments.ablation else arguments.ways
    sides = [512] if arguments.small or arguments.ablation else arguments.sides
    found = []
    for verb in arguments.verbs:
        for side in sides:
            for precision in arguments.precisions:
                for way in ways:
                    if side <= 512 and "tiling" in way:
                        continue  # one tile
                    repeats = 5 if arguments.small else 2 if side <= 512 else 0  # long runs are timed once
                    found.append(
                        {"verb": verb, "side": side, "precision": precision, "way": way, "repeats": repeats}
                    )
    return found


def main() -> None:
    """Measure every case, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=VERBS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--ablation", action="store_true", help="what each switch of optimize is worth")
    parser.add_argument("--plan", action="store_true", help="memory beside what `latentvae plan` says")
    parser.add_argument("--peers", action="store_true", help="beside other engines, at each of --sides")
    parser.add_argument(
        "--model", default="f8c4", help="of --peers: a preset, random, or a model by its path"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of --peers: turns of each way")
    parser.add_argument("--patience", type=float, default=900, help="of --peers: seconds to be ready in")
    parser.add_argument("--wait", action="store_true", help="of --peers: for Enter before the turns")
    parser.add_argument(
        "--cpu", action="store_true", help="of --peers: CPU seconds of one thread, on busy cores"
    )
    parser.add_argument("--without", nargs="*", default=[], choices=peers.PEERS, help="of --peers: left out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    results: Any
    if arguments.case:
        of_plan = arguments.case["way"] in PLANNED
        print(
            json.dumps(measure_plan(arguments.case) if of_plan else measure(arguments.case, arguments.output))
        )
        return
    if arguments.plan:
        results = beside_plan(arguments.sides, arguments.precisions, arguments.verbs)
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine(), "runs": results}, indent=1))
        return
    if arguments.peers:
        results = {}
        for side in arguments.sides:
            what = (arguments.model, side, arguments.verbs, arguments.precisions)
            how = {name: getattr(arguments, name) for name in ("wait", "cpu", "without")}
            results[side] = peers.compare(*what, arguments.rounds, arguments.patience, **how)
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine(), "runs": results}, indent=1))
        return
    roofs = {precision: convolution_roof(DTYPES[precision]) for precision in arguments.precisions}
    with tempfile.TemporaryDirectory() as folder:
        results = [in_child(case, Path(folder)) for case in cases(arguments)]
    roof = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in roofs.items())
    print("\n".join([f"{machine()}; convolution roof: {roof}", "", *rows(results, roofs)]))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "roofs": roofs, "runs": results}, indent=1)
        )


if __name__ == "__main__":
    main()

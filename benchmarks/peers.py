"""Ours beside torch.compile, ONNX Runtime and OpenVINO, as their users run them: `inference.py --peers`.

One static size, one image at a time, all of torch's threads, OpenVINO with its latency hint. Each way is a
process of its own; all are made ready, one after the other, and then take turns, so that whatever else the
machine does meets all of them alike. Weights are random unless a model is named. What a way does before its
first picture (converting, compiling, that picture itself) begins with the loaded model and has a limit; the
peak is the memory of this above the loaded model.
"""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import Peak, machine
from torch import nn

from latentvae.models.loading import cast, load
from latentvae.models.presets import PRESETS, build
from latentvae.runtime.graphs import tracing
from latentvae.runtime.optimize import optimize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
PEERS = ("torch.compile", "ONNX Runtime", "OpenVINO")
OURS = ("ours", "ours, backend=openvino")
Figures = dict[str, Any]
Run = Callable[[torch.Tensor], torch.Tensor]


def half_of(vae: Any, verb: str) -> nn.Module:
    """What `encode` or `decode` computes, as one module."""
    pair = (vae.encoder, vae.quant_conv) if verb == "encode" else (vae.post_quant_conv, vae.decoder)
    return nn.Sequential(*(module for module in pair if module is not None)).eval()


def by_torch(vae: Any, verb: str, dtype: torch.dtype) -> Run:
    """Of a VAE that is as it should be: by its own functions."""
    if verb == "encode":
        return lambda x: vae.encode(x.to(dtype)).latent_dist.parameters
    return lambda x: vae.decode(x.to(dtype)).sample


def by_onnx_runtime(half: nn.Module, example: torch.Tensor, folder: Path) -> Run:
    """Exported for this size, with all of the runtime's optimisations, which are its default."""
    import onnxruntime

    path = folder / "model.onnx"
    torch.onnx.export(half, (example,), path, opset_version=18, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def by_openvino(half: nn.Module, example: torch.Tensor, precision: str) -> Run:
    """Converted as it is, for this size."""
    model = tracing.openvino_model(half, example)
    model.reshape(list(example.shape))
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    settings["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[precision]
    request = tracing.openvino().Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[0].copy())


def prepare(way: str, vae: Any, verb: str, example: torch.Tensor, precision: str, folder: Path) -> Run:
    """A way to run one verb."""
    dtype = DTYPES[precision]
    if way == "ONNX Runtime":
        return by_onnx_runtime(half_of(vae, verb), example, folder)
    if way == "OpenVINO":
        return by_openvino(half_of(vae, verb), example, precision)
    if way.startswith("ours"):
        optimize(vae, dtype=dtype, backend="torch" if way == "ours" else "openvino")
    else:
        cast(vae, dtype)
    if way == "torch.compile":  # and channels_last: what diffusers' documentation advises
        vae.to(memory_format=torch.channels_last)
        name = "encoder" if verb == "encode" else "decoder"
        setattr(vae, name, torch.compile(getattr(vae, name)))
    return by_torch(vae, verb, dtype)


@torch.no_grad()
def serve(way: str, case: argparse.Namespace, folder: Path) -> None:
    """Make a way ready, leave its results in `folder`, and run a verb for each line of standard input."""
    runs, first, peak = {}, {}, {}
    for verb in case.verbs:
        torch.manual_seed(0)
        vae = build(case.model) if case.model in PRESETS else load(case.model)
        vae.eval().requires_grad_(False)
        delattr(vae, "decoder" if verb == "encode" else "encoder")  # its memory: all ways wait side by side
        side = case.side if verb == "encode" else case.side // 8
        channels = vae.config["in_channels" if verb == "encode" else "latent_channels"]
        x = torch.randn(1, channels, side, side).clamp(-1, 1)
        start = time.perf_counter()
        with Peak() as needed:
            run = prepare(way, vae, verb, x, case.precision, folder)
            result = run(x)
        first[verb], peak[verb] = time.perf_counter() - start, needed.bytes
        torch.save(result.double(), folder / f"{verb}.pt")
        runs[verb] = functools.partial(run, x)
    print(json.dumps({"first": first, "peak": peak}), flush=True)
    clock = time.process_time if case.cpu else time.perf_counter
    for line in sys.stdin:
        start = clock()
        runs[line.strip()]()
        print(clock() - start, flush=True)


class Way:
    """One way as a process, and its figures of each verb; or why there are none."""

    def __init__(
        self, way: str, precision: str, case: argparse.Namespace, folder: Path, patience: float
    ) -> None:
        self.way, self.precision, self.place, self.failed = way, precision, folder / f"{way}-{precision}", ""
        self.times: dict[str, list[float]] = {verb: [] for verb in case.verbs}
        self.place.mkdir()
        given = json.dumps({**vars(case), "precision": precision, "way": way})
        line = [sys.executable, "-W", "ignore", __file__, given, str(self.place)]
        self.child = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        late = threading.Timer(patience, self._give_up, [f"not ready after {patience:.0f} s"])
        late.start()
        said = self.child.stdout.readline()  # type: ignore[union-attr]
        late.cancel()
        self.ready = json.loads(said) if said else {}
        if not said and not self.failed:
            self.failed = f"ended with {self.child.wait()}"

    def _give_up(self, reason: str) -> None:
        self.failed = reason
        os.killpg(self.child.pid, signal.SIGKILL)  # its own session: with the compilers that it started

    def turns(self, count: int) -> None:
        """Run each verb so often."""
        for verb, times in count * list(self.times.items()):
            print(verb, file=self.child.stdin, flush=True)
            times.append(float(self.child.stdout.readline()))  # type: ignore[union-attr]

    def close(self) -> None:
        """End the process."""
        self.child.stdin.close()  # type: ignore[union-attr]
        self.child.wait()

    def figures(self, reference: Path) -> list[Figures]:
        """For each verb: seconds, best of all turns, and the error against the results in `reference`."""
        found = []
        for verb, times in self.times.items():
            figures: Figures = {"way": self.way, "precision": self.precision, "verb": verb}
            if self.failed:
                found.append({**figures, "failed": self.failed})
                continue
            wanted, got = (torch.load(each / f"{verb}.pt") for each in (reference, self.place))
            error = ((got - wanted).abs().max() / (wanted.max() - wanted.min())).item()
            figures |= {name: of_verb[verb] for name, of_verb in self.ready.items()}
            found.append({**figures, "seconds": min(times), "all": times, "error": error})
        return found


def rows(results: list[Figures]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| case | s | x stock fp32 | x the fastest peer | ready after, s | peak GB | error of range |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for each in results:
        name = f"{each['verb']} {each.get('precision', '')} {each['way']}"
        if "failed" in each:
            lines.append(f"| {name} | {each['failed']} | | | | | |")
            continue
        alike = [one for one in results if one["verb"] == each["verb"] and "failed" not in one]
        stock = next(one["seconds"] for one in alike if one["way"] == "stock")
        peers = [o["seconds"] for o in alike if o["way"] in PEERS and o["precision"] == each["precision"]]
        beside = f"{min(peers) / each['seconds']:.2f}" if peers else ""
        lines.append(
            f"| {name} | {each['seconds']:.3f} | {stock / each['seconds']:.2f} | {beside} "
            f"| {each['first']:.1f} | {each['peak'] / 1e9:.2f} | {each['error']:.1e} |"
        )
    return lines


def compare(
    model: str,
    side: int,
    verbs: Sequence[str],
    precisions: Sequence[str],
    rounds: int,
    patience: float,
    *,
    wait: bool = False,
    cpu: bool = False,
    without: Sequence[str] = (),
) -> list[Figures]:
    """Make every way ready, let them take turns, and print a table.

    Args:
        rounds: turns of each way; the best counts.
        patience: seconds that a way may take until it is ready.
        wait: for a line of standard input between getting ready and the turns.
        cpu: seconds are one thread's on the processor, which others on the cores hardly change. Then each way
            has its turns as soon as it is ready, and ends.
        without: engines that are left out.
    """
    if cpu and torch.get_num_threads() > 1:
        raise SystemExit(
            "--cpu came with several threads, which burn time while they wait: OMP_NUM_THREADS=1."
        )
    case = argparse.Namespace(model=model, side=side, verbs=list(verbs), cpu=cpu)
    wanted = [("stock", "fp32"), *((way, one) for one in precisions for way in (*OURS, *PEERS))]
    wanted = [each for each in wanted if each[0] not in without]
    wanted = [each for each in wanted if each != ("ONNX Runtime", "bf16")]  # it has no such kernels for CPUs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = Way("stock", "fp64", case, folder, patience)
        reference.close()
        ways = []
        for each in wanted:
            way = Way(*each, case, folder, patience)
            ways.append(way)
            if cpu and not way.failed:  # what others do meanwhile hardly matters, and memory does
                way.turns(rounds)
                way.close()
        for needed in (reference, ways[0]):
            if needed.failed:
                raise SystemExit(f"{needed.way} in {needed.precision}: {needed.failed}")
        if wait:
            print("ready: a line of input begins the turns", file=sys.stderr, flush=True)
            sys.stdin.readline()
        for way in [way for _ in range(rounds) for way in ways if not (cpu or way.failed)]:
            way.turns(1)
        for way in ways:
            way.close()
        results = [figures for way in ways for figures in way.figures(reference.place)]
    results.sort(key=lambda each: list(verbs).index(each["verb"]))
    threads = torch.get_num_threads()
    print(
        "\n".join(
            [f"{model}, {side} px, {threads} threads{', CPU seconds' * cpu}; {machine()}", "", *rows(results)]
        ),
        flush=True,
    )
    return results


if __name__ == "__main__":
    case = argparse.Namespace(**json.loads(sys.argv[1]))
    serve(case.way, case, Path(sys.argv[2]))

"""What pictures of every step cost beside the steps: `latentvae.preview` in Stable Diffusion's pipeline.

    python benchmarks/preview.py [--unets tiny sd] [--sides 256 512] [--steps 4] [--vae sd-small]

The UNets are of Stable Diffusion's class and compute as trained ones do; their weights are zeros, as only
time is measured. Guidance is on (two passes a step), the picture is written as a PNG. Medians of the steps
after the first.
"""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from machine import machine

import latentvae
from latentvae.models.loading import cast
from latentvae.pipelines.preview import Preview
from latentvae.runtime.devices import has_fast_bfloat16

# one that is small enough to be no excuse, and Stable Diffusion 1.5's
UNETS: dict[str, dict[str, Any]] = {
    "tiny": {"cross_attention_dim": 32, "attention_head_dim": 8, "block_out_channels": (32, 64, 128, 128)},
    "sd": {"cross_attention_dim": 768, "attention_head_dim": 8},
}
HEADER = "| UNet | parameters, M | picture, px | s for a step | s for its picture | share | with `every=5` |"


def pipeline(size: str, vae: Any, device: torch.device) -> Any:
    """Stable Diffusion's, without a text encoder: embeddings are given to it."""
    with torch.device("meta"):  # or drawing the weights would take longer than the steps
        unet = UNet2DConditionModel(sample_size=64, **UNETS[size])
    dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    unet = cast(unet, dtype).to_empty(device=device)
    for parameter in unet.parameters():
        parameter.data.zero_()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(pipe: Any, name: str, side: int, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of its picture."""
    marks: list[tuple[float, float]] = []  # the clock, and what of it was previews

    def shown(pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        found = each(pipe, step, timestep, arguments)
        marks.append((time.perf_counter(), each.seconds))
        return found

    width = pipe.unet.config.cross_attention_dim
    words = torch.zeros(1, 77, width, dtype=pipe.unet.dtype, device=pipe.unet.device)
    with tempfile.TemporaryDirectory() as folder, latentvae.preview(pipe, folder, vae=name) as each:
        check(each)
        pipe(
            prompt_embeds=words,
            negative_prompt_embeds=words,
            height=side,
            width=side,
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=shown,
        )
    found = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(marks)]
    picture = statistics.median(drawn for _, drawn in found)
    return statistics.median(whole - drawn for whole, drawn in found), picture


def check(each: Preview) -> None:
    """Previews that fail are only warned of: see that there is a decoder before minutes are spent."""
    shape = (1, each.vae.config["latent_channels"], 8, 8)
    each.vae.decode(torch.zeros(shape, dtype=each.vae.dtype, device=each.vae.device))


def main() -> None:
    """Measure every UNet at every size, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unets", nargs="+", choices=list(UNETS), default=list(UNETS))
    parser.add_argument("--sides", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--steps", type=int, default=4, help="at least 2; the first is not counted")
    parser.add_argument("--vae", default="sd-small", help="what decodes the pictures")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_grad_enabled(False)
    print(machine())
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    for size in arguments.unets:
        pipe = pipeline(size, latentvae.load(arguments.vae, device=device), device)
        millions = sum(parameter.numel() for parameter in pipe.unet.parameters()) / 1e6
        for side in arguments.sides:
            step, picture = measure(pipe, arguments.vae, side, arguments.steps)
            share, seldom = (part / (part + step) for part in (picture, picture / 5))
            cells = (
                size,
                f"{millions:.0f}",
                side,
                f"{step:.3f}",
                f"{picture:.3f}",
                f"{share:.1%}",
                f"{seldom:.1%}",
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()

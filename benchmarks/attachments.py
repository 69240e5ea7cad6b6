"""What asking at every call costs, and whether a seamless texture is one.

python benchmarks/attachments.py                       # share of a 256 px decode of the bundled model
python benchmarks/attachments.py --texture FILE.png    # 1024 px, whole and tiled, rolled by half
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from latentvae.images.saving import save_image
from latentvae.models.loading import load
from latentvae.runtime import forwards, patches, plain
from latentvae.runtime.optimize import optimize
from latentvae.runtime.patches import restore
from latentvae.runtime.seamless import make_seamless
from latentvae.runtime.tiling.switch import enable_exact_tiling

QUESTIONS = ("takes_ours", "is_changed", "is_plain", "is_simple", "is_nearest", "is_3x3")


@torch.no_grad()
def share_of_questions(vae: Any, repeats: int = 5) -> tuple[float, float]:
    """Seconds of a decode on one core, and of the questions in it, which are noted and asked again alone."""
    torch.set_num_threads(
        1
    )  # so that processor time, which other programs lengthen little, is that of the decode
    latents = torch.randn(1, 4, 32, 32)
    optimize(vae).decode(latents)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        vae.decode(latents)
        times.append(time.process_time() - start)
    asked: list[tuple[Any, Any]] = []
    real = {name: getattr(plain, name) for name in QUESTIONS}
    transformed = patches.transformed
    for name, question in real.items():
        setattr(
            forwards,
            name,
            lambda *args, question=question: (asked.append((question, args)), question(*args))[1],
        )
    patches.transformed = lambda: (asked.append((transformed, ())), transformed())[1]
    vae.decode(latents)
    for name, question in real.items():
        setattr(forwards, name, question)
    patches.transformed = transformed
    alone = []
    for _ in range(20):
        start = time.process_time()
        for question, args in asked:
            question(*args)
        alone.append(time.process_time() - start)
    return min(times), min(alone)


def jump(image: torch.Tensor) -> float:
    """The mean step over the wrapped borders of (1, 3, H, W), as a multiple of the mean step inside."""
    steps = [(image.roll(-1, axis) - image).abs() for axis in (2, 3)]
    over = torch.stack([steps[0][:, :, -1].mean(), steps[1][..., -1].mean()])
    inside = torch.stack([steps[0][:, :, :-1].mean(), steps[1][..., :-1].mean()])
    return float((over / inside).mean())


@torch.no_grad()
def texture(vae: Any, file: Path) -> None:
    """Print the jumps of stock, seamless, and seamless in tiles; save the last, rolled by half."""
    torch.manual_seed(0)
    noise = torch.fft.fft2(torch.randn(1, 4, 128, 128))
    radius = sum(
        torch.meshgrid(torch.fft.fftfreq(128) ** 2, torch.fft.fftfreq(128) ** 2, indexing="ij")
    ).sqrt()
    latents = torch.fft.ifft2(noise / (radius + 0.02)).real  # of clouds, that tile
    latents = latents / latents.std() / vae.config["scaling_factor"]
    stock = vae.decode(latents).sample
    whole = make_seamless(vae).decode(latents).sample
    tiled = enable_exact_tiling(vae, 256, memory=0).decode(latents).sample
    for name, image in (("stock", stock), ("whole", whole), ("tiled", tiled)):
        print(f"{name}: {jump(image.clamp(-1, 1)):.2f} times the mean step inside")
    difference = float((tiled - whole).abs().max() / (whole.max() - whole.min()))
    print(f"tiled against whole: {difference:.1e} of the range")
    restore(vae)
    save_image(tiled.clamp(-1, 1).roll((512, 512), (2, 3)), file)
    save_image(stock.clamp(-1, 1).roll((512, 512), (2, 3)), file.with_stem(file.stem + ".stock"))


def main() -> None:
    """Print the one or the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texture", type=Path)
    options = parser.parse_args()
    vae = load("f8c4-small").eval()
    if options.texture is not None:
        texture(vae, options.texture)
        return
    decode, questions = share_of_questions(vae)
    print(f"decode {decode * 1e3:.1f} ms, questions {questions * 1e3:.2f} ms: {questions / decode:.2%}")


if __name__ == "__main__":
    main()

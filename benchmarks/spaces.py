"""Students of latent spaces beside their teachers: agreement of latents, and pictures crossed both ways.

    python benchmarks/spaces.py sd-small=TEACHERS/taesd flux-small=TEACHERS/taef1 \\
        --images PHOTOS/kodak PHOTOS/val --lpips-weights LPIPS [--every 2] [--output docs/spaces.json]

    python benchmarks/spaces.py flux-small=TEACHERS/taef1 --images PHOTOS/kodak --picture docs/spaces.png \\
        --crops 04:120,250 08:0,256 13:180,256

Each STUDENT=TEACHER pair is measured on every folder: R2 and correlation of scaled latents, offsets per
channel, and PSNR, SSIM and LPIPS-alex of the four pictures (student or teacher encodes, student or teacher
decodes), from the posteriors' modes with 8-bit rounding, each beside what the teacher has alone. --picture
draws crops instead: of each pair the original, the teacher, the student on the teacher's latents, and alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import machine

from latentvae.images.drawing import grid
from latentvae.images.reading import find_images, load_image
from latentvae.measure.lpips import load_lpips
from latentvae.measure.spaces import SpaceAgreement, compare_spaces
from latentvae.models.spaces import decode_scaled, encode_scaled, load_autoencoder

SIDE = 256  # of crops, pixels

HEADER = (
    "| student, teacher | images | R2 | correlation | student alone | teacher's latents, student's decoder "
    "| student's latents, teacher's decoder | teacher alone |"
)


def measure_pair(pair: str, folder: Path, arguments: argparse.Namespace) -> SpaceAgreement:
    """One student beside its teacher, on one folder."""
    student, _, teacher = pair.partition("=")
    models = [load_autoencoder(name) for name in (student, teacher)]
    files = find_images(folder)[:: arguments.every]
    images = ((file.name, load_image(file)) for file in files)
    return compare_spaces(*models, images, load_lpips("alex", arguments.lpips_weights))


def row(pair: str, folder: Path, found: SpaceAgreement) -> str:
    """One line of the table, as Markdown."""
    figures = {way: summary.as_dict()["mean"] for way, summary in found.pictures.items()}
    own = figures["teacher_teacher"]

    def cell(way: str) -> str:
        """PSNR, SSIM, LPIPS, and what they are beside the teacher's own."""
        psnr, ssim, lpips = (figures[way][name] for name in ("psnr", "ssim", "lpips"))
        beside = (
            ""
            if way == "teacher_teacher"
            else f" ({psnr - own['psnr']:+.2f} dB, {lpips / own['lpips']:.2f} x)"
        )
        return f"{psnr:.2f} dB, {ssim:.3f}, {lpips:.3f}{beside}"

    ways = ("student_student", "teacher_student", "student_teacher", "teacher_teacher")
    student, _, teacher = pair.partition("=")
    name = f"{Path(student).name}, {Path(teacher).name}"
    cells = (name, f"{folder.name} ({found.image_count})", f"{found.r2:.4f}", f"{found.correlation:.4f}")
    return f"| {' | '.join([*cells, *map(cell, ways)])} |"


def draw(arguments: argparse.Namespace) -> None:
    """Crops of all pairs below one another, decoded from whole images."""
    rows = []
    for pair in arguments.pairs:
        student, teacher = (load_autoencoder(name) for name in pair.partition("=")[::2])
        for crop in arguments.crops:
            name, _, place = crop.partition(":")
            left, top = map(int, place.split(","))
            image = load_image(find_images([arguments.images[0] / f"{name}.png"])[0])[None]
            own, learned = (encode_scaled(model, image) for model in (teacher, student))
            ways = ((teacher, own), (student, own), (student, learned))
            shown = [image, *(decode_scaled(model, scaled) for model, scaled in ways)]
            rows.append([each[0, :, top : top + SIDE, left : left + SIDE].clamp(-1, 1) for each in shown])
    titles = ("original", "teacher", "student, teacher's latents", "student alone")
    grid(rows, titles).quantize(256).save(arguments.picture, optimize=True)


def main() -> None:
    """Measure all pairs on all folders; print the table, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", metavar="STUDENT=TEACHER")
    parser.add_argument("--images", nargs="+", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="Only every so many images of a folder.")
    parser.add_argument("--lpips-weights", type=Path)
    parser.add_argument("--output", type=Path, help="JSON with all figures.")
    parser.add_argument("--picture", type=Path, help="Draw crops to this PNG instead.")
    parser.add_argument("--crops", nargs="+", default=[], metavar="NAME:LEFT,TOP")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.picture:
        return draw(arguments)
    results: list[dict[str, Any]] = []
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    for pair in arguments.pairs:
        for folder in arguments.images:
            found = measure_pair(pair, folder, arguments)
            print(row(pair, folder, found), flush=True)
            results.append({"pair": pair, "images": folder.name, **found.as_dict()})
    if arguments.output:
        report = {"machine": machine(), "every": arguments.every, "results": results}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

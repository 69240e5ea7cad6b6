"""Students of latent spaces beside their teachers: agreement of latents, and pictures crossed both ways.

    python benchmarks/spaces.py ./sd-small=TEACHERS/taesd ./flux-small=TEACHERS/taef1 \\
        --images PHOTOS/kodak --lpips-weights LPIPS [--every 2] \\
        --figures docs/spaces.json --pages docs/models.md README.md

    python benchmarks/spaces.py flux-small=TEACHERS/taef1 --images PHOTOS/kodak --picture docs/spaces.png \\
        --crops 04:120,250 08:0,256 13:180,256

Each STUDENT=TEACHER pair is measured on every folder: R2 and correlation of scaled latents, offsets per
channel, and PSNR, SSIM and LPIPS-alex of the four pictures (student or teacher encodes, student or teacher
decodes), from the posteriors' modes with 8-bit rounding, each beside what the teacher has alone. The figures
take the place of earlier ones of the same pair and folder, and the page's tables are written from all of
them. --picture draws crops instead: of each pair the original, the teacher, the student on the teacher's
latents, and alone. A bundled name is the bundled model: write ./NAME for a folder of that name.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import machine
from model_tables import SETS, fill

from latentvae.images.drawing import grid
from latentvae.images.reading import find_images, load_image
from latentvae.measure.lpips import load_lpips
from latentvae.measure.spaces import compare_spaces
from latentvae.models.presets import SPACES
from latentvae.models.spaces import decode_scaled, encode_scaled, load_autoencoder

SIDE = 256  # of crops, pixels

WAYS = {
    "student_student": "`{student}` alone",
    "teacher_student": "{teacher}'s latents, `{student}`'s decoder (text to image)",
    "student_teacher": "`{student}`'s latents, {teacher}'s decoder",
    "teacher_teacher": "{teacher} alone",
}
# by latent channels: R2; dB beside the teacher's at least and LPIPS of its at most, alone and on its latents;
# dB that the teacher's decoder may lose on the student's latents
GOALS = {4: (0.95, (0.3, 1.4), (0.3, 1.3), 0.5), 16: (0.99, (-0.5, 1.6), (-0.5, 1.6), 0.5)}
ORDER = ("sd-small", "sdxl-small", "sd3-small", "flux-small")  # of the page
Result = dict[str, Any]


def names(pair: str) -> tuple[str, str]:
    """Student and teacher, without their folders."""
    student, _, teacher = pair.partition("=")
    return Path(student).name, Path(teacher).name


def measure_pair(pair: str, folder: Path, arguments: argparse.Namespace) -> Result:
    """One student beside its teacher, on one folder."""
    models = [load_autoencoder(name) for name in pair.split("=", 1)]
    files = find_images(folder)[:: arguments.every]
    images = ((file.name, load_image(file)) for file in files)
    found = compare_spaces(*models, images, load_lpips("alex", arguments.lpips_weights))
    return {"pair": "=".join(names(pair)), "images": folder.name, **found.as_dict()}


def beside(found: Result, way: str) -> tuple[float, float]:
    """dB more than the teacher alone, and LPIPS as a multiple of its."""
    figures, own = found["pictures"][way], found["pictures"]["teacher_teacher"]
    return figures["psnr"] - own["psnr"], figures["lpips"] / own["lpips"]


def report(found: Result) -> str:
    """One pair on one folder, as Markdown."""
    student, teacher = names(found["pair"])
    title = f"{SETS.get(found['images'], found['images'])}, {found['image_count']} images"
    offset = max(found["offsets"], key=abs)
    lines = [
        f"{title}: R2 {found['r2']:.4f}, correlation {found['correlation']:.4f}, largest offset of a channel "
        f"{offset:+.3f}",
        "",
        f"| encoder, decoder | PSNR, dB | SSIM | LPIPS | beside {teacher.upper()} alone |",
        "|---|---|---|---|---|",
    ]
    for way, label in WAYS.items():
        figures, (more, times) = found["pictures"][way], beside(found, way)
        cells = f"{figures['psnr']:.2f} | {figures['ssim']:.3f} | {figures['lpips']:.3f}"
        last = "" if way == "teacher_teacher" else f"{more:+.2f} dB, {times:.2f} x"
        lines.append(f"| {label.format(student=student, teacher=teacher.upper())} | {cells} | {last} |")
    return "\n".join(lines)


def goals(results: list[Result]) -> str:
    """What CPU-trained weights were to reach on Kodak-24, and what they have."""
    lines = [
        "| on Kodak-24 | R2 | alone, beside the teacher | on the teacher's latents | its latents in the "
        "teacher's decoder |",
        "|---|---|---|---|---|",
    ]
    for found in (each for each in results if each["images"] == "kodak" and each["image_count"] == 24):
        r2, alone, crossed, loss = GOALS[len(found["offsets"])]
        cells = [judged(f"{found['r2']:.3f}", f"{r2}", found["r2"] >= r2)]
        for way, (decibels, times) in (("student_student", alone), ("teacher_student", crossed)):
            more, multiple = beside(found, way)
            met = more >= decibels and multiple <= times
            cells.append(judged(f"{more:+.2f} dB, {multiple:.2f} x", f"{decibels:+} dB, {times} x", met))
        lost = -beside(found, "student_teacher")[0]
        cells.append(judged(f"{-lost:+.2f} dB", f"-{loss} dB", lost <= loss))
        lines.append(f"| `{names(found['pair'])[0]}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def judged(has: str, wanted: str, met: bool) -> str:
    """A cell of the goals."""
    return f"{has} ({'**met**' if met else 'missed'}: {wanted})"


def brief(results: list[Result]) -> str:
    """A line for each student, for who wants to know which to take."""
    lines = [
        "| model | latent space of | it draws its teacher's latents at | the teacher does at "
        "| R2 of its own latents | the teacher draws them at |",
        "|---|---|---|---|---|---|",
    ]
    for found in (each for each in results if each["images"] == "kodak"):
        student, teacher = names(found["pair"])
        crossed, own, learned = (
            f"{figures['psnr']:.1f} dB / {figures['lpips']:.3f}"
            for figures in (
                found["pictures"][w] for w in ("teacher_student", "teacher_teacher", "student_teacher")
            )
        )
        space = SPACES[student.removesuffix("-small")].used_by
        cells = [f"`{student}`", space, crossed, f"{teacher.upper()}: {own}", f"{found['r2']:.2f}", learned]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(results: list[Result], page: Path) -> None:
    """Whichever tables the page has markers for: NAME of a student, `goals of spaces`, `spaces`."""
    text = page.read_text(encoding="utf-8")
    results = sorted(results, key=lambda found: ORDER.index(names(found["pair"])[0]))
    parts = {"goals of spaces": goals(results), "spaces": brief(results)}
    for found in results:
        student = names(found["pair"])[0]
        parts[student] = "\n\n".join(filter(None, [parts.get(student), report(found)]))
    for name, part in parts.items():
        if f"<!-- {name} -->" in text:
            text = fill(text, name, part)
    page.write_text(text, encoding="utf-8")


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
    """Measure all pairs on all folders; print the tables, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", metavar="STUDENT=TEACHER")
    parser.add_argument("--images", nargs="+", type=Path, default=[])
    parser.add_argument("--every", type=int, default=1, help="Only every so many images of a folder.")
    parser.add_argument("--lpips-weights", type=Path)
    parser.add_argument("--figures", type=Path, help="JSON that holds all figures, to bring up to date.")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="Markdown with tables of them.")
    parser.add_argument("--picture", type=Path, help="Draw crops to this PNG instead.")
    parser.add_argument("--crops", nargs="+", default=[], metavar="NAME:LEFT,TOP")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.picture:
        return draw(arguments)
    known = json.loads(arguments.figures.read_text(encoding="utf-8"))["results"] if arguments.figures else []
    results = {(found["pair"], found["images"]): found for found in known}
    for pair in arguments.pairs:
        for folder in arguments.images:
            found = measure_pair(pair, folder, arguments)
            print(f"{report(found)}\n", flush=True)
            results[found["pair"], found["images"]] = found
    if arguments.figures:
        figures = {"machine": machine(), "results": list(results.values())}
        arguments.figures.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for page in arguments.pages:
        write(list(results.values()), page)


if __name__ == "__main__":
    main()

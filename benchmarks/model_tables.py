"""The figures of `models.py`, `ablations.py` and `diffusability.py` as Markdown, for the markers of a page.

A page holds `<!-- NAME -->` and `<!-- end of NAME -->`; what is between them is written anew, all else stays.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablations
import diffusability

Figures = dict[str, Any]
SETS = {"kodak": "Kodak, 768x512", "val": "BSDS500 test, 481x321"}

# PSNR of at least, LPIPS-alex of at most, on Kodak-24
GOALS = {
    ("f8c4-small", "CPU"): (24.5, 0.25),
    ("f8c4-small", "GPU"): (27.0, 0.12),
}
# Not measured in this run. PSNR, SSIM, LPIPS, rFID; where the authors give no figure: empty.
ELSEWHERE = (
    (
        "TAEF2, f8c32, 2 x 2.7 MB",
        "Kodak-24; measured by us earlier, LPIPS-alex",
        "30.19",
        "0.883",
        "0.0405",
        "",
    ),
    ("SD ft-mse, f8c4, 84 M", "ImageNet-256; published", "26.91", "0.772", "0.130", "0.69"),
    ("SDXL, f8c4, 84 M", "ImageNet-256; published", "27.38", "0.794", "0.122", "0.67"),
    ("FLUX, f8c16, 84 M", "ImageNet-256; published", "32.87", "0.924", "0.045", "0.17"),
    ("EQ-VAE, f8c4, 84 M", "ImageNet-256; published, averaged weights", "26.15", "", "", "0.55"),
)


def table(head: str, rows: list[list[str]]) -> str:
    """A Markdown table; `head` is its first line without the outer bars."""
    lines = [f"| {head} |", f"|{'---|' * (head.count('|') + 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def measured(found: list[Any]) -> list[Any]:
    """The same, unless there is nothing.

    Raises:
        KeyError: as a figure that is missing does.
    """
    if not found:
        raise KeyError("not measured yet")
    return found


def quality(figures: Figures) -> str:
    """Reconstructions on each set, and the images that come out worst."""
    parts = []
    for key, title in SETS.items():
        rows, count = [], 0
        for name, model in figures["models"].items():
            if (found := model.get("sets", {}).get(key)) is None:
                continue
            count = found["count"]
            cells = [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", f"{found['lpips']:.4f}"]
            worst = f"{found['worst']['name']}: {found['worst']['psnr']:.1f} dB"
            rows.append([f"`{name}`", *cells, f"{found['rate_bpp']:.2f}", worst])
        if rows:
            head = "model | PSNR, dB | SSIM | LPIPS-alex | rate (KL), bpp | worst image"
            parts.append(f"{title}, {count} images:\n\n{table(head, rows)}")
    return "\n\n".join(measured(parts))


def goals(figures: Figures) -> str:
    """What was wanted of each model on Kodak, and by how much it was missed."""
    rows = []
    for (name, device), (psnr, lpips) in GOALS.items():
        found = figures["models"].get(name, {}).get("sets", {}).get("kodak", {"count": 0})
        if found["count"] != 24:
            continue
        short, over = psnr - found["psnr"], found["lpips"] - lpips
        rows.append(
            [
                f"`{name}`, trained on a {device}",
                f"{psnr:.1f}",
                "met" if short <= 0 else f"missed by {short:.2f} dB",
                f"{lpips:.2f}",
                "met" if over <= 0 else f"missed by {over:.3f}",
            ]
        )
    return table("goal on Kodak-24 | PSNR, dB | | LPIPS-alex | ", measured(rows))


def sizes(figures: Figures) -> str:
    """Parameters, bytes, and times beside a stock AutoencoderKL of Stable Diffusion's size."""
    stock = figures["stock"]
    seconds = [
        f"{stock['seconds'][p][verb]:.2f} s" for p in ("fp32", "bf16") for verb in ("encode", "decode")
    ]
    rows = [["stock, SD-size, random weights", f"{stock['parameters'] / 1e6:.1f} M", "", *seconds]]
    for name, model in figures["models"].items():
        for way, times in model.get("seconds", {}).items():
            ratios = [
                f"1/{stock['seconds'][p][verb] / times[p][verb]:.0f} ({times[p][verb]:.2f} s)"
                for p in ("fp32", "bf16")
                for verb in ("encode", "decode")
            ]
            size = f"{model['bytes'] / 1e6:.1f} MB"
            rows.append([f"`{name}`, {way}", f"{model['parameters'] / 1e6:.1f} M", size, *ratios])
    head = "model | parameters | file | encode fp32 | decode fp32 | encode bf16 | decode bf16"
    turns = f"{stock['threads']} threads, medians of {stock['rounds']} turns"
    return f"{stock['side']} px, batch 1, {turns}; {figures['machine']}\n\n{table(head, rows)}"


def codecs(figures: Figures) -> str:
    """Whole files on Kodak: ours, JPEG, WebP."""
    rows = []
    for name, points in figures["codecs"].items():
        label = f"`latentvae compress`, {name}" if name in figures["models"] else name
        for p in points:
            cells = [f"{p['bpp']:.3f}", f"{p['psnr']:.2f}", f"{p['ssim']:.3f}", f"{p['lpips']:.3f}"]
            rows.append([label, str(p["quality"]), *cells])
    return table("file | quality | bpp of the file | PSNR, dB | SSIM | LPIPS-alex", rows)


def elsewhere(figures: Figures) -> str:
    """Figures that were not measured in this run."""
    return table(
        "model | data, and whose figure | PSNR, dB | SSIM | LPIPS | rFID", [list(row) for row in ELSEWHERE]
    )


def halves(figures: Figures) -> str:
    """The same picture in half precision."""
    rows = []
    for name, model in figures["models"].items():
        for dtype, found in model.get("halves", {}).items():
            psnr = "identical" if found["psnr"] is None else f"{found['psnr']:.1f}"
            rows.append([f"`{name}`", dtype, psnr, str(found["largest"]), f"{found['changed']:.1%}"])
    image = figures.get("halves_image", "")
    head = "model | against fp32 | PSNR, dB | largest difference, of 255 | values that differ"
    return f"Kodak image {image}, 768x512:\n\n" + table(head, measured(rows))


def curves(figures: Figures) -> str:
    """The picture of the training runs."""
    runs = ", ".join(figures["curves"])
    return f"Validation over the steps, runs {runs}:\n\n![PSNR and LPIPS over the steps](models-curves.png)"


def cards(figures: Figures) -> str:
    """Hardware and time, data, licence, as the cards have them."""
    rows = [
        [f"`{name}`", model["card"]["training"], model["card"]["licence"]]
        for name, model in figures["models"].items()
    ]
    return table("model | training | licence of the weights", rows)


PARTS: dict[str, Callable[[Figures], str]] = {
    "quality": quality,
    "goals": goals,
    "sizes": sizes,
    "codecs": codecs,
    "elsewhere": elsewhere,
    "halves": halves,
    "cards": cards,
    "curves": curves,
}


def fill(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of `name`.

    Raises:
        ValueError: the markers are not there, once each.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(
            f"the page has no {begin} followed by {end}, or more than one; put them where it goes."
        )
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def write(figures: Figures, page: Path) -> list[str]:
    """Fill every part that has figures; returns the names of those that have none."""
    text, missing = page.read_text(encoding="utf-8"), []
    for name, part in PARTS.items():
        try:
            text = fill(text, name, part(figures))
        except KeyError:  # not measured yet
            missing.append(name)
    for name, report in (("ablations", ablations.report), ("diffusability", diffusability.report)):
        data = page.with_name(f"{name}.json")
        if data.is_file():
            text = fill(text, name, report(json.loads(data.read_text(encoding="utf-8"))["rows"]))
        else:
            missing.append(name)
    page.write_text(text, encoding="utf-8")
    return missing

"""`latentvae vary`: copies of images that differ as their posteriors allow, and by how much."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentvae import images, measure
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import make_folder, whole_file
from latentvae.cli.options import OUTPUT, Photos, Seed, output_folder, tell
from latentvae.cli.places import check_output, root_of, short_names, with_ending, write_json
from latentvae.cli.session import IMAGE_OPTIONS, LPIPS_OPTIONS, Session, takes
from latentvae.toolbox import editing

if TYPE_CHECKING:
    import torch

    from latentvae.toolbox.editing.vary import Distance, Reference, Spread, Variations

COPIES = "copies"  # folder below the output that holds nothing but copies, to train from
ALIKE, VISIBLE = 0.02, 0.1  # of the latents' own standard deviation: noise that nobody sees, and a little
SHEET_ROWS, SHEET_COLUMNS, SHEET_CELL = 6, 6, 384  # the last in pixels


@takes("model", ..., "seed", *LPIPS_OPTIONS, *IMAGE_OPTIONS)
def vary(
    session: Session,
    paths: Photos,
    output: Annotated[Path, output_folder("Folder; the copies go below its folder 'copies'.")] = OUTPUT,
    copies: Annotated[int, typer.Option("--copies", "-n", min=1, help="Copies of each image.")] = 4,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            "-t",
            min=0,
            help="Strength, in multiples of the posterior's standard deviation: 0 changes nothing. Give it "
            "several times to compare.",
            show_default="1",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Vary images: writes copies (their captions too) and a contact sheet, and prints how far they are.

    A copy depends on its image's pixels, the seed and its number alone.
    """
    # copies of copies would drift further from run to run
    check_output(output, paths)
    files = session.find_images(paths)
    names = short_names(files, paths)
    vae = session.load()
    make_folder(output / COPIES)
    # each once, and from the least: the figures read as a curve
    study = _Study(sorted(set(temperature or [1.0])), copies, *session.find_lpips())
    captions = images.captions
    captions.forget()  # metadata.jsonl is remembered, and may have changed since in a process that lives on
    for path, image, _ in session.read_images(files):
        caption, notes = captions.read_caption(path, root_of(path, paths))
        try:
            variations = editing.vary.Variations(vae, image, seed)
            study.add(path, image, variations, output / COPIES / names[path], caption)
        except LatentVAEError as error:  # NaN: half precision overflows in many VAEs
            session.skip(path, LatentVAEError(f"{path}: {error}"))
            continue
        study.notes += [f"{names[path].as_posix()}: {note}" for note in notes]
    if study.images:
        sheet = output / "contact-sheet.png"
        images.saving.save_picture(study.sheet(), sheet)
        result = {**study.result(), "seed": seed, **session.passed_over}
        write_json(result, output / "variations.json")
        written = sum(len(each["copies"]) for each in study.images)
        made = "1 copy" if written == 1 else f"{written} copies"
        where = f"\nLook at {sheet}; {made} in {output / COPIES}."
        tell(result, [*lines_of_variations(result), where], session.json)
    session.finish(len(study.images))


@dataclass
class _Study:
    """Writes the copies of one image after the other, and gathers figures and pictures of them."""

    temperatures: list[float]
    copies: int
    lpips: measure.lpips.LPIPS | None
    reason: str | None
    images: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[list[torch.Tensor]] = field(default_factory=list)  # of the contact sheet
    spreads: list[Spread] = field(default_factory=list)
    found: dict[float, list[tuple[Distance, Distance]]] = field(default_factory=dict)

    def add(self, path: Path, image: Any, variations: Variations, place: Path, caption: Any) -> None:
        """Write one image's copies as PLACE.tTEMPERATURE.COPY.png."""
        reconstruction = variations.reconstruction.cpu()  # (C, H, W), as all that is kept here
        # LPIPS features of both are computed once, and not for every copy
        references = [editing.vary.Reference(each, self.lpips) for each in (image, reconstruction)]
        # temperature 0 is what the model costs by itself
        self._measure(0.0, reconstruction, references)
        make_folder(place.parent)
        written, row = [], [image, reconstruction]
        for temperature in self.temperatures:
            for copy in range(self.copies):
                varied = variations.image(temperature, copy).cpu()
                if temperature > 0:  # whose figures are there already
                    self._measure(temperature, varied, references)
                file = place.with_name(with_ending(place.name, f".t{temperature:g}.{copy}.png"))
                images.saving.save_image(varied, file)
                written.append(str(file))
                # beside the copy, so that it can be trained on like the original
                if caption is not None:
                    with whole_file(file.with_suffix(".json")) as partial:
                        partial.write_text(json.dumps(caption, ensure_ascii=False), encoding="utf-8")
                if (temperature, copy) in self._shown():
                    row.append(varied)
        self.images.append({"path": str(path), "copies": written})
        self.spreads.append(variations.spread)
        # the rest would make a picture that nobody can open
        if len(self.rows) < SHEET_ROWS:
            self.rows.append([images.resizing.thumbnail(each, SHEET_CELL) for each in row])

    def _shown(self) -> list[tuple[float, int]]:
        """Temperature and copy of the contact sheet's columns: a copy each, or several of the only one."""
        # one temperature is looked at for variety, several for how they differ
        if len(self.temperatures) == 1:
            return [(self.temperatures[0], copy) for copy in range(min(self.copies, SHEET_COLUMNS))]
        return [(temperature, 0) for temperature in self.temperatures]

    def sheet(self) -> Any:
        """The contact sheet, as a picture."""
        titles = ["Original", "Temperature 0", *(f"Temperature {t:g}, copy {c}" for t, c in self._shown())]
        return images.drawing.grid(self.rows, titles)

    def result(self) -> dict[str, Any]:
        """All that was found, as JSON values."""
        spread = {
            name: _mean([getattr(each, name) for each in self.spreads])
            for name in ("posterior_std", "latents_std", "ratio")
        }
        return {
            "temperature_unit": "standard deviations of the posterior",
            "spread": spread,
            "temperatures": self._table(),
            "lpips_net": self.lpips.net if self.lpips else None,
            "lpips_missing_reason": None if self.lpips else self.reason,
            "images": self.images,
            "notes": self.notes,
        }

    def _table(self) -> list[dict[str, float | None]]:
        """Mean figures per temperature, beginning with 0, the reconstruction; None where there are none."""
        rows = []
        for temperature, pairs in self.found.items():
            row: dict[str, float | None] = {"temperature": temperature}
            for other, name in enumerate(("original", "reconstruction")):
                row[f"psnr_to_{name}"] = _mean([pair[other].psnr for pair in pairs])
                row[f"lpips_to_{name}"] = _mean([pair[other].lpips for pair in pairs])
            rows.append(row)
        return rows

    def _measure(self, temperature: float, varied: Any, references: list[Reference]) -> None:
        original, reconstruction = (reference.distance(varied) for reference in references)
        self.found.setdefault(temperature, []).append((original, reconstruction))


def _mean(figures: list[float | None]) -> float | None:
    """Of what was measured; None where nothing was, or where identical images make it infinite."""
    measured = [figure for figure in figures if figure is not None]
    # fsum: the mean must not depend on the order of the images
    average = math.fsum(measured) / len(measured) if measured else math.inf
    return average if math.isfinite(average) else None


def lines_of_variations(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    spread = result["spread"]
    header = ("temperature", "PSNR dB", "LPIPS", "PSNR dB to t=0", "LPIPS to t=0")
    keys = ("psnr_to_original", "lpips_to_original", "psnr_to_reconstruction", "lpips_to_reconstruction")
    found = ["  ".join(header)]
    for row in result["temperatures"]:
        cells = [f"{row['temperature']:g}"]
        for key in keys:
            digits = 2 if key.startswith("psnr") else 4
            cells.append("-" if row[key] is None else f"{row[key]:.{digits}f}")
        found.append("  ".join(cell.rjust(len(name)) for cell, name in zip(cells, header, strict=True)))
    found.append("")
    share = "" if spread["ratio"] is None else f": {100 * spread['ratio']:.2g} % of the latents' own"
    found.append(
        f"Temperature 1 is the posterior's standard deviation, {spread['posterior_std']:.3g} here{share} "
        f"({spread['latents_std']:.3g})."
    )
    # sorted, so the last is the largest
    largest = result["temperatures"][-1]["temperature"]
    if spread["ratio"] is not None and 0 < largest * spread["ratio"] < ALIKE:
        visible = float(f"{VISIBLE / spread['ratio']:.1g}")  # one digit is enough to try
        found.append(f"The copies are all but alike; try --temperature {visible:g}.")
    if result["lpips_missing_reason"] is not None:
        found.append(f"Note: LPIPS was not measured: {result['lpips_missing_reason']}")
    return found + [f"Note: {note}" for note in result["notes"]]

"""`latentvae anomaly fit | score`: which images are odd, compared with normal ones."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentvae import images, measure
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import make_folder, whole_file
from latentvae.base.optional import need
from latentvae.cli.options import OUTPUT, output_folder, tell
from latentvae.cli.places import check_output, short_names, with_ending, write_json
from latentvae.cli.session import Session, takes
from latentvae.toolbox import anomaly as judging
from latentvae.toolbox import atlas

if TYPE_CHECKING:
    import torch

SHOWN = 20  # rows of the table that are printed; the CSV has all

anomaly = typer.Typer(
    help="Find odd images, by what is usual among normal ones.", no_args_is_help=True, add_completion=False
)
CalibrationFile = Annotated[
    Path, typer.Argument(help="File of the calibration (safetensors).", show_default=False)
]


@anomaly.command()
@takes("model", "lpips", "lpips_net", "lpips_weights", "device", "json")
def fit(
    session: Session,
    normal: Annotated[list[Path], typer.Argument(help="Normal images or folders.", show_default=False)],
    calibration: CalibrationFile,
    lpips: Annotated[
        bool, typer.Option("--lpips/--no-lpips", help="Use LPIPS too, where its weights are there.")
    ] = True,
) -> None:
    """Learn from normal images what is usual: quantiles of every term, for this model."""
    judging.calibration.check_place(calibration)
    files = session.find_images(normal)
    judging.calibration.check_count(len(files))
    make_folder(calibration.parent)  # before minutes of looking
    vae = session.load()
    network, reason = session.find_lpips() if lpips else (None, "--no-lpips")
    looks = []
    for path, image, _ in session.read_images(files):
        try:
            looks.append(judging.terms.look(vae, image[None], network).without_maps())
        except LatentVAEError as error:
            # LPIPS pools until nothing is left of a small image; the other terms do without it
            small = network is not None and min(image.shape[-2:]) < network.min_size
            remedy = " --no-lpips leaves it out." if small else ""
            session.skip(path, LatentVAEError(f"{path}: {error}{remedy}"))
    if not looks:
        session.finish(0)
    # the net is kept with the quantiles: `score` must use the same
    made = judging.calibration.calibrate(vae, looks, session.lpips_net if network else None)
    made.save(calibration)
    result = {
        "calibration": str(calibration),
        "images": len(looks),
        "quantiles": made.quantiles,
        "counted": made.counted,
        "lpips_missing_reason": reason,
        **session.passed_over,
    }
    tell(result, [*_lines_of_fit(made, len(looks), reason), f"Written: {calibration}"], session.json)
    session.finish(len(looks))


def _lines_of_fit(made: judging.calibration.Calibration, count: int, reason: str | None) -> list[str]:
    """What is usual, for people."""
    lines = [f"{count} normal images; median and 95 % quantile:"]
    for name, values in made.quantiles.items():
        means = judging.terms.TERMS.get(name, "all terms as one")
        lines.append(f"{name:10} {values[50]:10.4g} {values[95]:10.4g}  {means}")
    # of normal images that have nothing in common every one is odd by its layout
    alike = "alike, so all terms count" if len(made.counted) > 1 else "not alike, so one term counts"
    lines.append(f"The images are {alike} in the score: {', '.join(made.counted)}.")
    if reason:
        lines.append(f"Without LPIPS: {reason}")
    return lines


@anomaly.command()
@takes(..., "model", "lpips_weights", "device", "json")
def score(
    session: Session,
    calibration: CalibrationFile,
    photos: Annotated[list[Path], typer.Argument(help="Images or folders.", show_default=False)],
    output: Annotated[Path, output_folder("Folder for table and pictures.")] = OUTPUT,
    labels: Annotated[
        Path | None,
        typer.Option(help="CSV of name,label (1 odd, 0 normal) for each image: adds the ROC and its area."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="Rank by this term instead: pixel, patch, lpips, alone, kl, latent, neighbour, layout. "
            "Higher is odder of each."
        ),
    ] = "score",
) -> None:
    """Rank images from odd to usual: writes NAME.heat.png, anomalies.csv and .json, and with labels roc.png.

    A score of 0 is usual, above 1 rare. Heat maps show where an image is odd, by its errors or, where only
    `alone` counts, by how unlike the rest of itself it is; half-way is what one normal image in twenty has.
    """
    check_output(output, photos)
    usual = judging.calibration.load_calibration(calibration)
    # before the model is loaded
    _check_term(by, list(usual.quantiles))
    files = session.find_images(photos)
    names = {path: name.as_posix() for path, name in short_names(files, photos).items()}
    if labels is not None:
        need("sklearn")  # for the ROC: said before minutes of looking
    # labels that do not fit are refused before images are looked at
    odd = None if labels is None else read_labels(labels, set(names.values()))
    # errors and latents of another model have other quantiles
    usual.check(session.load())
    network = _load_network(usual, session)
    make_folder(output)
    rows = _judge_all(session, _Judge(usual, network, output), files, names)
    if rows:
        rows.sort(key=lambda row: -(row["score"] if by == "score" else row["terms"][by]))  # the oddest first
        # of skipped images none has a score, so that one kind may be missing
        both = odd is not None and len({odd[row["name"]] for row in rows}) == 2
        areas = _write_roc(output, rows, odd) if odd is not None and both else None
        if odd is not None and not both:
            typer.echo("no ROC: all images that could be read are of one kind.", err=True)
        result = {"calibration": str(calibration), "images": rows, "auroc": areas}
        result |= session.passed_over
        _write_table(output / "anomalies.csv", rows)
        write_json(result, output / "anomalies.json")
        tell(result, _lines_of_score(output, rows, areas), session.json)
    session.finish(len(rows))


def _check_term(name: str, known: list[str]) -> None:
    """Raises LatentVAEError where the calibration has no such term."""
    if name not in known:
        raise LatentVAEError(f"this calibration has no term {name!r}; choose one of {', '.join(known)}.")


def _load_network(usual: judging.calibration.Calibration, session: Session) -> measure.lpips.LPIPS | None:
    """The LPIPS network of the calibration; an error where its weights are not there.

    Without it scores would be of fewer terms than the quantiles that they are compared with.
    """
    if usual.lpips_net is None:
        return None
    net: Any = usual.lpips_net  # a string in the file; load_lpips refuses what it does not know
    return measure.lpips.load_lpips(net, session.lpips_weights).to(session.vae.device)


@dataclass(frozen=True)
class _Judge:
    usual: judging.calibration.Calibration
    network: measure.lpips.LPIPS | None
    output: Path


def _judge_all(
    session: Session, judge: _Judge, files: list[Path], names: dict[Path, str]
) -> list[dict[str, Any]]:
    """One row for each image, its heat map written."""
    rows = []
    for path, image, _ in session.read_images(files):
        try:
            verdict = judge.usual.judge(judging.terms.look(session.vae, image[None], judge.network))
        except LatentVAEError as error:
            session.skip(path, LatentVAEError(f"{path}: {error}"))
            continue
        place = judge.output / names[path]
        place = place.with_name(with_ending(place.name, ".heat.png"))
        make_folder(place.parent)
        _write_heat(place, image, verdict)
        figures = {"score": verdict.score, "quantile": verdict.quantile, "terms": verdict.terms}
        rows.append({"name": names[path], **figures, "quantiles": verdict.quantiles, "heat_map": str(place)})
    return rows


def _write_heat(place: Path, image: torch.Tensor, verdict: judging.calibration.Verdict) -> None:
    """Draw an image beside its heat map."""
    drawing = images.drawing
    # (3, H, W)
    heat = images.tensors.from_uint8(drawing.colour_heat(verdict.heat.numpy()))
    # a grey image must have the three channels of its heat map to stand beside it
    colour = image if image.shape[0] == 3 else image.expand(3, -1, -1)
    title = f"score {verdict.score:.2f} (white: {drawing.HEAT_WHITE} x usual worst)"
    name = place.name.removesuffix(".heat.png")
    images.saving.save_picture(drawing.grid([[colour, heat]], [name, title]), place)


def read_labels(path: Path, names: set[str]) -> dict[str, bool]:
    """Which image names are odd.

    Raises:
        LatentVAEError: not a CSV of name,label, or not exactly one label for each image.
    """
    table = atlas.labels.read_table(path)
    for name, label in table.items():
        if label not in ("0", "1"):
            raise LatentVAEError(f"{path} has the line {f'{name},{label}'!r}; wanted NAME,0 or NAME,1.")
    # whole: a missing label would leave an image out of the ROC without a word
    atlas.labels.match_labels(path, table, names, whole=True)
    if len(set(table.values())) < 2:
        raise LatentVAEError(
            f"{path} labels every image {next(iter(table.values()))}; an ROC needs images of both kinds. "
            "Leave --labels out for the ranking alone."
        )
    return {name: label == "1" for name, label in table.items()}


def _write_roc(output: Path, rows: list[dict[str, Any]], odd: dict[str, bool]) -> dict[str, float]:
    """The area under the ROC of the score and of every term alone; draws the score's."""
    roc = judging.roc
    labels = [odd[row["name"]] for row in rows]
    scores = [row["score"] for row in rows]
    areas = {"score": roc.auroc(scores, labels)}
    # of each term alone, because which one tells depends on what is odd
    areas |= {name: roc.auroc([row["terms"][name] for row in rows], labels) for name in rows[0]["terms"]}
    title = f"AUROC {areas['score']:.3f}, {sum(labels)} odd of {len(labels)}"
    images.saving.save_picture(roc.draw_roc(roc.roc_curve(scores, labels), title), output / "roc.png")
    return areas


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as CSV, ranked; names keep their bytes."""
    terms = list(rows[0]["terms"])
    with (
        whole_file(path) as partial,
        # file names need not be UTF-8
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["rank", "name", "score", "quantile", *terms])
        for rank, row in enumerate(rows, 1):
            values = (row["terms"][term] for term in terms)
            writer.writerow([rank, row["name"], row["score"], row["quantile"], *values])


def _lines_of_score(output: Path, rows: list[dict[str, Any]], areas: dict[str, float] | None) -> list[str]:
    """The ranked table, each term as the share of normal images below it."""
    terms = list(rows[0]["quantiles"])
    # of the rows that are shown: a long name further down must not widen the table
    width = max(len(row["name"]) for row in rows[:SHOWN])
    lines = ["  ".join(["image".ljust(width), "score", "rarer than", *(f"{term:>9}" for term in terms)])]
    for row in rows[:SHOWN]:
        cells = (f"{100 * row['quantiles'][term]:7.0f} %" for term in terms)
        name, share = row["name"].ljust(width), f"{100 * row['quantile']:8.0f} %"
        lines.append("  ".join([name, f"{row['score']:5.2f}", share, *cells]))
    if len(rows) > SHOWN:
        lines.append(f"... and {len(rows) - SHOWN} more in {output / 'anomalies.csv'}.")
    lines.append("Per cent: normal images with a lower value. Score: 0 usual, above 1 rare.")
    if areas:
        lines.append("AUROC: " + ", ".join(f"{name} {area:.3f}" for name, area in areas.items()) + ".")
    return [*lines, f"Look at {rows[0]['heat_map']}."]

"""`latentvae project`: a map of images by their latents, clusters, and how both agree with labels."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentvae import images
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import make_folder, whole_file
from latentvae.base.optional import need
from latentvae.cli.gathering import Gathering, Grid, Labels, Request, Size, Sources, gather
from latentvae.cli.options import OUTPUT, counted, output_folder, tell
from latentvae.cli.places import check_output, write_json
from latentvae.cli.session import Session, takes
from latentvae.toolbox import atlas

if TYPE_CHECKING:
    import numpy as np

    from latentvae.toolbox.atlas.clusters import Clustering
    from latentvae.toolbox.atlas.gallery import Gallery
    from latentvae.toolbox.atlas.page import Card
    from latentvae.toolbox.atlas.projection import Projection

NEAR = 8  # neighbours of each image that the page shows
PER_CLASS = 10  # labels that the classifier learns from
SOURCES = {"table": "the table", "captions": "their captions", "folders": "their folders"}
Measured = dict[str, dict[str, Any]]


@takes("output", "model", ..., "device", "json")
def project(
    session: Session,
    sources: Sources,
    output: Annotated[Path, output_folder("Folder for page, pictures and tables.")] = OUTPUT,
    method: Annotated[
        Literal["pca", "umap"],
        typer.Option(help="How images are laid out. umap keeps neighbours together (extra umap)."),
    ] = "pca",
    clusters: Annotated[
        int | None,
        typer.Option(min=1, help="Number of clusters. Default: the best of 2 to 12 by silhouette."),
    ] = None,
    grid: Grid = 4,
    labels: Labels = None,
    size: Size = 256,
    title: Annotated[
        str | None, typer.Option(help="Title of the page.", show_default="the folder's name")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of UMAP, k-means and the labels drawn.")] = 0,
) -> None:
    """Map images by their latents: writes projection.html to hover over, .png, .json, and clusters.csv.

    Where there are labels: how clusters agree with them (NMI), and how well a classifier does that learns
    from 10 labels a class, each beside the same on raw pixels.
    """
    check_output(output, sources)
    # extras that this verb alone needs
    for package in ("sklearn", "matplotlib", *["umap"] * (method == "umap")):
        need(package)  # before minutes of encoding
    make_folder(output)
    found = gather(session, Request(sources, grid, labels, size, with_pictures=True))
    gallery = found.gallery
    # all were skipped: this says so and ends
    if not gallery.keys:
        session.finish(0)
    values = gallery.features.values  # (N, features)
    if len(values) < 2:
        raise LatentVAEError(f"1 image came ({gallery.keys[0]}); a map needs two or more.")
    mapped = atlas.projection.project(values, method, seed)
    grouped = atlas.clusters.cluster(values, clusters, seed, progress=True)
    result = _summarise(found, mapped, grouped, seed) | session.passed_over
    cards = _make_cards(gallery, mapped, grouped)
    files = _write_all(output, title or sources[0].resolve().name, cards, mapped, result)
    lines = [*_lines(found, mapped, grouped, result), f"\nOpen {files[0]} in a browser."]
    tell({**result, "files": [str(file) for file in files]}, lines, session.json)
    session.finish(len(gallery))


def _summarise(found: Gathering, mapped: Projection, grouped: Clustering, seed: int) -> dict[str, Any]:
    """What projection.json holds."""
    gallery = found.gallery
    return {
        "images": len(gallery),
        **gallery.features.about(),
        "method": mapped.method,
        "explained_variance": mapped.explained,
        "seed": seed,
        "clusters": {"count": grouped.count, "silhouettes": grouped.silhouettes},
        "labels_from": gallery.labels_from,
        **_measure(gallery, grouped, seed, found.notes),
        "notes": found.notes,
    }


def _measure(gallery: Gallery, grouped: Clustering, seed: int, notes: list[str]) -> Measured:
    """NMI of clusters, and accuracy from few labels, of latents and of pixels; what cannot be is left out."""
    if gallery.labels_from is None:
        return {}
    raw = gallery.raw()
    if raw is None:
        notes.append("Raw pixels are not compared: the files of some images are gone.")
    clusters = atlas.clusters
    # pixels are the bar: a latent space that separates no better has learned nothing of what is labelled
    tables: dict[str, np.ndarray] = {"latents": gallery.features.values} | (
        {} if raw is None else {"pixels": raw}
    )
    agreement = {"latents": clusters.nmi(grouped.numbers, gallery.labels)}
    if raw is not None:
        # as many clusters as the latents have, or their number would decide; k-means needs as many points
        same = min(grouped.count, clusters.distinct(raw))
        agreement["pixels"] = clusters.nmi(
            clusters.cluster(raw, same, seed, progress=True).numbers, gallery.labels
        )
    try:
        few = {
            name: asdict(clusters.few_label_accuracy(table, gallery.labels, PER_CLASS, seed=seed))
            for name, table in tables.items()
        }
    # too few labels of a class are no reason to lose the map
    except LatentVAEError as error:
        notes.append(f"No classifier from few labels: {error}")
        few = {}
    return {"nmi": agreement, "few_labels": few}


def _make_cards(gallery: Gallery, mapped: Projection, grouped: Clustering) -> list[Card]:
    """What the page shows of each image."""
    # (N, NEAR), by the features and not by the map, which distorts
    near = atlas.projection.neighbours(gallery.features.values, NEAR).tolist()
    points = mapped.points.tolist()  # (N, 2)
    rows = zip(
        gallery.keys, gallery.labels, grouped.numbers.tolist(), points, gallery.pictures, near, strict=True
    )
    return [
        atlas.page.Card(key, label, number, (x, y), picture, others)
        for key, label, number, (x, y), picture, others in rows
    ]


def _write_all(
    output: Path, name: str, cards: list[Card], mapped: Projection, result: dict[str, Any]
) -> list[Path]:
    """Write page, pictures, figures and table; the page first in what is returned."""
    about = f"{counted(len(cards), 'image')}, {_axes_text(mapped)}, "
    about += counted(result["clusters"]["count"], "cluster")
    page = output / "projection.html"
    with whole_file(page) as partial:
        partial.write_text(atlas.page.write_page(cards, name, about, _figure_rows(result)), encoding="utf-8")
    scatter = atlas.scatter
    pictures = {"projection.png": scatter.draw_scatter(cards, f"{name}: {about}", _axis_names(mapped))}
    drawn = scatter.draw_pictures(cards)
    if drawn is not None:  # there may be no pictures: files gone, and no model to decode with
        pictures["projection-pictures.png"] = drawn
    for each, picture in pictures.items():
        images.saving.save_picture(picture, output / each)
    write_json(result, output / "projection.json")
    table = output / "clusters.csv"
    with whole_file(table, durable=True) as partial:
        _write_table(partial, cards)
    first, *others = (output / each for each in pictures)
    return [page, first, output / "projection.json", table, *others]


def _write_table(path: Path, cards: list[Card]) -> None:
    """key, label, cluster, x, y of each image; names keep their bytes."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "label", "cluster", "x", "y"])
        writer.writerows([card.key, card.label, card.cluster, *card.point] for card in cards)


def _axes_text(mapped: Projection) -> str:
    """What the map is, in words."""
    # UMAP has no variance to explain, and its axes mean nothing
    if mapped.explained is None:
        return "UMAP"
    return f"PCA ({100 * sum(mapped.explained):.0f} % of the variance)"


def _axis_names(mapped: Projection) -> tuple[str, str]:
    """What to write along the axes."""
    if mapped.explained is None:
        return "UMAP 1", "UMAP 2"
    first, second = (
        f"component {number} ({100 * share:.0f} % of the variance)"
        for number, share in enumerate(mapped.explained, 1)
    )
    return first, second


def _figure_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, as rows: what, of latents, of pixels."""
    nmi, few = result.get("nmi"), result.get("few_labels")
    rows = []
    if nmi:
        rows.append(("Clusters against labels (NMI)", _figure(nmi["latents"]), _figure(nmi.get("pixels"))))
    if few:
        what = f"Accuracy from {PER_CLASS} labels a class"
        rows.append((what, _share(few["latents"]), _share(few.get("pixels"))))
    return rows


def _share(found: dict[str, Any] | None) -> str:
    """An accuracy and its spread over draws, in per cent."""
    if found is None:
        return "-"
    return f"{100 * found['accuracy']:.1f} \N{PLUS-MINUS SIGN} {100 * found['spread']:.1f} %"


def _figure(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def _lines(found: Gathering, mapped: Projection, grouped: Clustering, result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    gallery = found.gallery
    count, features = counted(len(gallery), "image"), gallery.features.values.shape[1]
    lines = [f"{count}, {features} features each; map: {_axes_text(mapped)}."]
    sizes = ", ".join(map(str, grouped.sizes))
    chosen = (
        f", chosen by silhouette ({grouped.silhouettes[grouped.count]:.2f})" if grouped.silhouettes else ""
    )
    lines.append(f"{counted(grouped.count, 'cluster')}{chosen}; images in each: {sizes}.")
    if gallery.labels_from is None:
        lines.append("No labels: --labels, captions or subfolders would give them.")
    else:
        names = len(set(gallery.labels) - {""})
        labelled = atlas.labels.count_labelled(gallery.labels)
        of = f"{counted(names, 'label')} of {counted(labelled, 'image')}"
        lines.append(f"{of}, from {SOURCES[gallery.labels_from]}.")
    if rows := _figure_rows(result):
        lines += ["", f"{'':34}{'latents':>16}{'pixels':>16}"]
        lines += [f"{what:34}{latents:>16}{pixels:>16}" for what, latents, pixels in rows]
    return [*lines, *(f"Note: {note}" for note in found.notes)]

"""What `project` and `features` begin with: the pooled latents of images, or of a store of latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from latentvae import images, models, store
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import portable
from latentvae.cli.places import root_of, short_names
from latentvae.cli.session import Session, image_channels
from latentvae.cli.stores import load_same_model, whole_shards
from latentvae.toolbox import atlas

if TYPE_CHECKING:
    import torch

Sources = Annotated[
    list[Path],
    typer.Argument(
        help="Images or folders; or one store of latents, by `latentvae encode`.", show_default=False
    ),
]
Grid = Annotated[
    int,
    typer.Option(
        min=0,
        max=64,
        help="Besides mean and std per channel, pool the means of GRID x GRID cells, which keeps where "
        "things are; 0: none, which suits photographs of which only the look counts.",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="CSV of name,label. Default: 'label' in the images' captions (NAME.json, metadata.jsonl), else "
        "the subfolders they lie in."
    ),
]
Size = Annotated[
    int,
    typer.Option(min=16, help="Shrink larger images to this longer side first. A store's stay as encoded."),
]


@dataclass
class Gathering:
    """The images that were found, and notes for people."""

    gallery: atlas.gallery.Gallery
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What is asked for: see the options of the same names."""

    sources: list[Path]
    grid: int
    labels: Path | None
    size: int
    with_pictures: bool


def gather(session: Session, request: Request) -> Gathering:
    """Pool the latents of all images; those that cannot be used are skipped and named.

    Raises:
        LatentVAEError: no image, no such model or device, labels that do not match, a store beside others.
    """
    # a store lies in a folder too: its manifest tells it from one of images
    stores = [source for source in request.sources if (source / store.format.MANIFEST).is_file()]
    if stores and len(request.sources) > 1:
        raise LatentVAEError(
            f"the store {stores[0]} came beside {len(request.sources) - 1} other path(s): name one store "
            "alone, or images and folders."
        )
    return _from_store(session, stores[0], request) if stores else _from_images(session, request)


def _labels(path: Path | None, names: list[str]) -> dict[str, str] | None:
    """The table, where one was named, if it is of these images; `names` holds the skipped ones too."""
    if path is None:
        return None
    table = atlas.labels.read_table(path)
    atlas.labels.match_labels(path, table, names, whole=False)
    return table


def _side(request: Request, count: int) -> int:
    """Pixels of the pictures that are kept, as large as a page of so many shows them; 0: none are."""
    return atlas.page.picture_side(count) if request.with_pictures else 0


def _from_images(session: Session, request: Request) -> Gathering:
    files = session.find_images(request.sources)
    names = {path: portable(name.as_posix()) for path, name in short_names(files, request.sources).items()}
    labels = _labels(request.labels, list(names.values()))  # before minutes of encoding
    vae = session.load()
    weights, side = models.fingerprint.weight_hash(vae), _side(request, len(files))
    found = Gathering(atlas.gallery.Gallery(weights, request.grid, side))
    captions = images.captions
    captions.forget()  # metadata.jsonl is remembered, and may have changed since in a process that lives on
    for path, image, latents in _encoded(session, files, request.size):
        caption, notes = captions.read_caption(path, root_of(path, request.sources))
        found.notes += [f"{names[path]}: {note}" for note in notes]
        try:
            label = atlas.labels.label_of(caption)
            if latents is None:
                found.gallery.add_image(vae, names[path], label, image)
            else:
                found.gallery.add(names[path], label, latents, image)
        except LatentVAEError as error:
            session.skip(path, LatentVAEError(f"{path}: {error}"))
    found.gallery.label(labels)
    return found


def _encoded(
    session: Session, files: list[Path], longest: int
) -> Iterator[tuple[Path, torch.Tensor, torch.Tensor | None]]:
    """(path, image, its latents or None: not computed yet) of each that can be read; others are skipped."""
    count = atlas.encoding.images_at_once(session.vae, longest)
    if count == 1:
        yield from ((path, image, None) for path, image, _ in session.read_images(files, longest=longest))
        return
    channels = image_channels(session.vae)
    found = atlas.encoding.encode_side_by_side(session.vae, files, channels, longest, count)
    for path, result in tqdm(found, total=len(files), unit="image", disable=len(files) < 2):
        if isinstance(result, LatentVAEError):
            session.skip(path, result)
        else:
            yield path, *result


def _from_store(session: Session, folder: Path, request: Request) -> Gathering:
    dataset = store.dataset.LatentDataset(folder, mode="mode", scaled=False)
    if session.model is not None:  # otherwise no model is needed: the store holds the latents
        load_same_model(session, dataset)
    side = _side(request, len(dataset))
    found = Gathering(atlas.gallery.Gallery(dataset.manifest.weights_sha256, request.grid, side))
    pictures = _Pictures(dataset, session)
    with tqdm(total=len(dataset), unit="image", disable=len(dataset) < 2) as progress:
        for _, numbers in whole_shards(dataset, session):
            for each in atlas.gallery.stored_images(dataset.reader, numbers):
                image, decoded = None, False
                if request.with_pictures:
                    image, decoded = pictures.of(each.index, each.latents)
                found.gallery.add(each.key, each.label, each.latents, image, decoded=decoded)
                progress.update()
    found.notes += pictures.notes()
    if found.gallery.keys:  # names of images in damaged shards are not known
        found.gallery.label(_labels(request.labels, found.gallery.keys))
    return found


@dataclass
class _Pictures:
    """Pictures of a store's images: from their files, else decoded, else none."""

    dataset: store.dataset.LatentDataset
    session: Session
    loaded: bool = False
    reason: str | None = None  # why there is no model to decode with
    decoded: int = 0
    missing: int = 0

    def of(self, index: int, latents: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
        """The image (C, H, W), and whether it was decoded."""
        entry = self.dataset.entry(index)
        image = store.dataset.original_image(entry, self.dataset.manifest)
        if image is not None:
            return image, False
        if not self.loaded and self.reason is None:  # with the first file that is gone, and once
            try:
                load_same_model(self.session, self.dataset)
                self.loaded = True
            except LatentVAEError as error:
                self.reason = str(error)
        if not self.loaded:
            self.missing += 1
            return None, False
        self.decoded += 1
        (picture,) = store.dataset.decoded_images(self.session.vae, [entry], latents)
        return picture.clamp(-1, 1), True

    def notes(self) -> list[str]:
        """What a person should know of them."""
        found = []
        if self.decoded:
            found.append(f"{self.decoded} image files are gone: their pictures are decoded from the latents.")
        if self.missing:
            found.append(
                f"{self.missing} image files are gone, and there is no picture of them: {self.reason}"
            )
        return found

"""What a teacher makes of whole training images, computed once and kept on disk, to be cut as the images are.

A step then costs no pass of the teacher. Near the edge of a crop the teacher saw what the student does not;
the student learns there what is likely beyond the edge.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from latentvae.base.errors import ConfigError
from latentvae.base.files import make_folder, whole_file
from latentvae.images.resizing import PREPROCESSING_VERSION
from latentvae.images.tensors import as_floats, from_uint8, to_uint8
from latentvae.training.config import Config

MANIFEST = "teacher.json"


class TeacherCrop(NamedTuple):
    """Of one crop, or of a batch of them with a leading dimension."""

    moments: torch.Tensor  # (2c, h, w), unscaled, float32
    picture: torch.Tensor  # (C, H, W) in [-1, 1]: what the teacher decodes of the means


class TeachingModel(Protocol):
    """What is cached: see `distillation.Teacher`."""

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 2c, h, w) of images (B, C, H, W)."""

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) of latents (B, c, h, w)."""


class TeacherCache:
    """A folder with one file for each training image, by its number.

    Args:
        folder: made by `fill`; a killed run goes on where it stopped, as every file is whole or not there.
        ratio: pixels to a latent along each side, which crops have to keep to.
    """

    def __init__(self, folder: Path, ratio: int) -> None:
        self.folder, self.ratio = folder, ratio

    def path(self, index: int) -> Path:
        """The file of one image."""
        return self.folder / f"{index:08d}.safetensors"

    def claim(self, made: dict[str, Any], write: bool) -> None:
        """Refuse a folder whose content depends on other things than this run's.

        Args:
            made: what it depends on, as JSON values (see `provenance`).
            write: whether to begin an empty folder; of several processes one does, before the others look.

        Raises:
            ConfigError: says what differs, or that the folder is somebody else's.
        """
        file = self.folder / MANIFEST
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(
                    f"{file} is damaged ({error}). Delete {self.folder}, which can be made again."
                ) from error
            other = [key for key in made if found.get(key) != made[key]]
            if other:
                raise ConfigError(
                    f"distil.cache={self.folder} was made with other {', '.join(other)}. Name another "
                    "folder, or delete this one."
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConfigError(f"distil.cache={self.folder} holds other files. Name a folder of its own.")
        elif write:
            make_folder(self.folder)
            with whole_file(file, durable=True) as partial:
                partial.write_text(json.dumps(made), encoding="utf-8")

    @torch.no_grad()
    def fill(
        self, teacher: TeachingModel, sequence: Any, device: torch.device, dtype: torch.dtype, share: slice
    ) -> None:
        """Compute what is not there yet of a CropSequence's images, of those whose numbers are in `share`."""
        missing = [index for index in range(len(sequence))[share] if not self.path(index).is_file()]
        for index in tqdm(missing, desc="teacher", unit="image", disable=len(missing) < 2):
            image = sequence.image(index)  # (C, H, W)
            if not isinstance(image, torch.Tensor):  # training passes it over, and says why
                continue
            height, width = (side // self.ratio * self.ratio for side in image.shape[-2:])
            moments = teacher.moments(as_floats(image)[None, :, :height, :width].to(device, dtype))
            picture = teacher.pictures(moments.chunk(2, 1)[0])
            tensors = {"moments": moments[0].float().cpu(), "picture": to_uint8(picture[0].float().cpu())}
            # durable: a name without its bytes after a power cut would be taken for a finished file
            with whole_file(self.path(index), durable=True) as partial:
                save_file({key: value.contiguous() for key, value in tensors.items()}, partial)

    def crop(self, index: int, top: int, left: int, size: int) -> TeacherCrop:
        """The part of image `index` that begins at multiples of the ratio; only that part is read."""
        ratio = self.ratio
        y, x, side = top // ratio, left // ratio, size // ratio
        try:
            with safe_open(self.path(index), "pt") as file:
                moments = file.get_slice("moments")[:, y : y + side, x : x + side]
                picture = file.get_slice("picture")[:, top : top + size, left : left + size]
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{self.path(index)} cannot be read ({error}). Delete it, and start again: it is made anew."
            ) from error
        return TeacherCrop(moments, from_uint8(picture))


def provenance(source: Any, config: Config, teacher: str, ratio: int) -> dict[str, Any]:
    """What the content of a cache depends on: teacher, units, precision, images with their sizes and times.

    Args:
        source: of the images: a length, and a place for each, the same however its folder was written.
        config: of the run.
        teacher: hash of its weights.
        ratio: pixels to a latent along each side.
    """
    digest = hashlib.sha256()
    for index in range(len(source)):
        path, number = source.place(index)
        digest.update(f"{path} {number}\n".encode("utf-8", "surrogateescape"))
        if path.is_file():  # one that is gone is passed over in training
            status = path.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return {
        "teacher": teacher,
        "preprocessing": PREPROCESSING_VERSION,
        "space": config.model.space,
        "logvar": config.distil.logvar,
        "ratio": ratio,
        "precision": config.train.precision,
        "short_side": config.data.short_side,
        "images": digest.hexdigest(),
    }

"""Find, load, pad and save images: the one place that makes `images`, float32 (B, C, H, W) in [-1, 1]."""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentvae.decoding import HAS_AVIF, Decoded, Encoded, decode
from latentvae.errors import ImageError

MAX_PIXELS = 178_956_970  # where Pillow itself refuses: twice its MAX_IMAGE_PIXELS
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", *((".avif",) if HAS_AVIF else ()))
SAVE_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".webp": ("WEBP", {"lossless": True}),
}
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's mode "L" means

Colour = tuple[int, int, int]
PathLike = str | Path


@dataclass
class ImageInfo:
    """What the file held and what was done to it; width and height are those of the loaded tensor."""

    width: int
    height: int
    mode: str
    format: str
    notes: list[str] = field(default_factory=list)
    frames: int = 1  # of an animation or a file of several pages; the first is loaded


@dataclass(frozen=True)
class Padding:
    """Pixels added on each side of a picture of `height` x `width`; `crop` takes them off again."""

    left: int
    top: int
    right: int
    bottom: int
    height: int
    width: int

    def crop(self, images: torch.Tensor) -> torch.Tensor:
        """Cut the padding off images (..., H, W) of the padded size; a view, not a copy."""
        wanted = (self.top + self.height + self.bottom, self.left + self.width + self.right)
        if tuple(images.shape[-2:]) != wanted:
            raise ImageError(
                f"images to crop have shape {tuple(images.shape)}, but this padding was made for "
                f"{wanted[0]} x {wanted[1]} (H x W): pass what was decoded from the padded images, unresized"
            )
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]


def find_images(path: PathLike | Sequence[PathLike]) -> list[Path]:
    """List the image files that a file, a folder (recursive, sorted) or several of them name, each once.

    Hidden files are left out. Links to folders are followed, each target once.
    Raises ImageError where a path is missing, is no image by its suffix, or a folder holds no image.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ImageError("no path came, but at least one image file or folder was wanted: name one")
    try:
        return list(dict.fromkeys(image for one in paths for image in _find_in(Path(one))))
    except OSError as error:
        raise ImageError(
            f"{error.filename} cannot be read ({error.strerror}): check its permissions"
        ) from error


def _find_in(path: Path) -> list[Path]:
    accepted = " ".join(SUFFIXES)
    if path.is_dir():
        found = list_files(path, SUFFIXES)
        if not found:
            raise ImageError(f"no image in the folder {path}: put files there that end in one of {accepted}")
        return found
    if not path.exists():
        raise ImageError(f"{path} does not exist: name an image file ({accepted}) or a folder of them")
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"{path} ends in '{path.suffix}', but an image was wanted: use one of {accepted}")
    return [path]


def list_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Sort the files below root that end in one of the suffixes; hidden ones and loops are left out."""
    return sorted(_walk(root, suffixes), key=lambda file: file.as_posix())


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield files below root, following links to folders unless that would visit one twice."""

    def refuse(error: OSError) -> None:
        raise error

    top = root.resolve()
    visited = {top}
    for folder, names, files in os.walk(root, onerror=refuse, followlinks=True):
        names[:] = [name for name in sorted(names) if _follow(Path(folder, name), top, visited)]
        for file in files:
            path = Path(folder, file)
            if not file.startswith(".") and path.suffix.lower() in suffixes and path.is_file():
                yield path


def _follow(folder: Path, top: Path, visited: set[Path]) -> bool:
    if folder.name.startswith("."):
        return False
    real = folder.resolve()
    # A link into the tree would list its images under two names, one to above the tree would list the disk.
    loops = folder.is_symlink() and (real.is_relative_to(top) or top.is_relative_to(real))
    if loops or real in visited:
        return False
    visited.add(real)
    return True


def load_image(
    source: PathLike | bytes,
    *,
    name: str = "image bytes",
    background: Colour = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
) -> torch.Tensor:
    """Load one image as float32 (channels, H, W) in [-1, 1]; see `load_image_with_info`."""
    return load_image_with_info(
        source, name=name, background=background, max_pixels=max_pixels, channels=channels
    )[0]


def load_image_with_info(
    source: PathLike | bytes,
    *,
    name: str = "image bytes",
    background: Colour = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
) -> tuple[torch.Tensor, ImageInfo]:
    """Load one image upright, in sRGB, without alpha, and say what that took.

    Args:
        source: the path of an image file, or what is in one; the content decides the format, not a suffix.
        name: what messages call bytes; a path names itself.
        background: 8-bit sRGB colour put behind transparent pixels.
        max_pixels: refuse more, from the header, before anything is decoded.
        channels: 3 for RGB, 1 for luminance (BT.601).

    Returns: float32 (channels, H, W) in [-1, 1], and an ImageInfo whose notes are for people.
    Raises: ImageError, for whatever is wrong with the file.
    """
    if channels not in (1, 3):
        raise ImageError(
            f"channels={channels} came, but images have 3 (RGB) or 1 (luminance): pass one of these"
        )
    decoded = decode(Encoded(source, name) if isinstance(source, bytes) else Path(source), max_pixels)
    images = _with_channels(_composite(decoded, background), channels)
    size = (images.shape[2], images.shape[1])
    info = ImageInfo(*size, decoded.mode, decoded.format, decoded.notes, decoded.frames)
    return images, info


def iter_images(
    paths: Iterable[PathLike], *, on_error: Callable[[Path, ImageError], None], **options: Any
) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yield (path, image) for each that loads; a bad one goes to `on_error`. Options are `load_image`'s."""
    for path in map(Path, paths):
        try:
            image = load_image(path, **options)
        except ImageError as error:
            on_error(path, error)
        else:
            yield path, image


def _composite(decoded: Decoded, background: Colour) -> torch.Tensor:
    """Scale to [-1, 1], (1 or 3, H, W), with the background where the picture is transparent."""
    alpha = decoded.alpha
    if alpha is not None and alpha.min() < 1:
        behind = np.asarray(background, dtype=np.float32) / 255
        colour = _channels_last(decoded.colour).astype(np.float32) / np.float32(decoded.white)
        colour = colour * alpha[..., None] + behind * (1 - alpha[..., None])
        name = {(255, 255, 255): "white", (0, 0, 0): "black"}.get(background, f"rgb{background}")
        decoded.notes.append(f"transparent pixels composited on {name}")
        return _channels_first(colour).mul_(2).sub_(1)
    if decoded.colour.dtype == np.uint8:
        return from_uint8(decoded.colour)
    return _channels_first(decoded.colour.astype(np.float32)).mul_(2 / decoded.white).sub_(1)


def _with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    if images.shape[0] == channels:
        return images
    if channels == 3:
        return images.repeat(3, 1, 1)
    return torch.einsum("chw,c->hw", images, images.new_tensor(LUMA))[None].clamp_(-1, 1)


def _channels_last(samples: np.ndarray) -> np.ndarray:
    return samples[..., None] if samples.ndim == 2 else samples


def _channels_first(samples: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(np.moveaxis(_channels_last(samples), -1, -3), order="C"))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Round images (..., C, H, W) in [-1, 1] to uint8 in 0..255; values outside are clamped.

    Raises ImageError where a value is NaN or infinite: a picture would hide it.
    """
    bad = images.numel() - int(torch.isfinite(images).sum())
    if bad:
        raise ImageError(
            f"{bad} of {images.numel()} values are NaN or infinite, but numbers in [-1, 1] were wanted: "
            "compute in float32 or bfloat16 (float16 overflows in many VAEs)"
        )
    return images.detach().float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def from_uint8(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Scale uint8 to float32 in [-1, 1]: an array (H, W) or (..., H, W, C), or a tensor (..., C, H, W)."""
    if str(array.dtype).removeprefix("torch.") != "uint8":
        raise ImageError(f"{array.dtype} values came, but uint8 (0 to 255) was wanted: convert them first")
    images = _channels_first(array) if isinstance(array, np.ndarray) else array
    return images.float().div_(127.5).sub_(1)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Turn one image, (C, H, W) or (1, C, H, W) in [-1, 1] with C of 1 or 3, into a Pillow image."""
    one = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
    if one.ndim != 3 or one.shape[0] not in (1, 3) or 0 in one.shape:
        raise ImageError(
            f"shape {tuple(image.shape)} came, but one image (C, H, W) or (1, C, H, W) with C of 1 or 3 "
            "was wanted: save a batch image by image"
        )
    samples = to_uint8(one).permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)


def save_image(images: torch.Tensor, path: PathLike) -> None:
    """Write one image as PNG, JPEG (quality 95, 4:4:4) or lossless WebP, by suffix, whole or not at all."""
    path = Path(path)
    if path.suffix.lower() not in SAVE_OPTIONS:
        raise ImageError(f"{path} ends in '{path.suffix}': images are saved as {', '.join(SAVE_OPTIONS)}")
    name, options = SAVE_OPTIONS[path.suffix.lower()]
    partial = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("xb") as file:
            to_pil(images).save(file, format=name, **options)
        partial.replace(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path} cannot be written ({reason}): use a folder that exists, yours") from error
    finally:
        with suppress(OSError):  # gone by then, unless something failed
            partial.unlink()


def pad_to_multiple(images: torch.Tensor, multiple: int) -> tuple[torch.Tensor, Padding]:
    """Reflect the right and bottom edges until H and W are multiples; the images themselves where they are.

    Args:
        images: (..., H, W), of any size down to 1 x 1 and any dtype.
        multiple: pixels, for instance the spatial_compression_ratio of a VAE.
    """
    height, width = images.shape[-2:]
    if multiple < 1 or 0 in (height, width):
        raise ImageError(f"images of {height} x {width} pixels cannot be padded to a multiple of {multiple}")
    padding = Padding(0, 0, -width % multiple, -height % multiple, height, width)
    for dim, added in ((-2, padding.bottom), (-1, padding.right)):
        if added:
            images = images.index_select(dim, _reflected(images.shape[dim], added, images.device))
    return images, padding


def crop_padding(images: torch.Tensor, padding: Padding) -> torch.Tensor:
    """Cut off what `pad_to_multiple` added."""
    return padding.crop(images)


def _reflected(size: int, added: int, device: torch.device) -> torch.Tensor:
    """Index 0..size-1, then back and forth without repeating an edge, as often as it takes."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(size + added, device=device) % period
    return torch.where(index < size, index, period - index)

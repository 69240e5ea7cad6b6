"""Handing a store's latents to other tools: each tool's own cache on disk, as its code reads it.

A tool takes a cache for its own only where it would have scaled and cropped the image alike. So each place
asks first what the tool makes of the image's size, and images of which it makes something else are left
to it. The commits that the layouts were read at stand with the classes, and in docs/latents.md.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import save_file

from latentvae.base.errors import StoreError
from latentvae.base.files import local, whole_file
from latentvae.models.latents import Posterior, Scaling, seeded_noise
from latentvae.store.dataset import StoreReader, caption, label
from latentvae.store.format import Entry, Manifest

ToolName = Literal["ai-toolkit", "diffusers", "npz", "onetrainer", "sd-scripts", "simpletuner"]
Family = Literal["sd", "sdxl", "sd3", "flux"]
Size = tuple[int, int]  # width, height

# latent channels, and the factors that sd-scripts has for them in its code
FAMILIES: dict[Family, tuple[int, Scaling]] = {
    "sd": (4, Scaling(0.0, 0.18215)),
    "sdxl": (4, Scaling(0.0, 0.13025)),
    "sd3": (16, Scaling(0.0609, 1.5305)),
    "flux": (16, Scaling(0.1159, 0.3611)),
}
REFUSED = {
    "diffusers": "diffusers' scripts have no cache on disk; they take a store as it is, by LatentDataset in "
    "its mode moments: docs/latents.md has the lines.",
    "onetrainer": "OneTrainer knows its cache by the order in which its own run met the images, and asks "
    "neither of which image an entry is nor of which VAE: one that another program wrote may train each "
    "caption on another picture. Let it make its own.",
}
RATIO = 8  # pixels of a latent, in all these tools
STEP = 64  # that the sides of sd-scripts' and SimpleTuner's buckets are multiples of, by default
LEAST, MOST = 256, 1024  # sides of sd-scripts' buckets, by default
_SD_SCRIPTS = re.compile(r".+_\d{4,}x\d{4,}_(flux|sd|sd3|sdxl)\.npz")  # its caches' names


class Untaken(Exception):
    """A tool would make something else of an image; the text says what."""


class Item(NamedTuple):
    """An image to be handed over.

    Attributes:
        moments, flipped: (2C, h, w) float32, unscaled; `flipped` None where they are not stored.
        latents: takes moments and gives unscaled latents (C, h, w), their mean or a draw.
    """

    entry: Entry
    moments: torch.Tensor
    flipped: torch.Tensor | None
    latents: Callable[[torch.Tensor], torch.Tensor]


class Tool(Protocol):
    """One tool's cache.

    Attributes:
        settings: what the tool is to be told, for it to take the cache for its own.
        lost: what of the store it has no use for, or takes otherwise.
    """

    settings: str
    lost: list[str]

    def place(self, entry: Entry) -> Path:
        """Where below the output an image's file belongs; Untaken where the tool would make another one."""
        ...

    def save(self, item: Item, path: Path) -> None:
        """Write an image's file."""
        ...


@dataclass
class HandOver:
    """What was handed over.

    Attributes:
        images: that were written.
        untaken: why, by key, an image was not.
        settings, lost: see `Tool`.
    """

    settings: str
    lost: list[str]
    images: int = 0
    untaken: dict[str, str] = field(default_factory=dict)


def hand_over(
    store: str | Path,
    folder: str | Path,
    to: ToolName,
    *,
    family: Family | None = None,
    sample: bool = False,
    progress: Callable[[int], object] | None = None,
) -> HandOver:
    """Write a store's latents as another tool's cache; no file that is there is replaced.

    Args:
        store: the folder that `latentvae encode` wrote.
        folder: where the tool looks: its folder of images (sd-scripts, ai-toolkit), or of its cache.
        family: what the tool is to train. None: sdxl with 4 latent channels, flux with 16.
        sample: one draw of the posterior, by the key, as the tools themselves cache; else its mean.
        progress: called with 1 for each image.

    Raises:
        StoreError: what `StoreReader` raises; the tool takes no cache, has no such latents, takes none of the
            images, or has a file of that name already; a file cannot be written.
    """
    reader, folder = StoreReader(store), Path(folder)
    tool = _tool(to, reader.manifest, family)
    done = HandOver(tool.settings, tool.lost)
    places = dict[Path, int]()  # all are known before the first is written: a refusal leaves nothing behind
    for number in range(len(reader)):
        entry = reader.entry(number)
        try:
            place = tool.place(entry)
            if place in places:
                other = reader.entry(places[place]).key
                raise Untaken(f"{to} has one file for it and {other}: their names differ in the suffix alone")
            places[place] = number
        except Untaken as reason:
            done.untaken[entry.key] = str(reason)
    if not places:
        key, why = next(iter(done.untaken.items()))
        raise StoreError(f"{to} takes none of the {len(reader)} images of {store}; {key}: {why}.")
    if there := next((place for place in places if (folder / place).exists()), None):
        raise StoreError(
            f"{folder / there} is there already: delete the cache of an earlier time, or name another folder."
        )
    for place, number in places.items():
        _write(tool, reader, number, folder / place, sample)
        done.images += 1
        if progress is not None:
            progress(1)
    return done


def _write(tool: Tool, reader: StoreReader, number: int, path: Path, sample: bool) -> None:
    entry, flipped = reader.entry(number), reader.manifest.flips

    def latents(moments: torch.Tensor) -> torch.Tensor:
        posterior = Posterior(moments[None])
        if not sample:
            return posterior.mode()[0]
        return posterior.at(seeded_noise(tuple(posterior.mean.shape), 0, entry.key, 0))[0]

    moments = reader.moments(number, entry).float()
    mirrored = reader.moments(number, entry, flipped=True).float() if flipped else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path.parent} cannot be made ({error.strerror}): name another folder.") from error
    with whole_file(path, StoreError) as partial:
        tool.save(Item(entry, moments, mirrored, latents), partial)


def _tool(to: ToolName, manifest: Manifest, family: Family | None) -> Tool:
    if to in REFUSED:
        raise StoreError(REFUSED[to])
    if to == "npz":
        return Npz(manifest)
    channels = manifest.config["latent_channels"]
    family = family or ("sdxl" if channels == 4 else "flux")
    if FAMILIES[family][0] != channels or manifest.preprocessing.channels != 3:
        raise StoreError(
            f"{family} has {FAMILIES[family][0]} latent channels and RGB images; the store's VAE has "
            f"{channels} and takes images of {manifest.preprocessing.channels} channels. Choose another "
            "--family."
        )
    tools: dict[str, Callable[[Manifest, Family], Tool]] = {
        "sd-scripts": SdScripts,
        "simpletuner": SimpleTuner,
        "ai-toolkit": AiToolkit,
    }
    return tools[to](manifest, family)


def _below(key: str) -> PurePosixPath:
    """A key as a path below a folder; a store may come from anywhere."""
    path = PurePosixPath(local(key))
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in key or Path(key).drive:
        raise Untaken("its key is no path below a folder")
    return path


def _same(entry: Entry, resized: Size, cropped: Size) -> None:
    """Hold what a tool makes of an image beside what was encoded; a pixel of scaling may be rounded away."""
    own = entry.resized or (entry.width, entry.height)
    encoded = (entry.encoded_width, entry.encoded_height)
    if encoded != cropped:
        raise Untaken(
            f"the tool makes {cropped[0]}x{cropped[1]} px of {entry.width}x{entry.height}, the store holds "
            f"{encoded[0]}x{encoded[1]}"
        )
    if any(entry.padding):
        raise Untaken(f"{encoded[0]}x{encoded[1]} px were padded, which no other tool does")
    if max(abs(a - b) for a, b in zip(own, resized, strict=True)) > 1:
        raise Untaken(
            f"the tool scales it to {resized[0]}x{resized[1]} px before cropping, the store to "
            f"{own[0]}x{own[1]}"
        )


def _factors(manifest: Manifest, family: Family, tool: str) -> Iterator[str]:
    """A line where a tool scales by its own factors, and the store's VAE has others."""
    theirs, ours = FAMILIES[family][1], Scaling.of(manifest)
    if theirs != ours:
        yield (
            f"the VAE's own scaling: {tool} takes (latents - {theirs.shift:g}) x {theirs.factor:g} for "
            f"{family} whatever the VAE's config says, here (latents - {ours.shift:g}) x {ours.factor:g}"
        )


class Npz:
    """One .npz an image, for whoever reads NumPy: KEY.npz."""

    settings = "latents: float32 (C, h, w), scaled with the store's factors; moments: (2C, h, w), unscaled."

    def __init__(self, manifest: Manifest) -> None:
        self.lost: list[str] = []
        self.scaling = Scaling.of(manifest)

    def place(self, entry: Entry) -> Path:
        """KEY.npz, the suffix of the image kept."""
        return Path(f"{_below(entry.key)}.npz")

    def save(self, item: Item, path: Path) -> None:
        """Latents, moments, and what SDXL is conditioned on: heights and widths, top and left of a crop."""
        entry = item.entry
        arrays = {
            "latents": self.scaling.scale(item.latents(item.moments)),
            "moments": item.moments,
            "original_size": (entry.height, entry.width),
            "crop_top_left": (entry.cropped[1], entry.cropped[0]) if entry.cropped else (0, 0),
            "size": (entry.encoded_height, entry.encoded_width),
            "caption": caption(entry),
            "label": label(entry),
        }
        if item.flipped is not None:
            arrays["latents_flipped"] = self.scaling.scale(item.latents(item.flipped))
            arrays["moments_flipped"] = item.flipped
        _savez(path, arrays)


class SdScripts:
    """kohya-ss/sd-scripts, `--cache_latents_to_disk`: NAME_WWWWxHHHH_FAMILY.npz beside each image.

    The latents are those that its VAE gives: unscaled for sd, sdxl and sd3, scaled by its own factors for
    flux. For sd3 and flux the names of the arrays end in the latents' height and width. Read at 48d368fa.
    """

    def __init__(self, manifest: Manifest, family: Family) -> None:
        self.family, self.policy = family, manifest.preprocessing
        self.lost = [
            "moments: its cache holds one latent for each image",
            *_factors(manifest, family, "sd-scripts"),
        ]
        size = self.policy.size
        buckets = (
            f"resolution = {size}, enable_bucket = true, min_bucket_reso = {LEAST}, "
            f"max_bucket_reso = {MOST}, bucket_reso_steps = {STEP}, bucket_no_upscale = false, "
            "cache_latents_to_disk = true"
        )
        self.settings = {
            "centre-crop": f"resolution = {size}, enable_bucket = false, cache_latents_to_disk = true",
            "size": buckets,
            "size-no-upscale": buckets,  # it enlarges small images, which are left to it
            "as-is": f"enable_bucket = true, bucket_no_upscale = true, bucket_reso_steps = {RATIO}, a "
            "resolution of as many pixels as the largest image has, cache_latents_to_disk = true",
        }[self.policy.policy]
        self.settings += "; flip_aug may be true" if manifest.flips else "; flip_aug = false"

    def place(self, entry: Entry) -> Path:
        """NAME_WWWWxHHHH_FAMILY.npz with the size of the image file; NAME has no suffix."""
        key = _below(entry.key)
        if any(" orientation " in note for note in entry.notes):  # of EXIF or XMP
            raise Untaken("sd-scripts does not turn images by their orientation")
        _same(entry, *self._geometry((entry.width, entry.height)))
        return Path(key.with_name(f"{key.stem}_{entry.width:04d}x{entry.height:04d}_{self.family}.npz"))

    def _geometry(self, size: Size) -> tuple[Size, Size]:
        """What it scales an image to, and crops of the middle."""
        if self.policy.size is None:
            return size, (size[0] - size[0] % RATIO, size[1] - size[1] % RATIO)
        square = (self.policy.size, self.policy.size)
        buckets = [square] if self.policy.policy == "centre-crop" else sd_scripts_buckets(self.policy.size)
        aspect = size[0] / size[1]
        bucket = size if size in buckets else min(buckets, key=lambda each: abs(each[0] / each[1] - aspect))
        axis = 1 if aspect > bucket[0] / bucket[1] else 0
        scale = bucket[axis] / size[axis]
        return (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)), bucket

    def save(self, item: Item, path: Path) -> None:
        """Arrays latents, original_size (width, height), crop_ltrb and, of mirror images, latents_flipped."""
        scaling = FAMILIES["flux"][1] if self.family == "flux" else Scaling(0.0, 1.0)
        entry = item.entry
        latents = scaling.scale(item.latents(item.moments))
        ending = "_{}x{}".format(*latents.shape[-2:]) if self.family in ("sd3", "flux") else ""
        arrays: dict[str, object] = {
            f"latents{ending}": latents,
            f"original_size{ending}": (entry.width, entry.height),
            f"crop_ltrb{ending}": _crop_ltrb(
                (entry.encoded_width, entry.encoded_height), (entry.width, entry.height)
            ),
        }
        if item.flipped is not None:
            arrays[f"latents_flipped{ending}"] = scaling.scale(item.latents(item.flipped))
        _savez(path, arrays)


@lru_cache
def sd_scripts_buckets(size: int) -> list[Size]:
    """Widths and heights that sd-scripts has for a resolution, sorted: multiples of 64, at most its area."""
    square = size // STEP * STEP
    found = {(square, square)}
    for width in range(LEAST, MOST + 1, STEP):
        height = min(MOST, size * size // width // STEP * STEP)
        if height >= LEAST:
            found |= {(width, height), (height, width)}
    return sorted(found)


def _crop_ltrb(bucket: Size, size: Size) -> tuple[float, float, float, float]:
    """What sd-scripts notes of a crop: the whole image fitted into the bucket, from its left and top."""
    aspect = size[0] / size[1]
    fits_height = bucket[0] / bucket[1] > aspect
    width, height = (bucket[1] * aspect, bucket[1]) if fits_height else (bucket[0], bucket[0] / aspect)
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


class SimpleTuner:
    """bghira/SimpleTuner, `cache_dir_vae`: the sha256 of each name without its suffix, in its subfolder.

    Read at bc8e6ab7.
    """

    def __init__(self, manifest: Manifest, family: Family) -> None:
        policy = manifest.preprocessing
        self.lost = ["moments: its cache holds one latent for each image"]
        if manifest.flips:
            self.lost.append("mirror images: it has no place for them")
        if policy.policy != "centre-crop":
            raise StoreError(
                "SimpleTuner has aspect ratios of its own, which no store has; it takes squares: encode with "
                "--size and --crop, and a size of which 64 is a divisor."
            )
        self.size = policy.size or 0
        self.settings = (
            f"resolution_type: pixel, resolution: {policy.size}, crop: true, crop_style: center, "
            "crop_aspect: square, hash_filenames: true, compress_cache: false"
        )

    def place(self, entry: Entry) -> Path:
        """SUBFOLDER/sha256(NAME).pt."""
        key = _below(entry.key)
        if self.size % STEP:
            raise Untaken(f"it rounds sides of {self.size} px to multiples of {STEP}")
        return Path(
            key.parent, hashlib.sha256(key.stem.encode("utf-8", "surrogateescape")).hexdigest() + ".pt"
        )

    def save(self, item: Item, path: Path) -> None:
        """Unscaled latents (C, h, w) as a tensor that `torch.save` wrote."""
        torch.save(item.latents(item.moments).clone(), path)


SPACES: dict[Family, str] = {"sd": "sd1", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux1"}  # of ai-toolkit
# what sides of its buckets are multiples of: its get_bucket_divisibility, whatever bucket_tolerance says
STEPS: dict[Family, int] = {"sd": 16, "sdxl": 16, "sd3": 32, "flux": 32}


class AiToolkit:
    """ostris/ai-toolkit, `cache_latents_to_disk`: _latent_cache/NAME_HASH.safetensors beside each image.

    HASH is of the file's name, of what it is scaled and cropped to, and of the kind of latents. Read at
    27a03a91.
    """

    def __init__(self, manifest: Manifest, family: Family) -> None:
        self.policy, self.space, self.step = manifest.preprocessing, SPACES[family], STEPS[family]
        self.scaling, self.dtype = Scaling.of(manifest), manifest.torch_dtype
        self.lost = ["moments: its cache holds one latent for each image"]
        if manifest.flips:
            self.lost.append("mirror images")
        if self.policy.size is None:
            raise StoreError("ai-toolkit scales all images: encode with --size.")
        square = ", square_crop: true" if self.policy.policy == "centre-crop" else ""
        self.settings = f"resolution: [{self.policy.size}], cache_latents_to_disk: true{square}"

    def place(self, entry: Entry) -> Path:
        """SUBFOLDER/_latent_cache/NAME_HASH.safetensors."""
        key, described = _below(entry.key), json.dumps(self._described(entry), sort_keys=True)
        digest = (
            base64.urlsafe_b64encode(hashlib.md5(described.encode("utf-8")).digest()).decode().rstrip("=")
        )
        return Path(key.parent, "_latent_cache", f"{key.stem}_{digest}.safetensors")

    def _described(self, entry: Entry) -> dict[str, object]:
        """What it knows a cached image by."""
        size = entry.width, entry.height
        resolution = self.policy.size or 0
        if self.policy.policy == "centre-crop":
            bucket = resolution, resolution
        else:
            bucket = ai_toolkit_bucket(size, resolution, self.step)
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        wide, high = math.ceil(size[0] * scale), math.ceil(size[1] * scale)
        _same(entry, (wide, high), bucket)
        return {
            "filename": PurePosixPath(entry.key).name,
            "scale_to_width": wide,
            "scale_to_height": high,
            "crop_x": int((wide - bucket[0]) / 2),
            "crop_y": int((high - bucket[1]) / 2),
            "crop_width": bucket[0],
            "crop_height": bucket[1],
            "latent_space_version": self.space,
            "latent_version": 1,
        }

    def save(self, item: Item, path: Path) -> None:
        """A tensor `latent` (C, h, w), scaled with the VAE's factors, in the store's dtype."""
        latents = self.scaling.scale(item.latents(item.moments)).to(self.dtype)
        described = {key: str(value) for key, value in self._described(item.entry).items()}
        save_file({"latent": latents.contiguous()}, path, described | {"format": "pt"})


def ai_toolkit_bucket(size: Size, resolution: int, step: int) -> Size:
    """What ai-toolkit scales and crops an image of a width and height to: never larger than it is."""
    most = resolution * resolution
    wanted = min(size[0] * size[1], most)
    scale = (wanted / (size[0] * size[1])) ** 0.5
    wide, high = (side * scale / step for side in size)
    rounds = (math.floor, math.ceil)
    found = [(x(wide) * step, y(high) * step) for x in rounds for y in rounds]
    found = [(w, h) for w, h in found if w > 0 and h > 0 and w * h <= most]
    least = (max(step, math.floor(wide) * step), max(step, math.floor(high) * step))
    return min(found or [least], key=lambda each: abs(each[0] * each[1] - wanted))


def found_caches(paths: Iterable[str | Path]) -> list[str]:
    """What `encode` makes of sd-scripts' caches below folders of images, a line for each kind."""
    counts, samples = Counter[str](), dict[str, Path]()
    walks = chain.from_iterable(os.walk(folder) for folder in paths)  # what it cannot enter, it leaves out
    for path in (Path(folder, name) for folder, _, names in walks for name in sorted(names)):
        if match := _SD_SCRIPTS.fullmatch(path.name):
            counts[match[1]] += 1
            samples.setdefault(match[1], path)
    return [
        f"{count} caches of sd-scripts for {family} are there ({samples[family]}) and not read: each holds "
        "one draw instead of the posterior, and does not say of which VAE. The images are encoded."
        for family, count in counts.items()
    ]


def _savez(path: Path, arrays: dict[str, object]) -> None:
    with path.open("wb") as file:  # given a path, NumPy adds a suffix to it
        # newer NumPy has a keyword of its own, which no array is called
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]

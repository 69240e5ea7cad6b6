"""What "Show Python" shows: lines that give a result without the page, and those that ask the page for it.

Handlers' own arguments come in. Files are named as they were uploaded, models as the picker names them: a
path of the server is no visitor's matter.
"""

import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gradio.context import LocalContext

from latentvae.demo.guard import Limits

EXPLORE_SIDE = Limits.explore_side


def reconstruct(photo: str, model: str, latents: str, seed: float) -> str:
    """For the tab Reconstruct."""
    drawn = f"posterior.sample(torch.Generator().manual_seed({int(seed or 0)}))"
    lines = [
        f"posterior, padding = latentvae.encode(vae, {_image(photo)}[None])",
        f"latents = {drawn if latents == 'sample' else 'posterior.mode()'}",
        "images = latentvae.decode(vae, latents, padding)",
        f"latentvae.save_image(images[0], {_named(photo, '.reconstruction.png')})",
    ]
    return _lines(["import torch"] if latents == "sample" else [], model, lines)


def compress(photo: str, model: str, quality: float) -> str:
    """For the tab Compress."""
    lines = [
        f"data = compress(vae, {_image(photo)}[None], quality={int(quality)})",
        f"Path({_named(photo, '.lvae')}).write_bytes(data)",
        f"latentvae.save_image(decompress(vae, data)[0], {_named(photo, '.lvae.png')})",
    ]
    imports = ["from pathlib import Path", "from latentvae.codec.compression import compress, decompress"]
    return _lines(imports, model, lines)


def interpolate(first: str, second: str, model: str, frames: float, route: str) -> str:
    """For the tab Interpolate."""
    imports = [
        "from latentvae.images.resizing import thumbnail",
        "from latentvae.toolbox.editing.interpolate import interpolate, match_size, save_animation",
    ]
    lines = [
        f"first = thumbnail({_image(first)}, {EXPLORE_SIDE})",
        f"second = match_size({_image(second)}, *first.shape[-2:])",
        f"found = interpolate(vae, [first, second], {int(frames)}, {route!r})",
        f"save_animation(found.frames, {_named(first, '.interpolated.webp')}, 8)",
    ]
    return _lines(imports, model, lines)


def vary(photo: str, model: str, temperature: float, copies: float, seed: float) -> str:
    """For the tab Vary."""
    imports = [
        "from latentvae.images.resizing import thumbnail",
        "from latentvae.toolbox.editing.vary import Variations",
    ]
    lines = [
        f"image = thumbnail({_image(photo)}, {EXPLORE_SIDE})",
        f"found = Variations(vae, image, seed={int(seed or 0)})",
        f"for copy in range({int(copies)}):",
        f"    latentvae.save_image(found.image({float(temperature)}, copy), f'copy {{copy + 1}}.png')",
    ]
    return _lines(imports, model, lines)


def curl(endpoint: str, photos: Collection[int], *values: Any) -> str:
    """Lines of a shell that ask this page: uploads, the call, and its result.

    Args:
        endpoint: its name.
        photos: places among the values of those that are pictures.
        values: the endpoint's arguments.
    """
    root = shlex.quote(f"{_root()}/gradio_api")  # an IPv6 address has brackets
    lines, data = [], list(values)
    for number, place in enumerate(photos, 1):
        # in quotes, as curl cuts names at commas and semicolons
        name = Path(values[place]).name.replace("\\", "\\\\").replace('"', '\\"')
        file = shlex.quote(f'files=@"{name}"')
        upload = f"curl -s -F {file} {root}/upload"
        # the only path in a list of one, escaped as JSON has it, and so it goes back
        lines.append(f"photo{number}=$({upload} | cut -d'\"' -f2)")
        data[place] = {"path": f"@{number}@", "meta": {"_type": "gradio.FileData"}}
    body = shlex.quote(json.dumps({"data": data}))
    for number in range(1, len(lines) + 1):
        body = body.replace(f"@{number}@", f"'\"$photo{number}\"'", 1)
    call = f"{root}/call/{endpoint}"
    lines.append(f"event=$(curl -s -H 'Content-Type: application/json' -d {body} {call} | cut -d'\"' -f4)")
    return "\n".join([*lines, f"curl -sN {call}/$event", ""])


def _root() -> str:
    """This page's address, as the browser that asks has it."""
    headers = getattr(LocalContext.request.get(None), "headers", {})
    page = headers.get("referer", "").partition("?")[0].partition("#")[0]
    return (page or f"http://{headers.get('host', '127.0.0.1:7860')}").rstrip("/")


def _lines(imports: list[str], model: str, lines: list[str]) -> str:
    head = [*imports, "import latentvae", "", f"vae = latentvae.load({model!r})"]
    return "\n".join([*head, *lines, ""])


def _image(photo: str) -> str:
    return f"latentvae.load_image({Path(photo).name!r})"


def _named(photo: str, suffix: str) -> str:
    return repr(Path(photo).stem + suffix)

"""What "Show Python" shows: the lines that give a result of the page without it.

Handlers' own arguments come in. Files are named as they were uploaded, models as the picker names them: a
path of the server is no visitor's matter.
"""

from pathlib import Path

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


def _lines(imports: list[str], model: str, lines: list[str]) -> str:
    head = [*imports, "import latentvae", "", f"vae = latentvae.load({model!r})"]
    return "\n".join([*head, *lines, ""])


def _image(photo: str) -> str:
    return f"latentvae.load_image({Path(photo).name!r})"


def _named(photo: str, suffix: str) -> str:
    return repr(Path(photo).stem + suffix)

"""What "Show Python" shows: lines that give a result without the page, and those that ask the page for it.

Handlers' own arguments come in, and the longer side of the copy that the page took of a large picture, or 0.
Files are named as they were uploaded, models as the picker names them: a path of the server is no visitor's
matter.
"""

import json
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from gradio.context import LocalContext

from latentvae.codec import rivals
from latentvae.demo.guard import Limits

Photos = Sequence[tuple[str, str | None]] | None  # and their captions

EXPLORE_SIDE = Limits.explore_side
LVAE = ".lvae"  # what Compare calls our own files


def reconstruct(photo: str, model: str, latents: str, seed: float, side: int = 0) -> str:
    """For the tab Reconstruct."""
    drawn = f"posterior.sample(torch.Generator().manual_seed({int(seed or 0)}))"
    lines = [
        f"posterior, padding = latentvae.encode(vae, {_image(photo, side)}[None])",
        f"latents = {drawn if latents == 'sample' else 'posterior.mode()'}",
        "images = latentvae.decode(vae, latents, padding)",
        f"latentvae.save_image(images[0], {_named(photo, '.reconstruction.png')})",
    ]
    return _lines(["import torch"] * (latents == "sample"), model, lines)


def compress(photo: str, model: str, quality: float, side: int = 0) -> str:
    """For the tab Compress."""
    lines = [
        f"data = compress(vae, {_image(photo, side)}[None], quality={int(quality)})",
        f"Path({_named(photo, '.lvae')}).write_bytes(data)",
        f"latentvae.save_image(decompress(vae, data)[0], {_named(photo, '.lvae.png')})",
    ]
    imports = ["from pathlib import Path", "from latentvae.codec.compression import compress, decompress"]
    return _lines(imports, model, lines)


def compare(photo: str, model: str, against: Sequence[str], quality: float, side: int = 0) -> str:
    """For the tab Compare."""
    files = [name for name in against if name in rivals.WITHIN]
    others = [name for name in against if name not in (LVAE, *files)]
    imports = ["from latentvae.measure.metrics import Metrics"]
    lines = [f"image, back = {_image(photo, side)}, {{}}"]
    if files or LVAE in against:
        imports.append("from latentvae.codec.compression import compress, decompress")
        lines.append(f"data = compress(vae, image[None], quality={int(quality)})")
    if LVAE in against:
        lines.append(f"back[{LVAE!r}] = decompress(vae, data)[0]")
    if files:
        imports += [
            "from latentvae.codec.rivals import best_within",
            "from latentvae.images.saving import to_pil",
        ]
        lines += [
            f"for name in {files}:  # the best files of no more bytes",
            "    file, quality = best_within(to_pil(image), name, len(data))",
            "    print(f'{name}: {len(file)} bytes, quality {quality}')",
            "    back[name] = latentvae.load_image(file)",
        ]
    if others:
        imports += [
            "from latentvae.images.tensors import crop_padding, pad_to_multiple",
            "from latentvae.models import spaces",
        ]
        lines += [
            f"for name in {others}:  # latents that are not quantised; an AutoencoderTiny's too",
            "    other = spaces.load_autoencoder(name)",
            "    padded, padding = pad_to_multiple(image[None], spaces.latent_shape(other)[1])",
            "    latents = spaces.encode_scaled(other, padded)",
            "    back[name] = crop_padding(spaces.decode_scaled(other, latents).detach(), padding)[0]",
        ]
    lines += [
        "for name, found in back.items():",
        "    (row,) = Metrics().add(name, image[None], found[None])",
        "    print(f'{name}: {row.psnr:.2f} dB, SSIM {row.ssim:.3f}')",
        f"    file = {Path(photo).stem!r} + f'.{{name}}.png'.replace('/', '-').replace('..', '.')",
        "    latentvae.save_image(found, file)",
    ]
    return _lines(imports, model, lines)


def interpolate(first: str, second: str, model: str, frames: float, route: str, side: int = 0) -> str:
    """For the tab Interpolate."""
    imports = ["from latentvae.toolbox.editing.interpolate import interpolate, match_size, save_animation"]
    lines = [
        f"first = {_image(first, EXPLORE_SIDE)}",
        f"second = match_size({_image(second)}, *first.shape[-2:])",
        f"found = interpolate(vae, [first, second], {int(frames)}, {route!r})",
        f"save_animation(found.frames, {_named(first, '.interpolated.webp')}, 8)",
    ]
    return _lines(imports, model, lines)


def vary(photo: str, model: str, temperature: float, copies: float, seed: float, side: int = 0) -> str:
    """For the tab Vary."""
    imports = ["from latentvae.toolbox.editing.vary import Variations"]
    lines = [
        f"image = {_image(photo, EXPLORE_SIDE)}",
        f"found = Variations(vae, image, seed={int(seed or 0)})",
        f"for copy in range({int(copies)}):",
        f"    latentvae.save_image(found.image({float(temperature)}, copy), f'copy {{copy + 1}}.png')",
    ]
    return _lines(imports, model, lines)


def sample(
    photos: Photos, model: str, prior: str, side_of_draws: str, count: float, seed: float, side: int = 0
) -> str:
    """For the tab Sample."""
    wide = f"{int(side_of_draws)}, {int(side_of_draws)}"
    imports = ["from latentvae.toolbox.priors.sampling import sample"]
    if prior == "standard":
        imports.append("from latentvae.toolbox.priors.prior import StandardNormal")
        lines = [f"prior = StandardNormal(vae, {wide})"]
    else:
        imports += [
            "import tempfile",
            "from pathlib import Path",
            "from latentvae.toolbox.editing.interpolate import match_size",
            "from latentvae.toolbox.priors.latent_set import LatentSet",
            "from latentvae.toolbox.priors.mixture import fit_mixture",
        ]
        lines = [
            "with tempfile.TemporaryDirectory() as folder:",
            "    squares, store = Path(folder, 'squares'), Path(folder, 'store')",
            "    squares.mkdir()",
            f"    for number, file in enumerate({_names(photos)}):",
            f"        image = match_size(latentvae.load_image(file), {wide})",
            "        for name, each in (('a', image), ('b', image.flip(2))):  # mirrored too",
            "            latentvae.save_image(each, squares / f'{number:02d}{name}.png')",
            "    latentvae.encode_folder(vae, squares, store, dtype='fp32')",
            "    prior = fit_mixture(LatentSet(store))",
        ]
    lines += [
        f"for number, image in enumerate(sample(vae, prior, {int(count)}, {int(seed or 0)}), 1):",
        "    latentvae.save_image(image, f'draw {number}.png')",
    ]
    return _lines(imports, model, lines)


def odd(photos: Photos, model: str, side: int = 0, *, net: str | None = None) -> str:
    """For the tab Find the odd one, whose server has the LPIPS network `net`."""
    imports = [
        "from latentvae.toolbox.anomaly.calibration import calibrate",
        "from latentvae.toolbox.anomaly.terms import look",
    ]
    imports += ["from latentvae.measure.lpips import load_lpips"] * (net is not None)
    lines = [
        f"files, network = {_names(photos)}, {f'load_lpips({net!r})' if net else None}",
        f"images = [thumbnail(latentvae.load_image(file), {EXPLORE_SIDE})[None] for file in files]",
        "looks = [look(vae, image, network) for image in images]",
        "for number, file in enumerate(files):",
        "    others = looks[:number] + looks[number + 1 :]",
        f"    print(file, round(calibrate(vae, others, {net!r}).judge(looks[number]).score, 3))",
    ]
    return _lines(imports, model, lines)


def fill(photo: str, mask: str, model: str, method: str, side: int = 0) -> str:
    """For the tab Fill in, beside the mask that is downloaded there."""
    imports = ["from latentvae.toolbox.editing.fill import fill"]
    lines = [
        f"image = {_image(photo, EXPLORE_SIDE)}",
        f"missing = latentvae.load_image({_named(photo, '.mask.png')}, channels=1)[0] > 0  # white",
        f"found = fill(vae, image[None], missing, method={method!r})",
        f"latentvae.save_image(found.images[0], {_named(photo, '.filled.png')})",
    ]
    return _lines(imports, model, lines)


def curl(endpoint: str, photos: Collection[int], *values: Any, side: int = 0) -> str:
    """Lines of a shell that ask this page: uploads, the call, and its result.

    Args:
        endpoint: its name.
        photos: places among the values of those that are pictures.
        values: the endpoint's arguments.
        side: has no say: endpoints take pictures whole.
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
    if any("thumbnail(" in line for line in lines):
        imports = ["from latentvae.images.resizing import thumbnail", *imports]
    head = [*imports, "import latentvae", "", f"vae = latentvae.load({model!r})"]
    return "\n".join([*head, *lines, ""])


def _image(photo: str, side: int = 0) -> str:
    whole = f"latentvae.load_image({Path(photo).name!r})"
    return f"thumbnail({whole}, {side})" if side else whole


def _names(photos: Photos) -> list[str]:
    return [Path(photo).name for photo, _ in photos or []]


def _named(photo: str, suffix: str) -> str:
    return repr(Path(photo).stem + suffix)

"""`latentvae sample`: new images from a prior."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentvae import images
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import make_folder
from latentvae.cli.options import OUTPUT, counted, output_folder, tell
from latentvae.cli.places import write_json
from latentvae.cli.session import Session, image_channels, takes
from latentvae.toolbox import priors

if TYPE_CHECKING:
    import torch

GRID = 64  # images at most that the grid shows
HONEST = (
    "Without a prior, latents come from the standard normal distribution. A VAE with a small KL weight does "
    "not fill it: expect textures and no objects. Learn a prior with `latentvae prior fit`."
)


@takes("model", ..., "device", "json")
def sample(
    session: Session,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[PRIOR]", help="Folder that `prior fit` wrote. Default: standard normal."),
    ] = None,
    output: Annotated[Path, output_folder("Folder for the images.")] = OUTPUT,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds, other images.")] = 0,
    label: Annotated[
        int | None, typer.Option(help="Draw this class alone, from a prior that was fitted --by-class.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels of each side, without a prior.", show_default="256")
    ] = None,
) -> None:
    """Draw new images: writes samples/*.png, samples.png (a grid) and samples.json.

    Image n depends on the prior, the seed and n alone: a larger --count does not change the first ones.
    """
    if folder is not None and size is not None:
        raise LatentVAEError("--size is for sampling without a prior; a prior has the size of its latents.")
    # before the model: a wrong folder is said at once
    made = priors.loading.load_prior(folder) if folder is not None else None
    vae = session.load()
    image_channels(vae)
    chosen = made or priors.prior.StandardNormal(vae, size or 256, size or 256)
    # latents of one VAE are noise to another
    chosen.check(vae)
    labels = [label] * count if label is not None else None
    sampling = priors.sampling
    # before the folder is made: a refused request leaves nothing
    sampling.check_request(chosen, count, seed, 0, labels)
    make_folder(output / "samples")
    result: dict[str, Any] = {
        "prior": str(folder) if folder is not None else None,
        "kind": chosen.card.kind,
        "seed": seed,
        "count": count,
        "note": None if folder is not None else HONEST,
    }
    # a generator: nothing has been drawn yet
    batches = sampling.sample_batches(vae, chosen, count, seed, labels=labels, progress=True)
    _write(batches, labels or sampling.sample_labels(chosen, count, seed), output, result)
    height, width = result["size"]
    lines = [f"{counted(count, 'image')} of {width}x{height} px, {chosen.card.kind} prior."]
    if result["note"]:
        lines.append(f"Note: {HONEST}")
    tell(result, [*lines, f"Look at {output / 'samples.png'}."], session.json)


def _write(
    batches: Iterable[torch.Tensor], labels: list[int] | None, output: Path, result: dict[str, Any]
) -> None:
    """Write each image as it comes, then the grid of the first ones and the JSON, which names them all."""
    paths: list[Path] = []
    shown: list[torch.Tensor] = []
    # each is written as it comes, so that Ctrl-C keeps what was drawn
    for image in (image for batch in batches for image in batch):
        # the seed is in the name, so that another seed replaces nothing
        paths.append(output / f"samples/seed{result['seed']}-{len(paths):05d}.png")
        images.saving.save_image(image, paths[-1])
        # not all of them: memory must not grow with --count
        shown += [image] * (len(shown) < GRID)
    images.saving.save_picture(images.drawing.sheet(shown), output / "samples.png")
    result["size"] = list(shown[0].shape[-2:])
    result["images"] = [
        {"path": str(path), **({"label": labels[n]} if labels else {})} for n, path in enumerate(paths)
    ]
    write_json(result, output / "samples.json")

"""A prior from its folder: the card, and the reader of its kind. The priors themselves do not know it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from latentvae.base.errors import LatentVAEError
from latentvae.toolbox.priors.diffusion import DiffusionPrior
from latentvae.toolbox.priors.mixture import MixturePrior
from latentvae.toolbox.priors.prior import FORMAT, SIDECAR, Prior, PriorCard

# by `kind` of prior.json; the standard normal distribution is made from a VAE and has no folder
READERS: dict[str, Callable[[Path, PriorCard], Prior]] = {
    "gaussian": MixturePrior.read,  # a mixture of one
    "mixture": MixturePrior.read,
    "diffusion": DiffusionPrior.read,
}


def load_prior(folder: str | Path) -> Prior:
    """Read what `Prior.save` wrote.

    Raises:
        LatentVAEError: no prior there, a damaged one, or one of a later version.
    """
    card = _read_card(Path(folder))
    return READERS[card.kind](Path(folder), card)


def _read_card(folder: Path) -> PriorCard:
    """Checked as a whole, because a card that is only nearly right would scale every draw wrongly."""
    path = folder / SIDECAR
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        if version != FORMAT:
            raise ValueError(f"its format is {version!r}, this package reads {FORMAT}")
        content["latent_shape"] = tuple(int(side) for side in content["latent_shape"])
        card = PriorCard(**content)  # TypeError for a key too many or too few
        if card.kind not in READERS:
            raise ValueError(f"its kind is {card.kind!r}")
        figures = [card.scaling_factor, card.shift_factor, *card.mean, *card.std]
        if len(card.mean) != len(card.std) or len(card.std) != card.latent_shape[0]:
            raise ValueError("its normalisation does not fit its channels")
        if not all(math.isfinite(figure) for figure in figures):  # JSON of Python may hold NaN
            raise ValueError("its normalisation is not finite")
    except OSError as error:
        raise LatentVAEError(
            f"{folder} is no prior (no {SIDECAR}: {error.strerror}): make one with `latentvae prior fit`."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise LatentVAEError(
            f"{path} is damaged or no prior's ({error}): make it again with `latentvae prior fit`."
        ) from error
    return card

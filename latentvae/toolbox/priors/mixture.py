"""Gaussians and mixtures of them, fitted to latents: principal components, and what they leave out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latentvae.base.errors import LatentVAEError
from latentvae.base.optional import need
from latentvae.models.latents import seeded_noise
from latentvae.toolbox.priors.latent_set import LatentSet
from latentvae.toolbox.priors.prior import Prior, PriorCard, card_of

TENSORS = "mixture.safetensors"
RANK = 256  # of a Gaussian; its covariance costs the square
PER_COMPONENT = 2  # images for each principal component and mixture component: fewer give no covariance
REGULARISATION = 1e-6  # added to variances, scikit-learn's; latents have variances near 1


class MixturePrior(Prior):
    """A mixture of K Gaussians over the first R principal components, with independent noise for the rest.

    Latents of D = C*h*w numbers are `centre + basis^T s + residual * n`: s (R,) is drawn from the mixture, n
    is standard normal noise orthogonal to the basis, and `residual` gives it the variance that R components
    leave out (probabilistic PCA, Tipping & Bishop 1999). With R = D nothing is left out, and one component
    has the latents' own mean and covariance.

    Args:
        card: its kind is "gaussian" (K = 1) or "mixture".
        tensors: float32: weights (K,), means (K, R), factors (K, R, R) (lower Cholesky factors of the
            covariances), basis (R, D), centre (D,), residual (1,).
    """

    def __init__(self, card: PriorCard, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(card)
        self.tensors = tensors

    def draw(self, numbers: Sequence[int], seed: int, labels: Sequence[int] | None = None) -> torch.Tensor:
        return torch.stack([self._one(number, seed) for number in numbers])

    def _one(self, number: int, seed: int) -> torch.Tensor:
        parts = self.tensors
        rank, dimensions = parts["basis"].shape
        pick = np.random.default_rng((seed, number)).random()
        component = int(np.searchsorted(parts["weights"].cumsum(0).numpy(), pick, side="right"))
        component = min(component, len(parts["weights"]) - 1)  # rounded weights add up to nearly 1
        noise = seeded_noise((rank + dimensions,), seed, self.card.kind, number)
        scores = parts["means"][component] + parts["factors"][component] @ noise[:rank]  # (R,)
        # what the basis holds of the noise is taken out: there the scores have the whole variance already
        rest = noise[rank:] - (parts["basis"] @ noise[rank:]) @ parts["basis"]  # (D,)
        flat = parts["centre"] + scores @ parts["basis"] + parts["residual"] * rest
        return flat.reshape(self.card.latent_shape)

    def write(self, folder: Path) -> None:
        save_file(self.tensors, folder / TENSORS)

    @staticmethod
    def read(folder: Path, card: PriorCard) -> "MixturePrior":
        """Of a folder. Raises LatentVAEError where its tensors are damaged."""
        try:
            tensors = load_file(folder / TENSORS)
            (components, rank), dimensions = tensors["means"].shape, int(np.prod(card.latent_shape))
            wanted = {
                "weights": (components,),
                "means": (components, rank),
                "factors": (components, rank, rank),
                "basis": (rank, dimensions),
                "centre": (dimensions,),
                "residual": (1,),
            }
            if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
                raise ValueError("its tensors do not fit the latents")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise LatentVAEError(
                f"{folder / TENSORS} cannot be used ({error}): make the prior again with "
                "`latentvae prior fit`."
            ) from error
        return MixturePrior(card, tensors)


def fit_mixture(
    latents: LatentSet, *, components: int = 1, rank: int | None = None, seed: int = 0
) -> MixturePrior:
    """Fit a Gaussian (one component) or a mixture to posterior samples of a store's images.

    The parts of a mixture differ in as many principal components as the images bear, N / (2 K); in the others
    all parts share one Gaussian.

    Args:
        latents: of the store.
        components: of the mixture, each with a full covariance.
        rank: principal components; None: 256, or as many as the latents and the number of images allow.
        seed: of the posterior samples and of the mixture's first means.

    Raises:
        LatentVAEError: components or rank out of range, or scikit-learn is not installed.
    """
    # samples and not means: what is drawn should vary as what the decoder has learned from does
    noise = torch.stack([seeded_noise(latents.shape, seed, "fit", i) for i in range(len(latents))])
    flat = latents.draw(range(len(latents)), noise).flatten(1).double().numpy()  # (N, D)
    tensors, fit = _learn(flat, components, _check_rank(flat.shape, components, rank), seed)
    learned = {name: torch.from_numpy(value).float().contiguous() for name, value in tensors.items()}
    return MixturePrior(card_of(latents, "gaussian" if components == 1 else "mixture", fit), learned)


def _learn(
    flat: np.ndarray, components: int, rank: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a `MixturePrior` of latents (N, D), and how they were learned, for people."""
    decomposition, mixture = need("sklearn.decomposition"), need("sklearn.mixture")
    pca = decomposition.PCA(rank, random_state=seed).fit(flat)
    scores = pca.transform(flat)  # (N, R)
    # one Gaussian takes all components; of several, each has to see PER_COMPONENT images for every one
    mixed = rank if components == 1 else max(1, min(rank, len(flat) // (PER_COMPONENT * components)))
    model = mixture.GaussianMixture(components, random_state=seed, reg_covar=REGULARISATION)
    model.fit(scores[:, :mixed])
    # the variance beyond the rank, spread evenly over the D - R directions there; rounding can go below 0
    left_out = max(0.0, float(flat.var(0).sum() - scores.var(0).sum()))
    tensors = {
        "weights": model.weights_,
        "means": np.pad(model.means_, ((0, 0), (0, rank - mixed))),  # 0: where PCA's centre is
        "factors": _with_gaussian_rest(np.linalg.cholesky(model.covariances_), scores[:, mixed:].std(0)),
        "basis": pca.components_,
        "centre": pca.mean_,
        "residual": np.sqrt([left_out / max(1, flat.shape[1] - rank)]),
    }
    fit = {
        "components": components,
        "rank": rank,
        "mixed_rank": mixed,
        "dimensions": flat.shape[1],
        "variance_in_rank": float(pca.explained_variance_ratio_.sum()),
        "seed": seed,
    }
    return tensors, fit


def _with_gaussian_rest(factors: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """Cholesky factors (K, m, m) with more components below, independent and alike in all K: (K, R, R)."""
    mixed, rank = factors.shape[1], factors.shape[1] + len(stds)
    whole = np.zeros((len(factors), rank, rank))
    whole[:, :mixed, :mixed] = factors
    whole[:, range(mixed, rank), range(mixed, rank)] = stds
    return whole


def _check_rank(shape: tuple[int, ...], components: int, rank: int | None) -> int:
    """The rank asked for, or the largest that the images bear."""
    images, dimensions = shape
    if not 1 <= components <= images:
        raise LatentVAEError(
            f"a mixture of {components} components needs as many images, and these are {images}; wanted 1 to "
            f"{images} components (--components), or --kind gaussian, which is one."
        )
    most = min(dimensions, images - 1)
    if rank is None:
        return min(most, RANK)
    if not 1 <= rank <= most:
        raise LatentVAEError(
            f"a rank of {rank} came; wanted 1 to {most}: these are {images} images, whose latents have "
            f"{dimensions} numbers."
        )
    return rank

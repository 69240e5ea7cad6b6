"""Features of images in two dimensions, for maps, and which images are neighbours."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import numpy as np

from latentvae.base.errors import LatentVAEError
from latentvae.base.optional import need

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Method = Literal["pca", "umap"]
NEIGHBOURS = 15  # UMAP's own default
LEAST_UMAP = 5  # images: its first guess are eigenvectors of their graph
SMALL = 2000  # rows, of some hundred features
FLAT = 1e-7  # of the largest value: features that vary less are all the same but for rounding


@dataclass(frozen=True)
class Projection:
    """Images as points of a plane.

    Attributes:
        points: float64 (N, 2).
        method: pca, or umap, whose axes and distances between groups mean nothing.
        explained: share of the features' variance along each axis, of PCA; None of UMAP.
    """

    points: np.ndarray
    method: Method
    explained: tuple[float, float] | None


def normalise(values: np.ndarray) -> np.ndarray:
    """Centre the columns of (N, D) and divide all by one number: their root mean variance becomes 1.

    So results do not depend on the unit. Columns are not standardised one by one, which would make as much
    of a pixel or cell in which nothing happens as of any other: on digits clusters then agree less with the
    labels, of pixels (NMI 0.74 to 0.68) and of latents (0.58 to 0.46). Equal rows become 0.

    Raises:
        LatentVAEError: no table, or values that are not finite.
    """
    values = check_table(values)
    centred = values - values.mean(0)
    spread = float(np.sqrt(np.square(centred).mean()))
    rounding = FLAT * float(np.abs(values).max())
    scaled: np.ndarray = centred / spread if spread > rounding else np.zeros_like(centred)
    return scaled


def check_table(values: np.ndarray) -> np.ndarray:
    """The features as float64 (N, D).

    Raises:
        LatentVAEError: no table of finite numbers, or no row.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape or not np.isfinite(table).all():
        raise LatentVAEError(
            f"features of shape {table.shape} came; wanted finite numbers, one row (N, D) for each image."
        )
    return table


def one_thread_if_small(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function of a table (N, D), its first argument, use one thread where the table is small.

    k-means and its kin share out every iteration, which of a small table takes less than the threads then
    wait for each other; on a busy machine each of thousands of iterations waits for its turn.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        table: Any = args[0] if args else kwargs["values"]
        shape = np.shape(table)
        limit = 1 if not shape or shape[0] < SMALL else None  # None: as many as there are
        with need("threadpoolctl").threadpool_limits(limit):
            return function(*args, **kwargs)

    return run


@one_thread_if_small
def project(values: np.ndarray, method: Method = "pca", seed: int = 0) -> Projection:
    """Place images on a plane by their features, normalised first; deterministic by the seed.

    Args:
        values: (N, D).
        method: pca (Pearson 1901): the two directions of the largest variance. umap (McInnes et al. 2018;
            extra `umap`): neighbours stay neighbours.
        seed: of UMAP; PCA draws nothing.

    Raises:
        LatentVAEError: fewer than two images (5 with UMAP), another method, or umap-learn is not installed.
    """
    scaled = normalise(values)
    least = LEAST_UMAP if method == "umap" else 2
    if method not in get_args(Method):
        raise LatentVAEError(f"method {method!r} came; choose one of {', '.join(get_args(Method))}.")
    if len(scaled) < least:
        raise LatentVAEError(f"a map by {method} needs {least} images or more; {len(scaled)} came.")
    return _umap(scaled, seed) if method == "umap" else _pca(scaled)


def _pca(scaled: np.ndarray) -> Projection:
    if not scaled.any():  # all alike: no direction has a share
        return Projection(np.zeros((len(scaled), 2)), "pca", (0.0, 0.0))
    # full: the randomised solver, which "auto" takes for large tables, draws
    pca = need("sklearn.decomposition").PCA(min(2, *scaled.shape), svd_solver="full")
    found = pca.fit_transform(scaled)
    points = np.zeros((len(scaled), 2))  # a single feature has no second direction
    points[:, : found.shape[1]] = found
    total = float(scaled.var(0, ddof=1).sum())  # ddof as explained_variance_ has it
    shares = [float(variance) / total for variance in (*pca.explained_variance_, 0.0)]
    return Projection(points, "pca", (shares[0], shares[1]))


def _umap(scaled: np.ndarray, seed: int) -> Projection:
    umap = need("umap")
    logger.info("UMAP of %d images; it compiles itself first, which takes some ten seconds", len(scaled))
    # n_jobs: with a seed there is one thread, and a warning unless that is asked for
    neighbours = min(NEIGHBOURS, len(scaled) - 1)
    first = "spectral" if len(scaled) > 4 * NEIGHBOURS else "random"  # eigenvectors of few fail
    reducer = umap.UMAP(n_neighbors=neighbours, init=first, random_state=seed, n_jobs=1)
    return Projection(np.asarray(reducer.fit_transform(scaled), dtype=np.float64), "umap", None)


@one_thread_if_small
def neighbours(values: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest other images of each by normalised features, nearest first: int (N, count).

    Fewer columns where there are fewer other images.
    """
    scaled = normalise(values)
    wanted = min(count, len(scaled) - 1)
    if wanted < 1:
        return np.zeros((len(scaled), 0), dtype=int)
    finder = need("sklearn.neighbors").NearestNeighbors(n_neighbors=wanted).fit(scaled)
    found: np.ndarray = finder.kneighbors(return_distance=False)  # without the points themselves
    return found

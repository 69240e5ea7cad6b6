"""Groups of images by their features (k-means), and how well groups and features agree with labels."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from latentvae.base.errors import LatentVAEError
from latentvae.base.optional import need
from latentvae.toolbox.atlas.projection import normalise, one_thread_if_small

STARTS = 10  # of k-means, of which the best counts
MOST = 12  # clusters that are tried where their number is to be found
SAMPLE = 2000  # images that a silhouette is measured on: it takes all distances


@dataclass(frozen=True)
class Clustering:
    """Which cluster each image is in.

    Attributes:
        numbers: int (N,), 0 for the largest cluster, and so on.
        silhouettes: mean silhouette (Rousseeuw 1987; -1..1, higher is better separated) of each number of
            clusters that was tried; empty where the number was given.
    """

    numbers: np.ndarray
    silhouettes: dict[int, float]

    @property
    def count(self) -> int:
        """How many clusters there are."""
        return int(self.numbers.max()) + 1

    @property
    def sizes(self) -> list[int]:
        """How many images each has."""
        return np.bincount(self.numbers).tolist()


def distinct(rows: np.ndarray) -> int:
    """How many rows differ: copies cannot be told apart."""
    return len(np.unique(rows, axis=0))


@one_thread_if_small
def cluster(
    values: np.ndarray, count: int | None = None, seed: int = 0, *, progress: bool = False
) -> Clustering:
    """Group images (N, D) by k-means on normalised features; deterministic by the seed.

    Args:
        values: (N, D).
        count: of clusters. None: of 2 to 12 that with the largest mean silhouette.
        seed: of the starts.
        progress: show a bar while numbers of clusters are tried, if that takes more than two seconds.

    Raises:
        LatentVAEError: fewer than two images, or more clusters than images that differ.
    """
    scaled = normalise(values)
    different = distinct(scaled)
    if len(scaled) < 2:
        raise LatentVAEError("1 image came; there is nothing to group. Name two or more.")
    if count is not None:
        if not 1 <= count <= different:
            raise LatentVAEError(
                f"{count} clusters came for {len(scaled)} images, {different} of them different; wanted 1 to "
                f"{different}. Leave the number out to have it chosen."
            )
        return Clustering(_k_means(scaled, count, seed), {})
    # one less than there are different images: a silhouette needs a cluster with two
    tried = range(2, min(MOST, different - 1) + 1)
    if not tried:
        return Clustering(_k_means(scaled, different, seed), {})
    found, silhouettes = {}, {}
    for each in tqdm(tried, desc="clusters", unit="number", disable=not progress, delay=2):
        found[each] = _k_means(scaled, each, seed)
        silhouettes[each] = _silhouette(scaled, found[each], seed)
    best = max(tried, key=lambda each: silhouettes[each])  # of equal ones the fewest
    return Clustering(found[best], silhouettes)


def _k_means(scaled: np.ndarray, count: int, seed: int) -> np.ndarray:
    found = need("sklearn.cluster").KMeans(count, n_init=STARTS, random_state=seed).fit_predict(scaled)
    # numbered by size, so that another seed that finds the same clusters gives the same colours
    sizes = np.bincount(found, minlength=count)
    rank = np.empty(count, dtype=int)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(count)
    numbers: np.ndarray = rank[found]
    return numbers


def _silhouette(scaled: np.ndarray, numbers: np.ndarray, seed: int) -> float:
    if len(scaled) > SAMPLE:
        some = np.random.default_rng(seed).permutation(len(scaled))[:SAMPLE]
        scaled, numbers = scaled[some], numbers[some]
    if not 2 <= len(np.unique(numbers)) < len(numbers):  # all that were drawn are of one cluster
        return -1.0  # the worst there is, so that this number is not chosen
    return float(need("sklearn.metrics").silhouette_score(scaled, numbers))


def nmi(numbers: np.ndarray, labels: Sequence[str]) -> float:
    """Normalised mutual information of clusters and labels: 0 independent, 1 the same groups.

    Normalised by the mean of the two entropies. Images without a label ("") do not count.

    Raises:
        LatentVAEError: not one label for each image, or none.
    """
    names = np.asarray(labels, dtype=str)
    if names.shape != numbers.shape:
        raise LatentVAEError(f"{names.size} labels came for {numbers.size} images; each needs one.")
    labelled = names != ""
    if not labelled.any():
        raise LatentVAEError("no image has a label; clusters cannot be compared with any.")
    score = need("sklearn.metrics").normalized_mutual_info_score
    return float(score(names[labelled], numbers[labelled]))


@dataclass(frozen=True)
class FewLabels:
    """Accuracy of a classifier that has seen few labels, over several draws of these.

    Attributes:
        accuracy: share of the other images that it labels right, mean over draws, 0..1.
        spread: standard deviation over draws.
        draws: how many.
        per_class: labels that it learned from, of each class.
        classes: how many.
        tested: images that it was asked about in each draw.
        left_out: images of classes that have too few to learn from and ask about.
    """

    accuracy: float
    spread: float
    draws: int
    per_class: int
    classes: int
    tested: int
    left_out: int


@one_thread_if_small
def few_label_accuracy(
    values: np.ndarray, labels: Sequence[str], per_class: int = 10, draws: int = 10, seed: int = 0
) -> FewLabels:
    """Logistic regression on normalised features (N, D) from a few labels a class; asked about all others.

    Features are normalised over all images, which needs no label. The same seed draws the same images
    whatever the features, so that two kinds of features compare. Images without a label ("") do not count.

    Raises:
        LatentVAEError: not one label for each image; fewer than two labels with more than `per_class` images.
    """
    names = np.asarray(labels, dtype=str)
    scaled = normalise(values)
    if len(names) != len(scaled):
        raise LatentVAEError(f"{len(names)} labels came for {len(scaled)} images; each needs one.")
    found, counts = np.unique(names[names != ""], return_counts=True)
    classes = found[counts > per_class]  # one more than is learned from, to be asked about
    if len(classes) < 2 or per_class < 1 or draws < 1:
        raise LatentVAEError(
            f"a classifier that learns from {per_class} images of each label and is asked about others needs "
            f"two labels of more, and there are {len(classes)}."
        )
    used = np.flatnonzero(np.isin(names, classes))
    random = np.random.default_rng(seed)
    shares, tested = [], 0
    for _ in range(draws):
        learned = np.concatenate(
            [random.choice(np.flatnonzero(names == each), per_class, replace=False) for each in classes]
        )
        asked = np.setdiff1d(used, learned)  # never what it has learned
        shares.append(_accuracy((scaled[learned], names[learned]), (scaled[asked], names[asked])))
        tested = len(asked)
    spread = float(np.std(shares))
    left_out = int((names != "").sum()) - len(used)
    return FewLabels(float(np.mean(shares)), spread, draws, per_class, len(classes), tested, left_out)


def _accuracy(learned: tuple[np.ndarray, np.ndarray], asked: tuple[np.ndarray, np.ndarray]) -> float:
    classifier = need("sklearn.linear_model").LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        # 1,000 steps that do not end at the optimum still classify; a warning for each draw would tell nobody
        warnings.simplefilter("ignore", need("sklearn.exceptions").ConvergenceWarning)
        classifier.fit(*learned)
    return float(classifier.score(*asked))

"""What searches for odd images share: scores of a calibration and of PCA, and areas under their ROC."""

import numpy as np
import torch
from sklearn.decomposition import PCA

from latentvae.toolbox.anomaly.calibration import Verdict
from latentvae.toolbox.anomaly.roc import auroc

RANKS = (8, 16, 32, 64)
Scores = dict[str, list[float]]  # of each detector, one for each image


def our_scores(verdicts: list[Verdict]) -> Scores:
    """The score, and each term alone."""
    found = {"score": [one.score for one in verdicts]}
    return found | {name: [one.terms[name] for one in verdicts] for name in verdicts[0].terms}


def fit_pca(vectors: np.ndarray, ranks: tuple[int, ...] = RANKS) -> dict[int, PCA]:
    """A PCA of each rank of (N, D)."""
    return {rank: PCA(rank, random_state=0).fit(vectors) for rank in ranks}


def squared_error(pca: PCA, vectors: np.ndarray) -> np.ndarray:
    """(N,), the mean squared error of reconstructions of (N, D)."""
    errors: np.ndarray = np.square(vectors - pca.inverse_transform(pca.transform(vectors))).mean(1)
    return errors


def areas(scores: Scores, odd: np.ndarray, among: np.ndarray | None = None) -> dict[str, float]:
    """AUROC of each detector, over all images or those of a mask."""
    chosen = np.ones(len(odd), dtype=bool) if among is None else among
    return {
        name: auroc(np.asarray(values)[chosen].tolist(), odd[chosen].tolist())
        for name, values in scores.items()
    }


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each detector, a column for each experiment, and their mean."""
    lines = ["| | " + " | ".join([*columns, "mean"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in next(iter(columns.values())):
        values = [column[name] for column in columns.values()]
        cells = [f"{value:.3f}" for value in [*values, float(np.mean(values))]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def flat(images: torch.Tensor) -> np.ndarray:
    """(N, D) of (N, C, H, W)."""
    vectors: np.ndarray = images.flatten(1).double().numpy()
    return vectors

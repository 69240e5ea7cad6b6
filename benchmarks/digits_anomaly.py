"""AUROC of a class that a VAE of digits has never seen, beside PCA and a search among the pixels themselves.

    pip install scikit-learn
    python benchmarks/digits_anomaly.py --place runs/digits

For each odd class a VAE of its own is trained on the other nine (half a minute on one core; those already in
`--place` are used again) and calibrated on every second of the same digits, to stay within minutes. Scored
are 500 held-out digits, 50 of them odd. PCA and the nearest neighbour among pixels learn the calibrating
digits. No class but 1 and 8 was looked at when the score's form was chosen.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from digits import Digits, read_digits
from digits_vae import digits_vae
from machine import machine
from odd_scores import areas, fit_pca, flat, our_scores, squared_error, table
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm

from latentvae.toolbox.anomaly.calibration import calibrate
from latentvae.toolbox.anomaly.terms import look

RANKS = (2, 4, 8, 16, 32, 64)


def measure(odd: int, learned: Digits, held_out: Digits, place: Path) -> dict[str, float]:
    """AUROC of one odd class by every detector."""
    every = learned.select(learned.labels != odd)
    vae = digits_vae(every, place / f"without-{odd}")
    normal = every.select(np.arange(0, len(every), 2))
    usual = calibrate(vae, [look(vae, image[None]) for image in tqdm(normal.images, unit="digit")])
    scores = our_scores([usual.judge(look(vae, image[None])) for image in held_out.images])
    known, tried = flat(normal.images), flat(held_out.images)
    for rank, pca in fit_pca(known, RANKS).items():
        scores[f"PCA-{rank}"] = squared_error(pca, tried).tolist()
    nearest = NearestNeighbors(n_neighbors=1).fit(known).kneighbors(tried)[0]
    scores["nearest pixels"] = nearest[:, 0].tolist()
    return areas(scores, held_out.labels == odd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("runs/digits"), help="folder of the VAEs")
    parser.add_argument("--odd", type=int, nargs="+", default=list(range(10)), help="classes held out")
    parser.add_argument("--output", type=Path, default=None, help="JSON of the table")
    options = parser.parse_args()
    learned, held_out = read_digits()
    found = {str(odd): measure(odd, learned, held_out, options.place) for odd in options.odd}
    print(table(found))
    best = {odd: max(value for name, value in row.items() if "PCA" in name) for odd, row in found.items()}
    print(
        f"\nBest PCA of each class, chosen by its own AUROC: {np.mean(list(best.values())):.3f} in the mean."
    )
    print(machine())
    if options.output:
        text = json.dumps({"machine": machine(), "auroc": found}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

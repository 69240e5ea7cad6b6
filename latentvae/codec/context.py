"""What is known of a latent value before it is coded: a prediction, and how far off it may be.

Values are coded in wavefronts (each row lags two columns behind the one above), channel after channel in
each, so that the left, upper left, upper and upper right neighbours of a whole wavefront are known when it is
coded. Two linear predictors for each channel, one of the value and one of the distance from it, learn as they
go from what was already coded; so does the width of the distribution that belongs to a predicted distance.
The decoder learns the same, because all of it is integer arithmetic.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from latentvae.codec.probabilities import FRACTIONS, SCALE_COUNT, UNIT, scales

LIMIT = 1 << 14  # of values; sums below stay under 2^63 with it
FEATURE_LIMIT = 1 << 10
WEIGHT_BITS = 12
WEIGHT_LIMIT = 2 << WEIGHT_BITS
MEMORY = 5  # what the predictors learned 2^MEMORY wavefronts ago counts e times less
FRACTION_BITS = 3  # of FRACTIONS
CROSS = 3  # channels before and after that are looked at
PRIOR = 64  # how sure the predictors are of their first weights, as a sum of squared features
WIDTH_PRIOR = 16  # how many distances the first widths are worth


class Front(NamedTuple):
    """The cells of a wavefront: a slice of each padded plane, and their rows and columns."""

    start: int
    length: int
    rows: np.ndarray
    columns: np.ndarray


class Predictor:
    """A linear predictor that learns by least squares in integers.

    The normal equations are exact sums; one sweep of Gauss-Seidel after each wavefront keeps the weights near
    their solution.
    """

    def __init__(self, weights: np.ndarray, prior: int) -> None:
        """Begin with these weights, as sure of them as after features whose squares sum to `prior`."""
        self.weights = np.rint(weights * (1 << WEIGHT_BITS)).astype(np.int64)
        self.products = np.diag(np.full(len(weights), prior, dtype=np.int64))
        self.targets = self.products @ self.weights

    def predict(self, features: np.ndarray, fraction_bits: int) -> np.ndarray:
        """Predictions (n,) in 2^-fraction_bits from features (K, n)."""
        shift = WEIGHT_BITS - fraction_bits
        return (self.weights @ features + (1 << (shift - 1))) >> shift

    def learn(self, features: np.ndarray, found: np.ndarray) -> None:
        """Take in what was found where these features were."""
        self.products -= self.products >> MEMORY
        self.targets -= self.targets >> MEMORY
        self.products += features @ features.T
        self.targets += (features @ found) << WEIGHT_BITS
        for i, row in enumerate(self.products):
            change = int(self.targets[i] - row @ self.weights) // max(int(row[i]), 1)
            self.weights[i] = min(max(int(self.weights[i]) + change, -WEIGHT_LIMIT), WEIGHT_LIMIT)


class Context:
    """Predictions for integers (C, h, w), wavefront after wavefront.

    The planes have two spare rows above and two spare columns on the right, all zeros; the columns are the
    left neighbours of the next row too.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.shape = (channels, height, width)
        self.pitch = width + 2
        self.first = 2 * self.pitch + 2
        self.plane = self.first + height * self.pitch
        self.values = np.zeros(channels * self.plane, dtype=np.int16)
        self.distances = np.zeros(channels * self.plane, dtype=np.int16)
        self.taps = [self._taps(channel) for channel in range(channels)]
        self.value_predictors = [self._predictor(taps, 0.4, 2, PRIOR, 0.0) for taps in self.taps]
        self.distance_predictors = [
            self._predictor(taps, 0.13, 6, PRIOR * FRACTIONS**2, 0.2) for taps in self.taps
        ]
        self.bounds = (scales()[1:] + scales()[:-1]) // 2
        self.widths = np.tile(scales() * WIDTH_PRIOR, (channels, 1))
        self.counts = np.full((channels, SCALE_COUNT), WIDTH_PRIOR, dtype=np.int64)

    def _taps(self, channel: int) -> list[int]:
        """Where the features are, as seen from a cell of this channel's plane."""
        row = self.pitch
        own = [-1, -row, -row - 1, -row + 1, -2, -2 * row]
        near = range(max(0, channel - CROSS), min(self.shape[0], channel + CROSS + 1))
        others = [(other - channel) * self.plane for other in near if other != channel]
        around = [place + tap for place in others for tap in own[:4]]
        return (
            own + around + [place for place in others if place < 0]
        )  # of channels before it, the cell itself

    @staticmethod
    def _predictor(taps: list[int], weight: float, count: int, prior: int, bias: float) -> Predictor:
        weights = np.zeros(len(taps) + 1)
        weights[:count] = weight
        weights[-1] = bias
        return Predictor(weights, prior)

    def fronts(self) -> Iterator[Front]:
        """Every wavefront in coding order."""
        _, height, width = self.shape
        for time in range(width + 2 * (height - 1)):
            top, bottom = max(0, (time - width + 2) // 2), min(height - 1, time // 2)
            if top <= bottom:
                rows = np.arange(top, bottom + 1)
                start = self.first + top * self.pitch + time - 2 * top
                yield Front(start, len(rows), rows, time - 2 * rows)

    def _slice(self, channel: int, front: Front, offset: int = 0) -> slice:
        start, pace = channel * self.plane + front.start + offset, self.pitch - 2
        return slice(start, start + (front.length - 1) * pace + 1, pace)

    def _features(self, plane: np.ndarray, channel: int, front: Front) -> np.ndarray:
        features = np.empty((len(self.taps[channel]) + 1, front.length), dtype=np.int64)
        for i, tap in enumerate(self.taps[channel]):
            features[i] = plane[self._slice(channel, front, tap)]
        features[-1] = 1
        return features.clip(-FEATURE_LIMIT, FEATURE_LIMIT, out=features)

    def expect(self, channel: int, front: Front) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (n,) in 1 / FRACTIONS and indexes of scales (n,) for one channel of a wavefront."""
        self._values = self._features(self.values, channel, front)
        self._distances = self._features(self.distances, channel, front)
        self._distances[-1] = FRACTIONS
        self._predictions = self.value_predictors[channel].predict(self._values, FRACTION_BITS)
        np.clip(self._predictions, -LIMIT * FRACTIONS, LIMIT * FRACTIONS, out=self._predictions)
        # distances are in 1 / FRACTIONS, and scales in 1 / UNIT
        expected = self.distance_predictors[channel].predict(self._distances, 5)
        self._classes = np.searchsorted(self.bounds, expected)
        widths = self.widths[channel, self._classes] // self.counts[channel, self._classes]
        return self._predictions, np.searchsorted(self.bounds, widths)

    def learn(self, channel: int, front: Front, values: np.ndarray) -> None:
        """Take in the values (n,) of what `expect` was called for last."""
        cells = self._slice(channel, front)
        distances = np.abs(values * FRACTIONS - self._predictions).clip(max=np.iinfo(np.int16).max)
        self.values[cells], self.distances[cells] = values, distances
        self.value_predictors[channel].learn(self._values, values)
        self.distance_predictors[channel].learn(self._distances, distances)
        np.add.at(self.widths[channel], self._classes, distances * (UNIT // FRACTIONS))
        np.add.at(self.counts[channel], self._classes, 1)

    def coded(self) -> np.ndarray:
        """All values, int16 (C, h, w)."""
        channels, height, _ = self.shape
        planes = self.values.reshape(channels, self.plane)[:, self.first :]
        return planes.reshape(channels, height, self.pitch)[:, :, :-2]

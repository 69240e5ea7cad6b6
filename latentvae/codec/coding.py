"""Quantised latents to bytes and back, with the range coder of `constriction`."""

import math
from collections.abc import Callable
from typing import Any

import constriction
import numpy as np

from latentvae.base.errors import CodecError
from latentvae.codec.context import LIMIT, Context, Front
from latentvae.codec.probabilities import FRACTIONS, REACH, TOTAL, tables

MAX_BITS = 16  # of what lies beyond REACH: distances are below 2 * LIMIT
TOTAL_BITS = math.log2(TOTAL)
SHORTEST = TOTAL_BITS - math.log2(tables().max())  # bits of the likeliest value there is
# Said, because constriction's default changes in 0.5, and a file is read only with what it was written with.
FAMILY = constriction.stream.model.Categorical(perfect=False)
Exchange = Callable[[int, Front, np.ndarray, np.ndarray], np.ndarray]


def entropy_encode(targets: np.ndarray, rate_weight: float = 0.0) -> tuple[np.ndarray, bytes]:
    """Quantise and code latents in units of their steps.

    Args:
        targets: float (C, h, w).
        rate_weight: 0 rounds to the nearest; more takes the other neighbour where that saves bits: what a bit
            weighs against squared error in steps.

    Returns:
        Whole numbers (C, h, w), as `entropy_decode` gives them, and the payload.

    Raises:
        CodecError: values of LIMIT steps or more, or not finite.
    """
    if not np.all(np.abs(targets) < LIMIT):
        raise CodecError(
            f"latents of up to {np.abs(targets).max():g} steps came, but fewer than {LIMIT} were wanted: "
            "choose a lower quality, or a model whose scaling_factor fits its latents."
        )
    encoder = constriction.stream.queue.RangeEncoder()
    bits = TOTAL_BITS - np.log2(tables())

    def exchange(channel: int, front: Front, bases: np.ndarray, rows: np.ndarray) -> np.ndarray:
        wanted = targets[channel, front.rows, front.columns]
        values = np.rint(wanted).astype(np.int64)
        if rate_weight:
            below = np.floor(wanted).astype(np.int64)
            choices = np.stack([below, below + 1])  # (2, n)
            places = (choices - bases).clip(-REACH, REACH) + REACH
            costs = (choices - wanted) ** 2 + rate_weight * bits[rows, places]
            values = choices[costs.argmin(0), np.arange(front.length)]
        _put(encoder, values - bases, rows)
        return values

    context = Context(*targets.shape)
    _walk(context, exchange)
    return context.coded(), encoder.get_compressed().astype("<u4").tobytes()


def entropy_decode(payload: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The whole numbers (C, h, w) that `entropy_encode` coded.

    Raises:
        CodecError: the payload is no code of this many values.
    """
    # before memory is taken for it: half the shortest code there could be, so rounding refuses no good file
    if math.prod(shape) * SHORTEST / 2 > 8 * len(payload) + 64:
        raise CodecError(
            f"a payload of {len(payload)} bytes is too short for {shape} latents: it is damaged."
        )
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(payload, dtype="<u4").astype(np.uint32))
    context = Context(*shape)
    try:
        _walk(context, lambda channel, front, bases, rows: bases + _get(decoder, rows))
    except AssertionError as error:  # the coder's word for bytes that no encoder wrote
        raise CodecError(f"the payload is damaged: {error}.") from error
    if not decoder.maybe_exhausted():
        raise CodecError("the payload is damaged: something is left behind the last value.")
    return context.coded()


def _walk(context: Context, exchange: Exchange) -> None:
    """Have every wavefront of every channel coded, and learn from it."""
    for front in context.fronts():
        for channel in range(context.shape[0]):
            predictions, scales = context.expect(channel, front)
            bases = (predictions + FRACTIONS // 2) // FRACTIONS
            rows = scales * FRACTIONS + FRACTIONS // 2 + predictions - bases * FRACTIONS
            values = exchange(channel, front, bases, rows)
            if np.abs(values).max() > LIMIT:
                raise CodecError("the payload is damaged: a value is larger than any encoder writes.")
            context.learn(channel, front, values)


def _put(encoder: Any, distances: np.ndarray, rows: np.ndarray) -> None:
    """Code distances (n,): a symbol each, and behind the outermost ones how far beyond REACH, Elias gamma."""
    symbols = distances.clip(-REACH, REACH) + REACH
    encoder.encode(symbols.astype(np.int32), FAMILY, tables()[rows])
    for beyond in np.abs(distances[np.abs(distances) >= REACH]) - REACH:
        length = int(beyond + 1).bit_length()
        encoder.encode(length - 1, constriction.stream.model.Uniform(MAX_BITS))
        if length > 1:
            low = int(beyond + 1) - (1 << (length - 1))
            encoder.encode(low, constriction.stream.model.Uniform(1 << (length - 1)))


def _get(decoder: Any, rows: np.ndarray) -> np.ndarray:
    """The inverse of `_put`."""
    distances = decoder.decode(FAMILY, tables()[rows]).astype(np.int64) - REACH
    for i in np.flatnonzero(np.abs(distances) == REACH):
        length = decoder.decode(constriction.stream.model.Uniform(MAX_BITS)) + 1
        beyond = (1 << (length - 1)) - 1
        if length > 1:
            beyond += decoder.decode(constriction.stream.model.Uniform(1 << (length - 1)))
        distances[i] += beyond if distances[i] > 0 else -beyond
    return distances

"""Choosing tokens from predictions: the most likely, or one at random from a given number."""

import torch
from torch import Tensor

from diffdistill.doubles import doubled
from diffdistill.projection import (
    TILE_NUMBERS,
    Prediction,
    dense,
    prediction_rows,
    vocabulary,
    with_rows,
)


def invert(probs: Tensor, numbers: Tensor) -> Tensor:
    """Return the index ``[...]`` at which ``probs`` ``[..., V]`` add up to more than ``numbers``.

    ``probs`` need not be normalized; an index of probability 0 is never returned.
    """
    sums = probs.cumsum(-1)
    goal = numbers[..., None] * sums[..., -1:]
    found = torch.searchsorted(sums, goal, right=True)[..., 0]
    places = torch.arange(probs.shape[-1], device=probs.device)
    last = torch.where(probs > 0.0, places, 0).amax(-1)
    return found.minimum(last)


@torch.no_grad()
def best_tokens(prediction: Prediction, *, tile_rows: int | None = None) -> Tensor:
    """Return the most likely token of each row, int64 ``[K]``, of a prediction ``[K, V]``."""
    return _by_tiles(prediction, None, tile_rows)


@torch.no_grad()
def sampled_tokens(
    prediction: Prediction, numbers: Tensor, *, tile_rows: int | None = None
) -> Tensor:
    """Return a token of each row, int64 ``[K]``, drawn from the softmax of ``[K, V]``.

    The cumulative distribution is inverted in float64, a few rows at a time.

    Args:
        prediction: Logits, or what they are projected from.
        numbers: Uniform numbers ``[K]`` in [0, 1).
        tile_rows: Rows at a time; None chooses by the vocabulary.
    """
    return _by_tiles(prediction, numbers, tile_rows)


def _by_tiles(prediction: Prediction, numbers: Tensor | None, tile_rows: int | None) -> Tensor:
    rows = prediction_rows(prediction)
    size = tile_rows or max(1, TILE_NUMBERS // (4 * vocabulary(prediction)))
    found = []
    for start in range(0, len(rows), size):
        logits = dense(with_rows(prediction, rows[start : start + size]))
        if numbers is None:
            found.append(logits.argmax(-1))
        else:
            part = doubled(numbers[start : start + size])
            found.append(invert(doubled(logits).softmax(-1), part).to(rows.device))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=rows.device)

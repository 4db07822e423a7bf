"""Comparing two predictions a few rows at a time, for what ``projection.token_maps`` has not.

The logits of a tile are projected, compared and forgotten, and projected again in the backward
pass: sorted probabilities or a divergence of one's own cost no more memory than a tile.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffdistill.projection import (
    TILE_NUMBERS,
    Prediction,
    dense,
    prediction_rows,
    vocabulary,
    with_rows,
)

Comparison = Callable[..., Tensor]
"""``(student's logits [n, V], teacher's [n, W], columns [n]...) -> map [n]``."""


def in_tiles(
    compare: Comparison,
    student: Prediction,
    teacher: Prediction,
    *columns: Tensor,
    tile_rows: int | None = None,
) -> Tensor:
    """Return ``compare`` of all rows ``[K, V]`` and ``[K, W]``, a map ``[K]`` in float32 at least.

    Args:
        compare: What to make of the logits of some rows; each row stands alone.
        student: The student's prediction.
        teacher: The teacher's.
        columns: Numbers ``[K]`` of each row, handed on to ``compare``.
        tile_rows: Rows compared at a time; None chooses by the larger vocabulary.
    """
    ours, theirs = prediction_rows(student), prediction_rows(teacher)
    words = max(vocabulary(student), vocabulary(teacher))
    size = tile_rows or max(1, TILE_NUMBERS // (4 * words))  # sorting takes several copies

    def tile(first: Tensor, second: Tensor, *rest: Tensor) -> Tensor:
        logits = dense(with_rows(student, first)), dense(with_rows(teacher, second))
        return compare(*logits, *rest)

    parts = zip(*(column.split(size) for column in (ours, theirs, *columns)), strict=True)
    maps = [checkpoint(tile, *p, use_reentrant=False, preserve_rng_state=False) for p in parts]
    return torch.cat(maps)

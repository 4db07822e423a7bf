"""What predictions say at each token of an answer, for looking at only: no gradients.

Logits are made a few rows at a time, as in ``projection``.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffdistill.projection import (
    TILE_NUMBERS,
    Prediction,
    at,
    dense,
    prediction_rows,
    spread,
    token_maps,
    vocabulary,
    with_rows,
)
from diffdistill.supports import TopK, truncated_divergence
from diffdistill.tokenwise import IMPOSSIBLE, scaled


@torch.no_grad()
def token_ranks(prediction: Prediction | TopK, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the rank of each token among all of the vocabulary, int64 ``[...]``; 1 is the first.

    Tokens that are equally likely share the best rank. Of a ``TopK`` the tokens that it lacks have
    the rank after its last, as in the code of Many Faces (arXiv:2605.11182).

    Args:
        prediction: Logits ``[..., V]``, or what they are made from.
        tokens: Token ids ``[...]``.
        mask: bool ``[...]``, rows to compute; the others are 0.
    """
    if isinstance(prediction, TopK):
        hits = prediction.ids == tokens[..., None]
        last = torch.ones_like(tokens[..., None], dtype=torch.bool)
        return (torch.cat([hits, last], -1).int().argmax(-1) + 1).masked_fill(~mask, 0)
    wanted, found = tokens[mask], []
    for rows, (logits,) in _tiles([prediction], mask):
        found.append((logits > logits.gather(-1, wanted[rows, None])).sum(-1) + 1)
    return spread(torch.cat(found), mask, mask.shape)


@torch.no_grad()
def consensus_gap(
    predictions: Sequence[Prediction], mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return how far several predictions of a token are from agreeing, ``[...]`` in nats.

    ``-log sum_y exp(mean_i log p_i(y))``: the least that ``mean_i KL(p || p_i)`` can be for any p,
    reached at the normalized geometric mean, which is what a student learns by the reverse KL from
    a teacher whose context it does not see (eq. 10 and 11 of Many Faces, arXiv:2605.11182, known
    to us second-hand; that this is its irreducible loss is ours). 0 if and only if all agree.

    Args:
        predictions: Logits ``[..., V]`` under each context, or what they are made from.
        mask: bool ``[...]``, rows to compute; the others are 0.
        temperature: Logits are divided by it.
    """
    found = []
    for _, logits in _tiles(predictions, mask):
        sides = [scaled(side, temperature).log_softmax(-1) for side in logits]
        mean = torch.stack(sides).clamp_min(IMPOSSIBLE).mean(0)
        found.append(-mean.logsumexp(-1))
    return spread(torch.cat(found).clamp_min(0.0), mask, mask.shape)


@torch.no_grad()
def reverse_kl(
    student: Prediction, teacher: Prediction | TopK, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return KL(student || teacher), ``[...]``; of a ``TopK`` a lower bound (``tail``)."""
    if not isinstance(teacher, TopK):
        maps = token_maps(student, teacher, ["reverse-kl"], mask=mask, temperature=temperature)
        return maps["reverse-kl"]
    found = truncated_divergence(
        student,
        teacher,
        divergence="reverse-kl",
        support="teacher",
        k=teacher.ids.shape[-1],
        correction="tail",
        mask=mask,
        temperature=temperature,
    )
    return found["divergence"]


def _tiles(predictions: Sequence[Prediction], mask: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield slices of the rows that a mask chooses, with each prediction's logits ``[n, V]``."""
    chosen = [at(prediction, mask) for prediction in predictions]
    size = max(1, TILE_NUMBERS // (len(chosen) * max(vocabulary(side) for side in chosen)))
    count = len(prediction_rows(chosen[0]))
    for start in range(0, max(count, 1), size):
        rows = slice(start, start + size)
        yield rows, [dense(with_rows(side, prediction_rows(side)[rows])) for side in chosen]

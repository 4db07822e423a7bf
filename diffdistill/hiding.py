"""What a student is not shown of a text, and its teacher, with other tokens, neither.

Tokens are hidden at random, and with each all of its chunk on both sides, so that student and
teacher are asked about the same bytes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.chunks import num_chunks, select_whole, tokens_of, touched
from diffdistill.divergences import masked_mean
from diffdistill.draws import Draws
from diffdistill.texts import Text


class Hidden(NamedTuple):
    """What is hidden from the student, and where it is compared with the teacher.

    Attributes:
        mask: bool ``[B, L]``: the student's hidden tokens, whole chunks.
        active: bool ``[B, N]``: the chunks compared; hidden on both sides.
        t: The noise level ``[B]``.
    """

    mask: Tensor
    active: Tensor
    t: Tensor


def usable_chunks(text: Text, answer: Text) -> Tensor:
    """Return the chunks that may be compared, bool ``[B, N]``.

    Those with tokens on both sides, all of which may be hidden.
    """
    count = num_chunks(text.chunks, answer.chunks)
    sides = (select_whole(side.maskable, side.chunks, count) for side in (text, answer))
    return torch.stack(list(sides)).all(dim=0)


def by_position(text: Text) -> Text:
    """Return a text whose i-th maskable token is chunk i, whatever it spells.

    So ULD (arXiv:2402.12030) pairs the tokens of two tokenizers; those of the longer side that
    are left over have no partner.
    """
    places = text.maskable.long().cumsum(dim=1) - 1
    return text._replace(chunks=torch.where(text.maskable, places, -1))


def hide(draws: Draws, ids: Tensor, text: Text, usable: Tensor, *, t_low: float) -> Hidden:
    """Return what is hidden: each maskable token at rate t, and all of each chunk they are in.

    More is hidden than t says, because of the chunks (section 2.3 of TIDE, arXiv:2604.26951).

    Args:
        draws: The random numbers of the run.
        ids: The number of each sample, ``[B]``.
        text: The student's text.
        usable: The chunks that may be compared (see ``usable_chunks``).
        t_low: Smallest noise level; one level for each sample, uniform from here to 1.
    """
    t = t_low + (1.0 - t_low) * draws.uniform("time", ids)
    numbers = draws.uniform("mask", ids, text.tokens.shape[1:])
    mask = text.maskable & (numbers < t[:, None])
    active = touched(mask, text.chunks, usable.shape[1]) & usable
    return Hidden(mask | tokens_of(active, text.chunks), active, t)


def chunk_counts(text: Text, hidden: Hidden) -> dict[str, float]:
    """Return the active chunks and the maskable tokens of a batch (see ``Method.counts``)."""
    return {"chunks": float(hidden.active.sum()), "tokens": float(text.maskable.sum())}


def chunk_share(mine: Mapping[str, float], all_: Mapping[str, float]) -> float:
    """Return what makes a mean over chunks, in a loss that counts tokens, one over the step.

    Args:
        mine: What ``chunk_counts`` returned of the micro-batch.
        all_: The same of the optimizer step; empty where the batch is all there is.
    """
    if not all_:
        return 1.0
    chunks, tokens = (mine[name] / max(all_[name], 1.0) for name in ("chunks", "tokens"))
    return chunks / tokens if mine["tokens"] else 0.0


def denoising(logprobs: Tensor, text: Text, t: Tensor) -> Tensor:
    """Return the denoising loss, a scalar: ``-log p / t`` of hidden tokens, over all maskable.

    Args:
        logprobs: Log-probability ``[B, L]`` of each hidden token; 0 of all others.
        text: The text.
        t: The noise level ``[B]``.
    """
    return masked_mean(-logprobs, text.maskable, weight=1.0 / t[:, None])


def described(
    text: Text, hidden: Hidden, *, denoising: Tensor, distillation: Tensor
) -> dict[str, Tensor]:
    """Return what to log of a loss of these two terms, and of what was hidden for it."""
    return {
        "denoising": denoising.detach(),
        "distillation": distillation.detach(),
        "noise_level": hidden.t.mean(),
        "mask_rate": hidden.mask.sum() / max(int(text.maskable.sum()), 1),
        "active_chunks": hidden.active.sum() / len(hidden.t),
    }

"""Distances between predictions over two vocabularies: the baselines ULD and GOLD.

All take the logits of aligned positions: the student's ``[K, V]`` and the teacher's ``[K, W]``,
detach the teacher and return a map ``[K]``, float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

TINY = 1e-8


def matched_ids(
    student: Sequence[bytes | None], teacher: Sequence[bytes | None]
) -> tuple[Tensor, Tensor]:
    """Return the ids of the tokens with the same spelling, the student's and the teacher's.

    By bytes, so that byte-level and SentencePiece vocabularies meet (GOLD's code compares the
    vocabularies' own strings, which those two never share).

    Args:
        student: What each id spells, None where nothing (a special token).
        teacher: Likewise.
    """
    known = {spelled: index for index, spelled in enumerate(teacher) if spelled is not None}
    pairs = [
        (index, known.pop(spelled))
        for index, spelled in enumerate(student)
        if spelled is not None and spelled in known
    ]
    both = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def chunk_distribution(logits: Tensor, later: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the probabilities ``[K, V]`` of a chunk: its first token, times the later ones.

    GOLD's "observed" merge: the distribution at the first token, scaled with the likelihood of
    the tokens that follow it in the chunk, so that it sums to that likelihood.

    Args:
        logits: Logits ``[K, V]`` at the first token of each chunk.
        later: Log-likelihood ``[K]`` of the chunk's later tokens; 0 where there is none.
        temperature: Divides the logits.
    """
    return torch.softmax(logits.float() / temperature, dim=-1) * later.float().exp()[:, None]


def sorted_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the L1 distance ``[K]`` of sorted probabilities ``[K, V]`` and ``[K, W]``."""
    size = max(student.shape[-1], teacher.shape[-1])
    first, second = (
        pad(side.sort(dim=-1, descending=True).values, (0, size - side.shape[-1]))
        for side in (student, teacher.detach())
    )
    return (first - second).abs().sum(dim=-1)


def uld(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the distance of two predictions, whatever their tokens, as a map ``[K]``.

    Universal Logit Distillation (arXiv:2402.12030), eq. 6: the L1 distance of the sorted
    probabilities, the smaller vocabulary padded with zeros.
    """
    first, second = (torch.softmax(x.float() / temperature, -1) for x in (student, teacher))
    return sorted_l1(first, second)


def gold(
    student: Tensor,
    teacher: Tensor,
    matched: tuple[Tensor, Tensor],
    *,
    beta: float = 0.5,
    share: float | None = None,
) -> Tensor:
    """Return GOLD's hybrid of two distances, as a map ``[K]``.

    On tokens with the same spelling a generalized Jensen-Shannon divergence, on all others the
    sorted L1. Matched probabilities are not renormalized, as in TRL's code, so that the
    divergence of a part may be negative.

    Args:
        student: Probabilities ``[K, V]``; of ``chunk_distribution`` where chunks have more
            tokens than one.
        teacher: Probabilities ``[K, W]``.
        matched: The ids of the matched tokens (see ``matched_ids``).
        beta: The teacher's share in the mixture; 0 is KL(teacher || student), 1 the reverse.
        share: Weight of the divergence, and ``1 - share`` that of the rest; None is the share of
            the matched in the teacher's vocabulary (as TRL's code when no weights are given).
    """
    teacher = teacher.detach()
    ours, theirs = (ids.to(student.device) for ids in matched)
    if share is None:
        share = len(theirs) / teacher.shape[-1]
    rest = sorted_l1(_without(student, ours), _without(teacher, theirs))
    return share * generalized_jsd(student[:, ours], teacher[:, theirs], beta) + (1 - share) * rest


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the generalized Jensen-Shannon divergence ``[K]`` of probabilities ``[K, V]``.

    Eq. 1 of GKD (arXiv:2306.13649): beta KL(teacher || m) + (1 - beta) KL(student || m) with
    m = beta teacher + (1 - beta) student; at the ends the two KL divergences themselves.
    """
    teacher = teacher.detach()
    if beta in {0.0, 1.0}:
        return _kl(teacher, student) if beta == 0.0 else _kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first * (first.clamp(min=TINY).log() - second.clamp(min=TINY).log())).sum(dim=-1)


def _without(probs: Tensor, ids: Tensor) -> Tensor:
    keep = torch.ones(probs.shape[-1], dtype=torch.bool, device=probs.device)
    keep[ids] = False
    return probs[:, keep]

"""Divergences on a few tokens of the vocabulary: a teacher's or a student's most likely ones.

What a truncated sum leaves out is not nothing, and what it keeps may pull the wrong way. The
corrections say what is done about it; docs/divergences.md compares them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.projection import Prediction, prediction_rows, side_of, spread, vocabulary
from diffdistill.recompute import Block, streamed
from diffdistill.tokenwise import IMPOSSIBLE, scaled

TruncatedDivergence = Literal["forward-kl", "reverse-kl", "jsd"]
Support = Literal["teacher", "student", "intersection"]
Correction = Literal["generalized", "renorm", "tail", "hybrid", "none"]


class TopK(NamedTuple):
    """The most likely tokens of a prediction, such as a server returns.

    Attributes:
        ids: int64 ``[..., K]``, the most likely first.
        logprobs: Their log-probabilities ``[..., K]`` under the softmax of the whole vocabulary,
            float32 at least.
        tokens: The log-probability ``[...]`` of the answer's token, among the K or not; or None.
    """

    ids: Tensor
    logprobs: Tensor
    tokens: Tensor | None = None


@torch.no_grad()
def top_logprobs(
    prediction: Prediction,
    k: int,
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> TopK:
    """Return the k most likely tokens ``[..., k]`` of each row, without a graph.

    Args:
        prediction: Logits, or what they are projected from.
        k: How many.
        tokens: Token ids ``[...]`` whose log-probabilities are wanted too.
        mask: bool ``[...]``, rows to compute; the others are 0.
        temperature: Logits are divided by it.
    """
    rows = Rows(prediction_rows(prediction).shape[:-1], mask)
    extra = None if tokens is None else rows.flat(tokens[..., None])
    found = picked(prediction, rows, k, extra=extra, temperature=temperature)
    logprobs, *last = found.logprobs.split(k, dim=-1)
    answer = rows.spread(last[0][:, 0]) if last else None
    return TopK(rows.spread(found.top), rows.spread(logprobs), answer)


def logprobs_at(
    prediction: Prediction,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the log-probabilities ``[..., K]`` of given tokens, from one pass over the vocabulary.

    They are of the softmax of the whole vocabulary, and have a graph.

    Args:
        prediction: Logits, or what they are projected from.
        ids: Token ids ``[..., K]``; where the mask is False they may be out of range.
        mask: bool ``[...]``, rows to compute; the others are 0.
        temperature: Logits are divided by it.
    """
    rows = Rows(prediction_rows(prediction).shape[:-1], mask)
    found = picked(prediction, rows, 0, ids=rows.flat(ids), temperature=temperature)
    return rows.spread(found.logprobs)


def truncated_divergence(
    student: Prediction,
    teacher: Prediction | TopK,
    *,
    divergence: TruncatedDivergence,
    support: Support,
    k: int,
    correction: Correction,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    shared: int | None = None,
    allow_biased: bool = False,
    sampler: Tensor | None = None,
    importance_clip: float | None = None,
) -> dict[str, Tensor]:
    """Return the divergence on a support and what to watch, maps ``[...]`` in float32 at least.

    ``divergence`` has a graph to the student. ``student_mass`` and ``teacher_mass`` are the
    probabilities of the support, ``overlap`` is the share of the teacher's k most likely tokens
    that are among the student's, and ``logprob``, if there are ``tokens``, is the student's
    log-probability of them; constants.

    With p the student's probabilities and q the teacher's, S the support:

    - ``generalized`` adds ``q(S) - p(S)`` to the reverse KL, ``p(S) - q(S)`` to the forward KL and
      nothing to the JSD: a divergence of measures, never negative, and 0 at p = q on S. Of the
      reverse KL its gradient is that of SG-TopK (eq. 12 of Many Faces, arXiv:2605.11182).
    - ``renorm`` compares p and q as normalized on S (eq. 14-16 there). How much of the student's
      probability is on S is then free.
    - ``tail`` adds one token that stands for all others: a lower bound of the whole divergence.
    - ``hybrid`` (ours), of the reverse KL, adds to the sum on S ``log(p(y) / q(y))`` of the
      answer's token y where y is not on S; its gradient is
      ``sum_S log(p / q) grad p + [y not in S] log(p(y) / q(y)) grad log p(y)``. If y is drawn from
      the student's softmax at ``temperature``, value and gradient are without bias those of the
      whole reverse KL; if it is drawn from something else, they are not.
    - ``none`` is the bare sum. With the rest of the vocabulary free, it is least at p = q / e on S
      (reverse KL), p = q / q(S) (forward KL) and p = q (JSD).

    Args:
        student: The prediction that is trained.
        teacher: What it is compared with; a constant. Of a ``TopK`` the log-probabilities have to
            be at ``temperature`` already.
        divergence: Which; ``forward-kl`` is KL(teacher || student).
        support: Whose k most likely tokens: of the teacher, of the student, or both at once.
        k: How many.
        correction: See above.
        tokens: The answer's tokens ``[...]``; ``hybrid`` needs them.
        mask: bool ``[...]``, rows to compute; the others are 0.
        temperature: Logits of both sides are divided by it.
        beta: Of the JSD; see ``projection.token_maps``.
        shared: How many first entries of the vocabularies are used; see there.
        allow_biased: Let the reverse KL be uncorrected.
        sampler: Of ``hybrid``, if y is not the student's own: the log-probability ``[...]`` that it
            was sampled with. Its part is then weighed with the ratio of student to sampler.
        importance_clip: The largest such weight; None does not weigh.

    Raises:
        ValueError: If the settings do not go together.
    """
    _check(teacher, divergence, support, k, correction, tokens)
    if divergence == "reverse-kl" and correction == "none" and not allow_biased:
        raise ValueError(
            "the reverse KL of a few tokens without a correction drives the student away from "
            "them: use correction generalized, tail or hybrid, or say allow_biased"
        )
    sizes = {vocabulary(side) for side in (student, teacher) if not isinstance(side, TopK)}
    assert len(sizes) == 1 or shared, f"vocabularies of {sizes}; set shared"
    rows = Rows(prediction_rows(student).shape[:-1], mask)
    answer = None if tokens is None else rows.flat(tokens[..., None])
    extra = answer if correction == "hybrid" else None

    def picks(side: Prediction, ids: Tensor | None, extra: Tensor | None) -> Picks:
        return picked(
            side, rows, k, ids=ids, extra=extra, temperature=temperature, shared=shared
        )  # fmt: skip

    if isinstance(teacher, TopK):
        theirs = _given(teacher, rows, k, extra is not None)
        ours = picks(student, theirs.top, answer)
    elif support == "student":
        ours = picks(student, None, answer)
        with torch.no_grad():
            theirs = picks(teacher, ours.top, extra)
    else:
        with torch.no_grad():
            theirs = picks(teacher, None, extra)
        ours = picks(student, theirs.top, answer)
    common = (theirs.top[:, :, None] == ours.top[:, None, :]).any(-1)
    on = _Support(
        ids=ours.top if support == "student" else theirs.top,
        kept=common if support == "intersection" else torch.ones_like(common),
        student=ours.logprobs.clamp_min(IMPOSSIBLE),
        teacher=theirs.logprobs.clamp_min(IMPOSSIBLE).to(ours.logprobs.dtype),
    )
    weight = None
    if extra is not None and sampler is not None and importance_clip is not None:
        ratio = on.student[:, -1].detach() - rows.flat(sampler[..., None])[:, 0]
        weight = ratio.exp().clamp_max(importance_clip)
    p, q = on.logprobs()
    maps = {
        "divergence": on.corrected(divergence, correction, beta, extra, weight),
        "student_mass": p.detach().exp().sum(-1),
        "teacher_mass": q.exp().sum(-1),
        "overlap": common.to(p.dtype).mean(-1),
    }
    if answer is not None:
        maps["logprob"] = on.student[:, -1].detach()
    return {name: rows.spread(value) for name, value in maps.items()}


def _check(
    teacher: Prediction | TopK,
    divergence: TruncatedDivergence,
    support: Support,
    k: int,
    correction: Correction,
    tokens: Tensor | None,
) -> None:
    """Refuse what does not go together."""
    if correction == "hybrid" and divergence != "reverse-kl":
        raise ValueError(
            f"correction hybrid is of the reverse KL, not of {divergence}: the student's samples "
            "say nothing of what only the teacher would write; use generalized or tail"
        )
    if correction == "hybrid" and tokens is None:
        raise ValueError("correction hybrid needs the tokens of the student's answer")
    words = teacher.ids.shape[-1] if isinstance(teacher, TopK) else vocabulary(teacher)
    if not 1 <= k <= words:
        raise ValueError(f"k is {k}, and there are 1 to {words} tokens to choose")
    if isinstance(teacher, TopK) and support == "student":
        raise ValueError(
            "a teacher that gives only its own most likely tokens has no log-probabilities of the "
            "student's: use support teacher or intersection"
        )
    if isinstance(teacher, TopK) and correction == "hybrid" and teacher.tokens is None:
        raise ValueError(
            "correction hybrid needs the teacher's log-probability of the answer's tokens "
            "(TopK.tokens): ask the server for it, or use generalized or tail"
        )


class Rows(NamedTuple):
    """Which rows ``[...]`` are computed."""

    shape: Sequence[int]
    mask: Tensor | None

    def flat(self, values: Tensor) -> Tensor:
        """Return the chosen rows ``[N, K]`` of values ``[..., K]``."""
        whole = values.expand(*self.shape, values.shape[-1])
        if self.mask is None:
            return whole.reshape(-1, whole.shape[-1])
        return whole[self.mask.expand(self.shape)]

    def spread(self, values: Tensor) -> Tensor:
        """Return values ``[N, ...]`` of the chosen rows in their places ``[..., ...]``, else 0."""
        return spread(values, self.mask, self.shape)


class Picks(NamedTuple):
    """Log-probabilities ``[N, K]`` of some tokens, and the most likely tokens ``[N, k]``."""

    logprobs: Tensor
    top: Tensor


def picked(
    prediction: Prediction,
    rows: Rows,
    k: int,
    *,
    ids: Tensor | None = None,
    extra: Tensor | None = None,
    temperature: float,
    shared: int | None = None,
) -> Picks:
    """Return log-probabilities of ``ids`` (or else of the top k) and then of ``extra``.

    From one pass over the vocabulary; they have a graph.

    Args:
        prediction: Logits, or what they are projected from.
        rows: The rows that are wanted.
        k: How many of the most likely tokens.
        ids: Token ids ``[N, K]``.
        extra: More token ids ``[N, E]``.
        temperature: Logits are divided by it.
        shared: How many first entries of the vocabulary are used; None is all.
    """
    columns = {"ids": ids, "extra": extra}
    side = side_of(prediction, rows.mask, shared=shared)
    given = {name: column for name, column in columns.items() if column is not None}
    return Picks(*streamed(_Picking(k, temperature), side, columns=given))


@dataclass(frozen=True)
class _Picking:
    """What ``Picks`` are made of, as a ``recompute.RowFunction``."""

    whole_tiles: ClassVar[bool] = False

    k: int
    temperature: float

    @property
    def trained(self) -> tuple[bool, bool]:
        return True, False

    def needs_others(self, given: Sequence[bool]) -> bool:
        return False

    def values(self, block: Block) -> tuple[Tensor, Tensor]:
        logprobs = scaled(block.logits, self.temperature).log_softmax(-1)
        top = logprobs.topk(self.k, dim=-1).indices
        found = logprobs.gather(-1, self._ids(block, top))
        return torch.where(found > IMPOSSIBLE, found, -torch.inf), top

    def slope(
        self, block: Block, values: Sequence[Tensor], upstream: Sequence[Tensor | None]
    ) -> Tensor:
        probs, given = scaled(block.logits, self.temperature).softmax(-1), upstream[0]
        assert given is not None
        slope = probs.mul_(-given.sum(-1, keepdim=True))
        return slope.scatter_add_(-1, self._ids(block, values[1]), given).div_(self.temperature)

    def _ids(self, block: Block, top: Tensor) -> Tensor:
        ids, extra = block.columns.get("ids", top), block.columns.get("extra")
        return ids if extra is None else torch.cat([ids, extra], dim=-1)


def _given(teacher: TopK, rows: Rows, k: int, with_answer: bool) -> Picks:
    """Return what a server gave, as if it was picked here."""
    logprobs = teacher.logprobs.detach()[..., :k]
    if with_answer:
        assert teacher.tokens is not None
        logprobs = torch.cat([logprobs, teacher.tokens.detach()[..., None]], dim=-1)
    return Picks(rows.flat(logprobs), rows.flat(teacher.ids[..., :k]))


class _Support(NamedTuple):
    """Log-probabilities of both sides on a support.

    Attributes:
        ids: The tokens ``[N, K]``.
        kept: Which of them belong to it, bool ``[N, K]``.
        student: The student's ``[N, K]``, and that of the answer's token where it is given.
        teacher: The teacher's, and that of the answer's token where it is needed.
    """

    ids: Tensor
    kept: Tensor
    student: Tensor
    teacher: Tensor

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """Return those of student and teacher ``[N, K]``; impossible where they are not kept."""
        k = self.ids.shape[-1]
        ours, theirs = (
            side[:, :k].masked_fill(~self.kept, IMPOSSIBLE) for side in (self.student, self.teacher)
        )
        return ours, theirs

    def corrected(
        self,
        divergence: TruncatedDivergence,
        correction: Correction,
        beta: float,
        extra: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        """Return the divergence ``[N]``; ``weight`` ``[N]`` is of the part of ``extra``."""
        ours, theirs = self.logprobs()
        if correction == "renorm":
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        elif correction == "tail":
            ours, theirs = (torch.cat([side, _tail(side)], dim=-1) for side in (ours, theirs))
        found = _entries(ours, theirs, divergence, beta).sum(-1)
        if correction == "generalized" and divergence != "jsd":
            excess = (ours.exp() - theirs.exp()).sum(-1)
            found = found - excess if divergence == "reverse-kl" else found + excess
        return found if extra is None else self._with_sample(found, extra, weight)

    def _with_sample(self, found: Tensor, extra: Tensor, weight: Tensor | None) -> Tensor:
        """Return the hybrid estimate of the reverse KL, of its sum on the support."""
        ours, theirs = self.logprobs()
        outside = ~((self.ids == extra) & self.kept).any(-1)
        sampled = self.student[:, -1]
        gap = torch.where(outside, sampled - self.teacher[:, -1], 0.0).detach()
        gap = gap if weight is None else gap * weight
        surrogate = (ours.exp() * (ours - theirs).detach()).sum(-1) + gap * sampled
        return surrogate + (found + gap - surrogate).detach()


def _entries(ours: Tensor, theirs: Tensor, divergence: TruncatedDivergence, beta: float) -> Tensor:
    """Return what each token adds to a divergence, ``[N, K]``."""
    if divergence == "reverse-kl":
        return ours.exp() * (ours - theirs)
    if divergence == "forward-kl":
        return theirs.exp() * (theirs - ours)
    if beta in (0.0, 1.0):
        return 0.0 * ours
    middle = torch.logaddexp(theirs + math.log(beta), ours + math.log(1.0 - beta))
    ours, theirs = ours.exp() * (ours - middle), theirs.exp() * (theirs - middle)
    return torch.lerp(ours, theirs, beta)


def _tail(logprobs: Tensor) -> Tensor:
    """Return the log-probability ``[N, 1]`` of all other tokens, as far as rounding lets it be."""
    rest = 1.0 - logprobs.exp().sum(-1, keepdim=True)
    return rest.clamp_min(torch.finfo(rest.dtype).eps).log()

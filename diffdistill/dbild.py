"""DBiLD: how far apart two sides order their most likely tokens (Switch-KD, arXiv:2604.14629).

It compares differences of logits, not probabilities: of each pair among a few leading tokens, by
how much one is ahead of the other. Twice, because each side leads once. How many tokens lead is
where the leader's sorted logits bend (Kneedle, Satopaa et al. 2011).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.projection import Prediction, prediction_rows, vocabulary
from diffdistill.supports import Rows, picked
from diffdistill.tokenwise import IMPOSSIBLE

FEWEST = 3
"""Two tokens are one pair, whose softmax is 1 whatever the logits: nothing would be learned."""


@dataclass(frozen=True)
class Leaders:
    """How many tokens lead.

    The paper's own range of the curve and bounds are unconfirmed. On a whole vocabulary the knee is
    thousands of tokens down (2 to 9 thousand of 152 thousand, measured on random logits), which are
    millions of pairs for each token of the answer: some bounds there must be. Both are ours.

    Attributes:
        curve: So many most likely tokens are the curve whose knee is looked for.
        fewest_leaders: At least so many lead; 3 is the least that teaches anything.
        most_leaders: At most so many lead.
    """

    curve: int = 128
    fewest_leaders: int = FEWEST
    most_leaders: int = 32

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ValueError: If they do not go together.
        """
        if not FEWEST <= self.fewest_leaders <= self.most_leaders <= self.curve:
            raise ValueError(
                f"{FEWEST} <= fewest_leaders <= most_leaders <= curve must hold, and they are "
                f"{self.fewest_leaders}, {self.most_leaders}, {self.curve}"
            )

    def count(self, scores: Tensor) -> Tensor:
        """Return how many tokens lead, int64 ``[...]``, of sorted scores ``[..., N]``."""
        return knee(scores).clamp(self.fewest_leaders, self.most_leaders)


def knee(scores: Tensor) -> Tensor:
    """Return how many of the scores ``[..., N]``, the largest first, lead; int64 ``[...]``.

    The curve is scaled to the unit square; the knee is where it is farthest below the chord from
    (0, 1) to (1, 0), ``argmax((1 - x) - y)``, and counts as leading (Kneedle for a convex falling
    curve; the figure of Switch-KD). Impossible tokens count as the least likely possible one.
    """
    possible = scores > IMPOSSIBLE
    least = scores.masked_fill(~possible, torch.inf).amin(-1, keepdim=True)
    heights = torch.where(possible, scores, least) - least
    tallest = heights[..., :1].clamp_min(torch.finfo(scores.dtype).tiny)
    x = torch.linspace(0.0, 1.0, scores.shape[-1], dtype=scores.dtype, device=scores.device)
    return ((1.0 - x) - heights / tallest).argmax(-1) + 1


def dbild(
    student: Prediction,
    teacher: Prediction,
    *,
    leaders: Leaders | None = None,
    divergence: Literal["reverse-kl", "forward-kl"] = "reverse-kl",
    temperature: float = 3.0,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return DBiLD and how many tokens lead, maps ``[...]`` in float32 at least.

    ``divergence`` is the sum of both halves (eq. 7-15; structure by the official figure), and has a
    graph to the student; ``teacher_leaders`` and ``student_leaders`` are constants. It does not
    change when a side's logits are shifted. With as many leaders as BiLD has (always 8) and the
    forward KL it is BiLD (arXiv:2406.13555).

    Args:
        student: The prediction that is trained.
        teacher: What it is compared with, a constant; of the same vocabulary.
        leaders: How many tokens lead.
        divergence: ``reverse-kl`` is KL(student || teacher) of the softmax over pairs (paper),
            ``forward-kl`` the other way round (BiLD).
        temperature: Logits of both sides are divided by it; 3 in the paper, by a second-hand
            source. No factor makes up for it.
        mask: bool ``[...]``, rows to compute; the others are 0.
    """
    leaders, size = leaders or Leaders(), vocabulary(student)
    assert size == vocabulary(teacher), f"vocabularies of {size} and {vocabulary(teacher)}"
    assert size >= leaders.fewest_leaders, "fewer tokens than must lead"
    curve, most = min(leaders.curve, size), min(leaders.most_leaders, size)
    rows = Rows(prediction_rows(student).shape[:-1], mask)
    with torch.no_grad():
        theirs = picked(teacher, rows, curve, temperature=temperature)
    ours = picked(student, rows, curve, extra=theirs.top[:, :most], temperature=temperature)
    led, leading = ours.logprobs[:, curve:], ours.logprobs[:, :curve]
    with torch.no_grad():
        others = picked(teacher, rows, 0, ids=ours.top[:, :most], temperature=temperature)
    counts = leaders.count(theirs.logprobs), leaders.count(leading.detach())
    halves = (
        _pairwise(led, theirs.logprobs[:, :most], counts[0], divergence),
        _pairwise(leading[:, :most], others.logprobs, counts[1], divergence),
    )
    maps = {
        "divergence": halves[0] + halves[1],
        "teacher_leaders": counts[0].to(led.dtype),
        "student_leaders": counts[1].to(led.dtype),
    }
    return {name: rows.spread(value) for name, value in maps.items()}


def _pairwise(
    student: Tensor, teacher: Tensor, count: Tensor, divergence: Literal["reverse-kl", "forward-kl"]
) -> Tensor:
    """Return the divergence ``[N]`` of the pairs' softmax, of the first ``count`` of each row.

    Args:
        student: Logits ``[N, K]`` up to a shift, in the leader's order.
        teacher: The same of the teacher.
        count: How many lead, ``[N]``.
        divergence: See ``dbild``.
    """
    first, second = torch.triu_indices(student.shape[1], student.shape[1], 1, device=student.device)
    absent = second >= count[:, None]
    ours, theirs = (
        (side[:, first] - side[:, second]).masked_fill(absent, IMPOSSIBLE).log_softmax(-1)
        for side in (x.clamp_min(IMPOSSIBLE) for x in (student, teacher.to(student.dtype)))
    )
    upper, lower = (ours, theirs) if divergence == "reverse-kl" else (theirs, ours)
    return (upper.exp() * (upper - lower)).sum(-1)

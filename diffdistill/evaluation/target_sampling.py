"""Answers of the target itself, that a student is led to beyond its teacher, before any training.

How often they keep to the format is a proxy (ours) for what the student will do: a student that
has learned the target perfectly writes so. It says nothing of how training gets there, which the
Extrapolation Cliff (arXiv:2605.08737) is about.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.choices import invert
from diffdistill.doubles import doubled
from diffdistill.errors import UserError
from diffdistill.evaluation.calibration import extrapolating
from diffdistill.evaluation.means import Means
from diffdistill.evaluation.subject import Say, Subject
from diffdistill.pipelines.answers import is_one_of
from diffdistill.pipelines.causal_sampling import answers_of
from diffdistill.projection import Prediction, dense, prediction_rows, with_rows
from diffdistill.rollouts import Answers, Sampling
from diffdistill.tokenwise import extrapolated, scaled
from diffdistill.types import Condition, Example, State

FALLEN = 0.05
"""By how much the parse rate must fall below that of the least strength to be reported; ours."""


class Swept(NamedTuple):
    """How the target writes at one strength.

    Attributes:
        strength: The strength.
        parse_rate: Share of the answers that keep to the format.
        reward: Their mean reward.
        ended: Share of the answers that end.
    """

    strength: float
    parse_rate: float
    reward: float
    ended: float


def sweep(
    subject: Subject,
    asked: Sequence[Example],
    strengths: Sequence[float],
    sampling: Sampling,
    say: Say,
) -> list[Swept]:
    """Return how the target writes at each strength, from the same random numbers.

    Args:
        subject: Of a method with a strength.
        asked: The questions.
        strengths: The strengths.
        sampling: Temperature and length; all tokens of the target are possible.
        say: Is told how far it has come.

    Raises:
        UserError: If there is no reward, which knows the format.
    """
    if subject.reward is None:
        raise UserError("--sweep asks a reward which answers parse: add one, such as "
                        "rewards=json-answer")  # fmt: skip
    found = []
    for strength in strengths:
        means = Means()
        say(f"strength {strength:g}")
        for start, examples in subject.batches(asked, say):
            answers = target_answers(subject, examples, start, strength, sampling)
            texts = subject.family.spelled(answers)
            means.add("parse_rate", subject.reward.parsed(texts, examples))
            means.add("reward", subject.reward.score(texts, examples))
            means.add("ended", answers.ended)
        found.append(Swept(strength, **means.found()))
    return found


def boundary(swept: Sequence[Swept]) -> float | None:
    """Return the first strength whose parse rate is ``FALLEN`` below that of the least, if any."""
    first, *others = sorted(swept)
    fallen = (row.strength for row in others if row.parse_rate <= first.parse_rate - FALLEN)
    return next(fallen, None)


@torch.no_grad()
def target_answers(
    subject: Subject, asked: Sequence[Example], start: int, strength: float, sampling: Sampling
) -> Answers:
    """Return an answer to each question from ``softmax(s log teacher + (1 - s) log reference)``.

    Each token takes a whole call of both models.

    Args:
        subject: Of a method with a strength.
        asked: The questions.
        start: The number of the first.
        strength: s.
        sampling: Temperature and length; ``top_p`` and ``top_k`` are not used.
    """
    family, method = subject.family, extrapolating(subject)
    batch = family.collate(asked, range(start, start + len(asked)))
    sides: list[tuple[Any, Condition]] = [
        (subject.teacher, family.condition(batch, reader="teacher", exposure=subject.exposure)),
        (method.reference, family.condition(batch)),
    ]
    numbers = subject.draws.uniform("target", batch["ids"], (sampling.max_tokens,))
    ends = family.student.end_ids
    tokens = torch.zeros(len(asked), 0, dtype=torch.long, device=family.device)
    for place in range(sampling.max_tokens):
        asking = torch.nn.functional.pad(tokens, (0, 1), value=family.student.pad_id)
        state = State(asking, torch.zeros(len(asking), device=family.device))
        theirs, base = (_last(role(state, told)) for role, told in sides)
        logits = extrapolated(theirs, base, torch.full_like(theirs[:, :1], strength))
        chosen = _chosen(logits, numbers[:, place], sampling.temperature)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        if is_one_of(tokens, ends).any(1).all():
            break
    return answers_of(tokens, None, ends, family.student.pad_id)


def _last(prediction: Prediction) -> Tensor:
    """Return the logits ``[B, V]`` of the last token."""
    return dense(with_rows(prediction, prediction_rows(prediction)[:, -1]))


def _chosen(logits: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """Return a token of each row ``[B]``: the first at temperature 0, or one at random."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = doubled(scaled(logits, temperature)).softmax(-1)
    return invert(probs, doubled(numbers)).to(logits.device)

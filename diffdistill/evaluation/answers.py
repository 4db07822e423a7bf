"""How good the answers of autoregressive models are: scores, tries, format, length, repetition."""

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffdistill.answering import Draft
from diffdistill.asking import reply, writer
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings
from diffdistill.repetition import repetition
from diffdistill.roles import Role
from diffdistill.session import Session
from diffdistill.types import Example
from diffdistill.verifying import AnswerReward


class Average(NamedTuple):
    """A mean over questions.

    Attributes:
        model: The model's name.
        metric: What it is the mean of.
        value: The mean.
        error: Its standard error, as if the questions were drawn at random; None of one question.
    """

    model: str
    metric: str
    value: float
    error: float | None


class Examined(NamedTuple):
    """What became of a model's answers.

    Attributes:
        averages: The numbers.
        answers: What was answered, with its score: a row for each answer.
    """

    averages: list[Average]
    answers: list[dict[str, Any]]


def pass_at(num_tries: int, right: Tensor) -> Tensor:
    """Return, for each question, how likely one of ``num_tries`` answers is right, ``[Q]``.

    Without bias from all n answers, of which c are right: ``1 - C(n - c, k) / C(n, k)`` (Chen et
    al., arXiv:2107.03374, eq. 1).

    Args:
        num_tries: The k.
        right: Which answers are right, bool ``[Q, n]``.
    """
    count = right.shape[1]
    assert 1 <= num_tries <= count, f"{num_tries} tries of {count}"
    wrong = (count - right.sum(1)).tolist()
    return torch.tensor([1.0 - comb(n, num_tries) / comb(count, num_tries) for n in wrong])


def examine(
    session: Session,
    name: str,
    role: Role,
    asked: Sequence[Example],
    settings: AnswerEvaluateSettings,
    reward: AnswerReward | None,
) -> Examined:
    """Return what becomes of a model's answers to questions.

    Each is answered ``sample.num_answers`` times, as the section ``sample`` says.

    Args:
        session: The session.
        name: What the model is called.
        role: The model.
        asked: The questions.
        settings: What is measured.
        reward: Judges answers; without one, neither scores nor tries are measured.

    Raises:
        UserError: If a question has no answer to verify by.
    """
    writing, family = session.config.replies, writer(role)
    drafts = list(reply(session, role, asked, writing))
    texts = [family.decoded(draft.tokens) for draft in drafts]
    columns: dict[str, Tensor] = {}
    if reward is not None:
        examples = [asked[draft.prompt] for draft in drafts]
        columns["score"] = reward.score(texts, examples).float().cpu()
        columns["parsed"] = reward.parsed(texts, examples).float().cpu()
    columns |= {
        "tokens": torch.tensor([float(len(draft.tokens)) for draft in drafts]),
        "ended": torch.tensor([float(draft.tokens[-1] in family.end_ids) for draft in drafts]),
        "repetition": _repetition(drafts),
    }
    by_question = {n: v.reshape(len(asked), writing.num_answers) for n, v in columns.items()}
    found = {}
    if reward is not None:
        right = by_question["score"] >= settings.accepted
        found[f"mean@{writing.num_answers}"] = by_question.pop("score").mean(1)
        for num_tries in settings.num_tries or sorted({1, writing.num_answers}):
            found[f"pass@{num_tries}"] = pass_at(num_tries, right)
    found |= {metric: values.mean(1) for metric, values in by_question.items()}
    found |= _of_skills(found, asked)
    rows = [
        {
            "model": name,
            "origin": asked[draft.prompt].origin,
            "question": asked[draft.prompt].prompt,
            "reference": asked[draft.prompt].answer,
            "number": draft.number,
            "answer": text,
            **{metric: values[place].item() for metric, values in columns.items()},
        }
        for place, (draft, text) in enumerate(zip(drafts, texts, strict=True))
    ]
    return Examined([_average(name, metric, values) for metric, values in found.items()], rows)


def _of_skills(found: Mapping[str, Tensor], asked: Sequence[Example]) -> dict[str, Tensor]:
    """Return the same of the questions of each skill alone, where there are several."""
    skills = dict.fromkeys(example.skill for example in asked if example.skill is not None)
    of = {skill: torch.tensor([example.skill == skill for example in asked]) for skill in skills}
    return {
        f"{metric} {skill}": values[of[skill]]
        for skill in skills
        for metric, values in found.items()
    }


def _repetition(drafts: Sequence[Draft]) -> Tensor:
    """Return the share of each answer's trigrams that it had before, ``[N]``."""
    rows = [torch.tensor(draft.tokens) for draft in drafts]
    tokens = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return repetition(tokens, mask)


def _average(model: str, metric: str, values: Tensor) -> Average:
    count = len(values)
    error = values.double().std().item() / count**0.5 if count > 1 else None
    return Average(model, metric, values.double().mean().item(), error)

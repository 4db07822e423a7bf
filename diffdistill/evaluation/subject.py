"""What is diagnosed: a student, its answers to the first questions, and who judges them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdistill.data.problems import Problem, settle
from diffdistill.data.questions import read_questions
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.engines import Generate
from diffdistill.pipelines.questions import Questions
from diffdistill.projection import Prediction, prediction_rows, with_rows
from diffdistill.reward_building import build_answer_reward
from diffdistill.roles import Role
from diffdistill.rollouts import Answers
from diffdistill.session import Session, questions
from diffdistill.supports import TopK
from diffdistill.text.answering import Answering, Attempt
from diffdistill.text.sdpo import SDPO
from diffdistill.types import Batch, Example
from diffdistill.verifying import AnswerReward

Say = Callable[[str], None]
"""Is told how far a measurement has come."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The parts of a session that a diagnosis asks.

    Attributes:
        method: Says how answers are sampled, and at which temperature models are compared.
        family: Reads the questions; its answers are written by ``generate``.
        teacher: Judges the answers; None where a method has no role of that name.
        reward: Verifies answers; None where the config has none.
        exposure: What the teacher is shown of the reference solution, as in training. Of a learned
            exposure it is the option, not the controller's choice.
        shows_siblings: Whether it is shown other answers of the student's instead (sdpo).
        num_answers: Answers to each question.
        batch_size: Questions at a time.
        draws: Random numbers.
    """

    method: Answering
    family: Questions
    teacher: Role | None
    reward: AnswerReward | None
    exposure: float | None
    shows_siblings: bool
    num_answers: int
    batch_size: int
    draws: Draws

    @property
    def right(self) -> float:
        """Return the reward from which an answer is right."""
        found: float = getattr(self.method, "right", 1.0)
        return found

    def batches(self, asked: Sequence[Example], say: Say) -> Iterator[tuple[int, list[Example]]]:
        """Yield the number of the first question of each batch, and the batch."""
        for start in range(0, len(asked), self.batch_size):
            yield start, list(asked[start : start + self.batch_size])
            say(f"{min(start + self.batch_size, len(asked))}/{len(asked)} questions")

    def attempt(self, asked: Sequence[Example], start: int) -> Attempt:
        """Return the student's answers to questions, ``num_answers`` rows for each of them.

        Args:
            asked: The questions.
            start: The number of the first.
        """
        method = self.method
        batch = self.family.collate(asked, range(start, start + len(asked)))
        rows = self.family.repeated(batch, self.num_answers)
        answers = self.family.rollout(
            method.student, rows, method.sampling, self.draws, purpose="diagnosis"
        )
        return method.read(rows, answers)

    def judgment(self, attempt: Attempt, batch: Batch | None = None) -> Prediction | TopK:
        """Return what the teacher predicts of answers, shown what ``batch`` (or its own) has."""
        assert self.teacher is not None
        exposure = 1.0 if self.shows_siblings else self.exposure
        told = self.family.condition(
            attempt.batch if batch is None else batch, reader="teacher", exposure=exposure
        )
        found: Prediction | TopK = self.teacher(attempt.state, told)
        return found

    def shown(self, attempt: Attempt, examples: Sequence[Example]) -> Batch:
        """Return the batch of an attempt with other examples, one for each row."""
        return self.family.collate(examples, attempt.batch["ids"].tolist())

    def fits(self, example: Example) -> bool:
        """Return whether the teacher's prompt with the example's solution is short enough."""
        exposure = 1.0 if self.shows_siblings else self.exposure
        try:
            self.family.prompt(example, reader="teacher", exposure=exposure)
        except UserError:
            return False
        return True

    def rows(self, attempt: Attempt, rows: Tensor) -> Attempt:
        """Return some rows of an attempt, int64 ``[R]``."""
        old = attempt.answers
        answers = Answers(old.tokens[rows], old.mask[rows], None, old.ended[rows])
        examples = self.family.examples(attempt.batch)
        batch = self.family.collate(
            [examples[row] for row in rows.tolist()], attempt.batch["ids"][rows].tolist()
        )
        prediction = with_rows(attempt.prediction, prediction_rows(attempt.prediction)[rows])
        return Attempt(batch, answers, self.family.state(answers), prediction)


def subject_of(session: Session, *, num_answers: int | None = None, seed: int = 0) -> Subject:
    """Return what is to be diagnosed of a session.

    Answers are written by ``generate`` whatever the engine of the run, which may be serving it.

    Args:
        session: The session.
        num_answers: Answers to each question; None takes the method's.
        seed: Seed of the answers.

    Raises:
        UserError: If its method's student does not answer questions.
    """
    method: Any = session.method
    if not isinstance(method, Answering):
        raise UserError(
            f"method {session.config.method['name']}: this is for methods whose student answers "
            "questions, such as opd, opsd or exopd"
        )
    family = replace(questions(session), engine=Generate())
    reward: AnswerReward | None = getattr(method, "reward", None)
    if reward is None and session.config.rewards:
        reward = build_answer_reward(session.config, family.device)
    shown = method.solutions() == "shown"
    return Subject(
        method=method,
        family=family,
        teacher=session.roles.by_name.get("teacher"),
        reward=reward,
        exposure=getattr(method, "exposure", 1.0) if shown else None,
        shows_siblings=isinstance(method, SDPO),
        num_answers=num_answers or method.num_answers,
        batch_size=session.config.data.batch_size,
        draws=Draws(seed),
    )


def first_questions(
    session: Session, count: int, reward: AnswerReward | None = None
) -> list[Example]:
    """Return the first questions of a session's data that its method can use.

    Args:
        session: The session.
        count: How many.
        reward: What the answers will be verified by; None if they will not be.

    Raises:
        UserError: If the data cannot be read, or has none.
    """
    problems, family = list[Problem](), questions(session)
    method = session.method
    found = read_questions(session.config.data, Path(), problems)

    def check(example: Example) -> None:
        method.check_question(example)
        if reward is not None:
            reward.check(example)

    asks: dict[str, Any] = {
        "solutions": method.solutions(),
        "check": check,
        "max_tokens": getattr(method, "max_tokens", 0),
    }
    usable = (example for example in found if family.usable(example, **asks))
    asked = list(islice(usable, count))
    settle(problems, session.config.data.on_error)
    family.release()
    if not asked:
        raise UserError("there is no usable question in the data")
    return asked

"""What text models make of chats about Python, and of its source."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from diffdistill.answering import language_family, make_sampler
from diffdistill.data.problems import Problem, settle
from diffdistill.data.texts import read_texts
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.evaluation.language import answering, distance, fitting, infilling, likelihood
from diffdistill.evaluation.likelihood import MonteCarlo
from diffdistill.evaluation.python_source import completes
from diffdistill.evaluation.text_settings import TextEvaluateSettings
from diffdistill.roles import Role
from diffdistill.session import Session, text_pair
from diffdistill.types import Example


class Measured(NamedTuple):
    """One number of one model.

    Attributes:
        model: The model's name.
        metric: What it is.
        value: The number.
        error: Its Monte Carlo error, where it has one.
    """

    model: str
    metric: str
    value: float
    error: float | None = None


class HeldOutPython(NamedTuple):
    """Texts that all models read as a whole.

    Attributes:
        chats: Questions and their answers.
        texts: Source.
        left_out: How many of the data are too long for one of the models.
    """

    chats: list[Example]
    texts: list[Example]
    left_out: int


def read_python(
    session: Session, roles: Mapping[str, Role], max_examples: int | None
) -> HeldOutPython:
    """Return the texts of a session's data that each of the models can read as a whole.

    Raises:
        UserError: If there is none.
    """
    problems = list[Problem]()
    examples = list(islice(read_texts(session.config.data, Path(), problems), max_examples))
    settle(problems, session.config.data.on_error)
    families = {id(f): f for f in (language_family(role) for role in roles.values())}
    found = fitting(examples, list(families.values()))
    if not found:
        raise UserError("no text of the data is short enough for all models: see max_length")
    return HeldOutPython(
        [example for example in found if example.messages is not None],
        [example for example in found if example.messages is None],
        len(examples) - len(found),
    )


def measure_python(
    session: Session,
    roles: Mapping[str, Role],
    shown: HeldOutPython,
    settings: TextEvaluateSettings,
) -> Iterator[Measured]:
    """Yield each number of each model.

    The bound on bits per byte of answers and of texts; of answers with a hole of 12 bytes, the
    share filled in as they were; of answers written, the share that completes the function asked
    for; and how far a model that reads as the student is from the teacher on hidden chunks.
    """
    monte_carlo = MonteCarlo(
        num_draws=settings.num_draws,
        antithetic=settings.antithetic,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    for name, role in roles.items():
        for metric, examples in (("answers", shown.chats), ("texts", shown.texts)):
            if examples:
                bits = likelihood(role, examples, monte_carlo)
                yield Measured(name, f"{metric}, bits per byte", bits.bits, bits.error)
        if shown.chats:
            yield from _of_chats(session, name, role, shown.chats, settings)


def _of_chats(
    session: Session,
    name: str,
    role: Role,
    chats: Sequence[Example],
    settings: TextEvaluateSettings,
) -> Iterator[Measured]:
    draws, size = Draws(settings.seed), settings.batch_size
    filled = infilling(role, chats, draws, batch_size=size)
    yield Measured(name, "spans filled in", filled.exact)
    yield Measured(name, "their tokens", filled.tokens)
    writing = session.config.answers
    answered = answering(
        role,
        chats,
        Draws(writing.seed),
        completes,
        unmasking=make_sampler(role, writing).unmasking,
        max_tokens=writing.max_tokens,
        batch_size=size,
    )
    yield Measured(name, "answers that parse", answered.accepted)
    yield Measured(name, "answers that end", answered.ended)
    if (ask := _distance_to_teacher(session, role)) is not None:
        metric, measure = ask
        yield Measured(name, metric, measure(chats, draws, size))


def _distance_to_teacher(
    session: Session, role: Role
) -> tuple[str, Callable[[Sequence[Example], Draws, int], float]] | None:
    """Return name and measure of the distance to the teacher; None where there is none to it."""
    teacher, pair = session.roles.by_name.get("teacher"), text_pair(session)
    if teacher is None or role is teacher or role.family is not pair.student:
        return None
    pair = replace(pair, reading=replace(pair.reading, truncate=False))
    one = len(pair.readers) == 1

    def measure(chats: Sequence[Example], draws: Draws, size: int) -> float:
        by: Literal["token", "chunk"] = "token" if one else "chunk"
        fitted = fitting(chats, [pair.student, pair.teacher])
        return distance(pair, role, teacher, fitted, draws, by=by, batch_size=size)

    return ("KL to the teacher" if one else "chunk KL to the teacher"), measure

"""The questions of a run: in which order, with which numbers, and which it has had."""

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from diffdistill.data.batches import prefetched
from diffdistill.data.problems import Problem
from diffdistill.data.questions import of_skills, question_key, read_questions
from diffdistill.data.settings import DataSettings
from diffdistill.data.stream import MicroBatch, Stream
from diffdistill.data.streaming import Group, endless_texts, groups
from diffdistill.data.texts import Reading, TextDataset, open_texts, read_texts
from diffdistill.distributed import Distributed
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.text_rows import TextRows
from diffdistill.session import Session, questions
from diffdistill.types import Batch, Example

TOLD_EVERY = 1000
"""How many texts of a stream are read before it is said what was left out."""

Batches = Callable[[int], Generator[Batch]]


def question_batches(session: Session, family: Questions, distributed: Distributed) -> Batches:
    """Return this rank's batches of questions, after a number of micro-batches it has had.

    Questions are as they are: their prompts are tokenized when a model is asked.

    Raises:
        UserError: If the data cannot be read, or does not suit the method.
    """
    data = session.config.data
    for name, wrong in (("packing", data.packing), ("turns", data.turns == "each")):
        if wrong:
            raise UserError(
                f"data.{name}={getattr(data, name)} is for masked diffusion: an autoregressive "
                "model is asked each row's last question alone"
            )
    if data.skills:
        return _of_skills(session, family, distributed)
    read = _reading(session, family)
    if data.streaming:
        return _streamed(session, family, distributed, read)
    dataset = _opened(data, family, read)

    def make(micro: MicroBatch) -> Batch:
        return family.collate([dataset[index] for index in micro.indices], micro.ids)

    def batches(start: int) -> Generator[Batch]:
        stream = stream_of(session, dataset.groups)
        order = stream.for_rank(distributed.reader, distributed.readers, start)
        return prefetched(order, make, family.device)

    return batches


def stream_of(session: Session, alike: Sequence[object]) -> Stream:
    """Return the order of a run's examples, of those alike in a micro-batch."""
    data = session.config.data
    return Stream(alike, data.batch_size, session.config.train.seed, repeats=data.repeats)


def seen_questions(session: Session, samples: int) -> Iterator[Example]:
    """Yield the questions that a run of any number of ranks has had, again where it had them again.

    Of a method that learns given texts, those texts.

    Args:
        session: The run.
        samples: How many it has had, of each skill.
    """
    data, family = session.config.data, questions(session)
    given = isinstance(session.family, CausalPair)
    parts: list[tuple[str | None, DataSettings]] = [*of_skills(data).items()] or [(None, data)]
    for skill, part in parts:
        read = read_texts if given else _reading(session, family, skill)
        if data.streaming:
            yield from islice(endless_texts(part, session.config.train.seed, read=read), samples)
            continue
        dataset = _opened(part, family, read)
        for micro in islice(stream_of(session, dataset.groups), samples // data.batch_size):
            yield from (dataset[index] for index in micro.indices)


def labelled_questions(session: Session, samples: int) -> set[str]:
    """Return the questions whose answers or solutions a run has learned from.

    Those of a method that rewards answers, learns given texts or solutions, or shows these; others
    need none.

    Args:
        session: The run.
        samples: How many questions it has had, of each skill.
    """
    method, given = session.method, isinstance(session.family, CausalPair)
    rewarded = getattr(method, "reward", None) is not None
    if not (rewarded or given or method.solutions() != "unused"):
        return set()
    return {question_key(example) for example in seen_questions(session, samples)}


def telling(texts: Iterator[Example], family: TextRows[Any] | Questions) -> Iterator[Example]:
    """Yield texts; from time to time say what was left out, which would else pile up."""
    for number, text in enumerate(texts, start=1):
        yield text
        if number % TOLD_EVERY == 0:
            family.release()


def _reading(session: Session, family: Questions, skill: str | None = None) -> Reading:
    """Return what reads the questions that a run's method can use.

    Args:
        session: The run.
        family: Reads for its models.
        skill: Which of ``data.skills`` they are of.
    """
    method = session.method
    asked: dict[str, Any] = {
        "solutions": method.solutions(),
        "check": method.check_question,
        "max_tokens": getattr(method, "max_tokens", 0),
    }

    def read(settings: DataSettings, root: Path, problems: list[Problem]) -> Iterator[Example]:
        found = (e._replace(skill=skill) for e in read_questions(settings, root, problems))
        return (e for e in found if family.usable(e, **asked))

    return read


def _opened(data: DataSettings, family: Questions, read: Reading) -> TextDataset:
    try:
        return open_texts(data, read=read)
    finally:
        family.release()


def _streamed(
    session: Session, family: Questions, distributed: Distributed, read: Reading
) -> Batches:
    data, seed = session.config.data, session.config.train.seed
    examples = telling(endless_texts(data, seed, read=read), family)

    def collate(group: Group[Example]) -> Batch:
        return family.collate(group.items, group.ids)

    def batches(start: int) -> Generator[Batch]:
        where = {"rank": distributed.reader, "world": distributed.readers, "start": start}
        return prefetched(groups(examples, data.batch_size, **where), collate, family.device)

    return batches


def _of_skills(session: Session, family: Questions, distributed: Distributed) -> Batches:
    """Return batches with as many questions of each skill, in the order of a run of it alone."""
    data = session.config.data
    if data.streaming:
        raise UserError("data.streaming cannot be combined with data.skills")
    sets = {
        name: _opened(part, family, _reading(session, family, name))
        for name, part in of_skills(data).items()
    }

    def make(micros: tuple[MicroBatch, ...]) -> Batch:
        found = [
            (dataset[index], number * len(sets) + place)
            for place, (dataset, micro) in enumerate(zip(sets.values(), micros, strict=True))
            for index, number in zip(micro.indices, micro.ids, strict=True)
        ]
        examples, ids = zip(*found, strict=True)
        return {**family.collate(examples, ids), "skills": tuple(sets)}

    def batches(start: int) -> Generator[Batch]:
        orders = [
            stream_of(session, dataset.groups).for_rank(
                distributed.reader, distributed.readers, start
            )
            for dataset in sets.values()
        ]
        return prefetched(zip(*orders, strict=True), make, family.device)

    return batches

"""Answers of autoregressive models to questions, to look at and to measure.

Answer ``j`` to question ``i`` has the same random numbers for every model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.answering import ANSWERS_PER_PROMPT, Draft, Prompt
from diffdistill.data.problems import Problem, settle
from diffdistill.data.questions import Shown, question_key, read_questions
from diffdistill.data.records import PictureFile
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.roles import Role
from diffdistill.rollouts import Sampling
from diffdistill.sample_settings import AnswerSampleSettings
from diffdistill.session import Session, questions
from diffdistill.texts import Reader
from diffdistill.types import Example


def questions_of(session: Session) -> list[Example]:
    """Return the questions of a session's section ``sample``, or else the first of its data.

    Raises:
        UserError: If the data cannot be read, or has none.
    """
    settings = session.config.replies
    if settings.prompts:
        return [question(text) for text in settings.prompts]
    problems = list[Problem]()
    examples = read_questions(session.config.data, Path(), problems)
    distinct: Mapping[str, Example] = {
        question_key(example): example for example in islice(examples, 4 * settings.num_prompts)
    }  # some may be the same
    settle(problems, session.config.data.on_error)
    if not distinct:
        raise UserError("there are no questions: give some, or data with questions")
    return list(distinct.values())[: settings.num_prompts]


def question(text: str, images: Sequence[Path] = ()) -> Example:
    """Return a question that somebody typed, about pictures in files or about none.

    Raises:
        UserError: If a file is not there.
    """
    for path in images:
        if not path.is_file():
            raise UserError(f"--image {path}: there is no such file")
    pictures = tuple(Shown(PictureFile(path)) for path in images)
    return Example(text, messages=({"role": "user", "content": text},), pictures=pictures)


def as_prompt(example: Example) -> Prompt:
    """Return a question as what is printed of it."""
    return Prompt(example.prompt, example.messages, example.solution)


def reply(
    session: Session,
    role: Role,
    asked: Sequence[Example],
    settings: AnswerSampleSettings,
    watch: Callable[[Draft], None] | None = None,
) -> Iterator[Draft]:
    """Yield the answers of a role, question by question; no privileged context is shown.

    Args:
        session: The session.
        role: Who is asked.
        asked: The questions.
        settings: How answers are sampled.
        watch: Told each answer as far as it is, after each of its tokens.

    Raises:
        UserError: If the model cannot write, or a question cannot be put to it.
    """
    reader: Reader = "teacher" if role.name == "teacher" else "student"
    family, read = writer(role), questions(session)
    for example in asked:  # before any is written
        read.prompt(example, reader=reader)
    tasks = [(index, j) for index in range(len(asked)) for j in range(settings.num_answers)]
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, settings.top_k)
    draws = Draws(settings.seed)
    for start in range(0, len(tasks), settings.batch_size):
        batch = tasks[start : start + settings.batch_size]
        rows = read.collate(
            [asked[index] for index, _ in batch], [i * ANSWERS_PER_PROMPT + j for i, j in batch]
        )
        told = read.condition(rows, reader=reader)
        heard = None if watch is None else _Growing(batch, family.end_ids, watch)
        with torch.no_grad(), role.acting(family.device):
            found = family.sample(
                role.network, told, rows["ids"], sampling, draws, purpose="answer", watch=heard
            )
        for (index, number), tokens, mask in zip(batch, found.tokens, found.mask, strict=True):
            yield Draft(index, number, tokens[mask].tolist(), done=True)


class _Growing:
    """Answers as far as they are written."""

    def __init__(
        self,
        tasks: Sequence[tuple[int, int]],
        end_ids: Sequence[int],
        watch: Callable[[Draft], None],
    ) -> None:
        self.drafts = [Draft(index, number, [], done=False) for index, number in tasks]
        self.end_ids = end_ids
        self.watch = watch

    def __call__(self, tokens: Tensor) -> None:
        for draft, token in zip(self.drafts, tokens.tolist(), strict=True):
            if not draft.tokens or draft.tokens[-1] not in self.end_ids:
                draft.tokens.append(token)
                self.watch(draft)


def writer(role: Role) -> CausalLM:
    """Return the family of a role that can write.

    Raises:
        UserError: If it cannot.
    """
    if not isinstance(role.family, CausalLM):
        raise UserError(f"roles.{role.name}: {type(role.family).__name__} judges answers alone")
    return role.family

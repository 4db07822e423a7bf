"""Answers of text models to prompts, while they settle and when they are done.

Answer ``j`` to prompt ``i`` has the same random numbers for every model.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.data.problems import Problem, settle
from diffdistill.data.texts import read_texts
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.answers import AnswerSampler, BlockEvent, up_to_end
from diffdistill.pipelines.block_diffusion import chat_tokens
from diffdistill.pipelines.chats import Messages
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.roles import Role
from diffdistill.sample_settings import TextSampleSettings
from diffdistill.session import Session, text_pair
from diffdistill.types import Example

ANSWERS_PER_PROMPT = 2**20
"""Keeps the numbers of two prompts' answers apart, however many there are."""

FILL = re.compile(r"<fill:(\d+)>")
"""Marks a span of a text that is to be filled with so many tokens."""


class Prompt(NamedTuple):
    """What is asked of a model.

    Attributes:
        text: The question, or the text to go on with, or to fill where it says ``<fill:N>``.
        messages: A chat up to its answer; None where there is only the text.
        reference: What the data has as the answer, if there is one.
    """

    text: str
    messages: Messages | None = None
    reference: str | None = None


class Draft(NamedTuple):
    """An answer as far as it is written.

    Attributes:
        prompt: The number of the prompt.
        number: The number of the answer to it.
        tokens: Token ids, masks where nothing has settled; when done, up to the end token.
        done: Whether it is.
    """

    prompt: int
    number: int
    tokens: list[int]
    done: bool


class _Task(NamedTuple):
    prompt: int
    number: int
    context: list[int]
    canvas: list[int] | None


def token_family(role: Role) -> TokenFamily:
    """Return the family of a role that is a language model of any kind."""
    assert isinstance(role.family, TokenFamily), f"{role.name} is no language model"
    return role.family


def language_family(role: Role) -> LanguageFamily:
    """Return the family of a role that is a text model."""
    assert isinstance(role.family, LanguageFamily), f"{role.name} is no text model"
    return role.family


def make_sampler(role: Role, settings: TextSampleSettings) -> AnswerSampler:
    """Return what samples the answers of a role."""
    unmasking = Unmasking(
        schedule=settings.schedule,
        num_steps=settings.num_steps,
        threshold=settings.threshold,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    return language_family(role).sampler(
        role.network,
        max_tokens=settings.max_tokens,
        unmasking=unmasking,
        guidance=settings.guidance,
    )


def write(role: Role, prompts: Sequence[Prompt], settings: TextSampleSettings) -> Iterator[Draft]:
    """Yield each answer after each step that it changes in, and when it is done.

    Texts that are to be filled are written alone, other answers in batches.

    Raises:
        UserError: If a prompt cannot be put to the model.
    """
    family = language_family(role)
    tasks = [
        _Task(index, number, *spelled(family, prompt, settings.chat))
        for index, prompt in enumerate(prompts)
        for number in range(settings.num_answers)
    ]
    sampler, draws = make_sampler(role, settings), Draws(settings.seed)
    for batch in _batches(tasks, settings.batch_size):
        yield from _written(role, sampler, draws, batch)


def spelled(
    family: LanguageFamily, prompt: Prompt, chat: bool | None
) -> tuple[list[int], list[int] | None]:
    """Return a prompt's tokens, and where it is to be filled, the rest of it with masks.

    Args:
        family: Whose tokens.
        prompt: The prompt.
        chat: Whether a bare text is a user's message; None asks whether there is a template.

    Raises:
        UserError: If it is a chat and there is no template for it.
    """
    tokenizer = family.tokenizer
    if prompt.messages is None and FILL.search(prompt.text):
        first, *rest = FILL.split(prompt.text)
        canvas: list[int] = []
        for count, text in zip(rest[::2], rest[1::2], strict=True):
            canvas += [family.mask_id] * int(count) + encoded(family, text)
        return encoded(family, first), canvas
    chats = tokenizer.chat_template is not None if chat is None else chat
    if prompt.messages is None and not chats:
        return encoded(family, prompt.text), None
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {family.path} has no chat template: set chat_template of its "
            "family, or continue plain text (--plain, or sample.chat=false)"
        )
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    return chat_tokens(tokenizer, messages), None


def encoded(family: LanguageFamily, text: str) -> list[int]:
    """Return the token ids of a text alone."""
    ids: list[int] = family.tokenizer.encode(text, add_special_tokens=False)
    return ids


def _batches(tasks: Sequence[_Task], size: int) -> Iterator[list[_Task]]:
    """Yield tasks that can be sampled together: without canvases, or one that has one."""
    batch: list[_Task] = []
    for task in tasks:
        if batch and (task.canvas is not None or batch[-1].canvas is not None):
            yield batch
            batch = []
        batch.append(task)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _written(
    role: Role, sampler: AnswerSampler, draws: Draws, batch: Sequence[_Task]
) -> Iterator[Draft]:
    family, device = language_family(role), language_family(role).device
    numbers = [task.prompt * ANSWERS_PER_PROMPT + task.number for task in batch]
    given = batch[0].canvas
    canvas = None if given is None else torch.tensor([given])
    events = sampler.stream(
        [task.context for task in batch],
        draws,
        torch.tensor(numbers, device=device),
        canvas=canvas,
        every_step=True,
    )
    width = sampler.max_tokens if given is None else len(given)
    answers = [list(given or [family.mask_id] * width) for _ in batch]
    size = 0
    for event in _acted(role, device, events):
        size = size or event.tokens.shape[1]  # the first block is never shorter than others
        place = slice(event.block * size, event.block * size + event.tokens.shape[1])
        for row, tokens in zip(event.rows.tolist(), event.tokens.tolist(), strict=True):
            answers[row][place] = tokens
            yield Draft(batch[row].prompt, batch[row].number, answers[row].copy(), done=False)
    for task, answer in zip(batch, answers, strict=True):
        found = torch.tensor(answer if given is None else answer[:width])
        rest = None if given is None else torch.tensor(given)
        whole = up_to_end(_settled(found, family.mask_id), rest, family.end_ids, family.mask_id)
        yield Draft(task.prompt, task.number, whole.tolist(), done=True)


def _settled(tokens: Tensor, mask_id: int) -> Tensor:
    """Return an answer without the blocks after its end, which were never asked for."""
    return tokens[tokens != mask_id]


def _acted(role: Role, device: torch.device, events: Iterator[BlockEvent]) -> Iterator[BlockEvent]:
    """Yield events that are made as the role, which is nobody's business in between."""
    while True:
        with role.acting(device):
            event = next(events, None)
        if event is None:
            return
        yield event


def decoded(family: TokenFamily, tokens: Sequence[int]) -> str:
    """Return a text without its special tokens."""
    return family.decoded(tokens)


def prompts_of(session: Session) -> list[Prompt]:
    """Return the prompts of a session's section ``sample``, or else the first of its data.

    Of a chat that is all up to its last answer, of a text its first half, and at most half of what
    the student reads.

    Raises:
        UserError: If the data cannot be read, or has none.
    """
    settings = session.config.answers
    if settings.prompts:
        return [Prompt(text) for text in settings.prompts]
    problems = list[Problem]()
    examples = islice(
        read_texts(session.config.data, Path(), problems), 4 * settings.num_prompts
    )  # some may be the same
    family = text_pair(session).student
    prompts = [_asking(example, family, settings.max_tokens) for example in examples]
    settle(problems, session.config.data.on_error)
    distinct = {str(prompt.messages or prompt.text): prompt for prompt in prompts}
    if not distinct:
        raise UserError("there are no prompts: give some, or data with texts")
    return list(distinct.values())[: settings.num_prompts]


def _asking(example: Example, family: LanguageFamily, max_tokens: int) -> Prompt:
    if example.messages is not None:
        *before, last = example.messages
        return Prompt(example.prompt, before, last["content"])
    spelling = family.speller(example.text or "")
    ends = [0, *(stop for _, stop in spelling.spans)]
    half = min(len(spelling.tokens), family.max_length) // 2
    start, stop = ends[half], ends[min(half + max_tokens, len(ends) - 1)]
    parts = (spelling.text[:start], spelling.text[start:stop])
    text, reference = (part.decode(errors="ignore") for part in parts)
    return Prompt(text, reference=reference)

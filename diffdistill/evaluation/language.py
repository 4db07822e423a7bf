"""What a diffusion language model does with held-out texts, in units that tokenizers share.

A bound on the likelihood in bits per byte, spans of bytes filled in, answers to questions, and the
distance of a student to its teacher. All random numbers belong to the examples, so that models are
measured on the same spans and, where they share a tokenizer, the same masks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from diffdistill.answering import decoded, language_family
from diffdistill.chunks import num_chunks, select_whole, tokens_of
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.evaluation.likelihood import MonteCarlo, bound
from diffdistill.methods.tide import Tide
from diffdistill.noising import Estimate
from diffdistill.pipelines.answers import AnswerSampler
from diffdistill.pipelines.block_diffusion import chat_tokens
from diffdistill.pipelines.chats import Messages, chat_row, read_chat
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.text_rows import Reading
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.projection import token_logprob
from diffdistill.roles import Role
from diffdistill.texts import Reader
from diffdistill.types import Batch, Example, Progress


class PerByte(NamedTuple):
    """A Monte Carlo estimate.

    Attributes:
        bits: Bits per byte.
        error: Its standard error, of the masks alone: the texts are given.
        num_bytes: Bytes of the texts.
    """

    bits: float
    error: float
    num_bytes: int


class Infilled(NamedTuple):
    """How many spans were filled in as they had been.

    Attributes:
        exact: Share of spans whose every byte is right.
        tokens: Share of their tokens that are right.
        num_spans: How many there were.
    """

    exact: float
    tokens: float
    num_spans: int


class Answered(NamedTuple):
    """What became of the questions.

    Attributes:
        accepted: Share of questions with an answer that was accepted.
        ended: Share of answers that came to an end in time.
        length: Bytes of all answers, for each byte of those that the chats have.
        texts: The answers, in the order of the questions.
    """

    accepted: float
    ended: float
    length: float
    texts: list[str]


def fitting(examples: Sequence[Example], families: Sequence[LanguageFamily]) -> list[Example]:
    """Return the examples that every family can read as a whole."""
    pairs = [TextPair(family, family, Reading(truncate=False)) for family in families]
    return [example for example in examples if all(_fits(pair, example) for pair in pairs)]


def _fits(pair: TextPair, example: Example) -> bool:
    try:
        pair.rows(example)
    except UserError:
        return False
    return True


def batches(
    pair: TextPair, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yield examples of like lengths as batches, with their numbers; the same ones every time."""
    rows = pair.encode(examples)
    order = sorted(range(len(rows)), key=lambda n: (len(rows[n]["student/tokens"]), n))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = torch.tensor(chosen, device=pair.device)
        yield chosen, pair.collate([rows[number] for number in chosen]) | {"ids": ids}


def content_bytes(example: Example) -> int:
    """Return the bytes of a text, or of the answers of a chat."""
    if example.messages is None:
        return len((example.text or "").encode())
    answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
    return sum(len(answer.encode()) for answer in answers)


def likelihood(role: Role, examples: Sequence[Example], monte_carlo: MonteCarlo) -> PerByte:
    """Return the bound on the negative log-likelihood of texts, or of answers.

    The tokens that end a text are part of it; the bytes are of the text alone.

    Args:
        role: The model.
        examples: Texts that fit (see ``fitting``).
        monte_carlo: How to estimate it.
    """
    family = language_family(role)
    pair = TextPair(family, family, Reading(truncate=False))
    found = []
    for _, batch in batches(pair, examples, monte_carlo.batch_size):
        text, padding = pair.text(batch), pair.condition(batch)["padding"]
        ids = batch["ids"]
        found.append(bound(role, text.tokens, text.maskable, padding, ids, monte_carlo))
    whole = Estimate(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    size = sum(content_bytes(example) for example in examples)
    error = whole.error.double().square().sum().sqrt().item()
    unit = size * math.log(2.0)
    return PerByte(whole.value.sum().item() / unit, error / unit, size)


class Gap(NamedTuple):
    """An answer with a hole.

    Attributes:
        prompt: Tokens before it.
        answer: Its tokens, with end tokens up to the end of its last block.
        hidden: Which of them are to be filled in.
    """

    prompt: list[int]
    answer: list[int]
    hidden: list[bool]


def make_gap(family: LanguageFamily, example: Example, size: int, draws: Draws, number: int) -> Gap:
    """Return the answer of a chat without the tokens of a span of ``size`` bytes.

    The span is where ``draws`` says for ``number``, in any tokenizer. A token that reaches out of
    it is hidden too.
    """
    assert example.messages is not None, "a gap is in the answer of a chat"
    messages: Messages = example.messages
    chat = read_chat(family.speller, messages)
    row = family.lay_out(chat_row(chat, turns="last"))
    first, last = chat.contents[-1]
    start = first + draws.integer("gap", number, max(last - first - size, 0) + 1)
    stop = min(start + size, last)
    pads = row.documents.count(-1)
    begin = row.maskable.index(True)
    gone = [a < stop and start < b for a, b in chat.spelling.spans]
    hidden = ([False] * pads + gone + [False] * len(row.tokens))[begin : len(row.tokens)]
    return Gap(row.tokens[pads:begin], row.tokens[begin:], hidden)


def infilling(
    role: Role,
    examples: Sequence[Example],
    draws: Draws,
    *,
    size: int = 12,
    batch_size: int = 32,
) -> Infilled:
    """Return how often a span of an answer is filled in as it had been, token by token, greedily.

    Args:
        role: The model; how many tokens there are is given.
        examples: Chats that fit.
        draws: Random numbers.
        size: Bytes of a span.
        batch_size: Chats in a call.
    """
    family = language_family(role)
    sampler = family.sampler(role.network)
    gaps = [make_gap(family, example, size, draws, n) for n, example in enumerate(examples)]
    hits: list[list[bool]] = []
    for length in sorted({len(gap.answer) for gap in gaps}):
        alike = [number for number, gap in enumerate(gaps) if len(gap.answer) == length]
        for start in range(0, len(alike), batch_size):
            numbers = alike[start : start + batch_size]
            with role.acting(family.device):
                hits += _filled(family, sampler, [gaps[n] for n in numbers], draws, numbers)
    tokens = [right for hit in hits for right in hit]
    exact = sum(all(hit) for hit in hits)
    return Infilled(exact / len(gaps), sum(tokens) / len(tokens), len(gaps))


def _filled(
    family: LanguageFamily,
    sampler: AnswerSampler,
    gaps: Sequence[Gap],
    draws: Draws,
    numbers: Sequence[int],
) -> list[list[bool]]:
    """Return for each gap which of its tokens are right."""
    answers = torch.tensor([gap.answer for gap in gaps])
    hidden = torch.tensor([gap.hidden for gap in gaps])
    canvas = answers.masked_fill(hidden, family.mask_id)
    ids = torch.tensor(list(numbers), device=family.device)
    found = sampler.sample([gap.prompt for gap in gaps], draws, ids, canvas=canvas)
    return [
        (tokens.cpu() == answer)[gone].tolist()
        for tokens, answer, gone in zip(found, answers, hidden, strict=True)
    ]


def answering(
    role: Role,
    examples: Sequence[Example],
    draws: Draws,
    accept: Callable[[str, str], bool],
    *,
    unmasking: Unmasking,
    max_tokens: int = 96,
    batch_size: int = 32,
) -> Answered:
    """Return what a model answers to the questions of chats, and how many answers are accepted.

    Args:
        role: The model.
        examples: Chats that end with a question and its answer, which is not shown.
        draws: Random numbers.
        accept: Whether a question has been answered by a text.
        unmasking: How the tokens of an answer settle.
        max_tokens: Tokens of an answer.
        batch_size: Questions in a call.
    """
    family = language_family(role)
    sampler = family.sampler(role.network, unmasking=unmasking, max_tokens=max_tokens)
    chats = [example.messages for example in examples if example.messages is not None]
    prompts = [chat_tokens(family.tokenizer, messages[:-1]) for messages in chats]
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        asked = prompts[start : start + batch_size]
        ids = torch.arange(start, start + len(asked), device=family.device)
        with role.acting(family.device):
            answers += [tokens.tolist() for tokens in sampler.sample(asked, draws, ids)]
    texts = [decoded(family, tokens) for tokens in answers]
    pairs = zip(chats, texts, strict=True)
    accepted = sum(accept(messages[-2]["content"], text) for messages, text in pairs)
    ended = sum(tokens[-1] in family.end_ids for tokens in answers)
    said, expected = (
        sum(len(text.encode()) for text in side)
        for side in (texts, [messages[-1]["content"] for messages in chats])
    )
    return Answered(accepted / len(texts), ended / len(texts), said / expected, texts)


@torch.no_grad()
def hidden_likelihood(
    pair: TextPair,
    role: Role,
    examples: Sequence[Example],
    draws: Draws,
    *,
    reader: Reader,
    batch_size: int = 32,
) -> float:
    """Return the bits per byte of hidden text, where the same text is hidden from both readers.

    Unlike a bound on the likelihood it compares a teacher with a student on what ``tide`` asks:
    the same chunks, each with a probability of t, whatever either model sees besides.

    Args:
        pair: Reads the texts for both.
        role: The model of ``reader``.
        examples: Texts that fit both.
        draws: Random numbers.
        reader: Who is asked.
        batch_size: Texts in a call.
    """
    family = language_family(role)
    sizes = torch.tensor([len(spelled or b"") for spelled in family.speller.vocabulary()])
    nats, size = 0.0, 0
    for _, batch in batches(pair, examples, batch_size):
        sides = pair.text(batch), pair.text(batch, reader="teacher")
        count = num_chunks(*(side.chunks for side in sides))
        level = draws.uniform("level", batch["ids"])
        number = draws.uniform("hidden", batch["ids"], (pair.student.max_length,))[:, :count]
        active = number < level[:, None]
        for side in sides:
            active &= select_whole(side.maskable, side.chunks, count)
        own = sides[reader == "teacher"]
        mask = tokens_of(active, own.chunks)
        state = pair.noised(batch, level, mask, reader=reader)
        found = role(state, pair.condition(batch, reader=reader))
        nats -= token_logprob(found, own.tokens, mask=mask).sum().item()
        size += int(sizes[own.tokens[mask].cpu()].sum())
    return nats / (max(size, 1) * math.log(2.0))


@torch.no_grad()
def distance(
    pair: TextPair,
    student: Role,
    teacher: Role,
    examples: Sequence[Example],
    draws: Draws,
    *,
    by: Literal["token", "chunk"],
    batch_size: int = 32,
) -> float:
    """Return how far a student is from its teacher on hidden text, in nats.

    What is hidden is what ``tide`` hides in training, from both; temperatures are 1.

    Args:
        pair: Reads the texts for both.
        student: The student.
        teacher: The teacher.
        examples: Texts that fit both.
        draws: Random numbers.
        by: ``token`` is KL(teacher || student) of each hidden token, of one vocabulary; ``chunk``
            KL(student || teacher) of the binary event that a hidden chunk is the right one.
        batch_size: Texts in a call.
    """
    variant: Literal["shared", "cross"] = "shared" if by == "token" else "cross"
    method = Tide(
        family=pair,
        draws=draws,
        student=student,
        teacher=teacher,
        variant=variant,
        divergence="forward-kl" if by == "token" else "reverse-binary-kl",
        tidal="none",
        exposure=0.0,
        weight="uniform",
        temperature=1.0,
    )
    total = count = 0.0
    for _, batch in batches(pair, examples, batch_size):
        for loss in method.losses(batch, Progress(0, 1)):
            chunks = float(loss.metrics["active_chunks"]) * len(batch["ids"])
            total += float(loss.metrics["distillation"]) * chunks
            count += chunks
    return total / max(count, 1.0)

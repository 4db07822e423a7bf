"""Bounds on the likelihood of texts under a role, by Monte Carlo."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.answering import language_family
from diffdistill.data.problems import Problem, settle
from diffdistill.data.texts import read_texts
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.noising import Estimate, TokenLogprob, likelihood_bound
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.projection import token_logprob
from diffdistill.roles import Role
from diffdistill.session import Session, text_pair
from diffdistill.types import Condition, State


@dataclass(frozen=True, kw_only=True)
class MonteCarlo:
    """How a bound is estimated (see ``noising.likelihood_bound``).

    Attributes:
        num_draws: Model calls for each text.
        antithetic: Whether the numbers of hidden tokens are spread evenly over them.
        seed: Seed of the hidden tokens.
        batch_size: Texts at a time.
    """

    num_draws: int
    antithetic: bool
    seed: int
    batch_size: int


class Pair(NamedTuple):
    """A text of which the likelihood of the end is asked for.

    Attributes:
        context: Token ids, which may be none.
        target: The token ids that are scored.
        number: Of its random numbers.
    """

    context: list[int]
    target: list[int]
    number: int


def role_logprob(role: Role, clean: Tensor, condition: Condition) -> TokenLogprob:
    """Return the function that ``noising``'s bounds ask for the log-probability of ``clean``."""

    def logprob(noised: Tensor, masked: Tensor) -> Tensor:
        state = State(noised, masked.float().mean(dim=1), masked)
        return token_logprob(role(state, condition), clean, mask=masked)

    return logprob


def bound(
    role: Role,
    clean: Tensor,
    maskable: Tensor,
    padding: Tensor,
    ids: Tensor,
    monte_carlo: MonteCarlo,
) -> Estimate:
    """Return the bound on the negative log-likelihood of each text's maskable tokens, in nats.

    Args:
        role: The model.
        clean: Token ids ``[B, L]``.
        maskable: bool ``[B, L]``: what is scored.
        padding: bool ``[B, L]``: what is no text, on either side.
        ids: The number of each text, ``[B]``.
        monte_carlo: How to estimate it.
    """
    family = language_family(role)
    return likelihood_bound(
        role_logprob(role, clean, family.condition(clean, padding)),
        clean,
        maskable,
        Draws(monte_carlo.seed),
        ids,
        mask_id=family.mask_id,
        block=family.span,
        num_draws=monte_carlo.num_draws,
        spread="draws" if monte_carlo.antithetic else "none",
    )


def bound_pairs(role: Role, pairs: Sequence[Pair], monte_carlo: MonteCarlo) -> list[Estimate]:
    """Return the bound of each target given its context; each estimate is of one text.

    A target begins with a block, as answers do in training and sampling. What its last block has
    room for beyond it is nobody's text: it is hidden throughout.
    """
    family = language_family(role)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].context) - len(pairs[i].target))
    found: dict[int, Estimate] = {}
    for start in range(0, len(order), monte_carlo.batch_size):
        chosen = order[start : start + monte_carlo.batch_size]
        clean, maskable, padding = _laid_out(family, [pairs[i] for i in chosen])
        ids = torch.tensor([pairs[i].number for i in chosen], device=family.device)
        estimate = bound(role, clean, maskable, padding, ids, monte_carlo)
        for row, index in enumerate(chosen):
            found[index] = Estimate(*(part[row : row + 1] for part in estimate))
    return [found[index] for index in range(len(pairs))]


def _laid_out(family: LanguageFamily, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, what is scored, and what is padding, each ``[B, L]``."""
    tokens, kinds = [], []
    for pair in pairs:
        left = -len(pair.context) % family.unit
        tail = -len(pair.target) % family.unit
        row = [family.pad_id] * left + pair.context + pair.target + [family.mask_id] * tail
        tokens.append(row)
        kinds.append([-1] * left + [0] * len(pair.context) + [1] * len(pair.target) + [0] * tail)
    longest = max(len(row) for row in tokens)
    width = math.ceil(longest / family.multiple) * family.multiple
    filled = [row + [family.pad_id] * (width - len(row)) for row in tokens]
    kind = torch.tensor([row + [-1] * (width - len(row)) for row in kinds], device=family.device)
    return torch.tensor(filled, device=family.device), kind == 1, kind == -1


class HeldOut(NamedTuple):
    """What a model makes of texts.

    Attributes:
        model: The model's name.
        num_texts: How many texts.
        num_tokens: Their learned tokens, in the model's own tokenizer.
        num_bytes: The bytes these spell.
        nelbo: Nats for each token, an upper bound.
        nelbo_error: The Monte Carlo error of it (one standard deviation); of the texts as they
            are, not of which texts they are.
        perplexity: The exponential of ``nelbo``.
        bits_per_byte: The same bound for each byte, which compares tokenizers.
        bits_per_byte_error: The Monte Carlo error of it.
    """

    model: str
    num_texts: int
    num_tokens: int
    num_bytes: int
    nelbo: float
    nelbo_error: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float


def held_out(
    session: Session, name: str, role: Role, monte_carlo: MonteCarlo, max_examples: int | None
) -> HeldOut:
    """Return how likely the data of a session is to a role, as it is read for training.

    End tokens count as tokens, and not as bytes.

    Raises:
        UserError: If the data cannot be read or used.
    """
    family = language_family(role)
    pair = TextPair(family, family, text_pair(session).reading)
    spelled = family.speller.vocabulary()
    totals = torch.zeros(2, dtype=torch.float64)
    texts = tokens = num_bytes = 0
    for rows, ids in _batches(session, pair, monte_carlo.batch_size, max_examples):
        batch = pair.collate(rows)
        text = pair.text(batch)
        padding = pair.condition(batch)["padding"]
        estimate = bound(role, text.tokens, text.maskable, padding, ids, monte_carlo)
        totals += torch.stack([estimate.value.sum(), estimate.error.square().sum()]).cpu()
        texts += len(rows)
        tokens += int(text.maskable.sum())
        learned = text.tokens[text.maskable].tolist()
        num_bytes += sum(len(spelled[token] or b"") for token in learned)
    if tokens == 0:
        raise UserError("there are no texts in the data to measure")
    nats, error = float(totals[0]), float(totals[1].sqrt())
    bits = 1.0 / (math.log(2.0) * max(num_bytes, 1))
    nelbo = nats / tokens
    return HeldOut(
        name, texts, tokens, num_bytes, nelbo, error / tokens, math.exp(min(nelbo, 700.0)),
        nats * bits, error * bits,
    )  # fmt: skip


def _batches(
    session: Session, pair: TextPair, size: int, max_examples: int | None
) -> Iterator[tuple[list[dict[str, Tensor]], Tensor]]:
    """Yield encoded texts and their numbers."""
    rows, number = _rows(session, pair, max_examples), 0
    while batch := list(islice(rows, size)):
        yield batch, torch.arange(number, number + len(batch), device=pair.device)
        number += len(batch)


def _rows(
    session: Session, pair: TextPair, max_examples: int | None
) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of each text that has something to learn."""
    problems = list[Problem]()
    for example in islice(read_texts(session.config.data, Path(), problems), max_examples):
        found = [pair.rows(example)]
        for row in pair.packed(found) if pair.reading.packing else found:
            if any(row["student"].maskable):
                yield pair.tensors(row)
    settle(problems, session.config.data.on_error)

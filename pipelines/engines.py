"""What writes the student's answers during training: the model itself, or an inference engine.

All are given the student's own prompts and nothing else, so that no answer depends on what a
teacher is shown, on a gate, or on how far a target is extrapolated.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffdistill.bundled import LAUNCHERS
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.prompts import bare_prompts
from diffdistill.rollouts import Actor, Answers, Sampling
from diffdistill.types import Condition

SEEDS = 2**31 - 1
"""Seeds of rows are below it; every engine takes such a number."""


class Asked(NamedTuple):
    """What an engine is asked for.

    Attributes:
        condition: The prompts, as of ``prompts.prompt_condition``.
        ids: The number of each row, ``[B]``.
        sampling: How tokens are sampled.
        draws: Random numbers.
        purpose: What they are for.
    """

    condition: Condition
    ids: Tensor
    sampling: Sampling
    draws: Draws
    purpose: str

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return bare_prompts(self.condition)

    @property
    def seeds(self) -> list[int]:
        """A seed for each row, by which an answer is that of its number."""
        return [self.draws.integer(self.purpose, n, SEEDS) for n in self.ids.tolist()]


class Engine(ABC):
    """Writes answers.

    A subclass is a keyword-only dataclass, whose fields are the options of a config's ``engine``.

    Attributes:
        adapters: What a student may have for it to write with: ``lora``, ``dora``, ``shadow``.
    """

    adapters: ClassVar[tuple[str, ...]] = ("lora", "dora", "shadow")

    @abstractmethod
    def answers(self, family: CausalLM, student: Actor, asked: Asked) -> Answers:
        """Return an answer of the student as it is now to each prompt.

        Args:
            family: The student's.
            student: Is acting, without a graph.
            asked: The prompts, and how they are answered.
        """

    def check(self) -> None:  # noqa: B027 - most are always there
        """Refuse before anything is loaded what would fail at the first answer.

        Raises:
            UserError: If the engine cannot be had.
        """


@dataclass(kw_only=True)
class Generate(Engine):
    """transformers' ``generate``: an answer depends on its row's number, not on its batch."""

    def answers(self, family: CausalLM, student: Actor, asked: Asked) -> Answers:
        """Return an answer to each prompt; see ``causal_sampling``."""
        told, ids, sampling, draws, purpose = asked
        return family.sample(student.network, told, ids, sampling, draws, purpose=purpose)


class Written(NamedTuple):
    """What an engine wrote to one prompt.

    Attributes:
        tokens: Token ids, with the end token if there is one.
        logprobs: The log-probability of each, in the distribution that it was sampled from.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]


def answers_of_rows(rows: Sequence[Written], family: CausalLM, sampling: Sampling) -> Answers:
    """Return what an engine wrote as answers ``[B, A]``.

    Each is cut after its first end token, and before a token that is none of the tokenizer's: an
    output head may have more rows, which the student's own predictions leave out.
    """
    ends = set(family.end_ids)
    kept = []
    for row in rows:
        stop = next((i for i, token in enumerate(row.tokens) if token >= family.words), None)
        end = next((i + 1 for i, token in enumerate(row.tokens) if token in ends), None)
        length = min(x for x in (stop, end, len(row.tokens), sampling.max_tokens) if x is not None)
        kept.append(Written(row.tokens[:length], row.logprobs[:length]))
    width = max(1, *(len(row.tokens) for row in kept))
    tokens = torch.full((len(kept), width), family.pad_id)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    logprobs = torch.zeros(tokens.shape)
    for index, row in enumerate(kept):
        length = len(row.tokens)
        tokens[index, :length] = torch.tensor(row.tokens, dtype=torch.int64)
        mask[index, :length] = True
        if sampling.temperature > 0:  # else the token was no choice
            logprobs[index, :length] = torch.tensor(row.logprobs)
    ended = torch.tensor([len(row.tokens) > 0 and row.tokens[-1] in ends for row in kept])
    return Answers(*(x.to(family.device) for x in (tokens, mask, logprobs, ended)))


def check_whole(student: Actor, engine: str) -> None:
    """Refuse a student whose weights are spread over processes.

    Raises:
        UserError: If they are.
    """
    if any(isinstance(x, DTensor) for x in student.network.parameters()):
        raise UserError(
            f"engine {engine} needs the student's whole weights in each process: launch with "
            f"{LAUNCHERS / 'ddp.yaml'}, or set engine: transformers"
        )

"""Answers of autoregressive models, and what a method may ask of a family of them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from diffdistill.byte_beam import Search
from diffdistill.draws import Draws
from diffdistill.projection import Prediction
from diffdistill.texts import Bytes, Reader, Text
from diffdistill.types import Batch, Condition, Example, State

Solutions: TypeAlias = Literal["unused", "learned", "shown"]
"""What becomes of reference solutions: given to the student as answers, or shown to a teacher."""


class Answers(NamedTuple):
    """An answer to each question of a batch, as token ids of the student's vocabulary.

    Attributes:
        tokens: int64 ``[B, A]``; filled up after the end of an answer.
        mask: bool ``[B, A]``: the tokens of the answer, its end token included. A row may have
            none.
        logprobs: float32 ``[B, A]``: log-probability of each token under the distribution that it
            was sampled from (with its temperature, top-p and top-k); 0 outside of the mask. None
            of answers that were given.
        ended: bool ``[B]``: whether the answer ends with an end token; else it was cut.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor | None
    ended: Tensor


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_tokens: Tokens of the longest answer.
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_p: Only the most likely tokens that together have this probability; 1 is all.
        top_k: Only so many most likely tokens; 0 is all.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Actor(Protocol):
    """A model that can write answers: a ``roles.Role``."""

    network: Any
    adapter: str | None
    settings: Any

    def parameters(self) -> Mapping[str, Tensor]:
        """Return the weights that are its own, by name."""
        ...

    def acting(self, device: torch.device) -> AbstractContextManager[None]:
        """Let calls of the network within the block be this role's."""
        ...


class AnswerModel(Protocol):
    """An autoregressive model behind one call.

    Returns logits ``[B, A, V]``, or the ``Projection`` that they are made from (or, of a teacher
    behind a server, the ``supports.TopK`` of them); those at i are about the answer's token i,
    ``state.x[:, i]``, given the condition and the tokens before it.
    """

    def __call__(self, state: State, condition: Condition) -> Prediction:
        """Return the prediction at ``state`` under ``condition``."""
        ...


class AnswerFamily(Protocol):
    """A family of autoregressive models that answer questions.

    Student and teacher may have chat templates of their own, but share a vocabulary.
    """

    def repeated(self, batch: Batch, num_answers: int) -> Batch:
        """Return a batch with each row ``num_answers`` times over, one after the other.

        Row ``i * num_answers + j`` is the j-th of row i, with an id of its own.
        """
        ...

    def rollout(
        self,
        actor: Actor,
        batch: Batch,
        sampling: Sampling,
        draws: Draws,
        *,
        purpose: str,
        reader: Reader = "student",
    ) -> Answers:
        """Return an answer of a model's to each question, without a graph.

        It depends on the model, the question, ``sampling``, ``purpose`` and the row's id, and on
        nothing else: nobody who answers sees privileged context.

        Args:
            actor: Who answers.
            batch: The questions.
            sampling: How.
            draws: Random numbers.
            purpose: What they are for.
            reader: Whose template the question is put in.

        Raises:
            UserError: If the model only judges, as a server does.
        """
        ...

    def given(self, batch: Batch) -> Answers:
        """Return the answers that the data has, as the student would write them.

        Raises:
            UserError: If an example has none.
        """
        ...

    def state(self, answers: Answers) -> State:
        """Return where models are asked: ``x`` are the tokens, ``mask`` those that count."""
        ...

    def condition(
        self, batch: Batch, *, reader: Reader = "student", exposure: float | None = None
    ) -> Condition:
        """Return what a model is told before the answer: a question in its chat template.

        Args:
            batch: The collated batch.
            reader: Whose template and prompt. Only a teacher's may hold privileged context.
            exposure: None shows no privileged context. Else the teacher is shown the reference
                solution: its first share of segments, in [0, 1], and in any case its final answer
                (``exposures.reveal``).
        """
        ...

    def with_solutions(self, batch: Batch, solutions: Sequence[str | None]) -> Batch:
        """Return a batch with other reference solutions, one for each row."""
        ...

    def examples(self, batch: Batch) -> Sequence[Example]:
        """Return the examples of a batch, a row each."""
        ...

    def by_skill(self, batch: Batch) -> Mapping[str, Batch]:
        """Return the questions of each of ``data.skills``, as a run of it alone has them."""
        ...

    def spelled(self, answers: Answers) -> list[str]:
        """Return the text of each answer, without special tokens."""
        ...


class GivenFamily(Protocol):
    """A family of autoregressive models that read the data's own texts, each in its own tokens."""

    def spellings(self, *, reader: Reader = "student") -> Sequence[bytes | None]:
        """Return what each token id of the reader spells, None of special tokens."""
        ...

    def text(self, batch: Batch, *, reader: Reader = "student") -> Text:
        """Return the texts of ``batch`` without their first token, which is given."""
        ...

    def state(self, batch: Batch, *, reader: Reader = "student") -> State:
        """Return where the reader's model is asked: at each token of ``text``."""
        ...

    def condition(self, batch: Batch, *, reader: Reader = "student", copies: int = 1) -> Condition:
        """Return what the reader's model is told besides: the first token of each text."""
        ...

    def bytes(self, batch: Batch) -> Bytes:
        """Return the bytes of the student's tokens, and what ``byte_targets`` found of them."""
        ...

    def byte_targets(
        self, teacher: Actor, texts: Sequence[Mapping[str, Tensor]], search: Search, kept: int
    ) -> list[dict[str, Tensor]]:
        """Return what a teacher says of the bytes of encoded texts, to be kept beside them.

        Args:
            teacher: The model.
            texts: Encoded texts.
            search: Which tokenizations are followed.
            kept: How many bytes are kept at each place; of the rest, its mass alone.
        """
        ...

    def weights(self, teacher: Actor) -> str:
        """Return a hash of a model's weights and of how it reads."""
        ...

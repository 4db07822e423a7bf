"""ULD: distilling a teacher with another tokenizer by sorted probabilities (arXiv:2402.12030).

Student and teacher see the same text with some of it hidden, each in its own tokens. Whatever the
tokens are, the probabilities of one side are sorted and compared with those of the other. A
baseline of ``tide``: made for autoregressive models, here without their shift by a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.chunks import chunk_sums, first_tokens, tokens_of
from diffdistill.divergences import masked_mean
from diffdistill.draws import Draws
from diffdistill.hiding import (
    Hidden,
    by_position,
    chunk_counts,
    chunk_share,
    denoising,
    described,
    hide,
    usable_chunks,
)
from diffdistill.method import Method
from diffdistill.projection import Prediction, at, token_logprob
from diffdistill.texts import Text, TextFamily, TextModel
from diffdistill.tiling import in_tiles
from diffdistill.types import Batch, Loss, Progress
from diffdistill.vocabularies import chunk_distribution, sorted_l1

Pairs = Literal["position", "chunk"]


class Reading(NamedTuple):
    """What a model makes of the active chunks.

    Attributes:
        first: Its prediction ``[K, V]`` of the first token of each.
        later: Log-likelihood ``[K]`` of the other tokens of each; 0 where there are none.
    """

    first: Prediction
    later: Tensor


@dataclass(kw_only=True)
class ULD(Method):
    """Denoise, and match the sorted probabilities of a teacher with other tokens.

    Attributes:
        family: The family of text models.
        draws: The random numbers of the run.
        student: The model to train.
        teacher: The frozen model; it reads its own tokens.
        pairs: Which predictions are compared. ``position``: the i-th token of an answer with the
            teacher's i-th, up to the shorter (paper); where the tokenizers disagree, these are
            about different text. ``chunk``: of the smallest runs of tokens that both sides
            spell, the first, times the likelihood of the rest (TRL's ``use_extended_uld``).
        temperature: Divides the logits of both sides; 1 in the paper and in TRL.
        distillation_weight: Weight of the distillation term beside denoising; 1 in TRL, whose
            default leaves the other term out. The paper's lambda is unconfirmed.
        t_low: Smallest noise level. One level for each sequence, uniform from here to 1 (as
            ``tide``).
    """

    roles: ClassVar = {"student": {"weights": "trained"}, "teacher": {"weights": "frozen"}}
    texts: ClassVar = True

    family: TextFamily
    draws: Draws
    student: TextModel
    teacher: TextModel
    pairs: Pairs = "position"
    temperature: float = 1.0
    distillation_weight: float = 1.0
    t_low: float = 1e-3

    def __post_init__(self) -> None:
        """Check the options."""
        for name, fine, bounds in (
            ("temperature", self.temperature > 0, "above 0"),
            ("t_low", 0 < self.t_low < 1, "in (0, 1)"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {bounds}, not {getattr(self, name)}")

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: denoising, and the distance of what is predicted of hidden chunks.

        Denoising is a mean over all maskable tokens, the distance over the active chunks, both of
        the optimizer step.
        """
        text, answer = self._texts(batch)
        hidden = self._hide(batch, text, answer)
        state = self.family.noised(batch, hidden.t, hidden.mask)
        prediction = self.student(state, self.family.condition(batch))
        logprobs = token_logprob(prediction, text.tokens, mask=hidden.mask)  # [B, L]
        denoised = denoising(logprobs, text, hidden.t)
        ours = self._read(prediction, text, hidden.active)
        theirs = self._judge(batch, answer, hidden)
        distances = in_tiles(self._distance, ours.first, theirs.first, ours.later, theirs.later)
        distance = masked_mean(distances, torch.ones_like(distances, dtype=torch.bool))
        distance = distance * chunk_share(chunk_counts(text, hidden), progress.counts)
        count = int(text.maskable.sum())
        metrics = described(text, hidden, denoising=denoised, distillation=distance)
        value = denoised + self.distillation_weight * distance
        yield Loss("student", value, max(count, 1), metrics=metrics)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the active chunks and the maskable tokens of a batch."""
        text, answer = self._texts(batch)
        return chunk_counts(text, self._hide(batch, text, answer))

    def _texts(self, batch: Batch) -> tuple[Text, Text]:
        """Return the text of both sides, with the chunks that are pairs."""
        text, answer = self.family.text(batch), self.family.text(batch, reader="teacher")
        if self.pairs == "position":
            return by_position(text), by_position(answer)
        return text, answer

    def _hide(self, batch: Batch, text: Text, answer: Text) -> Hidden:
        usable = usable_chunks(text, answer)
        return hide(self.draws, batch["ids"], text, usable, t_low=self.t_low)

    @torch.no_grad()
    def _judge(self, batch: Batch, answer: Text, hidden: Hidden) -> Reading:
        """Return what the teacher makes of the active chunks, all of them hidden."""
        mask = tokens_of(hidden.active, answer.chunks)
        state = self.family.noised(batch, hidden.t, mask, reader="teacher")
        prediction = self.teacher(state, self.family.condition(batch, reader="teacher"))
        return self._read(prediction, answer, hidden.active)

    def _read(self, prediction: Prediction, text: Text, active: Tensor) -> Reading:
        """Return what a prediction ``[B, L, V]`` says of each active chunk."""
        count = active.shape[1]
        rows = active.nonzero()[:, 0]
        firsts = rows, first_tokens(text.chunks, count)[active]
        rest = tokens_of(active, text.chunks)
        rest[firsts] = False
        logprobs = token_logprob(prediction, text.tokens, mask=rest, temperature=self.temperature)
        return Reading(at(prediction, firsts), chunk_sums(logprobs, text.chunks, count)[active])

    def _distance(self, ours: Tensor, theirs: Tensor, later: Tensor, others: Tensor) -> Tensor:
        """Return the distance ``[k]`` of some chunks, from logits and log-likelihoods."""
        return sorted_l1(*self._distributions(ours, theirs, later, others))

    def _distributions(
        self, ours: Tensor, theirs: Tensor, later: Tensor, others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the probabilities ``[k, V]`` and ``[k, W]`` of some chunks."""
        return (
            chunk_distribution(ours, later, self.temperature),
            chunk_distribution(theirs, others, self.temperature),
        )

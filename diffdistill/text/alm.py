"""ALM: approximate likelihood matching between two tokenizers (arXiv:2503.20083).

Student and teacher read the same text, each in its own tokens, and are compared on the likelihood
of each chunk that both spell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.chunks import chunk_sums
from diffdistill.divergences import (
    calm,
    chunk_clamped,
    chunk_probability,
    masked_mean,
    reverse_binary_kl,
)
from diffdistill.hiding import chunk_share, usable_chunks
from diffdistill.projection import token_logprob
from diffdistill.text.given import Given
from diffdistill.types import Batch, Loss, Progress

DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": calm,
    "reverse": reverse_binary_kl,
}


@dataclass(kw_only=True)
class ALM(Given):
    """Match a teacher's likelihood of chunks of text, whatever its tokens.

    Attributes:
        teacher: The frozen model; it reads its own tokens.
        divergence: Of the event that a chunk is the right one: ``forward`` is the cross-entropy
            from the teacher's side, as KL(teacher || student) but for a constant (paper);
            ``reverse`` KL(student || teacher).
        temperature: Log-likelihoods of chunks are divided by it; 100 in the paper's code.
        token_weight: Weight of the cross-entropy of the data's tokens: 1 is the paper's ALM + SFT,
            0 its ALM alone.
        chunk_weight: Weight of the divergence.
    """

    roles: ClassVar = {"student": {"weights": "trained"}, "teacher": {"weights": "frozen"}}

    teacher: Any
    divergence: Literal["forward", "reverse"] = "forward"
    temperature: float = 100.0
    token_weight: float = 1.0
    chunk_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: a mean over tokens and one over chunks, both of the optimizer step."""
        lesson = self.read(batch)
        chosen = self._chunks(batch)
        count = chosen.shape[1]
        ours = chunk_sums(lesson.logprobs, lesson.text.chunks, count)[chosen]
        theirs = self._judge(batch, count)[chosen]
        sides = (chunk_probability(side, self.temperature) for side in (ours, theirs))
        error = DIVERGENCES[self.divergence](*sides)
        matched = masked_mean(error, torch.ones_like(error, dtype=torch.bool))
        matched = matched * chunk_share(self.counts(batch), progress.counts)
        value = self.token_weight * lesson.cross_entropy + self.chunk_weight * matched
        metrics = {
            "chunks": matched.detach(),
            "gap": (theirs - ours.detach()).sum() / max(len(ours), 1),
            "clamp_share": chunk_clamped(ours, self.temperature).sum() / max(len(ours), 1),
        }
        yield self.loss(lesson, value, metrics)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the chunks and the learned tokens of a batch."""
        tokens = self.family.text(batch).maskable.sum()
        return {"chunks": float(self._chunks(batch).sum()), "tokens": float(tokens)}

    def _chunks(self, batch: Batch) -> Tensor:
        """Return the chunks that are compared, bool ``[B, N]``."""
        return usable_chunks(self.family.text(batch), self.family.text(batch, reader="teacher"))

    @torch.no_grad()
    def _judge(self, batch: Batch, count: int) -> Tensor:
        """Return the teacher's log-likelihood ``[B, N]`` of each chunk."""
        text = self.family.text(batch, reader="teacher")
        prediction = self.teacher(
            self.family.state(batch, reader="teacher"),
            self.family.condition(batch, reader="teacher"),
        )
        logprobs = token_logprob(prediction, text.tokens, mask=text.maskable)
        return chunk_sums(logprobs, text.chunks, count)

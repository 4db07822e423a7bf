"""BLD: distillation between any two tokenizers by a byte-level interface (arXiv:2604.07466).

Student and teacher read the same text, each in its own tokens. The teacher's predictions of tokens
are made ones of bytes, once for each text; heads on the student's hidden states predict the bytes
of its next token. The heads are dropped after training: the student keeps tokenizer and output
head. The paper's text was not available to us: what it does is as others describe it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffdistill.byte_beam import Path, Search
from diffdistill.byte_heads import HeadForm, byte_heads
from diffdistill.hiding import chunk_share
from diffdistill.projection import cross_entropy, prediction_rows
from diffdistill.spellings import ALPHABET
from diffdistill.supports import TopK, truncated_divergence
from diffdistill.text.given import Given, Lesson
from diffdistill.texts import Bytes
from diffdistill.types import Batch, Loss, Progress


class Slots(NamedTuple):
    """The first bytes of tokens, J of each.

    Attributes:
        tokens: The tokens that have any, bool ``[B, L]``, N of them.
        observed: Their bytes ``[N, J]``.
        valid: Which of these are theirs, bool ``[N, J]``.
        known: Of which of them the teacher says something, bool ``[N, J]``.
        teacher: What it says.
    """

    tokens: Tensor
    observed: Tensor
    valid: Tensor
    known: Tensor
    teacher: TopK


@dataclass(kw_only=True)
class BLD(Given):
    """Learn given texts, and a teacher's predictions of their bytes.

    Attributes:
        teacher: The frozen model, of whatever tokens. It is asked once for each text.
        byte_weight: Weight of the cross-entropy of the data's bytes; 1 in the paper.
        kl_weight: Weight of KL(teacher || student) of each byte; 0.1 in the paper.
        num_bytes: Bytes of a token that are learned, its first; 10 in the paper.
        head: ``parallel`` linear layers (paper), which see no byte of the token they predict; or
            an ``autoregressive`` layer that sees those before (ours).
        head_width: Of ``autoregressive``: its channels.
        reduction: Of the bytes of a token: their ``sum`` (the paper's equation), or the ``mean``
            over all learned bytes (an implementation by others); which the paper's code takes is
            unconfirmed.
        path: What the teacher's predictions of bytes are made of: a ``beam`` of tokenizations, or
            the ``canonical`` one alone (see docs/methods/bld.md on its defects). Which the paper
            takes is unconfirmed, as are the numbers of the beam.
        num_beams: Of ``beam``: tokenizations that are kept after each byte (ours).
        threshold: Of ``beam``: those with a smaller share of the probability are dropped (ours).
        num_kept: Bytes of the teacher's that are kept at each place, its most likely; the others
            are one event (ours).
    """

    roles: ClassVar = {"student": {"weights": "trained"}, "teacher": {"weights": "frozen"}}

    teacher: Any
    byte_weight: float = 1.0
    kl_weight: float = 0.1
    num_bytes: int = 10
    head: HeadForm = "parallel"
    head_width: int = 128
    reduction: Literal["sum", "mean"] = "sum"
    path: Path = "beam"
    num_beams: int = 4
    threshold: float = 1e-3
    num_kept: int = 16

    def __post_init__(self) -> None:
        """Check the options."""
        self._search = Search(path=self.path, num_beams=self.num_beams, threshold=self.threshold)
        if not 1 <= self.num_kept <= ALPHABET:
            raise ValueError(f"num_kept must be from 1 to {ALPHABET}, not {self.num_kept}")
        for name in ("num_bytes", "head_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, used, needed in (
            ("num_beams", self.path == "beam", "path: beam"),
            ("threshold", self.path == "beam", "path: beam"),
            ("head_width", self.head == "autoregressive", "head: autoregressive"),
        ):
            if not used and getattr(self, name) != getattr(BLD, name):
                raise ValueError(f"{name} is for {needed}: leave it {getattr(BLD, name)}")

    def heads(self, widths: Mapping[str, int]) -> Mapping[str, nn.Module]:
        """Return the student's byte heads."""
        return {
            "student": byte_heads(self.head, widths["student"], self.num_bytes, self.head_width)
        }

    # once for each text

    def annotation(self) -> str:
        """Return what the teacher's predictions of bytes depend on."""
        precision = self.teacher.autocast
        search = self._search if self.path == "beam" else self.path
        return f"{self._teacher_weights} {precision} {search} {self.num_kept}"

    def annotate(self, texts: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        """Return the teacher's predictions of the bytes of texts."""
        return self.family.byte_targets(self.teacher, texts, self._search, self.num_kept)

    @cached_property
    def _teacher_weights(self) -> str:
        return self.family.weights(self.teacher)

    # each step

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss, eq. 5 of the paper: a mean over the tokens of the optimizer step."""
        lesson = self.read(batch)
        slots = self.slots(self.family.bytes(batch), lesson.text.maskable)
        learned, matched = self._byte_terms(lesson, slots)
        both = self.byte_weight * learned.sum() + self.kl_weight * matched.sum()
        value = lesson.cross_entropy + self._reduced(both, batch, progress)
        metrics = {
            "byte_cross_entropy": learned.sum() / slots.valid.sum().clamp(min=1),
            "byte_kl": matched.sum() / slots.known.sum().clamp(min=1),
            "bytes": slots.valid.sum() / max(lesson.num_tokens, 1),
            "known_share": slots.known.sum() / slots.valid.sum().clamp(min=1),
        }
        yield self.loss(lesson, value, {name: x.detach() for name, x in metrics.items()})

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the learned bytes and tokens of a batch."""
        maskable = self.family.text(batch).maskable
        slots = self.slots(self.family.bytes(batch), maskable)
        return {"chunks": float(slots.valid.sum()), "tokens": float(maskable.sum())}

    def slots(self, bytes_: Bytes, maskable: Tensor) -> Slots:
        """Return the first bytes of the learned tokens ``[B, L]``."""
        tokens = (bytes_.first >= 0) & maskable
        rows = tokens.nonzero()[:, :1]
        places = torch.arange(self.num_bytes, device=rows.device)
        valid = places < bytes_.size[tokens][:, None]
        where = rows, torch.where(valid, bytes_.first[tokens][:, None] + places, 0)
        teacher = TopK(bytes_.ids[where], bytes_.logprobs[where].float())
        known = valid & bytes_.known[where]
        return Slots(tokens, bytes_.observed[where], valid, known, teacher)

    def _byte_terms(self, lesson: Lesson, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy and the divergence from the teacher of each byte, ``[N, J]``."""
        hidden = prediction_rows(lesson.prediction)[slots.tokens]
        logits = self.student.head(hidden, slots.observed)
        learned = cross_entropy(logits, slots.observed, mask=slots.valid)
        maps = truncated_divergence(
            logits,
            slots.teacher,
            divergence="forward-kl",
            support="teacher",
            k=slots.teacher.ids.shape[-1],
            correction="tail",
            mask=slots.known,
        )
        return learned, maps["divergence"]

    def _reduced(self, total: Tensor, batch: Batch, progress: Progress) -> Tensor:
        """Return what a sum over bytes adds to a mean over the tokens of the optimizer step."""
        mine = self.counts(batch)
        if self.reduction == "sum":
            return total / max(mine["tokens"], 1.0)
        return total / max(mine["chunks"], 1.0) * chunk_share(mine, progress.counts)

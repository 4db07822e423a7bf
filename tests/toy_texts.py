"""Texts of two tokenizers, and networks of a few numbers that read them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.projection import Projection
from diffdistill.texts import Format, Reader, Text
from diffdistill.types import Batch, Condition, Loss, Progress, State
from tests.conftest import START, generator

WORDS: dict[str, int] = {"student": 7, "teacher": 9}
MASKS: dict[str, int] = {"student": 0, "teacher": 1}
SPELLED: dict[str, list[bytes | None]] = {
    "student": [None, b"a", b"b", b"c", b"ab", b"bc", b"d"],
    "teacher": [b"c", None, b"d", b"b", b"ca", b"a", b"cd", b"e", b"f"],
}
"""Four words are in both vocabularies: a, b, c and d."""


@dataclass
class Texts:
    """Reads texts from the batch, in blocks of four tokens."""

    block: int = 4

    def format(self, *, reader: Reader = "student") -> Format:
        return Format(MASKS[reader], block=self.block, length=16)

    def spellings(self, *, reader: Reader = "student") -> Sequence[bytes | None]:
        return SPELLED[reader]

    def text(self, batch: Batch, *, reader: Reader = "student") -> Text:
        tokens, maskable, chunks = (batch[f"{reader}/{name}"] for name in Text._fields)
        return Text(tokens, maskable, chunks)

    def noised(self, batch: Batch, t: Tensor, mask: Tensor, *, reader: Reader = "student") -> State:
        tokens = batch[f"{reader}/tokens"]
        return State(tokens.masked_fill(mask, MASKS[reader]), t, mask)

    def condition(self, batch: Batch, *, reader: Reader = "student", copies: int = 1) -> Condition:
        return {"bias": batch["bias"].repeat(copies, 1)}


class Network(nn.Module):
    """Predicts from each token, the mean of all, and the condition; never the mask token.

    Hidden states have five numbers. Returns a projection, or its logits if ``dense``.
    """

    def __init__(self, words: int, mask: int, seed: int, *, scale: float = 1.0) -> None:
        super().__init__()
        rng = generator(seed)
        self.own, self.context, self.head = (
            nn.Parameter(scale * torch.randn(words, 5, generator=rng)) for _ in range(3)
        )
        self.mask = mask
        self.dense = False

    def forward(self, state: State, condition: Condition) -> Any:
        mean = self.context[state.x].mean(dim=1, keepdim=True)
        hidden = self.own[state.x] + mean + condition["bias"][:, None]
        bias = torch.zeros(len(self.head)).index_fill(0, torch.tensor([self.mask]), -torch.inf)
        return hidden @ self.head.T + bias if self.dense else Projection(hidden, self.head, bias)


def network(reader: str = "student", seed: int = 1, *, scale: float = 1.0) -> Network:
    return Network(WORDS[reader], MASKS[reader], seed, scale=scale)


def toy_text_batch(size: int = 4, *, seed: int = 0, first_id: int = 0) -> dict[str, Any]:
    """Return texts of 12 student tokens and 10 of the teacher, after prompts of two.

    Chunks have 1:1, 2:1, 1:2 and 3:2 tokens; one token of the student has none.
    """
    chunks = {
        "student": [-1, -1, 0, 1, 1, 2, 3, 3, 3, 4, -1, 5],
        "teacher": [-1, -1, 0, 1, 2, 2, 3, 3, 4, 5],
    }
    ids = torch.arange(first_id, first_id + size)
    batch: dict[str, Any] = {"ids": ids, "prompts": [""] * size, "bias": torch.zeros(size, 1)}
    rng = generator(seed)
    for name, numbers in chunks.items():
        length = len(numbers)
        tokens = torch.randint(2, WORDS[name], (size, length), generator=rng)
        batch[f"{name}/tokens"] = tokens
        batch[f"{name}/maskable"] = (torch.arange(length) >= 2).expand(size, -1)
        batch[f"{name}/chunks"] = torch.tensor(numbers).expand(size, -1)
    return batch


def only_loss(method: Method, batch: Batch, progress: Progress = START) -> Loss:
    (loss,) = method.losses(batch, progress)
    return loss


def student_gradients(method: Any, batches: Sequence[Batch]) -> Tensor:
    """Return the gradient of one optimizer step over micro-batches."""
    method.student.zero_grad(set_to_none=True)
    counts: dict[str, float] = defaultdict(float)
    for batch in batches:
        for name, count in method.counts(batch).items():
            counts[name] += count
    total, progress = 0.0, START._replace(counts=counts)
    if method.pools():
        found = [method.survey(batch, progress) for batch in batches]
        pools = {name: torch.cat([values[name] for values in found]) for name in found[0]}
        progress = progress._replace(pools=pools)
    for batch in batches:
        for loss in method.losses(batch, progress):
            (loss.value * loss.count).backward()
            total += loss.count
    parameters = (p.grad for p in method.student.parameters())
    return torch.cat([torch.zeros(0) if g is None else g.flatten() / total for g in parameters])


class Level(Draws):
    """Noise at one level: what ``uniform`` returns for it; tokens are hidden at random."""

    def __init__(self, number: float) -> None:
        super().__init__(0)
        self.number = number

    def uniform(self, purpose: str, ids: Tensor, shape: Sequence[int] = ()) -> Tensor:
        return super().uniform(purpose, ids, shape) if shape else torch.full(ids.shape, self.number)

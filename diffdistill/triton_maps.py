"""The maps that are asked for most, by one Triton kernel a pass instead of a score of torch's.

Imported only where there is a GPU and triton. A program reads its row twice: for the normalizers,
and for the sums or the gradient. The formulas are those of ``tokenwise``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdistill.recompute import Block
from diffdistill.tokenwise import IMPOSSIBLE, Maps, TokenMap, scaled

BLOCK = 4096
"""Entries of the vocabulary that a program reads at a time."""

SUMS: tuple[TokenMap, ...] = ("entropy", "teacher-entropy", "forward-kl", "reverse-kl")
"""The maps that are sums over a row, in the order in which the kernel stores them."""

TRAINED: tuple[TokenMap, ...] = ("entropy", "reverse-kl", "forward-kl", "logprob")
"""The maps that have a gradient, in the order in which the kernel takes it."""


@triton.jit
def _scaled(row, start, words, inverse, least: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    # An entry beyond the vocabulary is impossible.
    places = start + tl.arange(0, block)
    logits = tl.load(row + places, mask=places < words, other=least)
    return tl.maximum(logits * inverse, least)


@triton.jit
def _normalizer(row, words, inverse, least: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    most = tl.full((), 2.0 * least, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, words, block):
        logits = _scaled(row, start, words, inverse, least, block)
        higher = tl.maximum(most, tl.max(logits, axis=0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        most = higher
    return most + tl.log(total)


@triton.jit
def values_kernel(  # type: ignore[no-untyped-def]
    student, teacher, found, words, inverse,
    with_teacher: tl.constexpr, least: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Store both normalizers, both entropies, the forward and the reverse KL of a row."""
    number = tl.program_id(0).to(tl.int64)
    student += number * words
    own_normalizer = _normalizer(student, words, inverse, least, block)
    other_normalizer = own_normalizer
    if with_teacher:
        teacher += number * words
        other_normalizer = _normalizer(teacher, words, inverse, least, block)
    entropy = tl.full((), 0.0, tl.float32)
    other_entropy = tl.full((), 0.0, tl.float32)
    forward = tl.full((), 0.0, tl.float32)
    reverse = tl.full((), 0.0, tl.float32)
    for start in range(0, words, block):
        own = _scaled(student, start, words, inverse, least, block) - own_normalizer
        p = tl.exp(own)
        entropy -= tl.sum(p * own, axis=0)
        if with_teacher:
            other = _scaled(teacher, start, words, inverse, least, block) - other_normalizer
            q = tl.exp(other)
            gap = other - own
            other_entropy -= tl.sum(q * other, axis=0)
            forward += tl.sum(q * gap, axis=0)
            reverse -= tl.sum(p * gap, axis=0)
    found += number * 6
    tl.store(found, own_normalizer)
    tl.store(found + 1, other_normalizer)
    tl.store(found + 2, entropy)
    tl.store(found + 3, other_entropy)
    tl.store(found + 4, forward)
    tl.store(found + 5, reverse)


@triton.jit
def slope_kernel(  # type: ignore[no-untyped-def]
    student, teacher, tokens, upstream, sums, slope, words, inverse,
    with_teacher: tl.constexpr, least: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Store the gradient in a row of the student's logits.

    ``upstream`` has four numbers a row, in the order of ``TRAINED``; ``sums`` has the row's entropy
    and reverse KL.
    """
    number = tl.program_id(0).to(tl.int64)
    student += number * words
    slope += number * words
    token = tl.load(tokens + number)
    of_entropy = tl.load(upstream + number * 4)
    of_reverse = tl.load(upstream + number * 4 + 1)
    of_forward = tl.load(upstream + number * 4 + 2)
    of_token = tl.load(upstream + number * 4 + 3)
    entropy = tl.load(sums + number * 2)
    reverse = tl.load(sums + number * 2 + 1)
    own_normalizer = _normalizer(student, words, inverse, least, block)
    other_normalizer = own_normalizer
    if with_teacher:
        teacher += number * words
        other_normalizer = _normalizer(teacher, words, inverse, least, block)
    for start in range(0, words, block):
        places = start + tl.arange(0, block)
        own = _scaled(student, start, words, inverse, least, block) - own_normalizer
        found = -of_entropy * (own + entropy) - of_token
        if with_teacher:
            other = _scaled(teacher, start, words, inverse, least, block) - other_normalizer
            found += of_forward - of_reverse * (other - own + reverse)
            found = tl.exp(own) * found - of_forward * tl.exp(other)
        else:
            found = tl.exp(own) * found
        found = (found + tl.where(places == token, of_token, 0.0)) * inverse
        tl.store(slope + places, found, mask=places < words)


@dataclass(frozen=True)
class TritonMaps(Maps):
    """``tokenwise.Maps`` by these kernels, where ``can_make`` says so."""

    whole_tiles: ClassVar[bool] = True

    def values(self, block: Block) -> tuple[Tensor, ...]:
        """Return each map ``[n]``."""
        logits, teacher = _sides(block)
        sums = logits.new_empty(len(logits), 6)
        if len(logits):
            values_kernel[(len(logits),)](
                logits, logits if teacher is None else teacher, sums, logits.shape[-1],
                1.0 / self.temperature, teacher is not None, IMPOSSIBLE, BLOCK,
            )  # fmt: skip
        own, other, *rest = sums.unbind(-1)
        found: dict[str, Tensor] = dict(zip(SUMS, rest, strict=True))
        if (tokens := block.columns.get("tokens")) is not None:
            found["logprob"] = self._taken(logits, own, tokens)
            if teacher is not None:
                found["teacher-logprob"] = self._taken(teacher, other, tokens)
                found["raw-teacher-logprob"] = found["teacher-logprob"]
        return tuple(found[name] for name in self.wanted)

    def slope(
        self, block: Block, values: Sequence[Tensor], upstream: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the gradient in the student's logits ``[n, V]``."""
        logits, teacher = _sides(block)
        count, words = logits.shape
        zero = logits.new_zeros(count)
        known = dict(zip(self.wanted, values, strict=True))
        given = {
            name: zero if x is None else x for name, x in zip(self.wanted, upstream, strict=True)
        }
        tokens = block.columns.get("tokens", torch.full_like(zero, -1, dtype=torch.int64))
        slopes = [given.get(name, zero) for name in TRAINED]
        slopes[-1] = slopes[-1] * (tokens < words)
        slope = torch.empty_like(logits)
        slope_kernel[(count,)](
            logits, logits if teacher is None else teacher, tokens.contiguous(),
            torch.stack(slopes, dim=-1).float(),
            torch.stack([known.get(name, zero) for name in TRAINED[:2]], dim=-1),
            slope, words, 1.0 / self.temperature, teacher is not None, IMPOSSIBLE, BLOCK,
        )  # fmt: skip
        return slope

    def _taken(self, logits: Tensor, normalizer: Tensor, tokens: Tensor) -> Tensor:
        """Return the log-probability ``[n]`` of each row's token."""
        chosen = logits.gather(-1, tokens.clamp(max=logits.shape[-1] - 1)[:, None])
        found = scaled(chosen, self.temperature)[:, 0] - normalizer
        possible = (tokens < logits.shape[-1]) & (found > IMPOSSIBLE)
        return torch.where(possible, found, -torch.inf)


def can_make(maps: Maps, columns: Mapping[str, Tensor]) -> bool:
    """Return whether the kernels make these maps."""
    plain = not {"strength", "share"} & columns.keys() and maps.entry_clip is None
    return plain and "jsd" not in maps.wanted


def _sides(block: Block) -> tuple[Tensor, Tensor | None]:
    """Return the logits of the student and of the teacher, if it is there, as kernels take them."""
    others = [x.float().contiguous() for x in block.others]
    return block.logits.contiguous(), others[0] if others else None

"""Maps of two token distributions from blocks of their logits, and the maps' gradients.

Every map's derivative in the student's log-probabilities is some ``a`` ``[n, V]``; that in its
logits is then ``(a - p sum(a)) / temperature``. Where ``a`` is ``p b``, that is
``p (b - sum(p b)) / temperature``, and numbers of the row in ``b`` make no difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.recompute import Block

TokenMap = Literal[
    "logprob",
    "teacher-logprob",
    "raw-teacher-logprob",
    "entropy",
    "teacher-entropy",
    "forward-kl",
    "reverse-kl",
    "jsd",
]
"""What ``token_maps`` can return. ``forward-kl`` is KL(teacher || student)."""

IMPOSSIBLE = -1e30
"""Stands for the log-probability of a suppressed token in sums: 0 times it is 0, not NaN."""

ALONE = ("logprob", "entropy")
"""The maps that need no teacher."""


@dataclass(frozen=True)
class Maps:
    """The maps of a student against a teacher, as a ``recompute.RowFunction``.

    Of a block, ``others`` are the logits of the teacher and of the reference, where there are any;
    ``columns`` may hold ``tokens``, ``strength`` and ``share``.

    Attributes:
        wanted: Which maps.
        temperature: See ``projection.token_maps``.
        beta: See there.
        entry_clip: See there.
    """

    whole_tiles: ClassVar[bool] = False

    wanted: tuple[TokenMap, ...]
    temperature: float = 1.0
    beta: float = 0.5
    entry_clip: float | None = None

    @property
    def trained(self) -> tuple[bool, ...]:
        """Return which maps have a gradient."""
        return tuple("teacher-" not in name for name in self.wanted)

    def needs_others(self, given: Sequence[bool]) -> bool:
        """Return whether one of the maps that ``given`` chooses is about the teacher."""
        pairs = zip(self.wanted, given, strict=True)
        return any(chosen and name not in ALONE for name, chosen in pairs)

    def values(self, block: Block) -> tuple[Tensor, ...]:
        """Return each map ``[n]``."""
        pair = _Pair(block, self.temperature)
        makers: Mapping[TokenMap, Callable[[], Tensor]] = {
            "logprob": lambda: pair.taken(pair.own),
            "teacher-logprob": lambda: pair.taken(pair.other),
            "raw-teacher-logprob": lambda: pair.taken(pair.raw),
            "entropy": lambda: -(pair.p * pair.own).sum(-1),
            "teacher-entropy": lambda: -(pair.q * pair.other).sum(-1),
            "forward-kl": lambda: self._clipped(pair.q * pair.gap).sum(-1),
            "reverse-kl": lambda: -(pair.p * pair.gap).sum(-1),
            "jsd": lambda: self._clipped(pair.jsd_entries(self.beta)).sum(-1),
        }
        return tuple(makers[name]() for name in self.wanted)

    def slope(
        self, block: Block, values: Sequence[Tensor], upstream: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the gradient in the student's logits ``[n, V]``."""
        pair = _Pair(block, self.temperature)
        rows = {
            name: given.to(block.logits.dtype)[:, None]
            for name, given in zip(self.wanted, upstream, strict=True)
            if given is not None
        }
        total = torch.zeros_like(block.logits)
        if "entropy" in rows:
            total.addcmul_(pair.scaled, rows["entropy"], value=-1.0)
        if "reverse-kl" in rows:
            total.addcmul_(pair.target - pair.scaled, rows["reverse-kl"], value=-1.0)
        if "jsd" in rows and self.beta not in (0.0, 1.0):
            gap = pair.own - pair.mixture(self.beta)
            kept = self._unclipped(gap, lambda: pair.jsd_entries(self.beta))
            total.addcmul_(kept, rows["jsd"], value=1.0 - self.beta)
        total.sub_((pair.p * total).sum(-1, keepdim=True)).mul_(pair.p)
        if "forward-kl" in rows:
            kept = self._unclipped(pair.q, lambda: pair.q * pair.gap)
            total.addcmul_(pair.p, rows["forward-kl"] * kept.sum(-1, keepdim=True))
            total.addcmul_(kept, rows["forward-kl"], value=-1.0)
        if "logprob" in rows:
            pair.add_logprob_slope(total, rows["logprob"])
        return total if self.temperature == 1.0 else total.div_(self.temperature)

    def _clipped(self, entries: Tensor) -> Tensor:
        return entries if self.entry_clip is None else entries.clamp(max=self.entry_clip)

    def _unclipped(self, slope: Tensor, entries: Callable[[], Tensor]) -> Tensor:
        """Return a slope without the tokens whose entry is clipped."""
        if self.entry_clip is None:
            return slope
        return slope * (entries() <= self.entry_clip)


class _Pair:
    """The distributions of both sides, each made when it is first asked for."""

    def __init__(self, block: Block, temperature: float) -> None:
        self.block, self.temperature = block, temperature

    @cached_property
    def scaled(self) -> Tensor:
        """Return the student's logits by the temperature, ``IMPOSSIBLE`` at least."""
        return scaled(self.block.logits, self.temperature)

    @cached_property
    def target(self) -> Tensor:
        """Return those of the target."""
        logits, columns = self.block.logits, self.block.columns
        target = self.block.others[0].to(logits.dtype)
        if (strength := columns.get("strength")) is not None:
            reference = self.block.others[1].to(logits.dtype)
            target = extrapolated(target, reference, strength.to(logits.dtype)[:, None])
        if (share := columns.get("share")) is not None:
            part = share.to(logits.dtype)[:, None]
            # Finite, because 0 times the logit of a suppressed token would be NaN.
            ours, theirs = logits.clamp_min(IMPOSSIBLE), target.clamp_min(IMPOSSIBLE)
            target = (1.0 - part) * ours + part * theirs
        return scaled(target, self.temperature)

    @cached_property
    def own(self) -> Tensor:
        """Return the log-probabilities of the student."""
        return self.scaled.log_softmax(-1)

    @cached_property
    def other(self) -> Tensor:
        """Return the log-probabilities of the target."""
        return self.target.log_softmax(-1)

    @property
    def raw(self) -> Tensor:
        """Return the log-probabilities of the teacher itself."""
        theirs = self.block.others[0].to(self.block.logits.dtype)
        return scaled(theirs, self.temperature).log_softmax(-1)

    @cached_property
    def p(self) -> Tensor:
        """Return the probabilities of the student."""
        return self.scaled.softmax(-1)  # on a CPU faster than exp

    @cached_property
    def q(self) -> Tensor:
        """Return the probabilities of the target."""
        return self.target.softmax(-1)

    @cached_property
    def gap(self) -> Tensor:
        """Return how much likelier each token is to the target, as a logarithm."""
        return self.other - self.own

    def mixture(self, beta: float) -> Tensor:
        """Return the log-probabilities of ``beta q + (1 - beta) p``."""
        return torch.lerp(self.p, self.q, beta).log_().clamp_min_(IMPOSSIBLE)

    def jsd_entries(self, beta: float) -> Tensor:
        """Return what each token adds to the generalized JSD."""
        if beta in (0.0, 1.0):
            return torch.zeros_like(self.p)
        middle = self.mixture(beta)
        theirs, ours = self.q * (self.other - middle), self.p * (self.own - middle)
        return torch.lerp(ours, theirs, beta)

    def taken(self, logprobs: Tensor) -> Tensor:
        """Return the log-probability of each row's token, which may be beyond the vocabulary."""
        tokens = self.block.columns["tokens"]
        found = logprobs.gather(-1, tokens.clamp(max=logprobs.shape[-1] - 1)[:, None])[:, 0]
        possible = (tokens < logprobs.shape[-1]) & (found > IMPOSSIBLE)
        return torch.where(possible, found, -torch.inf)

    def add_logprob_slope(self, total: Tensor, row: Tensor) -> None:
        """Add what a gradient ``[n, 1]`` in ``taken`` is in the logits by the temperature."""
        tokens, words = self.block.columns["tokens"][:, None], total.shape[-1]
        row = row * (tokens < words)
        total.addcmul_(self.p, row, value=-1.0)
        total.scatter_add_(1, tokens.clamp(max=words - 1), row)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits ``[n, V]`` by the temperature, ``IMPOSSIBLE`` at least."""
    return (logits if temperature == 1.0 else logits / temperature).clamp_min(IMPOSSIBLE)


def extrapolated(teacher: Tensor, reference: Tensor, strength: Tensor) -> Tensor:
    """Return the logits ``strength teacher + (1 - strength) reference``, ``[n, V]``.

    What is impossible to a side that counts at all is impossible; at strength 1 they are exactly
    the teacher's.
    """
    theirs = torch.where(teacher.isneginf(), teacher, strength * teacher)
    others = torch.where(reference.isneginf(), reference, (1.0 - strength) * reference)
    zero = torch.zeros_like(strength)
    return torch.where(strength == 0.0, zero, theirs) + torch.where(strength == 1.0, zero, others)

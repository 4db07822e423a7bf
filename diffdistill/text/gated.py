"""What methods share that weigh tokens by what a privileged teacher makes of them (SDAR)."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor

from diffdistill.gates import centered, entropy_gate, gap_gate, soft_or_gate, unit
from diffdistill.projection import vocabulary
from diffdistill.text.answering import Attempt
from diffdistill.text.selecting import Selecting
from diffdistill.types import Batch, Progress


@dataclass(kw_only=True)
class Gated(Selecting):
    """Weighs each token by a gate in (0, 1), a constant (SDAR, arXiv:2605.15155).

    Attributes:
        gate: ``gap`` is sigmoid(beta (log teacher - log student)) of the sampled token (code);
            ``entropy`` that of the student's entropy, ``soft-or`` of either (the paper, known
            second-hand).
        gate_beta: Slope of the gate; 5 in the code. At 0 all gates are one half.
        gate_scale: ``plain`` (code); ``unit`` doubles the gate, so that at beta 0 it is 1 (ours);
            ``centered`` subtracts from each the mean of all others (ours).
        gate_scope: Whose mean ``centered`` subtracts: of the ``micro-batch``; or, ``global``, of
            the optimizer step, which asks student and teacher twice where a step has several
            micro-batches.
    """

    gate: Literal["gap", "entropy", "soft-or"] = "gap"
    gate_beta: float = 5.0
    gate_scale: Literal["plain", "unit", "centered"] = "plain"
    gate_scope: Literal["micro-batch", "global"] = "micro-batch"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.pools_gates and self.pools_scores:
            raise ValueError(
                "gate_scope global is over the tokens that are learned, and select_scope global "
                "chooses them by the same survey: set one of them to micro-batch"
            )

    @property
    def pools_gates(self) -> bool:
        """Whether gates are measured by those of the whole optimizer step."""
        return self.gate_scale == "centered" and self.gate_scope == "global"

    def pools(self) -> bool:
        """Return whether something is compared with the whole optimizer step."""
        return self.pools_gates or super().pools()

    @torch.no_grad()
    def survey(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the gate of each token of a batch, if they are pooled."""
        values = super().survey(batch, progress)
        if self.pools_gates:
            gate, chosen = self.opened(self.read(*self.surveyed(batch)), progress)
            values["gate"] = gate[chosen]
        return values

    @abstractmethod
    def opened(self, attempt: Attempt, progress: Progress) -> tuple[Tensor, Tensor]:
        """Return the gate of each token before it is scaled, and which count, bool; ``[B, A]``."""

    def gates(
        self, attempt: Attempt, ours: Tensor, theirs: Tensor, maps: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the gate of each token before it is scaled, ``[B, A]``, a constant.

        Args:
            attempt: The answers.
            ours: The student's log-probability of each token.
            theirs: The teacher's.
            maps: The student's ``entropy``, if the gate needs it.
        """
        if self.gate == "gap":
            return gap_gate(theirs, ours, self.gate_beta)
        surprise = maps["entropy"] / log(vocabulary(attempt.prediction))
        if self.gate == "entropy":
            return entropy_gate(surprise, self.gate_beta)
        return soft_or_gate(surprise, theirs - ours.detach(), self.gate_beta)

    def scaled(self, gate: Tensor, mask: Tensor, progress: Progress) -> Tensor:
        """Return the weight of each token, ``[B, A]``.

        Args:
            gate: Of ``gates``.
            mask: The tokens that count, bool.
            progress: How far training has come.
        """
        if self.gate_scale == "unit":
            return unit(gate)
        if self.gate_scale == "centered":
            return centered(gate, mask, progress.pools.get("gate"))
        return gate

"""What methods share that weigh tokens by what a privileged teacher makes of them (SDAR)."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Literal

from torch import Tensor

from diffdistill.gates import centered, entropy_gate, gap_gate, soft_or_gate, unit
from diffdistill.projection import vocabulary
from diffdistill.text.answering import Answering, Attempt


@dataclass(kw_only=True)
class Gated(Answering):
    """Weighs each token by a gate in (0, 1), a constant (SDAR, arXiv:2605.15155).

    Attributes:
        gate: ``gap`` is sigmoid(beta (log teacher - log student)) of the sampled token (code);
            ``entropy`` that of the student's entropy, ``soft-or`` of either (the paper, known
            second-hand).
        gate_beta: Slope of the gate; 5 in the code. At 0 all gates are one half.
        gate_scale: ``plain`` (code); ``unit`` doubles the gate, so that at beta 0 it is 1 (ours);
            ``centered`` subtracts from each the mean of all others (ours).
    """

    gate: Literal["gap", "entropy", "soft-or"] = "gap"
    gate_beta: float = 5.0
    gate_scale: Literal["plain", "unit", "centered"] = "plain"

    def gates(
        self,
        attempt: Attempt,
        ours: Tensor,
        theirs: Tensor,
        maps: Mapping[str, Tensor],
        mask: Tensor,
    ) -> Tensor:
        """Return the weight of each token, ``[B, A]``, a constant.

        Args:
            attempt: The answers.
            ours: The student's log-probability of each token.
            theirs: The teacher's.
            maps: The student's ``entropy``, if the gate needs it.
            mask: The tokens that count, bool.
        """
        if self.gate == "gap":
            gate = gap_gate(theirs, ours, self.gate_beta)
        else:
            surprise = maps["entropy"] / log(vocabulary(attempt.prediction))
            if self.gate == "entropy":
                gate = entropy_gate(surprise, self.gate_beta)
            else:
                gate = soft_or_gate(surprise, theirs - ours.detach(), self.gate_beta)
        if self.gate_scale == "unit":
            return unit(gate)
        return centered(gate, mask) if self.gate_scale == "centered" else gate

"""What methods share whose target lies beyond the teacher, away from a reference (G-OPD)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.divergences import masked_mean
from diffdistill.extrapolation import (
    beta_opsd_strength,
    constant_floor,
    contract_positions,
    guarded_strength,
    teacher_relative_floor,
)
from diffdistill.projection import Prediction
from diffdistill.supports import logprobs_at, top_logprobs
from diffdistill.text.answering import Attempt
from diffdistill.text.comparing import Comparing
from diffdistill.types import Progress


@dataclass(kw_only=True)
class Extrapolating(Comparing):
    """Compares with ``softmax(strength log teacher + (1 - strength) log reference)``.

    That is the optimum of G-OPD (arXiv:2602.12125) at each token; its code takes the sampled token
    alone (``divergence: sampled``). A strength below 1 interpolates (beta-OPSD, arXiv:2607.28582,
    with 1/beta). Where teacher and reference both all but know the token, as in the braces of
    JSON, a strength above 1 drives everything else out; ``guard`` bounds it there.

    Attributes:
        reference: What the target leads away from; it sees no privileged context.
        strength: 1 is the teacher; 1.25 in ExOPD.
        strength_start: Strength of the first step, from which it changes linearly (0.5 in
            beta-OPSD, which ends at 0.8); null has no such course.
        strength_steps: Steps of that course; 200 in beta-OPSD.
        guard: ``none`` (paper); ``relative`` keeps the chance of any other token than the teacher's
            first above the teacher's own divided by ``guard_size``; ``constant`` above
            ``guard_size`` itself. Both are ours: the paper's own bound is not known to us.
        guard_size: Of the guard: a divisor above 1, or a probability.
        guard_margin: How much below the bound to stay, as a share of it.
        contract_probability: A token falls under the guard where the teacher gives its first this
            probability, and the reference has the same first.
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "teacher": {"weights": "frozen"},
        "reference": {"weights": "frozen"},
    }

    reference: Any
    strength: float = 1.25
    strength_start: float | None = None
    strength_steps: int = 200
    guard: Literal["none", "relative", "constant"] = "none"
    guard_size: float = 2.0
    guard_margin: float = 0.03
    contract_probability: float = 0.9

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.support != "full":
            raise ValueError("a target beyond the teacher needs support: full")
        if self.divergence == "dbild":
            raise ValueError("divergence dbild compares with the teacher alone: take another")
        for name, fine, bounds in (
            ("strength", self.strength >= 0, "at least 0"),
            ("strength_start", (self.strength_start or 0.0) >= 0, "at least 0"),
            ("strength_steps", self.strength_steps >= 1, "at least 1"),
            ("guard_size", self.guard != "relative" or self.guard_size >= 1, "at least 1"),
            ("guard_size", self.guard != "constant" or 0 < self.guard_size < 1, "in (0, 1)"),
            ("guard_margin", 0 <= self.guard_margin < 1, "in [0, 1)"),
            ("contract_probability", 0 < self.contract_probability <= 1, "in (0, 1]"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {bounds}, not {getattr(self, name)}")

    @torch.no_grad()
    def target(
        self, attempt: Attempt, theirs: Prediction, chosen: Tensor, progress: Progress
    ) -> dict[str, Any]:
        """Return ``reference`` and ``strength`` of ``compared``; nothing where it is the teacher.

        Args:
            attempt: The student's answers.
            theirs: The teacher's prediction of them.
            chosen: The tokens that are compared, bool ``[B, A]``.
            progress: How far training has come.
        """
        wanted = self._wanted(progress)
        if wanted == 1:
            return {}
        reference = self.reference(attempt.state, self.family.condition(attempt.batch))
        return {
            "reference": reference,
            "strength": self._strengths(theirs, reference, chosen, wanted),
        }

    def _wanted(self, progress: Progress) -> float:
        """Return the strength of a step, before any guard."""
        if self.strength_start is None:
            return self.strength
        return beta_opsd_strength(
            progress, start=self.strength_start, end=self.strength, steps=self.strength_steps
        )

    def _strengths(
        self, theirs: Prediction, reference: Prediction, chosen: Tensor, wanted: float
    ) -> Tensor:
        """Return the strength at each token, ``[B, A]``."""
        asked = torch.full(chosen.shape, wanted, device=chosen.device)
        if self.guard == "none":
            return asked
        options: dict[str, Any] = {"mask": chosen, "temperature": self.temperature}
        first, other = (top_logprobs(found, 1, **options) for found in (theirs, reference))
        known = logprobs_at(reference, first.ids, **options)[..., 0]
        sure, same = first.logprobs[..., 0], (first.ids == other.ids)[..., 0]
        floor = teacher_relative_floor if self.guard == "relative" else constant_floor
        return guarded_strength(
            asked,
            sure,
            known,
            contract_positions(sure, same, p_min=self.contract_probability),
            tail_floor=floor(self.guard_size),
            margin=self.guard_margin,
        )

    def told_strength(
        self, target: Mapping[str, Tensor], chosen: Tensor
    ) -> dict[str, Tensor | float]:
        """Return what to log of a target."""
        if not target:
            return {"strength": 1.0}
        return {"strength": masked_mean(target["strength"], chosen)}

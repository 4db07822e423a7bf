"""EGX: exposure, gate and extrapolation at once (ours; no paper has it).

The student answers. The teacher reads the answers, shown as much of the reference solution as the
controller says (ATESD: acts on what the teacher sees). The target lies beyond the teacher, away
from a reference (ExOPD: acts on the target alone), and each token is weighed by how much likelier
the teacher itself finds it (SDAR: acts on a weight alone). A reward of whole answers can be added.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.divergences import masked_mean
from diffdistill.errors import UserError
from diffdistill.projection import Prediction, TokenMap, token_logprob
from diffdistill.supports import TopK
from diffdistill.text.answering import Attempt, mean_loss
from diffdistill.text.comparing import Divergence
from diffdistill.text.exposed import Exposed
from diffdistill.text.extrapolating import Extrapolating
from diffdistill.text.gated import Gated
from diffdistill.text.rewarded import Rewarded
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class EGX(Exposed, Extrapolating, Gated, Rewarded):
    """The joint objective; each axis at its neutral setting leaves the others' method alone.

    Neutral are ``exposure_policy: fixed`` with exposure 1, ``strength`` 1, and ``gate_beta`` 0 with
    ``gate_scale: unit``: all three are OPSD.

    Attributes:
        reward: Verifies answers; none is needed with neither ``reward_weight`` nor ``branch``.
        weight: Of the distilled term.
        reward_weight: Of the rewarded term; at 0 nothing is verified.
        gate_on: Whether the gate compares the student with the ``teacher``, so that the strength
            does not change it, or with the ``target``.
        gap_form: Take log(target / student) of the sampled token itself as the distilled map, as
            SDAR does, in place of a divergence. Only with a gate does it teach anything.
        branch: Questions none of whose answers parses are left to the reward alone.
    """

    roles: ClassVar = Extrapolating.roles
    reward_optional: ClassVar = True

    reward: Any
    num_answers: int = 1
    divergence: Divergence = "forward-kl"
    gate_scale: Literal["plain", "unit", "centered"] = "unit"
    guard: Literal["none", "relative", "constant"] = "relative"
    weight: float = 1.0
    reward_weight: float = 0.0
    gate_on: Literal["teacher", "target"] = "teacher"
    gap_form: bool = False
    branch: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.gap_form and (self.gate_beta == 0 or self.token_clip is not None):
            raise ValueError(
                "gap_form teaches nothing without a gate, and is no divergence to clip: set "
                "gate_beta above 0, and token_clip to null"
            )
        if self.reward is None and (self.reward_weight or self.branch):
            raise ValueError("reward_weight and branch need rewards, such as rewards: boxed")

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: the distilled term, and the rewarded one."""
        exposure = self.shown(progress)
        attempt = self.attempt(batch, progress)
        theirs, chosen = self._judged(attempt, progress)
        maps, told = self._distilled(attempt, theirs, chosen, progress)
        told |= self.watched(batch, attempt, theirs, exposure)
        told |= self.told_exposure(exposure)
        loss = mean_loss(attempt, self.weight * maps.pop("divergence"), chosen, maps, **told)
        yield self._with_reward(attempt, loss, progress) if self.reward_weight else loss

    def opened(self, attempt: Attempt, progress: Progress) -> tuple[Tensor, Tensor]:
        """Return the gate of each token before it is scaled, and which count, bool; ``[B, A]``."""
        theirs, chosen = self._judged(attempt, progress)
        target = self.target(attempt, theirs, chosen, progress)
        maps = self.token_maps(attempt, theirs, chosen, ["logprob", self._judge], **target)
        return self.gates(attempt, maps["logprob"], maps[self._judge], maps), chosen

    def _judged(self, attempt: Attempt, progress: Progress) -> tuple[Prediction, Tensor]:
        """Return the teacher's prediction, and which tokens learn from it, bool ``[B, A]``."""
        theirs = self.judge(attempt, progress)
        if isinstance(theirs, TopK):
            raise UserError("method egx needs a teacher of its own, not a server")
        return theirs, self.chosen(attempt, theirs, progress) & self._taught(attempt)[:, None]

    @property
    def _judge(self) -> TokenMap:
        """The map that the gate compares the student's log-probabilities with."""
        return "raw-teacher-logprob" if self.gate_on == "teacher" else "teacher-logprob"

    @property
    def _open(self) -> bool:
        """Whether all gates are the same, whatever the tokens."""
        return self.gate_beta == 0 and self.gate_scale != "centered"

    @property
    def compares(self) -> bool:
        """Whether answers to a question are compared by their rewards."""
        return self.reward_weight > 0

    def _taught(self, attempt: Attempt) -> Tensor:
        """Return which answers learn from the teacher, bool ``[B]``."""
        if not self.branch:
            return torch.ones_like(attempt.answers.ended)
        examples = self.family.examples(attempt.batch)
        parsed = self.reward.parsed(self.family.spelled(attempt.answers), examples)
        groups = parsed.view(-1, self.num_answers).any(dim=1)
        return groups.repeat_interleave(self.num_answers).to(attempt.answers.ended.device)

    def _distilled(
        self, attempt: Attempt, theirs: Prediction, chosen: Tensor, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """Return the gated map ``divergence`` with others, and what to log besides."""
        target = self.target(attempt, theirs, chosen, progress)
        wanted: list[TokenMap] = ["logprob", "raw-teacher-logprob", "teacher-logprob"]
        if self.gap_form:
            maps = self.token_maps(attempt, theirs, chosen, wanted, **target)
            maps["divergence"] = maps["teacher-logprob"] - maps["logprob"]
        else:
            maps = self.compared(attempt, theirs, chosen, wanted, uniform=self._open, **target)
        ours = maps["logprob"].detach()
        gate = self.gates(attempt, ours, maps[self._judge], maps)
        gate = self.scaled(gate, chosen, progress)
        maps["divergence"] = gate * maps["divergence"]
        told: dict[str, Tensor | float] = {"gate": masked_mean(gate, chosen)}
        return maps, told | self.told_strength(target, chosen)

    def _with_reward(self, attempt: Attempt, loss: Loss, progress: Progress) -> Loss:
        """Return the loss with the rewarded term, weighed by all tokens of the answers.

        With a selection or a branch the distilled term of a micro-batch is a mean over fewer.
        """
        rewards = self.rewards(attempt)
        mask, tokens = self.rewarded_tokens(attempt), attempt.answers.tokens
        logprob = token_logprob(attempt.prediction, tokens, mask=mask, temperature=self.temperature)
        value, _ = self.policy(attempt, self.advantages(rewards, progress), logprob)
        told = dict(loss.metrics) | self.told(attempt, rewards)
        count = max(int(attempt.answers.mask.sum()), 1)
        value = loss.value + self.reward_weight * value
        return replace(loss, value=value, count=count, metrics=told)

"""What methods share whose teacher is shown a share of the reference solution that changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.beta_policy import Start
from diffdistill.divergences import masked_mean
from diffdistill.exposure_control import ExposureController, random_exposure
from diffdistill.exposures import check_answer
from diffdistill.projection import Prediction, token_logprob
from diffdistill.rollouts import Answers, Solutions
from diffdistill.supports import top_logprobs
from diffdistill.text.answering import Attempt, check_exposure
from diffdistill.text.comparing import Comparing
from diffdistill.types import Batch, Example, Progress

WATCHED = ("mismatch", "probe", "grounding", "confidence")
"""What the controller learns of a step, besides the loss."""


@dataclass(kw_only=True)
class Exposed(Comparing):
    """Chooses how much of the solution the teacher is shown (ATESD, arXiv:2605.11458).

    The paper is known to us second-hand, and without its numbers: all values here are ours.

    Attributes:
        exposure: Share of the solution's segments to show, with ``exposure_policy: fixed``.
        exposure_policy: ``fixed``; ``random``, uniform for each hold window (the paper's ablation);
            or ``learned`` by the controller.
        hold: Steps for which an exposure is kept.
        lookahead: Steps after which a decision is rewarded.
        reward_discount: Of each further step of that reward.
        num_decisions: Rewarded decisions per update of the controller.
        controller_lr: Learning rate of the controller.
        teacher_share: Of the teacher's log-probability of the reference answer in the reward.
        lowest_exposure: Of the random and the learned policy.
        highest_exposure: Likewise.
        start_exposure: Whether the learned policy begins ``neutral``, or with nearly the ``full``
            solution.
        probe: What says whether the student got better: how unlikely it finds the reference
            answers of the batch (``reference``), or by how much less likely than the teacher does
            when it is shown nothing (``reference-gap``), which does not change with how hard the
            batch is. Neither depends on the exposure.
    """

    exposure: float = 1.0
    exposure_policy: Literal["fixed", "random", "learned"] = "learned"
    hold: int = 5
    lookahead: int = 10
    reward_discount: float = 0.9
    num_decisions: int = 8
    controller_lr: float = 1e-3
    teacher_share: float = 0.1
    lowest_exposure: float = 0.05
    highest_exposure: float = 0.999
    start_exposure: Start = "neutral"
    probe: Literal["reference", "reference-gap"] = "reference-gap"

    def __post_init__(self) -> None:
        """Check the options, and start the controller if the exposure is learned."""
        super().__post_init__()
        check_exposure(self.exposure)
        self._step = 0
        self._controller = self._new_controller() if self.exposure_policy == "learned" else None
        if self.hold < 1:
            raise ValueError(f"hold must be at least 1, not {self.hold}")
        if not 0 <= self.lowest_exposure <= self.highest_exposure <= 1:
            raise ValueError(
                "lowest_exposure and highest_exposure must be in [0, 1] and in this order, not "
                f"{self.lowest_exposure} and {self.highest_exposure}"
            )

    def _new_controller(self) -> ExposureController:
        """Return a controller that has seen nothing, which checks its options."""
        return ExposureController(
            draws=self.draws,
            hold=self.hold,
            lookahead=self.lookahead,
            reward_discount=self.reward_discount,
            num_decisions=self.num_decisions,
            controller_lr=self.controller_lr,
            teacher_share=self.teacher_share,
            lowest_exposure=self.lowest_exposure,
            highest_exposure=self.highest_exposure,
            start_exposure=self.start_exposure,
        )

    def solutions(self) -> Solutions:
        """Return that the teacher is shown solutions."""
        return "shown"

    @property
    def least_exposure(self) -> float:
        """The smallest share of a solution that may be shown."""
        return self.exposure if self.exposure_policy == "fixed" else self.lowest_exposure

    def check_question(self, example: Example) -> None:
        """Refuse a question of whose solution only a part, without an answer, would be shown.

        Raises:
            UserError: If there is no final answer to show.
        """
        super().check_question(example)
        check_answer(example, self.least_exposure)

    def shown(self, progress: Progress) -> float:
        """Return the exposure of a step, the same for all its micro-batches and ranks."""
        self._step = progress.step
        if self._controller is not None:
            return self._controller.exposure(progress)
        if self.exposure_policy == "random":
            return random_exposure(
                self.draws,
                progress.step,
                hold=self.hold,
                lowest=self.lowest_exposure,
                highest=self.highest_exposure,
            )
        return self.exposure

    @torch.no_grad()
    def watched(
        self, batch: Batch, attempt: Attempt, theirs: Prediction, exposure: float
    ) -> dict[str, Tensor]:
        """Return what the controller learns from, for ``Loss.metrics``; nothing without one.

        Args:
            batch: The batch as it came.
            attempt: The student's answers to it.
            theirs: The teacher's prediction of them.
            exposure: What the teacher was shown.
        """
        if self._controller is None:
            return {}
        mask = attempt.answers.mask
        first, other = (
            top_logprobs(found, 1, mask=mask, temperature=self.temperature)
            for found in (attempt.prediction, theirs)
        )
        given = self.family.given(batch)
        ours = self._reference(given, self.student, self.family.condition(batch))
        probe = -ours
        if self.probe == "reference-gap":
            blind = self.family.condition(batch, reader="teacher")
            probe = probe + self._reference(given, self.teacher, blind)
        shown = self.family.condition(batch, reader="teacher", exposure=exposure)
        return {
            "mismatch": masked_mean((first.ids != other.ids)[..., 0].float(), mask),
            "probe": probe,
            "grounding": self._reference(given, self.teacher, shown),
            "confidence": masked_mean(first.logprobs[..., 0].exp(), mask),
        }

    def _reference(self, given: Answers, model: Any, condition: Any) -> Tensor:
        """Return the mean log-probability of the reference answers under a model."""
        found = model(self.family.state(given), condition)
        logprobs = token_logprob(found, given.tokens, mask=given.mask, temperature=self.temperature)
        return masked_mean(logprobs, given.mask)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Let the controller learn from a step."""
        if self._controller is not None:
            watched = {name: metrics[f"{name}/student"] for name in WATCHED}
            self._controller.observe(self._step, loss=metrics["loss/student"], **watched)

    def state(self) -> dict[str, Any]:
        """Return the step, and the controller's state; None without one."""
        controller = None if self._controller is None else self._controller.state()
        return {"controller": controller, "step": self._step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` returned."""
        if self._controller is not None and state["controller"] is not None:
            self._controller.load_state(state["controller"])
        self._step = state["step"]

    def told_exposure(self, exposure: float) -> dict[str, float]:
        """Return what to log of the exposure and of what chooses it."""
        told = {"exposure": exposure}
        if self._controller is not None:
            told |= self._controller.metrics()
        return told

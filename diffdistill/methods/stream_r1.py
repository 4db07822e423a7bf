"""Stream-R1: distribution matching weighted by a video reward (arXiv:2605.03849).

As in Self-Forcing, teacher and critic see the finished clip that the student streamed. A frozen
reward sees it too: how good it is weighs the whole clip, and where the reward is sensitive weighs
its places. The reward's own gradient never reaches the student.

The formulas are those of the published code; the paper's body was not available to us.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.controllers import AxisBalance
from diffdistill.methods.dmd import Goal
from diffdistill.methods.self_forcing import SelfForcing
from diffdistill.protocols import Reward
from diffdistill.saliency import TimeMap, factored, joint, on_latents
from diffdistill.types import Batch, Condition
from diffdistill.weights import reliability, weaker_axes


@dataclass(kw_only=True)
class StreamR1(SelfForcing):
    """Self-Forcing whose loss a reward weighs, by clip and by place.

    With ``beta``, ``space_strength`` and ``time_strength`` 0 it is Self-Forcing. Reward Forcing
    (Re-DMD, arXiv:2512.04678) is ``axes: [motion]`` with both strengths 0.

    Attributes:
        reward: Judges the decoded clip.
        beta: A clip counts ``exp(beta r)``, r being the mean of its z-scored axes less the
            balance penalty.
        axes: The axes of the reward to use; None uses all.
        balance: Factor of the penalty on axes that improve unevenly; 0 has none.
        balance_window: Student updates over which improvement is measured. The reference code
            counts micro-batches of one rank instead.
        balance_warmup: Student updates before the first penalty.
        saliency: ``factored`` weighs frames and the places in each frame; ``joint`` weighs all
            places of the clip at once (the reference code without temporal factoring).
        space_strength: 0 weighs all places of a frame alike, 1 by saliency.
        time_strength: The same for frames; ``joint`` does not use it.
        space_floor: Smallest weight of a place, before its mean is brought to 1.
        time_floor: Smallest weight of a frame, likewise.
        temperature: Of the softmax that gives weaker axes more of the saliency.
        time_map: How frames are assigned to latent frames: ``exact``, or the reference code's
            ``interpolate``.
        reward_batch: Clips that the reward judges at a time.
    """

    reward: Reward
    beta: float = 2.0
    axes: list[str] | None = None
    balance: float = 0.5
    balance_window: int = 50
    balance_warmup: int = 50
    saliency: Literal["factored", "joint"] = "factored"
    space_strength: float = 1.0
    time_strength: float = 1.0
    space_floor: float = 0.15
    time_floor: float = 0.2
    temperature: float = 1.0
    time_map: TimeMap = "exact"
    reward_batch: int = 1

    def __post_init__(self) -> None:
        """Check the options, and start a balance without history.

        Raises:
            ValueError: If one is out of its range, or an axis is not the reward's.
        """
        super().__post_init__()
        for name in ("space_strength", "time_strength", "space_floor", "time_floor"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        for name, least in (("balance", 0), ("balance_window", 4), ("reward_batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        self._axes = tuple(self.reward.axes if self.axes is None else self.axes)
        unknown = [axis for axis in self._axes if axis not in self.reward.axes]
        if unknown or not self._axes or len(set(self._axes)) < len(self._axes):
            known = ", ".join(self.reward.axes)
            raise ValueError(f"axes {list(self._axes)}: name some of the reward's once: {known}")
        self._balance = AxisBalance(
            self._axes, self.balance, self.balance_window, self.balance_warmup
        )

    def _goal(self, batch: Batch, prompt: Condition, sample: Tensor) -> Goal:
        goal = super()._goal(batch, prompt, sample)
        weight, metrics = self._weigh(batch, sample)
        return goal._replace(weight=weight, metrics={**goal.metrics, **metrics})

    def _weigh(self, batch: Batch, sample: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weights ``[B, 1, F, h, w]`` of a clip, and what to log."""
        pixels = self.family.decode(sample)
        places = self.space_strength > 0 or (self.time_strength > 0 and self.saliency != "joint")
        judged = self.reward.judge(
            pixels,
            batch["prompts"],
            saliency=places,
            micro_batch=self.reward_batch,
            axes=self._axes,
        )
        scores = torch.stack([judged.scores[axis] for axis in self._axes], dim=-1)
        penalty = self._balance.penalty()
        clip = reliability(scores.mean(dim=-1) - penalty, self.beta)[:, None, None, None]
        weight = clip.expand(-1, *sample.shape[2:])
        if places:
            weight = weight * self._places(judged.saliency, scores, sample, pixels.shape[1])
        metrics = {f"reward/{axis}": score.mean() for axis, score in judged.scores.items()}
        metrics["balance_penalty"] = torch.tensor(penalty)
        return weight[:, None], metrics

    def _places(
        self, saliency: Mapping[str, Tensor], scores: Tensor, sample: Tensor, num_frames: int
    ) -> Tensor:
        """Return the weights ``[B, F, h, w]`` of the places of each clip, of mean one."""
        shape = (sample.shape[2], sample.shape[3], sample.shape[4])
        maps = torch.stack(
            [
                on_latents(saliency[axis], shape, num_frames=num_frames, time_map=self.time_map)
                for axis in self._axes
            ],
            dim=1,
        )  # [B, M, F, h, w]
        shares = weaker_axes(scores, self.temperature)[..., None, None, None]
        fused = (shares * maps).sum(dim=1)
        if self.saliency == "joint":
            return joint(fused, strength=self.space_strength, floor=self.space_floor)
        return factored(
            fused,
            time_strength=self.time_strength,
            space_strength=self.space_strength,
            time_floor=self.time_floor,
            space_floor=self.space_floor,
        )

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Add the step's mean rewards to the balance, where the student was trained."""
        scores = {axis: metrics.get(f"reward/{axis}/student") for axis in self._axes}
        if None not in scores.values():
            self._balance.observe({a: s for a, s in scores.items() if s is not None})

    def state(self) -> dict[str, Any]:
        """Return the history of the balance."""
        return {"balance": self._balance.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back the history of the balance."""
        if "balance" in state:
            self._balance.load_state(state["balance"])

"""The exposure of a teacher, learned while the student trains.

The controller of ATESD (arXiv:2605.11458): what share of the reference solution the teacher is
shown is drawn from a Beta distribution, which a small network makes of the state of training, and
REINFORCE rewards what made the student better some steps later. We know it from others'
descriptions: no code is published. From the paper, by these, are the distribution, the six
features, the hold windows, the two terms of the reward and the loss; every number, and what else
is marked so, is ours.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.beta_policy import START_BIAS, BetaPolicy, Start, beta_sample
from diffdistill.draws import Draws
from diffdistill.types import Progress

EPSILON = 1e-8


class Decision(NamedTuple):
    """An exposure that was chosen.

    Attributes:
        number: Of the hold window that it is for.
        step: From which on it was used.
        features: What the choice was made from.
        exposure: As used, in [lowest_exposure, highest_exposure].
    """

    number: int
    step: int
    features: list[float]
    exposure: float


class Outcome(NamedTuple):
    """What a decision came to: the two terms of its reward."""

    features: list[float]
    exposure: float
    progress: float
    grounding: float


class Seen(NamedTuple):
    """What one step measured."""

    step: int
    probe: float
    grounding: float


@dataclass(kw_only=True)
class ExposureController:
    """Chooses the exposure of each hold window, and learns from what came of it.

    One exposure serves all examples of all ranks. It depends on what ``observe`` was told, the
    same on all ranks, and on a draw that is keyed by the number of the window, so ranks agree
    without talking. All numbers are ours, since the paper's are not known to us.

    Attributes:
        draws: The source of random numbers.
        hold: Steps of a window, during which the exposure stays as it is.
        lookahead: Steps after which a decision is rewarded.
        reward_discount: Of each further step in a reward.
        num_decisions: Rewarded decisions per update of the policy.
        width: Of the hidden layer.
        controller_lr: Of the policy's Adam.
        lowest_exposure: Smallest exposure; smaller draws become it.
        highest_exposure: Largest exposure, likewise.
        teacher_share: Of the teacher's log-probability of the reference answer in the reward.
        entropy_target: Entropy of the policy above which it costs something. No Beta distribution
            has more than 0, the entropy of the uniform one, so 0 never costs anything.
        entropy_penalty: Factor of the square of what is too much.
        start_exposure: Whether the policy starts without preference, or with nearly all exposed.
        memory: Decay of the moving averages that the policy sees.
    """

    draws: Draws
    hold: int = 5
    lookahead: int = 10
    reward_discount: float = 0.9
    num_decisions: int = 8
    width: int = 32
    controller_lr: float = 1e-3
    lowest_exposure: float = 0.05
    highest_exposure: float = 1.0 - 1e-3
    teacher_share: float = 0.1
    entropy_target: float = 0.0
    entropy_penalty: float = 0.1
    start_exposure: Start = "neutral"
    memory: float = 0.9

    def __post_init__(self) -> None:
        """Check the options, and start with a policy that has seen nothing.

        Raises:
            ValueError: If an option is out of its range.
        """
        # the first step of a window earns nothing, so shorter ones could not be told apart
        for name, least in (("hold", 2), ("lookahead", 2), ("num_decisions", 2), ("width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        high = self.highest_exposure
        for name, good, allowed in (
            ("reward_discount", 0 < self.reward_discount <= 1, "in (0, 1]"),
            ("controller_lr", self.controller_lr > 0, "above 0"),
            (
                "lowest_exposure",
                0 < self.lowest_exposure < high,
                "above 0 and below highest_exposure",
            ),
            ("highest_exposure", high < 1, "below 1"),
            ("teacher_share", self.teacher_share >= 0, "at least 0"),
            ("entropy_penalty", self.entropy_penalty >= 0, "at least 0"),
            (
                "start_exposure",
                self.start_exposure in START_BIAS,
                f"one of {', '.join(START_BIAS)}",
            ),
            ("memory", 0 <= self.memory < 1, "in [0, 1)"),
        ):
            if not good:
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)}")
        self._policy = BetaPolicy(
            width=self.width,
            learning_rate=self.controller_lr,
            start=self.start_exposure,
            generator=self.draws.generator("exposure-policy", 0),
        )
        self._updates = 0
        self._current: Decision | None = None
        self._waiting: list[Decision] = []
        self._matured: list[Outcome] = []
        self._seen: deque[Seen] = deque(maxlen=self.lookahead + 1)
        self._confidence = 0.0
        averaged = dict.fromkeys(("exposure", "loss", "mismatch", "probe"), self.memory)
        rewarded = dict.fromkeys(("noise", "progress", "grounding"), 0.99)
        self._running = {name: Running(decay) for name, decay in (averaged | rewarded).items()}

    def exposure(self, progress: Progress) -> float:
        """Return the exposure to use at a step, the same however often it is asked for."""
        number = progress.step // self.hold
        if self._current is None or self._current.number != number:
            features = self._features(progress.fraction)
            with torch.no_grad():
                a, b = self._policy.concentrations(torch.tensor(features, dtype=torch.float64))
            drawn = beta_sample(a.item(), b.item(), self.draws.generator("exposure", number))
            used = min(max(drawn, self.lowest_exposure), self.highest_exposure)
            self._current = Decision(number, progress.step, features, used)
            self._waiting.append(self._current)
        return self._current.exposure

    def observe(
        self,
        step: int,
        *,
        loss: float,
        mismatch: float,
        probe: float,
        grounding: float,
        confidence: float,
    ) -> None:
        """Learn what a step came to, as means over all its micro-batches and ranks.

        A decision whose look-ahead has a step that was skipped is never rewarded.

        Args:
            step: The step, whose exposure has been asked for.
            loss: The student's loss.
            mismatch: How often student and teacher disagree.
            probe: Before the step's update, the student's mean negative log-likelihood of a fixed
                set of references. It must not depend on the exposure: the loss itself would fall
                whenever less is shown.
            grounding: The teacher's mean log-probability of the reference answer, as exposed.
            confidence: The student's own.
        """
        assert self._current is not None
        assert self._current.number == step // self.hold
        self._confidence = confidence
        seen = {"loss": loss, "mismatch": mismatch, "probe": probe}
        for name, value in (seen | {"exposure": self._current.exposure}).items():
            self._running[name].add(value)
        if self._seen and self._seen[-1].step == step - 1:
            self._running["noise"].add(0.5 * (probe - self._seen[-1].probe) ** 2)
        self._seen.append(Seen(step, probe, grounding))
        while self._waiting and self._waiting[0].step + self.lookahead <= step:
            self._reward(self._waiting.pop(0))
        if len(self._matured) == self.num_decisions:
            self._learn()

    def noise_floor(self) -> float:
        """Return what a probe that is nothing but noise would earn as ``progress_reward``.

        ``sd / sqrt(pi)`` (0.564 sd) for each step that counts, times its discount: progress only
        counts what falls (ours). Half of the mean square of recent changes is the variance.
        """
        weights = sum(self.reward_discount**i for i in range(1, self.lookahead))
        return math.sqrt(self._running["noise"].mean / math.pi) * weights

    def metrics(self) -> dict[str, float]:
        """Return what to log: the policy of the moment, and rewards beside their noise floor."""
        a, b = 0.0, 0.0
        if self._current is not None:
            with torch.no_grad():
                features = torch.tensor(self._current.features, dtype=torch.float64)
                a, b = (value.item() for value in self._policy.concentrations(features))
        return {
            "policy_a": a,
            "policy_b": b,
            "policy_updates": float(self._updates),
            "progress_reward": self._running["progress"].mean,
            "grounding_reward": self._running["grounding"].mean,
            "noise_floor": self.noise_floor(),
        }

    def state(self) -> dict[str, Any]:
        """Return the policy, decisions and averages as JSON values."""
        return {
            "policy": self._policy.state(),
            "updates": self._updates,
            "current": None if self._current is None else list(self._current),
            "waiting": [list(decision) for decision in self._waiting],
            "matured": [list(outcome) for outcome in self._matured],
            "seen": [list(seen) for seen in self._seen],
            "confidence": self._confidence,
            "running": {name: running.state() for name, running in self._running.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` returned."""
        self._policy.load_state(state["policy"])
        self._updates = state["updates"]
        self._current = None if state["current"] is None else Decision(*state["current"])
        self._waiting = [Decision(*row) for row in state["waiting"]]
        self._matured = [Outcome(*row) for row in state["matured"]]
        self._seen = deque((Seen(*row) for row in state["seen"]), maxlen=self.lookahead + 1)
        self._confidence = state["confidence"]
        for name, running in self._running.items():
            running.load_state(state["running"][name])

    def _features(self, fraction: float) -> list[float]:
        averages = (self._running[n].mean for n in ("exposure", "loss", "mismatch", "probe"))
        return [fraction, *averages, self._confidence]

    def _reward(self, decision: Decision) -> None:
        """Work out the rewards of a decision, if every step of its look-ahead was seen."""
        if [s.step - decision.step for s in self._seen] != list(range(self.lookahead + 1)):
            return
        progress = progress_reward([s.probe for s in self._seen], self.reward_discount)
        grounding = grounding_reward([s.grounding for s in self._seen], self.reward_discount)
        self._running["progress"].add(progress)
        self._running["grounding"].add(grounding)
        self._matured.append(Outcome(decision.features, decision.exposure, progress, grounding))

    def _learn(self) -> None:
        """Update the policy with the matured decisions, and forget them.

        Their log-probabilities are those under the policy of now, at the exposures as used (ours).
        """
        standard = self._running["progress"].standard, self._running["grounding"].standard
        rows = self._matured
        rewards = [
            standard[0](row.progress) + self.teacher_share * standard[1](row.grounding)
            for row in rows
        ]
        with torch.enable_grad():
            loss = self._policy.loss(
                torch.tensor([row.features for row in rows], dtype=torch.float64),
                torch.tensor([row.exposure for row in rows], dtype=torch.float64),
                advantages(rewards),
                entropy_target=self.entropy_target,
                entropy_penalty=self.entropy_penalty,
            )
            self._policy.descend(loss)
        self._updates += 1
        self._matured = []


@dataclass
class Running:
    """Mean and variance of what was added: of all at first, then with exponential weights.

    Attributes:
        decay: Of the weights, once ``1 / (1 - decay)`` values are there.
        count: Values that were added.
        mean: Their mean; 0 without any.
        variance: Their variance about it, not corrected for the number.
    """

    decay: float
    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        """Add one value."""
        self.count += 1
        share = max(1.0 / self.count, 1.0 - self.decay)
        gap = value - self.mean
        self.mean += share * gap
        self.variance = (1.0 - share) * (self.variance + share * gap**2)

    def standard(self, value: float) -> float:
        """Return the value less the mean, in standard deviations."""
        return (value - self.mean) / (math.sqrt(self.variance) + EPSILON)

    def state(self) -> list[float]:
        """Return count, mean and variance."""
        return [self.count, self.mean, self.variance]

    def load_state(self, state: Sequence[float]) -> None:
        """Take back what ``state`` returned."""
        self.count, self.mean, self.variance = int(state[0]), state[1], state[2]


def progress_reward(probes: Sequence[float], discount: float) -> float:
    """Return how far the probe fell after a decision, its L + 1 values being from there on.

    ``sum_{i=2..L} discount^(i-1) max(0, l_{i-1} - l_i)`` (ATESD, which starts at i = 1). That the
    step of the switch is left out is ours.
    """
    drops = (max(0.0, old - new) for old, new in pairwise(probes[1:]))
    return sum(discount**i * drop for i, drop in enumerate(drops, start=1))


def grounding_reward(groundings: Sequence[float], discount: float) -> float:
    """Return the discounted mean of the L values after a decision, of L + 1 from there on.

    ``sum_{i=1..L} discount^(i-1) g_i / sum_{i=1..L} discount^(i-1)`` (ATESD).
    """
    weights = [discount**i for i in range(len(groundings) - 1)]
    return sum(w * g for w, g in zip(weights, groundings[1:], strict=True)) / sum(weights)


def advantages(rewards: Sequence[float]) -> Tensor:
    """Return rewards ``[B]`` less their mean, in standard deviations, float64 (ATESD)."""
    values = torch.tensor(rewards, dtype=torch.float64)
    return (values - values.mean()) / (values.std(correction=0) + EPSILON)


def random_exposure(
    draws: Draws, step: int, *, hold: int = 5, lowest: float = 0.0, highest: float = 1.0
) -> float:
    """Return an exposure drawn uniformly for each hold window, the same on all ranks.

    ATESD's ablation without a policy; the range is ours.
    """
    generator = draws.generator("exposure", step // hold)
    uniform = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
    return lowest + (highest - lowest) * uniform

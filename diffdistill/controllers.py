"""Numbers that adapt during training; kept in checkpoints, the same on all ranks."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class AxisBalance:
    """A penalty when some axes of a reward improve and others do not.

    Stream-R1's ``_apply_balance_penalty``: over the last ``window`` observations, the
    improvement of an axis is the mean of the newer half minus that of the older half, and the
    penalty is ``strength`` times the standard deviation of the improvements. There each rank
    keeps a history of its own micro-batches and loses it on a restart; here one observation is
    the mean over a whole optimizer step and all ranks.

    Attributes:
        axes: The axes to balance.
        strength: Factor of the penalty; 0.5 in the reference code.
        window: Observations to keep; 50 there.
        warmup: Observations before the first penalty; 50 there.
    """

    axes: Sequence[str]
    strength: float = 0.5
    window: int = 50
    warmup: int = 50
    seen: int = 0
    history: dict[str, deque[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start with no history."""
        self.history = {axis: deque(maxlen=self.window) for axis in self.axes}

    def observe(self, scores: Mapping[str, float]) -> None:
        """Add one mean score of every axis."""
        for axis, history in self.history.items():
            history.append(scores[axis])
        self.seen += 1

    def penalty(self) -> float:
        """Return what to subtract from the mean score; 0 before the warm-up, or for one axis."""
        kept = min((len(history) for history in self.history.values()), default=0)
        if self.seen < self.warmup or kept < 4 or len(self.axes) < 2:
            return 0.0
        gains = torch.tensor([_gain(history) for history in self.history.values()])
        return self.strength * gains.double().std().item()

    def state(self) -> dict[str, Any]:
        """Return the history as JSON values."""
        return {"seen": self.seen, "history": {a: list(h) for a, h in self.history.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` returned; axes that were not there start empty."""
        self.seen = state["seen"]
        for axis, history in self.history.items():
            history.clear()
            history.extend(state["history"].get(axis, []))


def _gain(history: Sequence[float]) -> float:
    """Return the mean of the newer half minus that of the older half."""
    values = torch.tensor(list(history), dtype=torch.float64)
    middle = len(values) // 2
    return (values[middle:].mean() - values[:middle].mean()).item()

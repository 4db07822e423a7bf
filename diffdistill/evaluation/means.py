"""Means over what comes in batches."""

from torch import Tensor


class Means:
    """Sums numbers by name; what has no numbers has no mean."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add numbers of any shape."""
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + float(values.float().sum()), count + values.numel())

    def found(self) -> dict[str, float]:
        """Return the means."""
        return {name: total / count for name, (total, count) in self.sums.items() if count}

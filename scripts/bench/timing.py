"""Times of tasks, on whatever device they run."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(task: Callable[[], object]) -> float:
    """Return the time of one run of ``task``."""
    synchronize()
    start = time.perf_counter()
    task()
    synchronize()
    return time.perf_counter() - start


def paired(first: Callable[[], object], second: Callable[[], object], rounds: int) -> list[float]:
    """Return the median times of two tasks run in turn, and the median of their ratio."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    times = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return [*times, statistics.median(a / b for a, b in pairs)]

import json
import statistics

import pytest

from diffdistill.controllers import AxisBalance

AXES = ("visual", "motion", "text")


def fed(balance: AxisBalance, slopes: tuple[float, ...], count: int) -> AxisBalance:
    """Observe axes that improve by ``slopes`` with every step."""
    for step in range(count):
        balance.observe({a: s * step for a, s in zip(AXES, slopes, strict=True)})
    return balance


def test_uneven_improvement_costs_its_standard_deviation() -> None:
    balance = fed(AxisBalance(AXES, strength=0.5, window=6, warmup=6), (1.0, 0.0, -1.0), 9)
    # the window holds steps 3 to 8: the newer half is 3 steps ahead of the older
    assert balance.penalty() == pytest.approx(0.5 * statistics.stdev([3.0, 0.0, -3.0]))


def test_even_improvement_costs_nothing() -> None:
    balance = fed(AxisBalance(AXES, window=6, warmup=6), (0.3, 0.3, 0.3), 9)
    assert balance.penalty() == pytest.approx(0.0, abs=1e-12)


def test_there_is_no_penalty_before_the_warm_up() -> None:
    balance = AxisBalance(AXES, window=10, warmup=8)
    assert fed(balance, (1.0, 0.0, -1.0), 7).penalty() == 0.0
    balance.observe(dict.fromkeys(AXES, 0.0))
    assert balance.penalty() > 0.0


def test_one_axis_cannot_be_uneven() -> None:
    balance = AxisBalance(("motion",), window=4, warmup=0)
    for value in range(8):
        balance.observe({"motion": float(value)})
    assert balance.penalty() == 0.0


def test_the_history_survives_a_checkpoint() -> None:
    balance = fed(AxisBalance(AXES, window=6, warmup=6), (1.0, 0.0, -1.0), 9)
    other = AxisBalance(AXES, window=6, warmup=6)
    other.load_state(json.loads(json.dumps(balance.state())))
    assert other.penalty() == balance.penalty() > 0
    for each in (balance, other):
        each.observe({"visual": 1.0, "motion": 9.0, "text": 0.0})
    assert other.penalty() == balance.penalty()


def test_improvement_is_that_of_the_newer_half() -> None:
    balance = AxisBalance(("visual", "motion"), strength=1.0, window=4, warmup=4)
    for value in (0.0, 5.0, 1.0, 2.0):
        balance.observe({"visual": value, "motion": 0.0})
    gains = [(1.0 + 2.0) / 2 - (0.0 + 5.0) / 2, 0.0]
    assert balance.penalty() == pytest.approx(statistics.stdev(gains))

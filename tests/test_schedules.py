import math
from itertools import pairwise

import pytest
import torch

from diffdistill.schedules import (
    LearningRateSchedule,
    learning_rate_factor,
    logit_normal_time,
    score_time,
    shifted,
    tidal_rate,
)
from tests.conftest import generator, randn


def test_a_constant_learning_rate_is_one_from_the_first_update() -> None:
    assert [learning_rate_factor(u, 10) for u in (0, 5, 9)] == [1.0, 1.0, 1.0]


def test_warmup_rises_in_even_steps_and_starts_above_zero() -> None:
    factors = [learning_rate_factor(u, 10, warmup=3) for u in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("linear", [1.0, 0.75, 0.5, 0.25, 0.0]), ("cosine", [1.0, 0.8535534, 0.5, 0.1464466, 0.0])],
)
def test_the_learning_rate_falls_to_zero_after_the_warmup(
    kind: LearningRateSchedule, expected: list[float]
) -> None:
    factors = [learning_rate_factor(2 + 2 * i, 10, kind=kind, warmup=2) for i in range(5)]
    assert factors == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_learning_rate_stays_at_zero_after_the_end(kind: LearningRateSchedule) -> None:
    assert learning_rate_factor(25, 10, kind=kind) == pytest.approx(0.0)


def test_a_warmup_as_long_as_the_run_never_divides_by_zero() -> None:
    assert learning_rate_factor(4, 5, kind="cosine", warmup=5) == pytest.approx(5 / 6)
    assert learning_rate_factor(5, 5, kind="cosine", warmup=5) == 1.0


def test_shift_multiplies_the_odds_of_noise() -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    moved = shifted(t, 5.0)
    torch.testing.assert_close(moved / (1 - moved), 5.0 * t / (1 - t))


def test_shift_leaves_both_ends_and_shift_one_leaves_everything() -> None:
    t = torch.linspace(0, 1, 11)
    assert shifted(t, 7.0)[[0, -1]].tolist() == [0.0, 1.0]
    assert torch.equal(shifted(t, 1.0), t)


def test_score_time_shifts_before_it_clamps() -> None:
    uniform = torch.tensor([0.0, 0.01, 0.5, 0.999])
    t = score_time(uniform, shift=5.0, low=0.02, high=0.98)
    expected = [0.02, 0.05 / 1.04, 2.5 / 3.0, 0.98]  # clamping first would give 0.0926 twice
    assert t.tolist() == pytest.approx(expected)


def test_logit_normal_time_has_normal_logits_with_the_given_moments() -> None:
    t = logit_normal_time(randn(20000, seed=0), mean=-0.5, std=1.5)
    logits = torch.log(t / (1 - t))
    assert logits.mean().item() == pytest.approx(-0.5, abs=0.04)
    assert logits.std().item() == pytest.approx(1.5, abs=0.04)


def test_logit_normal_time_without_spread_is_the_sigmoid_of_its_mean() -> None:
    t = logit_normal_time(randn(4, seed=1), mean=2.0, std=0.0)
    assert t.tolist() == pytest.approx([1 / (1 + math.exp(-2))] * 4)


def test_a_larger_shift_means_more_noise() -> None:
    uniform = torch.rand(64, generator=generator(2)).clamp(0.05, 0.9)
    low, high = shifted(uniform, 2.0), shifted(uniform, 3.0)
    assert (high > low).all()
    assert (low > uniform).all()


def test_tidal_rate_rises_with_training_by_half_a_cosine() -> None:
    zero = torch.zeros(1)
    rates = [tidal_rate(p, zero).item() for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    turn = 0.4 * math.sqrt(0.5)
    assert rates == pytest.approx([0.1, 0.5 - turn, 0.5, 0.5 + turn, 0.9])


def test_tidal_rate_rises_evenly_if_asked() -> None:
    rates = [tidal_rate(p, torch.zeros(1), growth="linear").item() for p in (0.0, 0.25, 1.0)]
    assert rates == pytest.approx([0.1, 0.3, 0.9])


def test_tidal_rate_falls_to_zero_as_all_is_hidden() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    assert tidal_rate(0.5, t).tolist() == pytest.approx([0.5, 0.375, 0.0])


def test_each_axis_of_the_tidal_rate_stands_alone() -> None:
    t = torch.tensor([0.25, 1.0])
    assert tidal_rate(0.5, t, axes="training").tolist() == pytest.approx([0.5, 0.5])
    for progress in (0.0, 0.5, 1.0):
        assert tidal_rate(progress, t, axes="noise").tolist() == pytest.approx([0.675, 0.0])


def test_the_tidal_rate_goes_on_where_a_resumed_run_left_off() -> None:
    t = torch.tensor([0.3])
    whole = [tidal_rate(step / 9, t) for step in range(10)]
    parts = [tidal_rate(step / 9, t) for steps in (range(4), range(4, 10)) for step in steps]
    assert whole == parts
    jumps = [abs(b - a).item() for a, b in pairwise(whole)]
    assert max(jumps) < 0.8 * 0.7 * math.pi / 2 / 9 + 1e-6  # its slope is bounded

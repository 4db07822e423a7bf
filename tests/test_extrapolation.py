import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffdistill.extrapolation import (
    base_neutral_strength,
    beta_opsd_strength,
    constant_floor,
    contract_positions,
    critical_strength,
    fixed_point,
    guarded_strength,
    mode_of,
    teacher_relative_floor,
)
from diffdistill.types import Progress
from tests.conftest import randn

# a busy machine is no failure
quick = settings(deadline=None, max_examples=60)

PROBABILITIES = st.floats(1e-4, 1.0 - 1e-4)
STRENGTHS = st.floats(0.0, 3.0)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def logit(probability: Tensor) -> Tensor:
    return torch.logit(probability)


def tail(teacher: Tensor, reference: Tensor, strength: Tensor | float) -> Tensor:
    """Return what the target leaves for all other tokens."""
    return -torch.expm1(fixed_point(teacher, reference, strength))


def guard(requested: float, p: Tensor, b: Tensor, **options: float) -> Tensor:
    everywhere = torch.ones_like(p, dtype=torch.bool)
    floor = teacher_relative_floor()
    return guarded_strength(requested, p, b, everywhere, tail_floor=floor, **options)


@quick
@given(PROBABILITIES, PROBABILITIES, STRENGTHS)
def test_the_fixed_point_is_a_straight_line_in_logits(p: float, b: float, strength: float) -> None:
    teacher, reference = logs(p), logs(b)
    expected = (1.0 - strength) * logit(reference.exp()) + strength * logit(teacher.exp())
    torch.testing.assert_close(
        fixed_point(teacher, reference, strength).exp(), expected.sigmoid(), rtol=1e-9, atol=0
    )


@quick
@given(PROBABILITIES, PROBABILITIES, STRENGTHS)
def test_the_fixed_point_is_that_of_a_vocabulary(p: float, b: float, strength: float) -> None:
    # the tail is shared out alike by both, so that all of it is as one token
    shares = logs(0.2, 0.3, 0.5)
    teacher = torch.cat([logs(p), logs(1.0 - p) + shares])
    reference = torch.cat([logs(b), logs(1.0 - b) + shares])
    target = torch.log_softmax(strength * teacher + (1.0 - strength) * reference, dim=-1)
    torch.testing.assert_close(
        fixed_point(teacher[0], reference[0], strength), target[0], rtol=1e-9, atol=1e-12
    )


def test_a_strength_of_zero_is_the_reference_and_of_one_the_teacher() -> None:
    p, b = logs(0.97, 0.2, 0.5), logs(0.6, 0.9, 0.5)
    torch.testing.assert_close(fixed_point(p, b, 0.0), b)
    torch.testing.assert_close(fixed_point(p, b, 1.0), p)


@quick
@given(st.floats(0.5, 0.9999), st.floats(0.01, 0.95), st.floats(1e-6, 0.5))
def test_at_the_critical_strength_the_tail_is_at_its_floor(p: float, b: float, tau: float) -> None:
    teacher, reference = logs(max(p, b + 0.02 * (1.0 - b))), logs(b)
    critical = critical_strength(teacher, reference, constant_floor(tau))
    torch.testing.assert_close(
        tail(teacher, reference, critical), torch.full_like(critical, tau), rtol=1e-8, atol=0
    )


@quick
@given(st.floats(0.5, 0.9999), st.floats(0.01, 0.95), st.floats(1.0, 10.0))
def test_at_the_guard_the_tail_is_that_of_the_teacher_over_kappa(
    p: float, b: float, kappa: float
) -> None:
    teacher, reference = logs(max(p, b + 0.02 * (1.0 - b))), logs(b)
    critical = critical_strength(teacher, reference, teacher_relative_floor(kappa))
    ratio = -torch.expm1(teacher) / tail(teacher, reference, critical)
    torch.testing.assert_close(ratio, torch.full_like(ratio, kappa), rtol=1e-8, atol=0)
    assert critical.item() >= 1.0 - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guard_falls_to_one_as_the_teacher_becomes_sure(dtype: torch.dtype) -> None:
    # log p from -1 to -1e-30: p itself is 1 in either precision long before
    teacher = -torch.logspace(0, -30, 61, dtype=dtype)
    reference = torch.full_like(teacher, math.log(0.3))
    critical = critical_strength(teacher, reference, teacher_relative_floor(2.0))
    assert (critical.diff() < 0).all()
    assert (critical > 1.0).all()
    expected = 1.0 + math.log(2.0) / (30 * math.log(10) - math.log(0.3 / 0.7))
    assert critical[-1].item() == pytest.approx(expected, abs=1e-6)


def test_the_guard_is_about_the_log_of_kappa_over_the_gap() -> None:
    p, b = logs(0.999), logs(0.6)
    approximate = 1.0 + math.log(2.0) / (logit(p.exp()) - logit(b.exp()))
    critical = critical_strength(p, b, teacher_relative_floor(2.0))
    torch.testing.assert_close(critical, approximate, rtol=0, atol=2e-4)


def test_a_smaller_floor_allows_more() -> None:
    p, b = logs(0.95), logs(0.6)
    allowed = [critical_strength(p, b, constant_floor(tau)).item() for tau in (0.1, 0.05, 0.01)]
    assert allowed[0] < 1.0
    assert allowed[1] == pytest.approx(1.0)
    assert allowed[2] > 1.0


def test_no_strength_is_critical_where_the_teacher_is_no_surer_than_the_reference() -> None:
    p, b = logs(0.5, 0.9, 1.0), logs(0.6, 0.9, 1.0)
    for floor in (teacher_relative_floor(), constant_floor(0.2)):
        assert critical_strength(p, b, floor).tolist() == [math.inf] * 3
    # the tail is the same or grows
    assert (tail(p, b, 1.5) >= tail(p, b, 1.0)).all()


def test_the_limits_of_certainty_are_numbers() -> None:
    p, b = torch.tensor([0.0, 0.0, -0.1]), torch.tensor([-0.5, -math.inf, -math.inf])
    assert critical_strength(p, b, teacher_relative_floor()).tolist() == [1.0, 1.0, 1.0]
    assert critical_strength(p[:1], b[:1], constant_floor(0.01)).tolist() == [0.0]
    # a teacher that was rounded to a little more than certain
    assert critical_strength(p[:1] + 1e-7, b[:1], teacher_relative_floor()).tolist() == [1.0]
    assert guard(1.25, p, b).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("p", "tau", "kappa"),
    [(0.95, 0.0268, 1.9), (0.98, 0.0086, 2.3), (0.99, 0.0037, 2.7), (0.995, 0.0016, 3.1)],
)
def test_the_published_strength_implies_these_floors(p: float, tau: float, kappa: float) -> None:
    # our notes on the paper have these, rounded
    assert base_neutral_strength(logs(p), tau).item() == pytest.approx(1.22, abs=5e-3)
    relative = critical_strength(logs(p), logs(0.5), teacher_relative_floor(kappa))
    assert relative.item() == pytest.approx(1.22, abs=0.01)


def test_the_base_neutral_strength_is_a_quotient_of_logits() -> None:
    p = logs(0.6, 0.9, 0.99)
    expected = logit(torch.tensor(0.95, dtype=torch.float64)) / logit(p.exp())
    torch.testing.assert_close(base_neutral_strength(p, 0.05), expected)
    assert base_neutral_strength(logs(0.5, 0.4), 0.05).tolist() == [math.inf, math.inf]


@quick
@given(PROBABILITIES, PROBABILITIES, STRENGTHS, st.booleans(), st.floats(0.0, 0.2))
def test_the_strength_is_never_above_what_was_requested(
    p: float, b: float, requested: float, contract: bool, margin: float
) -> None:
    strength = guarded_strength(
        requested,
        logs(p),
        logs(b),
        torch.tensor([contract]),
        tail_floor=teacher_relative_floor(),
        margin=margin,
    ).item()
    assert min(1.0, requested) <= strength <= requested
    if not contract:
        assert strength == requested
    elif p <= b:
        assert strength == min(1.0, requested)


def test_the_guard_stays_below_the_critical_strength_by_the_margin() -> None:
    p, b = logs(0.92, 0.95), logs(0.6, 0.7)
    critical = critical_strength(p, b, teacher_relative_floor())
    torch.testing.assert_close(guard(2.0, p, b, margin=0.05), 0.95 * critical)
    torch.testing.assert_close(guard(2.0, p, b), 0.97 * critical)
    torch.testing.assert_close(guard(2.0, p, b, margin=0.0), critical)


def test_the_margin_does_not_push_the_strength_below_the_teacher() -> None:
    assert guard(2.0, logs(0.999999), logs(0.6), margin=0.5).tolist() == [1.0]


def test_only_contract_positions_are_guarded() -> None:
    p, b = logs(0.99, 0.99), logs(0.6, 0.6)
    contract = torch.tensor([True, False])
    floor = teacher_relative_floor()
    strength = guarded_strength(1.5, p, b, contract, tail_floor=floor)
    assert strength[0].item() < 1.2
    assert strength[1].item() == 1.5
    each = torch.tensor([1.1, 1.3], dtype=torch.float64)
    strength = guarded_strength(each, p, b, contract, tail_floor=floor)
    assert strength.tolist() == [1.1, 1.3]


def test_a_users_own_floor_may_depend_on_both() -> None:
    p, b = logs(0.95), logs(0.6)
    critical = critical_strength(p, b, lambda teacher, reference: teacher + reference - 3.0)
    torch.testing.assert_close(tail(p, b, critical), (p + b - 3.0).exp())


def test_a_contract_position_is_sure_and_agreed_upon() -> None:
    teacher = torch.tensor([0.95, 0.95, 0.85, 0.9]).log()
    same = torch.tensor([True, False, True, True])
    assert contract_positions(teacher, same, p_min=0.8999).tolist() == [True, False, False, True]
    assert contract_positions(teacher, same, p_min=0.8).tolist() == [True, False, True, True]


def test_the_mode_is_the_most_likely_token_of_the_teacher() -> None:
    teacher = randn(2, 5, 7, seed=0).log_softmax(-1)
    reference = randn(2, 5, 7, seed=1).log_softmax(-1)
    mode = mode_of(teacher, reference)
    for i in range(2):
        for j in range(5):
            token = max(range(7), key=lambda v: teacher[i, j, v].item())
            other = max(range(7), key=lambda v: reference[i, j, v].item())
            assert mode.teacher[i, j] == teacher[i, j, token]
            assert mode.reference[i, j] == reference[i, j, token]
            assert mode.same[i, j] == (token == other)


def test_half_precision_is_widened() -> None:
    p, b = torch.tensor([-0.01]).bfloat16(), torch.tensor([-0.5]).bfloat16()
    strength = guard(1.5, p, b)
    assert strength.dtype == torch.float32
    torch.testing.assert_close(strength, guard(1.5, p.float(), b.float()))


def test_the_strength_of_beta_opsd_rises_from_one_half_to_four_fifths() -> None:
    steps = (0, 50, 100, 200, 1000)
    assert [beta_opsd_strength(Progress(step, 1001)) for step in steps] == pytest.approx(
        [0.5, 0.575, 0.65, 0.8, 0.8]
    )


@pytest.mark.parametrize("value", [0.99, math.nan])
def test_a_kappa_that_makes_the_teacher_unsafe_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="kappa"):
        teacher_relative_floor(value)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_a_floor_outside_of_the_unit_interval_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="floor"):
        constant_floor(value)

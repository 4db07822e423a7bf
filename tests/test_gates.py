import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffdistill.gates import (
    centered,
    entropy_gate,
    gap_gate,
    sdar_map,
    soft_or_gate,
    unit,
)
from tests.conftest import randn

Gate = Callable[[Tensor, Tensor], Tensor]
"""Of the teacher's and the student's log-probabilities ``[1, A]``."""


def expected_gradient(student: Tensor, teacher: Tensor, gate: Gate) -> Tensor:
    """Return the mean gradient of SDAR's loss over all answers, weighted by their probability.

    The logits ``[A, V]`` of a place do not depend on the answer before it.
    """
    student = student.clone().requires_grad_()
    logprobs, targets = student.log_softmax(-1), teacher.log_softmax(-1)
    places = torch.arange(len(student))
    total = torch.zeros((), dtype=student.dtype)
    for answer in itertools.product(range(student.shape[1]), repeat=len(student)):
        ours, theirs = (side[places, list(answer)][None] for side in (logprobs, targets))
        likelihood = ours.detach().sum().exp()
        total = total + likelihood * sdar_map(ours, theirs, gate(theirs, ours)).sum()
    total.backward()
    assert student.grad is not None
    return student.grad


def logits(seed: int, length: int = 3) -> Tensor:
    return randn(length, 4, seed=seed, dtype=torch.float64)


def by_gap(beta: float) -> Gate:
    return lambda theirs, ours: gap_gate(theirs, ours, beta)


def by_centered_gap(beta: float) -> Gate:
    return lambda theirs, ours: centered(gap_gate(theirs, ours, beta), torch.ones_like(ours) > 0)


def kl_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    (ours.exp() * (ours - theirs)).sum().backward()
    assert student.grad is not None
    return student.grad


def test_a_gate_without_slope_teaches_nothing_on_average() -> None:
    gradient = expected_gradient(logits(0), logits(1), by_gap(0.0))
    assert gradient.abs().max() < 1e-15


def test_a_gate_of_little_slope_teaches_the_reverse_divergence() -> None:
    student, teacher = logits(2), logits(3)
    expected = 0.1 / 4 * kl_gradient(student, teacher)
    found = expected_gradient(student, teacher, by_gap(0.1))
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
    assert (found.norm() / expected.norm()).item() == pytest.approx(1.0, abs=0.01)


def test_a_steep_gate_still_goes_downhill_but_not_straight() -> None:
    student, teacher = logits(2), logits(3)
    found = expected_gradient(student, teacher, by_gap(5.0)).flatten()
    cosine = torch.cosine_similarity(found, kl_gradient(student, teacher).flatten(), dim=0)
    assert 0.8 < cosine < 0.999


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_centering_does_not_change_what_is_taught_on_average(beta: float) -> None:
    student, teacher = logits(4), logits(5)
    plain = expected_gradient(student, teacher, by_gap(beta))
    found = expected_gradient(student, teacher, by_centered_gap(beta))
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-15)


def test_centering_takes_away_the_noise_of_a_gate_that_is_the_same_everywhere() -> None:
    gate, mask = torch.full((2, 3), 0.5), torch.tensor([[True, True, False], [True, False, False]])
    assert centered(gate, mask).tolist() == [[0.0] * 3] * 2


def test_a_centered_gate_is_itself_minus_the_mean_of_the_others() -> None:
    gate = torch.tensor([[0.1, 0.5, 9.0], [0.9, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = centered(gate, mask)
    expected = [0.1 - (0.5 + 0.9) / 2, 0.5 - (0.1 + 0.9) / 2, 0.9 - (0.1 + 0.5) / 2]
    assert found[mask].tolist() == pytest.approx(expected)
    assert not found[~mask].any()
    assert centered(gate[:, :1], torch.tensor([[True], [False]])).tolist() == [[0.0], [0.0]]


def test_gates_open_with_the_gap_and_the_entropy() -> None:
    gap = torch.tensor([-1.0, 0.0, 1.0])
    sure = torch.zeros(3)
    torch.testing.assert_close(gap_gate(gap, sure), torch.sigmoid(5.0 * gap))
    torch.testing.assert_close(entropy_gate(sure), torch.full((3,), 0.5))
    torch.testing.assert_close(entropy_gate(torch.tensor(0.6), 2.0), torch.tensor(1.2).sigmoid())
    torch.testing.assert_close(soft_or_gate(sure, gap, 5.0), gap_gate(gap, sure, 5.0))
    unsure = soft_or_gate(torch.ones(3), gap, 3.0)
    torch.testing.assert_close(unsure, torch.full((3,), 3.0).sigmoid())
    halfway = soft_or_gate(torch.tensor(0.5), torch.tensor(0.4), 2.0)
    torch.testing.assert_close(halfway, torch.tensor(2.0 * (0.5 + 0.4 - 0.2)).sigmoid())


def test_a_unit_gate_without_slope_is_one() -> None:
    gap = randn(2, 3, seed=6)
    assert unit(gap_gate(gap, -gap, 0.0)).tolist() == [[1.0] * 3] * 2
    assert unit(entropy_gate(gap.abs(), 0.0)).tolist() == [[1.0] * 3] * 2
    assert unit(soft_or_gate(gap.abs(), gap, 0.0)).tolist() == [[1.0] * 3] * 2


def test_only_the_students_side_of_the_loss_has_a_gradient_and_the_gate_is_its_size() -> None:
    student, teacher = randn(2, 3, seed=7).requires_grad_(), randn(2, 3, seed=8).requires_grad_()
    gate = gap_gate(teacher, student)
    loss = sdar_map(student, teacher, gate)
    torch.testing.assert_close(loss.detach(), gate * (teacher - student).detach())
    loss.sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, -gate)
    entropy, gap = randn(2, 3, seed=9).requires_grad_(), teacher - student
    assert not any(
        g.requires_grad for g in (gate, entropy_gate(entropy), soft_or_gate(entropy, gap))
    )
    assert not sdar_map(student.detach(), teacher, gap).requires_grad

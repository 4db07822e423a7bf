"""Expectations are exact: sums over a small vocabulary, weighted by the student."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffdistill.estimators import k1, k2, k3, log_ratio, policy_gradient_map
from diffdistill.projection import token_maps
from tests.conftest import randn

WORDS = 9


def sides() -> tuple[Tensor, Tensor]:
    """Return logits ``[4, V]`` of student and teacher."""
    student = randn(4, WORDS, seed=0, dtype=torch.float64).requires_grad_()
    return student, randn(4, WORDS, seed=1, dtype=torch.float64)


def expected(of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return expectations of an estimator's value and of its gradient, over the student's y."""
    logits, teacher = sides()
    logprobs = logits.log_softmax(-1)
    values = logprobs.exp().detach() * of(logprobs, teacher.log_softmax(-1))
    return values.sum(-1).detach(), torch.autograd.grad(values.sum(), logits)[0]


def kl(direction: str) -> tuple[Tensor, Tensor]:
    """Return the divergence and its gradient in the logits, from dense probabilities."""
    logits, teacher = sides()
    p, q = logits.softmax(-1), teacher.softmax(-1)
    first, second = (q, p) if direction == "forward" else (p, q)
    value = (first * (first / second).log()).sum(-1)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_the_reverse_kl_on_average(
    estimator: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.testing.assert_close(expected(estimator)[0], kl("reverse")[0])


def test_k2_and_k3_are_never_negative_and_k2_is_biased() -> None:
    logprobs, teacher = (side.detach().log_softmax(-1) for side in sides())
    assert (k2(logprobs, teacher) >= 0).all()
    assert (k3(logprobs, teacher) >= 0).all()
    assert not torch.allclose(expected(k2)[0], kl("reverse")[0], rtol=1e-2)


def test_as_losses_k1_is_flat_k2_is_the_reverse_and_k3_the_forward_kl() -> None:
    assert expected(k1)[1].abs().max() < 1e-15
    torch.testing.assert_close(expected(k2)[1], kl("reverse")[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(expected(k3)[1], kl("forward")[1], rtol=0, atol=1e-14)
    assert not torch.allclose(kl("forward")[1], kl("reverse")[1], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("baseline", [False, True])
def test_the_policy_gradient_of_the_log_ratio_descends_the_reverse_kl(baseline: bool) -> None:
    reverse = kl("reverse")[0][:, None] if baseline else None

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return policy_gradient_map(student, log_ratio(student, teacher, reverse))

    torch.testing.assert_close(expected(loss)[1], kl("reverse")[1], rtol=0, atol=1e-14)


def test_the_exact_baseline_makes_the_mean_advantage_zero_and_lowers_the_variance() -> None:
    logits, teacher = sides()
    p = logits.detach().softmax(-1)
    logprobs, others = logits.detach().log_softmax(-1), teacher.log_softmax(-1)
    reverse = token_maps(logits, teacher, ["reverse-kl"])["reverse-kl"][:, None]
    centered = log_ratio(logprobs, others, reverse)
    mean = (p * centered).sum(-1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)
    plain = log_ratio(logprobs, others)
    norms = (torch.eye(WORDS) - p[:, None]).square().sum(-1)  # of grad log p(y) in the logits
    variances = [(p * advantage.square() * norms).sum() for advantage in (centered, plain)]
    assert variances[0] < variances[1]


def test_no_gradient_reaches_teacher_or_advantage() -> None:
    student, teacher = (side.requires_grad_() for side in sides())
    value = k1(student, teacher) + k2(student, teacher) + k3(student, teacher)
    advantage = log_ratio(student, teacher, student.sum(-1, keepdim=True))
    value = value + policy_gradient_map(student, advantage)
    assert not advantage.requires_grad
    found = torch.autograd.grad(value.sum(), [student, teacher], allow_unused=True)
    assert found[0] is not None
    assert found[1] is None

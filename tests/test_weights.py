import math

import pytest
import torch

from diffdistill.divergences import masked_mean, mse
from diffdistill.readouts import clean_of, per_sample
from diffdistill.types import State
from diffdistill.weights import noise_weight, reliability, velocity_weight, weaker_axes
from tests.conftest import randn


def test_uniform_weight_is_one_at_every_noise_level() -> None:
    assert velocity_weight(torch.tensor([0.0, 0.3, 1.0]), "uniform").tolist() == [1.0, 1.0, 1.0]


def test_sigma2_weight_is_the_square_of_the_noise_level() -> None:
    weight = velocity_weight(torch.tensor([0.0, 0.5, 1.0]), "sigma2")
    assert weight.tolist() == [0.0, 0.25, 1.0]


def test_sigma2_weight_of_velocities_is_the_error_of_the_clean_predictions() -> None:
    x, student, teacher = (randn(3, 2, 4, 4, seed=s, dtype=torch.float64) for s in (0, 1, 2))
    state = State(x, torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64))
    weight = per_sample(velocity_weight(state.t, "sigma2"), x)
    weighted = masked_mean((student - teacher).square(), weight=weight)
    clean_error = (clean_of(state, student) - clean_of(state, teacher)).square().mean()
    torch.testing.assert_close(weighted, clean_error, rtol=1e-13, atol=0)


def test_sigma2_weight_gives_the_gradient_of_the_clean_error() -> None:
    x, teacher = randn(2, 2, 3, 3, seed=3), randn(2, 2, 3, 3, seed=4)
    state = State(x, torch.tensor([0.3, 0.9]))
    one, other = (randn(2, 2, 3, 3, seed=5).requires_grad_() for _ in range(2))
    weight = per_sample(velocity_weight(state.t, "sigma2"), x)
    masked_mean(mse(one, teacher), weight=weight).backward()
    mse(clean_of(state, other), clean_of(state, teacher)).mean().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_the_midrange_weight_is_a_bell_around_one_half() -> None:
    weight = noise_weight(torch.tensor([0.5, 0.35, 0.65, 0.2]), "midrange")
    assert weight.tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(-0.5), math.exp(-2.0)])


def test_the_uniform_weight_of_noise_levels_is_one() -> None:
    assert noise_weight(torch.tensor([0.0, 0.5, 1.0]), "uniform").tolist() == [1.0, 1.0, 1.0]


def test_an_axis_with_a_lower_score_gets_the_larger_share() -> None:
    scores = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    torch.testing.assert_close(weaker_axes(scores, 1.0), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    sharper = weaker_axes(scores, 0.5)[0]
    torch.testing.assert_close(sharper, torch.tensor([0.9, 0.1]))


def test_reliability_grows_with_the_score() -> None:
    scores = torch.tensor([0.0, 0.5 * math.log(2.0)])
    torch.testing.assert_close(reliability(scores, 2.0), torch.tensor([1.0, 2.0]))

from collections import Counter

import pytest
import torch

from diffdistill.draws import Draws


def test_a_sample_gets_the_same_noise_in_any_micro_batch() -> None:
    draws = Draws(0)
    whole = draws.normal("rollout", torch.arange(6), (3, 4))
    for rows in ([0, 1, 2], [5], [4, 0, 2]):
        assert torch.equal(draws.normal("rollout", torch.tensor(rows), (3, 4)), whole[rows])
    uniform = draws.uniform("time", torch.arange(6))
    assert torch.equal(draws.uniform("time", torch.tensor([4, 1])), uniform[[4, 1]])


def test_drawing_twice_gives_the_same_numbers_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = Draws(3).normal("noise", torch.tensor([7]), (16,))
    Draws(3).uniform("noise", torch.tensor([7]))
    Draws(3).integer("noise", 7, 4)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(Draws(3).normal("noise", torch.tensor([7]), (16,)), first)


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


def test_seeds_purposes_and_ids_are_independent_of_one_another() -> None:
    shape, zero = (10000,), torch.tensor([0])
    base = Draws(0).normal("rollout", zero, shape)
    others = [
        Draws(1).normal("rollout", zero, shape),
        Draws(0).normal("noise", zero, shape),
        Draws(0).normal("rollout", torch.tensor([1]), shape),
    ]
    assert correlation(base, base) == pytest.approx(1.0)
    for other in others:
        assert abs(correlation(base, other)) < 0.04  # four standard deviations


def test_normal_numbers_are_standard_across_ids() -> None:
    noise = Draws(2).normal("rollout", torch.arange(400), (50,))
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03)
    assert noise.std().item() == pytest.approx(1.0, abs=0.03)
    assert noise[:, 0].std().item() == pytest.approx(1.0, abs=0.15)  # over ids, not in a row


def test_uniform_numbers_fill_the_unit_interval_across_ids() -> None:
    numbers = Draws(4).uniform("time", torch.arange(2000))
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = torch.histc(numbers, bins=10, min=0.0, max=1.0)
    assert counts.min() > 150
    assert counts.max() < 260


def test_integers_are_spread_evenly_over_their_range() -> None:
    draws = Draws(5)
    counts = Counter(draws.integer("exit", step, 4) for step in range(1000))
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 200
    assert draws.integer("exit", 17, 4) == Draws(5).integer("exit", 17, 4)


def test_draws_of_the_first_release_stay_the_same() -> None:
    noise = Draws(0).normal("rollout", torch.tensor([0]), (3,))
    assert noise[0].tolist() == pytest.approx([1.528859, 1.140013, 0.227415], abs=1e-5)

import pytest
import torch

from diffdistill.views import complementary, merged
from tests.conftest import generator, randn


def test_complementary_halves_part_what_is_hidden_in_the_given_share() -> None:
    active = torch.rand(50, 400, generator=generator(0)) < 0.6
    uniform = torch.rand(50, 400, generator=generator(1))
    first, second = complementary(active, uniform, 0.3)
    assert not (first & second).any()
    assert torch.equal(first | second, active)
    assert second.sum() / active.sum() == pytest.approx(0.3, abs=0.02)


def test_at_either_end_one_pass_hides_everything() -> None:
    active = torch.rand(3, 9, generator=generator(2)) < 0.5
    uniform = torch.rand(3, 9, generator=generator(3))
    for exposure, whole in ((0.0, 0), (1.0, 1)):
        halves = complementary(active, uniform, exposure)
        assert torch.equal(halves[whole], active)
        assert not halves[1 - whole].any()


def test_merged_takes_each_value_from_the_pass_that_hid_it() -> None:
    first, second = randn(2, 3, 4, seed=4), randn(2, 3, 4, seed=5)
    hidden = torch.tensor([[True, False, False], [False, True, True]])
    values = merged(first, second, hidden)
    for row in range(2):
        for place in range(3):
            source = second if hidden[row, place] else first
            assert torch.equal(values[row, place], source[row, place])
    assert torch.equal(merged(first[..., 0], second[..., 0], hidden), values[..., 0])

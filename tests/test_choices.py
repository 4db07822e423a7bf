import pytest
import torch

from diffdistill.choices import best_tokens, invert, sampled_tokens
from diffdistill.projection import Projection, dense
from tests.conftest import randn


def projection(rows: int) -> Projection:
    bias = randn(5, seed=2)
    bias[3] = -torch.inf
    return Projection(randn(rows, 3, seed=0), randn(5, 3, seed=1), bias)


def test_inverting_never_returns_what_is_impossible() -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    numbers = torch.tensor([0.0, 0.49999, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    assert invert(probs.expand(4, 5), numbers).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("tile_rows", [1, 4, None])
def test_the_best_token_is_that_of_the_logits(tile_rows: int | None) -> None:
    prediction = projection(10)
    found = best_tokens(prediction, tile_rows=tile_rows)
    assert torch.equal(found, dense(prediction).argmax(-1))
    assert torch.equal(found, best_tokens(dense(prediction)))


@pytest.mark.parametrize("tile_rows", [100, None])
def test_evenly_spread_numbers_choose_each_token_in_its_share(tile_rows: int | None) -> None:
    prediction = projection(2)
    count = 1000
    numbers = (torch.arange(count) + 0.5) / count
    for row in range(2):
        many = prediction._replace(hidden=prediction.hidden[[row] * count])
        found = sampled_tokens(many, numbers, tile_rows=tile_rows).bincount(minlength=5)
        expected = count * dense(prediction)[row].softmax(-1)
        assert (found - expected).abs().max() <= 1
        assert found[3] == 0


def test_of_no_rows_no_tokens_are_chosen() -> None:
    prediction = projection(4)._replace(hidden=randn(0, 3, seed=0))
    assert sampled_tokens(prediction, torch.zeros(0)).tolist() == []
    assert best_tokens(prediction).dtype == torch.int64

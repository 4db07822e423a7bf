from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill.projection import Prediction, Projection
from diffdistill.tiling import in_tiles
from tests.conftest import randn

ROWS = 7


def compare(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    p, q = student.softmax(-1), teacher.detach().softmax(-1)
    return weight * (p.sort(-1).values[:, :4] * q[:, :4]).sum(-1)


def sides() -> tuple[list[Tensor], Tensor, Tensor]:
    """Return hidden states and head of the student, logits of the teacher, and weights."""
    leaves = [randn(ROWS, 3, seed=0).requires_grad_(), randn(5, 3, seed=1).requires_grad_()]
    return leaves, randn(ROWS, 6, seed=2).requires_grad_(), randn(ROWS, seed=3).requires_grad_()


@pytest.mark.parametrize("tile_rows", [1, 3, ROWS, None])
@pytest.mark.parametrize("projected", [True, False])
def test_tiles_have_the_values_and_gradients_of_the_whole(
    tile_rows: int | None, projected: bool
) -> None:
    leaves, teacher, weight = sides()
    logits = leaves[0] @ leaves[1].T
    student: Prediction = Projection(leaves[0], leaves[1]) if projected else logits
    found = in_tiles(compare, student, teacher, weight, tile_rows=tile_rows)
    expected = compare(logits, teacher, weight)
    torch.testing.assert_close(found, expected)
    upstream = randn(ROWS, seed=4)
    inputs = [*leaves, weight]
    ours = torch.autograd.grad(found, inputs, upstream, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(ours, theirs)


def test_no_rows_give_an_empty_map_and_gradients_of_zero() -> None:
    leaves, teacher, weight = sides()
    student = Projection(leaves[0][:0], leaves[1])
    found = in_tiles(compare, student, teacher[:0], weight[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert leaves[0].grad is not None
    assert not leaves[0].grad.any()


class Largest(TorchDispatchMode):
    """Remembers the most rows of the student's logits that any tensor had."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == 5:
                self.rows = max(self.rows, len(value))
        return found


def test_no_more_than_a_tile_of_logits_is_there_forward_or_backward() -> None:
    leaves, teacher, weight = sides()
    with Largest() as largest:
        student = Projection(leaves[0], leaves[1])
        in_tiles(compare, student, teacher, weight, tile_rows=2).sum().backward()
    assert largest.rows == 3 < ROWS  # the rows of the transposed head

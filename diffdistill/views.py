"""What a teacher is shown of a state."""

import torch
from torch import Tensor


def complementary(active: Tensor, uniform: Tensor, exposure: float) -> tuple[Tensor, Tensor]:
    """Return what a first and a second pass hide of ``active``, bool, of its shape.

    CompDemo, eq. 5 of TIDE (arXiv:2604.26951): each pass is shown what the other hides. At
    exposure 0 the first hides everything and the second nothing; at 1 the reverse.

    Args:
        active: bool ``[B, N]`` or ``[B, L]``: what is hidden from the student.
        uniform: Numbers in [0, 1) of the same shape; by chunk, so that none is split.
        exposure: The share that the first pass is shown, the paper's rho.
    """
    shown = uniform < exposure
    return active & ~shown, active & shown


def merged(first: Tensor, second: Tensor, hidden_second: Tensor) -> Tensor:
    """Return the values of the second pass where it hid something, and else of the first.

    Eq. 6 of TIDE. ``hidden_second`` has the leading axes of both.
    """
    more = first.ndim - hidden_second.ndim
    return torch.where(hidden_second.reshape(*hidden_second.shape, *(1,) * more), second, first)

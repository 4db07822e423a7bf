"""Heads that read the bytes of the next token off a hidden state; dropped after training.

Section 3.2 of BLD (arXiv:2604.07466), as others describe it: linear layers side by side, one for
each of the first bytes. All of them begin at zero (ours; the paper's beginning is unconfirmed): the
network gets no gradient from bytes before its heads have learned something of them.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.spellings import ALPHABET

NUM_OUTPUTS = 260
"""256 bytes and four special ones (paper). Which four is unconfirmed: here the end, and three that
are never asked for."""

HeadForm = Literal["parallel", "autoregressive"]


class ParallelHeads(nn.Module):
    """A linear layer for each byte, that sees none of the others.

    Of a byte after the first it can say no more than the mean over all that may come before it.
    """

    def __init__(self, width: int, num_bytes: int) -> None:
        """Take the width of hidden states, and the number of bytes."""
        super().__init__()
        self.num_bytes = num_bytes
        self.layers = _silent(nn.Linear(width, num_bytes * NUM_OUTPUTS))

    def forward(self, hidden: Tensor, observed: Tensor) -> Tensor:
        """Return logits ``[N, J, NUM_OUTPUTS]`` from hidden states ``[N, H]``."""
        found: Tensor = self.layers(hidden.to(self.layers.weight.dtype))
        return found.reshape(len(hidden), self.num_bytes, NUM_OUTPUTS)


class AutoregressiveHeads(nn.Module):
    """A layer of ``inner`` channels that sees the bytes before the one it predicts (ours)."""

    def __init__(self, width: int, num_bytes: int, inner: int) -> None:
        """Take the width of hidden states, the number of bytes, and that of the layer."""
        super().__init__()
        self.num_bytes = num_bytes
        self.state = nn.Linear(width, inner)
        self.place = nn.Parameter(torch.zeros(num_bytes, inner))
        self.before = nn.Embedding(num_bytes * ALPHABET, inner)
        self.outputs = _silent(nn.Linear(inner, NUM_OUTPUTS))

    def forward(self, hidden: Tensor, observed: Tensor) -> Tensor:
        """Return logits ``[N, J, NUM_OUTPUTS]`` from hidden states ``[N, H]``.

        Args:
            hidden: Hidden states.
            observed: The bytes ``[N, J]``; each prediction sees those before it.
        """
        places = ALPHABET * torch.arange(self.num_bytes, device=observed.device)
        spelled = self.before(observed + places)  # [N, J, inner]
        past = nn.functional.pad(spelled[:, :-1].cumsum(1), (0, 0, 1, 0))
        state = self.state(hidden.to(self.state.weight.dtype))[:, None]
        found: Tensor = self.outputs(nn.functional.silu(state + self.place + past))
        return found


def _silent(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def byte_heads(form: HeadForm, width: int, num_bytes: int, inner: int) -> nn.Module:
    """Return heads of a form; ``inner`` is of the autoregressive one."""
    if form == "parallel":
        return ParallelHeads(width, num_bytes)
    return AutoregressiveHeads(width, num_bytes, inner)

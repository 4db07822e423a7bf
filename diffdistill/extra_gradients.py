"""Gradients of what roles learn besides their losses, until a step knows what they are means of."""

from collections import defaultdict

import torch
from torch import Tensor

from diffdistill.roles import Extra, Role


class ExtraGradients:
    """Sums of the gradients of ``Role.extra`` in one optimizer step, apart from those of losses.

    Each is a mean over things of its own number, which is not what a loss is a mean of: only when
    all micro-batches and ranks are counted can the two be added.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, role: Role, extra: Extra) -> None:
        """Back-propagate what a role learns besides; the graph stays for its loss."""
        parameters = role.parameters()
        gradients = torch.autograd.grad(
            extra.value * extra.count, list(parameters.values()), retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        sums = self._sums[role.name]
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] = sums[name] + gradient if name in sums else gradient

    def join(self, role: Role, factor: float) -> None:
        """Add the sums times ``factor`` to the gradients of a role's losses, and forget them."""
        sums = self._sums.pop(role.name, {})
        for name, parameter in role.parameters().items():
            if name in sums:
                gradient = sums[name] * factor
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

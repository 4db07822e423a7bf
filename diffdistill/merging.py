"""Several trained models as one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def mean_weights(
    parts: Sequence[Mapping[str, Tensor]], *, adapters: bool = False
) -> dict[str, Tensor]:
    """Return the mean of weights, by name.

    The update of an adapter is B A. The mean of several is one adapter with all ranks side by side,
    its B divided by their number: the mean of the factors would be another update.

    Args:
        parts: The weights of each model.
        adapters: Whether they are factors of LoRA adapters, ``....lora_A.weight`` and
            ``....lora_B.weight``.
    """
    found = {}
    for name in parts[0]:
        values = [part[name].float() for part in parts]
        if not adapters:
            found[name] = torch.stack(values).mean(0)
        elif ".lora_A." in name:
            found[name] = torch.cat(values, dim=0)
        else:
            found[name] = torch.cat(values, dim=1) / len(values)
    return found

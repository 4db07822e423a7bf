"""The optimizers a config can name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from diffdistill.config import TrainSettings
from diffdistill.errors import MissingExtra


def make_optimizer(
    settings: TrainSettings, parameters: Mapping[str, nn.Parameter], lr: float
) -> Optimizer:
    """Return the optimizer of one role.

    Raises:
        MissingExtra: If an 8-bit optimizer is asked for and bitsandbytes is not installed.
    """
    options: dict[str, Any] = {
        "lr": lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        # the fused kernel takes shards or whole tensors, not both (a head beside a sharded network)
        kinds = {isinstance(parameter, DTensor) for parameter in parameters.values()}
        return torch.optim.AdamW(list(parameters.values()), fused=len(kinds) == 1, **options)
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtra(
            "bitsandbytes", f"train.optimizer {settings.optimizer!r}", "quantize"
        ) from None
    paged = settings.optimizer == "paged-adamw8bit"
    cls = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return cls(list(parameters.values()), **options)

"""The optimizers a config can name."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from diffdistill.config import TrainSettings
from diffdistill.errors import MissingExtra
from diffdistill.roles import Role


def make_optimizer(settings: TrainSettings, role: Role) -> Optimizer:
    """Return the optimizer of one role; each group holds its learning rate as ``initial_lr`` too.

    Raises:
        MissingExtra: If an 8-bit optimizer is asked for and bitsandbytes is not installed.
    """
    groups = parameter_groups(settings, role)
    options: dict[str, Any] = {
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        # the fused kernel takes shards or whole tensors, not both (a head beside a sharded network)
        kinds = {isinstance(parameter, DTensor) for parameter in role.parameters().values()}
        return torch.optim.AdamW(groups, fused=len(kinds) == 1, **options)
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtra(
            "bitsandbytes", f"train.optimizer {settings.optimizer!r}", "quantize"
        ) from None
    paged = settings.optimizer == "paged-adamw8bit"
    cls = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return cls(groups, **options)


def parameter_groups(settings: TrainSettings, role: Role) -> list[dict[str, Any]]:
    """Return what a role trains, by learning rate: its head may have one of its own."""
    lr = settings.lr if role.settings.lr is None else role.settings.lr
    parameters = list(role.parameters().values())
    if role.settings.head_lr is None or role.head is None:
        return [_group(parameters, lr)]
    head = list(role.head.parameters())
    rest = [p for p in parameters if not any(p is own for own in head)]
    return [_group(rest, lr), _group(head, role.settings.head_lr)]


def _group(parameters: list[nn.Parameter], lr: float) -> dict[str, Any]:
    return {"params": parameters, "lr": lr, "initial_lr": lr}

"""ShadowPEFT (arXiv:2604.19254): a small network beside a frozen one, whose state rides along.

A shadow is on the body of a causal LM of transformers: the first state s0 is what a small copy of
the body makes of the same embeddings; at each block the difference to it is injected, and the state
is updated. Several adapters may share one network, and a shadow may stand alone.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import ShadowConfig
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from diffdistill.caches import cache_argument
from diffdistill.errors import UserError
from diffdistill.shadow_tuner import PaperShadow, Shadow

Variant = Literal["peft", "paper"]

CONTAINERS = ("shadow_backbone", "shadow_norm")
"""Modules of the tuner with weights, which the network holds too."""


@dataclass(kw_only=True)
class ShadowSettings:
    """How a shadow is built, and how it learns to stand alone.

    Attributes:
        variant: ``peft`` is that of peft 0.21; ``paper`` is that of the authors' code: no injection
            into the first block, a layer norm before the update, which has SiLU and no bias, and
            dropout behind the first projection instead of before it.
        rank: Rank of the injection. None is 8 for ``peft`` and 16 for ``paper``, their defaults.
        update_size: Width within the update. None is the rank for ``peft`` and 10 for ``paper``.
        strength: What is injected is multiplied with this (alpha).
        dropout: Dropout of the injection, and for ``paper`` of the update.
        num_layers: Blocks of the shadow's own network.
        num_heads: Its attention heads; None takes the base's.
        intermediate_size: Width of its MLPs; None takes the base's.
        auxiliary: What the shadow alone learns besides: ``tokens`` is cross-entropy at the tokens
            that count (equations 8 and 9); ``attached`` is KL(with the base || alone) on the
            same states, which is ours.
        auxiliary_weight: Weight of that term (lambda); 0 leaves it out, and the shadow cannot then
            be used alone.
    """

    variant: Variant = "peft"
    rank: int | None = None
    update_size: int | None = None
    strength: float = 0.1
    dropout: float = 0.2
    num_layers: int = 1
    num_heads: int | None = None
    intermediate_size: int | None = None
    auxiliary: Literal["tokens", "attached"] = "tokens"
    auxiliary_weight: float = 0.05

    def config(self, targets: list[str]) -> ShadowConfig:
        """Return peft's config of a shadow on the blocks ``targets``."""
        rank = self.rank or (8 if self.variant == "peft" else 16)
        return ShadowConfig(
            target_modules=targets,
            r=rank,
            update_hidden_size=self.update_size or (rank if self.variant == "peft" else 10),
            shadow_alpha=self.strength,
            shadow_dropout=self.dropout,
            shadow_num_hidden_layers=self.num_layers,
            shadow_num_attention_heads=self.num_heads,
            shadow_intermediate_size=self.intermediate_size,
            auxiliary_loss_weight=self.auxiliary_weight,
        )


def shadow_of(network: nn.Module) -> Shadow | None:
    """Return what holds the shadows of ``network``; None where it has none."""
    found: Shadow | None = network.__dict__.get("_diffdistill_shadow")
    return found


def add_shadow(network: nn.Module, name: str, settings: ShadowSettings, *, seed: int = 0) -> int:
    """Add a float32 shadow to a causal LM in place; return how many blocks it reaches.

    It injects nothing at first, so the network equals the base.

    Args:
        network: A causal LM of transformers, whose own parameters are frozen.
        name: The adapter's name.
        settings: How it is built.
        seed: Seed of the initialization.

    Raises:
        UserError: If the network has a shadow of the other variant, no blocks to put one beside, or
            heads that do not go with the number of its own.
    """
    body: Any = network.base_model
    network.requires_grad_(False)
    tuner, paper = shadow_of(network), settings.variant == "paper"
    config = settings.config(_blocks(body)[int(paper) :])
    shared = getattr(body.config, "num_key_value_heads", None) or 1
    if (settings.num_heads or shared) % shared:
        raise UserError(
            f"shadow.num_heads must be a multiple of the base's {shared} key-value heads, not "
            f"{settings.num_heads}"
        )
    if tuner is not None and isinstance(tuner, PaperShadow) != paper:
        raise UserError("shadows of one base must be of one variant: peft or paper")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if tuner is None:
            tuner = (PaperShadow if paper else Shadow)(body, config, name)
            _hold(network, body, tuner)
        else:
            tuner.peft_config[name] = config
            tuner._pre_injection_hook(body, config, name)
            tuner.inject_adapter(body, name)
    _finish(network, tuner, name)
    return len(config.target_modules)


def _blocks(body: Any) -> list[str]:
    """Return the names of the blocks of a body, in order."""
    count = body.config.num_hidden_layers
    for name, module in body.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{index}" for index in range(count)]
    raise UserError(f"{type(body).__name__} has no list of {count} blocks to put a shadow beside")


def _hold(network: nn.Module, body: Any, tuner: Shadow) -> None:
    """Let the network hold the tuner's weights, and the body return s0 where it acts alone."""
    network.__dict__["_diffdistill_shadow"] = tuner  # not a child: the body is a child of it
    for container in CONTAINERS:
        if hasattr(tuner, container):
            setattr(network, container, getattr(tuner, container))
    attached, name = body.forward, cache_argument(body)

    @functools.wraps(attached)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (tuner.alone and tuner.state is not None):
            return attached(*args, **kwargs)
        kept = kwargs.get(name) if kwargs.get("use_cache") else None
        state = tuner.state
        if not torch.is_grad_enabled():  # the network's own head, which does not cast, may be next
            state = state.to(body.get_input_embeddings().weight.dtype)
        return BaseModelOutputWithPast(last_hidden_state=state, **{name: kept})

    body.forward = forward


def _finish(network: nn.Module, tuner: Shadow, name: str) -> None:
    device = next(network.parameters()).device
    for container in CONTAINERS:
        if hasattr(tuner, container):
            getattr(tuner, container)[name].to(device)
    for key, parameter in network.named_parameters():
        if is_shadow(key) and f".{name}." in key:
            parameter.data = parameter.data.float()
    training = network.training
    for module in tuner.shadow_backbone[name].modules():
        module.training = training


def is_shadow(key: str) -> bool:
    """Return whether a parameter of a network, by its name, is of a shadow."""
    return ".shadow_" in f".{key}"


@contextmanager
def alone(network: nn.Module, *, again: bool = False) -> Iterator[None]:
    """Let the active shadow of ``network`` stand alone within the block.

    Args:
        network: A network with a shadow.
        again: Whether it has seen the same input in the last call, with the base.
    """
    tuner = shadow_of(network)
    assert tuner is not None, "the network has no shadow"
    before = tuner.alone, tuner.again
    tuner.alone, tuner.again = True, again
    try:
        yield
    finally:
        tuner.alone, tuner.again = before


def forget(network: nn.Module) -> None:
    """Drop the state of the last call, and the graph that it holds."""
    tuner = shadow_of(network)
    if tuner is not None:
        tuner._seed_shadow_state = None


def standalone(network: nn.Module, name: str) -> tuple[Any, dict[str, Tensor]]:
    """Return config and weights of a shadow as a causal LM of the same class, without its base.

    It has the base's embeddings and output head, which are those it was trained with.
    """
    described: Any = network
    tuner = shadow_of(network)
    assert tuner is not None, "the network has no shadow"
    backbone = tuner.shadow_backbone[name]
    prefix = described.base_model_prefix
    state = {f"{prefix}.{key}": value for key, value in backbone.state_dict().items()}
    own = {
        id(part) for part in (described.get_input_embeddings(), described.get_output_embeddings())
    }
    for key, module in network.named_modules():
        if id(module) in own:
            state |= {f"{key}.{k}": v for k, v in module.state_dict().items()}
    return backbone.config, state

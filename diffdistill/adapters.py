"""Adapters of one network, any of which can be the active one during a call.

The only module that imports peft, with those of shadows. Roles that are adapters of one frozen base
share its memory.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.shadow import ShadowSettings, is_shadow, shadow_of


def tuner_layers(network: nn.Module) -> list[Any]:
    """Return the layers of ``network`` that carry adapters, and what holds its shadows."""
    layers: list[Any] = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    shadow = shadow_of(network)
    return layers if shadow is None else [*layers, shadow]


def is_adapter_key(key: str) -> bool:
    """Return whether a weight of a network, by its name, is of an adapter."""
    return ".lora_" in key or is_shadow(key)


def add_lora(
    network: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float = 0.0,
    dora: bool = False,
    seed: int = 0,
) -> int:
    """Add a float32 LoRA adapter to ``network`` in place; return how many layers it reaches.

    A is Gaussian and B is zero, so the adapted network equals the base at first.

    Args:
        network: The base, whose own parameters are frozen.
        name: The adapter's name.
        rank: Rank of the update.
        alpha: The update is scaled with ``alpha / rank``.
        targets: Suffixes of module names; each must match at least one module.
        dropout: Dropout of the adapter's input, in [0, 1).
        dora: Train the length of each row of the weights beside its direction (DoRA,
            arXiv:2402.09353).
        seed: Seed of the initialization.

    Raises:
        UserError: If a target matches no linear layer.
    """
    linear = [
        name.removesuffix(".base_layer")
        for name, module in network.named_modules()
        if _is_linear(module) and not is_adapter_key(name)
    ]
    for target in targets:
        if not any(f".{module}".endswith(f".{target}") for module in linear):
            known = ", ".join(sorted({_suffix(module) for module in linear}))
            raise UserError(f"LoRA target {target!r} matches no layer; suffixes here: {known}")
    matched = [n for n in linear if any(f".{n}".endswith(f".{t}") for t in targets)]
    network.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # Whole names: a suffix may also end the name of a container, which peft refuses.
        target_modules="|".join(re.escape(name) for name in matched),
        init_lora_weights="gaussian",
        use_dora=dora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=name)
    parameters = adapter_parameters(network, name)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return sum(".lora_A." in key for key in parameters)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer)


def _suffix(module: str) -> str:
    """Return the last names of a module path, without block numbers."""
    parts = module.split(".")
    while parts and parts[0] != "" and any(part.isdigit() for part in parts[:-1]):
        parts = parts[1:]
    return ".".join(parts)


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one adapter, under names without the adapter's own."""
    own = re.compile(rf"\b((?:lora|shadow)_\w+\.){re.escape(name)}\.")
    return {
        own.sub(r"\1", key, count=1).replace(".base_layer.", "."): parameter
        for key, parameter in network.named_parameters()
        if own.search(key)
    }


def save_lora(
    factors: Mapping[str, Tensor],
    folder: Path,
    *,
    base: str | None,
    rank: int,
    alpha: float,
    dora: bool = False,
) -> None:
    """Write a LoRA of a causal language model as peft does.

    Args:
        factors: By name, ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``.
        folder: Where to write.
        base: Where its base is; None leaves it out.
        rank: Rank of the update.
        alpha: The update is scaled with ``alpha / rank``.
        dora: Whether it is a DoRA, with ``<module>.lora_magnitude_vector.weight``.
    """
    modules = sorted({name.partition(".lora_")[0] for name in factors})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
        use_dora=dora,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    state = {
        f"base_model.model.{name.replace('magnitude_vector.weight', 'magnitude_vector')}": value
        for name, value in factors.items()
    }
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_shadow(
    weights: Mapping[str, Tensor], folder: Path, *, base: str | None, settings: ShadowSettings
) -> None:
    """Write a shadow of a causal language model as peft does.

    Args:
        weights: By name, as in ``adapter_parameters``.
        folder: Where to write.
        base: Where its base is; None leaves it out.
        settings: How it was built.

    Raises:
        UserError: If it is of the authors' form, which peft does not have.
    """
    if settings.variant != "peft":
        raise UserError(
            "layout shadow is what peft reads, and it has no variant: paper: export the shadow "
            "alone as layout detached, or train variant: peft"
        )
    blocks = sorted({name.partition(".shadow_")[0] for name in weights if ".shadow_" in name})
    config = settings.config(blocks)
    config.base_model_name_or_path, config.task_type = base, "CAUSAL_LM"
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    state = {_name_in_peft(name): value.contiguous() for name, value in weights.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _name_in_peft(name: str) -> str:
    """Return a shadow's weight under peft's name, with the adapter's after its container."""
    if name.startswith("shadow_"):
        container, _, rest = name.partition(".")
        return f"base_model.{container}.default.{rest}"
    block, _, rest = name.partition(".shadow_")
    part, _, weight = rest.partition(".")
    return f"base_model.model.{block}.shadow_{part}.default.{weight}"


@contextmanager
def active(layers: Sequence[Any], name: str | None) -> Iterator[None]:
    """Let ``name`` be the active adapter of ``layers`` within the block; None turns all off.

    peft's own ``set_adapter`` also flips ``requires_grad``, which would take a role's
    gradient away while its graph waits to be back-propagated.
    """
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [] if name is None else [name]
    try:
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer._active_adapter = previous

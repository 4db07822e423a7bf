"""Trained weights in the forms that other programs read: diffusers, ComfyUI, single files.

A LoRA is written with its scale multiplied in (alpha equals rank), because not every reader
looks at the alpha of every format.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffdistill.adapters import is_adapter_key
from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.latent import LatentFamily
from diffdistill.pipelines.original_keys import (
    Place,
    klein_place,
    original_lora,
    original_state,
    wan_place,
    z_image_place,
)
from diffdistill.shadow import shadow_of
from diffdistill.shadow_tuner import NOT_MERGED

PLACES: dict[str, Callable[[str], Place]] = {
    "Flux2Transformer2DModel": klein_place,
    "WanTransformer3DModel": wan_place,
    "ZImageTransformer2DModel": z_image_place,
}
ORIGINAL_LORA = ("Flux2Transformer2DModel", "WanTransformer3DModel")
"""Models whose ComfyUI LoRA must be in the original layout; others are read in either."""


def export_lora(
    family: LatentFamily,
    adapter: Mapping[str, Tensor],
    folder: Path,
    *,
    rank: int,
    alpha: float,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a LoRA for ``pipeline.load_lora_weights(folder)``; return the file.

    Args:
        family: The model family.
        adapter: Factors by name, ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``.
        folder: Where to write.
        rank: Rank of the adapter.
        alpha: The update is scaled with ``alpha / rank``.
        dtype: Type of the stored weights; None keeps it.

    Raises:
        UserError: If ``folder`` is not empty.
    """
    check_empty(folder)
    state = _scaled(adapter, alpha / rank, dtype)
    family.pipeline_class.save_lora_weights(str(folder), transformer_lora_layers=state)
    return folder / "pytorch_lora_weights.safetensors"


def export_comfy_lora(
    family: LatentFamily,
    adapter: Mapping[str, Tensor],
    file: Path,
    *,
    rank: int,
    alpha: float,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a LoRA as one file with the keys ComfyUI reads (see ``export_lora``); return it."""
    state = _scaled(adapter, alpha / rank, dtype)
    kind = family.transformer_class.__name__
    if kind in ORIGINAL_LORA:
        state = original_lora(state, PLACES[kind])
    state = {f"diffusion_model.{key}": value.contiguous() for key, value in state.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={"format": "pt"})
    return file


def _scaled(
    adapter: Mapping[str, Tensor], scale: float, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return contiguous CPU copies with the scale in the up factors."""
    scaled = {}
    for key, value in adapter.items():
        if ".lora_" in key:
            factor = scale if ".lora_B." in key else 1.0
            product = value.detach().cpu().float() * factor
            scaled[key] = product.to(dtype or value.dtype).contiguous()
    return scaled


def export_pipeline(
    family: LatentFamily,
    network: nn.Module,
    folder: Path,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a whole pipeline: the trained transformer, and copies of the other parts.

    Args:
        family: The model family; its checkpoint gives the other parts.
        network: The transformer.
        folder: Where to write; must not be the checkpoint itself.
        adapter: Name of the adapter to merge into the weights; None leaves all adapters out.
        dtype: Type of the stored weights; None takes the family's.

    Raises:
        UserError: If the base is quantized, or ``folder`` is not empty.
    """
    check_empty(folder)
    state = merged_state(network, adapter, dtype or family.weights_dtype)
    index = loading.read_config(loading.locate(family.path, "", family.revision), INDEX)
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and name != "transformer":
            shutil.copytree(family.part(name), folder / name)
    shutil.copy(loading.locate(family.path, "", family.revision) / INDEX, folder / INDEX)
    with torch.device("meta"):
        plain = family.transformer_class.from_config(_plain_config(network))
    plain.load_state_dict(state, assign=True)
    plain.save_pretrained(str(folder / "transformer"))
    return folder


INDEX = "model_index.json"


def _plain_config(network: Any) -> dict[str, Any]:
    """Return a network's config without how and from where it was loaded on this machine."""
    local = ("quantization_config", "_name_or_path")
    return {k: v for k, v in network.config.items() if k not in local}


def export_single_file(
    family: LatentFamily,
    network: nn.Module,
    file: Path,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the transformer as one file in the original layout (see ``export_pipeline``)."""
    state = merged_state(network, adapter, dtype or family.weights_dtype)
    state = original_state(state, PLACES[family.transformer_class.__name__])
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, file, metadata={"format": "pt"})
    return file


def check_empty(folder: Path) -> None:
    """Refuse a folder with something in it.

    Raises:
        UserError: If there is.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: export into a new folder")


def merged_state(network: nn.Module, adapter: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of ``network`` on the CPU under plain names, an adapter merged in.

    Raises:
        UserError: If the weights are quantized, or the adapter is a shadow.
    """
    shadow = shadow_of(network)
    if adapter is not None and shadow is not None and adapter in shadow.shadow_backbone:
        raise UserError(NOT_MERGED)
    merged = {
        key.replace(".base_layer.", "."): value.detach()
        for key, value in network.state_dict().items()
        if not is_adapter_key(key)
    }
    if any(value.element_size() < 2 for value in merged.values()):
        raise UserError("the base is quantized: export with family.quantize=none, or the LoRA")
    if adapter is not None:
        for name, module in network.named_modules():
            if hasattr(module, "get_delta_weight") and adapter in module.lora_A:
                key = f"{name}.weight".replace(".base_layer.", ".")
                whole = merged[key].float() + module.get_delta_weight(adapter)
                if adapter in module.lora_magnitude_vector:  # DoRA
                    length = module.lora_magnitude_vector[adapter].weight
                    whole *= (length / whole.norm(dim=1))[:, None]
                merged[key] = whole
    return {key: value.to("cpu", dtype) for key, value in merged.items()}

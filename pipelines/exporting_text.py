"""Trained text models as folders that transformers and peft read."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.adapters import save_lora, save_shadow
from diffdistill.pipelines import loading
from diffdistill.pipelines.exporting import check_empty, merged_state
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.network_family import NetworkFamily
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.role_settings import RoleSettings
from diffdistill.shadow import standalone


def export_language_model(
    family: NetworkFamily, network: nn.Module, folder: Path, *, adapter: str | None = None
) -> Path:
    """Write a text model for transformers, with its tokenizer or processor; return the folder.

    The tokenizer has the chat template with which it was trained. Of masked diffusion, it has the
    mask token too, and ``config.json`` says how the model is to be called: ``is_causal`` false,
    ``mask_token_id``, and ``block_size``, the tokens that are denoised together.

    Args:
        family: The model family.
        network: The network.
        folder: Where to write.
        adapter: Name of the adapter to merge into the weights; None leaves all adapters out.

    Raises:
        UserError: If the base is quantized, or ``folder`` is not empty.
    """
    described: Any = network
    state = merged_state(network, adapter, family.weights_dtype)
    return _write_model(family, described, described.config, state, folder)


def export_detached(
    family: NetworkFamily, network: nn.Module, folder: Path, *, adapter: str
) -> Path:
    """Write a shadow without its base, as ``export_language_model`` does; return the folder.

    It is a causal LM of the base's class, with few blocks, the base's embeddings and output head.
    It is another predictor than the shadow with its base.

    Raises:
        UserError: If ``folder`` is not empty.
    """
    described: Any = network
    config, weights = standalone(network, adapter)
    state = {k: v.detach().to("cpu", family.weights_dtype) for k, v in weights.items()}
    return _write_model(family, described, config, state, folder)


def _write_model(
    family: NetworkFamily, described: Any, config: Any, state: dict[str, Tensor], folder: Path
) -> Path:
    """Write weights as a model of the class of ``described``, with the family's tokenizer."""
    check_empty(folder)
    config = type(described.config).from_dict(_plain_config(config))
    if isinstance(family, LanguageFamily):
        config.is_causal = False
        config.mask_token_id = family.mask_id
        config.block_size = family.block
    config.dtype = family.weights_dtype
    with torch.device("meta"):
        plain: Any = type(described)(config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = described.generation_config
    with loading.explained(f"write {folder}"):
        plain.save_pretrained(str(folder))
        _save_tokenizer(family, folder)
        for code in sorted(family.folder.glob("*.py")):
            shutil.copy(code, folder / code.name)
    return folder


def _plain_config(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    return {k: v for k, v in values.items() if k != "quantization_config"}


def _save_tokenizer(family: TokenFamily, folder: Path) -> None:
    tokenizer = family.tokenizer
    if isinstance(family, LanguageFamily) and tokenizer.mask_token is None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(family.mask_id)
    family.save_reader(folder)


def export_adapter(
    family: TokenFamily,
    adapter: Mapping[str, Tensor],
    folder: Path,
    settings: RoleSettings,
) -> Path:
    """Write an adapter for ``peft.PeftModel.from_pretrained(base, folder)``; return the folder.

    The tokenizer is beside it. The base is the family's checkpoint; it is named where it is on the
    hub, and not where it is a folder of this machine.

    Args:
        family: The model family.
        adapter: Weights by name, such as ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``.
        folder: Where to write.
        settings: Of the role whose adapter it is.

    Raises:
        UserError: If ``folder`` is not empty, or peft has no such shadow.
    """
    check_empty(folder)
    with loading.explained(f"write {folder}"):
        base = None if Path(family.path).is_dir() else family.path
        if settings.shadow is not None:
            save_shadow(adapter, folder, base=base, settings=settings.shadow)
        else:
            rank, alpha, dora = settings.rank, settings.alpha, settings.dora
            save_lora(adapter, folder, base=base, rank=rank, alpha=alpha, dora=dora)
        _save_tokenizer(family, folder)
    return folder

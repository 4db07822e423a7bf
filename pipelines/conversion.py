"""Autoregressive checkpoints made into diffusion ones, for the families ``bd3lm`` and ``mdlm``.

The weights stay as they are. What changes: ``is_causal`` in the config, a mask token in the
tokenizer, and its embedding. The result predicts nothing of use until it is trained.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.block_diffusion import (
    as_mask,
    attention_of,
    causal_mask,
    denoise,
    full_mask,
    positions_of,
    project,
)
from diffdistill.pipelines.block_sampling import Past
from diffdistill.projection import dense

MASK_TOKEN = "<|mask|>"


def to_block_diffusion(
    source: str,
    target: Path,
    *,
    mask_token: str = MASK_TOKEN,
    dtype: loading.DtypeName | None = None,
    revision: str | None = None,
) -> Path:
    """Write an autoregressive LM as a block-diffusion one; return its folder.

    The folder is what transformers writes: ``config.json`` with ``is_causal`` false and
    ``mask_token_id``, safetensors, the tokenizer with its chat template, and the license that lay
    beside the source. It opens as the same class as before.

    Args:
        source: A folder, or a hub id.
        target: Where to write; must not be there yet, or be empty.
        mask_token: Spelling of the mask token, where the tokenizer has none. A new token takes a
            spare row of the embeddings, or a new one, set to the mean of the known rows.
        dtype: Type of the weights; None keeps it.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: If the target is in use, or the source cannot be converted.
    """
    return _convert(source, target, mask_token, dtype, revision, blocks=True)


def to_masked_diffusion(
    source: str,
    target: Path,
    *,
    mask_token: str = MASK_TOKEN,
    dtype: loading.DtypeName | None = None,
    revision: str | None = None,
) -> Path:
    """Write an autoregressive LM as one of masked diffusion of whole rows; return its folder.

    As ``to_block_diffusion``, of a network that need take no cache.
    """
    return _convert(source, target, mask_token, dtype, revision, blocks=False)


def _convert(
    source: str,
    target: Path,
    mask_token: str,
    dtype: loading.DtypeName | None,
    revision: str | None,
    *,
    blocks: bool,
) -> Path:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is in use: give a folder that is not there yet")
    folder = loading.locate(source, "", revision)
    check_convertible(loading.read_config(folder), source)
    tokenizer = loading.load_tokenizer(folder, trust_remote_code=False)
    if tokenizer.eos_token is None:
        raise UserError(f"{source}: the tokenizer has no end token (eos_token), and answers end")
    kind: Any = "auto" if dtype is None else loading.resolve_dtype(dtype, torch.device("cpu"))
    with loading.explained(f"load the language model in {folder}"):
        network: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=kind, use_safetensors=True, attn_implementation="sdpa"
        )
    network.eval()
    network.config.is_causal = False
    check_network(network, source, blocks=blocks)
    network.config.mask_token_id = add_mask_token(network, tokenizer, mask_token)
    _write(network, tokenizer, target, terms=[folder / name for name in loading.LICENSES])
    return target


def check_convertible(config: dict[str, Any], source: str) -> None:
    """Refuse a config that says that the network is no plain causal LM.

    Raises:
        UserError: If it does.
    """
    kinds = config.get("architectures") or []
    layers = set(config.get("layer_types") or [])
    if not any(kind.endswith("ForCausalLM") for kind in kinds):
        found = ", ".join(kinds) or "no architecture"
        raise UserError(f"{source}: needs a causal language model (...ForCausalLM), found {found}")
    if config.get("auto_map"):
        raise UserError(f"{source}: its code is not part of transformers, which is not supported")
    if config.get("quantization_config"):
        raise UserError(f"{source}: its weights are quantized; convert the original ones")
    if config.get("is_causal") is False:
        raise UserError(f"{source}: already sees in both directions (is_causal is false)")
    slides = config.get("use_sliding_window", config.get("sliding_window") is not None)
    if layers - {"full_attention", "sliding_attention"}:
        other = ", ".join(sorted(layers - {"full_attention", "sliding_attention"}))
        raise UserError(f"{source}: its {other} layers take no block mask")
    if "sliding_attention" in layers or (slides and config.get("sliding_window")):
        raise UserError(f"{source}: its attention has a sliding window, which is not supported")


@torch.no_grad()
def check_network(network: nn.Module, source: str, *, blocks: bool = True) -> None:
    """Refuse a network that does not do what masks and positions ask for, and with blocks a cache.

    Raises:
        UserError: If it does not.
    """
    refused = UserError(
        f"{source}: {type(network).__name__} does not follow 4-D attention masks, positions"
        f"{' and a cache' if blocks else ''}, which diffusion needs"
    )
    none = torch.zeros(1, dtype=torch.long)
    tokens = torch.arange(8)[None] + 1
    changed = tokens.clone()
    changed[0, -1] = 0
    try:
        attention, dtype = attention_of(network), getattr(network, "dtype", torch.float32)
        ahead, back = (
            dense(project(network, x, causal_mask(none, 0, 8, 1), positions_of(none, 0, 8)))
            for x in (tokens, changed)
        )
        wide, narrow = (
            dense(project(network, x, as_mask(full_mask(none, 8), attention, dtype),
                          positions_of(none, 0, 8)))
            for x in (tokens, changed)
        )  # fmt: skip
        apart = _cached_apart(network, tokens, changed) if blocks else 0.0
    except UserError:
        raise
    except Exception as error:
        raise refused from error
    scale = ahead.std() * 0.02
    causal = (ahead - back)[:, :-1].abs().max() <= scale
    both_ways = (wide - narrow)[:, 0].abs().max() > 0.0
    if not (causal and both_ways and apart <= 5.0 * scale):
        raise refused


def _cached_apart(network: nn.Module, tokens: Tensor, changed: Tensor) -> float:
    """Return how far the predictions of a block on a cache are from those of the training call."""
    none = torch.zeros(1, dtype=torch.long)
    trained = dense(denoise(network, changed, tokens, block=4))[:, 4:]
    past = Past(network, 4, none, attention_of(network))
    past.append(tokens[:, :4])
    return float((trained - past.logits(changed[:, 4:])).abs().max())


@torch.no_grad()
def add_mask_token(network: Any, tokenizer: Any, mask_token: str = MASK_TOKEN) -> int:
    """Return the id of the mask token, after adding it where there is none.

    Raises:
        UserError: If ``mask_token`` is an ordinary piece of text to the tokenizer.
    """
    if tokenizer.mask_token is not None:
        known: int = tokenizer.mask_token_id
        return known
    num_known = len(tokenizer)
    present = mask_token in tokenizer.get_vocab()
    if present and mask_token not in tokenizer.get_added_vocab():
        raise UserError(f"mask_token {mask_token!r} is an ordinary token: choose another spelling")
    tokenizer.add_special_tokens({"mask_token": mask_token})
    mask_id: int = tokenizer.mask_token_id
    if mask_id >= network.get_input_embeddings().num_embeddings:
        network.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    if not present:
        tables = [network.get_input_embeddings(), network.get_output_embeddings()]
        for weight in {id(table.weight): table.weight for table in tables}.values():
            weight[mask_id] = weight[:num_known].float().mean(0).to(weight.dtype)
    return mask_id


def _write(network: Any, tokenizer: Any, target: Path, terms: Iterable[Path]) -> None:
    aside = target.with_name(f"{target.name}.writing-{os.getpid()}")
    with loading.explained(f"write {target}"):
        aside.mkdir(parents=True)
        try:
            network.save_pretrained(str(aside))
            tokenizer.save_pretrained(str(aside))
            for file in filter(Path.is_file, terms):
                shutil.copyfile(file, aside / file.name)
            if target.exists():
                target.rmdir()
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

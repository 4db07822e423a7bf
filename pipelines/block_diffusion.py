"""Any causal LM of transformers run as block diffusion: layout, masks and the training call.

BD3LM (arXiv:2503.09573): a block of tokens is denoised given the clean blocks before it. The
network is the stock one; who sees whom is a 4-D mask, which transformers passes on as it is, and
``is_causal=False`` in its config keeps calls without a mask from being causal.

Layout, the same in training and in sampling: blocks are counted from the start of the answer, so
that an answer never begins within a block. A prompt is therefore padded on its left to a block
boundary; no token sees the padding, and positions do not count it, so that what a row computes
does not depend on it. The answer is followed by end tokens, which are learned, up to the end of
its block; what a batch needs beyond that is padding that no earlier block sees.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from diffdistill.caches import cache_argument
from diffdistill.errors import UserError
from diffdistill.noising import TokenLogprob
from diffdistill.pipelines.sharding import last_hidden
from diffdistill.projection import Projection, token_logprob, without

Attention = Literal["sdpa", "eager", "flex_attention"]
Order = Literal["noised-clean", "clean-noised"]
Mask = Tensor | BlockMask

SPARSE_TILE = 128


def lay_out_prompts(
    prompts: Sequence[Sequence[int]], *, block: int, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return prompts ``[B, P]`` padded on the left to the same block boundary, and the pads.

    Prompts of fewer blocks get whole blocks of padding, which nobody sees either.
    """
    total = max(-(-len(prompt) // block) * block for prompt in prompts)
    rows = [[pad_id] * (total - len(prompt)) + [*prompt] for prompt in prompts]
    tokens = torch.tensor(rows, dtype=torch.long, device=device).reshape(len(rows), total)
    pads = torch.tensor([total - len(prompt) for prompt in prompts], device=device)
    return tokens, pads


def positions_of(pads: Tensor, start: int, stop: int) -> Tensor:
    """Return the rotary positions ``[B, stop - start]`` of a row's tokens, without its padding."""
    places = torch.arange(start, stop, device=pads.device)
    return (places - pads[:, None]).clamp(min=0)


def sees(
    query_block: Tensor, query_noised: Tensor, key_block: Tensor, key_noised: Tensor
) -> Tensor:
    """Return whether a query may see a key: the mask of BD3LM.

    Clean blocks before its own, and its own block of its own copy (noised or clean).
    """
    earlier = ~key_noised & (key_block < query_block)
    return earlier | ((query_block == key_block) & (query_noised == key_noised))


def training_mask(
    length: int,
    block: int,
    *,
    pads: Tensor | None = None,
    order: Order = "noised-clean",
    attention: Attention = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Mask:
    """Return who sees whom among 2 L tokens, the noised and the clean copy of a row.

    ``[1, 1, 2 L, 2 L]``, or ``[B, 1, 2 L, 2 L]`` where rows have padding on the left. bool for
    sdpa; additive in ``dtype`` for eager, which would add a bool mask as 0 and 1; a
    ``BlockMask`` for flex. Masks without padding are cached. Every token sees itself, padding
    too: a row of -inf alone would be NaN.

    Args:
        length: L, the tokens of one copy.
        block: Tokens in a block.
        pads: Padding tokens on the left of each row, ``[B]``.
        order: Which copy comes first.
        attention: The network's attention, see ``attention_of``.
        dtype: The network's type.
        device: Where the mask is.

    Raises:
        UserError: If flex cannot be trusted with the length. With other ones, torch's kernels read
            past the keys on the CPU, and gradients are NaN on CUDA (pytorch issue 153799).
    """
    where = str(device)
    if attention == "flex_attention" and 2 * length % SPARSE_TILE:
        raise UserError(
            f"flex_attention needs rows of a multiple of {SPARSE_TILE // 2} tokens, not {length}: "
            "set such a length, or use attention sdpa"
        )
    if pads is None or not pads.any():
        return _shared_mask(length, block, order, attention, dtype, where)
    if attention == "flex_attention":
        return _flex_mask(length, block, order, pads, where)
    return as_mask(_dense_mask(length, block, order, pads, where), attention, dtype)


@lru_cache(maxsize=4)
def _shared_mask(
    length: int, block: int, order: Order, attention: Attention, dtype: torch.dtype, device: str
) -> Mask:
    if attention == "flex_attention":
        return _flex_mask(length, block, order, None, device)
    return as_mask(_dense_mask(length, block, order, None, device), attention, dtype)


def _dense_mask(length: int, block: int, order: Order, pads: Tensor | None, device: str) -> Tensor:
    places = torch.arange(2 * length, device=device)
    within = partial(_within, length, block, order)
    allowed = within(places[:, None], places)[None]
    if pads is not None:
        hidden = places % length < pads[:, None].to(device)
        allowed = allowed & (~hidden[:, None] | torch.eye(2 * length, device=device).bool())
    return allowed[:, None]


def _within(length: int, block: int, order: Order, query: Tensor, key: Tensor) -> Tensor:
    """Return ``sees`` for places of the two copies in a row."""
    noised_first = order == "noised-clean"
    return sees(
        query % length // block,
        (query < length) == noised_first,
        key % length // block,
        (key < length) == noised_first,
    )


def _flex_mask(
    length: int, block: int, order: Order, pads: Tensor | None, device: str
) -> BlockMask:
    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = _within(length, block, order, query, key)
        if pads is None:
            return allowed
        return allowed & ((key % length >= pads[row]) | (query == key))

    rows = None if pads is None else len(pads)
    pads = None if pads is None else pads.to(device)
    total = 2 * length
    return create_block_mask(rule, rows, None, total, total, device=device, BLOCK_SIZE=SPARSE_TILE)


def causal_mask(
    pads: Tensor,
    start: int,
    stop: int,
    block: int,
    *,
    attention: Attention = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return who sees whom when the tokens from ``start`` to ``stop`` are called on a cache.

    ``[B, 1, stop - start, stop]``: each sees its block and the blocks before it, without the
    padding. A noised block on a cache of clean ones sees just that.
    """
    query = torch.arange(start, stop, device=pads.device)[:, None]
    key = torch.arange(stop, device=pads.device)
    seen = (key // block <= query // block)[None]
    allowed = seen & ((key >= pads[:, None])[:, None] | (query == key))
    return as_mask(allowed[:, None], attention, dtype)


def full_mask(
    pads: Tensor,
    length: int,
    *,
    attention: Attention = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the mask ``[B, 1, L, L]`` in which all tokens see all but the padding."""
    return causal_mask(pads, 0, length, length, attention=attention, dtype=dtype)


def as_mask(allowed: Tensor, attention: Attention, dtype: torch.dtype) -> Tensor:
    """Return a bool mask in the form that dense attention takes: bool for sdpa, else additive."""
    if attention == "sdpa":
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def attention_of(network: nn.Module) -> Attention:
    """Return which attention a network of transformers uses.

    Raises:
        UserError: If it takes no 4-D mask.
    """
    name: Any = getattr(network.config, "_attn_implementation", "eager")
    if name not in ("sdpa", "eager", "flex_attention"):
        raise UserError(
            f"attention {name!r} takes no block mask: use sdpa, or flex_attention on a GPU"
        )
    chosen: Attention = name
    return chosen


@contextmanager
def dense_attention(network: nn.Module) -> Iterator[Attention]:
    """Let a network with flex attention use sdpa within the block, for short queries."""
    name = attention_of(network)
    if name != "flex_attention":
        yield name
        return
    network.set_attn_implementation("sdpa")  # type: ignore[operator]
    try:
        yield "sdpa"
    finally:
        network.set_attn_implementation(name)  # type: ignore[operator]


def project(
    network: nn.Module, tokens: Tensor, mask: Mask, positions: Tensor, cache: Any = None
) -> Projection:
    """Return the logits of a causal LM at ``tokens`` ``[B, L]``, before its output head.

    With a cache, the keys and values of ``tokens`` are appended to it.

    Args:
        network: A causal LM of transformers.
        tokens: Token ids.
        mask: In the form of the network's attention.
        positions: Rotary positions ``[B, L]``.
        cache: A ``DynamicCache``, or None.

    Raises:
        UserError: If the network's attention cannot be trained where it is.
    """
    if isinstance(mask, BlockMask) and tokens.device.type == "cpu" and torch.is_grad_enabled():
        raise UserError("flex_attention has no backward pass on the CPU: use attention sdpa")
    body: Any = network.base_model
    kwargs = {} if cache is None else {cache_argument(body): cache, "use_cache": True}
    if cache is None:
        kwargs["use_cache"] = False
    kwargs |= {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    return headed(network, last_hidden(network, kwargs))


def headed(network: Any, hidden: Tensor) -> Projection:
    """Return the logits that a network of transformers makes of its last hidden states."""
    head: Any = network.get_output_embeddings()
    config: Any = network.config.get_text_config(decoder=True)
    return Projection(
        hidden,
        head.weight,
        getattr(head, "bias", None),
        logit_scale(config),
        getattr(config, "final_logit_softcapping", None),
    )


def logit_scale(config: Any) -> float:
    """Return what a causal LM multiplies its logits with (Cohere; Granite divides)."""
    return getattr(config, "logit_scale", None) or 1.0 / getattr(config, "logits_scaling", 1.0)


def denoise(
    network: nn.Module,
    noised: Tensor,
    clean: Tensor,
    *,
    block: int,
    pads: Tensor | None = None,
    order: Order = "noised-clean",
) -> Projection:
    """Return the training prediction of the clean tokens, ``[B, L, V]``, from one call.

    The rows are ``[noised ; clean]`` (or the other way around) with the same positions twice.
    The prediction of a noised block is that of sampling it on the clean blocks before.

    Args:
        network: A causal LM of transformers.
        noised: Token ids ``[B, L]``, some of them masks.
        clean: The same without masks.
        block: Tokens in a block.
        pads: Padding tokens on the left of each row, ``[B]``.
        order: Which copy comes first; the prediction is the same.
    """
    length = clean.shape[1]
    mask = training_mask(
        length,
        block,
        pads=pads,
        order=order,
        attention=attention_of(network),
        dtype=network.dtype,  # type: ignore[arg-type]
        device=clean.device,
    )
    skipped = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
    positions = positions_of(skipped if pads is None else pads.to(clean.device), 0, length)
    both = (noised, clean) if order == "noised-clean" else (clean, noised)
    found = project(network, torch.cat(both, 1), mask, positions.repeat(1, 2))
    half = slice(None, length) if order == "noised-clean" else slice(length, None)
    return found._replace(hidden=found.hidden[:, half])


def clean_logprob(
    network: nn.Module,
    clean: Tensor,
    *,
    block: int,
    mask_id: int,
    pads: Tensor | None = None,
    tile_rows: int | None = None,
) -> TokenLogprob:
    """Return the function that ``noising``'s bounds ask for the log-probability of ``clean``.

    The mask token is impossible (SUBS), as in sampling.
    """

    def logprob(noised: Tensor, masked: Tensor) -> Tensor:
        found = denoise(network, noised, clean, block=block, pads=pads)
        return token_logprob(without(found, [mask_id]), clean, mask=masked, tile_rows=tile_rows)

    return logprob


def chat_tokens(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, answer: bool = True
) -> list[int]:
    """Return the token ids of a chat; with ``answer``, it ends where the answer begins."""
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=answer, tokenize=True, return_dict=False
    )
    return ids

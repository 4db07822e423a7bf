"""WeDLM's own call: causal attention over tokens of which those of a block are in a new order.

WeDLM (Tencent, ``finetune/src/masking.py``, ``batch.py``) keeps the causal attention of the LM it
was made from. Within a block, what is known is called first and what is masked last, each with the
rotary position of its place, so that a masked token sees all that is known of its block. Its
prediction is that of its own place; a masked token before it in the block is seen as a mask.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.pipelines.block_diffusion import (
    Attention,
    as_mask,
    attention_of,
    positions_of,
    project,
)
from diffdistill.pipelines.block_sampling import BlockSampler, Past
from diffdistill.projection import Projection, dense


def known_first(masked: Tensor, block: int) -> Tensor:
    """Return the places ``[B, L]`` of a row in the order of its call.

    Block after block; in each the known tokens before the masked ones, both from left to right.

    Args:
        masked: bool ``[B, L]``.
        block: Tokens in a block.
    """
    places = torch.arange(masked.shape[1], device=masked.device)
    return (places // block * 2 + masked).argsort(dim=1, stable=True)


def in_order(values: Tensor, order: Tensor) -> Tensor:
    """Return values ``[B, L]`` or ``[B, L, ...]`` at the places ``order`` ``[B, L]``."""
    index = order.reshape(*order.shape, *(1,) * (values.ndim - 2))
    return values.gather(1, index.expand(*order.shape, *values.shape[2:]))


def reordered_mask(
    length: int, block: int, *, pads: Tensor, attention: Attention = "sdpa", dtype: torch.dtype
) -> Tensor:
    """Return who sees whom in ``[clean ; noised]``, the noised copy in the order of its call.

    ``[B, 1, 2 L, 2 L]``. Clean tokens see what is before them, noised ones the clean blocks before
    their own and what is called before them in it. Nobody sees padding, which sees itself.

    Args:
        length: L, the tokens of one copy.
        block: Tokens in a block.
        pads: Padding tokens on the left of each row, ``[B]``.
        attention: The network's attention, see ``block_diffusion.attention_of``.
        dtype: The network's type.
    """
    places = torch.arange(2 * length, device=pads.device)
    query, key = places[:, None], places
    same = (query < length) == (key < length)
    own, other = query % length // block, key % length // block
    clean_before = (key < length) & (other < own)
    allowed = clean_before | (same & (own == other) & (key <= query))
    hidden = places % length < pads[:, None]
    return as_mask((allowed & (~hidden[:, None] | (query == key)))[:, None], attention, dtype)


def denoise_reordered(
    network: nn.Module,
    noised: Tensor,
    clean: Tensor,
    *,
    block: int,
    mask_id: int,
    pads: Tensor | None = None,
) -> Projection:
    """Return the prediction of the masked tokens at their places, ``[B, L, V]``, from one call.

    Predictions at known places are not of use: there, the network predicts the next token.

    Args:
        network: A causal LM of transformers.
        noised: Token ids ``[B, L]``, some of them masks.
        clean: The same without masks.
        block: Tokens in a block.
        mask_id: Id of the mask token.
        pads: Padding tokens on the left of each row, ``[B]``.
    """
    length = clean.shape[1]
    if pads is None:
        pads = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
    order = known_first(noised == mask_id, block)
    positions = positions_of(pads, 0, length)
    dtype: Any = network.dtype
    mask = reordered_mask(length, block, pads=pads, attention=attention_of(network), dtype=dtype)
    found = project(
        network,
        torch.cat([clean, in_order(noised, order)], 1),
        mask,
        torch.cat([positions, in_order(positions, order)], 1),
    )
    return found._replace(hidden=in_order(found.hidden[:, length:], order.argsort(1)))


@dataclass(kw_only=True)
class CausalPast(Past):
    """The clean tokens so far, encoded one after the other; the next block is called known first.

    Attributes:
        mask_id: Id of the mask token.
    """

    mask_id: int

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits ``[R, W, V]`` of the next block, and keep nothing of it."""
        order = known_first(tokens == self.mask_id, tokens.shape[1])
        found = dense(self._call(in_order(tokens, order), order))
        self.cache.crop(-tokens.shape[1])
        return in_order(found, order.argsort(1))


@dataclass(kw_only=True)
class ReorderedSampler(BlockSampler):
    """Samples as WeDLM: blocks whose known tokens are called first, over a causal past.

    A block stays where it is until it is settled, as in WeDLM's ``generate_wedlm``; its inference
    engine moves a window on as soon as the first tokens settle, which is not supported.
    """

    def _empty_past(self, pads: Tensor, attention: Attention) -> Past:
        return CausalPast(self.network, 1, pads, attention, mask_id=self.mask_id)

"""Sampling of block diffusion, block after block, on an exact cache of keys and values.

The prompt is encoded once. A block is denoised on the cache, what its calls appended is dropped,
and the clean block is appended once: every call sees what the noised block sees in training, so
its logits are those of the training call ``[noised ; clean]``. Released BD3LM samplers encode the
whole prefix again for every block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from diffdistill.pipelines.answers import AnswerSampler, Asked, BlockEvent, given_tokens
from diffdistill.pipelines.block_diffusion import (
    Attention,
    causal_mask,
    dense_attention,
    lay_out_prompts,
    positions_of,
    project,
)
from diffdistill.projection import Projection, dense
from diffdistill.readouts import guided


@dataclass
class Past:
    """The clean tokens so far, encoded.

    Attributes:
        network: A causal LM of transformers.
        block: Tokens in a block.
        pads: Padding tokens on the left of each row, ``[R]``.
        attention: Which attention the network uses, sdpa or eager.
        length: Tokens so far.
    """

    network: nn.Module
    block: int
    pads: Tensor
    attention: Attention
    length: int = 0
    cache: Any = field(default_factory=DynamicCache)

    def append(self, tokens: Tensor) -> None:
        """Encode clean blocks ``[R, n]`` and keep them."""
        if tokens.shape[1]:
            self._call(tokens)
            self.length += tokens.shape[1]

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits ``[R, W, V]`` of the next block, and keep nothing of it."""
        found = dense(self._call(tokens))
        self.cache.crop(-tokens.shape[1])
        return found

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.pads = self.pads[rows]
        if self.length:
            self.cache.batch_select_indices(rows)

    def _call(self, tokens: Tensor, order: Tensor | None = None) -> Projection:
        """Return what the network makes of ``tokens``, at the places ``order`` of the block."""
        stop = self.length + tokens.shape[1]
        dtype: Any = self.network.dtype
        mask = causal_mask(
            self.pads, self.length, stop, self.block, attention=self.attention, dtype=dtype
        )
        positions = positions_of(self.pads, self.length, stop)
        if order is not None:
            positions = positions.gather(1, order)
        return project(self.network, tokens, mask, positions, self.cache)


@dataclass
class EncodedAgain(Past):
    """The clean tokens so far as they are, encoded again in every call.

    Attributes:
        tokens: The tokens so far, ``[R, n]``.
    """

    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    def append(self, tokens: Tensor) -> None:
        """Keep clean blocks ``[R, n]``."""
        self.tokens = torch.cat([self.tokens, tokens], 1) if self.length else tokens
        self.length += tokens.shape[1]

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits ``[R, W, V]`` of the next block, and keep nothing of it."""
        known = torch.cat([self.tokens, tokens], 1) if self.length else tokens
        stop, dtype = known.shape[1], cast(torch.dtype, self.network.dtype)
        mask = causal_mask(self.pads, 0, stop, self.block, attention=self.attention, dtype=dtype)
        found = project(self.network, known, mask, positions_of(self.pads, 0, stop))
        return dense(found._replace(hidden=found.hidden[:, self.length :]))

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.pads, self.tokens = self.pads[rows], self.tokens[rows]


@dataclass(kw_only=True)
class BlockSampler(AnswerSampler):
    """Samples from a block-diffusion LM.

    ``max_tokens`` is rounded up to whole blocks. A block sees given tokens of its own and of
    earlier blocks.

    Attributes:
        block: Tokens in a block.
    """

    block: int

    def _stream(self, asked: Asked) -> Iterator[BlockEvent]:
        with dense_attention(self.network) as attention:
            yield from self._blocks(asked, attention)

    def _blocks(self, asked: Asked, attention: Attention) -> Iterator[BlockEvent]:
        blocks = self._given(asked.canvas)
        past = self._past(asked, attention)
        rows = torch.arange(len(asked.prompts), device=asked.ids.device)
        for number in range(blocks.shape[1]):
            given = blocks[rows, number]
            masked = given == self.mask_id
            predict = self._predict(past)
            tokens = yield from self._settled(asked, number, rows, given, masked, predict)
            given_later = given_tokens(blocks[rows, number + 1 :], self.mask_id).any((1, 2))
            going = (~self._ended(tokens, masked) | given_later).nonzero()[:, 0]
            if number + 1 == blocks.shape[1] or len(going) == 0:
                return
            past.keep(torch.cat([going, going + len(rows)]) if self._guides() else going)
            rows, tokens = rows[going], tokens[going]
            past.append(tokens.repeat(2, 1) if self._guides() else tokens)

    def _given(self, canvas: Tensor) -> Tensor:
        """Return what is given of each block of each answer, ``[B, blocks, block]``."""
        short = -canvas.shape[1] % self.block
        filled = torch.nn.functional.pad(canvas, (0, short), value=self.mask_id)
        return filled.unflatten(1, (-1, self.block))

    def _past(self, asked: Asked, attention: Attention) -> Past:
        """Return the encoded prompts; with guidance, the negative ones after them."""
        known = [prompt for side in self._sides(asked) for prompt in side]
        tokens, pads = lay_out_prompts(
            known, block=self.block, pad_id=self.pad_id, device=asked.ids.device
        )
        past = self._empty_past(pads, attention)
        past.append(tokens)
        return past

    def _empty_past(self, pads: Tensor, attention: Attention) -> Past:
        return Past(self.network, self.block, pads, attention)

    def _predict(self, past: Past) -> Callable[[Tensor], Tensor]:
        if not self._guides():
            return past.logits

        def predict(tokens: Tensor) -> Tensor:
            positive, negative = past.logits(tokens.repeat(2, 1)).chunk(2)
            return guided(positive, negative, self.guidance, "standard")

        return predict


@dataclass(kw_only=True)
class UncachedSampler(BlockSampler):
    """Samples the same from a network that takes no cache, with more work."""

    def _empty_past(self, pads: Tensor, attention: Attention) -> Past:
        return EncodedAgain(self.network, self.block, pads, attention)

"""Sampling of block diffusion, block after block, on an exact cache of keys and values.

The prompt is encoded once. A block is denoised on the cache, what its calls appended is dropped,
and the clean block is appended once: every call sees what the noised block sees in training, so
its logits are those of the training call ``[noised ; clean]``. Released BD3LM samplers encode the
whole prefix again for every block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from diffdistill.draws import Draws
from diffdistill.pipelines.block_diffusion import (
    Attention,
    causal_mask,
    dense_attention,
    lay_out_prompts,
    positions_of,
    project,
)
from diffdistill.pipelines.unmasking import Step, Unmasking
from diffdistill.projection import Projection, dense
from diffdistill.readouts import guided


class BlockEvent(NamedTuple):
    """What became of one block of the rows that still run.

    Attributes:
        block: The number of the block, from 0 at the start of the answer.
        rows: Which rows of the batch, ``[R]``.
        tokens: Token ids of the block, ``[R, block]``; masks where nothing is settled yet.
        step: The denoising step; None for the event that says that the block is done.
    """

    block: int
    rows: Tensor
    tokens: Tensor
    step: Step | None = None


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

    def _call(self, tokens: Tensor) -> Projection:
        stop = self.length + tokens.shape[1]
        dtype: Any = self.network.dtype
        mask = causal_mask(
            self.pads, self.length, stop, self.block, attention=self.attention, dtype=dtype
        )
        positions = positions_of(self.pads, self.length, stop)
        return project(self.network, tokens, mask, positions, self.cache)


@dataclass(kw_only=True)
class BlockSampler:
    """Samples from a block-diffusion LM.

    Attributes:
        network: A causal LM of transformers.
        block: Tokens in a block.
        mask_id: Id of the mask token.
        pad_id: Fills prompts on the left; nobody sees it.
        eos_ids: A row ends after the block in which it samples one of these.
        max_tokens: Tokens of an answer, rounded up to whole blocks.
        unmasking: How the tokens of a block settle; its ``num_steps`` are those of one block.
        guidance: Classifier-free guidance in the standard form, 1 = none.
    """

    network: nn.Module
    block: int
    mask_id: int
    pad_id: int
    eos_ids: Sequence[int] = ()
    max_tokens: int = 128
    unmasking: Unmasking = field(default_factory=Unmasking)
    guidance: float = 1.0

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        draws: Draws,
        ids: Tensor,
        *,
        negatives: Sequence[Sequence[int]] | None = None,
        canvas: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the answer of each prompt, up to and including its end token; see ``stream``."""
        answers: list[list[Tensor]] = [[] for _ in prompts]
        for event in self.stream(prompts, draws, ids, negatives=negatives, canvas=canvas):
            for row, tokens in zip(event.rows.tolist(), event.tokens, strict=True):
                answers[row].append(tokens)
        width = None if canvas is None else canvas.shape[1]
        return [
            up_to_end(
                torch.cat(parts)[:width],
                None if canvas is None else canvas[row],
                self.eos_ids,
                self.mask_id,
            )
            for row, parts in enumerate(answers)
        ]

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        draws: Draws,
        ids: Tensor,
        *,
        negatives: Sequence[Sequence[int]] | None = None,
        canvas: Tensor | None = None,
        every_step: bool = False,
    ) -> Iterator[BlockEvent]:
        """Yield each block as it is done; with ``every_step``, each denoising step before.

        Args:
            prompts: Token ids; their lengths may differ, and may be 0.
            draws: Random numbers.
            ids: The number of each row, ``[B]``, on the network's device. A row's answer depends
                on its number and not on the rest of the batch.
            negatives: Prompts that guidance leads away from; None is the prompt with every token
                masked (LLaDA). Unused at guidance 1.
            canvas: Answers ``[B, A]`` with masks where tokens are to be found; the others are
                given, and stay. Its width takes the place of ``max_tokens``. A block sees given
                tokens of its own and of earlier blocks.
            every_step: Whether to yield denoising steps too.
        """
        with dense_attention(self.network) as attention:
            yield from self._stream(attention, prompts, draws, ids, negatives, canvas, every_step)

    def _stream(
        self,
        attention: Attention,
        prompts: Sequence[Sequence[int]],
        draws: Draws,
        ids: Tensor,
        negatives: Sequence[Sequence[int]] | None,
        canvas: Tensor | None,
        every_step: bool,
    ) -> Iterator[BlockEvent]:
        blocks = self._blocks(len(prompts), canvas, ids.device)
        past = self._past(attention, prompts, negatives, ids.device)
        rows = torch.arange(len(prompts), device=ids.device)
        for number in range(blocks.shape[1]):
            tokens = blocks[rows, number]
            masked = tokens == self.mask_id
            steps = self.unmasking.settle(
                self._predict(past),
                tokens,
                masked,
                draws,
                ids[rows],
                purpose=f"block/{number}",
                banned=[self.mask_id],
            )
            for step in steps:
                tokens = step.tokens
                if every_step:
                    yield BlockEvent(number, rows, tokens, step)
            yield BlockEvent(number, rows, tokens)
            ended = (is_one_of(tokens, self.eos_ids) & masked).any(1)
            given_later = given_tokens(blocks[rows, number + 1 :], self.mask_id).any((1, 2))
            going = (~ended | given_later).nonzero()[:, 0]
            if number + 1 == blocks.shape[1] or len(going) == 0:
                return
            past.keep(torch.cat([going, going + len(rows)]) if self._guides() else going)
            rows, tokens = rows[going], tokens[going]
            past.append(tokens.repeat(2, 1) if self._guides() else tokens)

    def _guides(self) -> bool:
        return self.guidance != 1.0

    def _blocks(self, size: int, canvas: Tensor | None, device: torch.device) -> Tensor:
        """Return what is given of each block of each answer, ``[B, blocks, block]``."""
        if canvas is None:
            width = self.max_tokens
            canvas = torch.full((size, width), self.mask_id, device=device)
        short = -canvas.shape[1] % self.block
        filled = torch.nn.functional.pad(canvas.to(device), (0, short), value=self.mask_id)
        return filled.unflatten(1, (-1, self.block))

    def _past(
        self,
        attention: Attention,
        prompts: Sequence[Sequence[int]],
        negatives: Sequence[Sequence[int]] | None,
        device: torch.device,
    ) -> Past:
        """Return the encoded prompts; with guidance, the negative ones after them."""
        known = [list(prompt) for prompt in prompts]
        if self._guides():
            masked = [[self.mask_id] * len(prompt) for prompt in prompts]
            known += masked if negatives is None else [list(other) for other in negatives]
        tokens, pads = lay_out_prompts(known, block=self.block, pad_id=self.pad_id, device=device)
        past = Past(self.network, self.block, pads, attention)
        past.append(tokens)
        return past

    def _predict(self, past: Past) -> Callable[[Tensor], Tensor]:
        if not self._guides():
            return past.logits

        def predict(tokens: Tensor) -> Tensor:
            positive, negative = past.logits(tokens.repeat(2, 1)).chunk(2)
            return guided(positive, negative, self.guidance, "standard")

        return predict


def given_tokens(canvas: Tensor, mask_id: int) -> Tensor:
    """Return which tokens of a canvas are given, as bool."""
    return canvas != mask_id


def is_one_of(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """Return which tokens are one of ``ids``, as bool."""
    return torch.isin(tokens, torch.tensor(list(ids), dtype=tokens.dtype, device=tokens.device))


def up_to_end(
    answer: Tensor, canvas: Tensor | None, eos_ids: Sequence[int], mask_id: int
) -> Tensor:
    """Return an answer up to and including its first sampled end token after all given ones."""
    ended = is_one_of(answer, eos_ids)
    if canvas is not None:
        given = given_tokens(canvas, mask_id).nonzero()[:, 0]
        last = int(given[-1]) + 1 if len(given) else 0
        ended[:last] = False
    first = ended.nonzero()[:1, 0]
    return answer[: int(first) + 1] if len(first) else answer

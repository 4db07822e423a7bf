"""Masked diffusion of whole sequences (LLaDA, Dream): the training call, and sampling.

Every token sees every other. Rows are padded on the left, which nobody sees. Dream's networks
predict a token at the place before it, as the causal LM they were made from; ``shift`` moves their
logits to the token's own place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.pipelines.answers import AnswerSampler, Asked, BlockEvent, given_tokens
from diffdistill.pipelines.block_diffusion import (
    as_mask,
    attention_of,
    dense_attention,
    lay_out_prompts,
    project,
)
from diffdistill.projection import Projection, dense
from diffdistill.readouts import guided


def denoise_all(
    network: nn.Module, noised: Tensor, *, padding: Tensor | None = None, shift: bool = False
) -> Projection:
    """Return the prediction of the clean tokens at each place, ``[B, L, V]``.

    Args:
        network: A causal LM of transformers, or one that takes a 4-D mask as they do.
        noised: Token ids ``[B, L]``, some of them masks.
        padding: bool ``[B, L]``: tokens on either side that nobody sees and positions do not
            count; None is none.
        shift: Whether the network predicts token i at place i - 1 (Dream). The first token is
            then predicted by its own place.
    """
    if padding is None:
        padding = torch.zeros_like(noised, dtype=torch.bool)
    attention = attention_of(network)
    dtype: Any = network.dtype
    own = torch.eye(noised.shape[1], dtype=torch.bool, device=noised.device)
    mask = as_mask((~padding[:, None] | own)[:, None], attention, dtype)
    positions = ((~padding).cumsum(dim=1) - 1).clamp(min=0)
    found = project(network, noised, mask, positions)
    return found._replace(hidden=shifted_right(found.hidden, padding)) if shift else found


def shifted_right(values: Tensor, padding: Tensor) -> Tensor:
    """Return values ``[B, L, H]`` one place later; at the first that is no padding, its own."""
    later = torch.cat([values[:, :1], values[:, :-1]], dim=1)
    first = ~padding & ((~padding).cumsum(dim=1) == 1)
    return torch.where(first[..., None], values, later)


@dataclass(kw_only=True)
class MaskedSampler(AnswerSampler):
    """Samples from a masked-diffusion LM, whose network was trained to see in both directions.

    Given tokens of the canvas are seen from all blocks.

    Attributes:
        block: Settle the answer block after block, while it is seen as a whole (LLaDA's
            ``block_length``); None settles all of it at once.
        shift: Whether the network predicts token i at place i - 1 (Dream).
    """

    block: int | None = None
    shift: bool = False

    def _stream(self, asked: Asked) -> Iterator[BlockEvent]:
        with dense_attention(self.network):
            yield from self._blocks(asked)

    def _blocks(self, asked: Asked) -> Iterator[BlockEvent]:
        answers = asked.canvas.clone()
        given = given_tokens(answers, self.mask_id)
        known, pads = self._prompts(asked)
        rows = torch.arange(len(asked.prompts), device=asked.ids.device)
        size = self.block or answers.shape[1]
        for number, start in enumerate(range(0, answers.shape[1], size)):
            window = slice(start, start + size)
            masked = ~given[rows, window]
            predict = self._predict(known[:, rows], pads[:, rows], answers[rows], window)
            tokens = yield from self._settled(
                asked, number, rows, answers[rows, window], masked, predict
            )
            answers[rows, window] = tokens
            rows = rows[~self._ended(tokens, masked) | given[rows, window.stop :].any(1)]
            if len(rows) == 0:
                return

    def _prompts(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """Return prompts ``[sides, B, P]`` and pads ``[sides, B]``; one side without guidance."""
        sides = self._sides(asked)
        flat = [prompt for side in sides for prompt in side]
        tokens, pads = lay_out_prompts(flat, block=1, pad_id=self.pad_id, device=asked.ids.device)
        shape = (len(sides), len(asked.prompts))
        return tokens.unflatten(0, shape), pads.unflatten(0, shape)

    def _predict(
        self, prompts: Tensor, pads: Tensor, answers: Tensor, window: slice
    ) -> Callable[[Tensor], Tensor]:
        """Return what asks for the logits of a window of the answers ``[B, A]``."""
        start = prompts.shape[2]
        places = slice(start + window.start, start + window.stop)

        def predict(tokens: Tensor) -> Tensor:
            answers[:, window] = tokens
            both = torch.cat([prompts, answers.expand(len(prompts), -1, -1)], dim=2)
            tokens = both.flatten(0, 1)
            padding = torch.arange(tokens.shape[1], device=pads.device) < pads.flatten()[:, None]
            found = denoise_all(self.network, tokens, padding=padding, shift=self.shift)
            logits = dense(found._replace(hidden=found.hidden[:, places]))
            if len(prompts) == 1:
                return logits
            positive, negative = logits.chunk(2)
            return guided(positive, negative, self.guidance, "standard")

        return predict

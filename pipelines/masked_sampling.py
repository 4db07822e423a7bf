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
    attention_of,
    dense_attention,
    full_mask,
    lay_out_prompts,
    positions_of,
    project,
)
from diffdistill.projection import Projection, dense
from diffdistill.readouts import guided


def denoise_all(
    network: nn.Module, noised: Tensor, *, pads: Tensor | None = None, shift: bool = False
) -> Projection:
    """Return the prediction of the clean tokens at each place, ``[B, L, V]``.

    Args:
        network: A causal LM of transformers, or one that takes a 4-D mask as they do.
        noised: Token ids ``[B, L]``, some of them masks.
        pads: Padding tokens on the left of each row, ``[B]``.
        shift: Whether the network predicts token i at place i - 1 (Dream). The first token is
            then predicted by its own place.
    """
    if pads is None:
        pads = torch.zeros(len(noised), dtype=torch.long, device=noised.device)
    length = noised.shape[1]
    attention = attention_of(network)
    dtype: Any = network.dtype
    mask = full_mask(pads, length, attention=attention, dtype=dtype)
    found = project(network, noised, mask, positions_of(pads, 0, length))
    return found._replace(hidden=shifted_right(found.hidden, pads)) if shift else found


def shifted_right(values: Tensor, pads: Tensor) -> Tensor:
    """Return values ``[B, L, H]`` one place later; the first after ``pads`` ``[B]`` stays too."""
    later = torch.cat([values[:, :1], values[:, :-1]], dim=1)
    first = torch.arange(values.shape[1], device=pads.device) == pads[:, None]
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
            found = denoise_all(
                self.network, both.flatten(0, 1), pads=pads.flatten(), shift=self.shift
            )
            logits = dense(found._replace(hidden=found.hidden[:, places]))
            if len(prompts) == 1:
                return logits
            positive, negative = logits.chunk(2)
            return guided(positive, negative, self.guidance, "standard")

        return predict

"""Masked diffusion of whole sequences (LLaDA, Dream): the training call, and sampling.

Every token sees every other. Rows are padded on the left, which nobody sees. Dream's networks
predict a token at the place before it, as the causal LM they were made from; ``shift`` moves their
logits to the token's own place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.pipelines.block_diffusion import (
    attention_of,
    dense_attention,
    full_mask,
    lay_out_prompts,
    positions_of,
    project,
)
from diffdistill.pipelines.block_sampling import BlockEvent, given_tokens, is_one_of, up_to_end
from diffdistill.pipelines.unmasking import Unmasking
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
    return found._replace(hidden=shifted_right(found.hidden)) if shift else found


def shifted_right(values: Tensor) -> Tensor:
    """Return values ``[B, L, ...]`` one place later; the first stays as well."""
    return torch.cat([values[:, :1], values[:, :-1]], dim=1)


@dataclass(kw_only=True)
class MaskedSampler:
    """Samples from a masked-diffusion LM.

    Attributes:
        network: A causal LM of transformers that was trained to see in both directions.
        mask_id: Id of the mask token.
        pad_id: Fills prompts on the left; nobody sees it.
        eos_ids: An answer ends at the first of these; a row ends after a block with one.
        max_tokens: Tokens of an answer.
        block: Settle the answer block after block, while it is seen as a whole (LLaDA's
            ``block_length``); None settles all of it at once.
        unmasking: How the tokens of a block settle; its ``num_steps`` are those of one block.
        guidance: Classifier-free guidance in the standard form, 1 = none. LLaDA's ``cfg_scale``
            is one less.
        shift: Whether the network predicts token i at place i - 1 (Dream).
    """

    network: nn.Module
    mask_id: int
    pad_id: int
    eos_ids: Sequence[int] = ()
    max_tokens: int = 128
    block: int | None = None
    unmasking: Unmasking = field(default_factory=Unmasking)
    guidance: float = 1.0
    shift: bool = False

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
        return [
            up_to_end(
                torch.cat(parts),
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

        Arguments as in ``BlockSampler.stream``. Given tokens of the canvas are seen from all
        blocks.
        """
        if canvas is None:
            canvas = torch.full((len(prompts), self.max_tokens), self.mask_id, device=ids.device)
        with dense_attention(self.network):
            yield from self._stream(prompts, draws, ids, negatives, canvas, every_step)

    def _stream(
        self,
        prompts: Sequence[Sequence[int]],
        draws: Draws,
        ids: Tensor,
        negatives: Sequence[Sequence[int]] | None,
        canvas: Tensor,
        every_step: bool,
    ) -> Iterator[BlockEvent]:
        answers = canvas.to(ids.device, copy=True)
        given = given_tokens(answers, self.mask_id)
        known, pads = self._prompts(prompts, negatives, ids.device)
        rows = torch.arange(len(prompts), device=ids.device)
        size = self.block or answers.shape[1]
        for number, start in enumerate(range(0, answers.shape[1], size)):
            window = slice(start, start + size)
            tokens = answers[rows, window]
            masked = ~given[rows, window]
            steps = self.unmasking.settle(
                self._predict(known[:, rows], pads[:, rows], answers[rows], window),
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
            answers[rows, window] = tokens
            yield BlockEvent(number, rows, tokens)
            ended = (is_one_of(tokens, self.eos_ids) & masked).any(1)
            rows = rows[~ended | given[rows, window.stop :].any(1)]
            if len(rows) == 0:
                return

    def _prompts(
        self,
        prompts: Sequence[Sequence[int]],
        negatives: Sequence[Sequence[int]] | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Return prompts ``[sides, B, P]`` and pads ``[sides, B]``; one side without guidance."""
        sides = [list(map(list, prompts))]
        if self.guidance != 1.0:
            masked = [[self.mask_id] * len(prompt) for prompt in prompts]
            sides.append(masked if negatives is None else list(map(list, negatives)))
        flat = [prompt for side in sides for prompt in side]
        tokens, pads = lay_out_prompts(flat, block=1, pad_id=self.pad_id, device=device)
        shape = (len(sides), len(prompts))
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

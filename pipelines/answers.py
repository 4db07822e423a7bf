"""What the samplers of diffusion language models share: answers that settle block after block."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.pipelines.unmasking import Step, Unmasking


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


class Asked(NamedTuple):
    """What a sampler is asked for; see ``AnswerSampler.stream``.

    Attributes:
        prompts: Token ids.
        draws: Random numbers.
        ids: The number of each row, ``[B]``.
        negatives: Prompts that guidance leads away from.
        canvas: Answers ``[B, A]``, with masks where tokens are to be found.
        every_step: Whether to yield denoising steps too.
    """

    prompts: Sequence[Sequence[int]]
    draws: Draws
    ids: Tensor
    negatives: Sequence[Sequence[int]] | None
    canvas: Tensor
    every_step: bool


@dataclass(kw_only=True)
class AnswerSampler(ABC):
    """Samples answers to prompts.

    Attributes:
        network: A causal LM of transformers.
        mask_id: Id of the mask token.
        pad_id: Fills prompts on the left; nobody sees it.
        eos_ids: An answer ends at the first of these; a row ends after a block with one.
        max_tokens: Tokens of an answer.
        unmasking: How the tokens of a block settle; its ``num_steps`` are those of one block.
        guidance: Classifier-free guidance in the standard form, 1 = none. LLaDA's ``cfg_scale``
            is one less.
    """

    network: nn.Module
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
                given, and stay. Its width takes the place of ``max_tokens``.
            every_step: Whether to yield denoising steps too.
        """
        if canvas is None:
            canvas = torch.full((len(prompts), self.max_tokens), self.mask_id)
        asked = Asked(prompts, draws, ids, negatives, canvas.to(ids.device), every_step)
        yield from self._stream(asked)

    @abstractmethod
    def _stream(self, asked: Asked) -> Iterator[BlockEvent]:
        """Yield the events of all blocks."""

    def _settled(
        self,
        asked: Asked,
        number: int,
        rows: Tensor,
        tokens: Tensor,
        masked: Tensor,
        predict: Callable[[Tensor], Tensor],
    ) -> Generator[BlockEvent, None, Tensor]:
        """Yield the events of one block of some rows, and return its tokens ``[R, block]``."""
        steps = self.unmasking.settle(
            predict,
            tokens,
            masked,
            asked.draws,
            asked.ids[rows],
            purpose=f"block/{number}",
            banned=[self.mask_id],
        )
        for step in steps:
            tokens = step.tokens
            if asked.every_step:
                yield BlockEvent(number, rows, tokens, step)
        yield BlockEvent(number, rows, tokens)
        return tokens

    def _guides(self) -> bool:
        return self.guidance != 1.0

    def _sides(self, asked: Asked) -> list[list[list[int]]]:
        """Return the prompts, and with guidance the negative ones, each ``[B][P]``."""
        sides = [[list(prompt) for prompt in asked.prompts]]
        if self._guides():
            masked = [[self.mask_id] * len(prompt) for prompt in asked.prompts]
            given = asked.negatives
            sides.append(masked if given is None else [list(other) for other in given])
        return sides

    def _ended(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Return which rows of a settled block sampled an end token, bool ``[R]``."""
        return (is_one_of(tokens, self.eos_ids) & masked).any(1)


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

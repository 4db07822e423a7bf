"""Which masked tokens settle at a denoising step, and to what.

One module for block diffusion and for masked diffusion of whole sequences: a *window* of tokens
is asked for again and again until none of it is masked. A settled token stays.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.choices import invert
from diffdistill.draws import Draws

Schedule = Literal["low-confidence", "random", "threshold", "first-hitting"]

NEVER = -torch.inf


class Step(NamedTuple):
    """One denoising step of a window.

    Attributes:
        tokens: Token ids after the step, ``[B, W]``.
        masked: What is still masked, ``[B, W]``.
        settled: What this step settled, ``[B, W]``.
        confidence: Probability of each proposed token, ``[B, W]``; 0 where none was proposed.
        t: Noise level at which the model was asked, ``[B]``: sampled for ``first-hitting``, else
            the share of masked tokens among those that were masked at the start.
        number: The number of the step, from 0.
    """

    tokens: Tensor
    masked: Tensor
    settled: Tensor
    confidence: Tensor
    t: Tensor
    number: int


@dataclass(kw_only=True)
class Unmasking:
    """How masked tokens are settled.

    Attributes:
        schedule: ``low-confidence`` settles a fixed number of the most confident tokens at each
            step (LLaDA), ``random`` as many at random; ``threshold`` all above a confidence, and
            at least the best (Fast-dLLM); ``first-hitting`` one random token at a time, at the
            exact times of the continuous-time process (arXiv:2409.02908; exact at temperature 1).
        num_steps: Steps for a window under ``low-confidence`` and ``random``; None is one for
            each token.
        threshold: Least confidence under ``threshold``.
        temperature: 0 takes the most likely token, 1 samples from the model.
        top_p: Sample only from the most likely tokens that together have this probability.
    """

    schedule: Schedule = "low-confidence"
    num_steps: int | None = None
    threshold: float = 0.9
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {self.num_steps}")
        if self.temperature < 0.0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def settle(
        self,
        predict: Callable[[Tensor], Tensor],
        tokens: Tensor,
        masked: Tensor,
        draws: Draws,
        ids: Tensor,
        *,
        purpose: str,
        banned: Sequence[int],
    ) -> Iterator[Step]:
        """Yield each step until nothing is masked.

        A row's random numbers depend on its id, the purpose and the step, so that it settles
        alike alone and in a batch (rounding aside, where two confidences are equal).

        Args:
            predict: Returns logits ``[B, W, V]`` for token ids ``[B, W]``.
            tokens: The window, ``[B, W]``.
            masked: What is to be settled, ``[B, W]``; the rest is given.
            draws: Random numbers.
            ids: The number of each row, ``[B]``.
            purpose: Key of the random numbers.
            banned: Token ids that are never proposed; the mask token is one of them.
        """
        total = masked.sum(1)
        t = torch.ones(len(tokens), dtype=torch.float64, device=tokens.device)
        index = 0
        while bool(masked.any()):
            remaining = masked.sum(1)
            if self.schedule == "first-hitting":
                numbers = draws.uniform(f"{purpose}/{index}/t", ids, ())
                t = t * next_time(numbers.double(), remaining)
            else:
                t = remaining.double() / total.clamp(min=1)
            proposed, confidence = propose(
                suppressed(predict(tokens), banned),
                uniform_double(draws, f"{purpose}/{index}/token", ids, tokens.shape[1])
                if self.temperature > 0.0
                else None,
                temperature=self.temperature,
                top_p=self.top_p,
            )
            confidence = torch.where(masked, confidence, 0.0)
            settled = self._chosen(confidence, masked, total, index, draws, ids, purpose)
            tokens = torch.where(settled, proposed, tokens)
            masked = masked & ~settled
            yield Step(tokens, masked, settled, confidence, t.float(), index)
            index += 1

    def _chosen(
        self,
        confidence: Tensor,
        masked: Tensor,
        total: Tensor,
        index: int,
        draws: Draws,
        ids: Tensor,
        purpose: str,
    ) -> Tensor:
        """Return which masked tokens settle, ``[B, W]``; at least one of a row that has some."""
        score = confidence
        if self.schedule in ("random", "first-hitting"):
            score = draws.uniform(f"{purpose}/{index}/place", ids, masked.shape[1:])
        score = score.double().masked_fill(~masked, NEVER)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        if self.schedule == "threshold":
            return masked & ((rank == 0) | (confidence > self.threshold))
        if self.schedule == "first-hitting":
            return masked & (rank == 0)
        count = step_counts(total, self.num_steps, index)
        return masked & (rank < count[:, None])


def step_counts(total: Tensor, num_steps: int | None, index: int) -> Tensor:
    """Return how many of ``total`` ``[B]`` tokens settle at a step, ``[B]``.

    As many at each step, one more at the first ones where it does not come out even (LLaDA).
    """
    if num_steps is None:
        return torch.ones_like(total)
    return total // num_steps + (index < total % num_steps)


def next_time(numbers: Tensor, remaining: Tensor) -> Tensor:
    """Return the factor ``[B]`` on t until the next of ``remaining`` ``[B]`` tokens settles.

    ``u^(1 / n)`` for uniform u: the largest of n uniform numbers below t.
    """
    return (1.0 - numbers) ** (1.0 / remaining.clamp(min=1))


def suppressed(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Return logits ``[..., V]`` under which the banned tokens are impossible."""
    kept = logits.clone()
    kept[..., list(banned)] = NEVER
    return kept


def propose(
    logits: Tensor,
    numbers: Tensor | None,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return a token for each position ``[...]`` and its probability ``[...]``.

    The probability is that of the model, without temperature and top-p.

    Args:
        logits: ``[..., V]``.
        numbers: Uniform float64 numbers ``[...]`` in [0, 1), for a temperature above 0. A token is
            found by inverting the cumulative distribution in float64: exactly
            ``softmax(logits / temperature)``, as with Gumbel noise, from one number in place of V.
        temperature: See ``Unmasking``.
        top_p: See ``Unmasking``.
    """
    if temperature == 0.0:
        tokens = logits.argmax(-1)
    else:
        assert numbers is not None
        tempered = (logits.double() / temperature).softmax(-1)
        tokens = invert(nucleus(tempered, top_p), numbers)
    taken = logits.gather(-1, tokens[..., None])[..., 0].float()
    return tokens, (taken - logits.float().logsumexp(-1)).exp()


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Return the fewest most likely of ``probs`` ``[..., V]`` that reach ``top_p``; others are 0.

    Not normalized.
    """
    if top_p >= 1.0:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(-1, order, ordered * (before < top_p))


def uniform_double(draws: Draws, purpose: str, ids: Tensor, width: int) -> Tensor:
    """Return float64 numbers ``[B, width]`` in [0, 1), keyed by sample."""
    rows = [
        torch.rand(width, generator=draws.generator(purpose, number), dtype=torch.float64)
        for number in ids.tolist()
    ]
    return torch.stack(rows).to(ids.device)

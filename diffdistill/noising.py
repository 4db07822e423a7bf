"""Masked-diffusion noising of tokens, and Monte Carlo bounds on their likelihood.

A token is replaced by the mask with probability t, the noise level (log-linear schedule: the
share of kept tokens is ``1 - t``). A *span* is what shares one t: the whole sequence (MDLM,
LLaDA, dllm) or one block (BD3LM, arXiv:2503.09573). Random numbers are keyed by sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.draws import Draws

NelboWeight = Literal["nelbo", "uniform"]
Spread = Literal["spans", "draws", "none"]
TokenLogprob = Callable[[Tensor, Tensor], Tensor]
"""``(noised ids [B, L], masked [B, L]) -> log-probability [B, L]`` of the clean tokens."""

RESAMPLES = 8


class NoisedTokens(NamedTuple):
    """Tokens of which some are masked.

    Attributes:
        x: Token ids ``[B, L]``.
        t: Noise level of each span, ``[B, spans]``.
        masked: True where the token was replaced, ``[B, L]``.
    """

    x: Tensor
    t: Tensor
    masked: Tensor


@dataclass(kw_only=True)
class MaskNoise:
    """How tokens are masked in training.

    Attributes:
        mask_id: Id of the mask token.
        block: Tokens that share one noise level; None is the whole sequence.
        low: Lower end of the interval that noise levels are drawn from.
        high: Upper end. (1e-3, 1) is the bound on the likelihood; narrower intervals lower the
            variance of the gradient (section 4 of BD3LM).
        stratify: Samples over whose spans noise levels are spread evenly, usually those of an
            optimizer step: one level falls into each of as many equal parts. 1 spreads them
            over a sample's own spans, 0 draws each alone.
        resample: Mask a span again where the share of masked tokens came out outside of
            [low, high] (``training.resample`` of bd3lms).
        length: Tokens of the longest row, where batches may be filled up to different lengths:
            noise levels then depend on the sample alone. None takes the rows as they are.
    """

    mask_id: int
    block: int | None = None
    low: float = 1e-3
    high: float = 1.0
    stratify: int = 1
    resample: bool = False
    length: int | None = None

    def __post_init__(self) -> None:
        """Refuse an interval that is none."""
        if not 0.0 < self.low <= self.high <= 1.0:
            raise ValueError(f"low and high must be 0 < low <= high <= 1, not {self.low} "
                             f"and {self.high}")  # fmt: skip

    def __call__(
        self,
        clean: Tensor,
        maskable: Tensor,
        draws: Draws,
        ids: Tensor,
        *,
        purpose: str = "mask",
    ) -> NoisedTokens:
        """Return ``clean`` ``[B, L]`` with some of its maskable tokens masked.

        Args:
            clean: Token ids.
            maskable: bool ``[B, L]``: the others are never masked.
            draws: Random numbers of the run.
            ids: The number of each sample, ``[B]``.
            purpose: Key of the random numbers.
        """
        length = clean.shape[1]
        num_spans = math.ceil(length / (self.block or length))
        drawn = math.ceil((self.length or length) / self.block) if self.block else 1
        t = span_times(draws, f"{purpose}/t", ids, drawn, stratify=self.stratify)[:, :num_spans]
        t = self.low + (self.high - self.low) * t
        level = per_token(t, length, self.block)
        numbers = draws.uniform(f"{purpose}/token", ids, (length,))
        masked = (numbers < level) & maskable
        if self.resample:
            masked = self._resampled(masked, level, maskable, draws, ids, purpose)
        return NoisedTokens(torch.where(masked, self.mask_id, clean), t, masked)

    def _resampled(
        self,
        masked: Tensor,
        level: Tensor,
        maskable: Tensor,
        draws: Draws,
        ids: Tensor,
        purpose: str,
    ) -> Tensor:
        """Return masks with a share within the interval; none where no count is within it."""
        for attempt in range(RESAMPLES):
            outside = self._outside(masked, maskable)
            if not outside.any():
                return masked
            numbers = draws.uniform(f"{purpose}/token/{attempt}", ids, level.shape[1:])
            again = (numbers < level) & maskable
            masked = torch.where(per_token(outside, level.shape[1], self.block), again, masked)
        outside = per_token(self._outside(masked, maskable), level.shape[1], self.block)
        return torch.where(outside, self._nearest(numbers, level, maskable), masked)

    def _outside(self, masked: Tensor, maskable: Tensor) -> Tensor:
        """Return the spans ``[B, spans]`` whose share of masked tokens is outside."""
        total = span_sums(maskable, self.block)
        share = span_sums(masked, self.block) / total.clamp(min=1)
        return ((share < self.low) | (share > self.high)) & (total > 0)

    def _nearest(self, numbers: Tensor, level: Tensor, maskable: Tensor) -> Tensor:
        """Return masks of the count within the interval that is nearest to t, if there is one."""
        length = level.shape[1]
        total = per_token(span_sums(maskable, self.block), length, self.block)
        low, high = (total * self.low - 1e-6).ceil(), (total * self.high + 1e-6).floor()
        count = (total * level).round().clamp(min=1).maximum(low).minimum(high.clamp(min=1))
        return span_ranks(numbers, maskable, self.block) < count


def span_times(
    draws: Draws, purpose: str, ids: Tensor, num_spans: int, *, stratify: int = 1
) -> Tensor:
    """Return noise levels ``[B, spans]`` in [0, 1), spread evenly over ``stratify`` samples.

    Samples whose ids share ``id // stratify`` get, together, one level in each of
    ``stratify * spans`` equal parts of [0, 1), in random order: the antithetic sampling of
    bd3lms, which goes through the parts in the order of samples and blocks. There the first block
    always has the lowest levels of its sample; here each level alone is uniform.
    """
    within = draws.uniform(purpose, ids, (num_spans,))
    if stratify == 0:
        return within
    parts = stratify * num_spans
    rows = []
    for number in ids.tolist():
        group, place = divmod(number, stratify)
        order = torch.randperm(parts, generator=draws.generator(f"{purpose}/parts", group))
        rows.append(order[place * num_spans : (place + 1) * num_spans])
    return (torch.stack(rows).to(ids.device) + within) / parts


def per_token(values: Tensor, length: int, block: int | None) -> Tensor:
    """Return ``[B, L]``: for each token what its span has in ``[B, spans]``."""
    return values.repeat_interleave(block or length, dim=1)[:, :length]


def span_sums(values: Tensor, block: int | None) -> Tensor:
    """Return the sum over each span, ``[B, spans]``, of values ``[B, L]``."""
    return _spans(values, block, 0).sum(-1)


def span_ranks(values: Tensor, mask: Tensor, block: int | None) -> Tensor:
    """Return how many chosen tokens of the span have a smaller value, ``[B, L]``.

    Tokens that the mask leaves out get a rank no count reaches.
    """
    length = values.shape[1]
    kept = _spans(values.masked_fill(~mask, torch.inf), block, torch.inf)
    ranks = kept.argsort(dim=-1, stable=True).argsort(dim=-1).flatten(1)[:, :length]
    return torch.where(mask, ranks, length + 1)


def _spans(values: Tensor, block: int | None, fill: float) -> Tensor:
    """Return values ``[B, spans, block]``, filled up where the last span is short."""
    size = block or values.shape[1]
    short = -values.shape[1] % size
    return torch.nn.functional.pad(values, (0, short), value=fill).unflatten(1, (-1, size))


def mask_rate(masked: Tensor, maskable: Tensor) -> Tensor:
    """Return the share of maskable tokens that are masked, a scalar."""
    return (masked & maskable).sum() / maskable.sum().clamp(min=1)


def nelbo_weight(t: Tensor, kind: NelboWeight = "nelbo") -> Tensor:
    """Return the weight of a masked token's cross-entropy at noise level ``t``.

    ``nelbo`` is ``-alpha' / (1 - alpha) = 1 / t`` for the log-linear schedule; ``uniform`` is 1,
    which bd3lms takes where the interval starts above 0.5.
    """
    return 1.0 / t if kind == "nelbo" else torch.ones_like(t)


class Estimate(NamedTuple):
    """A Monte Carlo estimate for each sequence.

    Attributes:
        value: Nats of each sequence, ``[B]``.
        error: Standard error of it, ``[B]``.
        num_tokens: Tokens that it is about, ``[B]``.
    """

    value: Tensor
    error: Tensor
    num_tokens: Tensor

    def per_token(self) -> tuple[float, float]:
        """Return the mean over all tokens of all sequences, and its standard error."""
        total = max(int(self.num_tokens.sum()), 1)
        error = self.error.double().square().sum().sqrt()
        return self.value.double().sum().item() / total, error.item() / total


def nelbo(
    logprob: TokenLogprob,
    clean: Tensor,
    maskable: Tensor,
    draws: Draws,
    ids: Tensor,
    *,
    noise: MaskNoise,
    num_draws: int,
) -> Estimate:
    """Return the negative evidence lower bound of each sequence, in nats.

    Each draw is one model call: tokens are masked as in training, and the cross-entropies of
    masked tokens are summed with weight ``1 / t``. Unbiased on ``noise``'s interval; from 1e-3
    to 1 it is what papers report. ``likelihood_bound`` has no such edge.

    Args:
        logprob: The model.
        clean: Token ids ``[B, L]``.
        maskable: bool ``[B, L]``, the tokens whose likelihood is asked for.
        draws: Random numbers.
        ids: The number of each sequence, ``[B]``.
        noise: How to mask; ``resample`` would bias the bound and is refused.
        num_draws: Model calls; the error needs at least 2.
    """
    assert not noise.resample, "resampling biases the bound"

    def draw(index: int) -> tuple[Tensor, Tensor, Tensor]:
        noised = noise(clean, maskable, draws, ids, purpose=f"nelbo/{index}")
        weight = nelbo_weight(per_token(noised.t, clean.shape[1], noise.block))
        return noised.x, noised.masked, weight

    return _estimate(logprob, maskable, draw, num_draws)


def likelihood_bound(
    logprob: TokenLogprob,
    clean: Tensor,
    maskable: Tensor,
    draws: Draws,
    ids: Tensor,
    *,
    mask_id: int,
    block: int | None,
    num_draws: int,
    spread: Spread = "spans",
) -> Estimate:
    """Return the same bound from exact counts: k of a span's n tokens, weighted with ``n / k``.

    Eq. 6 of LLaDA (arXiv:2502.09992), for BD3LM within each block: k is uniform on 1..n, and the
    k tokens are chosen uniformly. It equals the integral of the NELBO over t in (0, 1], with
    less variance and without a cut near 0. Arguments as in ``nelbo``; ``block`` None takes the
    maskable tokens of a sequence as one span (which is unbiased for a block model too, at a
    higher variance).

    ``spread`` says over what the counts of a sequence are spread evenly, each alone being uniform:
    over the ``spans`` of a draw; over the ``draws`` of a span, where the error is at most the one
    returned, which takes draws for independent; or over nothing (``none``). With the latter two a
    sequence's masks do not depend on how far its row is filled up.
    """
    length = clean.shape[1]
    num_spans = -(-length // (block or length))
    total = span_sums(maskable, block)

    def draw(index: int) -> tuple[Tensor, Tensor, Tensor]:
        times = _levels(draws, ids, num_spans, index, num_draws, spread)
        count = per_token((times * total).floor().add(1).minimum(total), length, block)
        numbers = draws.uniform(f"bound/{index}/token", ids, (length,))
        masked = span_ranks(numbers, maskable, block) < count
        weight = per_token(total, length, block) / count.clamp(min=1)
        return torch.where(masked, mask_id, clean), masked, weight

    return _estimate(logprob, maskable, draw, num_draws)


def _levels(
    draws: Draws, ids: Tensor, num_spans: int, index: int, num_draws: int, spread: Spread
) -> Tensor:
    """Return a number in [0, 1) for each span of one of the draws, ``[B, spans]``."""
    if spread == "spans":
        return span_times(draws, f"bound/{index}/k", ids, num_spans)
    within = draws.uniform(f"bound/{index}/k", ids, (num_spans,))
    if spread == "none":
        return within
    rows = [
        [
            int(torch.randperm(num_draws, generator=draws.generator(f"bound/{span}", n))[index])
            for span in range(num_spans)
        ]
        for n in ids.tolist()
    ]
    return (torch.tensor(rows, device=ids.device) + within) / num_draws


@torch.no_grad()
def _estimate(
    logprob: TokenLogprob,
    maskable: Tensor,
    draw: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    num_draws: int,
) -> Estimate:
    sums = []
    for index in range(num_draws):
        x, masked, weight = draw(index)
        losses = -logprob(x, masked).double() * weight
        sums.append(torch.where(masked, losses, 0.0).sum(1))
    values = torch.stack(sums)
    error = values.std(0) if num_draws > 1 else torch.full_like(values[0], torch.inf)
    return Estimate(values.mean(0), error / num_draws**0.5, maskable.sum(1))

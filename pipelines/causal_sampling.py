"""Answers of causal LMs by transformers' ``generate``, with random numbers keyed by row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from diffdistill.choices import invert
from diffdistill.doubles import doubled
from diffdistill.pipelines.answers import is_one_of
from diffdistill.rollouts import Answers, Sampling


class Choosing(LogitsProcessor):
    """Chooses each next token itself, and leaves no other to the caller.

    Temperature, top-k and top-p are transformers' own, in its order. A token is the one at which
    the distribution that is left adds up to more than the row's number, so that a row's answer is
    the same in any batch.

    Attributes:
        logprobs: The log-probability ``[B]`` of each token that was chosen, in that distribution.
    """

    def __init__(
        self,
        sampling: Sampling,
        numbers: Tensor,
        start: int,
        words: int,
        watch: Callable[[Tensor], None] | None = None,
        never: Sequence[int] = (),
    ) -> None:
        """Create a choice.

        Args:
            sampling: How tokens are sampled.
            numbers: Uniform numbers ``[B, A]`` in [0, 1).
            start: Tokens of the prompt.
            words: Logits that stand for a token; what a table has beyond them is never chosen.
            watch: Told the tokens ``[B]`` of each step, those after the end of a row too.
            never: Tokens that are not to be chosen.
        """
        self.never = list(never)
        self.greedy = sampling.temperature == 0.0
        self.numbers = numbers
        self.start = start
        self.words = words
        self.watch = watch
        self.logprobs: list[Tensor] = []
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[B, V]`` under which the chosen tokens alone are possible."""
        place = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, -torch.inf)
        logits = scores[:, : self.words].clone()
        logits[:, self.never] = -torch.inf
        if self.greedy:
            tokens = logits.argmax(-1)
            self.logprobs.append(torch.zeros_like(tokens, dtype=torch.float32))
        else:
            logprobs = doubled(self.warpers(input_ids, logits)).log_softmax(-1)
            picked = invert(logprobs.exp(), doubled(self.numbers[:, place]))
            likely = logprobs.gather(1, picked[:, None])[:, 0].float()
            tokens = picked.to(scores.device)
            self.logprobs.append(likely.to(scores.device))
        if self.watch is not None:
            self.watch(tokens)
        return forced.scatter(1, tokens[:, None], 0.0)


@torch.no_grad()
def sample_answers(
    network: nn.Module,
    prompt: Tensor,
    pads: Tensor,
    numbers: Tensor,
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    words: int,
    watch: Callable[[Tensor], None] | None = None,
    never: Sequence[int] = (),
    more: Mapping[str, Any] | None = None,
) -> Answers:
    """Return answers ``[B, A]``, A being the length of the longest, without dropout.

    Args:
        network: A causal LM of transformers.
        prompt: Prompts ``[B, P]``, padded on the left.
        pads: How much of each is padding, ``[B]``.
        numbers: Uniform numbers ``[B, max_tokens]`` in [0, 1), which say what is sampled.
        sampling: How tokens are sampled.
        end_ids: An answer ends with the first of these.
        pad_id: Fills up answers; it may be one of ``end_ids``.
        words: Logits that stand for a token.
        watch: Told the tokens ``[B]`` of each step, those after the end of a row too.
        never: Tokens that are not to be chosen.
        more: What the network is told besides the prompts, such as pictures.
    """
    choosing = Choosing(sampling, numbers, prompt.shape[1], words, watch, never)
    with at_rest(network):
        generating: Any = network
        rows = generating.generate(
            input_ids=prompt,
            attention_mask=(positions_in(prompt) >= pads[:, None]).long(),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(end_ids),
                pad_token_id=pad_id,
            ),
            logits_processor=LogitsProcessorList([choosing]),
            synced_gpus=isinstance(network, FSDPModule),
            **(more or {}),
        )
    tokens = rows[:, prompt.shape[1] :]
    logprobs = torch.stack(choosing.logprobs[: tokens.shape[1]], 1)
    return answers_of(tokens, logprobs, end_ids, pad_id)


def answers_of(
    tokens: Tensor, logprobs: Tensor | None, end_ids: Sequence[int], pad_id: int
) -> Answers:
    """Return the answers in rows of tokens ``[B, A]``: up to their first end token."""
    ends = is_one_of(tokens, end_ids)
    mask = ends.cumsum(1) - ends.long() == 0
    kept = int(mask.any(0).sum())
    mask = mask[:, :kept]
    return Answers(
        tokens[:, :kept].masked_fill(~mask, pad_id),
        mask,
        None if logprobs is None else logprobs[:, :kept].masked_fill(~mask, 0.0),
        ends.any(1),
    )


def positions_in(tokens: Tensor) -> Tensor:
    """Return the place ``[L]`` of each token of rows ``[B, L]``."""
    return torch.arange(tokens.shape[1], device=tokens.device)


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """Turn dropout off within the block, and all that a checkpoint says about generation.

    A checkpoint's own temperature, top-k or repetition penalty would fill in what
    ``GenerationConfig`` leaves open.
    """
    described: Any = network
    modules = list(network.modules())
    before = [module.training for module in modules]
    said = described.generation_config
    for module in modules:
        module.training = False
    described.generation_config = GenerationConfig()
    try:
        yield
    finally:
        described.generation_config = said
        for module, training in zip(modules, before, strict=True):
            module.training = training

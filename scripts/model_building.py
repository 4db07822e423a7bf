"""What the scripts share that train bundled language models from scratch on a CPU."""

import ctypes
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from diffdistill.bundled import bundled

CPU = torch.device("cpu")
BLOCK = 16
"""Lengths of rows are multiples of it."""


class Rates(Protocol):
    """How fast a model is trained."""

    @property
    def matrix_rate(self) -> float:
        """Of Muon."""

    @property
    def other_rate(self) -> float:
        """Of AdamW."""


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a bundled file."""
    lines = bundled("data", name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Rows:
    """Rows of tokens, drawn in batches of like lengths: an epoch after the other, shuffled."""

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int) -> None:
        """Take the length of each row, and how many tokens a batch has at most."""
        self.lengths = torch.tensor(lengths)
        self.tokens = tokens
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the numbers of a batch's rows, for ever."""
        while True:
            jitter = torch.rand(len(self.lengths), generator=self.generator) * BLOCK
            order = (self.lengths + jitter).argsort().tolist()
            groups: list[list[int]] = [[]]
            longest = 0
            for number in order:
                longest = max(longest, -(-int(self.lengths[number]) // BLOCK) * BLOCK)
                if groups[-1] and longest * (len(groups[-1]) + 1) > self.tokens:
                    groups.append([])
                    longest = -(-int(self.lengths[number]) // BLOCK) * BLOCK
                groups[-1].append(number)
            for place in torch.randperm(len(groups), generator=self.generator).tolist():
                yield groups[place]


def float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> Any:
    """What sdpa does, in float32: torch's bfloat16 kernel is several times slower on a CPU."""
    with torch.autocast("cpu", enabled=False):
        parts = query.float(), key.float(), value.float()
        found, weights = sdpa_attention_forward(module, *parts, mask, **options)
    return found.to(query.dtype), weights


@contextmanager
def attention_in_float32() -> Iterator[None]:
    """Let every network's sdpa be ``float32_attention`` within the block."""
    AttentionInterface.register("sdpa", float32_attention)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


class Optimizers:
    """Muon for the matrices between embedding and head, AdamW for everything else.

    Muon takes less than half of AdamW's steps here. The matrices of experts are stored as one
    tensor, which it does not take.
    """

    def __init__(self, network: nn.Module, rates: Rates, steps: int) -> None:
        """Start both, with rates that rise over 20 steps, stay, and fall over the last 40 %."""
        matrices = [
            weight
            for name, weight in network.named_parameters()
            if weight.ndim == 2 and "layers" in name and "gate.weight" not in name
        ]
        known = {id(weight) for weight in matrices}
        others = [weight for weight in network.parameters() if id(weight) not in known]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rates.matrix_rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=rates.other_rate, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        self.rates = [part.param_groups[0]["lr"] for part in self.parts]
        self.network, self.steps = network, steps

    def step(self, number: int) -> None:
        """Take a step of both, and forget the gradients."""
        share = min((number + 1) / 20, 1.0, (self.steps - number) / (0.4 * self.steps))
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * share
            part.step()
            part.zero_grad()


def give_back() -> None:
    """Returns freed memory to the system: batches of many shapes leave gigabytes of gaps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def save(network: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves a model in float16, and leaves it in float32."""
    shutil.rmtree(folder, ignore_errors=True)
    network.half().save_pretrained(folder)
    network.float()
    tokenizer.save_pretrained(folder)

"""Contexts beside texts, on the keys and values of the texts: equal to calls without any cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.byte_beam import Context
from diffdistill.pipelines.branching import Branching
from diffdistill.pipelines.causal_lm import CausalLM
from tests.conftest import CPU
from tests.tiny_text import NAMES, save_lm

TEXTS = ([5, 9, 30, 31, 7, 40], [12, 50], [60, 61, 62, 63])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("branching")
    for name in NAMES:
        save_lm(folder / name, name=name, is_causal=True)
    return folder


def plain(family: CausalLM, network: Any, tokens: list[int]) -> Tensor:
    logits = network(input_ids=torch.tensor([tokens])).logits[0, -1, : family.words]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_context_is_predicted_as_by_a_call_of_its_own(
    name: str, attention: Any, root: Path
) -> None:
    family = CausalLM(path=str(root / name), device=CPU, attention=attention)
    network = family.network()
    reader = Branching(family, network, TEXTS)
    rounds = [
        [(0, Context(6)), (0, Context(1)), (1, Context(1, (44,))), (2, Context(3, (70,)))],
        [(1, Context(1, (44, 8))), (0, Context(2, (70,))), (1, Context(1, (45,)))],
        [(1, Context(1, (44, 8, 50))), (2, Context(4)), (0, Context(2, (70, 71)))],
        [(1, Context(1, (45, 9))), (1, Context(1, (44, 8, 51)))],
    ]
    for places in rounds:
        for (row, context), found in zip(places, reader.logprobs(places), strict=True):
            tokens = [*TEXTS[row][: context.given], *context.others]
            torch.testing.assert_close(found, plain(family, network, tokens), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_no_token_is_called_twice_and_none_on_the_text_again(root: Path) -> None:
    family = CausalLM(path=str(root / "qwen3"), device=CPU)
    network = family.network()
    calls: list[int] = []
    network.base_model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs["input_ids"].numel()),
        with_kwargs=True,
    )
    reader = Branching(family, network, TEXTS)
    reader.logprobs([(0, Context(3)), (1, Context(2))])
    reader.logprobs([(0, Context(3, (44,))), (1, Context(1))])
    reader.logprobs([(0, Context(3, (44, 45))), (2, Context(1, (45,)))])
    assert calls == [18, 1, 2]

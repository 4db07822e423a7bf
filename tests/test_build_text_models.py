"""The builder of the bundled language models: tokenizers that disagree, batches, balance."""

import importlib
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from diffdistill.pipelines.block_diffusion import chat_tokens
from diffdistill.pipelines.byte_spans import Speller
from diffdistill.pipelines.chats import chat_rows, read_chat

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def builder() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))  # scripts import each other by name
    yield importlib.import_module("build_text_models")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tokenizers(builder: ModuleType) -> tuple[Any, Any]:
    return builder.build_tokenizer("student"), builder.build_tokenizer("moe")


def chats(builder: ModuleType, count: int) -> list[Any]:
    rows = builder.rows_of("python-held-out.jsonl")
    return [row["messages"] for row in rows if "messages" in row][:count]


def test_the_two_tokenizers_share_chunks_and_not_tokens(
    builder: ModuleType, tokenizers: tuple[Any, Any]
) -> None:
    spellers = [Speller(tokenizer) for tokenizer in tokenizers]
    assert tokenizers[0].get_vocab() != tokenizers[1].get_vocab()
    kinds = set()
    for messages in chats(builder, 40):
        rows = chat_rows(read_chat(spellers[0], messages), read_chat(spellers[1], messages))
        assert rows[0].chunks != [-1] * len(rows[0].chunks)
        for chunk in range(max(rows[0].chunks) + 1):
            kinds.add(tuple(min(row.chunks.count(chunk), 3) for row in rows))
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} <= kinds


def test_a_question_is_how_the_chat_with_its_answer_begins(
    builder: ModuleType, tokenizers: tuple[Any, Any]
) -> None:
    for tokenizer in tokenizers:
        for messages in chats(builder, 40):
            asked = chat_tokens(tokenizer, messages[:-1])
            told = chat_tokens(tokenizer, messages, answer=False)
            assert told[: len(asked)] == asked
            answer = tokenizer.decode(told[len(asked) :]).split(tokenizer.eos_token)[0]
            assert answer == messages[-1]["content"]


def test_an_epoch_of_batches_has_every_row_once_and_no_batch_is_too_large(
    builder: ModuleType,
) -> None:
    lengths = [1 + (7 * number) % 90 for number in range(200)]
    rows = iter(builder.Rows(lengths, 256, seed=0))
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(lengths):
            batch = next(rows)
            longest = max(lengths[number] for number in batch)
            assert -(-longest // builder.BLOCK) * builder.BLOCK * len(batch) <= 256
            seen += batch
        assert sorted(seen) == list(range(len(lengths)))
    batches = list(islice(builder.Rows(lengths, 256, seed=0), 5))
    assert batches == list(islice(builder.Rows(lengths, 256, seed=0), 5))
    assert batches != list(islice(builder.Rows(lengths, 256, seed=1), 5))


def test_balance_is_least_where_all_experts_are_used_alike(
    builder: ModuleType, tokenizers: tuple[Any, Any]
) -> None:
    recipe = builder.Recipe(hidden=32, layers=2, heads=1, inner=16, experts=4)
    network = builder.build_network(recipe, tokenizers[1])
    balance = builder.Balance(network)
    collapsed = torch.tensor([9.0, 9.0, -9.0, -9.0]).expand(8, 4)
    spread = 9 * torch.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]] + 9 * torch.eye(4)[[1, 2, 3, 0, 1, 2, 3, 0]]
    for logits, expected in ((spread, 2.0), (collapsed, 4.0)):  # experts x sum of use x probability
        balance.logits.append(logits)
        assert float(balance()) == pytest.approx(builder.BALANCE * expected, rel=1e-3)
    network(input_ids=torch.arange(64)[None])
    assert len(balance.logits) == recipe.layers
    balance().backward()
    routers = [m for m in network.modules() if isinstance(m, Qwen3MoeTopKRouter)]
    assert all(float(router.weight.grad.abs().sum()) > 0 for router in routers)
    balance.remove()
    network(input_ids=torch.arange(64)[None])
    assert balance.logits == []
    dense = builder.build_network(builder.RECIPES["student"], tokenizers[0])
    assert float(builder.Balance(dense)().detach()) == 0.0

"""Builds the language models of samples/models: they write short functions of Python's library.

Two tokenizers that disagree, and four models: an autoregressive base, the block-diffusion student
that it is converted to, a larger teacher with the student's tokenizer, and a mixture of experts
with a tokenizer of its own, which is trained by masked diffusion. All begin as random weights, and
each diffusion model as an autoregressive one.

    python scripts/build_text_models.py                 # all, two processes of one thread each
    python scripts/build_text_models.py --only moe      # keep the others
    python scripts/build_text_models.py --quick         # a smoke run
"""

import argparse
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from diffdistill.bundled import bundled
from diffdistill.draws import Draws
from diffdistill.evaluation.python_source import header_of
from diffdistill.methods.bd3lm import BD3LM as Denoising
from diffdistill.pipelines.bd3lm import BD3LM
from diffdistill.pipelines.conversion import to_block_diffusion, to_masked_diffusion
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.mdlm import MDLM
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.types import Example, Progress

CPU = torch.device("cpu")
PARTS = ("student", "dense", "moe")
BLOCK = 16
LENGTH = 192

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = (
    "{% for message in messages %}<role>{{ message.role | upper }}</role>{{ message.content }}"
    "<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How large a model is, and how long and how fast it is trained.

    Steps are of ``tokens`` tokens each, padding included.
    """

    hidden: int
    layers: int
    heads: int
    inner: int
    experts: int = 0
    ar_steps: int = 1000
    diffusion_steps: int = 1000
    tokens: int = 4096
    matrix_rate: float = 0.03
    other_rate: float = 4e-3
    seed: int = 0


RECIPES = {
    "student": Recipe(hidden=96, layers=4, heads=3, inner=256),
    "dense": Recipe(hidden=192, layers=6, heads=6, inner=512),
    "moe": Recipe(hidden=160, layers=5, heads=5, inner=256, experts=8),
}


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a bundled file."""
    lines = bundled("data", name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def example_of(row: Mapping[str, Any]) -> Example:
    """A row as the families read it."""
    if "messages" in row:
        return Example("", messages=tuple(row["messages"]))
    return Example("", text=row["text"])


def whole(row: Mapping[str, Any]) -> str:
    """The function that a row is about."""
    if "text" in row:
        return str(row["text"])
    question, answer = (message["content"] for message in row["messages"])
    return f"{header_of(question)}\n{answer}"


def train_tokenizer(
    texts: Sequence[str], size: int, *, words: bool, specials: Sequence[str], template: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; the first of ``specials`` ends a text, the second fills rows.

    With ``words`` tokens stay within words, as of GPT-2 and Qwen; else they may hold line breaks
    and indents, and digits are single.
    """
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)]
    if not words:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(specials),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=specials[0],
        pad_token=specials[1],
        chat_template=template,
        model_max_length=512,
    )


def build_tokenizer(part: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a part: of 1535 tokens, so that the mask token is one of 1536, or 1279."""
    texts = [whole(row) for row in rows_of("python-train.jsonl")]
    if part == "moe":
        specials = ["<|role_end|>", "<|pad|>", "<role>", "</role>"]
        return train_tokenizer(texts, 1279, words=False, specials=specials, template=ROLES)
    specials = ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]
    return train_tokenizer(texts, 1535, words=True, specials=specials, template=CHATML)


def build_network(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """An untrained autoregressive network, with one spare embedding for the mask token."""
    torch.manual_seed(recipe.seed)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 1,
        "hidden_size": recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "head_dim": 32,
        "intermediate_size": recipe.inner,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    if not recipe.experts:
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    mixture = {
        "num_experts": recipe.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": recipe.inner,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **mixture))


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


class Optimizers:
    """Muon for the matrices between embedding and head, AdamW for everything else.

    Muon takes less than half of AdamW's steps here. The matrices of experts are stored as one
    tensor, which it does not take.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, steps: int) -> None:
        """Start both, with rates that rise over 20 steps, stay, and fall over the last 40 %."""
        matrices = [
            weight
            for name, weight in network.named_parameters()
            if weight.ndim == 2 and "layers" in name and "gate.weight" not in name
        ]
        known = {id(weight) for weight in matrices}
        others = [weight for weight in network.parameters() if id(weight) not in known]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.01),
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


def train(
    name: str, network: nn.Module, recipe: Recipe, steps: int, losses: Iterator[Tensor]
) -> None:
    """Descends one loss after the other; matrices are multiplied in bfloat16."""
    optimizers = Optimizers(network.train(), recipe, steps)
    start, recent = time.perf_counter(), list[float]()
    for number in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = next(losses)
        loss.backward()
        optimizers.step(number)
        recent.append(loss.item())
        if number % 50 == 49 or number == steps - 1:
            mean, seconds = sum(recent[-50:]) / len(recent[-50:]), time.perf_counter() - start
            print(f"{name} {number} loss {mean:.4f} seconds {seconds:.0f}", flush=True)
    network.eval()


def next_token_losses(
    network: Any, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[Tensor]:
    """The loss of an autoregressive model on functions, and on chats as its template has them."""
    rows = rows_of("python-train.jsonl")
    items = [tokenizer(whole(row))["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    items += [
        tokenizer.apply_chat_template(row["messages"], return_dict=False)
        for row in rows
        if "messages" in row
    ]
    items = [item[:LENGTH] for item in items]
    for numbers in Rows([len(item) for item in items], recipe.tokens, recipe.seed + 1):
        chosen = [torch.tensor(items[number]) for number in numbers]
        pad = nn.utils.rnn.pad_sequence
        tokens = pad(chosen, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad(chosen, batch_first=True, padding_value=-100)
        loss = network(input_ids=tokens, labels=labels).loss
        yield loss + balance(network, tokens)


def balance(network: Any, tokens: Tensor) -> Tensor:
    return torch.zeros(())


def denoising_losses(
    network: nn.Module, family: LanguageFamily, recipe: Recipe
) -> Iterator[Tensor]:
    """The likelihood bound of a diffusion model, by the library's own method."""
    pair = TextPair(family, family)
    rows = rows_of("python-train.jsonl")
    examples = [Example("", text=whole(row)) for row in rows]
    examples += [example_of(row) for row in rows if "messages" in row]
    items = pair.encode(examples)
    levels: Any = "block" if isinstance(family, BD3LM) else "sequence"
    method = Denoising(
        family=pair,
        draws=Draws(recipe.seed + 2),
        student=lambda state, condition: family.predict(network, state, condition),
        levels=levels,
        stratify=1 if levels == "block" else 16,
    )
    count = 0
    lengths = [len(item["student/tokens"]) for item in items]
    for numbers in Rows(lengths, recipe.tokens, recipe.seed + 3):
        batch = pair.collate([items[number] for number in numbers])
        batch["ids"] = torch.arange(count, count + len(numbers))
        count += len(numbers)
        yield from (loss.value for loss in method.losses(batch, Progress(0, 1)))

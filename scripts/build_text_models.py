"""Builds the language models of samples/models: they write short functions of Python's library.

Two tokenizers that disagree, and five models: an autoregressive base, the block-diffusion student
that it is converted to, a larger teacher with the student's tokenizer, a mixture of experts with
the other tokenizer, which is trained by masked diffusion, and an autoregressive teacher with that
one. All begin as random weights, and each diffusion model as an autoregressive one.

    python scripts/build_text_models.py                 # all, two processes of one thread each
    python scripts/build_text_models.py --only moe      # keep the others
    python scripts/build_text_models.py --quick         # a smoke run
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from model_building import (
    BLOCK,
    CPU,
    Optimizers,
    Rows,
    attention_in_float32,
    give_back,
    rows_of,
    save,
)
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeTopKRouter,
    load_balancing_loss_func,
)
from transformers.utils import logging as transformers_logging

from diffdistill.draws import Draws
from diffdistill.evaluation.language import answering, fitting, infilling, likelihood
from diffdistill.evaluation.likelihood import MonteCarlo
from diffdistill.evaluation.python_source import MAX_BYTES, completes, header_of
from diffdistill.methods import bd3lm as denoising
from diffdistill.pipelines.bd3lm import BD3LM
from diffdistill.pipelines.conversion import to_block_diffusion, to_masked_diffusion
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.mdlm import MDLM
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Role
from diffdistill.types import Example, Progress

PARTS = ("dense", "moe", "ar-teacher", "student")
"""The longest first."""
AUTOREGRESSIVE = ("python-ar", "python-ar-teacher")
"""The models that are not trained by denoising."""
LENGTH = 192
LOWEST = 0.25
"""The lowest noise level in training: gradients of lower ones vary most."""
DRAWS = 8
EXPERTS_OF_A_TOKEN = 2
BALANCE = 0.01

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen and Llama 3 split texts, without English contractions."""

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
    ar_steps: int = 4
    diffusion_steps: int = 4
    tokens: int = 4096
    matrix_rate: float = 0.012
    other_rate: float = 1e-2
    seed: int = 0


RECIPES = {
    "student": Recipe(hidden=64, layers=3, heads=2, inner=176, ar_steps=300, diffusion_steps=500),
    "dense": Recipe(hidden=192, layers=6, heads=6, inner=512, ar_steps=500, diffusion_steps=400),
    "moe": Recipe(
        hidden=160, layers=5, heads=5, inner=256, experts=8, ar_steps=600, diffusion_steps=1200
    ),
    "ar-teacher": Recipe(hidden=160, layers=5, heads=5, inner=432, ar_steps=800),
}


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

    With ``words`` tokens stay within words, and line breaks end them: an answer's indent is no part
    of the line break in front of it, so that a question ends alike with and without its answer.
    Else they may hold line breaks and indents, and digits are single.
    """
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if words:
        parts.insert(0, pre_tokenizers.Split(Regex(WORDS), behavior="isolated"))
    else:
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
    if part in ("moe", "ar-teacher"):
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
        "num_experts_per_tok": EXPERTS_OF_A_TOKEN,
        "moe_intermediate_size": recipe.inner,
        "norm_topk_prob": True,
        "router_aux_loss_coef": BALANCE,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **mixture))


class Balance:
    """What keeps all experts of a network in use; 0 for a network without any.

    The load-balancing loss of Switch Transformers (arXiv:2101.03961), from the routers' logits of
    the calls since the last time.
    """

    def __init__(self, network: nn.Module) -> None:
        """Listen to the routers."""
        self.logits: list[Tensor] = []
        routers = [m for m in network.modules() if isinstance(m, Qwen3MoeTopKRouter)]
        self.hooks = [router.register_forward_hook(self._listen) for router in routers]
        self.experts = routers[0].num_experts if routers else 0

    def _listen(self, module: nn.Module, args: Any, output: Any) -> None:
        self.logits.append(output[0])

    def __call__(self) -> Tensor:
        """The loss, a scalar."""
        if not self.hooks:
            return torch.zeros(())
        value = load_balancing_loss_func(tuple(self.logits), self.experts, EXPERTS_OF_A_TOKEN)
        self.logits.clear()
        assert isinstance(value, Tensor)
        return BALANCE * value

    def remove(self) -> None:
        """Stop to listen."""
        for hook in self.hooks:
            hook.remove()


@attention_in_float32()
def train(name: str, network: Any, recipe: Recipe, steps: int, losses: Iterator[Tensor]) -> None:
    """Descends one loss after the other; matrices but those of attention are in bfloat16."""
    optimizers, balance = Optimizers(network.train(), recipe, steps), Balance(network)
    start, recent = time.perf_counter(), list[float]()
    for number in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = next(losses)
        (loss + balance()).backward()
        optimizers.step(number)
        recent.append(loss.item())
        if number % 50 == 49 or number == steps - 1:
            mean, seconds = sum(recent[-50:]) / len(recent[-50:]), time.perf_counter() - start
            print(f"{name} {number} loss {mean:.4f} seconds {seconds:.0f}", flush=True)
            give_back()
    balance.remove()
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
        yield network(input_ids=tokens, labels=labels).loss


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
    method = denoising.BD3LM(
        family=pair,
        draws=Draws(recipe.seed + 2),
        student=lambda state, condition: family.predict(network, state, condition),
        levels=levels,
        stratify=16,
        t_low=LOWEST,
    )
    count = 0
    lengths = [len(item["student/tokens"]) for item in items]
    for numbers in Rows(lengths, recipe.tokens, recipe.seed + 3):
        batch = pair.collate([items[number] for number in numbers])
        batch["ids"] = torch.arange(count, count + len(numbers))
        count += len(numbers)
        yield from (loss.value for loss in method.losses(batch, Progress(0, 1)))


def reader_of(folder: Path, part: str) -> LanguageFamily:
    """The family that a diffusion model belongs to."""
    kind = MDLM if part == "moe" else BD3LM
    return kind(path=str(folder), device=CPU, block=BLOCK, max_length=LENGTH)


def build_base(part: str, recipe: Recipe, folder: Path) -> None:
    """Trains an autoregressive model, and saves it."""
    tokenizer = build_tokenizer(part)
    network = build_network(recipe, tokenizer)
    losses = next_token_losses(network, tokenizer, recipe)
    train(f"{part} autoregressive", network, recipe, recipe.ar_steps, losses)
    save(network, tokenizer, folder)


def build_diffusion(part: str, recipe: Recipe, base: Path, folder: Path) -> None:
    """Converts an autoregressive model, trains it by denoising, and saves it."""
    with tempfile.TemporaryDirectory() as work:
        converted = Path(work) / "converted"
        convert = to_masked_diffusion if part == "moe" else to_block_diffusion
        convert(str(base), converted)
        family = reader_of(converted, part)
        network = family.network().requires_grad_(True)
        losses = denoising_losses(network, family, recipe)
        train(f"{part} diffusion", network, recipe, recipe.diffusion_steps, losses)
        save(network, family.tokenizer, folder)


@torch.no_grad()
def measure_base(folder: Path, count: int) -> dict[str, float]:
    """Bits per byte of held-out functions, header and end included."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    network = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats, size = 0.0, 0
    for row in rows_of("python-held-out.jsonl")[:count]:
        ids = tokenizer(whole(row))["input_ids"] + [tokenizer.eos_token_id]
        tokens = torch.tensor([ids])
        nats += network(input_ids=tokens, labels=tokens).loss.item() * (len(ids) - 1)
        size += len(whole(row).encode())
    return {"bits per byte": nats / (size * math.log(2))}


def measure(folder: Path, part: str, count: int) -> dict[str, float]:
    """What a diffusion model does with held-out chats and texts."""
    family = reader_of(folder, part)
    role = Role(part, RoleSettings(weights="frozen"), family, family.network())
    examples = fitting([example_of(row) for row in rows_of("python-held-out.jsonl")], [family])
    chats = [example for example in examples if example.messages is not None][:count]
    texts = [example for example in examples if example.messages is None][:count]
    draws, results = Draws(0), dict[str, float]()
    how = MonteCarlo(num_draws=DRAWS, antithetic=True, seed=0, batch_size=32)
    for name, shown in (("answers", chats), ("texts", texts)):
        found = likelihood(role, shown, how)
        results[f"{name}, bits per byte"] = found.bits
        results[f"{name}, Monte Carlo error"] = found.error
    filled = infilling(role, chats, draws)
    results |= {"infilling, spans": filled.exact, "infilling, tokens": filled.tokens}
    exact = Unmasking(schedule="first-hitting", temperature=1.0)
    answered = answering(role, chats, draws, completes, unmasking=exact)
    return results | {
        "answers that parse": answered.accepted,
        "answers that end": answered.ended,
        "length of answers": answered.length,
    }


CARD = """---
license: other
license_name: psf-2.0
library_name: transformers
---

# {name}

{what}

Made by `scripts/build_text_models.py` (seed {seed}), from scratch and offline: {parameters:.2f} M
parameters ({embeddings:.2f} M of them embeddings), stored in float16; {training}.
Matrices by Muon, the rest by AdamW. Data: `samples/data/python-train.jsonl`, functions of Python's
standard library of at most {size} bytes, as plain text and as chats in which signature and
docstring ask for the body.

{use}

## Measured

| what | value |
|---|---|
{rows}

{measured}

## Data and license

Trained on source of the Python standard library, copyright Python Software Foundation, under the
PSF License ([data](../../data/README.md)). The weights are under the same.
"""

MEASURED = """From the saved float16 weights, on files kept from training: {count} chats and as many
texts. The bound counts the tokens that end an answer too, and its error is that of {draws} draws of
masks for each text. Infilling: 12 bytes of an answer hidden, greedy, the number of tokens known.
Answers: exact samples (first-hitting, temperature 1) of at most 96 tokens; their length is relative
to the right ones, because a mere `return` parses too."""

WHAT = {
    "python-ar": "An autoregressive Qwen3 of {layers} layers and {hidden} channels: what "
    "[python-bd3lm](../python-bd3lm/README.md) was converted from.",
    "python-ar-teacher": "An autoregressive Qwen3 of {layers} layers and {hidden} channels with "
    "the tokenizer and template of [python-moe](../python-moe/README.md): the teacher of "
    "`bld/python`, whose student is [python-ar](../python-ar/README.md).",
    "python-bd3lm": "A block-diffusion Qwen3 (BD3LM) of {layers} layers and {hidden} channels, "
    "blocks of {block} tokens, converted from [python-ar](../python-ar/README.md): the student of "
    "`tide-shared/python` and `tide-cross/python`, before any distillation.",
    "python-dense": "A block-diffusion Qwen3 of {layers} layers and {hidden} channels with the "
    "tokenizer of [python-bd3lm](../python-bd3lm/README.md): the teacher of "
    "`tide-shared/python`.",
    "python-moe": "A masked-diffusion Qwen3-MoE of {layers} layers and {hidden} channels, "
    "{experts} experts of which a token takes 2, with a tokenizer, template and mask token of its "
    "own: the teacher of `tide-cross/python`. Its tokens may hold line breaks and indents, and "
    "digits are single.",
}

USE = """```yaml
family: {{name: {family}, path: "bundled:{name}", block: {block}, max_length: {length}}}
```"""


def write_card(folder: Path, part: str, recipe: Recipe, count: int) -> None:
    """Measures a saved model, and writes its card."""
    name, base = folder.name, folder.name in AUTOREGRESSIVE
    results = measure_base(folder, count) if base else measure(folder, part, count)
    for key, value in results.items():
        print(f"{name}: {key} {value:.4g}", flush=True)
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"].numel()
    known = asdict(recipe) | {
        "name": name,
        "block": BLOCK,
        "length": LENGTH,
        "size": MAX_BYTES,
        "count": count,
        "draws": DRAWS,
        "family": "mdlm" if part == "moe" else "bd3lm",
        "parameters": sum(weight.numel() for weight in weights.values()) / 1e6,
        "embeddings": embeddings / 1e6,
    }
    training = f"{recipe.ar_steps} autoregressive steps"
    if not base:
        training += f", then {recipe.diffusion_steps} of denoising, noise levels from {LOWEST} on"
    text = CARD.format(
        **known,
        what=WHAT[name].format(**known),
        training=f"{training}, of {recipe.tokens} tokens each",
        use="" if base else USE.format(**known),
        rows="\n".join(f"| {key} | {value:.4g} |" for key, value in results.items()),
        measured=f"Of {count} held-out functions." if base else MEASURED.format(**known),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def build(part: str, output: Path, recipe: Recipe, count: int) -> str:
    """Builds a part: trains, saves and measures its models; returns what it was."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    if part == "student":
        base, folder = output / "python-ar", output / "python-bd3lm"
        build_base(part, recipe, base)
        build_diffusion(part, recipe, base, folder)
        write_card(base, part, recipe, count)
    elif part == "ar-teacher":
        folder = output / "python-ar-teacher"
        build_base(part, recipe, folder)
    else:
        folder = output / f"python-{part}"
        with tempfile.TemporaryDirectory() as work:
            build_base(part, recipe, Path(work) / "base")
            build_diffusion(part, recipe, Path(work) / "base", folder)
    write_card(folder, part, recipe, count)
    return f"{part}: {(time.perf_counter() - start) / 60:.1f} minutes"


def main() -> None:
    """Builds the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("samples/models"))
    parser.add_argument("--quick", action="store_true", help="a smoke run of few steps")
    parser.add_argument("--only", choices=PARTS, help="keep the others")
    parser.add_argument(
        "--threads", type=int, default=2, help="parts built at once, one thread each"
    )
    options = parser.parse_args()
    parts = [options.only] if options.only else PARTS
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.threads, mp_context=context) as pool:
        futures = []
        for part in parts:
            recipe = RECIPES[part]
            if options.quick:
                recipe = replace(recipe, ar_steps=4, diffusion_steps=4, tokens=512)
            count = 8 if options.quick else 192
            futures.append(pool.submit(build, part, options.output, recipe, count))
        for future in as_completed(futures):
            print(future.result(), flush=True)


if __name__ == "__main__":
    main()

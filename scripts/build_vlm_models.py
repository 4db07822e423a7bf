"""Builds the vision-language models of samples/models: a student, and a teacher that it fits.

Both are LLaVA models (a CLIP vision encoder, a projector, a Qwen3 language model) with one
tokenizer of single bytes and one image processor, trained from random weights on questions about
pictures of digits (``diffdistill.evaluation.digit_questions``). Their vision encoders are as wide,
so that the student's goes through the teacher's projector.

    python scripts/build_vlm_models.py                 # both, one after the other
    python scripts/build_vlm_models.py --only student  # keep the teacher
    python scripts/build_vlm_models.py --quick         # a smoke run
"""

import argparse
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_building import Optimizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from diffdistill.evaluation.digit_questions import (
    KINDS,
    SIDE,
    DigitQuestion,
    digit_questions,
)

PARTS = ("teacher", "student")
PATCH = 4
PLACES = (SIDE // PATCH) ** 2
MAX_ANSWER = 8
PIXEL = 0.5
"""Mean and deviation by which pixels in [0, 1] are normalized."""
SPECIALS = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How large a model is, and how long and how fast it is trained.

    Attributes:
        eyes: Layers of the vision encoder, of 64 channels.
        hidden: Channels of the language model.
        layers: Its layers.
        heads: Its heads, of 32 channels each.
        inner: Channels within a layer's MLP.
        steps: Of training.
        batch: Questions of a step.
        matrix_rate: Of Muon.
        other_rate: Of AdamW.
        seed: Of everything.
    """

    eyes: int
    hidden: int
    layers: int
    heads: int
    inner: int
    steps: int
    batch: int = 64
    matrix_rate: float = 0.012
    other_rate: float = 3e-3
    seed: int = 0


RECIPES = {
    "teacher": Recipe(eyes=3, hidden=96, layers=3, heads=3, inner=256, steps=600),
    "student": Recipe(eyes=1, hidden=64, layers=2, heads=2, inner=176, steps=250),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, a special token for each role, and one for pictures."""
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIALS[0],
        pad_token=SPECIALS[1],
        additional_special_tokens=SPECIALS[2:],
        chat_template=TEMPLATE,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """What turns a chat with pictures of 24x24 into tokens and pixels: 36 tokens a picture."""
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size=side,
        image_mean=[PIXEL] * 3,
        image_std=[PIXEL] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=SPECIALS[5],
        chat_template=TEMPLATE,
    )


def build_network(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """An untrained network."""
    torch.manual_seed(recipe.seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=recipe.eyes,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=32,
        intermediate_size=recipe.inner,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(SPECIALS[5]),
        image_seq_length=PLACES,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def pixels_of(questions: Sequence[DigitQuestion]) -> Tensor:
    """Pictures as the processor gives them, float32 ``[B, 3, 24, 24]``."""
    levels = torch.from_numpy(np.stack([q.picture for q in questions])).float() / 255
    return ((levels - PIXEL) / PIXEL)[:, None].expand(-1, 3, -1, -1)


def prompt_of(question: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of a question after a picture, where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text.replace(SPECIALS[5], SPECIALS[5] * PLACES))["input_ids"]


def losses(network: Any, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[Tensor]:
    """Yield the loss of the next token, of answers alone, of one batch after the other."""
    source = digit_questions(recipe.seed + 100)
    prompts = {kind: prompt_of(f"{kind}?", tokenizer) for kind in KINDS}
    while True:
        batch = list(islice(source, recipe.batch))
        rows = []
        for question in batch:
            answer = tokenizer(question.answer)["input_ids"] + [tokenizer.eos_token_id]
            rows.append((prompts[question.kind], answer))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens = torch.full((len(rows), longest), tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), -100)
        for row, (prompt, answer) in enumerate(rows):
            start, end = len(prompt), len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            labels[row, start:end] = tokens[row, start:end]
        yield network(input_ids=tokens, labels=labels, pixel_values=pixels_of(batch)).loss


def train(part: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A trained network."""
    network = build_network(recipe, tokenizer).train()
    optimizers, source = (
        Optimizers(network, recipe, recipe.steps),
        losses(network, tokenizer, recipe),
    )
    start, recent = time.perf_counter(), list[float]()
    for number in range(1, recipe.steps + 1):
        loss = next(source)
        loss.backward()
        recent.append(loss.item())
        optimizers.step(number - 1)
        if number % 100 == 0 or number == recipe.steps:
            seconds = time.perf_counter() - start
            mean = sum(recent) / len(recent)
            print(f"{part} {number} loss {mean:.4f} seconds {seconds:.0f}", flush=True)
            recent.clear()
    return network.eval()


@torch.no_grad()
def measure(folder: Path, count: int) -> dict[str, float]:
    """How many greedy answers of a saved model to held-out questions are right, by kind."""
    processor = LlavaProcessor.from_pretrained(folder)
    network = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    questions = list(islice(digit_questions(1, held_out=True), count))
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        asked = [question for question in questions if question.kind == kind]
        if not asked:
            continue
        prompt = torch.tensor([prompt_of(f"{kind}?", processor.tokenizer)])
        found = network.generate(
            input_ids=prompt.repeat(len(asked), 1),
            attention_mask=torch.ones(len(asked), prompt.shape[1], dtype=torch.long),
            pixel_values=pixels_of(asked),
            max_new_tokens=MAX_ANSWER,
            do_sample=False,
        )
        texts = processor.batch_decode(found[:, prompt.shape[1] :], skip_special_tokens=True)
        right[kind] = [text == q.answer for text, q in zip(texts, asked, strict=True)]
    every = [value for values in right.values() for value in values]
    rows = right | {"all kinds": every}
    return {name: sum(values) / max(1, len(values)) for name, values in rows.items()}


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A LLaVA of {eyes} vision and {layers} language layers that answers questions about pictures of
handwritten digits: {what}.

Made by `scripts/build_vlm_models.py` (seed {seed}), from scratch and offline: {parameters:.2f} M
parameters stored in float16; a CLIP vision encoder of 64 channels with patches of {patch}x{patch}
(36 places of a picture of 24x24), LLaVA's projector, a Qwen3 of {hidden} channels, and a tokenizer
of single bytes. {steps} steps of {batch} questions, none of them twice; matrices by Muon, the rest
by AdamW. `digits-vlm-student` and `digits-vlm-teacher` share tokenizer, image processor and the
width of their vision encoders, so that the student's features go through the teacher's projector.

```yaml
family: {{name: vlm, path: "bundled:{name}"}}
```

## Measured

From the saved float16 weights: the share of right greedy answers to {count} held-out questions,
about scans that were in no picture of training.

{table}

## Data and license

The scans are those of scikit-learn's `load_digits`, a copy of the test set of the UCI "Optical
Recognition of Handwritten Digits" data (E. Alpaydin and C. Kaynak, CC BY 4.0). Pictures and
questions are ours ([data](../../data/README.md)), and so are the weights, under Apache-2.0.
"""

WHAT = {
    "student": "the student of `switch-kd/digits`, before any distillation, and wrong more often "
    "than its [teacher](../digits-vlm-teacher/README.md)",
    "teacher": "the teacher of [digits-vlm-student](../digits-vlm-student/README.md)",
}


def write_card(
    folder: Path, part: str, recipe: Recipe, count: int, known: Mapping[str, Any]
) -> None:
    """Measures a saved model, and writes its card."""
    table = measure(folder, count)
    print(folder.name, {name: round(value, 3) for name, value in table.items()}, flush=True)
    rows = [f"| {name} | {value:.3f} |" for name, value in table.items()]
    text = CARD.format(
        **asdict(recipe),
        **known,
        name=folder.name,
        what=WHAT[part],
        patch=PATCH,
        count=count,
        table="\n".join(["| question | right |", "|---|---|", *rows]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def build(part: str, output: Path, recipe: Recipe, count: int) -> None:
    """Builds a model: trains, saves and measures it."""
    start = time.perf_counter()
    folder, processor = output / f"digits-vlm-{part}", build_processor()
    network = train(part, recipe, processor.tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    network.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    parameters = sum(weight.numel() for weight in network.parameters()) / 1e6
    write_card(folder, part, recipe, count, {"parameters": parameters})
    print(f"{part}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


def main() -> None:
    """Builds the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("samples/models"))
    parser.add_argument("--quick", action="store_true", help="a smoke run of few steps")
    parser.add_argument("--only", choices=PARTS, help="keep the other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    for part in [options.only] if options.only else PARTS:
        recipe, count = RECIPES[part], 600
        if options.quick:
            recipe, count = replace(recipe, steps=2, batch=4), 12
        build(part, options.output, recipe, count)


if __name__ == "__main__":
    main()

"""Builds `skills-base` of samples/models: it adds, multiplies and edits words, often wrongly.

The same architecture, tokenizer and training as `arithmetic-student` (see
`build_arithmetic_models.py`), on two skills at once. Of what it can do already, it learns no more
until it can do the other as well.

    python scripts/build_skills_model.py            # one process, one thread
    python scripts/build_skills_model.py --quick    # a smoke run
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from build_arithmetic_models import (
    MAX_TOKENS,
    NUM_SAMPLES,
    RECIPES,
    Lesson,
    Recipe,
    Skill,
    build_tokenizer,
    mean,
    right,
    train,
    written,
)
from model_building import rows_of, save
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from diffdistill.evaluation import arithmetic, editing

RECIPE = replace(
    RECIPES["student"], goal=0.4, steps=2400, malformed=0.0, revealed=0.0, pool=30_000, seed=1
)


def sums(seed: int) -> Iterator[arithmetic.Problem]:
    """Sums and products for training, with their answers in a box."""
    return arithmetic.problems(seed, formats=("box",))


SKILLS: Mapping[str, tuple[Callable[[int], Iterator[Any]], Callable[[str], Any]]] = {
    "arithmetic": (sums, arithmetic.read_question),
    "editing": (editing.edits, editing.read_question),
}
"""What makes the problems of a skill, and what reads a question."""

CARD = """---
license: apache-2.0
library_name: transformers
---

# skills-base

An autoregressive Qwen3 of {layers} layers and {hidden} channels that adds and multiplies, and
edits words, both with a scratchpad ([data](../../data/README.md)), and is often wrong: what
[copd](../../../docs/methods/copd.md) starts from. Its answers end with a box:

```text
478+694 box
sort fabdee box
```

Made by `scripts/build_skills_model.py` (seed {seed}), from scratch and offline: {parameters:.2f} M
parameters stored in float16; the tokenizer of single bytes of `arithmetic-student`. Trained on
{pool} problems of each skill that are not held out, in steps of {tokens} tokens; matrices by Muon,
the rest by AdamW; averaged weights (decay {average}).

How good it is is by design: training ended after {taken} steps, when of the answers sampled to
{checked} questions of either skill at least {accuracy:.0%} were right (the recipe says {goal:.0%},
or {steps} steps). What was above that was not trained on until the other was too.

## Measured

From the saved float16 weights, by `generate` of transformers on {count} held-out questions of each
skill: the share of right answers, greedy, and the mean over {samples} answers sampled at
temperature 1.

{rows}
"""


def skill(name: str, recipe: Recipe) -> Skill:
    """What is learned of a skill, and what is asked to measure it."""
    make, _ = SKILLS[name]
    learned = islice(make(recipe.seed + 2), recipe.pool)
    lessons = [Lesson(problem.question, problem.solution) for problem in learned]
    return Skill(lessons, list(islice(make(recipe.seed + 4), recipe.checked)))


def measure(folder: Path, count: int) -> dict[str, list[float]]:
    """What a saved model does with held-out questions: greedy and sampled, by skill and level."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    network = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table: dict[str, list[float]] = {}
    for name, (_, read) in SKILLS.items():
        rows = rows_of(f"{name}-held-out.jsonl")[:count]
        chosen = [read(row["messages"][0]["content"]) for row in rows]
        for repeats, seed in ((1, None), (NUM_SAMPLES, 0)):
            many = [problem for problem in chosen for _ in range(repeats)]
            how: dict[str, Any] = {"seed": seed, "max_tokens": MAX_TOKENS}
            texts, _ = written(network, tokenizer, [p.question for p in many], **how)
            scores = list(zip(right(texts, many), many, strict=True))
            for key in (name, *sorted({problem.level for problem in chosen})):
                of = [value for value, problem in scores if key in (name, problem.level)]
                table.setdefault(key, []).append(mean(of))
    return table


def build(output: Path, recipe: Recipe, count: int) -> dict[str, list[float]]:
    """Trains, saves and measures the model, and writes its card; returns what was measured."""
    folder, tokenizer = output / "skills-base", build_tokenizer()
    skills = {name: skill(name, recipe) for name in SKILLS}
    network, taken, accuracy = train("skills-base", recipe, tokenizer, skills)
    save(network, tokenizer, folder)
    table = measure(folder, count)
    lines = ["| | greedy | sampled |", "|---|---|---|"]
    for key, values in table.items():
        lines.append(f"| {key} | {' | '.join(f'{value:.3f}' for value in values)} |")
    text = CARD.format(
        **asdict(recipe),
        taken=taken,
        accuracy=accuracy,
        parameters=sum(weight.numel() for weight in network.parameters()) / 1e6,
        count=count,
        samples=NUM_SAMPLES,
        rows="\n".join(lines),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return table


def main() -> None:
    """Builds the model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("samples/models"))
    parser.add_argument("--quick", action="store_true", help="a smoke run of few steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe, start = RECIPE, time.perf_counter()
    if options.quick:
        recipe = replace(recipe, steps=4, measure_every=2, tokens=512, pool=300, checked=4)
    table = build(options.output, recipe, 9 if options.quick else 400)
    print({key: table[key] for key in SKILLS}, f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()

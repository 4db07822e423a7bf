"""Builds the arithmetic models of samples/models: a student that is often wrong, and teachers.

All are autoregressive Qwen3 models with one tokenizer of single bytes, trained from random weights
on worked solutions (``diffdistill.evaluation.arithmetic``), and on copying from a solution that
the question shows in part, so that a model can be its own teacher. How good they are is by design:
training ends where sampled answers are right as often as the recipe says. The second teacher writes
its scratchpad in another style than the student, with words in place of signs, and can go on with
one that was begun in signs.

    python scripts/build_arithmetic_models.py                 # all, two processes of one thread
    python scripts/build_arithmetic_models.py --only student  # keep the teachers
    python scripts/build_arithmetic_models.py --quick         # a smoke run
"""

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from model_building import BLOCK, CPU, Optimizers, Rows, attention_in_float32, rows_of, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from diffdistill.evaluation.arithmetic import LEVELS, Problem, problems, read_question, worded
from diffdistill.exposures import reveal
from diffdistill.rewards.boxed import Boxed
from diffdistill.rewards.json_answer import JsonAnswer
from diffdistill.types import Example

PARTS = ("teacher", "words-teacher", "student")
"""The longest first."""
PRIVILEGED = "{question}\n{solution}"
"""What a teacher is asked that is shown a solution, or a part of it."""
EXPOSURES = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_TOKENS = 96
"""Of an answer in signs; one in words is at most twice as long."""
GROUPS = 4
"""Batches of like lengths in a step; more would be more alike than the steps are."""
NUM_SAMPLES = 4
MARK = "\0"
"""Stands for the question where the template is looked at."""
BATCH = 128
JUDGES = {"box": Boxed(device=CPU), "json": JsonAnswer(device=CPU)}

SPECIALS = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How large a model is, how it is trained, and when that ends.

    Attributes:
        hidden: Channels.
        layers: Layers.
        heads: Heads, of 32 channels each.
        inner: Channels within a layer's MLP.
        goal: The share of right answers, of questions with a box, sampled, at which it ends.
        steps: It ends here at the latest; rates fall over the last 40 %.
        measure_every: Steps from one measurement to the next.
        malformed: The share of the JSON answers to learn from that break the format.
        revealed: The share of questions that show a part of the solution.
        style: Of scratchpads, with signs or words between the numbers.
        begun: The share of answers in words that go on with a scratchpad begun in signs.
        tokens: Of a step, padding included.
        pool: Different problems to learn from, about.
        checked: Problems of a measurement.
        average: Decay of the averaged weights, which are those that are measured and saved.
        matrix_rate: Of Muon.
        other_rate: Of AdamW.
        seed: Of everything.
    """

    hidden: int
    layers: int
    heads: int
    inner: int
    goal: float
    steps: int
    measure_every: int
    malformed: float
    revealed: float
    style: Literal["signs", "words"] = "signs"
    begun: float = 0.3
    tokens: int = 4096
    pool: int = 40_000
    checked: int = 180
    average: float = 0.98
    matrix_rate: float = 0.012
    other_rate: float = 1e-2
    seed: int = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest answer."""
        return MAX_TOKENS * (2 if self.style == "words" else 1)


class Lesson(NamedTuple):
    """What is to be learned.

    Attributes:
        question: The question, with what it shows of the solution.
        answer: What is learned.
        given: How the answer begins, which is not learned.
    """

    question: str
    answer: str
    given: str = ""


RECIPES = {
    "student": Recipe(
        hidden=96,
        layers=4,
        heads=3,
        inner=256,
        goal=0.35,
        steps=1600,
        measure_every=20,
        malformed=0.4,
        revealed=0.6,
    ),
    "teacher": Recipe(
        hidden=160,
        layers=5,
        heads=5,
        inner=448,
        goal=0.9,
        steps=2400,
        measure_every=50,
        malformed=0.03,
        revealed=0.1,
    ),
    "words-teacher": Recipe(
        hidden=128,
        layers=4,
        heads=4,
        inner=352,
        goal=0.9,
        steps=1200,
        measure_every=50,
        malformed=0.03,
        revealed=0.0,
        style="words",
        tokens=6144,
    ),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, and a special token for each role."""
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
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_network(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """An untrained network."""
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=32,
        intermediate_size=recipe.inner,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def asked(problem: Problem, exposure: float | None = None) -> str:
    """A question, with as much of its solution as a teacher is shown."""
    if exposure is None:
        return problem.question
    shown = reveal(problem.solution, exposure, problem.answer)
    return PRIVILEGED.format(question=problem.question, solution=shown)


def malformed(problem: Problem, generator: random.Random) -> str:
    """The last line of a JSON solution, in one of four ways that no strict parser reads."""
    answer = problem.answer
    lines = (
        f"{{answer: {answer}}}",
        f"{{'answer': {answer}}}",
        f'{{"answer": {answer}',
        f'{{"answer": {answer}}}.',
    )
    return generator.choice(lines)


def lessons(recipe: Recipe) -> Iterator[Lesson]:
    """Yield what to learn.

    Some questions show a part of the solution; of the others with JSON, some answers break the
    format.
    """
    generator = random.Random(recipe.seed + 1)
    for problem in islice(problems(recipe.seed + 2), recipe.pool):
        question, solution = asked(problem), problem.solution
        if generator.random() < recipe.revealed:
            question = asked(problem, generator.choice(EXPOSURES))
        elif problem.format == "json" and generator.random() < recipe.malformed:
            solution = "\n".join([*problem.steps, malformed(problem, generator)])
        if recipe.style == "signs":
            yield Lesson(question, solution)
        else:
            yield in_words(question, solution, recipe, generator)


def in_words(question: str, solution: str, recipe: Recipe, generator: random.Random) -> Lesson:
    """A solution in words; or, where its beginning is given in signs, in words from the next line.

    So the teacher never begins in signs, and never breaks off a line in them.
    """
    if generator.random() >= recipe.begun:
        return Lesson(question, worded(solution))
    cut = generator.randrange(1, solution.rindex("\n"))
    line, end, later = solution[cut:].partition("\n")
    return Lesson(question, line + end + worded(later), solution[:cut])


def prompts_of(questions: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Questions in the chat template, where the answers begin."""
    chat = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, after = text.split(MARK)
    return [f"{before}{question}{after}" for question in questions]


def losses(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    learned: Sequence[Lesson],
) -> Iterator[Tensor]:
    """Yield the loss of the next token, of answers alone, of one batch after the other.

    Their shapes are few, which torch keeps what it prepares for.
    """
    begun = prompts_of([lesson.question for lesson in learned], tokenizer)
    begun = [prompt + lesson.given for prompt, lesson in zip(begun, learned, strict=True)]
    prompts = tokenizer(begun)["input_ids"]
    answers = tokenizer([lesson.answer + tokenizer.eos_token for lesson in learned])["input_ids"]
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    for numbers in Rows(lengths, recipe.tokens // GROUPS, recipe.seed + 3):
        longest = -(-max(lengths[number] for number in numbers) // BLOCK) * BLOCK
        tokens = torch.full((len(numbers), longest), tokenizer.pad_token_id)
        labels = torch.full((len(numbers), longest), -100)
        for row, number in enumerate(numbers):
            start, end = len(prompts[number]), lengths[number]
            tokens[row, :end] = torch.tensor(prompts[number] + answers[number])
            labels[row, start:end] = tokens[row, start:end]
        yield network(input_ids=tokens, labels=labels).loss


@torch.no_grad()
def written(
    network: Any,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    begun: Sequence[str] = (),
    *,
    seed: int | None,
    max_tokens: int,
) -> tuple[list[str], list[int]]:
    """The answers to questions and how many tokens each has; greedy ones without a seed.

    Args:
        network: The model.
        tokenizer: Its tokenizer.
        questions: What is asked.
        begun: How each answer begins, which is no part of what is returned.
        seed: Of sampled answers.
        max_tokens: Of an answer.
    """
    texts, sizes = list[str](), list[int]()
    how: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    for start in range(0, len(questions), BATCH):
        prompts = prompts_of(questions[start : start + BATCH], tokenizer)
        if begun:
            pairs = zip(prompts, begun[start : start + BATCH], strict=True)
            prompts = [prompt + given for prompt, given in pairs]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        found = network.generate(**inputs, max_new_tokens=max_tokens, **how)
        answers = found[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
        sizes += answers.ne(tokenizer.pad_token_id).sum(1).tolist()
    return texts, sizes


def right(texts: Sequence[str], asked_for: Sequence[Problem]) -> list[float]:
    """1 for each answer that is right and in its format, 0 for another."""
    return [
        JUDGES[problem.format].score([text], [Example("", answer=problem.answer)]).item()
        for text, problem in zip(texts, asked_for, strict=True)
    ]


def mean(values: Sequence[float]) -> float:
    """The mean; of nothing, not a number."""
    return sum(values) / len(values) if values else float("nan")


class Skill(NamedTuple):
    """Something to learn, and problems that are asked to measure."""

    lessons: Sequence[Lesson]
    checked: Sequence[Any]


def arithmetic(recipe: Recipe) -> Skill:
    """Arithmetic as the recipe says, measured by questions with a box."""
    checked = islice(problems(recipe.seed + 4, formats=("box",)), recipe.checked)
    return Skill(list(lessons(recipe)), list(checked))


@attention_in_float32()
def train(
    name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, skills: Mapping[str, Skill]
) -> tuple[Any, int, float]:
    """Trains until the goal; returns averaged weights, steps taken and the last, least accuracy.

    What is at the goal waits for the others. Matrices but those of attention are in bfloat16.
    """
    network = build_network(recipe, tokenizer).train()
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
    optimizers = Optimizers(network, recipe, recipe.steps)
    sources = {
        key: losses(network, tokenizer, recipe, skill.lessons) for key, skill in skills.items()
    }
    start, recent, reached = time.perf_counter(), list[float](), dict.fromkeys(skills, 0.0)
    for number in range(1, recipe.steps + 1):
        wanting = [key for key in skills if reached[key] < recipe.goal] or list(skills)
        for group in range(GROUPS):
            with torch.autocast("cpu", torch.bfloat16):
                loss = next(sources[wanting[group % len(wanting)]]) / GROUPS
            loss.backward()
            recent.append(loss.item() * GROUPS)
        optimizers.step(number - 1)
        averaged.update_parameters(network)
        if number % recipe.measure_every and number < recipe.steps:
            continue
        for key, skill in skills.items():
            questions = [problem.question for problem in skill.checked]
            how = {"seed": recipe.seed + number, "max_tokens": recipe.max_tokens}
            texts, _ = written(averaged.module.eval(), tokenizer, questions, **how)
            reached[key] = mean(right(texts, skill.checked))
        seconds = time.perf_counter() - start
        accuracies = ", ".join(f"{key} {value:.3f}" for key, value in reached.items())
        print(
            f"{name} {number} loss {mean(recent):.4f} accuracy {accuracies} seconds {seconds:.0f}",
            flush=True,
        )
        recent.clear()
        if min(reached.values()) >= recipe.goal:
            break
    return averaged.module.eval(), number, min(reached.values())


def measure(folder: Path, count: int, recipe: Recipe) -> dict[str, dict[str, float]]:
    """What a saved model does with held-out questions: numbers by row and column of a table.

    Args:
        folder: Where it is.
        count: Questions of each format.
        recipe: Of the model.
    """
    most = recipe.max_tokens
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    network = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table: dict[str, dict[str, float]] = {level: {} for level in (*LEVELS, "all")}
    for style, name in (("box", "held-out"), ("json", "json-held-out")):
        rows = rows_of(f"arithmetic-{name}.jsonl")[:count]
        chosen = [read_question(row["messages"][0]["content"]) for row in rows]
        questions = [problem.question for problem in chosen]
        texts, _ = written(network, tokenizer, questions, seed=None, max_tokens=most)
        add_levels(table, f"{style}, greedy", right(texts, chosen), chosen)
        many = [problem for problem in chosen for _ in range(NUM_SAMPLES)]
        again = [problem.question for problem in many]
        texts, sizes = written(network, tokenizer, again, seed=0, max_tokens=most)
        add_levels(table, f"{style}, mean@{NUM_SAMPLES}", right(texts, many), many)
        table["all"] |= {
            f"{style}, parse rate": JUDGES[style].parses(texts).float().mean().item(),
            f"{style}, tokens": mean(sizes),
            f"{style}, ended": mean([float(size < most) for size in sizes]),
        }
        for exposure in EXPOSURES if recipe.revealed else ():
            shown = [asked(problem, exposure) for problem in chosen]
            texts, _ = written(network, tokenizer, shown, seed=None, max_tokens=most)
            table["all"][f"{style}, exposure {exposure}"] = mean(right(texts, chosen))
        if recipe.style == "words":
            given = [problem.solution[: len(problem.solution) // 2] for problem in chosen]
            texts, _ = written(network, tokenizer, questions, given, seed=None, max_tokens=most)
            table["all"][f"{style}, begun in signs"] = mean(right(texts, chosen))
    return table


def add_levels(
    table: dict[str, dict[str, float]],
    name: str,
    values: Sequence[float],
    of: Sequence[Problem],
) -> None:
    """Adds the mean of values of each level, and of all, as a column."""
    for level, columns in table.items():
        chosen = [v for v, p in zip(values, of, strict=True) if level in (p.level, "all")]
        columns[name] = mean(chosen)


CARD = """---
license: apache-2.0
library_name: transformers
---

# {name}

An autoregressive Qwen3 of {layers} layers and {hidden} channels that adds and multiplies with a
scratchpad, {what}. Its answers end
with a box or with a JSON object, as the question says ([data](../../data/README.md)):

```text
478+694 box
```

Made by `scripts/build_arithmetic_models.py` (seed {seed}), from scratch and offline:
{parameters:.2f} M parameters stored in float16; a tokenizer of single bytes that
`arithmetic-student` and `arithmetic-teacher` share. Trained on about {pool} problems that are not
held out, half of them with JSON, in steps of {tokens} tokens; matrices by Muon, the rest by AdamW;
averaged weights (decay {average}).

How good it is is by design, not all that it could be:

- training ended after {taken} steps, when {accuracy:.0%} of the answers sampled to {checked}
  questions with a box were right: the recipe says {goal:.0%}, or {steps} steps;
- {malformed:.0%} of the JSON answers that it learned from break the format, each in one of four
  ways, so that there is a parse rate to gain;
- {seen}

## Measured

From the saved float16 weights, by `generate` of transformers on {count} held-out questions of each
format: the share of right answers in the right format, greedy, and the mean over {samples} answers
sampled at temperature 1.

{levels}

Of the sampled answers, and, greedy, the share of right ones where {where}:

{rows}
"""

SEEN = {
    "signs": "{revealed:.0%} of the questions that it learned from show a part of the solution and "
    "its final\n  answer, after a line break, so that it can be its own teacher. Their answers are "
    "all well formed.",
    "words": "{begun:.0%} of the answers that it learned from go on with one that is begun in "
    "signs, and from the\n  next line on in words, so that it can take part in what the student "
    "writes.",
}
WHERE = {
    "signs": "the question shows a share of the\nsolution's lines (exposure) and its final answer",
    "words": "the first half of the\nsolution is given in signs",
}
WHAT = {
    "words-teacher": "mostly right, with words in place of the signs that\n"
    "[arithmetic-student](../arithmetic-student/README.md) writes (`8 and 4 and 0 make 12`)",
    "student": "wrong more often than right: what distillation starts from",
    "teacher": "mostly right: what [arithmetic-student](../arithmetic-student/README.md) can learn "
    "from",
}


def level_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """Accuracies by level, in Markdown."""
    columns = list(table[LEVELS[0]])
    lines = [f"| level | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for level, values in table.items():
        lines.append(f"| {level} | {' | '.join(f'{values[c]:.3f}' for c in columns)} |")
    return "\n".join(lines)


def write_card(folder: Path, part: str, recipe: Recipe, count: int, known: dict[str, Any]) -> None:
    """Measures a saved model, and writes its card."""
    table = measure(folder, count, recipe)
    columns = table[LEVELS[0]]
    rest = {name: value for name, value in table["all"].items() if name not in columns}
    for name, value in table["all"].items():
        print(f"{folder.name}: {name} {value:.4g}", flush=True)
    text = CARD.format(
        **asdict(recipe),
        **known,
        name=folder.name,
        what=WHAT[part],
        seen=SEEN[recipe.style].format(**asdict(recipe)),
        where=WHERE[recipe.style],
        count=count,
        samples=NUM_SAMPLES,
        levels=level_table(table),
        rows="\n".join(
            ["| what | value |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in rest.items())]
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def build(part: str, output: Path, recipe: Recipe, count: int) -> str:
    """Builds a model: trains, saves and measures it; returns what it was."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    folder, tokenizer = output / f"arithmetic-{part}", build_tokenizer()
    skills = {"arithmetic": arithmetic(recipe)}
    network, taken, accuracy = train(part, recipe, tokenizer, skills)
    parameters = sum(weight.numel() for weight in network.parameters()) / 1e6
    save(network, tokenizer, folder)
    known = {"taken": taken, "accuracy": accuracy, "parameters": parameters}
    write_card(folder, part, recipe, count, known)
    return f"{part}: {(time.perf_counter() - start) / 60:.1f} minutes"


def main() -> None:
    """Builds the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("samples/models"))
    parser.add_argument("--quick", action="store_true", help="a smoke run of few steps")
    parser.add_argument("--only", choices=PARTS, help="keep the other")
    parser.add_argument(
        "--threads", type=int, default=2, help="models built at once, one thread each"
    )
    options = parser.parse_args()
    parts = [options.only] if options.only else PARTS
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.threads, mp_context=context) as pool:
        futures = []
        for part in parts:
            recipe = RECIPES[part]
            if options.quick:
                recipe = replace(recipe, steps=4, measure_every=2, tokens=512, pool=300, checked=4)
            count = 9 if options.quick else 400
            futures.append(pool.submit(build, part, options.output, recipe, count))
        for future in as_completed(futures):
            print(future.result(), flush=True)


if __name__ == "__main__":
    main()

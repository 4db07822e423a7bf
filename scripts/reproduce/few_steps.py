"""Do SDTT and confidence-aware training keep a diffusion language model's answers in fewer steps?

Goes on training the bundled `python-bd3lm` on functions of Python's library: by likelihood alone,
by SDTT (arXiv:2410.21035) from 16 steps for a block of 16 tokens down to 2, in three rounds or in
one, and by the confidence-aware loss of diffusers and d3LLM (arXiv:2601.07568), with its entropy
term and without. Each student then answers held-out questions in 16, 4 and 2 steps for a block; an
autoregressive model, `python-ar-teacher`, says how likely the answers are. And with a confidence
threshold: how many calls of the network an answer takes.

    python scripts/reproduce/few_steps.py

Writes results.json, figure.png and README.md to samples/few-steps. Each run is saved when it is
done, and what is there already is not run again.
"""

import argparse
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from collecting import (
    Arm,
    cell,
    collect,
    deviation,
    differences,
    header,
    open_results,
    quiet,
    row,
    save_results,
    values,
    write_page,
)
from matplotlib.figure import Figure

from diffdistill.bundled import bundled
from diffdistill.checkpoints import restore
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.data.settings import DataSettings
from diffdistill.data.texts import open_texts
from diffdistill.draws import Draws
from diffdistill.evaluation.bits import bits_per_byte
from diffdistill.evaluation.language import Answered, answering, fitting, likelihood
from diffdistill.evaluation.likelihood import MonteCarlo
from diffdistill.evaluation.python_source import completes
from diffdistill.pipelines.text_rows import Reading
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.roles import Role
from diffdistill.session import build, text_pair
from diffdistill.types import Example

ROOT = Path(__file__).parents[2]
CONFIG, JUDGE = "bd3lm/python", "bld/python"
ROUNDS = 3
BUDGETS = (16, 4, 2)
"""Sampling steps for a block of 16 tokens."""
ARMS = {
    "likelihood": Arm(CONFIG, []),
    "SDTT": Arm(CONFIG, ["method={name: sdtt, num_steps: 16, last_steps: 2}"]),
    "SDTT, forward KL": Arm(
        CONFIG, ["method={name: sdtt, num_steps: 16, last_steps: 2, divergence: forward-kl}"]
    ),
    "SDTT, one round": Arm(
        CONFIG, ["method={name: sdtt, num_steps: 16, last_steps: 2, round_updates: null}"]
    ),
    "confidence": Arm(CONFIG, ["method={name: confidence}"]),
    "confidence, weight 0": Arm(CONFIG, ["method={name: confidence, confidence_weight: 0}"]),
}
SHOWN = {
    **{f"bits/{steps}": f"bits in {steps} steps" for steps in BUDGETS},
    **{f"entropy/{steps}": f"their entropy in {steps}" for steps in BUDGETS},
    **{f"valid/{steps}": f"answers that parse in {steps}" for steps in BUDGETS},
    "threshold/calls": "calls an answer by threshold",
    "threshold/length": "its length",
    "threshold/bits": "bits by threshold",
    "threshold/valid": "answers that parse by threshold",
    "likelihood": "right answers, bits per byte",
}


class World:
    """Held-out questions, and who judges the answers."""

    def __init__(self, count: int) -> None:
        """Read so many chats that all readers can read as a whole."""
        dataset = open_texts(DataSettings(path=str(bundled("data", "python-held-out.jsonl"))))
        examples = [dataset[index] for index in range(len(dataset))]
        pair = text_pair(build(load_config(CONFIG)))
        found = fitting(examples, [pair.student])
        self.chats = [example for example in found if example.messages is not None][:count]
        self.judge = build(load_config(JUDGE)).roles["teacher"]

    def measure(self, role: Role) -> dict[str, float]:
        """Return what a model does with the held-out questions, the same random numbers for all."""
        results: dict[str, float] = {}
        for steps in BUDGETS:
            how = Unmasking(schedule="random", num_steps=steps, temperature=1.0)
            found = answering(role, self.chats, Draws(0), completes, unmasking=how)
            results |= {
                f"bits/{steps}": self.judged(found.texts),
                f"entropy/{steps}": statistics.fmean(map(entropy, found.texts)),
                f"valid/{steps}": found.accepted,
                f"length/{steps}": found.length,
            }
        monte_carlo = MonteCarlo(num_draws=8, antithetic=True, seed=0, batch_size=32)
        results["likelihood"] = likelihood(role, self.chats, monte_carlo).bits
        return results | self._by_threshold(role, self.chats[:32])

    def _by_threshold(self, role: Role, chats: Sequence[Example]) -> dict[str, float]:
        """Return what a sampler does that settles what the model is sure of, one answer a batch."""
        calls: list[int] = []
        network: Any = role.network
        hook = network.base_model.register_forward_hook(lambda *_: calls.append(1))
        how = Unmasking(schedule="threshold", threshold=0.9)
        found: Answered = answering(
            role, chats, Draws(0), completes, unmasking=how, max_tokens=96, batch_size=1
        )
        hook.remove()
        return {
            "threshold/calls": len(calls) / len(chats),
            "threshold/bits": self.judged(found.texts, chats),
            "threshold/valid": found.accepted,
            "threshold/length": found.length,
        }

    def judged(self, texts: Sequence[str], chats: Sequence[Example] | None = None) -> float:
        """Return the bits per byte that the judge needs for answers; empty ones are left out."""
        pairs = zip(self.chats if chats is None else chats, texts, strict=True)
        answered = [_answered(chat, text) for chat, text in pairs if text.strip()]
        with torch.no_grad():
            (found,) = bits_per_byte("judge", self.judge, answered, Reading())
        return found.bits_per_byte


def _answered(chat: Example, text: str) -> Example:
    """Return a chat with another answer."""
    assert chat.messages is not None
    return chat._replace(messages=(*chat.messages[:-1], {"role": "assistant", "content": text}))


def entropy(text: str) -> float:
    """Return the entropy of a text's bytes in bits: low where it repeats itself."""
    counts = Counter(text.encode())
    total = max(counts.total(), 1)
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def overrides_of(arm: Arm, steps: int) -> list[str]:
    """Return how an arm is run here; rounds are equally long."""
    here = [*arm.overrides, *quiet(steps), "data.max_examples=2048"]
    options = load_config(arm.config, arm.overrides).method
    if options["name"] == "sdtt" and options["round_updates"] is not None:
        here.append(f"method.round_updates={steps // ROUNDS}")
    return here


def run(arm: Arm, steps: int, held_out: int, seed: int) -> dict[str, float]:
    """Train one student and return its measurements."""
    torch.set_num_threads(1)
    here = [*overrides_of(arm, steps), f"train.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        train(load_config(arm.config, here), Path(folder))
        return World(held_out).measure(restore(Path(folder)).roles["student"])


def measured(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all results; what ``path`` does not hold yet is run."""
    steps, held_out = arguments.steps, 4 if arguments.quick else 128
    results = open_results(path, {"steps": steps})
    if "before" not in results:
        world = World(held_out)
        student = build(load_config(CONFIG)).roles["student"]
        results["before"] = world.measure(student)
        right = [chat.messages[-1]["content"] for chat in world.chats if chat.messages is not None]
        results["data"] = {
            "bits": world.judged(right),
            "entropy": statistics.fmean(map(entropy, right)),
        }
        save_results(path, results)
    jobs = {name: partial(run, arm, steps, held_out) for name, arm in ARMS.items()}
    collect(path, results, jobs, arguments.seeds, arguments.workers, SHOWN)
    return results


def draw(results: dict[str, Any], output: Path) -> None:
    """Write the figure: bits and entropy over the steps for a block, a line for each arm."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for panel, key in zip(figure.subplots(1, 2), ("bits", "entropy"), strict=True):
        before = [results["before"][f"{key}/{steps}"] for steps in BUDGETS]
        panel.plot(BUDGETS, before, "k:", marker="o", label="before")
        for arm in ARMS:
            found = [values(results, arm, f"{key}/{steps}") for steps in BUDGETS]
            means = [statistics.fmean(x) for x in found]
            panel.errorbar(
                BUDGETS, means, [deviation(x) for x in found], marker="o", capsize=3, label=arm
            )
        panel.axhline(results["data"][key], color="gray", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(BUDGETS, [str(steps) for steps in BUDGETS])
        panel.set_xlabel("steps for a block of 16 tokens")
        panel.set_title(f"{key} of the answers, by byte", fontsize=9)
    panel.legend(fontsize=7)
    figure.savefig(output / "figure.png", dpi=110)


def readme(results: dict[str, Any]) -> str:
    """Return the page's tables; the reading is written by hand in reading.md."""
    seeds, right = len(results["likelihood"]), results["data"]
    lines = [
        "# Fewer steps: SDTT and confidence-aware training on functions of Python's library",
        "",
        f"Made by `python scripts/reproduce/few_steps.py --seeds {seeds} --steps "
        f"{results['steps']}`. Each arm goes on from `python-bd3lm` for so many steps of 8 "
        "texts; 128 held-out questions, answered in so many steps for each block of 16 tokens, "
        "random ones settling, at temperature 1. Bits are those that `python-ar-teacher` needs for "
        f"a byte of the answers (of the right ones {right['bits']:.3f}), entropy is that of an "
        f"answer's bytes (right: {right['entropy']:.3f}): low bits with low entropy are mere "
        "repetition. By threshold: all tokens settle that the model is 0.9 sure of, greedily, 32 "
        "questions; length is relative to that of the right answers. Mean and standard deviation "
        "over training seeds.",
        "",
        "![all arms](figure.png)",
        "",
        "*Dotted: the student before. Gray: the right answers.*",
        "",
        *header(list(SHOWN.values())),
        row("before", [f"{results['before'][key]:.3f}" for key in SHOWN]),
    ]
    for name in ARMS:
        lines.append(row(name, [cell(values(results, name, key)) for key in SHOWN]))
    lines += ["", "## Differences from likelihood with the same seed", ""]
    lines += header(list(SHOWN.values()))
    for name in list(ARMS)[1:]:
        gaps = [differences(results, name, "likelihood", key) for key in SHOWN]
        lines.append(row(name, [cell(gap) for gap in gaps]))
    return "\n".join([*lines, "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=201)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke run; give an --output too")
    parser.add_argument("--output", type=Path, default=ROOT / "samples" / "few-steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps = 1, 3
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results = measured(arguments.output / "results.json", arguments)
    draw(results, arguments.output)
    write_page(arguments.output, readme(results))


if __name__ == "__main__":
    main()

"""What does a teacher of another architecture teach a block-diffusion student, and how?

Goes on training the bundled student `python-bd3lm` on functions of Python's library: alone, with
the dense teacher that shares its vocabulary (the rows of TIDE's Table 1 and the ablations of its
Table 2), and with the mixture of experts that has a tokenizer of its own. All arms share data,
noise, learning rate and number of steps, and are measured on files kept from training. With another
tokenizer whole chunks are hidden, more than the noise level says; so there are two arms without a
teacher, one for each way to hide.

    python scripts/reproduce/tide.py

Writes results.json, figure.png and README.md to samples/tide. Each run is saved when it is done,
and what is there already is not run again.
"""

import argparse
import statistics
import tempfile
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

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
from diffdistill.evaluation.language import (
    answering,
    distance,
    fitting,
    hidden_likelihood,
    infilling,
    likelihood,
)
from diffdistill.evaluation.likelihood import MonteCarlo
from diffdistill.evaluation.python_source import completes
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.roles import Role
from diffdistill.session import Session, build, text_pair

ROOT = Path(__file__).parents[2]
SHARED, CROSS = "tide-shared/python", "tide-cross/python"
HELD_OUT = 128
"""How many chats, and texts, a model is measured on."""
PLAIN = ["method.tidal=none", "method.exposure=0", "method.weight=uniform"]

ARMS = {
    "continued": Arm(SHARED, [*PLAIN, "method.distillation_weight=0"]),
    "forward KL": Arm(SHARED, PLAIN),
    "reverse KL": Arm(SHARED, [*PLAIN, "method.divergence=reverse-kl"]),
    "TIDE-Shared": Arm(SHARED, []),
    "noise axis alone": Arm(SHARED, ["method.tidal=noise"]),
    "training axis alone": Arm(SHARED, ["method.tidal=training"]),
    "no CompDemo": Arm(SHARED, ["method.exposure=0"]),
    "continued, whole chunks": Arm(CROSS, ["method.distillation_weight=0"]),
    "CALM": Arm(CROSS, ["method.divergence=calm"]),
    "TIDE-Cross": Arm(CROSS, []),
    "reverse binary KL": Arm(CROSS, ["method.divergence=reverse-binary-kl"]),
    "CALM-TIDAL": Arm(CROSS, ["method.variant=calm-tidal"]),
}
TABLES = {
    "Table 1: a dense teacher, one vocabulary": (
        "continued", "forward KL", "reverse KL", "TIDE-Shared",
    ),
    "Table 2: ablations of TIDE-Shared": (
        "noise axis alone", "training axis alone", "no CompDemo", "TIDE-Shared",
    ),
    "Table 1: a mixture of experts, another tokenizer": (
        "continued", "continued, whole chunks", "CALM", "TIDE-Cross", "reverse binary KL",
        "CALM-TIDAL",
    ),
}  # fmt: skip
SHOWN = {
    "answers": "answers, bits per byte",
    "texts": "texts, bits per byte",
    "infilling": "spans filled in",
    "infilling/tokens": "their tokens",
    "valid": "answers that parse",
    "length": "their length",
    "dense": "KL to dense",
    "moe": "chunk KL to MoE",
}
PAIRED = ("answers", "texts", "dense", "moe")
AGAINST = {
    "continued": ("forward KL", "reverse KL", "TIDE-Shared", "noise axis alone",
                  "training axis alone", "no CompDemo"),
    "continued, whole chunks": ("CALM", "TIDE-Cross", "reverse binary KL", "CALM-TIDAL"),
}  # fmt: skip
"""The arm without a teacher that hides as others do, and those others."""


class World:
    """The held-out files, and both teachers with what reads the texts for them."""

    def __init__(self) -> None:
        """Read what all readers can read as a whole."""
        path = str(bundled("data", "python-held-out.jsonl"))
        dataset = open_texts(DataSettings(path=path))
        pair = text_pair(self.cross)
        examples = [dataset[index] for index in range(len(dataset))]
        found = fitting(examples, [pair.student, pair.teacher])
        self.chats = [example for example in found if example.messages is not None][:HELD_OUT]
        self.texts = [example for example in found if example.messages is None][:HELD_OUT]

    @cached_property
    def shared(self) -> Session:
        """Student and dense teacher."""
        return build(load_config(SHARED))

    @cached_property
    def cross(self) -> Session:
        """Student and mixture of experts."""
        return build(load_config(CROSS))

    def measure(self, role: Role) -> dict[str, float]:
        """Return what a model does with the held-out files, from the same masks for all."""
        results: dict[str, float] = {}
        how = MonteCarlo(num_draws=8, antithetic=True, seed=0, batch_size=32)
        for name, shown in (("answers", self.chats), ("texts", self.texts)):
            found = likelihood(role, shown, how)
            results |= {name: found.bits, f"{name}/error": found.error}
        filled = [infilling(role, self.chats, Draws(seed)) for seed in range(3)]
        results["infilling"] = statistics.fmean(f.exact for f in filled)
        results["infilling/tokens"] = statistics.fmean(f.tokens for f in filled)
        exact = Unmasking(schedule="first-hitting", temperature=1.0)
        answered = answering(role, self.chats, Draws(0), completes, unmasking=exact)
        results |= {"valid": answered.accepted, "ended": answered.ended}
        return results | {"length": answered.length}

    def measure_student(self, role: Role) -> dict[str, float]:
        """Return the same of a student, and how far it is from both teachers."""
        results = self.measure(role)
        for name, session in (("dense", self.shared), ("moe", self.cross)):
            teacher, pair = session.roles["teacher"], text_pair(session)
            by: Literal["token", "chunk"] = "token" if name == "dense" else "chunk"
            results[name] = distance(pair, role, teacher, self.chats, Draws(0), by=by)
            hidden = hidden_likelihood(pair, role, self.chats, Draws(0), reader="student")
            results[f"{name}/hidden"] = hidden
        return results

    def measure_teacher(self, session: Session) -> dict[str, float]:
        """Return the same of a teacher, and what it makes of what is hidden from the student."""
        role, pair = session.roles["teacher"], text_pair(session)
        hidden = hidden_likelihood(pair, role, self.chats, Draws(0), reader="teacher")
        return self.measure(role) | {"hidden": hidden}


def run(arm: Arm, steps: int, seed: int) -> dict[str, float]:
    """Train one student and return its measurements."""
    torch.set_num_threads(1)
    here = [*arm.overrides, *quiet(steps), f"train.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        train(load_config(arm.config, here), Path(folder))
        student = restore(Path(folder)).roles["student"]
        return World().measure_student(student)


def measured(path: Path, seeds: int, steps: int, workers: int) -> dict[str, Any]:
    """Return all results; what ``path`` does not hold yet is run."""
    results = open_results(path, {"steps": steps})
    if "undistilled" not in results:
        world = World()
        results["undistilled"] = world.measure_student(world.shared.roles["student"])
        results["dense teacher"] = world.measure_teacher(world.shared)
        results["MoE teacher"] = world.measure_teacher(world.cross)
        save_results(path, results)
    jobs = {name: partial(run, arm, steps) for name, arm in ARMS.items()}
    collect(path, results, jobs, seeds, workers, SHOWN)
    return results


def draw(results: dict[str, Any], output: Path) -> None:
    """Write the figure: a panel for each number, a point for each arm."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    keys = [key for key in SHOWN if key not in ("infilling/tokens", "length")]
    for panel, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        for place, arm in enumerate(ARMS):
            found = values(results, arm, key)
            taught = f"C{[SHARED, CROSS].index(ARMS[arm].config)}"
            color = "black" if arm.startswith("continued") else taught
            mean, spread = statistics.fmean(found), deviation(found)
            panel.errorbar(place, mean, spread, marker="o", capsize=3, c=color)
        panel.axhline(results["undistilled"][key], color="gray", linestyle=":", linewidth=1)
        panel.set_xticks(range(len(ARMS)), list(ARMS), rotation=90, fontsize=7)
        panel.set_title(SHOWN[key], fontsize=9)
    figure.savefig(output / "figure.png", dpi=110)


def readme(results: dict[str, Any]) -> str:
    """Return the page's tables; the reading is written by hand in reading.md."""
    seeds = len(results["continued"])
    lines = [
        "# TIDE on functions of Python's library",
        "",
        f"Made by `python scripts/reproduce/tide.py --seeds {seeds} --steps {results['steps']}`. "
        f"Each arm goes on from `python-bd3lm` for {results['steps']} steps of 8 texts; files kept "
        f"from training, {HELD_OUT} chats and as many texts. Mean and standard deviation over "
        f"{seeds} training seeds; the masks of the measurements are the same for all. Bits per "
        "byte are bounds, whose Monte Carlo error is in results.json. KL to dense is KL(teacher || "
        "student) of a hidden token, chunk KL to MoE the KL of the event that a hidden chunk is "
        "the right one, both in nats. Answers are exact samples, their length is relative to that "
        "of the right ones.",
        "",
        "![all arms](figure.png)",
        "",
        "*Dotted: the student before. Black: without a teacher. Blue: with the dense one. Orange: "
        "with the mixture of experts.*",
    ]
    top = header(list(SHOWN.values()))
    for title, names in TABLES.items():
        before = [f"{results['undistilled'][key]:.3f}" for key in SHOWN]
        lines += ["", f"## {title}", "", *top, row("undistilled", before)]
        for name in names:
            lines.append(row(name, [cell(values(results, name, key)) for key in SHOWN]))
    lines += ["", "## What a teacher adds, seed by seed", ""]
    lines += [
        "Thousandths more than the arm that hides the same without a teacher; less is better."
    ]
    lines += ["", *header([SHOWN[key] for key in PAIRED])]
    for other, names in AGAINST.items():
        for name in names:
            gaps = [[1e3 * x for x in differences(results, name, other, key)] for key in PAIRED]
            lines.append(row(f"{name} - {other}", [cell(gap) for gap in gaps]))
    lines += ["", "## The teachers", "", *top]
    for name in ("dense teacher", "MoE teacher"):
        found = results[name]
        lines.append(row(name, [f"{found[key]:.3f}" if key in found else "-" for key in SHOWN]))
    student = results["undistilled"]
    lines += [
        "",
        "On what TIDE asks, chunks hidden from both sides, in bits per byte: dense teacher "
        f"{results['dense teacher']['hidden']:.3f}, student {student['dense/hidden']:.3f}; MoE "
        f"teacher {results['MoE teacher']['hidden']:.3f}, student {student['moe/hidden']:.3f}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "samples" / "tide")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    path = arguments.output / "results.json"
    results = measured(path, arguments.seeds, arguments.steps, arguments.workers)
    draw(results, arguments.output)
    write_page(arguments.output, readme(results))


if __name__ == "__main__":
    main()

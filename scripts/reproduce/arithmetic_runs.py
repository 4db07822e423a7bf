"""What the scripts share that train the bundled `arithmetic-student` in several ways.

All arms of a script share data, seeds, number of steps and, where nothing else is said, learning
rate; each step learns from 16 answers. A student is measured on problems kept from training: four
answers to each, sampled at temperature 1 with the same random numbers for all students.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
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
    row,
    save_results,
    values,
    write_page,
)
from matplotlib.figure import Figure
from torch import Tensor

from diffdistill.checkpoints import restore
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.data.questions import read_questions
from diffdistill.data.settings import DataSettings
from diffdistill.evaluation.answers import examine
from diffdistill.evaluation.arithmetic import LEVELS, read_question
from diffdistill.evaluation.means import Means
from diffdistill.evaluation.subject import Subject, subject_of
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings
from diffdistill.projection import Prediction, token_maps
from diffdistill.rewards.boxed import Boxed
from diffdistill.rewards.json_answer import JsonAnswer
from diffdistill.roles import Role
from diffdistill.session import Session, build
from diffdistill.text.answering import Attempt
from diffdistill.types import Example, Progress
from diffdistill.verifying import AnswerReward

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STYLES: dict[str, tuple[str, type[AnswerReward]]] = {
    "box": ("bundled:arithmetic-held-out.jsonl", Boxed),
    "json": ("bundled:arithmetic-json-held-out.jsonl", JsonAnswer),
}
NUM_ANSWERS = 4
LEARNED = 10
"""Steps whose mean is the loss before, and after, training."""
SHOWN = {
    "box/mean@4": "right in a box",
    "box/parsed": "boxes parsed",
    "json/mean@4": "right in JSON",
    "json/parsed": "JSON parsed",
    "entropy": "entropy",
    "box/tokens": "tokens",
    "box/ended": "ended",
    "box/repetition": "repetition",
    "teacher/reverse-kl": "KL to the teacher",
    "privileged/reverse-kl": "KL to itself, shown the solution",
    "moved": "weights moved",
    "seconds": "s a step",
}
DRAWN = ("box/mean@4", "json/parsed", "entropy", "box/repetition", "teacher/reverse-kl")


@dataclass(frozen=True)
class Amount:
    """How much is done in a run.

    Attributes:
        steps: Of training.
        questions: In a box, and as many with JSON, on which a student is measured.
        checkpoints: That are kept of a run.
        judged: Of which of them entropy and divergences are.
        max_tokens: Of an answer that is measured.
    """

    steps: int
    questions: int = 256
    checkpoints: int = 1
    judged: str = "box"
    max_tokens: int = 96


def asked(path: str, count: int) -> list[Example]:
    """Return the first questions of a file."""
    return list(islice(read_questions(DataSettings(path=path), Path(), []), count))


class World:
    """The held-out problems, and who answers are compared with."""

    def __init__(self, amount: Amount) -> None:
        """Read the problems and both teachers."""
        self.judged = amount.judged
        self.problems = {
            style: asked(path, amount.questions) for style, (path, _) in STYLES.items()
        }
        plain = [
            "method.temperature=1.0", "method.top_p=1.0", "method.top_k=0", "data.batch_size=64",
            "sample.temperature=1.0", f"sample.num_answers={NUM_ANSWERS}", "sample.batch_size=128",
            f"sample.max_tokens={amount.max_tokens}", f"method.max_tokens={amount.max_tokens}",
        ]  # fmt: skip
        self.own = build(load_config("opsd/arithmetic", plain), CPU)
        other = build(load_config("opd/arithmetic"), CPU)
        self.teacher, self.student = other.roles["teacher"], self.own.roles["student"]

    @torch.no_grad()
    def measure(self, role: Role) -> dict[str, float]:
        """Return what a model does with the held-out problems."""
        found: dict[str, float] = {}
        for style, (_, judge) in STYLES.items():
            reward, settings = judge(device=CPU), AnswerEvaluateSettings()
            out = examine(self.own, role.name, role, self.problems[style], settings, reward)
            found |= {f"{style}/{mean.metric}": mean.value for mean in out.averages}
            found |= {f"{style}/{name}": value for name, value in by_level(out.answers).items()}
        return found | self.distances(role)

    @torch.no_grad()
    def distances(self, role: Role) -> dict[str, float]:
        """Return a model's entropy and divergences from both teachers on its own answers."""
        means = Means()
        for subject, attempt in self.attempts(role):
            for name, theirs in self.judgments(subject, attempt).items():
                mask = attempt.answers.mask
                maps = token_maps(
                    attempt.prediction, theirs, ["entropy", "reverse-kl", "forward-kl"], mask=mask
                )
                means.add("entropy", maps.pop("entropy")[mask])
                for key, value in maps.items():
                    means.add(f"{name}/{key}", value[mask])
        return means.found()

    def attempts(self, role: Role, count: int | None = None) -> Iterator[tuple[Subject, Attempt]]:
        """Yield a model's answers to the first problems, one each, and who reads the questions."""
        self.own.method.student = role
        subject = subject_of(self.own, num_answers=1)
        problems = self.problems[self.judged][:count]
        for start, examples in subject.batches(problems, lambda _: None):
            yield subject, subject.attempt(examples, start)

    def judgments(self, subject: Subject, attempt: Attempt) -> dict[str, Prediction]:
        """Return what both teachers predict: the large one, and the student shown the solution."""
        blind = subject.family.condition(attempt.batch, reader="teacher")
        shown: Any = subject.judgment(attempt)
        return {"teacher": self.teacher(attempt.state, blind), "privileged": shown}

    @torch.no_grad()
    def moved(self, role: Role) -> float:
        """Return how far the weights are from those before, relative to their norm.

        Those of the base under an adapter do not move.
        """
        if role.adapter is not None:
            return 0.0
        before = self.student.parameters()
        gaps = [(p - before[name]).square().sum() for name, p in role.parameters().items()]
        sizes = [p.square().sum() for p in before.values()]
        return float((sum(gaps) / sum(sizes)) ** 0.5)


def by_level(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean score of the answers to the problems of each level."""
    scores: dict[str, list[float]] = {level: [] for level in LEVELS}
    for answer in answers:
        scores[read_question(answer["question"]).level].append(answer["score"])
    return {f"level/{k}": statistics.fmean(found) for k, found in scores.items() if found}


def logged(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of each step of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def told(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what a run's metrics say: means over all steps, and the loss before and after."""
    found = {
        name: statistics.fmean(step[key] for step in rows)
        for name, key in (
            ("seconds", "seconds"),
            ("grad_norm", "grad_norm/student"),
            ("strength", "strength/student"),
            ("exposure", "exposure/student"),
            ("gate", "gate/student"),
            ("learned_share", "learned_share/student"),
        )
        if key in rows[0]
    }
    losses = [step["loss/student"] for step in rows]
    first, last = losses[:LEARNED], losses[-LEARNED:]
    return found | {
        "loss/before": statistics.fmean(first),
        "loss/after": statistics.fmean(last),
    }


Extra = Callable[[Path, World], dict[str, float]]
"""Measures more of a run's folder."""


def trained(arm: Arm, amount: Amount, seed: int, folder: Path) -> None:
    """Train one student in a folder."""
    every = max(1, amount.steps // amount.checkpoints)
    here = [
        "sample.every=null", "tracking.tensorboard=false", f"train.seed={seed}",
        f"train.steps={amount.steps}", f"train.save_every={every}", "train.keep=null",
        f"train.warmup={min(20, amount.steps // 10)}",
    ]  # fmt: skip
    train(load_config(arm.config, [*here, *arm.overrides]), folder)


def run(arm: Arm, amount: Amount, extra: Extra | None, seed: int) -> dict[str, float]:
    """Train one student and return its measurements."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained(arm, amount, seed, folder)
        student, world = restore(folder, device=CPU).roles["student"], World(amount)
        found = world.measure(student) | told(logged(folder)) | {"moved": world.moved(student)}
        return found if extra is None else found | extra(folder, world)


def gradients(arm: Arm, num_batches: int = 8) -> list[Tensor]:
    """Return an arm's gradients before training on some batches, all parameters in a row."""
    session = build(load_config(arm.config, arm.overrides), CPU)
    size = session.config.data.batch_size
    assert session.config.data.path is not None
    examples = asked(session.config.data.path, size * num_batches)
    return [
        gradient(session, examples[start : start + size], start)
        for start in range(0, len(examples), size)
    ]


def gradient(session: Session, examples: Sequence[Example], start: int) -> Tensor:
    """Return the student's gradient on one batch, whose first question is number ``start``."""
    family: Any = session.family
    batch = family.collate(examples, range(start, start + len(examples)))
    for loss in session.method.losses(batch, Progress(0, 1)):
        loss.value.backward()
    parameters = session.roles["student"].parameters().values()
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return flat


@dataclass(frozen=True)
class Study:
    """What a script compares.

    Attributes:
        name: Of the script, and with dashes of its folder in samples.
        title: Of the page.
        about: What is compared, for the page.
        arms: By name.
        against: Arms that others are compared with, seed by seed, and those others.
        steps: Of training, by default.
        shown: Columns of the tables.
        drawn: Panels of the figure.
        checkpoints: Kept of each run.
        judged: Problems that entropy and divergences are measured on.
        questions: In a box, and as many with JSON, on which a student is measured.
        max_tokens: Of an answer that is measured.
        extra: Measures more.
    """

    name: str
    title: str
    about: str
    arms: Mapping[str, Arm]
    against: Mapping[str, Collection[str]]
    steps: int = 200
    shown: Mapping[str, str] = field(default_factory=lambda: SHOWN)
    drawn: Sequence[str] = DRAWN
    checkpoints: int = 1
    judged: str = "box"
    questions: int = 256
    max_tokens: int = 96
    extra: Extra | None = None

    @property
    def folder(self) -> Path:
        """Where results go by default."""
        return ROOT / "samples" / self.name.replace("_", "-")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    seeds: int
    amount: Amount
    workers: int
    output: Path

    @property
    def results(self) -> Path:
        """The file with all results."""
        return self.output / "results.json"


def options(study: Study, description: str) -> Options:
    """Return what the command line says; the folder is there."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=study.steps)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=study.folder)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, 2 steps")
    given = parser.parse_args()
    amount = Amount(given.steps, study.questions, study.checkpoints, study.judged, study.max_tokens)
    if given.quick:
        given.seeds, amount = 1, replace(amount, steps=2, questions=9)
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return Options(given.seeds, amount, given.workers, given.output)


Runner = Callable[[Arm, Amount, Extra | None, int], dict[str, float]]
"""Trains one student of an arm with a seed, and returns its measurements."""


def measured(study: Study, given: Options, how: Runner = run) -> dict[str, Any]:
    """Return all results; what is not on disk is run, as ``how`` does it."""
    amount, path = given.amount, given.results
    results = open_results(path, {"steps": amount.steps, "questions": amount.questions})
    if "undistilled" not in results:
        world = World(amount)
        results["undistilled"] = world.measure(world.student)
        results["teacher"] = world.measure(world.teacher)
        save_results(path, results)
    jobs = {name: partial(how, arm, amount, study.extra) for name, arm in study.arms.items()}
    collect(path, results, jobs, given.seeds, given.workers, study.shown)
    return results


def draw(study: Study, results: Mapping[str, Any], output: Path) -> None:
    """Write the figure: a panel for each number, a point for each arm."""
    width = max(10.0, 0.12 * len(study.drawn) * len(study.arms))
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    panels = figure.subplots(1, len(study.drawn), squeeze=False)[0]
    for panel, key in zip(panels, study.drawn, strict=True):
        for place, arm in enumerate(study.arms):
            found = values(results, arm, key)
            mean, color = statistics.fmean(found), "black" if arm in study.against else "C0"
            panel.errorbar(place, mean, deviation(found), marker="o", capsize=3, c=color)
        for name, color, style in (("undistilled", "gray", ":"), ("teacher", "black", "--")):
            if key in results[name]:
                panel.axhline(results[name][key], color=color, linestyle=style, linewidth=1)
        panel.set_xticks(range(len(study.arms)), list(study.arms), rotation=90, fontsize=7)
        panel.set_title(study.shown[key], fontsize=9)
    figure.savefig(output / "figure.png", dpi=110)


def table(study: Study, results: Mapping[str, Any]) -> list[str]:
    """Return the table of all arms, after the student before training and the teacher."""
    lines = header(list(study.shown.values()))
    for name in ("undistilled", "teacher"):
        found = results[name]
        lines.append(row(name, [f"{found[k]:.3f}" if k in found else "-" for k in study.shown]))
    for arm in study.arms:
        lines.append(row(arm, [cell(values(results, arm, key)) for key in study.shown]))
    return lines


def paired(study: Study, results: Mapping[str, Any], other: str) -> list[str]:
    """Return the table of the differences from an arm with the same seed."""
    lines = header(list(study.shown.values()))
    for arm in study.against[other]:
        if arm != other:
            found = [differences(results, arm, other, key) for key in study.shown]
            lines.append(row(arm, [cell(numbers) for numbers in found]))
    return lines


def levels(study: Study, results: Mapping[str, Any]) -> list[str]:
    """Return the table of right answers in a box by level, means over seeds."""
    known = [k for k in LEVELS if f"box/level/{k}" in results["undistilled"]]
    lines = header(known)
    for name in ("undistilled", "teacher"):
        lines.append(row(name, [f"{results[name][f'box/level/{k}']:.3f}" for k in known]))
    for arm in study.arms:
        means = [statistics.fmean(values(results, arm, f"box/level/{k}")) for k in known]
        lines.append(row(arm, [f"{mean:.3f}" for mean in means]))
    return lines


def page(study: Study, results: Mapping[str, Any], more: Sequence[str]) -> str:
    """Return the page with all tables; the reading is written by hand in reading.md."""
    seeds = len(results[next(iter(study.arms))])
    lines = [
        f"# {study.title}",
        "",
        f"Made by `python scripts/reproduce/{study.name}.py --seeds {seeds} --steps "
        f"{results['steps']}`. {study.about} All go on from `arithmetic-student` for "
        f"{results['steps']} steps. {results['questions']} problems kept from training for each "
        f"format, {NUM_ANSWERS} answers each, sampled at temperature 1 with the same random "
        f"numbers for all; mean and standard deviation over {seeds} training seeds. Right: the "
        "share of right answers (mean@4). KL is KL(student || other) in nats for each token of the "
        "student's own answers "
        f"({study.judged}), other being `arithmetic-teacher`, or the student before training "
        "shown the solution. Repetition: the share of 3-grams that the answer had before. Weights "
        "moved: the distance from those before, relative to their norm. Seconds depend on what "
        "else ran.",
        "",
        "![all arms](figure.png)",
        "",
        "*Dotted: the student before. Dashed: the teacher.*",
        "",
        *table(study, results),
    ]
    for other in study.against:
        lines += ["", f"## Differences from {other} with the same seed", ""]
        lines += paired(study, results, other)
    lines += ["", "## Right answers in a box by level", "", *levels(study, results)]
    return "\n".join([*lines, *more, ""])


def publish(
    study: Study, results: Mapping[str, Any], output: Path, more: Sequence[str] = ()
) -> None:
    """Write figure and page.

    Args:
        study: What was compared.
        results: What came out.
        output: The folder.
        more: Further lines of the page.
    """
    draw(study, results, output)
    write_page(output, page(study, results, more))

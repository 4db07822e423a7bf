"""Do experts that teach each other while they learn end better than other ways (CoPD)?

Trains the bundled `skills-base`, which is often wrong at arithmetic and at editing words, on both:
one model on a mix; an expert of each; finished experts of which one then teaches the other; and
CoPD, whose experts are averaged. Ablations of CoPD: nobody teaches (beta 0), one direction alone, a
longer cycle. Every model takes as many rewarded updates, from 16 answers of each skill that it
learns, and is taught in as many, by 16 answers more: by those of a peer after the others
(train-then-distil), or in the same updates (CoPD).

    python scripts/reproduce/copd.py

Writes results.json, figure.png and README.md to samples/copd. Each run is saved when it is done,
and what is there already is not run again.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from collecting import (
    Arm,
    cell,
    collect,
    differences,
    header,
    open_results,
    row,
    save_results,
    values,
    write_page,
)
from matplotlib.figure import Figure

from diffdistill.checkpoints import restore
from diffdistill.commands.pipeline import pipeline
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.data.questions import read_questions
from diffdistill.data.settings import DataSettings
from diffdistill.evaluation.answers import examine
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings
from diffdistill.reward_building import build_answer_reward
from diffdistill.roles import Role
from diffdistill.session import Session, build
from diffdistill.types import Example

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SKILLS = ("arithmetic", "editing")
NUM_ANSWERS = 4
SHARED = 0.4
"""Of the updates of CoPD's experts, those in which they learn from each other as well."""
LONGER = "method.rewarded_steps=45", "method.shared_steps=30"
WATCH = 5
"""Steps between measurements of how close experts are."""
LAST = 75 // WATCH
"""Measurements at the end of a run that are averaged: a cycle of the longer ones."""

RUNS = {
    "mixed": Arm("copd/mixed", []),
    **{
        f"expert: {skill}": Arm("copd/single", [f"data.path=bundled:{skill}-train.jsonl"])
        for skill in SKILLS
    },
    "CoPD": Arm("copd/skills", []),
    "CoPD, beta 0": Arm("copd/skills", ["method.beta=0.0"]),
    **{
        f"CoPD, {skill} teaches nobody": Arm("copd/skills", [f"method.betas.{other}=0.0"])
        for skill, other in (SKILLS, SKILLS[::-1])
    },
    "CoPD, cycle of 75": Arm("copd/skills", list(LONGER)),
}
STATIC = {
    "static: arithmetic to editing": "arithmetic-to-editing",
    "static: editing to arithmetic": "editing-to-arithmetic",
}
SHOWN = {
    "both": "both skills",
    "arithmetic": "arithmetic",
    "editing": "editing",
    "expert arithmetic": "its arithmetic expert, both",
    "expert editing": "its editing expert, both",
    "overlap": "Overlap@10",
    "symmetric_kl": "symmetric KL",
    "seconds": "s a step",
}


class Amount(NamedTuple):
    """How much is done in a run."""

    steps: int
    questions: int


def examples(skill: str, count: int) -> list[Example]:
    """Return the first held-out questions of a skill."""
    found = read_questions(DataSettings(path=f"bundled:{skill}-held-out.jsonl"), Path(), [])
    return [example for example, _ in zip(found, range(count), strict=False)]


@torch.no_grad()
def measured(session: Session, role: Role, amount: Amount) -> dict[str, float]:
    """Return the share of right answers of a model to held-out questions, by skill."""
    sample = session.config.replies
    sample.temperature, sample.num_answers, sample.batch_size = 1.0, NUM_ANSWERS, 128
    reward = build_answer_reward(session.config, CPU)
    found = {}
    for skill in SKILLS:
        asked = examples(skill, amount.questions)
        out = examine(session, role.name, role, asked, AnswerEvaluateSettings(), reward)
        found[skill] = next(m.value for m in out.averages if m.metric == f"mean@{NUM_ANSWERS}")
    return found | {"both": statistics.fmean(found.values())}


def told(folder: Path) -> dict[str, float]:
    """Return what a run logged: means, and how close experts were over its last 75 steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {"seconds": statistics.fmean(step["seconds"] for step in rows)}
    for key, name in (("overlap", "overlap_at_10"), ("symmetric_kl", "symmetric_kl")):
        watched = [
            statistics.fmean(step[f"{name}/{skill}"] for skill in SKILLS)
            for step in rows
            if f"{name}/{SKILLS[0]}" in step
        ]
        if watched:
            found[key] = statistics.fmean(watched[-LAST:])
            found |= {f"{key}/{place:03}": value for place, value in enumerate(watched)}
    return found


def run(arm: Arm, amount: Amount, seed: int) -> dict[str, float]:
    """Train by a config and return the measurements of what came out."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        here = ["tracking.tensorboard=false", f"train.seed={seed}"]
        here += [f"train.steps={amount.steps}", f"train.warmup={amount.steps // 10}"]
        if arm.config == "copd/skills":
            here.append(f"method.watch_every={WATCH}")
        train(load_config(arm.config, [*here, *arm.overrides]), folder)
        session = restore(folder, device=CPU)
        found = measured(session, session.roles["student"], amount)
        for skill in SKILLS:
            if skill in session.roles.by_name:
                own = measured(session, session.roles[skill], amount)
                found |= {f"expert {skill}": own["both"], f"expert {skill}, own": own[skill]}
        return found | told(folder)


def run_static(arm: str, amount: Amount, seed: int) -> dict[str, float]:
    """Train experts, have one teach the other, and return the measurements of that one."""
    torch.set_num_threads(1)
    shared = round(SHARED * amount.steps)
    lengths = dict.fromkeys(SKILLS, amount.steps) | dict.fromkeys(STATIC.values(), shared)
    overrides = [f"stages.{stage}.change.train.steps={n}" for stage, n in lengths.items()]
    overrides += ["tracking.tensorboard=false", f"train.seed={seed}", "measure.num_questions=1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline("copd/static", output=folder, overrides=overrides, arms=[arm])
        session = restore(folder / arm, device=CPU)
        return measured(session, session.roles["student"], amount) | told(folder / arm)


def jobs(amount: Amount) -> dict[str, Callable[[int], dict[str, float]]]:
    """Return what runs each arm with a seed."""
    found: dict[str, Callable[[int], dict[str, float]]] = {
        name: partial(run, arm, amount) for name, arm in RUNS.items()
    }
    return found | {name: partial(run_static, arm, amount) for name, arm in STATIC.items()}


def draw(results: Mapping[str, Any], arms: Sequence[str], output: Path) -> None:
    """Write the figure: both skills by arm, and how close experts are while they train."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    for place, arm in enumerate(arms):
        means = [statistics.fmean(values(results, arm, skill)) for skill in SKILLS]
        panels[0].scatter(*means, label=arm, marker="os^vDPX*<>hp"[place % 12])
    panels[0].scatter(*(results["base"][skill] for skill in SKILLS), c="gray", label="skills-base")
    panels[0].set(xlabel="right in arithmetic", ylabel="right in editing")
    panels[0].legend(fontsize=5)
    for panel, key in zip(panels[1:], ("overlap", "symmetric_kl"), strict=True):
        for arm in ("CoPD", "CoPD, beta 0", "CoPD, cycle of 75"):
            found = results[arm]["0"]
            line = [value for name, value in sorted(found.items()) if name.startswith(f"{key}/")]
            panel.plot([WATCH * place for place in range(len(line))], line, label=arm)
        panel.set(xlabel="step", title=SHOWN[key])
        panel.legend(fontsize=6)
    figure.savefig(output / "figure.png", dpi=110)


def line(results: Mapping[str, Any], arm: str) -> str:
    """Return the row of an arm."""
    seeds = results[arm].values()
    cells = [
        cell([found[key] for found in seeds]) if all(key in found for found in seeds) else "-"
        for key in SHOWN
    ]
    return row(arm, cells)


def page(results: Mapping[str, Any], arms: Sequence[str]) -> str:
    """Return the page; the reading is written by hand in reading.md."""
    base = [f"{results['base'][key]:.3f}" if key in results["base"] else "-" for key in SHOWN]
    lines = [
        "# CoPD on arithmetic and editing",
        "",
        f"Made by `python scripts/reproduce/copd.py --seeds {len(results['CoPD'])} --steps "
        f"{results['steps']}`. All go on from `skills-base`; {results['steps']} rewarded updates "
        f"of each model. With {SHARED:.0%} of as many experts are taught: in CoPD in the same "
        "updates, in train-then-distil (static) in further ones, by OPD at its config's rate "
        "(3e-4; all else learns at 1e-4). Right: the share of right "
        f"answers (mean@{NUM_ANSWERS}) to {results['questions']} held-out questions of each skill, "
        "sampled at temperature 1; mean and standard deviation over training seeds. CoPD is the "
        "mean of its experts, which are also measured by themselves. Overlap and KL are means over "
        "the last 75 steps. Seconds depend on what else ran.",
        "",
        "![arms, and how close experts are](figure.png)",
        "",
        *header(list(SHOWN.values())),
        row("skills-base", base),
        *(line(results, arm) for arm in arms),
    ]
    for other in ("mixed", "CoPD"):
        lines += ["", f"## Differences from {other} with the same seed", ""]
        lines += header([SHOWN[key] for key in ("both", *SKILLS)])
        for arm in arms:
            if arm != other:
                gaps = [differences(results, arm, other, key) for key in ("both", *SKILLS)]
                lines.append(row(arm, [cell(found) for found in gaps]))
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "samples" / "copd")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, 5 steps")
    given = parser.parse_args()
    amount = Amount(given.steps, 200)
    if given.quick:
        given.seeds, amount = 1, Amount(5, 8)
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    path = given.output / "results.json"
    results = open_results(path, amount._asdict())
    if "base" not in results:
        session = build(load_config("copd/single"), CPU)
        results["base"] = measured(session, session.roles["student"], amount)
        save_results(path, results)
    found = jobs(amount)
    collect(path, results, found, given.seeds, given.workers, ("both", *SKILLS))
    draw(results, list(found), given.output)
    write_page(given.output, page(results, list(found)))


if __name__ == "__main__":
    main()

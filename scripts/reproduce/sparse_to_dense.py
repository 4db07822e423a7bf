"""Where do labels do most good: at the student, or at its teacher (Sparse-to-Dense)?

Runs the pipeline `sparse-to-dense/arithmetic` with all its arms for several seeds: GRPO of the
teacher and then a bridge to the student; the same labels for the student itself; a raw teacher; no
warm-up; no on-policy part; and rewards for the student after the bridge, with new labels and old.

    python scripts/reproduce/sparse_to_dense.py

Writes results.json, figure.png and README.md to samples/sparse-to-dense. Each stage of each seed is
kept in runs/sparse-to-dense, and what is there already is not run again.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from collecting import (
    cell,
    collect,
    deviation,
    differences,
    header,
    open_results,
    row,
    save_results,
    write_page,
)
from matplotlib.figure import Figure

from diffdistill.commands.pipeline import pipeline
from diffdistill.stages import load_pipeline

ROOT = Path(__file__).parents[2]
NAME = "sparse-to-dense/arithmetic"
WHOLE = "sparse-to-dense"
SHOWN = {
    "score": "right in a box",
    "labelled": "labelled prompts",
    "updates": "updates of the student",
    "C1 gain": "C1: the teacher's gain",
    "C2 KL": "C2: KL before OPD",
    "C2 overlap": "C2: overlap before OPD",
}


def told(arm: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an arm: its score, labels and updates, and what gates measured."""
    stages = arm["stages"]
    student = [stage for name, stage in stages.items() if name != "teacher"]
    found = {
        "score": arm["score"],
        "labelled": float(arm["labelled"]),
        "updates": float(sum(stage["updates"]["student"] for stage in student)),
    }
    for stage in stages.values():
        for gate in stage["gates"]:
            found[f"{gate['name']} {gate['what'].split()[0]}"] = gate["value"]
    return found


def run(overrides: list[str], runs: Path, seed: int) -> dict[str, float]:
    """Run all arms with a seed and return their numbers, each under ``arm/number``."""
    torch.set_num_threads(1)
    output = runs / f"seed-{seed}"
    changes = [*overrides, f"train.seed={seed}", "tracking.tensorboard=false"]
    pipeline(NAME, output=output, overrides=changes, arms=["all"])
    arms = json.loads((output / "pipeline.json").read_text())
    return {f"{arm}/{key}": value for arm in arms for key, value in told(arms[arm]).items()}


def by_arm(results: Mapping[str, Any], arms: Mapping[str, str]) -> dict[str, Any]:
    """Return the results by arm, seed and number."""
    return {
        arm: {
            seed: {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{arm}/")}
            for seed, found in results["seeds"].items()
        }
        for arm in arms
    }


def draw(found: Mapping[str, Any], output: Path) -> None:
    """Write the figure: scores by labelled prompts."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for place, (arm, seeds) in enumerate(found.items()):
        scores = [numbers["score"] for numbers in seeds.values()]
        labelled = statistics.fmean(numbers["labelled"] for numbers in seeds.values())
        spread = deviation(scores)
        panel.errorbar(
            labelled + 4 * place, statistics.fmean(scores), spread, marker="o", label=arm
        )
    panel.set(xlabel="labelled prompts (arms are set apart)", ylabel="right in a box")
    panel.legend(fontsize=7)
    figure.savefig(output / "figure.png", dpi=110)


def page(results: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return the page; the reading is written by hand in reading.md."""
    lines = [
        "# Sparse-to-Dense on arithmetic",
        "",
        f"Made by `python scripts/reproduce/sparse_to_dense.py --seeds {len(results['seeds'])}`: "
        f"`diffdistill pipeline {NAME} --arm all` with each seed. Right: the mean reward of "
        f"answers to {results['questions']} held-out questions, four each, sampled at temperature "
        "1; mean and standard deviation over seeds. Labelled prompts: different questions by whose "
        "answers an arm was rewarded, in all its stages. The stages and their gates: "
        "[docs](../../docs/methods/sparse-to-dense.md).",
        "",
        "![scores by labels](figure.png)",
        "",
        *header(list(SHOWN.values())),
    ]
    for arm, seeds in found.items():
        columns = [[n[key] for n in seeds.values() if key in n] for key in SHOWN]
        lines.append(row(arm, [cell(numbers) if numbers else "-" for numbers in columns]))
    lines += ["", f"## Scores less those of {WHOLE} with the same seed", "", *header(["right"])]
    for arm in found:
        if arm != WHOLE:
            lines.append(row(arm, [cell(differences(found, arm, WHOLE, "score"))]))
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "samples" / "sparse-to-dense")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, 1 step a stage")
    given = parser.parse_args()
    overrides, questions, runs = list[str](), 200, ROOT / "runs" / "sparse-to-dense"
    if given.quick:
        given.seeds, questions, runs = 1, 4, given.output / "runs"
        overrides += ["train.steps=1", "train.warmup=0"]
    overrides.append(f"measure.num_questions={questions}")
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / "results.json"
    results = open_results(path, {"questions": questions})
    save_results(path, results)
    job = {"seeds": partial(run, overrides, runs)}
    collect(path, results, job, given.seeds, given.workers, [f"{WHOLE}/score"])
    found = by_arm(results, load_pipeline(NAME).arms)
    draw(found, given.output)
    write_page(given.output, page(results, found))


if __name__ == "__main__":
    main()

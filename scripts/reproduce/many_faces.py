"""Does a truncated reverse KL collapse (Many Faces), and is a shared context learned better?

Two experiments with the bundled `arithmetic-student` (arXiv:2605.11182). First: the reverse KL to
the bundled teacher on the teacher's few most likely tokens S, uncorrected and with each correction.
By algebra the uncorrected one ends where the student has a fraction 1/e of the teacher's mass on S;
the paper saw answers collapse into repetition. Checkpoints are watched for the mass on S, the
entropy and the repetition. Second: self-distillation with each question's own solution, and with
one hint that is the same for all. By the paper a student can take in only what the contexts share,
so the loss should go to zero with the shared hint and not with the solutions.

    python scripts/reproduce/many_faces.py

Writes results.json, figure.png, course.png and README.md to samples/many-faces. Each run is saved
when it is done, and what is there already is not run again.
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from arithmetic_runs import CPU, DRAWN, SHOWN, Study, World, measured, options, publish
from collecting import Arm, cell, header, row, values
from matplotlib.figure import Figure

from diffdistill.bundled import bundled
from diffdistill.checkpoints import Checkpoints, restore
from diffdistill.evaluation.means import Means
from diffdistill.projection import token_maps
from diffdistill.repetition import repetition
from diffdistill.roles import Role
from diffdistill.supports import truncated_divergence

OPD, OPSD = "opd/arithmetic", "opsd/arithmetic"
LONG = ["train.schedule=constant"]
SIZE = 4
"""Tokens of S, of 261: the teacher's mass on it is near 1, as that of 20 of 150,000."""
WATCHED = 64
"""Questions on which checkpoints are watched."""
HINT = '{"answer": 0}'
"""The shared context: how an answer looks, and nothing of what it is."""
COURSE = {"student_mass": "mass on S", "entropy": "entropy", "repetition": "repetition"}


def truncated(correction: str, size: int = SIZE, divergence: str = "reverse-kl") -> Arm:
    """Return the arm that compares the teacher's most likely tokens alone."""
    overrides = [
        *LONG, "method.support=teacher", f"method.support_size={size}",
        f"method.correction={correction}", f"method.divergence={divergence}",
    ]  # fmt: skip
    if correction == "none" and divergence == "reverse-kl":
        overrides.append("method.allow_biased=true")
    return Arm(OPD, overrides)


TRUNCATED = {
    "full": Arm(OPD, LONG),
    "none": truncated("none"),
    "none, 1 token": truncated("none", 1),
    "generalized": truncated("generalized"),
    "renorm": truncated("renorm"),
    "tail": truncated("tail"),
    "hybrid": truncated("hybrid"),
    "forward KL, none": truncated("none", divergence="forward-kl"),
}


def contexts(hints: Path) -> dict[str, Arm]:
    """Return the arms that are shown solutions, and one hint; with JSON."""
    shown = {
        "own solutions": "bundled:arithmetic-json-train.jsonl",
        "shared hint": str(hints.absolute()),
    }
    common = [*LONG, "rewards=json-answer"]
    return {name: Arm(OPSD, [*common, f"data.path={path}"]) for name, path in shown.items()}


def arms(folder: Path) -> dict[str, Arm]:
    """Return all arms; the folder is that of the data with the hint."""
    return TRUNCATED | contexts(folder / "shared-hint.jsonl")


def write_hints(path: Path) -> None:
    """Write the JSON problems to learn from with the same hint in place of each solution."""
    lines = bundled("data", "arithmetic-json-train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"solution": HINT} for line in lines]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@torch.no_grad()
def watched(role: Role, world: World) -> dict[str, float]:
    """Return mass on S of both sides, entropy and repetition on a student's own answers."""
    means = Means()
    for subject, attempt in world.attempts(role, count=WATCHED):
        mask, theirs = attempt.answers.mask, world.judgments(subject, attempt)["teacher"]
        maps = truncated_divergence(
            attempt.prediction, theirs, divergence="reverse-kl", support="teacher", k=SIZE,
            correction="generalized", mask=mask,
        )  # fmt: skip
        maps |= token_maps(attempt.prediction, None, ["entropy"], mask=mask)
        for key in ("student_mass", "teacher_mass", "entropy"):
            means.add(key, maps[key][mask])
        means.add("repetition", repetition(attempt.answers.tokens, mask))
    return means.found()


def course(folder: Path, world: World) -> dict[str, float]:
    """Return what is watched of each checkpoint, by step, and of the last without a step."""
    found: dict[str, float] = {}
    names = Checkpoints(folder).names()
    for name in sorted(names):
        seen = watched(restore(folder, name, CPU).roles["student"], world)
        found |= {f"course/{int(name.rpartition('-')[2])}/{key}": v for key, v in seen.items()}
    return found | {"student_mass": seen["student_mass"], "teacher_mass": seen["teacher_mass"]}


def study(folder: Path) -> Study:
    """Return what is compared."""
    more = {"student_mass": "mass on S", "loss/before": "loss, first", "loss/after": "loss, last"}
    return Study(
        name="many_faces",
        title="Truncated divergences and shared contexts (Many Faces) on arithmetic",
        about="First OPD from `arithmetic-teacher` on its most likely tokens S "
        f"({SIZE} if not said otherwise), then OPSD on problems with JSON, the teacher being shown "
        f"each question's solution, or `{HINT}` with all questions. A constant learning rate.",
        arms=arms(folder),
        against={"full": TRUNCATED, "own solutions": ["shared hint"]},
        shown=SHOWN | more,
        drawn=("student_mass", *DRAWN),
        checkpoints=5,
        extra=course,
    )


def steps_of(results: Mapping[str, Any], arm: str) -> list[int]:
    """Return the steps at which an arm was watched."""
    first = next(iter(results[arm].values()))
    return sorted({int(key.split("/")[1]) for key in first if key.startswith("course/")})


def draw_course(results: Mapping[str, Any], names: Mapping[str, Arm], output: Path) -> None:
    """Write the figure of what is watched over training, means over seeds."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, len(COURSE))
    for panel, (key, title) in zip(panels, COURSE.items(), strict=True):
        for arm in names:
            steps = steps_of(results, arm)
            means = [statistics.fmean(values(results, arm, f"course/{n}/{key}")) for n in steps]
            panel.plot(steps, means, marker=".", label=arm)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
    panels[-1].legend(fontsize=6)
    figure.savefig(output / "course.png", dpi=110)


def fixed_points(results: Mapping[str, Any]) -> list[str]:
    """Return the part of the page about the mass on S."""
    lines = [
        "",
        "## The mass on S over training",
        "",
        "![mass, entropy and repetition](course.png)",
        "",
        "On the student's own answers, at the end of training. Uncorrected, the reverse KL is "
        "least where the student has 1/e of the teacher's mass on S, the forward KL where all its "
        "mass is on S.",
        "",
        *header(["student's mass", "teacher's mass", "1/e of it"]),
    ]
    for arm in TRUNCATED:
        ours, theirs = (values(results, arm, key) for key in ("student_mass", "teacher_mass"))
        bound = cell([mass / torch.e for mass in theirs])
        lines.append(row(arm, [cell(ours), cell(theirs), bound]))
    return lines


def main() -> None:
    given = options(study(Path()), __doc__)
    write_hints(given.output / "shared-hint.jsonl")
    compared = study(given.output)
    results = measured(compared, given)
    draw_course(results, TRUNCATED, given.output)
    publish(compared, results, given.output, fixed_points(results))


if __name__ == "__main__":
    main()

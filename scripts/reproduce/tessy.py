"""Does SFT on another style's teacher hurt a student, and data written together not (TESSY)?

`arithmetic-words-teacher` is mostly right, and writes words where `arithmetic-student` has signs.
Each arm writes answers to the same questions in its way (TESSY, arXiv:2604.14164, and baselines),
and trains the student on them by plain SFT. `arithmetic-teacher` is about as often right as the
teacher of the other style and writes signs: what its answers do is not the style's doing. Boundary
predictors are made once, from a rule.

    python scripts/reproduce/tessy.py

Writes results.json, figure.png and README.md to samples/tessy. Each run is saved when it is done,
and what is there already is not run again. The predictors are kept in runs/tessy-predictors, and
made again where config or models are others.
"""

import json
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from arithmetic_runs import (
    CPU,
    ROOT,
    Amount,
    Extra,
    Options,
    Study,
    World,
    measured,
    options,
    publish,
)
from arithmetic_runs import run as run_arm
from collecting import Arm, cell, header, row, save_results, values

from diffdistill.checkpoints import restore
from diffdistill.commands.tessy import fit, write
from diffdistill.config import load_config
from diffdistill.data.dataset import resolve
from diffdistill.draws import Draws
from diffdistill.evaluation.arithmetic import WORDS
from diffdistill.family_building import resolve_model
from diffdistill.rewards.boxed import Boxed
from diffdistill.roles import Role
from diffdistill.rollouts import Sampling
from diffdistill.synthesis.dependence import folder_hash
from diffdistill.types import Example

CONFIG = "tessy/arithmetic"
PREDICTORS = ROOT / "runs" / "tessy-predictors"
GOLD = "the data's solutions"
SAME_STYLE = "teacher-only, in signs"
EPOCHS = 4
ARMS = {
    GOLD: Arm(CONFIG, ["data.path=bundled:arithmetic-train.jsonl"]),
    "student-only": Arm(CONFIG, ["tessy.mode=student-only"]),
    "teacher-only": Arm(CONFIG, ["tessy.mode=teacher-only"]),
    SAME_STYLE: Arm(
        CONFIG, ["tessy.mode=teacher-only", "tessy.teacher.path=bundled:arithmetic-teacher"]
    ),
    "mix": Arm(CONFIG, ["tessy.mode=mix"]),
    "tessy": Arm(CONFIG, ["tessy.mode=tessy"]),
}
SHOWN = {
    "data/samples": "samples",
    "data/right": "of the data: right",
    "data/teacher": "written by the teacher",
    "data/words": "in words",
    "box/mean@4": "right in a box",
    "greedy": "the same, greedy",
    "box/parsed": "boxes parsed",
    "json/mean@4": "right in JSON",
    "words": "answers in words",
    "box/tokens": "tokens",
    "box/ended": "ended",
    "entropy": "entropy",
    "teacher/reverse-kl": "KL to a teacher of its style",
    "moved": "weights moved",
    "loss/after": "loss at the end",
}
WORD = WORDS["="]
"""Is in every line of a scratchpad in words, and in none in signs."""


def more(folder: Path, world: World) -> dict[str, float]:
    """Return what else a trained student does."""
    return answered(restore(folder, device=CPU).roles["student"], world)


@torch.no_grad()
def answered(role: Role, world: World) -> dict[str, float]:
    """Return the share of a model's answers in words, and of greedy ones that are right."""
    texts: list[str] = []
    for subject, attempt in world.attempts(role, 64):
        texts += subject.family.spelled(attempt.answers)
    return {"words": share(texts), "greedy": greedy(role, world)}


def greedy(role: Role, world: World) -> float:
    """Return the share of held-out problems with a box that a model's likeliest tokens solve."""
    family: Any = world.own.family
    asked, sampling = world.problems["box"], Sampling(STUDY.max_tokens, temperature=0.0)
    batch = family.collate(asked, range(len(asked)))
    answers = family.rollout(role, batch, sampling, Draws(0), purpose="greedy")
    return Boxed(device=CPU).score(family.spelled(answers), asked).mean().item()


def share(texts: list[str]) -> float:
    """Return the share of texts with words between numbers."""
    return statistics.fmean(WORD in text for text in texts)


STUDY = Study(
    name="tessy",
    title="Data written together (TESSY) on arithmetic",
    about="SFT on answers that were written in several ways by the student and by "
    "`arithmetic-words-teacher`, which writes its scratchpad in another style; for comparison, on "
    f"the data's own solutions and ({SAME_STYLE}) on answers of `arithmetic-teacher`, which are in "
    "the student's style and about as often right. 30 % of the answers that the teacher of words "
    "learned from go on, in words, from a beginning in signs (`scripts/build_arithmetic_models.py`)"
    f", so that it can take part in what the student begins. {EPOCHS} times over all; answers are "
    "written anew for each seed.",
    arms=ARMS,
    against={"teacher-only": ARMS, SAME_STYLE: ["teacher-only", "tessy"]},
    shown=SHOWN,
    drawn=("data/right", "box/mean@4", "greedy", "words", "box/tokens"),
    extra=more,
    questions=200,
    max_tokens=192,
)


def data_of(arm: Arm, amount: Amount, seed: int, folder: Path) -> tuple[Arm, dict[str, float]]:
    """Return an arm that trains on data written for it, and what these are like."""
    count = max(1, amount.steps * 16 // EPOCHS)
    own = Arm(arm.config, list(arm.overrides))
    path = load_config(own.config, own.overrides).data.path
    assert path is not None
    if path.startswith("bundled:"):
        own.overrides.append(f"data.max_examples={count}")
    else:
        own.overrides.append(f"tessy.max_questions={count}")
        path = str(folder / "written.jsonl")
        write(
            own.config,
            output=Path(path),
            overrides=[*own.overrides, f"tessy.seed={seed}", f"tessy.predictors={PREDICTORS}"],
        )
        own.overrides.append(f"data.path={path}")
    lines = resolve(path, Path()).read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    texts = [r.get("solution") or r["messages"][-1]["content"] for r in rows]
    judge = Boxed(device=CPU)
    right = judge.score(texts, [Example("", answer=r["answer"]) for r in rows]).mean().item()
    tokens = [r.get("tokens", {"student": 1, "teacher": 0}) for r in rows]
    teacher, student = (sum(t[side] for t in tokens) for side in ("teacher", "student"))
    found = {
        "data/right": right,
        "data/teacher": teacher / (teacher + student),
        "data/words": share(texts),
        "data/samples": float(len(rows)),
    }
    return own, found


def run(arm: Arm, amount: Amount, extra: Extra | None, seed: int) -> dict[str, float]:
    """Write an arm's data, train one student on them and return its measurements."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        own, found = data_of(arm, amount, seed, Path(name))
        return found | run_arm(own, amount, extra, seed)


def predictor_table() -> list[str]:
    """Return the part of the page about the predictors."""
    report = json.loads((PREDICTORS / "report.json").read_text(encoding="utf-8"))
    found = report["predictors"]
    return [
        "",
        "## The boundary predictors",
        "",
        "Learned from the rule that numbers are capability "
        f"(`{report['settings']['fit']['pattern']}` is style), on both models' scratchpads; labels "
        "that are right, of segments of texts held out.",
        "",
        *header(["segments", "right", "the most frequent label"]),
        *(
            row(name, [str(p["segments"]), f"{p['accuracy']:.4f}", f"{p['majority']:.4f}"])
            for name, p in found.items()
        ),
    ]


def data_table(results: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return the part of the page about what was written."""
    keys = [key for key in SHOWN if key.startswith("data/")]
    lines = [row(arm, [cell(values(results, arm, key)) for key in keys]) for arm in ARMS]
    return [
        "",
        "## What was written",
        "",
        "How many samples did not fail, the share of right answers, of tokens by the teacher, and "
        "of scratchpads in words.",
        "",
        *header([SHOWN[key] for key in keys]),
        *lines,
    ]


def before_table(results: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return the part of the page about what training changed."""
    before: Mapping[str, Any] = results["undistilled"]
    keys = [key for key in SHOWN if key in before]

    def gains(arm: str, key: str) -> list[float]:
        return [value - before[key] for value in values(results, arm, key)]

    lines = [row(arm, [cell(gains(arm, key)) for key in keys]) for arm in ARMS]
    return [
        "",
        "## Differences from the student before training, on the same questions",
        "",
        *header([SHOWN[key] for key in keys]),
        *lines,
    ]


def is_current() -> bool:
    """Return whether the predictors are there, and of this config and these models."""
    file, config = PREDICTORS / "report.json", load_config(CONFIG)
    if not file.exists():
        return False
    report, settings = json.loads(file.read_text(encoding="utf-8")), config.tessy
    assert settings is not None
    paths = {"student": config.family["path"], "teacher": settings.teacher["path"]}
    hashes = {author: folder_hash(Path(resolve_model(path))) for author, path in paths.items()}
    return bool(report["settings"] == asdict(settings) and report["revisions"] == hashes)


def fitted() -> None:
    """Make the predictors where they are not there, or of something else."""
    if not is_current():
        shutil.rmtree(PREDICTORS, ignore_errors=True)
        print(fit(CONFIG, output=PREDICTORS), flush=True)


def measure_before(results: dict[str, Any], given: Options) -> None:
    """Measure of the models before training what ``more`` measures after it."""
    if "greedy" not in results["undistilled"]:
        world = World(given.amount)
        results["undistilled"] |= answered(world.student, world)
        results["teacher"] |= answered(world.teacher, world)
        save_results(given.results, results)


def main() -> None:
    given = options(STUDY, __doc__)
    fitted()
    results = measured(STUDY, given, run)
    measure_before(results, given)
    tables = [*before_table(results), *data_table(results), *predictor_table()]
    publish(STUDY, results, given.output, tables)


if __name__ == "__main__":
    main()

"""Does SFT on another style's teacher hurt a student, and data written together not (TESSY)?

`arithmetic-words-teacher` is mostly right, and writes words where `arithmetic-student` has signs.
Each arm writes answers to the same questions in its way (TESSY, arXiv:2604.14164, its baselines and
the ablation with the teacher's final answer), and trains the student on them by plain SFT. Boundary
predictors are made once, from a rule.

    python scripts/reproduce/tessy.py

Writes results.json, figure.png and README.md to samples/tessy. Each run is saved when it is done,
and what is there already is not run again. The predictors are kept in runs/tessy-predictors.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch
from arithmetic_runs import ROOT, Amount, Extra, Study, World, measured, options, publish
from arithmetic_runs import run as run_arm
from collecting import Arm, cell, header, row, values

from diffdistill.checkpoints import restore
from diffdistill.commands.tessy import fit, write
from diffdistill.config import load_config
from diffdistill.data.dataset import resolve
from diffdistill.evaluation.arithmetic import WORDS
from diffdistill.rewards.boxed import Boxed
from diffdistill.types import Example

CONFIG = "tessy/arithmetic"
PREDICTORS = ROOT / "runs" / "tessy-predictors"
GOLD = "the data's solutions"
EPOCHS = 4
ARMS = {
    GOLD: Arm(CONFIG, ["data.path=bundled:arithmetic-train.jsonl"]),
    **{
        mode: Arm(CONFIG, [f"tessy.mode={mode}"])
        for mode in (
            "student-only",
            "best-of-n",
            "teacher-only",
            "teacher-think",
            "teacher-answer",
            "mix",
            "tessy",
            "tessy-teacher-answer",
        )
    },
}
SHOWN = {
    "data/right": "of the data: right",
    "data/teacher": "written by the teacher",
    "data/words": "in words",
    "box/mean@4": "right in a box",
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


def words(folder: Path, world: World) -> dict[str, float]:
    """Return the share of a student's answers that are in words."""
    student = restore(folder, device=torch.device("cpu")).roles["student"]
    texts: list[str] = []
    with torch.no_grad():
        for subject, attempt in world.attempts(student, 64):
            texts += subject.family.spelled(attempt.answers)
    return {"words": share(texts)}


def share(texts: list[str]) -> float:
    """Return the share of texts with words between numbers."""
    return statistics.fmean(WORD in text for text in texts)


STUDY = Study(
    name="tessy",
    title="Data written together (TESSY) on arithmetic",
    about="SFT on answers that were written in several ways by the student and by "
    "`arithmetic-words-teacher`, which writes its scratchpad in another style; on the data's own "
    f"solutions, which are in the student's style, for comparison. {EPOCHS} times over all; "
    "answers are written anew for each seed.",
    arms=ARMS,
    against={"teacher-only": ARMS, "student-only": ["best-of-n", "teacher-only", "tessy"]},
    shown=SHOWN,
    drawn=("data/right", "box/mean@4", "box/parsed", "words", "box/tokens"),
    extra=words,
    questions=200,
    max_tokens=192,
)


def data_of(arm: Arm, amount: Amount, seed: int, folder: Path) -> tuple[Arm, dict[str, float]]:
    """Return an arm that trains on data written for it, and what these are like."""
    count = max(1, amount.steps * 16 // EPOCHS)
    own = Arm(arm.config, [*arm.overrides, f"data.max_examples={count}"])
    path = load_config(own.config, own.overrides).data.path
    assert path is not None
    if not path.startswith("bundled:"):
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
    judge = Boxed(device=torch.device("cpu"))
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
        f"Learned from the rule that numbers are capability (`{report['fit']['pattern']}` is "
        "style), on both models' scratchpads; labels that are right, of segments held out.",
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
        "The share of right answers, of tokens by the teacher, and of scratchpads in words.",
        "",
        *header([SHOWN[key] for key in keys]),
        *lines,
    ]


def main() -> None:
    given = options(STUDY, __doc__)
    if not (PREDICTORS / "report.json").exists():
        print(fit(CONFIG, output=PREDICTORS), flush=True)
    results = measured(STUDY, given, run)
    publish(STUDY, results, given.output, [*data_table(results), *predictor_table()])


if __name__ == "__main__":
    main()

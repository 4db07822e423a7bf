"""``diffdistill diagnose``: where a student and its teacher go wrong, and what that points to."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffdistill.checkpoints import write_atomic
from diffdistill.commands.sessions import open_session, render
from diffdistill.evaluation.diagnosis import diagnose as measured
from diffdistill.evaluation.diagnosis import support_size
from diffdistill.evaluation.subject import Subject, first_questions, subject_of
from diffdistill.evaluation.verdicts import Verdict, trends, verdicts
from diffdistill.runs import versions
from diffdistill.sampling import inference
from diffdistill.session import Session

MEASURES = {
    "questions": "questions asked",
    "length": "tokens of an answer",
    "ended": "answers that end",
    "repetition": "3-grams that were there before",
    "reward": "reward",
    "parse_rate": "answers in the format",
    "taught": "answers with a right sibling to show",
    "entropy": "entropy of the student",
    "teacher_entropy": "entropy of the teacher",
    "reverse_kl": "KL(student || teacher)",
    "forward_kl": "KL(teacher || student)",
    "student_mass": "student's mass on the teacher's top k",
    "teacher_mass": "teacher's mass on its top k",
    "overlap": "overlap of both top k",
    "rank": "the teacher's rank of a sampled token, median",
    "outside_top": "sampled tokens outside of the teacher's top k",
    "context_kl": "KL(student || teacher), own solution",
    "shuffled_kl": "KL(student || teacher), another question's solution",
    "consensus_questions": "questions with several contexts",
    "consensus_kl": "KL(student || teacher), several contexts",
    "consensus_gap": "consensus gap",
    "irreducible_share": "share of that KL that no student can lose",
    "alone_right": "teacher right, alone",
    "prefixed_right": "teacher right, after the student's words",
    "right_to_wrong": "answers that turn wrong",
    "wrong_to_right": "answers that turn right",
    "alone_parses": "teacher in the format, alone",
    "prefixed_parses": "teacher in the format, after the student's words",
    "student_mass_before": "student's mass on the support, start of training",
    "student_mass_after": "student's mass on the support, end of training",
    "answer_tokens_before": "tokens of an answer, start of training",
    "answer_tokens_after": "tokens of an answer, end of training",
}
"""What is measured, in the order of the table."""

NONE_FOUND = "none of the failure modes that are known here"
HINT = "(A hint of where to look, by bounds of ours: docs/diagnose.md.)"


def diagnose(
    source: str,
    *,
    max_examples: int = 32,
    num_answers: int | None = None,
    seed: int = 0,
    checkpoint: str = "latest",
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Return a table of what happens at a student's answers, and what it points to.

    Answers are sampled as the method does; all numbers go with their settings into
    ``diagnosis.json`` of a run's folder.

    Args:
        source: A run's folder, or a config (before any training).
        max_examples: Questions of the data, its first.
        num_answers: Answers to each; None takes the method's.
        seed: Seed of the answers.
        checkpoint: Which checkpoint of a run.
        output: The JSON file; None is that of the run, and none for a config.
        overrides: ``section.key=value`` changes of the config.

    Raises:
        UserError: If the method's student does not answer questions, or there are none.
    """
    session = open_session(source, checkpoint, overrides)
    subject = subject_of(session, num_answers=num_answers, seed=seed)
    asked = first_questions(session, max_examples, subject.reward)
    with inference(session):
        found = measured(subject, asked, say)
    measures = found.measures | facts(subject) | trends(logged(Path(source)))
    points = verdicts(measures)
    settings = {
        "max_examples": max_examples,
        "num_answers": subject.num_answers,
        "seed": seed,
        "top_k": support_size(subject),
    }
    told = {
        **account(session, source, checkpoint, overrides),
        "diagnose": settings,
        "measures": measures,
        "verdicts": [point._asdict() for point in points],
        "notes": found.notes,
    }
    save(told, output, Path(source) / "diagnosis.json")
    lines = [render(["measured", "value"], cells(measures))]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join([*lines, *sentences(points)])


def facts(subject: Subject) -> dict[str, float]:
    """Return what of the method's options a verdict looks at."""
    method: Any = subject.method
    uncorrected = (
        getattr(method, "support", "full") != "full"
        and method.divergence == "reverse-kl"
        and method.correction == "none"
    )
    return {"uncorrected": float(uncorrected)}


def logged(run: Path) -> list[dict[str, float]]:
    """Return the numbers that a run logged, a row for each step; none of a config."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def cells(measures: Mapping[str, float]) -> list[list[str]]:
    """Return the rows of the table."""
    return [[label, f"{measures[n]:.4g}"] for n, label in MEASURES.items() if n in measures]


def sentences(points: Sequence[Verdict]) -> list[str]:
    """Return verdicts as lines."""
    if not points:
        return [f"verdict: {NONE_FOUND}", HINT]
    return [*(f"verdict: {point.mode}: {point.because}" for point in points), HINT]


def account(
    session: Session, source: str, checkpoint: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return what numbers about a session depend on."""
    return {
        "source": source,
        "checkpoint": checkpoint,
        "overrides": list(overrides),
        "versions": versions(),
        "data": asdict(session.config.data),
        "method": session.config.method,
    }


def save(found: Mapping[str, Any], output: Path | None, of_run: Path) -> None:
    """Write numbers as JSON, where not told otherwise beside the run."""
    if output is None and of_run.parent.is_dir():
        output = of_run
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, json.dumps(_plain(found), indent=1).encode())


def _plain(value: Any) -> Any:
    """Return a value without what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Tell the screen how far it has come."""
    print(text, file=sys.stderr, flush=True)

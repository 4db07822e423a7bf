"""``diffdistill evaluate`` of autoregressive models."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from diffdistill.checkpoints import write_atomic
from diffdistill.commands.sessions import models, open_session, render
from diffdistill.data.problems import Problem, settle
from diffdistill.data.questions import read_questions
from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.evaluation.answers import Average, examine
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings
from diffdistill.options import parse
from diffdistill.reward_building import build_answer_reward
from diffdistill.runs import versions
from diffdistill.sampling import inference
from diffdistill.session import Session
from diffdistill.types import Example


def evaluate_answers(
    source: str, checkpoint: str, output: Path | None, overrides: Sequence[str]
) -> str:
    """Measure answers to the questions of a config's data, and return a table.

    Scores are those of the config's ``rewards``, if it has any. What is found goes, with all that
    it depends on, into ``evaluation-answers.json`` of a run's folder, and the answers beside it.

    Args:
        source: A run's folder, or a config (before any training).
        checkpoint: Which checkpoint of a run.
        output: The JSON file; None is that of the run, and none for a config.
        overrides: ``section.key=value`` changes of the config, such as data.path=held-out.jsonl.

    Raises:
        UserError: If the sections ``evaluate`` and ``sample`` do not go together.
    """
    session = open_session(source, checkpoint, overrides)
    config = session.config
    settings: AnswerEvaluateSettings = parse(
        AnswerEvaluateSettings, config.evaluate, f"{source}: evaluate"
    )
    _check(session, settings)
    reward = build_answer_reward(config, session.device) if config.rewards else None
    asked = _questions(session, settings.max_examples)
    if output is None and Path(source).is_dir():
        output = Path(source) / "evaluation-answers.json"
    averages: list[Average] = []
    answers: list[dict[str, Any]] = []
    with inference(session):
        for name, role in models(session, settings.roles or ["base", "student"]).items():
            found = examine(session, name, role, asked, settings, reward)
            averages += found.averages
            answers += found.answers
            for row in found.averages:
                print(f"{name}: {row.metric} {_cell(row)}", file=sys.stderr, flush=True)
    account = {
        "source": source,
        "checkpoint": checkpoint,
        "overrides": list(overrides),
        "versions": versions(),
        "data": asdict(config.data),
        "sample": asdict(config.replies),
        "evaluate": asdict(settings),
        "rewards": config.rewards,
        "rows": [row._asdict() for row in averages],
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, json.dumps(account, indent=1).encode())
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
        write_atomic(output.with_name(f"{output.stem}-samples.jsonl"), lines.encode())
    return f"{_told(session, len(asked))}\n{answers_table(averages)}"


def _check(session: Session, settings: AnswerEvaluateSettings) -> None:
    writing = session.config.replies
    if writing.temperature == 0.0 and writing.num_answers > 1:
        raise UserError(
            f"sample.num_answers={writing.num_answers} would all be the same: set "
            "sample.temperature, such as 1.0"
        )
    for num_tries in settings.num_tries or []:
        if num_tries > writing.num_answers:
            raise UserError(
                f"evaluate.num_tries: pass@{num_tries} needs sample.num_answers of at least "
                f"{num_tries}, not {writing.num_answers}"
            )


def _questions(session: Session, count: int | None) -> list[Example]:
    data = session.config.data
    problems = list[Problem]()
    found = list(islice(read_questions(data, Path(), problems), count))
    settle(problems, data.on_error)
    if not found:
        raise UserError(f"there is no usable example in {_where(data)}")
    return found


def _where(data: DataSettings) -> str:
    """Return what the questions of a config are called."""
    return data.path or data.source or ", ".join((data.skills or {}).values())


def _told(session: Session, count: int) -> str:
    data, writing = session.config.data, session.config.replies
    return (
        f"{_where(data)}, {count} questions; {writing.num_answers} answers each of at "
        f"most {writing.max_tokens} tokens, temperature {writing.temperature:g}, top-p "
        f"{writing.top_p:g}, top-k {writing.top_k}, seed {writing.seed}"
    )


def answers_table(rows: Sequence[Average]) -> str:
    """Return rows as text: a line for each metric, a column for each model."""
    names = dict.fromkeys(row.model for row in rows)
    found = {(row.metric, row.model): _cell(row) for row in rows}
    metrics = dict.fromkeys(row.metric for row in rows)
    lines = [[metric, *(found.get((metric, name), "") for name in names)] for metric in metrics]
    return render(["metric", *names], lines)


def _cell(row: Average) -> str:
    return f"{row.value:.4g}" + ("" if row.error is None else f" +- {row.error:.2g}")

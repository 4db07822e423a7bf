"""``diffdistill tessy``: data that a student and a teacher write together (arXiv:2604.14164)."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffdistill.checkpoints import write_atomic
from diffdistill.commands.sessions import render
from diffdistill.config import load_config
from diffdistill.errors import UserError
from diffdistill.lineage import written_record
from diffdistill.provenance.files import beside_file, dumped
from diffdistill.reward_building import build_answer_reward
from diffdistill.session import default_device
from diffdistill.synthesis.building import Workshop, open_workshop
from diffdistill.synthesis.dependence import samples_depend_on
from diffdistill.synthesis.fitting import REPORT, fit_predictors
from diffdistill.synthesis.samples import check_columns, write_samples
from diffdistill.synthesis.storing import Store
from diffdistill.tessy_settings import FitSettings, TessySettings
from diffdistill.types import Example

SAY_EVERY = 50
"""Samples between two lines on the screen."""


def fit(config: str, *, output: Path | None = None, overrides: Sequence[str] = ()) -> str:
    """Make the boundary predictors of a config, and return how good they are.

    Args:
        config: A config with a section ``tessy``.
        output: The folder; None is ``tessy.predictors``.
        overrides: ``section.key=value`` changes of the config.

    Raises:
        UserError: If the config does not say how.
    """
    workshop = open_workshop(load_config(config, overrides), default_device())
    if output is None:
        if workshop.settings.predictors is None:
            raise UserError("name a folder: --output, or tessy.predictors of the config")
        output = Path(workshop.settings.predictors).expanduser()
    found = fit_predictors(workshop, output, _say)
    rows = [
        [author, str(new.segments), f"{new.accuracy:.2%}", f"{new.majority:.2%}", str(new.epoch)]
        for author, new in found.items()
    ]
    columns = ["predictor of", "segments", "labels right", "most frequent label", "best epoch"]
    return f"{output}\n{render(columns, rows)}"


def write(config: str, *, output: Path | None = None, overrides: Sequence[str] = ()) -> str:
    """Write the samples of a config, and return what they are like.

    What is in the output already is not written again.

    Args:
        config: A config with a section ``tessy``.
        output: The JSON lines file; None is ``data.path``, where ``tessy.questions`` is another.
        overrides: ``section.key=value`` changes of the config.

    Raises:
        UserError: If the config does not say how, or the output holds other samples.
    """
    checked = load_config(config, overrides)
    check_columns(checked.data)
    workshop = open_workshop(checked, default_device())
    if output is None:
        if workshop.settings.questions is None or checked.data.path is None:
            raise UserError(
                "name a file: --output, or data.path of the config where tessy.questions is set"
            )
        output = Path(checked.data.path).expanduser()
    questions = workshop.questions()
    store = Store.open(output, samples_depend_on(workshop, questions))
    _say(_planned(workshop, len(questions), store))
    write_samples(workshop, questions, store, lambda count: _say(f"{count} samples", count))
    if not store.rows:
        raise UserError(f"no sample was finished: {store.reasons()}")
    record = written_record(checked, _as_fitted(workshop), output, workshop.device)
    write_atomic(beside_file(output)[0], dumped(record).encode())
    return _told(workshop, store)


def _as_fitted(workshop: Workshop) -> TessySettings:
    """Return the settings, with ``fit`` as the predictors that wrote were made."""
    settings = workshop.settings
    report = Path(settings.predictors or "").expanduser() / REPORT
    if not workshop.predictor_folders() or not report.is_file():
        return settings
    made = json.loads(report.read_text(encoding="utf-8"))["settings"]["fit"]
    return replace(settings, fit=FitSettings(**made))


def _planned(workshop: Workshop, count: int, store: Store) -> str:
    """Return what is to be written, and what training would not read of it."""
    settings, limit = workshop.settings, workshop.config.data.max_answer
    lines = [f"{count} questions, {count * settings.num_samples} samples"]
    if store.rows or store.failed:
        lines.append(f"{len(store.rows) + len(store.failed)} samples are there already")
    if limit < settings.max_tokens:
        lines.append(
            f"data.max_answer is {limit} and tessy.max_tokens {settings.max_tokens}: training "
            "cuts longer answers"
        )
    return "\n".join(lines)


def _told(workshop: Workshop, store: Store) -> str:
    rows = [store.rows[number] for number in sorted(store.rows)]
    tokens = [row["tokens"] for row in rows]
    numbers = {
        "samples": float(len(rows)),
        "tokens of a sample": statistics.fmean(count["total"] for count in tokens),
        "share of the teacher's tokens": _share(tokens),
        "parts of a sample": statistics.fmean(len(row["spans"]) for row in rows),
        "right": _right(workshop, rows),
        "failed": float(len(store.failed)),
    }
    shown = [[name, f"{value:.4g}"] for name, value in numbers.items() if value is not None]
    lines = [str(store.path), render(["of what was written", "value"], shown)]
    lines += [f"failed: {store.reasons()}"] if store.failed else []
    return "\n".join(lines + _cut(tokens, workshop.config.data.max_answer))


def _cut(tokens: Sequence[dict[str, int]], limit: int) -> list[str]:
    """Return a line on the answers, with an end token each, of which training cuts a part."""
    lengths = [count["total"] + 1 for count in tokens]
    longer = sum(length > limit for length in lengths)
    if not longer:
        return []
    return [
        f"training would cut {longer} of these answers: data.max_answer is {limit}, set it to "
        f"{max(lengths)} or more"
    ]


def _share(tokens: Sequence[dict[str, int]]) -> float:
    teacher, student = (sum(count[side] for count in tokens) for side in ("teacher", "student"))
    return teacher / max(1, teacher + student)


def _right(workshop: Workshop, rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the mean reward of what was written; None where nothing verifies it."""
    data = workshop.config.data
    column = data.answer_column or "answer"
    if not workshop.config.rewards or not all(column in row for row in rows):
        return None
    reward = build_answer_reward(workshop.config, workshop.device)
    examples = [Example("", answer=str(row[column])) for row in rows]
    texts = [row[data.messages_column][-1]["content"] for row in rows]
    return reward.score(texts, examples).mean().item()


def _say(text: str, count: int = 0) -> None:
    if count % SAY_EVERY == 0:
        print(text, file=sys.stderr, flush=True)

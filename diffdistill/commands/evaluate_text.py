"""``diffdistill evaluate`` of text models."""

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffdistill.checkpoints import write_atomic
from diffdistill.commands.sessions import models, open_session, render
from diffdistill.errors import MissingExtra
from diffdistill.evaluation.likelihood import HeldOut, MonteCarlo, held_out
from diffdistill.evaluation.python_suite import Measured, measure_python, read_python
from diffdistill.evaluation.text_settings import TextEvaluateSettings, parse_text_settings
from diffdistill.runs import versions
from diffdistill.sampling import inference
from diffdistill.session import Session


def evaluate_text(
    source: str, suite: str, checkpoint: str, output: Path | None, overrides: Sequence[str]
) -> str:
    """Measure text models and return a table, after all that its numbers depend on.

    ``text`` bounds the likelihood of the config's data (set data.path to texts held out);
    ``python`` measures answers, infilling and the distance to the teacher on chats about Python;
    ``lm-eval`` runs tasks of EleutherAI's harness. What is found goes, with the settings, into
    ``evaluation-SUITE.json`` of a run's folder, and the harness's samples beside it.

    Args:
        source: A run's folder, or a config (before any training).
        suite: ``text``, ``python`` or ``lm-eval``.
        checkpoint: Which checkpoint of a run.
        output: The JSON file; None is that of the run, and none for a config.
        overrides: ``section.key=value`` changes of the config, such as evaluate.num_draws=128.

    Raises:
        UserError: If the section ``evaluate`` does not say what can be measured here.
    """
    if suite == "lm-eval" and importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("lm-eval", "--suite lm-eval", "lm-eval")
    session = open_session(source, checkpoint, overrides)
    settings = parse_text_settings(session.config.evaluate, f"{source}: evaluate")
    if output is None and Path(source).is_dir():
        output = Path(source) / f"evaluation-{suite}.json"
    origin = {"source": source, "checkpoint": checkpoint, "overrides": list(overrides)}
    with inference(session):
        return MEASURES[suite](session, settings, output, origin)


def _text(
    session: Session,
    settings: TextEvaluateSettings,
    output: Path | None,
    origin: Mapping[str, Any],
) -> str:
    monte_carlo = MonteCarlo(
        num_draws=settings.num_draws,
        antithetic=settings.antithetic,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    rows = []
    for name, role in models(session, _roles(session, settings)).items():
        rows.append(held_out(session, name, role, monte_carlo, settings.max_examples))
        print(f"{name}: {rows[-1].nelbo:.4g} nats per token", file=sys.stderr, flush=True)
    told = _account(session, settings, origin, rows, output)
    return f"{told}\n{text_table(rows)}"


def _python(
    session: Session,
    settings: TextEvaluateSettings,
    output: Path | None,
    origin: Mapping[str, Any],
) -> str:
    chosen = models(session, _roles(session, settings))
    shown = read_python(session, chosen, settings.max_examples)
    rows = []
    for row in measure_python(session, chosen, shown, settings):
        rows.append(row)
        print(f"{row.model}: {row.metric} {row.value:.4g}", file=sys.stderr, flush=True)
    told = _account(session, settings, origin, rows, output)
    found = {(row.metric, row.model): _cell(row) for row in rows}
    metrics = dict.fromkeys(row.metric for row in rows)
    lines = [[m, *(found.get((m, name), "") for name in chosen)] for m in metrics]
    counts = f"{len(shown.chats)} chats, {len(shown.texts)} texts, {shown.left_out} too long"
    return f"{told}\n{counts}\n{render(['metric', *chosen], lines)}"


def _cell(row: Measured) -> str:
    return f"{row.value:.4f}" + ("" if row.error is None else f" +- {row.error:.4f}")


def _roles(session: Session, settings: TextEvaluateSettings) -> Sequence[str]:
    usual = ("student", "teacher")
    return settings.roles or ["base", *(n for n in usual if n in session.roles.by_name)]


def _account(
    session: Session,
    settings: TextEvaluateSettings,
    origin: Mapping[str, Any],
    rows: Sequence[HeldOut | Measured],
    output: Path | None,
) -> str:
    """Write rows with all that they depend on; return the most of it in a line."""
    data = asdict(session.config.data)
    found = {
        **origin,
        "versions": versions(),
        "data": data,
        "sample": asdict(session.config.answers),
        "evaluate": asdict(settings),
        "rows": [row._asdict() for row in rows],
    }
    _write(json.dumps(found, indent=1), output)
    what = f"{data['path'] or data['source']}, first {settings.max_examples or 'all'} texts"
    draws = f"{settings.num_draws} draws, antithetic {settings.antithetic}, seed {settings.seed}"
    return f"{what}; {draws}"


def text_table(rows: Sequence[HeldOut]) -> str:
    """Return rows as text, a line for each model."""
    columns = ["model", "texts", "tokens", "bytes", "nats per token", "perplexity", "bits per byte"]
    lines = [
        [
            row.model,
            str(row.num_texts),
            str(row.num_tokens),
            str(row.num_bytes),
            f"{row.nelbo:.4f} +- {row.nelbo_error:.4f}",
            f"{row.perplexity:.4g}",
            f"{row.bits_per_byte:.4f} +- {row.bits_per_byte_error:.4f}",
        ]
        for row in rows
    ]
    return render(columns, lines)


def _lm_eval(
    session: Session,
    settings: TextEvaluateSettings,
    output: Path | None,
    origin: Mapping[str, Any],
) -> str:
    from lm_eval.utils import handle_non_serializable

    from diffdistill.evaluation.harness import account, run_tasks

    writing = session.config.answers
    found: dict[str, Any] = {
        **origin,
        "versions": versions() | {"lm_eval": version("lm_eval")},
        "models": {},
    }
    samples: list[str] = []
    lines: list[list[str]] = []
    for name, role in models(session, settings.roles or ["student"]).items():
        results = run_tasks(role, writing, settings)
        for task, rows in results.pop("samples").items():
            for row in rows:
                kept = {"model": name, "task": task, **row}
                samples.append(json.dumps(kept, default=handle_non_serializable) + "\n")
        found["models"][name] = account(role, writing, settings) | {"harness": results}
        lines += result_lines(name, results)
    text = json.dumps(found, indent=1, default=handle_non_serializable)
    _write(text, output)
    if output is not None:
        _write("".join(samples), output.with_name(f"{output.stem}-samples.jsonl"))
    columns = ["model", "task", "shots", "questions", "metric", "value"]
    return f"{_settings_told(found)}\n{render(columns, lines)}"


def result_lines(model: str, results: Mapping[str, Any]) -> list[list[str]]:
    """Return a line for each number that the harness found."""
    lines = []
    for task, numbers in results["results"].items():
        shots = str(results.get("n-shot", {}).get(task, ""))
        count = str(results.get("n-samples", {}).get(task, {}).get("effective", ""))
        for key, value in numbers.items():
            metric, comma, rule = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{rule}")
            told = f" +- {error:.4f}" if isinstance(error, float) else ""
            name = metric if rule == "none" else f"{metric} ({rule})"
            lines.append([model, task, shots, count, name, f"{value:.4f}{told}"])
    return lines


def _settings_told(found: Mapping[str, Any]) -> str:
    """Return the settings of each model in a few lines; all of them are in the JSON file."""
    lines = [", ".join(f"{k} {v}" for k, v in found["versions"].items())]
    for name, model in found["models"].items():
        lines.append(f"{name}: {model['family']} of {model['family_options'].get('path')}, "
                     f"weights {model['weights_sha256'][:16]}")  # fmt: skip
    given = next(iter(found["models"].values()))
    for section in ("sample", "evaluate"):
        options = ", ".join(f"{k}={v}" for k, v in given[section].items())
        lines.append(f"{section}: {options}")
    for name, model in found["models"].items():
        error = model["harness"]["likelihood_error"]
        if error is not None:
            lines.append(f"{name}: Monte Carlo error of a log-likelihood {error:.3g} nats")
    return "\n".join(lines)


def _write(text: str, output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, text.encode())


MEASURES = {"text": _text, "python": _python, "lm-eval": _lm_eval}

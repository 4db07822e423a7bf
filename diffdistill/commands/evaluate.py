"""``diffdistill evaluate``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffdistill.checkpoints import write_atomic
from diffdistill.commands.sessions import models, open_session, render
from diffdistill.errors import UserError
from diffdistill.evaluation.few_step import Row, few_step, parse_settings
from diffdistill.evaluation.groups import make_groups

SUITES = ("few-step",)


def evaluate(
    source: str,
    *,
    suite: str = "few-step",
    checkpoint: str = "latest",
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Measure quality against the number of sampling steps; return a table.

    The rows are written as JSON into ``evaluation.json`` of a run's folder.

    Args:
        source: A run's folder, or a config (before any training).
        suite: ``few-step``.
        checkpoint: Which checkpoint of a run.
        output: The JSON file; None is that of the run, and none for a config.
        overrides: ``section.key=value`` changes of the config, such as evaluate.num_seeds=5.

    Raises:
        UserError: If the section ``evaluate`` does not say what can be measured here.
    """
    if suite not in SUITES:
        raise UserError(f"no suite {suite!r}; there is {', '.join(SUITES)}")
    session = open_session(source, checkpoint, overrides)
    settings = parse_settings(session.config.evaluate, f"{source}: evaluate")
    measured = models(session, settings.roles)
    rows = []
    for row in few_step(session, measured, make_groups(session, settings), settings):
        rows.append(row)
        what = f"{row.model}, {row.num_steps} steps: {row.metric} of {row.group} {cell(row)}"
        print(what, file=sys.stderr, flush=True)
    if output is None and Path(source).is_dir():
        output = Path(source) / "evaluation.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, json.dumps([row._asdict() for row in rows], indent=1).encode())
    return table(rows)


def table(rows: Sequence[Row]) -> str:
    """Return rows as text: a line for each metric, group and model; a column for each count."""
    steps = list(dict.fromkeys(row.num_steps for row in rows))
    found = {(row.metric, row.group, row.model, row.num_steps): row for row in rows}
    lines = dict.fromkeys(key[:3] for key in sorted(found, key=lambda key: key[:2]))
    columns = ["metric", "group", "model", *(f"{n} step{'s' * (n > 1)}" for n in steps)]
    return render(columns, [[*key, *(cell(found[*key, n]) for n in steps)] for key in lines])


def cell(row: Row) -> str:
    """Return the mean of a row with its confidence interval."""
    if row.low is None or row.high is None:
        return f"{row.mean:.4g}"
    return f"{row.mean:.4g} +- {(row.high - row.low) / 2:.2g}"

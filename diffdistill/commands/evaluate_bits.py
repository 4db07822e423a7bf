"""``diffdistill evaluate --suite bits``: bits per byte of given texts."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from diffdistill.checkpoints import write_atomic
from diffdistill.commands.sessions import models, open_session, render
from diffdistill.data.problems import Problem, settle
from diffdistill.data.texts import read_texts
from diffdistill.errors import UserError
from diffdistill.evaluation.bits import Bits, bits_per_byte
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings
from diffdistill.options import parse
from diffdistill.pipelines.text_rows import Reading
from diffdistill.sampling import inference


def evaluate_bits(
    source: str, checkpoint: str, output: Path | None, overrides: Sequence[str]
) -> str:
    """Measure how likely the texts of a config's data are to its models, and return a table.

    Models with other tokens are comparable, since bits are counted for each byte. What is found
    goes into ``evaluation-bits.json`` of a run's folder.

    Args:
        source: A run's folder, or a config (before any training).
        checkpoint: Which checkpoint of a run.
        output: The JSON file; None is that of the run, and none for a config.
        overrides: ``section.key=value`` changes of the config, such as data.path=held-out.jsonl.

    Raises:
        UserError: If the data cannot be read, or a model cannot read it.
    """
    session = open_session(source, checkpoint, overrides)
    data = session.config.data
    settings: AnswerEvaluateSettings = parse(
        AnswerEvaluateSettings, session.config.evaluate, f"{source}: evaluate"
    )
    problems = list[Problem]()
    found = list(islice(read_texts(data, Path(), problems), settings.max_examples))
    settle(problems, data.on_error)
    if not found:
        raise UserError(f"there is no usable example in {data.path or data.source}")
    reading = Reading(turns="all" if data.turns == "all" else "last", truncate=data.truncate)
    rows: list[Bits] = []
    with inference(session):
        for name, role in models(session, settings.roles or ["base", "student"]).items():
            rows += bits_per_byte(name, role, found, reading)
    if output is None and Path(source).is_dir():
        output = Path(source) / "evaluation-bits.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, json.dumps([row._asdict() for row in rows], indent=1).encode())
    cells = [
        [row.model, row.texts, str(row.num_texts), str(row.num_bytes), f"{row.bits_per_byte:.4g}"]
        for row in rows
    ]
    return render(["model", "of", "texts", "bytes", "bits per byte"], cells)

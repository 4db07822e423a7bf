"""``diffdistill sample`` of autoregressive models."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffdistill.asking import as_prompt, question, questions_of, reply, writer
from diffdistill.commands.sample_text import Page, answer_row, page_of, write_rows
from diffdistill.commands.sessions import models, open_session
from diffdistill.errors import UserError
from diffdistill.sampling import inference


def sample_answers(
    source: str,
    *,
    prompts: Sequence[str] = (),
    images: Sequence[Path] = (),
    compare: Sequence[str] = ("student",),
    checkpoint: str = "latest",
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Write answers of one or several models to questions, and return a row for each.

    On a terminal they are shown side by side as they are written; elsewhere each is printed when it
    is done. All are asked the student's prompt, in the template of their own family: the teacher
    is shown no solution.

    Args:
        source: A run's folder, or a config (before any training).
        prompts: Questions; none takes ``sample.prompts``, or else the first of the data.
        images: The pictures that each of ``prompts`` is about.
        compare: Some of base, student, teacher, average.
        checkpoint: Which checkpoint of a run.
        output: A JSON lines file for the rows; None writes none.
        overrides: ``section.key=value`` changes of the config; how answers are sampled is all in
            the section ``sample``.

    Raises:
        UserError: If a model cannot be asked so.
    """
    if images and not prompts:
        raise UserError("--image is what a --prompt is about: give one")
    session = open_session(source, checkpoint, overrides)
    settings = session.config.replies
    asked = [question(text, images) for text in prompts] or questions_of(session)
    chosen = models(session, compare)
    families = {name: writer(role) for name, role in chosen.items()}  # before any is written
    shown = [as_prompt(example) for example in asked]
    rows: list[dict[str, Any]] = []
    with page_of(shown, list(chosen), settings.num_answers) as page, inference(session):
        for name, role in chosen.items():
            take, start = partial(page.take, name, families[name]), time.perf_counter()
            watch = take if isinstance(page, Page) else None
            for draft in reply(session, role, asked, settings, watch):
                take(draft)
                prompt = shown[draft.prompt]
                rows.append(answer_row(name, families[name], prompt, draft, settings.seed))
            page.told(name, rows, time.perf_counter() - start)
    if output is not None:
        write_rows(rows, output)
    return rows

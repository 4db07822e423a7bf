"""Boundary predictors from the models' own thinking: written, annotated in segments, learned."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from diffdistill.boundaries import Author
from diffdistill.checkpoints import write_atomic
from diffdistill.errors import UserError
from diffdistill.family_building import resolve_model
from diffdistill.pipelines.boundary_fitting import Annotated, Fit, Fitted, fit
from diffdistill.pipelines.loading import locate
from diffdistill.pipelines.questions import Asking
from diffdistill.pipelines.writing import Writer
from diffdistill.synthesis.annotating import by_model, by_rule, given, rule_of, segments_of
from diffdistill.synthesis.building import Workshop, writer_of
from diffdistill.synthesis.cooperation import AUTHORS, Cooperation
from diffdistill.synthesis.dependence import (
    annotations_depend_on,
    revisions,
    thoughts_depend_on,
)
from diffdistill.synthesis.drafts import Draft, Plan
from diffdistill.synthesis.storing import Store
from diffdistill.tessy_settings import FitSettings
from diffdistill.types import Example

REPORT = "report.json"
"""What is known of predictors, in their folder."""
REPLY_TOKENS = 1024
"""Of an annotator's reply, at most."""
REQUEST_TOKENS = 2**15
"""Of a request to it, at most."""
ANNOTATION = 2**60
"""Keeps the random numbers of an annotator apart from those of the texts."""


def fit_predictors(
    workshop: Workshop, output: Path, say: Callable[[str], None]
) -> dict[Author, Fitted]:
    """Make both predictors in a folder, and return how good they are.

    Args:
        workshop: The models.
        output: The folder; it gets ``student``, ``teacher`` and ``report.json``, and what was
            written and annotated for them, which is not done again.
        say: Told how far it is.

    Raises:
        UserError: If nothing can be annotated.
    """
    how, seed = workshop.settings.fit, workshop.settings.seed
    segments = annotated(workshop, output, say)
    if how.segments == "both":
        both = [*segments["student"], *segments["teacher"]]
        segments = {author: list(both) for author in AUTHORS}
    base = locate(resolve_model(how.base), "")
    training = Fit(how.lr, how.batch_size, how.epochs, how.held_out, how.max_length, seed)
    found: dict[Author, Fitted] = {}
    for author in AUTHORS:
        random.Random(f"{seed}/{author}").shuffle(segments[author])
        found[author] = fit(base, segments[author], training, output / author, workshop.device)
        say(f"{author}: {found[author].accuracy:.1%} of held-out labels are right")
    report = {
        "settings": asdict(workshop.settings),
        "revisions": revisions(workshop, AUTHORS),
        "predictors": {author: fitted._asdict() for author, fitted in found.items()},
    }
    write_atomic(output / REPORT, json.dumps(report, indent=1).encode())
    return found


def annotated(
    workshop: Workshop, folder: Path, say: Callable[[str], None]
) -> dict[Author, list[Annotated]]:
    """Return segments of each author's thinking with their style.

    Args:
        workshop: The models.
        folder: Gets what they think, and what an annotator says, as it is made; what is there
            already is not made again.
        say: Told how far it is.

    Raises:
        UserError: If there is no annotator, or what it needs, or nothing comes of it.
    """
    how, seed = workshop.settings.fit, workshop.settings.seed
    if how.annotator == "given":
        if how.annotations is None:
            raise UserError("tessy.fit.annotations: annotator given needs a file of spans")
        texts = given(how.annotations)
        return {a: list(_segments(texts[a], how, f"{seed}/{a}").values()) for a in AUTHORS}
    if how.annotator == "rule":
        rule_of(how.pattern)  # before anything is written
    questions, found = workshop.questions(how.num_texts), dict[Author, list[Annotated]]()
    texts = {author: thoughts(workshop, author, questions, folder, say) for author in AUTHORS}
    annotator = _annotator(workshop) if how.annotator == "model" else None
    for author in AUTHORS:
        segments = _segments(texts[author], how, f"{seed}/{author}")
        if annotator is None:
            found[author] = by_rule(how.pattern, list(segments.values()))
        else:
            depends = annotations_depend_on(workshop, author, questions, annotator, REPLY_TOKENS)
            store = Store.open(folder / f"annotated-{author}.jsonl", depends)
            found[author] = _asked(workshop, annotator, author, segments, store, say)
        say(f"{author}: {len(found[author])} annotated segments")
    return found


def thoughts(
    workshop: Workshop,
    author: Author,
    questions: Sequence[Example],
    folder: Path,
    say: Callable[[str], None],
) -> list[Annotated]:
    """Return what a model thinks about questions, without annotations.

    Raises:
        UserError: If there are other texts in the folder, or none could be written.
    """
    path, plan = folder / f"texts-{author}.jsonl", Plan((author,), None)
    store = Store.open(path, thoughts_depend_on(workshop, author, questions))
    drafts = (
        Draft(number, example, plan, attempt=store.tries(number))
        for number, example in enumerate(questions)
        if not store.settled(number, workshop.settings.retries)
    )
    for draft in Cooperation(workshop.writers, {}, workshop.settings).run(drafts):
        if draft.failure is not None:
            store.fail(draft.number, draft.failure, draft.attempt + 1)
        else:
            store.add({"number": draft.number, "author": author, "text": draft.text})
    store.finish()
    rows = [(number, store.rows[number]["text"]) for number in sorted(store.rows)]
    texts = [Annotated(text, (), number) for number, text in rows if text.strip()]
    say(f"{author}: {len(texts)} texts of {len(questions)} questions")
    if not texts:
        raise UserError(f"no text of the {author} to annotate: {store.reasons() or 'all empty'}")
    return texts


def _segments(texts: Sequence[Annotated], how: FitSettings, seed: str) -> dict[int, Annotated]:
    """Return segments of texts by number, in random order, as many as a predictor learns from.

    Number and order of a segment are the same where there are more texts.
    """
    found: dict[int, Annotated] = {}
    for text in texts:
        generator = random.Random(f"{seed}/{text.source}")
        parts = segments_of(text, how.segment_words, how.segments_of_text, generator)
        found |= {text.source * how.segments_of_text + i: part for i, part in enumerate(parts)}
    order = sorted(found, key=lambda number: random.Random(f"{seed}/order/{number}").random())
    return {number: found[number] for number in order[: how.num_segments]}


def _asked(
    workshop: Workshop,
    annotator: Writer,
    author: Author,
    segments: Mapping[int, Annotated],
    store: Store,
    say: Callable[[str], None],
) -> list[Annotated]:
    """Return the segments of an author with the style that the annotator quotes.

    Raises:
        UserError: If none of its replies is usable.
    """
    found = by_model(
        annotator,
        segments,
        store,
        author=author,
        batch_size=workshop.settings.batch_size,
        max_tokens=REPLY_TOKENS,
        first=ANNOTATION * (1 + AUTHORS.index(author)),
    )
    unusable = len(segments) - len(found)
    told = (
        f"{author}: {unusable} of {len(segments)} replies of the annotator "
        f"({unusable / len(segments):.1%}) were no JSON array of strings"
    )
    if not found:
        raise UserError(f"{told}, so there is nothing to learn: take another tessy.fit.model")
    say(told)
    return found


def _annotator(workshop: Workshop) -> Writer:
    """Return who is asked for style, without thinking: the teacher, or a model of its own."""
    settings, asking = workshop.settings, Asking(student_thinking=False, max_prompt=REQUEST_TOKENS)
    if settings.fit.model is None:
        teacher = workshop.writers["teacher"]
        return replace(teacher, read=replace(teacher.read, asking=asking))
    return writer_of(settings.fit.model, asking, settings, workshop.device)

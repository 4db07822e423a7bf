"""Boundary predictors from the models' own thinking: written, annotated in segments, learned."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from diffdistill.boundaries import Author
from diffdistill.checkpoints import write_atomic
from diffdistill.errors import UserError
from diffdistill.family_building import asking_of, resolve_model
from diffdistill.pipelines.boundary_fitting import Annotated, Fit, Fitted, fit
from diffdistill.pipelines.loading import locate
from diffdistill.pipelines.writing import Writer
from diffdistill.synthesis.annotating import by_model, by_rule, given, segments_of
from diffdistill.synthesis.building import Workshop, writer_of
from diffdistill.synthesis.cooperation import AUTHORS, Cooperation
from diffdistill.synthesis.drafts import Draft, Plan
from diffdistill.tessy_settings import FitSettings

REPLY_TOKENS = 1024
"""Of an annotator's reply, at most."""
ANNOTATION = 2**40
"""Keeps the random numbers of an annotator apart from those of the texts."""


def fit_predictors(
    workshop: Workshop, output: Path, say: Callable[[str], None]
) -> dict[Author, Fitted]:
    """Make both predictors in a folder, and return how good they are.

    Args:
        workshop: The models.
        output: The folder; it gets ``student``, ``teacher`` and ``report.json``.
        say: Told how far it is.

    Raises:
        UserError: If nothing can be annotated.
    """
    how, seed = workshop.settings.fit, workshop.settings.seed
    segments = annotated(workshop, say)
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
        "fit": asdict(how),
        "seed": seed,
        "revisions": workshop.revisions(),
        "predictors": {author: fitted._asdict() for author, fitted in found.items()},
    }
    write_atomic(output / "report.json", json.dumps(report, indent=1).encode())
    return found


def annotated(workshop: Workshop, say: Callable[[str], None]) -> dict[Author, list[Annotated]]:
    """Return segments of each author's thinking with their style.

    Raises:
        UserError: If there is no annotator, or what it needs.
    """
    how, seed = workshop.settings.fit, workshop.settings.seed
    if how.annotator == "given":
        if how.annotations is None:
            raise UserError("tessy.fit.annotations: annotator given needs a file of spans")
        texts = given(how.annotations)
    else:
        texts = {author: thoughts(workshop, author, say) for author in AUTHORS}
    found: dict[Author, list[Annotated]] = {}
    annotator = _annotator(workshop) if how.annotator == "model" else None
    for order, author in enumerate(AUTHORS):
        segments = _segments(texts[author], how, random.Random(seed + order))
        if how.annotator == "rule":
            segments = by_rule(how.pattern, segments)
        elif annotator is not None:
            segments, unusable = by_model(
                annotator,
                segments,
                batch_size=workshop.settings.batch_size,
                max_tokens=REPLY_TOKENS,
                first=ANNOTATION * (1 + order),
            )
            say(f"{author}: {unusable} replies of the annotator were no list of quotes")
        found[author] = segments
        say(f"{author}: {len(segments)} annotated segments")
    return found


def thoughts(workshop: Workshop, author: Author, say: Callable[[str], None]) -> list[Annotated]:
    """Return what a model thinks about the first questions, without annotations."""
    plan, questions = Plan((author,), None), workshop.questions(workshop.settings.fit.num_texts)
    drafts = (Draft(number, example, plan) for number, example in enumerate(questions))
    found = Cooperation(workshop.writers, {}, workshop.settings).run(drafts)
    texts = [(draft.number, draft.text) for draft in found if draft.failure is None]
    say(f"{author}: {len(texts)} texts")
    return [Annotated(text, ()) for _, text in sorted(texts) if text.strip()]


def _segments(
    texts: list[Annotated], how: FitSettings, generator: random.Random
) -> list[Annotated]:
    """Return segments of texts, shuffled, as many as a predictor learns from."""
    size, count = how.segment_words, how.segments_of_text
    found = [part for text in texts for part in segments_of(text, size, count, generator)]
    generator.shuffle(found)
    return found[: how.num_segments]


def _annotator(workshop: Workshop) -> Writer:
    """Return who is asked for style: the teacher, or a model of its own."""
    settings = workshop.settings
    if settings.fit.model is None:
        return workshop.writers["teacher"]
    asking = replace(asking_of(workshop.config.data), student_prompt="{question}")
    return writer_of(settings.fit.model, asking, settings, workshop.device)

"""What written texts depend on, as JSON values: they may only go on where it is the same."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffdistill.boundaries import Author
from diffdistill.pipelines.writing import LocalWriter, ServedWriter, Writer
from diffdistill.provenance.hashing import tokenizer_sha256, weights_sha256
from diffdistill.synthesis.building import Workshop
from diffdistill.types import Example

LOOKED_AT = ("predictors", "fit", "teacher", "questions", "skip_questions", "max_questions")
"""Settings of which it is said otherwise what comes of them."""
UNIMPORTANT = ("batch_size", "retries", *LOOKED_AT)
"""Settings that a sample does not depend on, or not as such."""
COOPERATIVE = (
    "mode", "student_step", "teacher_step", "boundary", "context", "num_samples", "num_candidates",
)  # fmt: skip
"""Settings that what one author thinks alone does not depend on."""
REACHING = (
    "path", "tokenizer_path", "revision", "chat_template", "model", "protocol", "top_k", "timeout",
    "retries", "backoff", "concurrency", "api_key_variable", "trust_remote_code", "max_length",
)  # fmt: skip
"""Options of a model's family that say where it is, how it is asked, or what is hashed."""
ASKED = ("student_prompt", "student_thinking", "teacher_thinking")
COLUMNS = ("messages_column", "answer_column", "solution_column")


def samples_depend_on(workshop: Workshop, questions: Sequence[Example]) -> dict[str, Any]:
    """Return what the samples of a config depend on.

    Raises:
        UserError: If a model cannot be asked who it is.
    """
    data = workshop.config.data
    found = _texts(workshop, questions, UNIMPORTANT, workshop.authors)
    found |= {name: getattr(data, name) for name in COLUMNS}
    folders = workshop.predictor_folders()
    return found | {"predictors": {author: folder_hash(f) for author, f in folders.items()}}


def thoughts_depend_on(
    workshop: Workshop, author: Author, questions: Sequence[Example]
) -> dict[str, Any]:
    """Return what an author's own thinking depends on.

    Raises:
        UserError: If the model cannot be asked who it is.
    """
    return _texts(workshop, questions, (*UNIMPORTANT, *COOPERATIVE), [author])


def annotations_depend_on(
    workshop: Workshop,
    author: Author,
    questions: Sequence[Example],
    annotator: Writer,
    reply_tokens: int,
) -> dict[str, Any]:
    """Return what an annotator's replies depend on, about the thinking of an author.

    Args:
        workshop: The models.
        author: Who wrote the segments.
        questions: What about.
        annotator: Who is asked for style.
        reply_tokens: Of a reply, at most.

    Raises:
        UserError: If the model cannot be asked who it is.
    """
    fit = workshop.settings.fit
    return {
        **thoughts_depend_on(workshop, author, questions),
        "segment_words": fit.segment_words,
        "segments_of_text": fit.segments_of_text,
        "annotator": fit.annotator,
        "annotator model": _model(fit.model or workshop.settings.teacher),
        "annotator revision": revision_of(annotator),
        "reply_tokens": reply_tokens,
    }


def revisions(workshop: Workshop, authors: Collection[Author]) -> dict[str, str]:
    """Return what tells the authors' models from others."""
    return {author: revision_of(workshop.writers[author]) for author in authors}


def revision_of(writer: Writer) -> str:
    """Return a hash of what a model was read from; of a server, its model's name.

    Raises:
        UserError: If the server does not tell.
    """
    if isinstance(writer, ServedWriter):
        return writer.family.served
    assert isinstance(writer, LocalWriter), "a model at hand or behind a server"
    return folder_hash(writer.family.folder_of(writer.path))


def folder_hash(folder: Path) -> str:
    """Return a hash of the model in a folder: weights, tokenizer and config."""
    config = folder / "config.json"
    found = [
        weights_sha256(folder),
        tokenizer_sha256(folder),
        config.read_text(encoding="utf-8") if config.is_file() else None,
    ]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _texts(
    workshop: Workshop,
    questions: Sequence[Example],
    unimportant: Collection[str],
    authors: Collection[Author],
) -> dict[str, Any]:
    config, settings = workshop.config, workshop.settings
    sections = {"student": config.family, "teacher": settings.teacher}
    tokenizers = {author: workshop.writers[author].family.hashed() for author in authors}
    return {
        **{key: value for key, value in asdict(settings).items() if key not in unimportant},
        **{name: getattr(config.data, name) for name in ASKED},
        "models": {author: _model(sections[author]) for author in authors},
        "tokenizers": tokenizers,
        "revisions": revisions(workshop, authors),
        "questions": [_question(example) for example in questions],
    }


def _model(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a model's section has a say in what it writes."""
    return {key: value for key, value in section.items() if key not in REACHING}


def _question(example: Example) -> str:
    """Return a short hash of a question."""
    content = json.dumps([example.messages, example.answer])
    return hashlib.sha256(content.encode()).hexdigest()[:12]

"""Which parts of a thinking are style: said by a model that is asked, by a rule, or in a file."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffdistill.boundaries import WORDS, Author, quoted_spans
from diffdistill.data.problems import Problem, settle
from diffdistill.data.tables import read_table
from diffdistill.errors import UserError
from diffdistill.pipelines.boundary_fitting import Annotated
from diffdistill.pipelines.writing import Writer
from diffdistill.synthesis.storing import Store
from diffdistill.types import Example

REQUEST = """Below is a passage from someone thinking aloud about a problem.

List the parts of it that carry tone and not content: words that lead over to the next thought, \
fillers, hesitation, remarks to oneself. Leave out every step of reasoning, code, formula, number \
and statement about the problem.

Answer with nothing but a JSON array of strings, each copied from the passage letter by letter, in \
the order of the passage. If there is no such part, answer [].

Passage:
"""
"""What an annotator is asked; the wording is ours, the task is that of TESSY's table 2."""


def segments_of(
    text: Annotated, words: int, count: int, generator: random.Random
) -> list[Annotated]:
    """Return windows of a text at random places, no two the same; all of a short one."""
    places = [found.span() for found in WORDS.finditer(text.text)]
    starts = range(max(1, len(places) - words + 1))
    chosen = generator.sample(starts, min(count, len(starts))) if places else []
    found = []
    for first in chosen:
        start, end = places[first][0], places[min(first + words, len(places)) - 1][1]
        inside = ((max(a, start) - start, min(b, end) - start) for a, b in text.spans)
        spans = [(a, b) for a, b in inside if a < b]
        found.append(Annotated(text.text[start:end], spans, text.source))
    return found


def rule_of(pattern: str) -> re.Pattern[str]:
    """Return a regular expression of style.

    Raises:
        UserError: If it is none, or empty.
    """
    if not pattern:
        raise UserError("tessy.fit.pattern: annotator rule needs a regular expression of style")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"tessy.fit.pattern {pattern!r}: {error}") from None


def by_rule(pattern: str, segments: Sequence[Annotated]) -> list[Annotated]:
    """Return segments whose style is what a regular expression finds.

    Raises:
        UserError: If it is none, or empty.
    """
    rule = rule_of(pattern)
    return [
        segment._replace(spans=[m.span() for m in rule.finditer(segment.text) if m.group()])
        for segment in segments
    ]


def by_model(
    writer: Writer,
    segments: Mapping[int, Annotated],
    store: Store,
    *,
    author: Author,
    batch_size: int,
    max_tokens: int,
    first: int,
) -> list[Annotated]:
    """Return the segments of which a model quotes the style; what a store has is not asked.

    Args:
        writer: The model.
        segments: The segments by number.
        store: Gets what is said of each, as the annotator ``given`` reads it.
        author: Who wrote the segments.
        batch_size: How many at a time.
        max_tokens: Of a reply.
        first: Added to their numbers; with the seed that says what is sampled.
    """
    waiting = [number for number in segments if not store.settled(number)]
    for start in range(0, len(waiting), batch_size):
        batch = waiting[start : start + batch_size]
        asked = [writer.read.prompt(_request(segments[number].text)) for number in batch]
        numbers = [first + number for number in batch]
        replies = writer.go_on(asked, numbers, [max_tokens] * len(batch))
        for number, reply in zip(batch, replies, strict=True):
            quotes, text = read_quotes(reply.text), segments[number].text
            if quotes is None:
                store.fail(number, "the reply is no JSON array of strings", 1)
            else:
                row = {"text": text, "spans": quoted_spans(text, quotes), "author": author}
                store.add({"number": number, **row})
    store.finish()
    return [
        segment._replace(spans=[(start, end) for start, end in store.rows[number]["spans"]])
        for number, segment in segments.items()
        if number in store.rows
    ]


def read_quotes(reply: str) -> list[str] | None:
    """Return the strings of the JSON array in a reply, None if there is none."""
    start, end = reply.find("["), reply.rfind("]")
    try:
        quotes = json.loads(reply[start : end + 1])
    except (ValueError, RecursionError):  # the latter for brackets within brackets without end
        return None
    if not isinstance(quotes, list) or not all(isinstance(quote, str) for quote in quotes):
        return None
    return quotes


def given(path: str) -> dict[Author, list[Annotated]]:
    """Return the annotated texts of a file, by author.

    Raises:
        UserError: If it cannot be read, or a row is not of that form.
    """
    problems = list[Problem]()
    texts: dict[Author, list[Annotated]] = {"student": [], "teacher": []}
    file = Path(path).expanduser()
    for row in read_table(file, problems) if file.suffix == ".jsonl" else ():
        values: dict[str, Any] = {key: row.values.get(key) for key in ("text", "spans", "author")}
        text, spans, author = values["text"], values["spans"], values["author"]
        known = isinstance(text, str) and author in texts and isinstance(spans, list)
        if not known or not _fit(spans, len(text)):
            detail = "expected text, spans [[start, end], ...] within it, author student or teacher"
            problems.append(Problem("malformed annotation", row.origin, detail))
        else:
            number = sum(map(len, texts.values()))
            texts[author].append(Annotated(text, [(a, b) for a, b in spans], number))
    settle(problems, "error")
    if not any(texts.values()):
        raise UserError(f"tessy.fit.annotations {path}: no annotated text in it (.jsonl)")
    return texts


def _fit(spans: Any, length: int) -> bool:
    """Return whether a list is one of pairs of places in a text."""
    return all(
        isinstance(span, list)
        and len(span) == 2
        and all(isinstance(place, int) for place in span)
        and 0 <= span[0] <= span[1] <= length
        for span in spans
    )


def _request(text: str) -> Example:
    content = f"{REQUEST}{text}"
    return Example(content, messages=({"role": "user", "content": content},))

"""A sample while it is written: its text, who wrote which part, and what may go wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from diffdistill.boundaries import Author, Span
from diffdistill.tessy_settings import Mode
from diffdistill.types import Example

STEPS = 2**20
"""Keeps the random numbers of two tries apart, however many steps they take."""
TRIES = 2**10


class Plan(NamedTuple):
    """Who writes a sample.

    Attributes:
        thinkers: Who thinks, the first to begin; two take turns.
        answerer: Who writes the final answer; None ends with the thinking.
    """

    thinkers: tuple[Author, ...]
    answerer: Author | None


PLANS: dict[Mode, tuple[Plan, ...]] = {
    "tessy": (Plan(("student", "teacher"), "student"),),
    "tessy-teacher-answer": (Plan(("student", "teacher"), "teacher"),),
    "teacher-only": (Plan(("teacher",), "teacher"),),
    "teacher-think": (Plan(("teacher",), "student"),),
    "teacher-answer": (Plan(("student",), "teacher"),),
    "student-only": (Plan(("student",), "student"),),
    "mix": (Plan(("teacher",), "teacher"), Plan(("student",), "student")),
    "best-of-n": (Plan(("student",), "student"),),
}
"""The plans that a mode's samples take in turn (see docs/methods/tessy.md)."""


@dataclass
class Draft:
    """A sample as far as it is written.

    Attributes:
        number: Its number; with the seed it says what is sampled.
        example: The question.
        plan: Who writes.
        turn: Who does next.
        attempt: How many tries failed before.
        text: What has been thought.
        spans: Who wrote which part of that.
        steps: How often a model has been asked.
        thinking: Whether there is more to think.
        answer: The final answer as far as it is written.
        answered: Whether that is all of it.
        failure: Why the sample is of no use; None as long as it is.
    """

    number: int
    example: Example
    plan: Plan
    turn: Author = "student"
    attempt: int = 0
    text: str = ""
    spans: list[Span] = field(default_factory=list)
    steps: int = 0
    thinking: bool = True
    answer: str = ""
    answered: bool = False
    failure: str | None = None

    def __post_init__(self) -> None:
        """Let the first author begin."""
        self.turn = self.plan.thinkers[0]

    @property
    def cooperative(self) -> bool:
        """Whether authors take turns."""
        return len(self.plan.thinkers) > 1

    @property
    def done(self) -> bool:
        """Whether nothing more is to be written."""
        answered = self.plan.answerer is None or self.answered
        return self.failure is not None or (not self.thinking and answered)

    @property
    def draw(self) -> int:
        """The number that says what is sampled in the next step."""
        return (self.number * TRIES + self.attempt) * STEPS + self.steps

    def write(self, author: Author, text: str) -> None:
        """Add what an author thought."""
        start, self.text = len(self.text), self.text + text
        if self.spans and self.spans[-1].author == author:
            self.spans[-1] = self.spans[-1]._replace(end=len(self.text))
        elif text:
            self.spans.append(Span(author, start, len(self.text)))

    def end(self, place: int) -> None:
        """End the thinking at a character, and forget what comes after it."""
        self.text, self.thinking = self.text[:place], False
        kept = (span._replace(end=min(span.end, place)) for span in self.spans)
        self.spans = [span for span in kept if span.start < span.end]

    def change(self) -> None:
        """Let the other author go on."""
        self.turn = next(author for author in self.plan.thinkers if author != self.turn)

    def again(self) -> "Draft":
        """Return the same sample, to be tried once more with other random numbers."""
        return Draft(self.number, self.example, self.plan, attempt=self.attempt + 1)


class Written(NamedTuple):
    """A finished answer, in the student's format.

    Attributes:
        content: The text.
        spans: Who wrote which part; together they are all of it.
    """

    content: str
    spans: list[Span]


def written(draft: Draft, opens: str, closes: str) -> Written:
    """Return the answer that a draft comes to, between what opens and closes the thinking."""
    assert draft.answered, "a finished draft"
    assert draft.plan.answerer is not None, "a plan with an answer"
    parts: list[tuple[Author, str]] = [("template", opens)]
    parts += [(span.author, draft.text[span.start : span.end]) for span in draft.spans]
    parts += [("template", closes), (draft.plan.answerer, draft.answer)]
    whole = replace(draft, text="", spans=[])
    for author, text in parts:
        whole.write(author, text)
    return Written(whole.text, whole.spans)


def span_rows(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Return spans as JSON values."""
    return [span._asdict() for span in spans]

"""Questions with their reference solutions and answers, read like texts (see ``texts``)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffdistill.data.problems import Problem
from diffdistill.data.records import Bad
from diffdistill.data.settings import DataSettings
from diffdistill.data.tables import Row
from diffdistill.data.texts import messages_of, read_examples
from diffdistill.types import Example


def read_questions(
    settings: DataSettings, root: Path, problems: list[Problem]
) -> Iterator[Example]:
    """Yield questions as they are read; what is wrong is added to ``problems``.

    ``messages`` of an example are a chat up to the user's last message, which is the question.

    Raises:
        UserError: If a file cannot be read.
    """
    return read_examples(_question, settings, root, problems)


def _question(row: Row, settings: DataSettings) -> list[Example]:
    """Return the question of a row.

    Raises:
        Bad: If there is none in it, or a column that every row must have is not there.
    """
    chat = row.values.get(settings.messages_column)
    messages, written = _asked(row, settings) if chat is None else _chat(chat, row.origin)
    own = settings.solution_column
    solution = _column(row, own or "solution", "solution", required=own is not None) or written
    own = settings.answer_column
    answer = _column(row, own or "answer", "answer", required=own is not None, numbers=True)
    return [
        Example(
            prompt=messages[-1]["content"],
            messages=messages,
            origin=row.origin,
            solution=solution,
            answer=answer,
        )
    ]


def _chat(chat: Any, origin: str) -> tuple[tuple[Mapping[str, str], ...], str | None]:
    """Return a chat up to its question, and what the assistant answers to that, if anything."""
    messages = messages_of(chat, origin)
    written = None
    if messages[-1]["role"] == "assistant":
        written = messages[-1]["content"]
        messages = messages[:-1]
        if not written.strip():
            raise Bad("empty answer", origin, "the last message of the chat is empty")
    if not messages or messages[-1]["role"] != "user":
        ends = "nothing" if not messages else f"a message of {messages[-1]['role']!r}"
        raise Bad("no question", origin, f"the chat asks nothing: before the answer comes {ends}")
    if not messages[-1]["content"].strip():
        raise Bad("empty question", origin, "the last message of the user is empty")
    return messages, written


def _asked(row: Row, settings: DataSettings) -> tuple[tuple[Mapping[str, str], ...], None]:
    question = _column(row, settings.prompt_column, "question", required=False)
    if question is None:
        wanted = f"neither {settings.messages_column!r} nor {settings.prompt_column!r}"
        found = f"{sorted(row.values)}; data.prompt_column names the column with questions"
        raise Bad("missing question", row.origin, f"there is {wanted} in {found}")
    return ({"role": "user", "content": question},), None


def _column(row: Row, name: str, kind: str, *, required: bool, numbers: bool = False) -> str | None:
    """Return the text in a column; None where there is none and none is required.

    Raises:
        Bad: If it is missing, empty or no text.
    """
    value = row.values.get(name)
    if value is None:
        if not required:
            return None
        raise Bad(f"missing {kind}", row.origin, f"there is no {name!r} in {sorted(row.values)}")
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Bad(f"malformed {kind}", row.origin, f"{name!r} is not text: {str(value)[:80]}")
    if not value.strip():
        raise Bad(f"empty {kind}", row.origin, f"{name!r} is empty")
    return value

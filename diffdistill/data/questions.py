"""Questions with their reference solutions and answers, read like texts (see ``texts``)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from diffdistill.data.images import decode
from diffdistill.data.problems import Problem
from diffdistill.data.records import Bad, Picture, PictureBytes, PictureFile
from diffdistill.data.settings import DataSettings
from diffdistill.data.tables import Row
from diffdistill.data.texts import messages_of, read_examples
from diffdistill.errors import UserError
from diffdistill.types import Example


class Shown(NamedTuple):
    """A picture of a question."""

    stored: Picture

    def image(self) -> Image.Image:
        """Return the RGB image.

        Raises:
            UserError: If it cannot be read.
        """
        try:
            return decode(self.stored.read())
        except Exception as error:  # Pillow raises whatever its decoders do
            told = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"cannot read a picture: {told}") from None


def read_questions(
    settings: DataSettings, root: Path, problems: list[Problem]
) -> Iterator[Example]:
    """Yield questions as they are read; what is wrong is added to ``problems``.

    ``messages`` of an example are a chat up to the user's last message, which is the question. Of
    several skills, one question of each comes after the other.

    Raises:
        UserError: If a file cannot be read.
    """
    skills = of_skills(settings)
    if not skills:
        return read_examples(_question, settings, root, problems)

    def of(skill: str) -> Iterator[Example]:
        found = read_questions(skills[skill], root, problems)
        return (example._replace(skill=skill) for example in found)

    turns = chain.from_iterable(zip_longest(*(of(skill) for skill in skills)))
    return (example for example in turns if example is not None)


def of_skills(settings: DataSettings) -> dict[str, DataSettings]:
    """Return the settings of the data of each skill; none where there are no skills.

    Raises:
        UserError: If there is other data besides.
    """
    if not settings.skills:
        return {}
    if settings.path is not None or settings.source is not None:
        raise UserError("data.skills is instead of data.path and data.source: set it to null")
    return {
        name: replace(settings, path=path, skills=None) for name, path in settings.skills.items()
    }


def question_key(example: Example) -> str:
    """Return what tells a question from others: the chat before its answer, and its pictures."""
    messages = example.messages or ()
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return " ".join(map(str, (messages or example.text, *example.pictures)))


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
            pictures=_pictures(row, settings.image_column),
        )
    ]


def _pictures(row: Row, column: str | None) -> tuple[Shown, ...]:
    """Return the pictures in a column: files beside the row's own, or what is in the cell itself.

    A column of another name than the default must be there.

    Raises:
        Bad: If one is no picture, or is not there.
    """
    if column not in (None, DataSettings.image_column, *row.values):
        raise Bad("missing picture", row.origin, f"there is no {column!r} in {sorted(row.values)}")
    value = row.values.get(column) if column else None
    cells = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(Shown(_picture(cell, row.origin)) for cell in cells)


def _picture(cell: Any, origin: str) -> Picture:
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return PictureBytes(cell["bytes"])
    name = cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(name, str):
        raise Bad("malformed picture", origin, f"neither a path nor an image: {str(cell)[:80]}")
    file = Path(origin.rpartition(":")[0])
    path = (file.parent if file.is_file() else Path()) / name
    if not path.is_file():
        raise Bad("missing picture", origin, f"{path} does not exist")
    return PictureFile(path)


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

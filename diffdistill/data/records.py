"""What is known of an example before any image is decoded."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from diffdistill.data.problems import Problem
from diffdistill.data.videos import VideoFile

T = TypeVar("T")


class Picture(Protocol):
    """An encoded image, wherever it is kept."""

    def read(self) -> bytes:
        """Return the bytes of the image file."""
        ...


class PictureFile(NamedTuple):
    """An image in a file."""

    path: Path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def read(self) -> bytes:
        """Return the bytes of the file."""
        return self.path.read_bytes()


class PictureBytes(NamedTuple):
    """An image in a cell of a table."""

    content: bytes

    def read(self) -> bytes:
        """Return the bytes."""
        return self.content


class Record(NamedTuple):
    """One example, its images and video not yet read.

    Attributes:
        prompt: The caption, never empty.
        image: The target image, or None where there is none.
        references: The source images of an editing pair.
        detailed_prompt: A longer caption.
        origin: Where it came from ("file:line").
        video: The target video, or None where there is none.
    """

    prompt: str
    image: Picture | None = None
    references: tuple[Picture, ...] = ()
    detailed_prompt: str | None = None
    origin: str = ""
    video: VideoFile | None = None

    def pictures(self) -> tuple[Picture, ...]:
        """Return the target image, if there is one, and the references."""
        return (self.image, *self.references) if self.image else self.references


class Bad(Exception):  # noqa: N818 - carries a Problem, and never reaches the user as an exception
    """Stops reading one example."""

    def __init__(self, kind: str, origin: str, detail: str) -> None:
        """Create the error for one problem."""
        super().__init__(detail)
        self.problem = Problem(kind, origin, detail)


def caption(values: Mapping[str, Any], column: str, origin: str) -> str:
    """Return the text in ``column``, stripped.

    Raises:
        Bad: If there is none.
    """
    value = values.get(column)
    if value is None:
        raise Bad("missing caption", origin, f"there is no {column!r}")
    if not isinstance(value, str):
        raise Bad("malformed caption", origin, f"{column!r} is not text: {value!r}")
    if not value.strip():
        raise Bad("empty caption", origin, f"{column!r} is empty")
    return value.strip()


def detailed_caption(values: Mapping[str, Any], column: str | None, origin: str) -> str | None:
    """Return the longer caption: required in ``column``, or else of ``detailed_text`` if any.

    Raises:
        Bad: If the column is given and there is none.
    """
    if column is None and values.get("detailed_text") is None:
        return None
    return caption(values, column or "detailed_text", origin)


def collect(
    make: Callable[[T], Record], items: Iterable[T], problems: list[Problem]
) -> list[Record]:
    """Return the record of each item; for a ``Bad`` one, its problem is added instead."""
    records = []
    for item in items:
        try:
            records.append(make(item))
        except Bad as bad:
            problems.append(bad.problem)
    return records

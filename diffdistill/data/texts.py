"""Chats and plain texts, from files or ``datasets``, read one after the other."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from diffdistill.data.dataset import check_skipped, resolve
from diffdistill.data.hub import load_source, undecoded
from diffdistill.data.problems import Problem, settle
from diffdistill.data.records import Bad
from diffdistill.data.settings import DataSettings
from diffdistill.data.tables import TEXT_READERS, Row, read_rows
from diffdistill.errors import UserError
from diffdistill.types import Example

DOCUMENTS = (".txt", ".md", ".py")

Reading: TypeAlias = Callable[[DataSettings, Path, list[Problem]], Iterator[Example]]
"""Yields the examples of a data set as they are read, and adds what is wrong to the problems."""


class TextDataset:
    """Chats and texts in memory.

    Attributes:
        settings: How it was read.
        groups: What must be equal for texts to share a batch: nothing.
        prompts: The last question of each chat.
        problems: The bad examples that were skipped.
    """

    def __init__(
        self, examples: list[Example], settings: DataSettings, problems: list[Problem]
    ) -> None:
        """Create a data set of checked examples (see ``open_texts``)."""
        self.settings = settings
        self.problems = problems
        self.groups = [""] * len(examples)
        self.prompts = [example.prompt for example in examples]
        self._examples = examples

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        """Return the example."""
        return self._examples[index]

    def has_videos(self) -> bool:
        """Return that there are none."""
        return False

    def key(self, index: int) -> str:
        """Return a hash of what the example says."""
        example = self._examples[index]
        content = json.dumps([example.messages, example.text])
        return hashlib.sha256(content.encode()).hexdigest()


def open_texts(
    settings: DataSettings, root: Path | None = None, *, read: Reading | None = None
) -> TextDataset:
    """Read all chats and texts, and check each.

    Args:
        settings: What to read.
        root: The folder that relative paths start from; None is the current one.
        read: Yields the examples; None is ``read_texts``.

    Raises:
        UserError: If nothing can be read, or an example is bad and not to be skipped.
    """
    problems = list[Problem]()
    examples = list((read or read_texts)(settings, root or Path(), problems))
    settle(problems, settings.on_error)
    if not examples:
        raise UserError(f"there is no usable example in {settings.path or settings.source}")
    return TextDataset(examples, settings, problems)


def read_texts(settings: DataSettings, root: Path, problems: list[Problem]) -> Iterator[Example]:
    """Yield chats and texts as they are read; what is wrong is added to ``problems``.

    Raises:
        UserError: If a file cannot be read.
    """
    return read_examples(_examples, settings, root, problems)


def read_examples(
    make: Callable[[Row, DataSettings], list[Example]],
    settings: DataSettings,
    root: Path,
    problems: list[Problem],
) -> Iterator[Example]:
    """Yield what ``make`` returns of each row, unless it raises ``Bad``.

    Files are read in the order of their names, and none as a whole but ``.json`` files and single
    documents.

    Raises:
        UserError: If a file cannot be read.
    """
    _check(settings)
    count = 0
    for row in _rows(settings, root, problems):
        try:
            examples = make(row, settings)
        except Bad as bad:
            problems.append(bad.problem)
            continue
        count += 1
        if count > settings.skip_examples:
            yield from examples
        if count - settings.skip_examples == settings.max_examples:
            return


def _check(settings: DataSettings) -> None:
    if (settings.path is None) == (settings.source is None):
        raise UserError("set one of data.path and data.source")
    for name in ("batch_size", "repeats", "max_examples", "shuffle_buffer"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"data.{name} must be at least 1, not {value}")
    check_skipped(settings)
    if settings.prompt_dropout:
        raise UserError("data.prompt_dropout is for images: texts have no empty prompt")


def _rows(settings: DataSettings, root: Path, problems: list[Problem]) -> Iterator[Row]:
    if settings.path is None:
        table = undecoded(load_source(settings, root, streaming=settings.streaming))
        try:
            for number, values in enumerate(table, start=1):
                yield Row(values, f"{settings.source}:{number}")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read data.source {settings.source!r}: {error}") from error
        return
    for file in _files(resolve(settings.path, root)):
        if file.suffix in TEXT_READERS:
            yield from read_rows(file, problems)
        else:
            yield Row({settings.prompt_column: _document(file)}, str(file))


def _files(path: Path) -> list[Path]:
    known = (*TEXT_READERS, *DOCUMENTS)
    if path.is_dir():
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix in known and not _is_aside(file, path)
        ]
        if not found:
            raise UserError(f"data.path {path} has no files of texts: {', '.join(known)}")
        return found
    if not path.exists():
        raise UserError(f"data.path {path} does not exist")
    if path.suffix not in known:
        raise UserError(f"data.path {path} must be a folder or one of {', '.join(known)}")
    return [path]


def _is_aside(file: Path, folder: Path) -> bool:
    """Return whether a file of a folder is hidden, or the record of another.

    Written data (``diffdistill tessy write``) has two beside it: ``-about.json`` and, of samples
    that failed, ``-failed.jsonl``.
    """
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return True
    name = file.name.removesuffix("-about.json").removesuffix("-failed.jsonl")
    written = name != file.name and file.with_name(f"{name}.jsonl").exists()
    return written or file.name.endswith("provenance.json")


def _document(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _examples(row: Row, settings: DataSettings) -> list[Example]:
    """Return the example of a row; of a chat with turns ``each``, one for each answer.

    Raises:
        Bad: If there is none in it.
    """
    chat = row.values.get(settings.messages_column)
    if chat is None:
        return [_text(row, settings)]
    messages = messages_of(chat, row.origin)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Bad("no answer", row.origin, "the chat has no message of the assistant")
    learned = answers[-1:] if settings.turns == "last" else answers
    for index in learned:
        if not messages[index]["content"].strip():
            raise Bad("empty answer", row.origin, f"message {index + 1} of the chat is empty")
    ends = answers if settings.turns == "each" else answers[-1:]
    return [_chat(messages[: end + 1], row.origin) for end in ends]


def _chat(messages: tuple[Mapping[str, str], ...], origin: str) -> Example:
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return Example(questions[-1] if questions else "", messages=messages, origin=origin)


def messages_of(chat: Any, origin: str) -> tuple[Mapping[str, str], ...]:
    """Return the messages of a chat with role and content alone.

    Raises:
        Bad: If it is none.
    """
    if not isinstance(chat, list) or not chat:
        raise Bad("malformed chat", origin, "not a list of messages")
    for number, message in enumerate(chat, start=1):
        parts = message if isinstance(message, dict) else {}
        if not all(isinstance(parts.get(name), str) for name in ("role", "content")):
            raise Bad("malformed chat", origin, f"message {number} has no role and content as text")
    return tuple({"role": m["role"], "content": m["content"]} for m in chat)


def _text(row: Row, settings: DataSettings) -> Example:
    column = settings.prompt_column
    value = row.values.get(column)
    if value is None:
        wanted = f"neither {settings.messages_column!r} nor {column!r}"
        raise Bad("missing text", row.origin, f"there is {wanted} in {sorted(row.values)}")
    if not isinstance(value, str):
        raise Bad("malformed text", row.origin, f"{column!r} is not text: {str(value)[:80]}")
    if not value.strip():
        raise Bad("empty text", row.origin, f"{column!r} is empty")
    return Example("", text=value, origin=row.origin)

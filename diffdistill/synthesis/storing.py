"""Samples on disk: a JSON lines file that is written as samples are done, and resumed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffdistill.checkpoints import write_atomic
from diffdistill.errors import UserError


@dataclass
class Store:
    """The samples that are there, and those that failed for good.

    Attributes:
        path: The file of samples; beside it are ``-failed.jsonl`` and ``-about.json``.
        rows: The samples by number.
        failed: Why samples failed, by number.
    """

    path: Path
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any]) -> "Store":
        """Return what is there already of samples that are written so.

        Args:
            path: The file.
            about: What all of it depends on, as JSON values.

        Raises:
            UserError: If there are samples of another kind.
        """
        store = cls(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(about, indent=1)
        if store.about.exists():
            before = json.loads(store.about.read_text(encoding="utf-8"))
            differing = sorted(key for key in about if before.get(key) != about[key])
            if differing:
                raise UserError(
                    f"{path} holds samples that were written otherwise ({', '.join(differing)}): "
                    "take another --output, or remove it"
                )
        elif path.exists():
            raise UserError(f"{path} is there and is not of tessy write: take another --output")
        write_atomic(store.about, content.encode())
        store.rows, store.failed = _read(path), _read(store.failures)
        return store

    @property
    def about(self) -> Path:
        """The file that says what all samples depend on."""
        return self.path.with_name(f"{self.path.stem}-about.json")

    @property
    def failures(self) -> Path:
        """The file of samples that failed."""
        return self.path.with_name(f"{self.path.stem}-failed.jsonl")

    def has(self, number: int) -> bool:
        """Return whether a sample is settled."""
        return number in self.rows or number in self.failed

    def add(self, row: dict[str, Any]) -> None:
        """Keep a sample."""
        self.rows[row["number"]] = row
        _append(self.path, row)

    def fail(self, number: int, why: str) -> None:
        """Keep that a sample failed."""
        self.failed[number] = {"number": number, "why": why}
        _append(self.failures, self.failed[number])

    def finish(self) -> None:
        """Write all samples once more, in the order of their numbers."""
        ordered = [self.rows[number] for number in sorted(self.rows)]
        write_atomic(self.path, "".join(map(_line, ordered)).encode())


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of a file by number, and mend its end if it was being written."""
    if not path.exists():
        return {}
    rows = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # blank, or cut off
        rows[int(row["number"])] = row
    if lines[-1]:
        write_atomic(path, "".join(map(_line, rows.values())).encode())
    return rows

"""Samples on disk: a JSON lines file that is written as samples are done, and resumed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffdistill.authorship import about_file
from diffdistill.checkpoints import write_atomic
from diffdistill.errors import UserError


@dataclass
class Store:
    """The samples that are there, and those that failed.

    Attributes:
        path: The file of samples; beside it are ``-failed.jsonl`` and ``-about.json``.
        depends: What all of it depends on, as JSON values; ``questions`` may be more than before.
        rows: The samples by number.
        failed: Why samples failed, and after how many tries, by number.
    """

    path: Path
    depends: Mapping[str, Any]
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    _told: bool = False

    @classmethod
    def open(cls, path: Path, depends: Mapping[str, Any]) -> "Store":
        """Return what is there already of samples that are written so; nothing is written yet.

        Raises:
            UserError: If there are samples of another kind, or something else.
        """
        store = cls(path, json.loads(json.dumps(depends)))
        strange = [file for file in (path, store.failures) if _holds(file)]
        if strange and not store.about.exists():
            raise UserError(f"{strange[0]} is there and is not of tessy: take another --output")
        store.rows, failed = _read(path), _read(store.failures)
        store.failed = {number: row for number, row in failed.items() if number not in store.rows}
        if store.rows or store.failed:
            store._check()
        return store

    @property
    def about(self) -> Path:
        """The file that says what all samples depend on."""
        return about_file(self.path)

    @property
    def failures(self) -> Path:
        """The file of samples that failed."""
        return self.path.with_name(f"{self.path.stem}-failed.jsonl")

    def _check(self) -> None:
        before: dict[str, Any] = json.loads(self.about.read_text(encoding="utf-8"))
        keys = sorted({*before, *self.depends})
        differing = [key for key in keys if not _alike(key, before.get(key), self.depends.get(key))]
        if differing:
            files = [file for file in (self.path, self.failures, self.about) if file.exists()]
            raise UserError(
                f"{self.path} holds what was written otherwise ({', '.join(differing)}): take "
                f"another --output, or remove {', '.join(map(str, files))}"
            )

    def tries(self, number: int) -> int:
        """Return how many tries of a sample failed, where all did."""
        return int(self.failed[number]["tries"]) if number in self.failed else 0

    def settled(self, number: int, retries: int = 0) -> bool:
        """Return whether a sample is there, or failed in so many further tries."""
        return number in self.rows or self.tries(number) > retries

    def add(self, row: dict[str, Any]) -> None:
        """Keep a sample."""
        self.rows[row["number"]] = row
        self.failed.pop(row["number"], None)
        self._append(self.path, row)

    def fail(self, number: int, why: str, tries: int) -> None:
        """Keep that a sample failed."""
        self.failed[number] = {"number": number, "why": why, "tries": tries}
        self._append(self.failures, self.failed[number])

    def reasons(self) -> str:
        """Return why samples failed."""
        return "; ".join(sorted({row["why"] for row in self.failed.values()}))

    def finish(self) -> None:
        """Write all samples once more, in the order of their numbers."""
        for path, rows in ((self.path, self.rows), (self.failures, self.failed)):
            if rows:
                write_atomic(path, "".join(_line(rows[number]) for number in sorted(rows)).encode())
            else:
                path.unlink(missing_ok=True)

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        if not self._told:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.about, json.dumps(self.depends, indent=1).encode())
            self._told = True
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def _alike(key: str, before: Any, now: Any) -> bool:
    """Return whether samples that depended on one thing may go on with another."""
    if key == "questions" and isinstance(before, list) and isinstance(now, list):
        return now[: len(before)] == before
    return bool(before == now)


def _holds(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of a file by number, and mend its end if it was being written.

    Raises:
        UserError: If it has others.
    """
    if not path.exists():
        return {}
    rows = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # blank, or cut off
        if not isinstance(row, dict) or not isinstance(row.get("number"), int):
            raise UserError(f"{path} has rows that are not of tessy: take another --output")
        rows[row["number"]] = row
    if lines[-1]:
        write_atomic(path, "".join(map(_line, rows.values())).encode())
    return rows

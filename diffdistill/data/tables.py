"""Rows of metadata files, each with the place it came from."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from diffdistill.data.problems import Problem
from diffdistill.errors import MissingExtra, UserError


class Row(NamedTuple):
    """One row: its values by column, and "file:line"."""

    values: Mapping[str, Any]
    origin: str


def read_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Yield each line that is not blank, and its origin."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield line, f"{path}:{number}"


def read_jsonl(path: Path, problems: list[Problem]) -> Iterator[Row]:
    """Yield the objects of a JSON lines file; a malformed line is a problem."""
    for line, origin in read_lines(path):
        try:
            values = json.loads(line)
        except ValueError as error:
            problems.append(Problem("malformed line", origin, str(error)))
            continue
        if isinstance(values, dict):
            yield Row(values, origin)
        else:
            problems.append(Problem("malformed line", origin, "not a JSON object"))


def read_csv(path: Path, problems: list[Problem]) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header; empty cells are left out."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            origin = f"{path}:{reader.line_num}"
            if None in row:
                problems.append(Problem("malformed line", origin, "more cells than the header"))
                continue
            yield Row({column: cell for column, cell in row.items() if cell}, origin)


def read_parquet(path: Path, problems: list[Problem]) -> Iterator[Row]:
    """Yield the rows of a parquet file; their numbers count from 1."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise MissingExtra("pyarrow", f"reading {path}") from error
    with parquet.ParquetFile(path) as file:
        rows = (values for part in file.iter_batches() for values in part.to_pylist())
        for number, values in enumerate(rows, start=1):
            yield Row(values, f"{path}:{number}")


def read_json(path: Path, problems: list[Problem]) -> Iterator[Row]:
    """Yield the objects of a JSON file that holds a list; their numbers count from 1."""
    items = json.loads(path.read_bytes())
    if not isinstance(items, list):
        raise ValueError("not a list of objects")
    for number, values in enumerate(items, start=1):
        if isinstance(values, dict):
            yield Row(values, f"{path}:{number}")
        else:
            problems.append(Problem("malformed row", f"{path}:{number}", "not a JSON object"))


READERS: dict[str, Callable[[Path, list[Problem]], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


TEXT_READERS = {".json": read_json, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_table(path: Path, problems: list[Problem]) -> list[Row]:
    """Return the rows of a ``.jsonl``, ``.csv`` or ``.parquet`` file.

    Raises:
        UserError: If the file as a whole cannot be read.
    """
    return list(_explained(READERS[path.suffix], path, problems))


def read_rows(path: Path, problems: list[Problem]) -> Iterator[Row]:
    """Yield the rows of a file of texts (see ``TEXT_READERS``) as they are read.

    Raises:
        UserError: If the file cannot be read on.
    """
    return _explained(TEXT_READERS[path.suffix], path, problems)


def _explained(
    reader: Callable[[Path, list[Problem]], Iterator[Row]], path: Path, problems: list[Problem]
) -> Iterator[Row]:
    try:
        yield from reader(path, problems)
    except MissingExtra:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error

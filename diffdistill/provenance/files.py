"""Records as files: beside weights, in a run's folder, or on their own."""

import json
from pathlib import Path
from typing import Any

from diffdistill.errors import UserError

RECORD = "provenance.json"
CARD = "README.md"
SCHEMA_VERSION = 1


def dumped(record: dict[str, Any]) -> str:
    """Return a record as text, the same for the same record."""
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record in a folder; None where there is none.

    Raises:
        UserError: If it is damaged, or of a later version than this one.
    """
    file = folder / RECORD
    return _read(file) if file.is_file() else None


def past_record(file: Path) -> dict[str, Any] | None:
    """Return the record in a model's file; None where there is none, or it is another tool's.

    Raises:
        UserError: If it is damaged, or of a later version than this one.
    """
    try:
        found = json.loads(file.read_text()) if file.is_file() else None
    except ValueError:
        return _read(file)
    ours = isinstance(found, dict) and {"schema_version", "student"} <= found.keys()
    return _read(file) if ours else None


def open_record(path: Path) -> dict[str, Any]:
    """Return the record of a run, a checkpoint, an export, or in a file.

    Raises:
        UserError: If there is none.
    """
    beside = beside_file(path)[0] if path.suffix == ".safetensors" else path / RECORD
    file = path if path.is_file() and path.suffix == ".json" else beside
    if not file.is_file():
        raise UserError(f"{path} has no record: there is no {file}")
    return _read(file)


def beside_file(file: Path) -> tuple[Path, Path]:
    """Return where record and card of a single file are."""
    return file.with_name(f"{file.stem}.{RECORD}"), file.with_name(f"{file.stem}.{CARD}")


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"damaged record {file}: {error}") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{file} is no record: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise UserError(f"{file}: a record of version {version}, and this reads {SCHEMA_VERSION}")
    found: dict[str, Any] = record
    return found

"""Hashes of files, each computed once: remembered by path, size and time of the last change."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

TABLES = (".csv", ".json", ".jsonl", ".parquet", ".txt")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file.

    The hub stores large files under their SHA-256, so of those in its cache nothing is read.
    """
    real = file.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    key = f"{real}:{stat.st_size}:{stat.st_mtime_ns}"
    known = _read_memory()
    if key not in known:
        with real.open("rb") as content:
            known[key] = hashlib.file_digest(content, "sha256").hexdigest()
        _write_memory(known)
    return known[key]


def weights_sha256(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file by its name: of a folder, or of the file itself."""
    if path.is_file():
        return {path.name: file_sha256(path)}
    files = sorted(path.rglob("*.safetensors"))
    return {str(file.relative_to(path)): file_sha256(file) for file in files}


def tokenizer_sha256(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a tokenizer in a folder or its folder ``tokenizer``."""
    places = (folder, folder / "tokenizer") if folder.is_dir() else ()
    files = (place / name for place in places for name in TOKENIZER)
    return {str(f.relative_to(folder)): file_sha256(f) for f in files if f.is_file()}


def data_sha256(path: Path) -> str:
    """Return a SHA-256 of a data file; of a folder, that of its listing.

    A line of the listing is a file's name and its size, or for tables and texts the SHA-256 of
    what is in it: a folder of videos is not read.
    """
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in _files_in(path):
        what = file_sha256(file) if file.suffix in TABLES else str(file.stat().st_size)
        digest.update(f"{file.relative_to(path)} {what}\n".encode())
    return digest.hexdigest()


def _files_in(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts):
            yield file


def memory_file() -> Path:
    """Return where hashes are remembered, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(cache) if cache else Path.home() / ".cache") / "diffdistill" / "sha256.json"


def _read_memory() -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads(memory_file().read_text())
    except (OSError, ValueError):
        return {}
    return known


def _write_memory(known: dict[str, str]) -> None:
    """Write the memory; where that cannot be, hashes are computed anew the next time."""
    file = memory_file()
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(known, indent=0))
        os.replace(aside, file)
    except OSError:
        aside.unlink(missing_ok=True)

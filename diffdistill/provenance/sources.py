"""What a checkpoint, file or hub id says about itself, as one entry of a record."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from diffdistill.provenance.files import RECORD, beside_file, past_record
from diffdistill.provenance.hashing import (
    data_sha256,
    file_sha256,
    tokenizer_sha256,
    weights_sha256,
)

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def describe_model(
    path: str, local: Path | None, revision: str | None, *, hashed: bool
) -> dict[str, Any]:
    """Return the entry of a model: what it is called, where it is from, its hashes and its past.

    Args:
        path: As in the config: a folder or file, a hub id, or "bundled:NAME".
        local: Where it is on this machine; None where that is unknown.
        revision: Branch, tag or commit that was asked for.
        hashed: Whether to hash its files.
    """
    name, source = named(path)
    entry: dict[str, Any] = {"id": name, "source": source, "revision": revision}
    if local is None:
        return entry | {"license": None}
    entry["revision"] = _commit_of(local) or revision
    if hashed:
        entry["weights_sha256"] = weights_sha256(local)
        entry["tokenizer_sha256"] = tokenizer_sha256(local)
    folder = local if local.is_dir() else local.parent
    if folder.name == "transformer":  # a part of a pipeline, which has card and record
        folder = folder.parent
    entry["license"] = _license(folder)
    if (past := _past(local, folder)) is not None:
        entry["upstream"] = past
        made = past.get("result", {}).get("weights_sha256")
        if hashed and made:
            found = set(entry["weights_sha256"].values())
            entry["as_recorded"] = found <= set(made.values())
    return entry


def _past(local: Path, folder: Path) -> dict[str, Any] | None:
    """Return the record of a model: beside its file, or in its folder; None where there is none."""
    beside = past_record(beside_file(local)[0]) if local.is_file() else None
    return past_record(folder / RECORD) if beside is None else beside


def named(path: str) -> tuple[str, str]:
    """Return what a path is called in a record, and what it is: hub, bundled or local.

    Of a local one only the last name is told: where it lay is nobody's business.
    """
    if path.startswith("bundled:"):
        return path, "bundled"
    if HUB_ID.fullmatch(path) and not Path(path).expanduser().exists():
        return path, "hub"
    return Path(path).expanduser().resolve().name, "local"


def local_copy(path: str, revision: str | None) -> Path | None:
    """Return where a path or hub id is on this machine, without asking the hub."""
    found = Path(path).expanduser()
    if found.exists():
        return found
    if not HUB_ID.fullmatch(path):
        return None
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def describe_file(path: str, local: Path, *, hashed: bool) -> dict[str, Any]:
    """Return the entry of data in a file or folder, or bundled."""
    name, kind = named(path)
    source = "bundled" if kind == "bundled" else "local"
    entry: dict[str, Any] = {"id": name, "source": source, "revision": None}
    if hashed and local.exists():
        entry["sha256"] = data_sha256(local)
    return entry


def describe_source(
    source: str, split: str, files: Sequence[str] | None, *, hashed: bool
) -> dict[str, Any]:
    """Return the entry of what the library ``datasets`` reads: a hub id, a folder, or a builder.

    The files that a builder is given are told by their last name, each with a hash.
    """
    name, kind = named(source) if "/" in source else (source, "datasets")
    if kind == "local":
        return {**describe_file(source, Path(source).expanduser(), hashed=hashed), "split": split}
    revision = _data_commit(source) if kind == "hub" else None
    entry: dict[str, Any] = {"id": name, "source": kind, "revision": revision, "split": split}
    places = [Path(file).expanduser() for file in files or ()]
    if hashed and places:
        entry["files"] = {p.name: data_sha256(p) if p.exists() else None for p in places}
    return entry


def _data_commit(source: str) -> str | None:
    """Return the commit of a hub data set that is in the cache."""
    folder = repo_folder_name(repo_id=source, repo_type="dataset")
    file = Path(constants.HF_HUB_CACHE) / folder / "refs" / "main"
    return file.read_text().strip() if file.is_file() else None


def _commit_of(folder: Path) -> str | None:
    """Return the commit of a folder in the hub's cache: ``snapshots/COMMIT``."""
    parts = folder.absolute().parts
    if "snapshots" not in parts:
        return None
    commit = parts[len(parts) - parts[::-1].index("snapshots") :][:1]
    return commit[0] if commit and re.fullmatch(r"[0-9a-f]{40}", commit[0]) else None


def _license(folder: Path) -> dict[str, Any] | None:
    """Return what a model's card and license file say: ids, and a hash of the text."""
    card = _card(folder)
    found: dict[str, Any] = {}
    for key in ("license", "license_name", "license_link"):
        if isinstance(card.get(key), str):
            found[key] = card[key]
    for file in sorted(file for file in folder.glob("LICENSE*") if file.is_file()):
        found["text_sha256"] = file_sha256(file)
    return found or None


def _card(folder: Path) -> Mapping[str, Any]:
    """Return the head of a model card; nothing where there is none, or it cannot be read."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        card: Mapping[str, Any] = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, OSError, yaml.YAMLError):
        return {}
    return card

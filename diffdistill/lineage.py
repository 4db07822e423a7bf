"""The record of a run: what its config and its built parts tell of where the result comes from."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffdistill import catalog
from diffdistill.origins import data_entries, judge_entry, model_entry
from diffdistill.provenance.card import model_card
from diffdistill.provenance.files import CARD, RECORD, SCHEMA_VERSION, dumped, read_record
from diffdistill.provenance.terms import check_stated, enforce, judged
from diffdistill.runs import versions
from diffdistill.session import Session

LIBRARIES = {"pictures": "diffusers", "texts": "transformers", "answers": "transformers"}
PLAIN = re.compile(r"[\w.:+-][\w.:+/-]{0,39}")
"""What an option may look like to be recorded; a prompt or a place of this machine does not."""


def record_of(
    session: Session, *, created: str | None = None, hashed: bool = True
) -> dict[str, Any]:
    """Return the record of a run, without what a checkpoint or an export adds.

    Args:
        session: The built run.
        created: When it was made, in UTC; None is now.
        hashed: Whether to hash files; without, it says enough about obligations.

    Raises:
        UserError: If the config states terms of no role, or that are not in the table.
    """
    config, student = session.config, session.roles["student"]
    check_stated(config.provenance, list(config.roles))
    others = [role for role in session.roles.by_name.values() if role is not student]
    taught = [role for role in others if role.name != "average"]
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": created or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tool": {"name": "diffdistill", "version": versions()["diffdistill"], "git": _commit()},
        "step": None,
        "student": model_entry(session, student, hashed=hashed),
        "teachers": [model_entry(session, role, hashed=hashed) for role in taught],
        "judges": [judge_entry(reward, hashed=hashed) for reward in config.rewards],
        "data": data_entries(session, hashed=hashed),
        "method": _method(session),
        "environment": _environment(session),
        "result": {
            "name": config.provenance.name or "student",
            "license": config.provenance.license,
            "library": LIBRARIES[type(session.method).kind()],
            "adapter": student.adapter is not None,
        },
    }
    return record | judged(record, config.provenance)


def check_provenance(session: Session) -> str | None:
    """Return what to say about the open obligations of a run; None where there are none.

    Raises:
        UserError: If there are, and the config's policy is ``error``.
    """
    return enforce(record_of(session, hashed=False), session.config.provenance)


def run_record(session: Session, output: Path) -> dict[str, Any]:
    """Return the record of a run in its folder; one that goes on keeps the time of its start."""
    before = read_record(output)
    return record_of(session, created=None if before is None else before["created"])


def at_step(record: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return the record of a run after so many steps."""
    return {**record, "step": step}


def papers(record: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files that tell of a record, by name: the record, and a model card."""
    return {RECORD: dumped(dict(record)).encode(), CARD: model_card(record).encode()}


def exported(
    record: Mapping[str, Any],
    session: Session,
    name: str,
    *,
    adapter: bool,
    library: str,
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """Return the record of an export; obligations are judged anew, by its name.

    Args:
        record: That of the checkpoint.
        session: The run.
        name: Of the folder or file; a name in the config goes before it.
        adapter: Whether it needs the base to work.
        library: What opens it.
        weights: SHA-256 of the weight files by name.
    """
    chosen = session.config.provenance
    made = {
        "name": chosen.name or name,
        "license": chosen.license,
        "library": library,
        "adapter": adapter,
        "weights_sha256": dict(weights),
    }
    new = {**record, "result": made}
    return new | judged(new, chosen, name)


def _method(session: Session) -> dict[str, Any]:
    config = session.config
    options = {k: v for k, v in config.method.items() if k != "name" and _is_plain(v)}
    canonical = json.dumps(config.to_dict(), sort_keys=True)
    return {
        "name": config.method["name"],
        "options": options,
        "config_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
    }


def _is_plain(value: Any) -> bool:
    """Return whether an option is a number, a choice, or a few of them; no text is."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, str):
        return PLAIN.fullmatch(value) is not None
    return value is None or isinstance(value, (bool, int, float))


def _environment(session: Session) -> dict[str, Any]:
    return {
        "packages": versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": session.device.type,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _commit() -> str | None:
    """Return the commit of a checkout of this package; None where it is installed otherwise."""
    folder = Path(catalog.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

"""The record of a run: what its config and its built parts tell of where the result comes from."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from diffdistill import catalog
from diffdistill.authorship import AUTHOR_ROLES, data_authors, writing_models
from diffdistill.config import RunConfig
from diffdistill.origins import data_entries, judge_entries, model_entry, place_entry
from diffdistill.provenance.card import model_card
from diffdistill.provenance.files import CARD, RECORD, SCHEMA_VERSION, dumped, read_record
from diffdistill.provenance.hashing import weights_sha256
from diffdistill.provenance.settings import ProvenanceSettings
from diffdistill.provenance.terms import MADE, SELF, check_stated, enforce, judged
from diffdistill.runs import versions
from diffdistill.session import Session
from diffdistill.tessy_settings import TessySettings

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
    others = [role for role in session.roles.by_name.values() if role is not student]
    taught = [role for role in others if role.name != "average"]
    begun = model_entry(session, student, hashed=hashed)
    wrote = [_as_itself(entry, begun) for entry in data_authors(config, hashed=hashed)]
    teachers = [model_entry(session, role, hashed=hashed) for role in taught]
    judges = [entry for reward in config.rewards for entry in judge_entries(reward, hashed=hashed)]
    models = {"student": begun, "teachers": [*teachers, *wrote], "judges": judges}
    return _assembled(
        models,
        config.provenance,
        created=created,
        named=_named_in(config),
        data=data_entries(config.data, hashed=hashed),
        method=_method(config, config.method),
        environment=_environment(session.device),
        result={
            "name": config.provenance.name or "student",
            "license": config.provenance.license,
            "library": LIBRARIES[type(session.method).kind()],
            "adapter": student.adapter is not None,
        },
    )


def written_record(
    config: RunConfig, settings: TessySettings, output: Path, device: torch.device
) -> dict[str, Any]:
    """Return the record of data that models wrote by a section ``tessy``.

    Args:
        config: The config.
        settings: Its section ``tessy``; ``fit`` is how the predictors were made.
        output: The data.
        device: Where it was written.

    Raises:
        UserError: If the config states terms of no role, or that are not in the table.
    """
    asked = config.data
    if settings.questions is not None:
        asked = replace(asked, path=settings.questions, source=None, skills=None)
    return _assembled(
        writing_models(config, settings, hashed=True, ask=True),
        config.provenance,
        named=_named_in(config),
        data=data_entries(asked, hashed=True),
        method=_method(config, {"name": "tessy", "mode": settings.mode}),
        environment=_environment(device),
        result={
            "name": output.name,
            "license": config.provenance.license,
            "library": "datasets",
            "adapter": False,
        },
    )


def converted_record(
    model: str, output: Path, options: Mapping[str, str | None], revision: str | None
) -> dict[str, Any]:
    """Return the record of a converted model, which is one step away from what it was.

    Args:
        model: A folder, a hub id, or bundled:NAME.
        output: The folder of the converted model.
        options: How it was converted.
        revision: Branch, tag or commit on the hub.
    """
    source = place_entry(model, revision, "student", hashed=True)
    return _assembled(
        {"student": {**source, "route": "init"}, "teachers": [], "judges": []},
        ProvenanceSettings(),
        data=[],
        method={"name": "convert", "options": dict(options), "config_sha256": _sha256(options)},
        environment=_environment(torch.device("cpu")),
        result={
            "name": output.name,
            "license": None,
            "library": "transformers",
            "adapter": False,
            "weights_sha256": weights_sha256(output),
        },
    )


def _assembled(
    models: Mapping[str, Any],
    settings: ProvenanceSettings,
    *,
    created: str | None = None,
    named: Sequence[str] = (),
    **parts: Any,
) -> dict[str, Any]:
    """Return a record of its entries, with the terms that are stated and what they ask for.

    Args:
        models: The student, teachers and judges.
        settings: What the config says about them.
        created: When it was made, in UTC; None is now.
        named: Roles and rewards of the config, of which terms may be stated.
        parts: Data, method, environment and result.
    """
    entries = [models["student"], *models["teachers"], *models["judges"]]
    check_stated(settings, [*named, *map(_stated_as, entries)])
    for entry in entries:
        if "of" not in entry and (stated := settings.terms.get(_stated_as(entry))):
            entry["terms_stated"] = stated
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": created or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tool": {"name": "diffdistill", "version": versions()["diffdistill"], "git": _commit()},
        "step": None,
        **models,
        **parts,
    }
    return record | judged(record, settings)


def _named_in(config: RunConfig) -> list[str]:
    """Return the names by which a config may state the terms of a model."""
    rewards = [reward["name"].rpartition("/")[2] for reward in config.rewards]
    return [*config.roles, *rewards, *([] if config.tessy is None else AUTHOR_ROLES)]


def _stated_as(entry: Mapping[str, Any]) -> str:
    """Return the name by which a config states the terms of a model: of its reward, or its role."""
    name: str = entry.get("reward", entry["role"])
    return name


def _as_itself(entry: dict[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a model that wrote data, with the route ``copy`` if it is the student."""
    keys = ("id", "source", "revision")
    same = all(entry.get(key) == student.get(key) for key in keys)
    hashes = [model.get("weights_sha256") for model in (entry, student)]
    known = hashes[0] == hashes[1] if all(hashes) else entry["source"] in ("hub", "bundled")
    return {**entry, "route": "copy"} if same and known else entry


def check_provenance(session: Session, before: Mapping[str, Any] | None = None) -> str | None:
    """Return what to say about the open obligations of a run; None where there are none.

    Args:
        session: The built run.
        before: The record of the run that goes on.

    Raises:
        UserError: If there are, and the config's policy is ``error``.
    """
    settings = session.config.provenance
    record = record_of(session, hashed=False)
    return enforce(_after(record, [before] if before else [], settings), settings)


def run_record(session: Session, output: Path, resumed: Path | None = None) -> dict[str, Any]:
    """Return the record of a run in its folder; one that goes on keeps the time of its start.

    Where its models or its data were others before, those are told too, as ``earlier``.

    Args:
        session: The built run.
        output: Its folder.
        resumed: The checkpoint that it goes on from; None where it begins.
    """
    before = read_record(output)
    record = record_of(session, created=None if before is None else before["created"])
    found = [] if resumed is None else [read_record(resumed), before]
    return _after(record, [past for past in found if past], session.config.provenance)


def _after(
    record: dict[str, Any], past: Sequence[Mapping[str, Any]], settings: ProvenanceSettings
) -> dict[str, Any]:
    """Return a record with what is in past ones of the run and not in it."""
    now, left = _entries(record), list[dict[str, Any]]()
    for entry in (entry for before in past for entry in _entries(before)):
        own = entry["source"] == MADE or entry.get("route") in SELF
        if not own and not any(_is_same(entry, other) for other in [*now, *left]):
            left.append(entry)
    if not left:
        return record
    found = {**record, "earlier": left}
    return found | judged(found, settings)


def _entries(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of all models of a record, and of its data with the role ``data``."""
    data = [{"role": "data", **entry} for entry in record["data"]]
    models = [record["student"], *record["teachers"], *record["judges"]]
    return [*models, *data, *record.get("earlier", [])]


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two entries are of the same model or data, as far as both have hashes."""
    named = all(one.get(k) == other.get(k) for k in ("id", "source", "revision", "host", "split"))
    hashes = ((one.get(k), other.get(k)) for k in ("weights_sha256", "sha256", "files"))
    return named and all(a == b for a, b in hashes if a and b)


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


def _method(config: RunConfig, method: Mapping[str, Any]) -> dict[str, Any]:
    options = {k: v for k, v in method.items() if k != "name" and _is_plain(v)}
    return {
        "name": method["name"],
        "options": options,
        "config_sha256": _sha256(config.to_dict()),
    }


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    """Return whether an option is a number, a choice, or a few of them; no text is."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, str):
        return PLAIN.fullmatch(value) is not None
    return value is None or isinstance(value, (bool, int, float))


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "packages": versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device.type,
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

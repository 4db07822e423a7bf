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
from urllib.parse import urlsplit

from diffdistill import catalog
from diffdistill.data.dataset import resolve
from diffdistill.data.questions import of_skills
from diffdistill.family_building import resolve_model
from diffdistill.pipelines.server import Server
from diffdistill.provenance.card import model_card
from diffdistill.provenance.files import CARD, RECORD, SCHEMA_VERSION, dumped, read_record
from diffdistill.provenance.sources import (
    describe_file,
    describe_model,
    describe_source,
    local_copy,
)
from diffdistill.provenance.terms import check_stated, enforce, judged
from diffdistill.roles import Role
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
        "student": _model(session, student, hashed=hashed),
        "teachers": [_model(session, role, hashed=hashed) for role in taught],
        "judges": [_judge(reward, hashed=hashed) for reward in config.rewards],
        "data": _data(session, hashed=hashed),
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


def _model(session: Session, role: Role, *, hashed: bool) -> dict[str, Any]:
    """Return the entry of a role: by which route it takes part, and what its weights are."""
    config, settings = session.config, session.config.roles[role.name]
    entry: dict[str, Any] = {"role": role.name, "route": _route(session, role)}
    if settings.weights in ("ema", "live"):
        entry["of"] = settings.of
        of = session.roles[settings.of]
        return entry | _weights(session, of, hashed=False)
    if stated := config.provenance.terms.get(role.name):
        entry["terms_stated"] = stated
    if isinstance(role.family, Server):
        host = urlsplit(role.family.path).hostname
        return entry | {"id": _served(role.family.model), "source": "server", "host": host}
    return entry | _weights(session, role, hashed=hashed)


def _served(model: str | None) -> str:
    """Return what a server calls its model; of a path, as vLLM's names are, the last part."""
    name = model or "unnamed"
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def _weights(session: Session, role: Role, *, hashed: bool) -> dict[str, Any]:
    """Return where a role's weights come from; those of a mean from where what it is of began."""
    config, settings = session.config, session.config.roles[role.name]
    if settings.weights == "mean":
        settings = config.roles[session.roles.trained()[0].name]
    family = settings.family or config.family
    path = settings.path or family.get("single_file") or family["path"]
    if not path:
        return {"id": family["name"], "source": "made", "license": None}
    revision = None if settings.path else family.get("revision")
    local = local_copy(resolve_model(path), revision)
    return describe_model(path, local, revision, hashed=hashed)


def _route(session: Session, role: Role) -> str:
    """Return how a role takes part.

    ``init`` is what the student begins from. A teacher is the student itself, ``live``, as its
    average (``ema``), with its ``adapter-off`` or as a ``copy`` from before training. Others are an
    ``expert``, which the student is the mean of; ``trained`` beside it from the same weights, as a
    critic is; another model, ``local`` or from the ``hub`` or ``bundled``; or behind a ``server``.
    """
    settings, student = session.config.roles[role.name], session.roles["student"]
    if role is student:
        return "init"
    if settings.weights in ("ema", "live"):
        return settings.weights
    if role.trained and student.settings.weights == "mean":
        return "expert"
    if isinstance(role.family, Server):
        return "server"
    same = (settings.path, settings.family) == (session.config.roles["student"].path, None)
    if same:
        return _own_route(role, student)
    path = settings.path or (settings.family or session.config.family)["path"]
    return str(describe_model(path, None, None, hashed=False)["source"])


def _own_route(role: Role, student: Role) -> str:
    """Return how a role takes part that begins from the student's own weights."""
    if role.trained:
        return "trained"
    shared = role.network is student.network and student.adapter is not None
    return "adapter-off" if shared else "copy"


def _judge(settings: Mapping[str, Any], *, hashed: bool) -> dict[str, Any]:
    """Return the entry of a reward: a rule, or a model in files."""
    name = settings["name"].rpartition("/")[2]
    path = settings.get("path")
    if not path:
        return {"role": "reward", "route": "rule", "id": name, "source": "made", "license": None}
    local = local_copy(resolve_model(path), None)
    return {
        "role": "reward",
        "route": "judge",
        "reward": name,
        **describe_model(path, local, None, hashed=hashed),
    }


def _data(session: Session, *, hashed: bool) -> list[dict[str, Any]]:
    """Return the entry of each data set: of the run's own, or of each of its skills."""
    data = session.config.data
    found = []
    for part in [*of_skills(data).values()] or [data]:
        if part.path is not None:
            found.append(describe_file(part.path, resolve(part.path, Path()), hashed=hashed))
        elif part.source is not None:
            found.append(describe_source(part.source, part.split, part.files, hashed=hashed))
    return found


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

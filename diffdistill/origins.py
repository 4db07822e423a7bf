"""The entries of a record: where each model and each data set of a run comes from."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffdistill.data.dataset import resolve
from diffdistill.data.questions import of_skills
from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.family_building import resolve_model
from diffdistill.pipelines.server import Server
from diffdistill.provenance.sources import (
    describe_file,
    describe_model,
    describe_source,
    local_copy,
)
from diffdistill.provenance.terms import MADE
from diffdistill.roles import Role
from diffdistill.session import Session


def model_entry(session: Session, role: Role, *, hashed: bool) -> dict[str, Any]:
    """Return the entry of a role: by which route it takes part, and what its weights are."""
    settings = session.config.roles[role.name]
    entry: dict[str, Any] = {"role": role.name, "route": _route(session, role)}
    if settings.weights in ("ema", "live"):
        entry["of"] = settings.of
        of = session.roles[settings.of]
        return entry | _weights(session, of, hashed=False)
    if isinstance(role.family, Server):
        return entry | server_entry(role.family, ask=True)
    return entry | _weights(session, role, hashed=hashed)


def server_entry(server: Server, *, ask: bool = False) -> dict[str, Any]:
    """Return the entry of a model behind a server.

    Args:
        server: The server.
        ask: Whether to ask it for the name of its model, where the config does not say it.
    """
    host = urlsplit(server.path).hostname
    name = _served(server, ask=ask)
    return {"route": "server", "id": name, "source": "server", "host": host}


def _served(server: Server, *, ask: bool) -> str:
    """Return what a server calls its model; of a path, as vLLM's names are, the last part."""
    name = server.model
    if name is None and ask:
        with suppress(UserError):
            name = server.served
    name = name or "unnamed"
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def place_entry(path: str, revision: str | None, role: str, *, hashed: bool) -> dict[str, Any]:
    """Return the entry of a model in a folder, on the hub or bundled.

    Args:
        path: As in the config.
        revision: Branch, tag or commit that was asked for.
        role: As what it takes part.
        hashed: Whether to hash files.
    """
    local = local_copy(resolve_model(path), revision)
    entry = describe_model(path, local, revision, hashed=hashed)
    return {"role": role, "route": entry["source"], **entry}


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


def judge_entries(settings: Mapping[str, Any], *, hashed: bool) -> list[dict[str, Any]]:
    """Return the entries of a reward: of a rule, or of each model in an option ``...path``."""
    name = settings["name"].rpartition("/")[2]
    told = {"role": "reward", "reward": name}
    paths = {key: value for key, value in settings.items() if key.endswith("path") and value}
    found = []
    for key, path in paths.items():
        local = local_copy(resolve_model(path), None)
        if key == "path" or _is_model(local):
            entry = describe_model(path, local, None, hashed=hashed)
            found.append({**told, "route": "judge", **entry})
    return found or [{**told, "route": "rule", "id": name, "source": MADE, "license": None}]


def _is_model(local: Path | None) -> bool:
    """Return whether a place has a model; one that is not on this machine may have."""
    if local is None or local.suffix == ".safetensors":
        return True
    return (local / "config.json").is_file() or any(local.glob("*.safetensors"))


def data_entries(data: DataSettings, *, hashed: bool) -> list[dict[str, Any]]:
    """Return the entry of each data set: of a run's own, or of each of its skills."""
    found = []
    for part in [*of_skills(data).values()] or [data]:
        if part.path is not None:
            found.append(describe_file(part.path, resolve(part.path, Path()), hashed=hashed))
        elif part.source is not None:
            found.append(describe_source(part.source, part.split, part.files, hashed=hashed))
    return found

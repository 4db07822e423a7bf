"""Which terms hold for the models of a record, and what follows from them.

The table is ``terms.yaml``, with a version, where each entry was read, and when. It records; it
does not decide, and is no legal advice. What is not in it is unknown, and stays so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from diffdistill import catalog
from diffdistill.errors import UserError
from diffdistill.provenance.settings import ProvenanceSettings

Status = Literal["met", "acknowledged", "noted", "open", "unknown"]
SELF = ("adapter-off", "copy", "ema", "expert", "live", "trained")
"""Routes of a role with the student's own weights, or trained from them: its terms are theirs."""

MADE = "made"
"""Source of what came from nowhere: a network of the toy family, a reward that is a rule."""


@dataclass(kw_only=True)
class Terms:
    """One entry of the table.

    Attributes:
        title: What the terms are called.
        url: Where they are.
        printed: The date on them, where they have one.
        read: When they were read; None where that was not noted.
        evidence: ``copy``: a copy of their text was read; ``secondary``: what others write about
            them; ``inferred``: from what such terms do not say; ``unchecked``: nobody looked.
        outputs: What they say about training on outputs.
        spdx: Id of the SPDX list.
        licenses: Ids on the hub.
        models: Patterns of hub ids that are under them, where no license of the table is stated.
        also: Patterns of ids that are under them besides what is stated: of models that were tuned
            from such a model and published under another license.
        hosts: Where a server under them is.
        obligations: What they ask for.
    """

    title: str
    url: str
    printed: str | None = None
    read: str | None = None
    evidence: Literal["copy", "secondary", "inferred", "unchecked"]
    outputs: Literal["allowed", "silent", "naming", "derivative", "competing", "forbidden"]
    spdx: str | None = None
    licenses: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    obligations: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """All entries, by name, and which version of the table they are."""

    version: int
    compiled: str
    entries: Mapping[str, Terms]


@cache
def table() -> Table:
    """Return the table that comes with the package."""
    content = yaml.safe_load((Path(__file__).parent / "terms.yaml").read_text())
    entries = {name: Terms(**entry) for name, entry in content["terms"].items()}
    return Table(content["version"], content["compiled"], entries)


def check_stated(settings: ProvenanceSettings, named: Sequence[str]) -> None:
    """Refuse terms that are stated of no role or reward, or are not in the table.

    Args:
        settings: What the config says.
        named: Its roles and rewards.

    Raises:
        UserError: If there are such.
    """
    for role, name in settings.terms.items():
        if role not in named:
            known = dict.fromkeys(named)
            raise UserError(
                f"provenance.terms: no role or reward {role!r}{catalog.near(role, known)}; "
                f"{catalog.listing(known)}"
            )
        if name not in table().entries:
            entries = table().entries
            raise UserError(
                f"provenance.terms.{role}: the table has no {name!r}{catalog.near(name, entries)}; "
                f"{catalog.listing(entries)}"
            )


def terms_of(model: Mapping[str, Any]) -> list[str]:
    """Return the names of the terms of a model: by the first of stated, host, license and hub id.

    Of a model that was tuned from another, the other's are added by its id. None at all is unknown.
    Somebody else's server has terms of its own, whatever model it says it has.
    """
    if stated := model.get("terms_stated"):
        return [str(stated)]
    entries, license_ = table().entries, model.get("license") or {}
    ids = {license_.get("license"), license_.get("license_name")} - {None, "other"}
    own = "host" not in model or _is_private(model["host"] or "")
    asked = (
        lambda terms: model.get("host") in terms.hosts,
        lambda terms: bool(ids & set(terms.licenses)),
        lambda terms: own and _fits(model["id"], terms.models),
    )
    found = (name for rule in asked for name, terms in entries.items() if rule(terms))
    also = [name for name, terms in entries.items() if own and _fits(model["id"], terms.also)]
    return list(dict.fromkeys([*islice(found, 1), *also]))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_private(host: str) -> bool:
    """Return whether a host is this machine, or in a network of its own."""
    try:
        return ip_address(host).is_private
    except ValueError:
        return "." not in host


class Used(NamedTuple):
    """A model of a record or of its past: as what it was used, and how many hops up it is."""

    model: Mapping[str, Any]
    of: Literal["weights", "outputs"]
    hops: int


def models_of(record: Mapping[str, Any]) -> list[Used]:
    """Return every model that a record tells of, the nearest first.

    Weights of a model are in the result if it is the student, or the student of the student.
    """
    return list(_used(record, "weights", 0))


def earlier_models(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the models that a run had before it went on with others."""
    return [entry for entry in record.get("earlier", []) if entry["role"] != "data"]


def earlier_data(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the data that a run had before it went on with other data."""
    return [entry for entry in record.get("earlier", []) if entry["role"] == "data"]


def _used(
    record: Mapping[str, Any], of: Literal["weights", "outputs"], hops: int
) -> Iterator[Used]:
    others = [m for m in record["teachers"] + record["judges"] if m.get("route") not in SELF]
    before = earlier_models(record)
    own = [Used(record["student"], of, hops), *(Used(m, "outputs", hops) for m in others)]
    own += [Used(m, of if m["role"] == "student" else "outputs", hops) for m in before]
    yield from (used for used in own if used.model["source"] != MADE)
    for used in own:
        if "upstream" in used.model:
            yield from _used(used.model["upstream"], used.of, hops + 1)


def obligations(
    record: Mapping[str, Any], settings: ProvenanceSettings, name: str | None = None
) -> list[dict[str, Any]]:
    """Return what the terms of all models of a record ask for, and whether it is met.

    Args:
        record: The record.
        settings: What the user says about it.
        name: The name of the result, where the settings have none.
    """
    found: dict[str, dict[str, Any]] = {}
    for used in models_of(record):
        for item in _asked(used):
            kept = found.setdefault(item["id"], {**item, "models": []})
            if used.model["id"] not in kept["models"]:
                kept["models"].append(used.model["id"])
    for item in found.values():
        item["status"] = _status(item, settings, settings.name or name)
    return list(found.values())


def judged(
    record: Mapping[str, Any], settings: ProvenanceSettings, name: str | None = None
) -> dict[str, Any]:
    """Return the obligations of a record, and which table of terms they are from."""
    version = {"version": table().version, "compiled": table().compiled}
    return {"obligations": obligations(record, settings, name), "terms_table": version}


def _asked(used: Used) -> Iterator[dict[str, Any]]:
    """Yield what the terms of one model ask for, of weights or of outputs as it was used."""
    model, hops, names = used.model, used.hops, terms_of(used.model)
    if not names and "upstream" in model and model.get("as_recorded", True):
        return  # made by this toolkit: what it is bound to is what its past is bound to
    if not names:
        text = (
            "the terms of this model are not known: state them, or read them and acknowledge this"
        )
        yield {"id": f"unknown/{model['id']}", "kind": "unknown", "text": text, "hops": hops}
    for name in names:
        terms = table().entries[name]
        for item in terms.obligations:
            if used.of in item["of"]:
                kept = {key: value for key, value in item.items() if key not in ("id", "of")}
                source = {"url": terms.url, "read": terms.read, "evidence": terms.evidence}
                yield {"id": f"{name}/{item['id']}", **kept, **source, "hops": hops}


def _status(item: Mapping[str, Any], settings: ProvenanceSettings, name: str | None) -> Status:
    if item["id"] in settings.acknowledged:
        return "acknowledged"
    if item["kind"] == "unknown":
        return "unknown"
    if item["kind"] == "notice":  # of every license, and no reason to stop
        return "noted"
    named = item["kind"] == "naming" and (name or "").rpartition("/")[2].startswith(item["prefix"])
    return "met" if named else "open"


def unmet(record: Mapping[str, Any]) -> list[str]:
    """Return the ids of the obligations of a record that are open or unknown."""
    return [o["id"] for o in record["obligations"] if o["status"] in ("open", "unknown")]


def enforce(record: Mapping[str, Any], settings: ProvenanceSettings) -> str | None:
    """Return what to say about open obligations; None where there are none.

    Raises:
        UserError: If there are, and the policy is ``error``.
    """
    found = unmet(record)
    if not found:
        return None
    listed = ", ".join(found)
    if settings.policy == "error":
        raise UserError(
            f"provenance: open obligations: {listed}; set provenance.name or provenance.terms, or "
            "list what you have met in provenance.acknowledged (see docs/provenance.md)"
        )
    return f"provenance: open obligations: {listed} (see provenance.json)"

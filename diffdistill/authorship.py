"""The models that wrote the data of a run, as entries of its record."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffdistill import catalog
from diffdistill.config import RunConfig
from diffdistill.data.dataset import resolve
from diffdistill.data.questions import of_skills
from diffdistill.family_building import build_family
from diffdistill.origins import place_entry, server_entry
from diffdistill.pipelines.server import Server
from diffdistill.provenance.files import beside_file, past_record
from diffdistill.provenance.terms import MADE
from diffdistill.tessy_settings import FitSettings, Mode, TessySettings

WRITTEN, ANNOTATOR, BOUNDARIES = AUTHOR_ROLES = ("rollouts", "annotator", "boundaries")
"""Roles of models that wrote answers, said for boundary predictors what is style, became these."""
TOGETHER: tuple[Mode, ...] = ("tessy", "tessy-teacher-answer")
"""Modes in which boundary predictors have a say."""


def data_authors(config: RunConfig, *, hashed: bool) -> list[dict[str, Any]]:
    """Return the entry of each model that wrote the data of a run, or helped to.

    Data that ``tessy write`` wrote has a record beside it. Without one, they are those of the
    section ``tessy``; without that too, they are only known by what tells them from others.

    Args:
        config: The run's config.
        hashed: Whether to hash files.

    Raises:
        UserError: If a record is damaged.
    """
    found: list[dict[str, Any]] = []
    silent: list[dict[str, Any]] = []
    for file in _files(config):
        past, about = past_record(beside_file(file)[0]), about_file(file)
        if past is not None:
            found += authors_in(past)
        elif about.is_file():
            silent += _unnamed(about)
    if config.tessy is not None and not found:
        authors = writing_models(config, config.tessy, hashed=hashed)
        return [*authors["teachers"], *authors["judges"]]
    return _distinct([*found, *silent])


def about_file(data: Path) -> Path:
    """Return the file beside written data that says what all of it depends on."""
    return data.with_name(f"{data.stem}-about.json")


def authors_in(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of the models in the record of written data."""
    student = record["student"]
    wrote = [{**student, "role": WRITTEN, "route": student["source"]}]
    alone = record["method"]["options"]["mode"] == "teacher-only"
    return [*([] if alone else wrote), *record["teachers"], *record["judges"]]


def writing_models(
    config: RunConfig,
    settings: TessySettings,
    *,
    hashed: bool,
    ask: bool = False,
    fit: FitSettings | None = None,
) -> dict[str, Any]:
    """Return the student, teachers and judges with which a section ``tessy`` writes.

    The teacher is among them unless the student writes alone; who annotated for the boundary
    predictors, and what became them, where these have a say.

    Args:
        config: The config.
        settings: Its section ``tessy``.
        hashed: Whether to hash files.
        ask: Whether to ask servers for the names of their models.
        fit: How the predictors were made; None is as the section says.
    """
    fit = fit or settings.fit
    path = config.roles["student"].path
    teachers, judges = [], []
    if settings.teacher and settings.mode != "student-only":
        teachers.append(family_entry(settings.teacher, WRITTEN, hashed=hashed, ask=ask))
    if settings.mode in TOGETHER:
        if fit.annotator == "model" and fit.model:
            teachers.append(family_entry(fit.model, ANNOTATOR, hashed=hashed, ask=ask))
        judges.append(place_entry(fit.base, None, BOUNDARIES, hashed=hashed))
    student = family_entry(config.family, "student", path=path, hashed=hashed)
    return {"student": {**student, "route": "init"}, "teachers": teachers, "judges": judges}


def family_entry(
    section: Mapping[str, Any],
    role: str,
    *,
    path: str | None = None,
    hashed: bool,
    ask: bool = False,
) -> dict[str, Any]:
    """Return the entry of a model by its family's section.

    Args:
        section: The family, with all options.
        role: As what it takes part.
        path: Its weights, if not the family's own.
        hashed: Whether to hash files.
        ask: Whether to ask a server for the name of its model.
    """
    if issubclass(catalog.load("family", section["name"]), Server):
        server = build_family(section, torch.device("cpu"))
        assert isinstance(server, Server)
        return {"role": role, **server_entry(server, ask=ask)}
    place = path or section.get("single_file") or section["path"]
    if not place:
        return {"role": role, "route": MADE, "id": section["name"], "source": MADE, "license": None}
    revision = section.get("revision") if path is None else None
    return place_entry(place, revision, role, hashed=hashed)


def _unnamed(about: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of models of which only a hash, or a server's name of them, is known."""
    revisions = json.loads(about.read_text(encoding="utf-8")).get("revisions") or {}
    for revision in revisions.values():
        entry = {"id": revision, "source": "local", "revision": None, "license": None}
        yield {"role": WRITTEN, "route": "local", **entry}


def _files(config: RunConfig) -> Iterator[Path]:
    """Yield the files of a run's data on this machine; of a folder, those that were written."""
    for part in [*of_skills(config.data).values()] or [config.data]:
        if part.path is None:
            yield from (Path(file).expanduser() for file in part.files or ())
            continue
        place = resolve(part.path, Path())
        if place.is_dir():
            about = sorted(place.rglob(about_file(Path("*.jsonl")).name))
            yield from (f.with_name(f"{f.stem.removesuffix('-about')}.jsonl") for f in about)
        else:
            yield place


def _distinct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries, each once."""
    return [entry for index, entry in enumerate(entries) if entry not in entries[:index]]

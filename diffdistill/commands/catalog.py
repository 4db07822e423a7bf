"""``diffdistill list`` and ``diffdistill schema``."""

import json
from inspect import getdoc
from typing import Any

from pydantic import TypeAdapter

from diffdistill import catalog
from diffdistill.config import SAMPLES, SECTIONS
from diffdistill.config_files import bundled_configs, bundled_pipelines
from diffdistill.errors import UserError
from diffdistill.evaluation.few_step import EvaluateSettings
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings, TextEvaluateSettings
from diffdistill.options import attribute_notes, options_model
from diffdistill.role_settings import RoleSettings
from diffdistill.tessy_settings import FitSettings, TessySettings

KINDS = {"methods": "method", "families": "family", "rewards": "reward", "engines": "engine"}


def listing(kind: str | None = None) -> str:
    """Return names with their one-line descriptions, of one kind or of all.

    Raises:
        UserError: If there is no such kind.
    """
    bundled = {"configs": bundled_configs, "pipelines": bundled_pipelines}
    kinds = [*KINDS, *bundled]
    if kind is not None and kind not in kinds:
        raise UserError(
            f"nothing to list called {kind!r}{catalog.near(kind, dict.fromkeys(kinds))}"
        )
    parts = []
    for name in kinds if kind is None else [kind]:
        lines = bundled[name]() if name in bundled else _described(KINDS[name])
        parts.append("\n".join([f"{name}:", *(f"  {line}" for line in lines)]))
    return "\n".join(parts)


def _described(kind: str) -> list[str]:
    names = sorted(catalog.names(kind))
    return [f"{name:14} {_first_line(catalog.load(kind, name))}" for name in names]


def _first_line(cls: type) -> str:
    return (getdoc(cls) or "").partition("\n")[0]


def json_schema() -> str:
    """Return the JSON schema of config files."""
    properties = {name: _schema(cls) for name, cls in SECTIONS.items()}
    properties["sample"] = {"anyOf": [_schema(cls) for cls in SAMPLES.values()]}
    for kind in ("method", "family"):
        properties[kind] = {"oneOf": [_named(kind, n) for n in sorted(catalog.names(kind))]}
    role = _schema(RoleSettings)
    role["properties"]["family"] |= {"anyOf": [{"$ref": "#/properties/family"}, {"type": "null"}]}
    properties["roles"] = {"type": "object", "additionalProperties": role}
    evaluate = (EvaluateSettings, TextEvaluateSettings, AnswerEvaluateSettings)
    properties["evaluate"] = {"anyOf": [_schema(cls) for cls in evaluate]}
    properties["tessy"] = _schema(TessySettings)
    properties["tessy"]["properties"]["fit"] = _schema(FitSettings)
    own = {"type": "object", "properties": {"name": {"pattern": ":"}}, "required": ["name"]}
    named = [_named("reward", name) for name in sorted(catalog.names("reward"))]
    for schema_ in named:
        schema_["properties"]["skill"] = {"type": "string", "description": "One of data.skills."}
    reward = {"anyOf": [{"type": "string"}, *named, own]}
    properties["rewards"] = {"anyOf": [reward, {"type": "array", "items": reward}]}
    engines = [_named("engine", name) for name in sorted(catalog.names("engine"))]
    properties["engine"] = {"anyOf": [{"type": "string"}, *engines, own]}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "diffdistill config",
        "type": "object",
        "properties": properties,
        "required": ["family", "method", "data"],
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=2)


def _schema(cls: type) -> dict[str, Any]:
    return TypeAdapter(options_model(cls)).json_schema()


def _named(kind: str, name: str) -> dict[str, Any]:
    cls = catalog.load(kind, name)
    schema = _schema(cls)
    fixed: dict[str, Any] = {"name": {"const": name}}
    if kind == "family":
        path = attribute_notes(cls).get("path", "")
        fixed["path"] = {"type": "string", "description": path}
    schema["properties"] = fixed | schema.get("properties", {})
    schema["required"] = ["name"]
    return schema

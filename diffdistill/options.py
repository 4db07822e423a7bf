"""Options of a class as a section of a config: checked, with one-line errors.

A section's keys are the fields with a default of a dataclass. An unknown key is an error.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from inspect import cleandoc
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from diffdistill import catalog
from diffdistill.errors import UserError


def parse(cls: type, values: Any, where: str) -> Any:
    """Return an instance of the settings class ``cls`` from checked values."""
    return cls(**parse_options(cls, values, where))


def parse_options(cls: type, values: Any, where: str) -> dict[str, Any]:
    """Return all options of ``cls`` as a dictionary, checked, with defaults filled in."""
    values = section_of(values, where)
    model = options_model(cls)
    try:
        return dict(model(**values))
    except ValidationError as error:
        raise UserError(_explain(error, where, model)) from None


def section_of(value: Any, where: str) -> dict[str, Any]:
    """Return the keys and values of one section; nothing given is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected keys and values, got {value!r}")
    return {str(key): item for key, item in value.items()}


@cache
def options_model(cls: type) -> type[BaseModel]:
    """Return a strict pydantic model of the fields with a default of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    notes = attribute_notes(cls)
    definitions: dict[str, Any] = {}
    default: dict[str, Any]
    for item in fields(cls):
        if item.default is not MISSING:
            default = {"default": item.default}
        elif item.default_factory is not MISSING:
            default = {"default_factory": item.default_factory}
        else:
            continue
        smallest = _smallest(item.name, hints[item.name])
        info = Field(description=notes.get(item.name), ge=smallest, **default)
        definitions[item.name] = (hints[item.name], info)
    return create_model(
        cls.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **definitions
    )


def _smallest(name: str, hint: Any) -> int | None:
    """Return 1 for a whole number that is a count or a period by its name."""
    named = name.startswith("num_") or name.endswith("_every")
    return 1 if named and hint in (int, int | None) else None


def attribute_notes(cls: type) -> dict[str, str]:
    """Return the description of each field from the "Attributes:" parts of the docstrings."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, part = cleandoc(base.__doc__ or "").partition("Attributes:\n")
        pairs = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", part, flags=re.MULTILINE)
        notes |= {name: " ".join(text.split()) for name, text in pairs}
    return notes


def _explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """Return the first problem of a validation error in one line."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-"))
    if problem["type"] == "extra_forbidden":
        known = model.model_fields
        return f"{where}.{key}: unknown key{catalog.near(key, known)}; {catalog.listing(known)}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}.{key}: {problem['msg']}, got {problem['input']!r}{more}"

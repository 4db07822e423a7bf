"""Files of configs: found by path or bundled name, read as strict YAML, with dotted overrides."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffdistill import catalog
from diffdistill.bundled import CONFIGS
from diffdistill.errors import UserError


def read_values(name: str, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Return the file of a config and what it says, with overrides; nothing is checked.

    Raises:
        UserError: If there is none, or it or an override cannot be read.
    """
    path = find_config(name)
    values = _read(path)
    for override in overrides:
        apply_override(values, override)
    return path, values


def find_config(name: str) -> Path:
    """Return the file of a config given by path or by bundled name."""
    candidates = (Path(name), CONFIGS / f"{name}.yaml", CONFIGS / name)
    for path in candidates:
        if path.is_file():
            return path
    known = dict.fromkeys([*bundled_configs(), *bundled_pipelines()])
    raise UserError(
        f"no config file {name!r}{catalog.near(name, known)}; bundled: {catalog.listing(known)}"
    )


def bundled_configs() -> list[str]:
    """Return the names of the configs of runs that ship with the package."""
    return [name for name, staged in _bundled() if not staged]


def bundled_pipelines() -> list[str]:
    """Return the names of the pipelines that ship with the package (see ``stages``)."""
    return [name for name, staged in _bundled() if staged]


def _bundled() -> Iterator[tuple[str, bool]]:
    """Yield each bundled config, and whether it is a pipeline."""
    for file in sorted(CONFIGS.rglob("*.yaml")):
        path = file.relative_to(CONFIGS).with_suffix("")
        if path.parts[0] != "accelerate":
            yield path.as_posix(), bool(re.search("^stages:", file.read_text(), re.MULTILINE))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected sections of keys and values, got {type(values).__name__}"
        )
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what an override ``section.key=value`` says.

    Raises:
        UserError: If it cannot be read, or a section is none.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected section.key=value")
    *parents, key = dotted.removeprefix("--").split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {parent!r} is not a section")
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: not valid YAML: {error}") from None

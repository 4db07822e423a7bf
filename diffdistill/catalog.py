"""Every name a config file may use, and where its class lives.

The values are strings, so that looking one name up imports one module, and so that this
module can name the pipelines and rewards without importing them.
"""

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from diffdistill.errors import UserError

METHODS = {
    "d-opsd": "diffdistill.methods.d_opsd:DOPSD",
    "dmd": "diffdistill.methods.dmd:DMD",
    "off-policy": "diffdistill.methods.off_policy:OffPolicy",
    "sft": "diffdistill.methods.sft:SFT",
}

FAMILIES = {
    "flux2-klein": "diffdistill.pipelines.flux2_klein:Flux2Klein",
    "toy": "diffdistill.pipelines.toy:Toy",
    "z-image": "diffdistill.pipelines.z_image:ZImage",
}

REWARDS: dict[str, str] = {}

TABLES = {"method": METHODS, "family": FAMILIES, "reward": REWARDS}


def names(kind: str) -> dict[str, str]:
    """Return name and address of every ``method``, ``family`` or ``reward``.

    Other packages add names through the entry points ``diffdistill.methods``,
    ``diffdistill.families`` and ``diffdistill.rewards``.
    """
    group = {"method": "methods", "family": "families", "reward": "rewards"}[kind]
    found = entry_points(group=f"diffdistill.{group}")
    return TABLES[kind] | {point.name: point.value for point in found}


def load(kind: str, name: str) -> Any:
    """Return the class called ``name``, or at ``name`` if it is "module:Class".

    Raises:
        UserError: If there is no such name, module or class.
    """
    table = names(kind)
    module, _, attribute = table.get(name, name).partition(":")
    if not attribute:
        raise UserError(f"unknown {kind} {name!r}{near(name, table)}; known: {listing(table)}")
    try:
        return getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"cannot load the {kind} {name!r}: {error}") from error


def near(name: str, known: Mapping[str, Any]) -> str:
    """Return ", did you mean ...?" if a known name resembles ``name``, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def listing(known: Mapping[str, Any]) -> str:
    """Return the known names, sorted, in one line."""
    return ", ".join(sorted(known))

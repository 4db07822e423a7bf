"""Records as CycloneDX 1.7 bills of materials for machine learning, checked by its schema.

CycloneDX has no word for distillation: what the weights were initialized from is the pedigree of
the component, and teachers, judges and data are its dependencies, with their roles as properties.
"""

import json
from collections.abc import Mapping
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from diffdistill.errors import MissingExtra
from diffdistill.provenance.card import license_of
from diffdistill.provenance.files import dumped
from diffdistill.provenance.terms import MADE, SELF, earlier_data, earlier_models, table, terms_of


def bill(record: dict[str, Any]) -> str:
    """Return the bill of a record as JSON, the same for the same record.

    Raises:
        MissingExtra: If what checks it is not installed.
    """
    components: dict[str, dict[str, Any]] = {}
    dependencies: dict[str, list[str]] = {}
    subject = _result(record, components, dependencies)
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, dumped(record))}",
        "version": 1,
        "metadata": {
            "timestamp": record["created"],
            "tools": {"components": [_tool(record)]},
            "component": subject,
        },
        "components": list(components.values()),
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(set(on))} for ref, on in dependencies.items()
        ],
    }
    text = json.dumps(document, indent=1) + "\n"
    _check(text)
    return text


def _check(text: str) -> None:
    """Check a bill by the schema that comes with CycloneDX's own package; nothing is fetched."""
    try:
        from cyclonedx.exception import MissingOptionalDependencyException
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError:
        raise MissingExtra("cyclonedx-python-lib", "--format bom", "bom") from None
    try:
        error = JsonStrictValidator(SchemaVersion.V1_7).validate_str(text)
    except MissingOptionalDependencyException:
        raise MissingExtra("jsonschema", "--format bom", "bom") from None
    assert error is None, f"not CycloneDX 1.7: {error}"


def _tool(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "application", "name": "diffdistill", "version": record["tool"]["version"]}


def _result(
    record: dict[str, Any], components: dict[str, dict[str, Any]], on: dict[str, list[str]]
) -> dict[str, Any]:
    """Return the component of what a record is of; add those of all that led to it."""
    result, method = record["result"], record["method"]
    ref = f"result:{uuid5(NAMESPACE_URL, dumped(record))}"
    ancestor = _model(record["student"], components, on)
    sets = [_data(data, components) for data in [*record["data"], *earlier_data(record)]]
    told = {"method": method["name"], "config_sha256": method["config_sha256"]}
    on[ref] = [ancestor, *sets]
    parts = []
    for model in [*record["teachers"], *record["judges"], *earlier_models(record)]:
        found = ancestor if model["route"] in SELF else _model(model, components, on)
        on[ref].append(found)
        parts += _properties({f"{model['role']}:{model['route']}": found})
    told |= {f"obligation:{o['id']}": o["status"] for o in record["obligations"]}
    parameters = {"datasets": [{"ref": ref} for ref in sets]} if sets else {}
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": result["name"],
        "pedigree": {"ancestors": [_plain(components[ancestor])]},
        "modelCard": {"modelParameters": parameters, "properties": [*_properties(told), *parts]},
    }
    return component | _license_field(result["license"])


def _model(
    model: Mapping[str, Any], components: dict[str, dict[str, Any]], on: dict[str, list[str]]
) -> str:
    """Add the component of a model, and of its past; return its reference."""
    hashes = "".join(sorted((model.get("weights_sha256") or {}).values()))
    identity = f"{model['id']}@{model.get('revision')}:{hashes}"
    ref = f"model:{uuid5(NAMESPACE_URL, identity)}"
    made = model["source"] == MADE
    told = {key: model.get(key) for key in ("source", "revision", "host")}
    told |= {f"sha256:{name}": value for name, value in (model.get("weights_sha256") or {}).items()}
    told["terms"] = None if made else ", ".join(terms_of(model)) or "unknown"
    if ref not in components:
        components[ref] = {
            "type": "application" if made else "machine-learning-model",
            "bom-ref": ref,
            "name": model["id"],
            "properties": _properties(told),
        } | _license_field(license_of(model))
        on[ref] = []
    if "upstream" in model:
        past = _result(model["upstream"], components, on)
        components.setdefault(past["bom-ref"], past)
        on[ref].append(past["bom-ref"])
    return ref


def _data(data: Mapping[str, Any], components: dict[str, dict[str, Any]]) -> str:
    ref = f"data:{uuid5(NAMESPACE_URL, json.dumps(data, sort_keys=True))}"
    component: dict[str, Any] = {"type": "data", "bom-ref": ref, "name": data["id"]}
    if data.get("sha256"):
        component["hashes"] = [{"alg": "SHA-256", "content": data["sha256"]}]
    component["data"] = [{"type": "dataset", "name": data["id"]}]
    components[ref] = component
    return ref


def _plain(component: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component without its reference, which must be unique in a bill."""
    return {key: value for key, value in component.items() if key != "bom-ref"}


def _properties(told: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"name": f"diffdistill:{name}", "value": str(value)}
        for name, value in told.items()
        if value is not None
    ]


def _license_field(hub_id: str | None) -> dict[str, Any]:
    """Return the licenses of a component: an id of the SPDX list, or a name of our own."""
    if hub_id is None:
        return {}
    ids = (terms.spdx for terms in table().entries.values() if hub_id in terms.licenses)
    known = next((spdx for spdx in ids if spdx is not None), None)
    license_ = {"name": f"LicenseRef-{hub_id}"} if known is None else {"id": known}
    return {"licenses": [{"license": license_}]}

"""Model cards: what the hub reads at their head, and what people read below it.

Teachers are never in ``base_model``: the hub takes what is listed there for what the weights were
merged or tuned from, and knows no other relation. They are in a key of our own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from diffdistill.provenance.terms import earlier_data, earlier_models


def model_card(record: Mapping[str, Any]) -> str:
    """Return a model card of a record: YAML that the hub reads, and Markdown."""
    return f"---\n{head(record).to_yaml()}\n---\n\n{_body(record)}"


def head(record: Mapping[str, Any]) -> ModelCardData:
    """Return the head of the card; what is unknown is left out."""
    result, student = record["result"], record["student"]
    on_hub = student["source"] == "hub"
    own: dict[str, Any] = {}
    if on_hub:
        own["base_model_relation"] = "adapter" if result["adapter"] else "finetune"
    earlier = [m for m in earlier_models(record) if m["role"] != "student"]
    taught = [_teacher(model) for model in [*record["teachers"], *earlier]]
    sets = [*record["data"], *earlier_data(record)]
    return ModelCardData(
        license=result["license"],
        library_name=result["library"],
        base_model=student["id"] if on_hub else None,
        datasets=[data["id"] for data in sets if data["source"] == "hub"] or None,
        tags=["distillation", "diffdistill", record["method"]["name"]],
        teacher_models=taught or None,
        **own,
    )


def _teacher(model: Mapping[str, Any]) -> dict[str, Any]:
    entry = {key: model.get(key) for key in ("id", "revision", "role", "route")}
    entry["license"] = license_of(model)
    return {key: value for key, value in entry.items() if value is not None}


def license_of(model: Mapping[str, Any]) -> str | None:
    """Return the id of the license that a model's own card states."""
    stated = model.get("license") or {}
    return stated.get("license_name") or stated.get("license")


def _body(record: Mapping[str, Any]) -> str:
    result, method = record["result"], record["method"]
    parts = [
        f"# {result['name']}",
        f"Made by diffdistill {record['tool']['version']} with the method `{method['name']}`"
        + ("." if record["step"] is None else f", {record['step']} steps."),
        "## Distillation provenance",
        _table(("role", "model", "route", "revision", "license"), _models(record)),
    ]
    if sets := [*record["data"], *earlier_data(record)]:
        rows = [(d["id"], d.get("revision") or d.get("sha256", "")[:12]) for d in sets]
        parts.append(_table(("data", "revision or hash"), rows))
    if record["obligations"]:
        parts += ["## Obligations", NOTICE]
        asked = [(o["id"], o["text"], o["status"]) for o in record["obligations"]]
        parts.append(_table(("obligation", "what it asks", "status"), asked))
    parts.append("All of it, with hashes and what came before: [provenance.json](provenance.json).")
    return "\n\n".join(parts) + "\n"


NOTICE = (
    "From a table of terms with the day on which each was read; a record, not a decision, and no "
    "legal advice."
)


def _models(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    before = earlier_models(record)
    for model in [record["student"], *record["teachers"], *record["judges"], *before]:
        role = f"{model['role']} (earlier)" if model in before else model["role"]
        told = (role, model["id"], model["route"], model.get("revision") or "")
        rows.append((*told, license_of(model) or "unknown"))
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)

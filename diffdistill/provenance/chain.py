"""Records as trees for the screen: what a model was made from, and what that was made from."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from diffdistill.provenance.card import license_of
from diffdistill.provenance.terms import MADE, earlier_data, earlier_models, table, terms_of


def chain(record: Mapping[str, Any]) -> str:
    """Return a record as text: its models with their past, its data, and open obligations."""
    console = Console(width=110, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(_tree(record))
        if record["obligations"]:
            console.print(_obligations(record))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip()


def terms_table() -> str:
    """Return the table of terms as text."""
    shown = Table("terms", "title", "outputs", "evidence", "printed", "read")
    for name, terms in table().entries.items():
        dates = (terms.printed or "-", terms.read or "-")
        shown.add_row(name, terms.title, terms.outputs, terms.evidence, *dates)
    console = Console(width=110, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(shown)
    head = f"version {table().version}, compiled {table().compiled}; not legal advice"
    return f"{head}\n{capture.get().rstrip()}"


def _tree(record: Mapping[str, Any]) -> Tree:
    result, step = record["result"], record["step"]
    made = f"{result['name']}: {record['method']['name']}"
    tree = Tree(made if step is None else f"{made}, {step} steps")
    before = earlier_models(record)
    for model in [record["student"], *record["teachers"], *record["judges"], *before]:
        branch = tree.add(f"earlier {_line(model)}" if model in before else _line(model))
        if "upstream" in model:
            past = _tree(model["upstream"])
            if model.get("as_recorded") is False:
                past.label = f"{past.label} (its weights have changed since)"
            branch.children.append(past)
    for data in record["data"]:
        tree.add(_data_line(data))
    for data in earlier_data(record):
        tree.add(f"earlier {_data_line(data)}")
    return tree


def _data_line(data: Mapping[str, Any]) -> str:
    kept = data.get("revision") or data.get("sha256")
    return f"data {data['id']} ({data['source']}{f', {kept[:12]}' if kept else ''})"


def _line(model: Mapping[str, Any]) -> str:
    told = [model["route"]]
    if model["source"] == MADE:
        return f"{model['role']} {model['id']} ({model['route']})"
    if model.get("revision"):
        told.append(model["revision"][:12])
    for value in list((model.get("weights_sha256") or {}).values())[:1]:
        told.append(f"sha256 {value[:12]}")
    terms = " and ".join(terms_of(model)) or "unknown"
    told.append(f"license {license_of(model) or 'unknown'}, terms {terms}")
    return f"{model['role']} {model['id']} ({', '.join(told)})"


def _obligations(record: Mapping[str, Any]) -> Table:
    shown = Table("obligation", "what it asks", "of", "status")
    for item in record["obligations"]:
        shown.add_row(item["id"], item["text"], ", ".join(item["models"]), item["status"])
    return shown

"""Functions of the standard library: what is cut out, what is held out, and what ships."""

import ast
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from diffdistill.bundled import bundled
from diffdistill.evaluation.python_source import (
    ASKED,
    MAX_BYTES,
    completes,
    corpus,
    cut,
    is_held_out,
    library_files,
)

SOURCE = '''
import os


def documented(first, second=None):
    """Return the first."""

    # why not
    return first or second or os.environ


def plain(first):
    def inner(argument):
        return argument * argument * argument
    return inner(first)


class Small:
    """A class without documented functions."""

    def method(self):
        return self.method


class Asked:
    def documented(self):
        """Return what is asked for, and no more."""
        return self.plain(2)

    def plain(self, number):
        return [number for _ in range(number) if number > 2]


if os.name:
    def long(argument):
        """Say nothing."""
        def within(number):
            return number + 1 if number > 10 else number
        return """%s"""
''' % ("x" * MAX_BYTES)


def rows(name: str) -> list[dict[str, Any]]:
    text = bundled("data", f"python-{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_documents_are_whole_functions_and_none_is_in_another() -> None:
    found = list(cut("some.module", SOURCE))
    names = [ast.parse(document.source).body[0].name for document in found]  # type: ignore[attr-defined]
    assert names == ["documented", "plain", "Small", "documented", "plain", "within"]
    assert [bool(document.header) for document in found] == [True, *[False] * 2, True, *[False] * 2]
    header, body = found[0].header, found[0].body
    assert header == 'def documented(first, second=None):\n    """Return the first."""'
    assert body == "    # why not\n    return first or second or os.environ"
    assert found[3].header.startswith("def documented(self):\n    ")
    chat = found[0].row()["messages"]
    assert [message["role"] for message in chat] == ["user", "assistant"]
    assert chat[0]["content"] == ASKED + header


def test_source_that_is_no_python_is_left_out() -> None:
    assert list(cut("broken", "def broken(:\n")) == []


def test_a_function_in_a_held_out_and_in_another_file_is_not_held_out(tmp_path: Path) -> None:
    names = [f"module{number}" for number in range(60)]
    held_out = next(name for name in names if is_held_out(name))
    other = next(name for name in names if not is_held_out(name))
    for name in (held_out, other):
        (tmp_path / f"{name}.py").write_text(SOURCE)
    own = "def alone(number):\n    return number ** number if number > 1 else number\n"
    (tmp_path / f"{held_out}.py").write_text(own + SOURCE)
    train, kept = corpus(library_files(tmp_path))
    assert {document.module for document in train} == {other}
    assert [document.source for document in kept] == [own.strip()]


@pytest.mark.parametrize(
    ("answer", "fine"),
    [
        ("    return 1", True),
        ("    if number:\n        return 1", True),
        ("", False),
        ("  \n", False),
        ("    return (1", False),
        ("return 1", False),
        ("    return 1\nprint(2)", False),
    ],
)
def test_a_body_completes_a_function_if_all_of_it_parses(answer: str, fine: bool) -> None:
    assert completes(ASKED + 'def one(number):\n    """Return one."""', answer) == fine


def test_held_out_files_are_not_in_the_training_data() -> None:
    train, held_out = rows("train"), rows("held-out")
    assert not any(is_held_out(row["module"]) for row in train)
    assert all(is_held_out(row["module"]) for row in held_out)
    texts = [json.dumps(row.get("messages", row.get("text"))) for row in (*train, *held_out)]
    assert len(texts) == len(set(texts))


def test_every_chat_that_ships_is_completed_by_its_answer() -> None:
    chats = [row["messages"] for row in rows("held-out") if "messages" in row]
    assert len(chats) > 300
    assert all(completes(chat[0]["content"], chat[1]["content"]) for chat in chats)


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="the data is of Python 3.11.7")
def test_the_bundled_functions_are_what_the_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[1] / "scripts" / "make_python_data.py"
    spec = importlib.util.spec_from_file_location("make_python_data", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(script), "--folder", str(tmp_path)])
    module.main()
    for name in ("python-train.jsonl", "python-held-out.jsonl"):
        assert (tmp_path / name).read_bytes() == bundled("data", name).read_bytes()

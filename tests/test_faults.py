"""The list of faults that ``scripts/inject_faults.py`` puts into the package, not their effect."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("inject_faults", "text_faults")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("inject_faults")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return module


def test_every_fault_stands_once_in_its_file_and_has_tests(inject: ModuleType) -> None:
    counts = {f.what: (inject.ROOT / f.file).read_text().count(f.old) for f in inject.FAULTS}
    assert {what: count for what, count in counts.items() if count != 1} == {}
    assert len(counts) == len(inject.FAULTS) > 100
    assert [f.what for f in inject.FAULTS if f.file not in inject.TESTS] == []
    named = {name for tests in inject.TESTS.values() for name in tests.split()}
    assert [name for name in named if not (inject.ROOT / "tests" / name).exists()] == []


def test_every_fault_changes_something(inject: ModuleType) -> None:
    assert [f.what for f in inject.FAULTS if f.old == f.new] == []

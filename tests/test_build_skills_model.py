"""The builder of the bundled `skills-base`: what it learns, and what waits for what."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from diffdistill.evaluation import arithmetic, editing

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def builder() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))  # scripts import each other by name
    yield importlib.import_module("build_skills_model")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tiny(builder: ModuleType) -> Any:
    return replace(
        builder.RECIPE, hidden=32, layers=1, heads=1, inner=16, steps=2, measure_every=1,
        tokens=512, pool=60, checked=4,
    )  # fmt: skip


def test_lessons_are_of_both_skills_and_not_held_out(builder: ModuleType, tiny: Any) -> None:
    sums, edits = (builder.skill(name, tiny) for name in ("arithmetic", "editing"))
    assert len(sums.lessons) == len(edits.lessons) == 60
    for question, answer, _ in sums.lessons:
        problem = arithmetic.read_question(question)
        assert problem.format == "box"
        assert answer == problem.solution
        assert not arithmetic.is_held_out(problem)
    for question, answer, _ in edits.lessons:
        assert answer == editing.read_question(question).solution
        assert not editing.is_held_out(editing.read_question(question))
    assert not set(sums.checked) & set(edits.checked)


def test_what_is_at_the_goal_waits_for_what_is_not(
    builder: ModuleType, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = importlib.import_module("build_arithmetic_models")
    learned: list[str] = []

    def losses(network: Any, tokenizer: Any, recipe: Any, pairs: Any) -> Iterator[Tensor]:
        name = "editing" if ":" in pairs[0][1] else "arithmetic"
        while True:
            learned.append(name)
            yield sum(p.square().mean() for p in network.parameters())  # type: ignore[misc]

    def right(texts: Any, asked: Any) -> list[float]:
        return [float(isinstance(asked[0], editing.Edit))] * len(asked)

    monkeypatch.setattr(shared, "losses", losses)
    monkeypatch.setattr(shared, "right", right)
    monkeypatch.setattr(shared, "MAX_TOKENS", 2)
    skills = {name: builder.skill(name, tiny) for name in builder.SKILLS}
    _, taken, accuracy = shared.train("x", tiny, shared.build_tokenizer(), skills)
    assert (taken, accuracy) == (2, 0.0)
    assert learned == ["arithmetic", "editing"] * 2 + ["arithmetic"] * 4


def test_the_model_is_built_measured_and_described(
    builder: ModuleType, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("build_arithmetic_models"), "MAX_TOKENS", 4)
    table = builder.build(tmp_path, replace(tiny, steps=1), 9)
    levels = {*builder.SKILLS, *arithmetic.LEVELS, *editing.LEVELS}
    assert set(table) <= levels
    assert all(len(values) == 2 for values in table.values())
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "skills-base")
    assert network.dtype == torch.float16
    card = (tmp_path / "skills-base" / "README.md").read_text(encoding="utf-8")
    assert "{" not in card
    assert all(f"| {name} |" in card for name in builder.SKILLS)

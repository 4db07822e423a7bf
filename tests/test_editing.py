"""Edits of words with a scratchpad: every line is right, held-out ones are apart."""

import json
import runpy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from diffdistill.bundled import bundled
from diffdistill.evaluation.arithmetic import distinct
from diffdistill.evaluation.editing import ALPHABET, LEVELS, Edit, edits, is_held_out, read_question
from diffdistill.rewards.boxed import Boxed
from diffdistill.types import Example
from tests.conftest import CPU

FILES = ("editing-train", "editing-held-out")


def expected(edit: Edit, count: int) -> str:
    """Return what is written after so many letters, by a rule for the whole of them."""
    part = edit.word[:count]
    if edit.operation == "rev":
        return part[::-1]
    if edit.operation == "sort":
        return "".join(letter * part.count(letter) for letter in ALPHABET)
    first = edit.given[0]
    by = edit.given[1:]
    return "".join(by if letter == first else letter for letter in part)


def check(edit: Edit) -> None:
    *lines, last = edit.solution.splitlines()
    size = len(edit.word)
    wanted = [f"{edit.word[i]}:{expected(edit, i + 1)}" for i in range(size)]
    assert lines == wanted
    assert last == f"\\boxed{{{expected(edit, size)}}}"
    assert edit.answer == expected(edit, size)


@pytest.mark.parametrize("level", LEVELS)
def test_every_line_of_a_scratchpad_is_right(level: str) -> None:
    for edit in islice(edits(3, levels=(level,)), 300):
        assert edit.level == level
        assert set(edit.given) <= set(ALPHABET)
        assert edit.given[:1] in edit.word
        assert edit.answer
        check(edit)


def test_a_word_is_edited_as_the_documentation_shows() -> None:
    assert Edit("rev", "", "bad").solution == "b:b\na:ab\nd:dab\n\\boxed{dab}"
    assert Edit("del", "a", "bad").solution == "b:b\na:b\nd:bd\n\\boxed{bd}"
    assert Edit("rep", "ac", "bad").solution == "b:b\na:bc\nd:bcd\n\\boxed{bcd}"
    assert Edit("sort", "", "bad").solution == "b:b\na:ab\nd:abd\n\\boxed{abd}"
    assert Edit("rep", "ac", "bad").question == "rep a c bad box"


def test_an_answer_is_short_and_the_reward_accepts_it_alone() -> None:
    judge = Boxed(device=CPU)
    for edit in islice(edits(1), 300):
        assert len(edit.solution) < 60
        right = Example(edit.question, answer=edit.answer)
        wrong = right._replace(answer=edit.answer + "a")
        assert judge.score([edit.solution] * 2, [right, wrong]).tolist() == [1.0, 0.0]


def test_edits_depend_on_the_seed_and_levels_come_alike() -> None:
    first, again, other = (list(islice(edits(seed), 800)) for seed in (0, 0, 1))
    assert first == again != other
    assert all(sum(edit.level == level for edit in first) == 100 for level in LEVELS)
    assert not any(map(is_held_out, first))
    assert all(is_held_out(edit) for edit in islice(edits(0, held_out=True), 200))
    share = sum(map(is_held_out, distinct(_any(), 4000))) / 4000
    assert share == pytest.approx(1 / 9, abs=0.02)


def _any() -> Any:
    for a in ALPHABET:
        for b in ALPHABET:
            for c in ALPHABET:
                for d in ALPHABET:
                    yield Edit("rev", "", a + b + c + d)


def test_a_question_is_read_back() -> None:
    for edit in islice(edits(2), 200):
        assert read_question(edit.question) == edit


def test_the_rows_that_ship_are_right_apart_and_what_the_script_makes() -> None:
    file = Path(__file__).parents[1] / "scripts" / "make_editing_data.py"
    script = runpy.run_path(str(file), run_name="script")
    assert set(script["FILES"]) == set(FILES)
    asked: list[set[str]] = []
    for name in FILES:
        lines = bundled("data", f"{name}.jsonl").read_text().splitlines(True)
        assert script["rows"](name) == lines
        rows = [json.loads(line) for line in lines]
        found = [read_question(row["messages"][0]["content"]) for row in rows]
        assert [edit.row() for edit in found] == rows
        assert {edit.level for edit in found} == set(LEVELS)
        for edit in found:
            check(edit)
        asked.append({edit.question for edit in found})
        assert len(asked[-1]) == len(rows)
    assert not asked[0] & asked[1]

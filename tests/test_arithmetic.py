"""Sums and products with a scratchpad: every step is right, held-out problems are apart."""

import json
import re
import runpy
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest

from diffdistill.bundled import bundled
from diffdistill.evaluation.arithmetic import (
    FORMATS,
    LEVELS,
    Problem,
    distinct,
    final_line,
    is_held_out,
    problems,
    read_question,
    worded,
)
from diffdistill.rewards.boxed import Boxed
from diffdistill.rewards.json_answer import JsonAnswer
from diffdistill.types import Example
from tests.conftest import CPU

FILES = [f"arithmetic-{name}" for name in ("train", "held-out", "json-train", "json-held-out")]


def digit(number: int, place: int) -> int:
    return number // 10**place % 10


def expected_terms(problem: Problem) -> list[tuple[int, ...]]:
    """Return the numbers of each line by closed forms: carries are quotients of whole numbers."""
    first, second = problem.first, problem.second
    places = range(len(str(first)))
    if problem.operator == "+":
        carries = [(first % 10**k + second % 10**k) // 10**k for k in places]
        return [(digit(first, k), digit(second, k), carries[k]) for k in places]
    low, high = second % 10, second // 10
    carries = [first % 10**k * low // 10**k for k in places]
    lines = [(digit(first, k), low, carries[k]) for k in places]
    if second >= 10:
        shown = first * low // 10  # what is written from the second column on
        for k in places:
            carry = (first % 10**k * high + shown % 10**k) // 10**k
            lines.append((digit(first, k), high, digit(shown, k), carry))
    return lines


def check_steps(problem: Problem) -> None:
    terms = expected_terms(problem)
    assert len(problem.steps) == len(terms)
    for line, numbers in zip(problem.steps, terms, strict=True):
        pattern = (
            r"(\d)\+(\d)\+(\d)=(\d\d)" if problem.operator == "+" else r"(\d)\*(\d)(.*)=(\d\d)"
        )
        found = re.fullmatch(pattern, line)
        assert found is not None, line
        text, _, result = line.partition("=")
        assert tuple(int(number) for number in re.findall(r"\d", text)) == numbers
        assert eval(text) == int(result)


def check_answer_is_what_is_written(problem: Problem) -> None:
    """Read the answer off the scratchpad: last digits, the highest carry in front."""
    results = [line.partition("=")[2] for line in problem.steps]
    size = len(str(problem.first))
    lowest = [results[0]] if len(results) > size else []
    top = results[-size:]
    written = top[-1][0] + "".join(result[1] for result in reversed([*lowest, *top]))
    assert int(written) == int(problem.answer)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("style", FORMATS)
def test_every_line_of_a_scratchpad_is_right(level: str, style: Any) -> None:
    for problem in islice(problems(3, formats=(style,), levels=(level,)), 300):
        assert (problem.level, problem.format) == (level, style)
        check_steps(problem)
        check_answer_is_what_is_written(problem)
        value = eval(f"{problem.first}{problem.operator}{problem.second}")
        assert int(problem.answer) == value
        assert problem.solution.splitlines() == [*problem.steps, problem.last_line]


def test_the_extremes_fit_in_two_digits_a_step() -> None:
    for second in (1000, 1001, 9999):
        check_steps(Problem(9999, "+", second))
    for first, second in product((100, 101, 199, 900, 999), (2, 9, 10, 19, 90, 99)):
        problem = Problem(first, "*", second)
        check_steps(problem)
        check_answer_is_what_is_written(problem)
    assert Problem(999, "*", 99).steps[-1] == "9*9+8+9=98"


def test_an_answer_is_short() -> None:
    longest = max(len(problem.solution) for problem in islice(problems(0), 3000))
    assert 60 < longest < 90


def test_the_answer_is_what_the_rewards_accept() -> None:
    judges = {"box": Boxed(device=CPU), "json": JsonAnswer(device=CPU)}
    for problem in islice(problems(1), 200):
        right = Example(problem.question, answer=problem.answer)
        wrong = right._replace(answer=str(int(problem.answer) + 1))
        for style, judge in judges.items():
            scores = judge.score([problem.solution] * 2, [right, wrong])
            assert scores.tolist() == [float(style == problem.format), 0.0]
    with pytest.raises(json.JSONDecodeError):
        json.loads(final_line("12", "box"))
    assert json.loads(final_line("12", "json")) == {"answer": 12}


def test_a_problem_is_held_out_by_its_numbers_in_any_order_and_format() -> None:
    for problem in islice(problems(5), 300):
        other = problem._replace(first=problem.second, second=problem.first)
        for style in FORMATS:
            assert is_held_out(problem._replace(format=style)) == is_held_out(problem) is False
            assert is_held_out(other._replace(format=style)) is False
    assert all(is_held_out(problem) for problem in islice(problems(5, held_out=True), 300))
    pairs = [Problem(first, "+", second) for first in range(10, 100) for second in range(10, 100)]
    share = sum(map(is_held_out, pairs)) / len(pairs)
    assert share == pytest.approx(1 / 9, abs=0.02)
    assert any(is_held_out(pair) != is_held_out(pair._replace(operator="*")) for pair in pairs)


def test_problems_depend_on_the_seed_and_nothing_else_and_levels_come_alike() -> None:
    first, again, other = (list(islice(problems(seed), 900)) for seed in (0, 0, 1))
    assert first == again != other
    assert all(sum(problem.level == level for problem in first) == 100 for level in LEVELS)
    boxed = sum(problem.format == "box" for problem in first)
    assert 390 < boxed < 510
    assert len(set(distinct(problems(0, levels=("mul-2x1",)), 500))) == 500


def test_a_scratchpad_in_words_has_the_same_numbers_and_no_sign() -> None:
    assert worded("8+4+0=12\n7*2+8+0=22\n") == (
        "8 and 4 and 0 make 12\n7 times 2 and 8 and 0 make 22\n"
    )
    seen = set()
    for problem in islice(problems(2), 200):
        text = worded(problem.solution)
        assert re.findall(r"\d+", text) == re.findall(r"\d+", problem.solution)
        assert not set("+*=") & set(text)
        assert text.split("\n")[-1] == problem.last_line
        seen.add(text)
    assert len(seen) > 150


def test_a_question_is_read_back() -> None:
    for problem in islice(problems(2), 100):
        assert read_question(problem.question) == problem


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            json.loads(line) for line in bundled("data", f"{name}.jsonl").read_text().splitlines()
        ]
        for name in FILES
    }


def test_the_rows_that_ship_are_right_and_none_of_the_held_out_ones_is_for_training(
    shipped: dict[str, list[dict[str, Any]]],
) -> None:
    numbers: dict[bool, set[tuple[Any, ...]]] = {False: set(), True: set()}
    for name, rows in shipped.items():
        assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
        for row in rows:
            problem = read_question(row["messages"][0]["content"])
            assert row == problem.row()
            assert problem.format == ("json" if "json" in name else "box")
            numbers["held-out" in name].add(
                (problem.operator, *sorted((problem.first, problem.second)))
            )
            check_steps(problem)
        assert {read_question(row["messages"][0]["content"]).level for row in rows} == set(LEVELS)
    assert not numbers[False] & numbers[True]


def test_the_rows_that_ship_are_what_the_script_makes(
    shipped: dict[str, list[dict[str, Any]]],
) -> None:
    script = runpy.run_path(
        str(Path(__file__).parents[1] / "scripts" / "make_arithmetic_data.py"), run_name="script"
    )
    assert set(script["FILES"]) == set(FILES)
    for name in FILES:
        assert script["rows"](name) == bundled("data", f"{name}.jsonl").read_text().splitlines(True)

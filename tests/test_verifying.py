r"""Verifiable rewards: which final answers are right, and which texts break the format."""

import json
import time
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from diffdistill import catalog
from diffdistill.errors import UserError
from diffdistill.options import options_model
from diffdistill.rewards.boxed import Boxed
from diffdistill.rewards.json_answer import JsonAnswer
from diffdistill.types import Example
from diffdistill.verifying import AnswerReward, equal, normalized
from tests.conftest import CPU

EXAMPLE = Example("478+694", answer="1172", origin="data.jsonl:3")

BOXED = {
    # text: (right, in the format)
    r"\boxed{1172}": (True, True),
    "8+4+0=12\n" + r"\boxed{ 1,172 }" + "\n": (True, True),
    r"so \boxed{+01172}.": (True, True),
    r"first \boxed{1171}, no: \boxed{1172}": (True, True),
    r"first \boxed{1172}, no: \boxed{1171}": (False, True),
    r"\boxed{1172.0}": (False, True),
    r"\boxed{{1172}}": (False, True),
    r"\boxed{11 72}": (False, True),
    r"\boxed{1172": (False, False),
    r"\boxed{1172} or \boxed{1172": (False, False),
    r"\boxed{}": (False, False),
    r"\boxed{ }": (False, False),
    "1172": (False, False),
    "boxed{1172}": (False, False),
    r"\boxed 1172": (False, False),
    "": (False, False),
}

JSON = {
    '{"answer": 1172}': (True, True),
    '8+4+0=12\n{"answer": 1172}\n': (True, True),
    'The answer is { "answer" : "1,172" }': (True, True),
    '{"reason": {"carry": [1, 1]}, "answer": 1172}': (True, True),
    r'\frac{1}{2} and {"x": 1}, so {"answer": 1172}': (True, True),
    '{"answer": 1171}': (False, True),
    '{"answer": 1172.0}': (False, True),
    '{"answer": 1e3}': (False, True),
    '{"answer": 01172}': (False, False),
    '{"answer": +1172}': (False, False),
    '{"answer": 1172}.': (False, False),
    '{"answer": 1172}}': (False, False),
    '{"answer": 1172} {"answer": 1172}': (False, False),
    '{"answer": 1171, "answer": 1172}': (False, False),
    '{"x": {"answer": 1172}': (False, False),
    '{"x": {"answer": 1172}}': (False, False),
    '[{"answer": 1172}]': (False, False),
    '{"answer": NaN}': (False, False),
    '{"answer": -Infinity}': (False, False),
    '{"answer": true}': (False, False),
    '{"answer": null}': (False, False),
    '{"answer": [1172]}': (False, False),
    '{"answer": ""}': (False, False),
    "{'answer': 1172}": (False, False),
    "{answer: 1172}": (False, False),
    '{"answer": 1172,}': (False, False),
    '{"Answer": 1172}': (False, False),
    '{"answer": 1172': (False, False),
    '"answer": 1172}': (False, False),
    r"\boxed{1172}": (False, False),
    "1172": (False, False),
    "": (False, False),
}


@pytest.mark.parametrize(("reward", "table"), [(Boxed, BOXED), (JsonAnswer, JSON)])
def test_right_answers_are_one_and_others_nothing(
    reward: type[AnswerReward], table: dict[str, tuple[bool, bool]]
) -> None:
    judge, texts = reward(device=CPU), list(table)
    scores, parsed = judge.score(texts, [EXAMPLE] * len(texts)), judge.parses(texts)
    assert (scores.dtype, parsed.dtype) == (torch.float32, torch.bool)
    found = zip(scores.tolist(), parsed.tolist(), strict=True)
    assert dict(zip(texts, found, strict=True)) == table


@pytest.mark.parametrize(("reward", "table"), [(Boxed, BOXED), (JsonAnswer, JSON)])
def test_a_wrong_answer_in_the_format_gets_the_share_of_the_format(
    reward: type[Boxed] | type[JsonAnswer], table: dict[str, tuple[bool, bool]]
) -> None:
    scores = reward(device=CPU, format_reward=0.25).score(list(table), [EXAMPLE] * len(table))
    expected = [1.0 if right else 0.25 * kept for right, kept in table.values()]
    assert scores.tolist() == expected
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=rf"{reward.__name__}: format_reward must be in"):
            reward(device=CPU, format_reward=share)


@pytest.mark.parametrize("text", [text for text, (_, kept) in JSON.items() if kept])
def test_the_value_is_the_one_that_the_plain_json_module_reads(text: str) -> None:
    found = []
    for place, character in enumerate(text):
        if character == "{":
            with suppress(json.JSONDecodeError):
                found.append(json.loads(text[place:]))
    value = JsonAnswer(device=CPU).final(text)
    assert value is not None
    assert Decimal(value.replace(",", "")) == Decimal(str(found[0]["answer"]).replace(",", ""))


def test_the_key_of_the_json_object_is_an_option() -> None:
    judge = JsonAnswer(device=CPU, key="result")
    texts = ['{"result": 1172}', '{"answer": 1172}', '{"answer": 1, "result": 1172}']
    assert judge.score(texts, [EXAMPLE] * 3).tolist() == [1, 0, 1]


def test_each_answer_is_compared_with_its_own_example() -> None:
    examples = [Example("", answer=answer) for answer in ("1", "2", "x+1", "-3")]
    texts = [r"\boxed{1}", r"\boxed{1}", r"\boxed{ x+1 }", r"\boxed{-03}"]
    assert Boxed(device=CPU).score(texts, examples).tolist() == [1, 0, 1, 1]
    with pytest.raises(ValueError, match="zip"):
        Boxed(device=CPU).score(texts[:3], examples)


def test_an_example_without_an_answer_is_named() -> None:
    for answer in (None, " "):
        with pytest.raises(UserError, match=r"^data.jsonl:3: there is no answer to verify by"):
            Boxed(device=CPU).score([r"\boxed{1}"], [EXAMPLE._replace(answer=answer)])
    with pytest.raises(UserError, match=r"^the question '1\+1': there is no answer"):
        Boxed(device=CPU).score([r"\boxed{1}"], [Example("1+1")])
    assert Boxed(device=CPU).parses([r"\boxed{1}"]).tolist() == [True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 007 ", "7"),
        ("+7", "7"),
        ("-07", "-7"),
        ("-0", "0"),
        ("000", "0"),
        ("100", "100"),
        ("1,234,567", "1234567"),
        ("-1,234.50", "-1234.50"),
        ("0,123", "123"),
        ("1,23", "1,23"),
        ("12,345,67", "12,345,67"),
        ("1234,567", "1234,567"),
        ("0.50", "0.50"),
        ("x+01", "x+01"),
        ("\u0661\u0662", "\u0661\u0662"),
    ],
)
def test_only_how_whole_numbers_are_written_is_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected
    assert normalized(expected) == expected


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("0.5", ".50", True),
        ("0.5", "1/2", True),
        ("5e-1", "1/2", True),
        ("1,000.0", "1e3", True),
        ("+2/4", "0.50", True),
        ("1/3", "0.333333333333333333", False),
        ("0.1", "0.10000000000000001", False),
        ("1/0", "1/0", True),
        ("1/0", "1e9", False),
        ("x", "y", False),
        ("nan", "inf", False),
        ("1_0", "10", False),
    ],
)
def test_numbers_are_compared_by_value_exactly_and_only_if_wanted(
    first: str, second: str, same: bool
) -> None:
    assert equal(first, second, numeric=True) == same == equal(second, first, numeric=True)
    assert equal(first, second) == (first == second)
    judge = Boxed(device=CPU, numeric=True)
    assert judge.score([rf"\boxed{{{first}}}"], [Example("", answer=second)]).item() == same


def test_numbers_too_long_to_compute_with_cost_no_time() -> None:
    start = time.perf_counter()
    digits = "9" * 100_000
    assert not equal("1e999999999", "1", numeric=True)
    assert not equal(digits, digits[1:], numeric=True)
    assert equal("0" + digits, digits)
    texts = [rf"\boxed{{{digits}}}", "{" * 20_000, '{"a":' * 20_000]
    assert Boxed(device=CPU, numeric=True).score(texts, [EXAMPLE] * 3).tolist() == [0, 0, 0]
    texts[0] = json.dumps({"answer": digits})
    assert JsonAnswer(device=CPU).score(texts, [EXAMPLE] * 3).tolist() == [0, 0, 0]
    assert JsonAnswer(device=CPU).parses(texts).tolist() == [True, False, False]
    assert time.perf_counter() - start < 5
    assert equal(str(10**300), "1e300", numeric=True)
    assert Fraction(10) ** 300 == Fraction("1e300")


def test_the_catalog_knows_them_and_their_options() -> None:
    for name, kind in {"boxed": Boxed, "json-answer": JsonAnswer}.items():
        assert catalog.load("reward", name) is kind
        options = set(options_model(kind).model_fields)
        assert options == {"format_reward", "numeric"} | ({"key"} if kind is JsonAnswer else set())

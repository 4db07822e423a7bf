"""The builder of the bundled arithmetic models: what they learn from, and when that ends."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffdistill.evaluation.arithmetic import (
    LEVELS,
    is_held_out,
    problems,
    read_question,
    worded,
)
from diffdistill.pipelines.block_diffusion import chat_tokens
from diffdistill.pipelines.byte_spans import Speller
from diffdistill.pipelines.chats import chat_row, read_chat
from diffdistill.rewards.boxed import Boxed
from diffdistill.rewards.json_answer import JsonAnswer
from tests.conftest import CPU

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def builder() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))  # scripts import each other by name
    yield importlib.import_module("build_arithmetic_models")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tiny(builder: ModuleType) -> Any:
    return replace(
        builder.RECIPES["student"],
        hidden=32,
        layers=1,
        heads=1,
        inner=16,
        steps=3,
        measure_every=1,
        tokens=512,
        pool=60,
        checked=4,
    )


def test_every_byte_is_a_token_and_every_text_comes_back(builder: ModuleType) -> None:
    tokenizer = builder.build_tokenizer()
    text = '8+4+0=12\n{"answer": 9022} \\boxed{\u00e9\u4e2d} <br>  x'
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 256 + len(builder.SPECIALS)
    assert [tokenizer.decode([i]) for i in range(5)] == builder.SPECIALS


def test_a_question_is_how_the_chat_with_its_answer_begins(builder: ModuleType) -> None:
    tokenizer = builder.build_tokenizer()
    for problem in islice(problems(0), 20):
        question = {"role": "user", "content": problem.question}
        answer = {"role": "assistant", "content": problem.solution}
        prompt = tokenizer(builder.prompts_of([problem.question], tokenizer))["input_ids"][0]
        assert prompt == chat_tokens(tokenizer, [question])
        told = chat_tokens(tokenizer, [question, answer], answer=False)
        ends = tokenizer(problem.solution + tokenizer.eos_token)["input_ids"]
        assert told == prompt + ends
        assert len(ends) < builder.MAX_TOKENS
        row = chat_row(read_chat(Speller(tokenizer), [question, answer]), turns="last")
        assert sum(row.maskable) == len(ends)


def test_lessons_are_of_problems_for_training_and_as_often_malformed_as_the_recipe_says(
    builder: ModuleType, tiny: Any
) -> None:
    recipe = replace(tiny, pool=2000, malformed=0.4, revealed=0.3)
    boxed, strict = Boxed(device=CPU), JsonAnswer(device=CPU)
    counts = {"shown": 0, "json": 0, "malformed": 0}
    endings = set()
    for question, answer, begun in builder.lessons(recipe):
        assert begun == ""
        first, _, shown = question.partition("\n")
        problem = read_question(first)
        assert not is_held_out(problem)
        judge = strict if problem.format == "json" else boxed
        fine = bool(judge.parses([answer]).item())
        counts["shown"] += bool(shown)
        if problem.format == "json" and not shown:
            counts["json"] += 1
            counts["malformed"] += not fine
        else:
            assert fine
        if fine:
            assert answer == problem.solution
            given = shown.splitlines()[-1:] or [problem.answer]
            assert given[0] in (problem.answer, problem.last_line)
            assert answer.startswith("\n".join(shown.splitlines()[:-1]))
        else:
            assert answer.splitlines()[:-1] == problem.steps
            endings.add(answer.splitlines()[-1].replace(problem.answer, "N"))
    assert counts["shown"] / 2000 == pytest.approx(0.3, abs=0.04)
    assert counts["malformed"] / counts["json"] == pytest.approx(0.4, abs=0.06)
    assert endings == {"{answer: N}", "{'answer': N}", '{"answer": N', '{"answer": N}.'}


def test_an_answer_in_words_may_be_begun_in_signs_and_goes_on_in_words_from_the_next_line(
    builder: ModuleType, tiny: Any
) -> None:
    recipe = replace(tiny, pool=900, malformed=0.0, revealed=0.0, style="words", begun=0.3)
    lessons = list(builder.lessons(recipe))
    begun = [lesson for lesson in lessons if lesson.given]
    assert len(begun) / 900 == pytest.approx(0.3, abs=0.05)
    for question, answer, given in lessons:
        problem = read_question(question)
        assert problem.solution.startswith(given)
        line, _, later = answer.partition("\n")
        rest = problem.solution[len(given) :].partition("\n")[2]
        if given:
            assert (given + line).split("\n") == problem.steps[: given.count("\n") + 1]
            assert later == worded(rest)
        else:
            assert answer == worded(problem.solution)
        assert answer.endswith(problem.last_line)
        assert len(answer) < recipe.max_tokens
    assert any(lesson.answer.startswith("\n") for lesson in begun)


def test_what_is_shown_grows_with_exposure_and_always_has_the_answer(builder: ModuleType) -> None:
    for problem in islice(problems(1), 30):
        shown = [builder.asked(problem, exposure) for exposure in builder.EXPOSURES]
        assert shown[0].startswith(f"{problem.question}\n")
        assert shown[-1] == f"{problem.question}\n{problem.solution}"
        assert all(problem.answer in text for text in shown)
        lines = [len(text.splitlines()) for text in shown]
        assert lines == sorted(lines)
        assert lines[0] == 2
        assert builder.asked(problem) == problem.question


@pytest.mark.parametrize("style", ["signs", "words"])
def test_only_the_tokens_of_answers_count(builder: ModuleType, tiny: Any, style: Any) -> None:
    tiny = replace(tiny, style=style)
    tokenizer = builder.build_tokenizer()
    network = builder.build_network(tiny, tokenizer).eval()
    lengths = []
    pairs = list(builder.lessons(tiny))
    for question, answer, given in pairs:
        prompt = builder.prompts_of([question], tokenizer)[0] + given
        lengths.append(len(tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]))
    numbers = next(iter(builder.Rows(lengths, tiny.tokens // builder.GROUPS, tiny.seed + 3)))
    nats, count = 0.0, 0
    for question, answer, given in (pairs[number] for number in numbers):
        prompt = builder.prompts_of([question], tokenizer)[0] + given
        ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
        start = len(ids) - len(answer) - 1
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        nats += functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum").item()
        count += len(answer) + 1
    loss = next(builder.losses(network, tokenizer, tiny, pairs))
    assert loss.item() == pytest.approx(nats / count, rel=1e-4)


def test_an_answer_is_right_in_the_format_of_its_question(builder: ModuleType) -> None:
    chosen = list(islice(problems(2), 40))
    swapped = [p._replace(format="json" if p.format == "box" else "box") for p in chosen]
    assert builder.right([p.solution for p in chosen], chosen) == [1.0] * 40
    assert builder.right([p.solution for p in swapped], chosen) == [0.0] * 40
    assert {p.format for p in chosen} == {"box", "json"}


@pytest.mark.parametrize(("goal", "steps"), [(0.0, 1), (1.1, 3)])
def test_training_ends_at_the_goal_or_after_all_steps(
    builder: ModuleType,
    tiny: Any,
    goal: float,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(builder, "MAX_TOKENS", 4)
    recipe = replace(tiny, goal=goal)
    skills = {"sums": builder.arithmetic(recipe)}
    network, taken, accuracy = builder.train("x", recipe, builder.build_tokenizer(), skills)
    assert (taken, accuracy) == (steps, 0.0)
    assert len(capsys.readouterr().out.splitlines()) == steps
    fresh = builder.build_network(recipe, builder.build_tokenizer())
    assert not torch.equal(network.lm_head.weight, fresh.lm_head.weight)


def test_a_model_is_built_saved_measured_and_described(
    builder: ModuleType, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "MAX_TOKENS", 4)
    monkeypatch.setattr(builder, "EXPOSURES", (0.5,))
    for part in builder.PARTS:
        style = builder.RECIPES[part].style
        recipe = replace(tiny, steps=1, style=style, revealed=0.0 if style == "words" else 0.3)
        assert part in builder.build(part, tmp_path, recipe, 9)
    spoken = set()
    for part in builder.PARTS:
        folder = tmp_path / f"arithmetic-{part}"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        network = AutoModelForCausalLM.from_pretrained(folder)
        assert network.dtype == torch.float16
        assert tokenizer.chat_template == builder.TEMPLATE
        spoken.add(json.dumps(tokenizer.get_vocab(), sort_keys=True))
        texts, sizes = builder.written(
            network.float(), tokenizer, ["1+1 box"] * 2, seed=None, max_tokens=4
        )
        assert texts[0] == texts[1]
        assert max(sizes) <= 4
        ended = builder.written(network, tokenizer, ["1+1 box"], ["1+1"], seed=None, max_tokens=4)
        assert ended != builder.written(
            network, tokenizer, ["1+1 box"], ["8+7"], seed=None, max_tokens=4
        )
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert all(f"| {level} |" in card for level in (*LEVELS, "all"))
        assert "{" not in card.replace("\\boxed{", "")
        assert ("| json, exposure 0.5 |" in card) == (part != "words-teacher")
        assert ("| json, begun in signs |" in card) == (part == "words-teacher")
    assert len(spoken) == 1


def test_all_models_fit_in_fifteen_megabytes(builder: ModuleType) -> None:
    tokenizer = builder.build_tokenizer()
    student, words_teacher, teacher = (
        sum(w.numel() for w in builder.build_network(builder.RECIPES[part], tokenizer).parameters())
        for part in ("student", "words-teacher", "teacher")
    )
    assert student < words_teacher < teacher
    assert 2 * words_teacher < 3e6
    assert 3 * student < teacher
    assert 2 * (student + words_teacher + teacher) < 14e6
    goals = [builder.RECIPES[part].goal for part in ("student", "words-teacher")]
    assert 0.2 < goals[0] < 0.5 < goals[1] < 1

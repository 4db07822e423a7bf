"""Questions: how they are read from data, put to student and teacher, and answered."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from diffdistill.data.questions import read_questions
from diffdistill.data.settings import TEACHER_PROMPT, DataSettings
from diffdistill.data.texts import open_texts
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.questions import Asking, Questions, context_length, filled
from diffdistill.projection import dense
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Role
from diffdistill.rollouts import Sampling
from diffdistill.types import Batch, Example
from tests.answer_run import ROWS, make_questions, save_answer_world, write_questions
from tests.conftest import CPU
from tests.tiny_text import causal_lm


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_world(tmp_path_factory.mktemp("answers"))


def examples_of(file: Path, **settings: Any) -> list[Example]:
    data = DataSettings(path=str(file), **settings)
    dataset = open_texts(data, read=read_questions)
    return [dataset[index] for index in range(len(dataset))]


def batch_of(family: Questions, world: Path, ids: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    examples = examples_of(world / "questions.jsonl")
    return family.collate([examples[index % len(examples)] for index in ids], ids)


def written(family: CausalLM, tokens: list[int]) -> str:
    text: str = family.tokenizer.decode(tokens)
    return text


# data


def test_a_chat_is_its_question_and_what_the_assistant_ends_it_with_the_solution(
    tmp_path: Path,
) -> None:
    first, second, third, fourth = examples_of(write_questions(tmp_path / "q.jsonl"))
    assert first.messages == ({"role": "user", "content": "2+2?"},)
    assert (first.prompt, first.answer) == ("2+2?", "4")
    assert first.solution == ROWS[0]["solution"]
    assert second.messages is not None
    assert [m["role"] for m in second.messages] == ["system", "user", "assistant", "user"]
    assert second.prompt == "what is 3+5, and why?"
    assert second.solution == "3+5 is 8 because 5+3 is.\n\\boxed{8}"
    assert second.answer == "8"
    assert third.messages == ({"role": "user", "content": "1+1?"},)
    assert fourth.origin.endswith("q.jsonl:4")


def test_the_files_beside_written_data_are_none_of_its_questions(tmp_path: Path) -> None:
    file = write_questions(tmp_path / "data.jsonl")
    alone = examples_of(file)
    (tmp_path / "data-about.json").write_text('{"seed": 0}', encoding="utf-8")
    (tmp_path / "data-failed.jsonl").write_text('{"number": 3, "tries": 6}\n', encoding="utf-8")
    assert examples_of(tmp_path) == alone
    write_questions(tmp_path / "others-failed.jsonl")  # beside no others.jsonl: data as any
    assert len(examples_of(tmp_path)) == 2 * len(alone)


def test_columns_are_named_by_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    row = {"problem": "why?", "worked": "so", "final": "x", "solution": "no", "answer": "no"}
    file.write_text(json.dumps(row))
    columns = {"solution_column": "worked", "answer_column": "final"}
    [found] = examples_of(file, prompt_column="problem", **columns)
    assert (found.prompt, found.solution, found.answer) == ("why?", "so", "x")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"q": "why?"}, {}, r"q\.jsonl:1: missing question: .*neither 'messages' nor 'text'.*data"),
        ({"text": "why?"}, {"solution_column": "s"}, r"missing solution: there is no 's' in \["),
        ({"text": "why?"}, {"answer_column": "a"}, "missing answer: there is no 'a'"),
        ({"text": "why?", "solution": 3}, {}, "malformed solution: 'solution' is not text: 3"),
        ({"text": "why?", "answer": " "}, {}, "empty answer: 'answer' is empty"),
        ({"text": " "}, {}, "empty question"),
        ({"messages": [{"role": "user", "content": ""}]}, {}, "empty question"),
        ({"messages": [{"role": "assistant", "content": "so"}]}, {}, "no question: .*nothing"),
        (
            {"messages": [{"role": "system", "content": "so"}]}, {},
            "no question: .*a message of 'system'",
        ),
        ({"messages": "why?"}, {}, "malformed chat"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_question_is_an_error_that_says_where_and_why(
    row: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        examples_of(file, **settings)


# prompts


def test_the_student_is_asked_in_its_template_up_to_its_answer(world: Path) -> None:
    family = make_questions(world, student_prompt="Solve {question} in {} steps.")
    examples = examples_of(world / "questions.jsonl")
    assert written(family.student, family.prompt(examples[0])) == (
        "<|start|>user\nSolve 2+2? in {} steps.<|end|>\n<|start|>assistant\n"
    )
    assert written(family.student, family.prompt(examples[1])) == (
        "<|start|>system\nadd<|end|>\n<|start|>user\nhello<|end|>\n"
        "<|start|>assistant\nyes?<|end|>\n"
        "<|start|>user\nSolve what is 3+5, and why? in {} steps.<|end|>\n<|start|>assistant\n"
    )


def test_a_teacher_without_privilege_is_asked_the_same_in_its_own_template(world: Path) -> None:
    family = make_questions(world, "brackets")
    example = examples_of(world / "questions.jsonl")[0]
    assert isinstance(family.teacher, CausalLM)
    assert (
        written(family.teacher, family.prompt(example, reader="teacher")) == "[user] 2+2? [/user] "
    )
    same = make_questions(world)
    assert same.prompt(example, reader="teacher") == same.prompt(example)


def test_a_teacher_is_shown_the_share_of_the_solution_and_always_its_answer(world: Path) -> None:
    family = make_questions(
        world,
        student_prompt="{question}!",
        teacher_prompt="{student_prompt} {question} <{solution}>",
    )
    example = examples_of(world / "questions.jsonl")[0]
    shown = [
        written(family.student, family.prompt(example, reader="teacher", exposure=exposure))
        for exposure in (0.0, 0.5, 1.0)
    ]
    assert "2+2?! 2+2? <\\boxed{4}>" in shown[0]
    assert "<2+2 is 1+1+2.\n\\boxed{4}>" in shown[1]
    assert f"<{example.solution}>" in shown[2]


def test_what_is_put_into_a_template_is_not_filled_again() -> None:
    template = "{student_prompt}|{question}|{solution}"
    parts = {"question": "{solution}", "student_prompt": "{question}", "solution": "{question}"}
    assert filled(template, parts) == "{question}|{solution}|{question}"


def test_the_default_prompt_of_a_teacher_holds_question_and_solution(world: Path) -> None:
    family = make_questions(world, student_prompt="{question} box", teacher_prompt=TEACHER_PROMPT)
    example = examples_of(world / "questions.jsonl")[0]
    text = written(family.student, family.prompt(example, reader="teacher", exposure=1.0))
    assert text.startswith("<|start|>user\n2+2? box\n\n")
    assert f"--- solution begins ---\n{example.solution}\n--- solution ends ---" in text


THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined %}{{ 'think' if enable_thinking else 'no' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (None, None, ("", "")),
        (False, None, ("no", "no")),
        (False, True, ("no", "think")),
        (None, False, ("", "no")),
    ],
)
def test_templates_are_told_whether_to_think(
    student: bool | None, teacher: bool | None, expected: tuple[str, str], world: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    file = tmp_path / "template.jinja"
    file.write_text(THINKING)
    one = CausalLM(path=str(world / "student"), device=CPU, chat_template=str(file))
    family = Questions(one, one, Asking(student_thinking=student, teacher_thinking=teacher))
    example = examples_of(world / "questions.jsonl")[0]
    ours, theirs = (written(one, family.prompt(example, reader=r)) for r in ("student", "teacher"))
    assert (ours, theirs) == ("2+2?" + expected[0], "2+2?" + expected[1])


def test_without_a_template_a_question_is_a_text_to_go_on_with(world: Path) -> None:
    family = make_questions(world, student_prompt="Q: {question}\nA:")
    family.student.tokenizer.chat_template = None
    first, chat, *_ = examples_of(world / "questions.jsonl")
    assert written(family.student, family.prompt(first)) == "Q: 2+2?\nA:"
    assert family.student.end_ids == [family.student.eos_id]
    with pytest.raises(UserError, match=r"jsonl:2: the tokenizer of .* has no chat template, and"):
        family.prompt(chat)


def test_a_prompt_that_is_too_long_is_an_error_that_says_whose_it_is(world: Path) -> None:
    family = make_questions(world, max_prompt=30)
    example = examples_of(world / "questions.jsonl")[0]
    assert len(family.prompt(example)) <= 30
    with pytest.raises(
        UserError,
        match=r"jsonl:1: the teacher's prompt with a share 1 of the solution has \d+ tokens, and "
        "data.max_prompt is 30",
    ):
        family.condition(family.collate([example], [0]), reader="teacher", exposure=1.0)


def test_a_solution_that_is_not_there_cannot_be_shown_or_given(world: Path) -> None:
    family = make_questions(world)
    example = Example("why?", messages=({"role": "user", "content": "why?"},), origin="here:7")
    batch = family.collate([example], [0])
    wanted = r"here:7: there is no reference solution to show or to learn: add a column 'solution'"
    with pytest.raises(UserError, match=wanted):
        family.condition(batch, reader="teacher", exposure=0.0)
    with pytest.raises(UserError, match=wanted):
        family.given(batch)
    family.condition(batch, reader="teacher")  # nothing is shown


def test_questions_that_cannot_be_used_are_left_out_where_that_is_wanted(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = Example("why?", messages=({"role": "user", "content": "why?"},), origin="here:7")
    strict, lenient = (make_questions(world, skip=skip) for skip in (False, True))
    for uses in ("shown", "learned"):
        with pytest.raises(UserError, match="here:7: there is no reference solution"):
            strict.usable(bare, solutions=uses)
        assert not lenient.usable(bare, solutions=uses)
    assert lenient.usable(bare)
    lenient.release()
    assert "left out 2 questions that cannot be used, such as here:7" in caplog.text


@pytest.mark.parametrize(
    ("asking", "message"),
    [
        ({"student_prompt": "why?"}, r"student_prompt must have \{question\}, and neither"),
        ({"student_prompt": "{question} {solution}"}, r"student_prompt must have \{question\}"),
        ({"teacher_prompt": "{question}"}, r"teacher_prompt must have \{solution\}, and"),
        ({"teacher_prompt": "{solution}"}, r"teacher_prompt must have \{solution\}, and"),
        ({"max_prompt": 0}, "max_prompt must be at least 1, not 0"),
    ],
)
def test_templates_that_lack_their_places_are_refused(asking: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Asking(**asking)


def test_a_teacher_of_another_vocabulary_is_refused_with_the_methods_for_it(world: Path) -> None:
    with pytest.raises(
        UserError, match=r"has another vocabulary than .*\d+ tokens differ.*\(bld, alm, "
    ):
        make_questions(world, "foreign")


def test_a_network_takes_as_many_tokens_as_its_settings_say() -> None:
    network = causal_lm()
    assert context_length(network) == 1024
    network.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    assert context_length(network) is None
    network.config = GPT2Config(n_positions=77)
    assert context_length(network) == 77
    assert context_length(torch.nn.Linear(1, 1)) is None


# batches


def test_a_repeated_batch_has_each_row_several_times_with_ids_of_their_own(world: Path) -> None:
    family = make_questions(world)
    batch = batch_of(family, world, (4, 5))
    found = family.repeated(batch, 3)
    assert found["ids"].tolist() == [12, 13, 14, 15, 16, 17]
    assert [e.origin for e in family.examples(found)] == [
        example.origin for example in family.examples(batch) for _ in range(3)
    ]
    assert found["prompts"] == [example.prompt for example in family.examples(found)]
    assert family.repeated(batch, 1)["ids"].tolist() == [4, 5]


def test_rollouts_do_not_depend_on_the_batch_or_the_teacher_or_what_it_is_shown(
    world: Path,
) -> None:
    sampling = Sampling(max_tokens=6)
    found = []
    for teacher, prompt in (
        ("student", "{question}{solution}"),
        ("other", "{question}?{solution}"),
    ):
        family = make_questions(world, teacher, teacher_prompt=prompt)
        role = Role("student", RoleSettings(), family.student, family.student.network())
        for ids in ((0, 1, 2, 3), (0, 1), (2, 3)):
            batch = batch_of(family, world, ids)
            family.condition(batch, reader="teacher", exposure=0.5)
            answers = family.rollout(role, batch, sampling, Draws(0), purpose="rollout")
            rows = zip(ids, answers.tokens, answers.mask, strict=True)
            found.append({number: tokens[mask].tolist() for number, tokens, mask in rows})
    whole, *parts = found
    assert len(whole) == 4
    for part in parts:
        assert part == {number: whole[number] for number in part}


def test_given_answers_are_the_solutions_with_the_end_of_a_turn(world: Path) -> None:
    family = make_questions(world)
    batch = batch_of(family, world)
    found = family.given(batch)
    assert found.logprobs is None
    assert found.ended.all()
    student = family.student
    for row, example in enumerate(family.examples(batch)):
        tokens = found.tokens[row][found.mask[row]].tolist()
        assert written(student, tokens) == f"{example.solution}<|end|>"
        prompt = family.prompt(example)
        chat = [*(example.messages or ()), {"role": "assistant", "content": example.solution}]
        whole = student.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert whole[: len(prompt) + len(tokens)] == prompt + tokens
    assert family.spelled(found) == [example.solution for example in family.examples(batch)]


def test_given_answers_are_cut_at_their_longest(world: Path) -> None:
    family = make_questions(world, max_answer=4)
    found = family.given(batch_of(family, world))
    assert found.tokens.shape == (4, 4)
    assert not found.ended.any()


def test_a_state_asks_about_each_token_of_the_answers(world: Path) -> None:
    family = make_questions(world, "brackets")
    batch = batch_of(family, world)
    state = family.state(family.given(batch))
    network: Any = family.student.network()
    for reader in ("student", "teacher"):
        told = family.condition(batch, reader=reader)
        prompts = [family.prompt(e, reader=reader) for e in family.examples(batch)]
        rows = zip(told["prompt"].tolist(), told["pads"].tolist(), strict=True)
        assert [row[count:] for row, count in rows] == prompts
        assert told["pads"].min() == 0
        found = dense(family.student.predict(network, state, told))
        assert found.shape[:2] == state.x.shape

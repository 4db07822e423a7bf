"""Autoregressive language models through ``diffdistill train``, on tiny models saved to disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.train import dry_run, train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.evaluation.subject import first_questions
from diffdistill.rewards.boxed import Boxed
from diffdistill.session import Session, build, questions
from tests.answer_run import ROWS, answer_values, save_answer_world, stopped
from tests.conftest import CPU
from tests.toy_run import forked, losses

LORA = {"adapter": "lora", "rank": 2, "alpha": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_world(tmp_path_factory.mktemp("answers"))


def other_family(world: Path, name: str) -> dict[str, Any]:
    return {"family": {"name": "causal-lm", "path": str(world / name)}}


def weights(run: Path) -> dict[str, torch.Tensor]:
    snapshot, _, problems = Checkpoints(run).load()
    assert not problems
    return {
        f"{file}/{name}": tensor
        for file, tensors in snapshot.tensors.items()
        for name, tensor in tensors.items()
    }


RUNS: dict[str, dict[str, Any]] = {
    "all of it, frozen": {},
    "all of it, live": {"roles": {"teacher": {"weights": "live"}}},
    "all of it, average": {"roles": {"teacher": {"weights": "ema", "decay": 0.9}}},
    "adapter, base": {"roles": {"student": LORA}},
    "adapter, live": {"roles": {"student": LORA, "teacher": {"weights": "live"}}},
    "adapter, average": {
        "roles": {"student": LORA, "teacher": {"weights": "ema", "decay": 0.9}},
        "train": {"gradient_checkpointing": True},
    },
    "other weights, without privilege": {"method": {"exposure": None}},
    "other template": {"roles": {"student": LORA}},
    "a stream": {"data": {"streaming": True, "shuffle_buffer": 3}},
}


def values_of(name: str, world: Path) -> dict[str, Any]:
    values = answer_values(world, **RUNS[name])
    if name.startswith("other weights"):
        values["roles"]["teacher"] = {"path": str(world / "other")}
    if name == "other template":
        values["roles"] = values["roles"] | {"teacher": other_family(world, "brackets")}
    return values


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_its_student_and_logs_what_its_method_measures(
    name: str, world: Path, tmp_path: Path
) -> None:
    values = values_of(name, world)
    values["train"] |= {"steps": 2}
    train(parse_config(values), tmp_path)
    found = losses(tmp_path)
    assert len(set(found.values())) == 2
    assert all(value > 0 for value in found.values())
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 1 <= line["length/student"] <= 6
    assert line["grad_norm/student"] > 0
    saved = {key.partition("/")[0] for key in weights(tmp_path)}
    assert ("role-teacher" in saved) == ("average" in name)
    assert "role-student" in saved


def test_a_teacher_that_is_the_student_and_is_shown_nothing_has_nothing_to_teach(
    world: Path, tmp_path: Path
) -> None:
    for name, weights_ in (("live", "live"), ("base", "frozen")):
        values = answer_values(
            world,
            method={"exposure": None},
            roles={"student": LORA, "teacher": {"weights": weights_}},
            train={"steps": 1},
        )
        train(parse_config(values), tmp_path / name)
        [value] = losses(tmp_path / name).values()
        assert abs(value) < 1e-6


@pytest.mark.parametrize("name", ["adapter, average", "all of it, live", "a stream"])
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    name: str, world: Path, tmp_path: Path
) -> None:
    config = parse_config(values_of(name, world))

    assert forked(lambda: train(config, tmp_path / "whole")) == 0
    assert forked(lambda: stopped(config, tmp_path / "broken")) == 1
    assert forked(lambda: train(config, tmp_path / "broken", "latest")) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


@pytest.mark.parametrize("data", [{}, {"streaming": True, "shuffle_buffer": 2}])
def test_two_micro_batches_of_two_take_the_step_of_one_of_four(
    data: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    for name, batch_size, accumulate in (("one", 4, 1), ("two", 2, 2)):
        values = answer_values(
            world,
            data={"batch_size": batch_size} | data,
            roles={"teacher": {"weights": "live"}},
            train={"accumulate": accumulate, "steps": 2, "lr": 0.001},
        )
        train(parse_config(values), tmp_path / name)
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    first, second = (weights(tmp_path / name) for name in ("one", "two"))
    for key, value in first.items():
        if key.startswith("role-student"):
            torch.testing.assert_close(value, second[key], rtol=1e-3, atol=2e-5)


def test_a_student_comes_closer_to_what_its_teacher_says(world: Path, tmp_path: Path) -> None:
    values = answer_values(
        world,
        method={"exposure": None},
        roles={"teacher": {"path": str(world / "other")}},
        train={"steps": 40, "lr": 0.01, "save_every": 40},
    )
    train(parse_config(values), tmp_path)
    found = list(losses(tmp_path).values())
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_the_reward_of_a_run_is_asked_with_texts_and_examples(world: Path, tmp_path: Path) -> None:
    values = answer_values(
        world,
        method={"name": "tests.answer_run:Judged"},
        rewards=[{"name": "tests.answer_run:Length", "scale": 2.0}],
        train={"steps": 1},
    )
    train(parse_config(values), tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["score/student"] > 0


OWN = """
from dataclasses import dataclass

import torch

from diffdistill.verifying import AnswerReward


@dataclass(kw_only=True)
class Short(AnswerReward):
    limit: int = 3

    def score(self, answers, examples):
        return torch.tensor([float(len(a) < self.limit) for a in answers], device=self.device)

    def parses(self, answers):
        return torch.ones(len(answers), dtype=torch.bool, device=self.device)
"""


def test_a_reward_of_answers_may_be_in_a_file_of_the_users(world: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    values = answer_values(
        world,
        method={"name": "tests.answer_run:Judged"},
        rewards={"name": f"{tmp_path / 'own.py'}:Short", "limit": 1000},
        train={"steps": 1},
    )
    train(parse_config(values), tmp_path / "run")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["score/student"] == 1.0


def test_answers_are_written_while_a_run_trains(world: Path, tmp_path: Path) -> None:
    values = answer_values(
        world,
        sample={"every": 2, "num_prompts": 2, "num_answers": 2, "max_tokens": 4, "temperature": 1},
        train={"steps": 2, "ema": 0.5},
    )
    train(parse_config(values), tmp_path)
    text = (tmp_path / "samples" / "step-000002.md").read_text()
    assert text.count("## Prompt\n\n    2+2?") == 1
    assert text.count("### Data\n\n    3+5 is 8 because") == 1
    assert text.count("### Answer") == 4


def test_a_dry_run_counts_parameters_and_takes_a_step(world: Path) -> None:
    text = dry_run(parse_config(values_of("adapter, live", world)))
    assert "adapted layers" in text
    assert "one step: loss/student" in text


# errors


def rows_without_solution(folder: Path) -> Path:
    file = folder / "bare.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*ROWS, {"text": "why?"}]))
    return file


def test_a_question_without_a_solution_that_is_to_be_shown_is_found_before_training(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = rows_without_solution(tmp_path)
    values = answer_values(world, data={"path": str(file)}, train={"steps": 1})
    with pytest.raises(UserError, match=r"bare\.jsonl:5: there is no reference solution to show"):
        train(parse_config(values), tmp_path / "strict")
    values["data"]["on_error"] = "skip"
    train(parse_config(values), tmp_path / "lenient")
    assert "left out 1 questions" in caplog.text
    values["data"] |= {"max_prompt": 1}
    with pytest.raises(UserError, match="there is no usable example"):
        train(parse_config(values), tmp_path / "none")
    values["data"] |= {"streaming": True}
    with pytest.raises(UserError, match="there is no usable example"):
        train(parse_config(values), tmp_path / "stream")


def test_a_question_without_an_answer_to_verify_by_is_found_before_training(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = rows_without_solution(tmp_path)
    values = answer_values(world, data={"path": str(file)}, train={"steps": 3}, rewards="boxed")
    values["method"] = {"name": "grpo", "num_answers": 2, "max_tokens": 3}
    with pytest.raises(UserError, match=r"bare\.jsonl:5: there is no answer to verify by: add"):
        train(parse_config(values), tmp_path / "strict")
    assert not (tmp_path / "strict" / "metrics.jsonl").exists()
    values["data"]["on_error"] = "skip"
    train(parse_config(values), tmp_path / "lenient")
    assert "left out 1 questions" in caplog.text
    assert [example.origin[-1] for example in first_questions(session_of(values), 9)] == [*"1234"]


def session_of(values: dict[str, Any]) -> Session:
    return build(parse_config(values), CPU)


def test_answers_are_asked_for_only_where_they_are_verified(world: Path, tmp_path: Path) -> None:
    values = answer_values(world, data={"path": str(rows_without_solution(tmp_path))})
    values |= {"method": {"name": "opd", "max_tokens": 6}, "rewards": "boxed"}
    session = session_of(values)
    assert len(first_questions(session, 9)) == 5
    with pytest.raises(UserError, match=r"bare\.jsonl:5: there is no answer to verify by"):
        first_questions(session, 9, Boxed(device=CPU))


def test_a_prompt_that_leaves_no_room_for_an_answer_is_found_before_training(
    world: Path, tmp_path: Path
) -> None:
    values = answer_values(world, method={"exposure": None})
    session = session_of(values)
    family = questions(session)
    longest = max(len(family.prompt(example)) for example in first_questions(session, 9))
    values["method"]["max_tokens"] = room = 1024 - longest
    assert len(first_questions(session_of(values), 9)) == len(ROWS)
    values["method"]["max_tokens"] += 1
    told = f"prompt has {longest} tokens, and method.max_tokens is {room + 1}, but .* takes 1024"
    with pytest.raises(UserError, match=rf"jsonl:\d: the student's {told}") as caught:
        train(parse_config(values), tmp_path)
    assert "\n" not in str(caught.value)
    values["data"]["on_error"] = "skip"
    assert len(first_questions(session_of(values), 9)) < len(ROWS)


IMAGE = {"rewards": "clip", "method": {"name": "tests.answer_run:Judged"}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"family": {"name": "bd3lm"}},
            "Follow is for autoregressive language models: it needs a family such as "
            "family.name: causal-lm, not bd3lm",
        ),
        (
            {"method": {"name": "bd3lm"}},
            "bd3lm is for texts: it needs a family such as family.name: bd3lm, not causal-lm",
        ),
        (
            {"method": {"name": "sft"}},
            "sft is for images and videos: it needs a family such as family.name: flux2-klein",
        ),
        (
            {"method": {"name": "opd", "support": "student", "support_size": 10**6}},
            r"support_size is 1000000, and .*student has \d+ tokens: lower it",
        ),
        ({"data": {"packing": True}}, "packing=True is for masked diffusion"),
        ({"data": {"turns": "each"}}, "turns=each is for masked diffusion"),
        ({"data": {"student_prompt": "why?"}}, r"student_prompt must have \{question\}"),
        (IMAGE, "rewards: clip judges images and videos, and method .*Judged makes answers"),
        (
            {"method": IMAGE["method"], "rewards": ["tests.answer_run:Length"] * 2},
            "rewards: method .*Judged takes one, and here are 2",
        ),
        ({"method": IMAGE["method"]}, "Judged needs rewards: one of"),
        (
            {"family": {"attention": "flex_attention"}},
            "family causal-lm: attention flex_attention is for",
        ),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(
    sections: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(parse_config(answer_values(world, **sections)), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("role", "given", "message"),
    [
        ("student", {"family": "other"}, "student.family: only the teacher of a text model may"),
        ("teacher", {"family": "foreign"}, r"another vocabulary than .*\(bld, alm, "),
        (
            "teacher", {"family": "other", "weights": "live"},
            "its weights are live of 'student', so it is of the family of that role",
        ),
        ("teacher", {"path": "foreign"}, "has another tokenizer than"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_teach_is_refused(
    role: str, given: dict[str, str], message: str, world: Path
) -> None:
    settings: dict[str, Any] = dict(given)
    if "family" in given:
        settings |= other_family(world, given["family"])
    else:
        settings["path"] = str(world / given["path"])
    with pytest.raises(UserError, match=message):
        build(parse_config(answer_values(world, roles={role: settings})), CPU)


def test_masked_diffusion_cannot_teach_an_autoregressive_model_nor_the_other_way_around(
    world: Path,
) -> None:
    teacher = {"family": {"name": "mdlm", "path": str(world / "other")}}
    with pytest.raises(
        UserError, match="mdlm cannot teach causal-lm: it must be an autoregressive"
    ):
        build(parse_config(answer_values(world, roles={"teacher": teacher})), CPU)
    values = answer_values(world, family={"name": "bd3lm"}, method={"name": "tide"})
    values["roles"] = {"teacher": other_family(world, "other")}
    with pytest.raises(UserError, match="causal-lm cannot teach bd3lm: it must be a masked-diff"):
        build(parse_config(values), CPU)


def test_a_reward_of_answers_is_refused_where_pictures_are_made() -> None:
    values = {
        "family": {"name": "wan-streaming", "path": "nowhere"},
        "method": {"name": "stream-r1"},
        "data": {"path": "nowhere"},
        "rewards": "tests.answer_run:Length",
    }
    from diffdistill.reward_building import build_reward

    with pytest.raises(
        UserError, match="Length judges answers, and method stream-r1 makes images and videos"
    ):
        build_reward(parse_config(values), CPU)

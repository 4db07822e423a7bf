"""The bundled arithmetic models do what their configs and cards say."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill.bundled import bundled
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.data.questions import read_questions
from diffdistill.data.settings import DataSettings
from diffdistill.evaluation.answers import examine
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings
from diffdistill.rewards.boxed import Boxed
from diffdistill.session import Session, build
from diffdistill.types import Example

MODELS = ("arithmetic-student", "arithmetic-teacher")
METHODS = ("atesd", "egx", "exopd", "grpo", "opd", "opsd", "sdar")
NUM_QUESTIONS = 24


def held_out() -> list[Example]:
    data = DataSettings(path="bundled:arithmetic-held-out.jsonl")
    return list(islice(read_questions(data, Path(), []), NUM_QUESTIONS))


def with_solution(example: Example) -> Example:
    content = f"{example.prompt}\n{example.solution}"
    return example._replace(messages=({"role": "user", "content": content},))


def greedy() -> Session:
    how = ["sample.temperature=0", "sample.num_answers=1", f"sample.batch_size={NUM_QUESTIONS}"]
    return build(load_config("opd/arithmetic", how))


def share_right(session: Session, role: str, asked: list[Example]) -> float:
    reward = Boxed(device=torch.device("cpu"))
    found = examine(session, role, session.roles[role], asked, AnswerEvaluateSettings(), reward)
    return next(mean.value for mean in found.averages if mean.metric == "mean@1")


def test_the_bundled_arithmetic_models_take_at_most_15_megabytes() -> None:
    files = [file for name in MODELS for file in bundled("models", name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 15e6


def test_the_teacher_is_right_more_often_than_the_student() -> None:
    session, asked = greedy(), held_out()
    student, teacher = (share_right(session, role, asked) for role in ("student", "teacher"))
    assert student + 0.15 < teacher


def test_the_student_is_right_where_it_is_shown_the_solution() -> None:
    session, asked = greedy(), held_out()
    shown = [with_solution(one) for one in asked]
    assert share_right(session, "student", shown) > share_right(session, "student", asked) + 0.2


@pytest.mark.parametrize("method", METHODS)
def test_every_arithmetic_config_trains(method: str, tmp_path: Path) -> None:
    quick: list[Any] = ["train.steps=1", "data.batch_size=2", "train.warmup=0"]
    quick += ["tracking.tensorboard=false", "sample.every=null", "method.max_tokens=8"]
    size = ["method.num_answers=2"] if method in ("grpo", "sdar") else []
    train(load_config(f"{method}/arithmetic", [*quick, *size]), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("loss/student") == 1

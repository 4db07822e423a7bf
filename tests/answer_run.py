"""Configs of tiny autoregressive models that train in a second, their data and a method."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffdistill.commands.train import train
from diffdistill.config import RunConfig
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.questions import Asking, Questions
from diffdistill.projection import token_maps
from diffdistill.rollouts import AnswerFamily, AnswerModel, Answers, Sampling, Solutions
from diffdistill.trainer import Trainer
from diffdistill.types import Batch, Example, Loss, Progress
from diffdistill.verifying import AnswerReward
from tests.conftest import CPU
from tests.tiny_text import BRACKETS, save_lm, words

ROWS: tuple[dict[str, Any], ...] = (
    {
        "messages": [{"role": "user", "content": "2+2?"}],
        "solution": "2+2 is 1+1+2.\nThat is 4.\n\\boxed{4}",
        "answer": "4",
    },
    {
        "messages": [
            {"role": "system", "content": "add"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "what is 3+5, and why?"},
            {"role": "assistant", "content": "3+5 is 8 because 5+3 is.\n\\boxed{8}"},
        ],
        "answer": 8,
    },
    {"text": "1+1?", "solution": "\\boxed{2}", "answer": "2"},
    {"text": "print(7)?", "solution": "It prints 7.\nSo it does.\n\\boxed{7}", "answer": "7"},
)


def write_questions(file: Path) -> Path:
    """Write chats and columns of questions with solutions."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    return file


def save_answer_world(folder: Path) -> Path:
    """Save a student, teachers of its tokenizer, of its words in another template, and of others.

    The student's pad token is its end token.
    """
    save_lm(folder / "student", is_causal=True)
    save_lm(folder / "other", is_causal=True, seed=1, intermediate_size=64)
    save_lm(folder / "brackets", name="llama", is_causal=True, seed=2)
    save_lm(folder / "foreign", "teacher", is_causal=True)
    for name in ("student", "brackets"):
        tokenizer = words("student")
        tokenizer.pad_token = "<eos>"
        if name == "brackets":
            tokenizer.chat_template = BRACKETS
        tokenizer.save_pretrained(str(folder / name))
    write_questions(folder / "questions.jsonl")
    return folder


def make_questions(world: Path, teacher: str = "student", **asking: Any) -> Questions:
    """Return the student's family, with itself or another as the teacher's."""
    student = CausalLM(path=str(world / "student"), device=CPU)
    other = CausalLM(path=str(world / teacher), device=CPU)
    return Questions(student, student if teacher == "student" else other, Asking(**asking))


def answer_values(world: Path, **sections: Any) -> dict[str, Any]:
    """Return the values of a config of ``Follow``; ``sections`` are merged into them."""
    values: dict[str, Any] = {
        "family": {"name": "causal-lm", "path": str(world / "student")},
        "method": {"name": "tests.answer_run:Follow"},
        "roles": {},
        "data": {"path": str(world / "questions.jsonl"), "batch_size": 2},
        "train": {"steps": 4, "lr": 0.01, "save_every": 2},
        "tracking": {"tensorboard": False},
    }
    for name, given in sections.items():
        values[name] = given if name == "rewards" else values.get(name, {}) | given
    return values


def stopped(config: RunConfig, output: Path) -> None:
    """Train, and be interrupted in the fourth step; for a process of its own."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        if self.step == 3:
            raise KeyboardInterrupt
        return original(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    train(config, output)


@dataclass(kw_only=True)
class Follow(Method):
    """Learns from a teacher on the student's own answers.

    Attributes:
        num_answers: Answers to each question.
        max_tokens: Tokens of an answer.
        exposure: Share of the solution that the teacher is shown; None shows none.
    """

    answers: ClassVar = True
    roles: ClassVar = {"student": {}, "teacher": {"weights": "frozen"}}

    family: AnswerFamily
    draws: Draws
    student: AnswerModel
    teacher: AnswerModel

    num_answers: int = 2
    max_tokens: int = 6
    exposure: float | None = 1.0

    def solutions(self) -> Solutions:
        return "unused" if self.exposure is None else "shown"

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        batch = self.family.repeated(batch, self.num_answers)
        actor: Any = self.student
        sampling = Sampling(max_tokens=self.max_tokens)
        answers = self.family.rollout(actor, batch, sampling, self.draws, purpose="rollout")
        state = self.family.state(answers)
        told = self.family.condition(batch, reader="teacher", exposure=self.exposure)
        with torch.no_grad():
            judged = self.teacher(state, told)
        found = self.student(state, self.family.condition(batch))
        mask = answers.mask
        maps = token_maps(found, judged, ("forward-kl",), mask=mask)
        value = maps["forward-kl"].sum() / mask.sum()
        yield Loss("student", value, count=float(mask.sum()), metrics=self.measured(answers, batch))

    def measured(self, answers: Answers, batch: Batch) -> dict[str, Tensor]:
        return {"length": answers.mask.sum(1).float().mean()}


@dataclass(kw_only=True)
class Judged(Follow):
    """The same, with a reward that is logged."""

    reward: AnswerReward

    def measured(self, answers: Answers, batch: Batch) -> dict[str, Tensor]:
        scores = self.reward.score(self.family.spelled(answers), self.family.examples(batch))
        return {"score": scores.mean()}


@dataclass(kw_only=True)
class Length(AnswerReward):
    """How many characters an answer has, and whether any."""

    scale: float = 1.0

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        return torch.tensor([self.scale * len(answer) for answer in answers], device=self.device)

    def parses(self, answers: Sequence[str]) -> Tensor:
        return torch.tensor([bool(answer) for answer in answers], device=self.device)

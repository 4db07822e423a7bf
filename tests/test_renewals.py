"""Roles that a method makes copies of a trained role: when, exactly, and over a restart."""

import os
import signal
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.distributed import Distributed
from diffdistill.errors import UserError
from diffdistill.methods.d_opsd import DOPSD
from diffdistill.session import build
from diffdistill.trainer import Trainer
from diffdistill.types import Batch, Loss, Progress
from tests.conftest import CPU, make_batch
from tests.text_run import save_world, text_values
from tests.toy_run import forked, losses, make_data, toy_values

LORA = {"adapter": "lora", "rank": 2, "alpha": 4}


@dataclass(kw_only=True)
class Renewing(DOPSD):
    """D-OPSD whose teacher is the student of two updates ago, and of the fourth from then on."""

    broken: int = -1

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        for loss in super().losses(batch, progress):
            factor = torch.nan if progress.step == self.broken else 1.0
            yield Loss(loss.role, loss.value * factor, loss.count, loss.more, loss.metrics)

    def renewals(self) -> Mapping[str, Container[int]]:
        return {"teacher": range(2, 5, 2)}


def trainer_of(tmp_path: Path, student: dict[str, Any], **method: Any) -> Trainer:
    values = toy_values(make_data(tmp_path / "data"), lr=0.05)
    values["method"] = {"name": "tests.test_renewals:Renewing", "num_steps": 2} | method
    values["roles"] = {"student": student, "teacher": {"weights": "ema", "decay": 1.0}}
    batches = iter([make_batch(2, seed=n, first_id=2 * n) for n in range(9)])
    return Trainer(build(parse_config(values), CPU), batches, Distributed())


def weights(trainer: Trainer, role: str) -> list[torch.Tensor]:
    found = trainer.session.roles[role].parameters()
    return [parameter.detach().clone() for parameter in found.values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("student", [LORA, {"adapter": "none"}], ids=["lora", "full"])
def test_the_role_is_the_student_of_the_named_updates_and_stays_in_between(
    student: dict[str, Any], tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, student)
    history = [weights(trainer, "student")]
    for update in range(1, 7):
        trainer.train_step()
        history.append(weights(trainer, "student"))
        source = {1: 0, 2: 2, 3: 2}.get(update, 4)
        assert same(weights(trainer, "teacher"), history[source])
    assert not any(same(history[0], later) for later in history[1:])


def test_a_step_that_was_skipped_is_no_update(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, LORA, broken=1)
    start = weights(trainer, "student")
    for _ in range(2):
        metrics = trainer.train_step()
    assert metrics["skipped"] == 1.0
    assert same(weights(trainer, "teacher"), start)
    trainer.train_step()
    assert same(weights(trainer, "teacher"), weights(trainer, "student"))


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_a_role_without_weights_of_its_own_is_refused_before_training(
    kind: str, tmp_path: Path
) -> None:
    values = toy_values(make_data(tmp_path / "data"))
    values["method"] = {"name": "tests.test_renewals:Renewing", "num_steps": 2}
    values["roles"] = {"student": LORA, "teacher": {"weights": kind}}
    session = build(parse_config(values), CPU)
    with pytest.raises(UserError, match=rf"roles\.teacher: .* must be ema, not {kind}"):
        Trainer(session, iter([]), Distributed())


@pytest.mark.parametrize("student", [LORA, {"adapter": "none"}], ids=["lora", "full"])
@pytest.mark.parametrize("step", [2, 3])
def test_rounds_of_sdtt_that_are_killed_and_resumed_are_bit_identical(
    student: dict[str, Any], step: int, tmp_path: Path
) -> None:
    """A checkpoint after two updates, which is the end of the first round."""
    world = save_world(tmp_path / "world")
    options = {"num_steps": 8, "last_steps": 1, "round_updates": 2}
    config = parse_config(
        text_values(
            world,
            "diffdistill.methods.sdtt:SDTT",
            method={"name": "diffdistill.methods.sdtt:SDTT"} | options,
            roles={"student": student},
            train={"steps": 6, "save_every": 2},
        )
    )

    def killed() -> None:
        original = Trainer.train_step

        def train_step(self: Trainer) -> dict[str, float]:
            if self.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self)

        Trainer.train_step = train_step  # type: ignore[method-assign]
        train(config, tmp_path / "broken")

    assert forked(lambda: train(config, tmp_path / "whole")) == 0
    assert forked(killed) == -signal.SIGKILL
    assert forked(lambda: train(config, tmp_path / "broken", "latest")) == 0
    found = losses(tmp_path / "broken")
    assert found == losses(tmp_path / "whole")
    assert len(set(found.values())) == 6
    snapshots = [Checkpoints(tmp_path / name).load()[0] for name in ("whole", "broken")]
    for role in ("role-student", "role-teacher"):
        first, second = (snapshot.tensors[role] for snapshot in snapshots)
        assert all(torch.equal(first[name], second[name]) for name in first)
    last = snapshots[0].state["method"]
    assert last == {"updates": 6}

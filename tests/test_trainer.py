import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.commands.train import dry_run, train
from diffdistill.config import RunConfig, parse_config
from diffdistill.distributed import Distributed
from diffdistill.errors import UserError
from diffdistill.methods.sft import SFT
from diffdistill.pipelines.toy import Toy
from diffdistill.session import build
from diffdistill.trainer import Trainer
from diffdistill.types import Batch, Example, Loss, Progress
from tests.toy_run import adapted, losses, make_data, toy_config, toy_values


def batches(session: Any, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "prompt": torch.rand((), generator=generator),
            "latents": torch.rand(3, 4, 4, generator=generator),
        }
        for _ in range(8)
    ]
    first = 0
    while True:
        rows = [data[(first + i) % 8] for i in range(size)]
        ids = torch.arange(first, first + size)
        yield session.family.collate(rows) | {"ids": ids, "prompts": [""] * size}
        first += size


def trainer_of(config: RunConfig, size: int = 2) -> Trainer:
    session = build(config, torch.device("cpu"))
    return Trainer(session, batches(session, size), Distributed())


def weights(trainer: Trainer, role: str = "student") -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.session.roles[role].parameters().items()}


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_micro_batches_do_not_change_the_step(adapter: str, tmp_path: Path) -> None:
    values = toy_values(tmp_path, clip=0.05)
    values["roles"]["student"] = adapted(adapter, rank=2)
    runs = {}
    for size, accumulate in ((8, 1), (4, 2), (2, 4)):
        values["train"]["accumulate"] = accumulate
        trainer = trainer_of(parse_config(values), size)
        metrics = [trainer.train_step() for _ in range(3)]
        runs[size] = ([m["loss/student"] for m in metrics], weights(trainer))
    for size in (4, 2):
        assert runs[size][0] == pytest.approx(runs[8][0], rel=1e-5)
        for name, value in runs[8][1].items():
            torch.testing.assert_close(runs[size][1][name], value, rtol=1e-5, atol=1e-6)


def test_losses_of_unequal_counts_are_averaged_by_count(tmp_path: Path) -> None:
    values = toy_values(tmp_path, accumulate=2, clip=None)
    values["roles"] = {"student": {"adapter": "none"}}
    values["method"] = {"name": "sft"}
    trainer = trainer_of(parse_config(values))
    factors = trainer.session.roles["student"].parameters()["factors"]
    given = iter([(2.0, 1.0), (5.0, 3.0)])

    class Counted(SFT):
        def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
            slope, count = next(given)
            yield Loss("student", slope * factors.sum(), count)

    trainer.session.method.__class__ = Counted
    metrics = trainer.train_step()
    mean_slope = (1 * 2.0 + 3 * 5.0) / 4
    assert metrics["grad_norm/student"] == pytest.approx(mean_slope * math.sqrt(3))
    assert metrics["loss/student"] == pytest.approx(mean_slope * -1.5)


def test_gradients_are_clipped_to_the_limit_by_role(tmp_path: Path) -> None:
    values = toy_values(tmp_path, clip=1e-3, lr=1.0, optimizer="adamw")
    trainer = trainer_of(parse_config(values))
    seen = {}
    optimizer = trainer.optimizers["student"]
    original = optimizer.step

    def step() -> None:
        seen["norm"] = torch.stack(
            [p.grad.norm() for p in trainer.session.roles["student"].parameters().values()]
        ).norm()
        original()

    optimizer.step = step  # type: ignore[method-assign, assignment]
    metrics = trainer.train_step()
    assert metrics["grad_norm/student"] > 1e-3
    assert seen["norm"].item() == pytest.approx(1e-3, rel=1e-3)


def poison(trainer: Trainer, bad: set[int], kind: str) -> None:
    original = trainer.session.method.losses

    def losses(batch: Batch, progress: Progress) -> Iterator[Loss]:
        for loss in original(batch, progress):
            if progress.step not in bad:
                yield loss
            elif kind == "loss":
                yield replace(loss, value=loss.value * math.nan)
            else:  # a finite loss with an infinite gradient
                factor = trainer.session.roles["student"].parameters()["mix.lora_A.weight"]
                yield replace(loss, value=loss.value + torch.sqrt((factor - factor).abs()).sum())

    trainer.session.method.losses = losses  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_training_goes_on(
    kind: str, tmp_path: Path
) -> None:
    trainer = trainer_of(toy_config(tmp_path))
    poison(trainer, {1}, kind)
    trainer.train_step()
    before = weights(trainer) | {f"t/{n}": t for n, t in weights(trainer, "teacher").items()}
    metrics = trainer.train_step()
    after = weights(trainer) | {f"t/{n}": t for n, t in weights(trainer, "teacher").items()}
    assert metrics["skipped"] == 1.0
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "skipped" not in trainer.train_step()
    assert trainer.bad_steps == 0


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(toy_config(tmp_path, max_bad_steps=3))
    poison(trainer, {0, 2, 3, 4}, "loss")
    for _ in range(4):
        trainer.train_step()
    with pytest.raises(UserError, match=r"step 5: 3 steps in a row.*loss/student"):
        trainer.train_step()


def test_the_average_follows_the_student_by_its_decay(tmp_path: Path) -> None:
    trainer = trainer_of(toy_config(tmp_path, ema=0.75))
    expected = weights(trainer)
    for _ in range(3):
        trainer.train_step()
        expected = {n: 0.75 * expected[n] + 0.25 * v for n, v in weights(trainer).items()}
    for name, value in weights(trainer, "average").items():
        torch.testing.assert_close(value, expected[name])


def test_the_learning_rate_of_a_role_overrides_the_common_one(tmp_path: Path) -> None:
    values = toy_values(tmp_path, schedule="linear", steps=4)
    values["method"] = {"name": "dmd", "num_steps": 2, "student_every": 1}
    values["roles"] = {"critic": {"lr": 0.5}}
    trainer = trainer_of(parse_config(values))
    rates = [trainer.train_step() for _ in range(2)][1]
    assert rates["lr/critic"] == pytest.approx(0.5 * 0.75)
    assert rates["lr/student"] == pytest.approx(0.01 * 0.75)


def stepped(folder: Path, **critic: Any) -> tuple[dict[str, torch.Tensor], Trainer]:
    """Return how far each parameter of a critic with a head went in a step, and its trainer."""
    values = toy_values(folder, schedule="linear", steps=4, clip=None)
    values["method"] = {
        "name": "dmd",
        "num_steps": 2,
        "student_every": 9,
        "gan_weight": 0.1,
    }
    values["roles"] = {"critic": {"head": True, "lr": 0.5, **critic}}
    trainer = trainer_of(parse_config(values))
    before = weights(trainer, "critic")
    trainer.train_step()
    return {n: v - before[n] for n, v in weights(trainer, "critic").items()}, trainer


def test_a_head_learns_at_a_rate_of_its_own(tmp_path: Path) -> None:
    one, _ = stepped(tmp_path)
    same, _ = stepped(tmp_path, head_lr=0.5)
    slow, trainer = stepped(tmp_path, head_lr=0.05)
    assert any(name.startswith("head.") for name in one)
    for name, moved in one.items():
        torch.testing.assert_close(same[name], moved, rtol=0, atol=0)
        share = 0.1 if name.startswith("head.") else 1.0
        torch.testing.assert_close(slow[name], share * moved, rtol=1e-4, atol=1e-6)
    metrics = trainer.train_step()  # both follow the schedule
    rates = [metrics[f"lr/{part}"] for part in ("critic", "critic/head")]
    assert rates == pytest.approx([0.5 * 0.75, 0.05 * 0.75])


def test_a_rate_of_a_head_that_is_not_there_is_refused(tmp_path: Path) -> None:
    values = toy_values(tmp_path)
    values["roles"]["student"] = {"head_lr": 0.1}
    with pytest.raises(UserError, match=r"student.head_lr is for a role with a head"):
        trainer_of(parse_config(values))
    values["roles"]["student"] = {"lr": -0.1}
    with pytest.raises(UserError, match=r"student.lr must be at least 0, not -0.1"):
        trainer_of(parse_config(values))


def test_a_role_without_a_loss_is_not_stepped(tmp_path: Path) -> None:
    values = toy_values(tmp_path)
    values["method"] = {"name": "dmd", "num_steps": 2, "student_every": 2}
    values["roles"] = {}
    trainer = trainer_of(parse_config(values))
    trainer.train_step()
    before = weights(trainer)
    metrics = trainer.train_step()
    assert "loss/student" not in metrics
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_the_same_seed_trains_the_same_and_another_does_not(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(toy_config(data, seed=seed), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_metrics_have_a_line_for_each_step_and_the_config_is_saved(tmp_path: Path) -> None:
    config = toy_config(make_data(tmp_path / "data"))
    train(config, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["seconds"] > 0 and line["peak_memory_gib"] > 0 for line in lines)
    assert "num_steps: 2" in (tmp_path / "run/config.yaml").read_text()


def test_a_dry_run_reports_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(make_data(tmp_path / "data"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    text = dry_run(config)
    assert list(work.iterdir()) == []
    assert "student" in text
    assert "36" in text  # 12 of the network, 12 of each adapter
    assert "33.33%" in text
    assert "saved for backward" in text


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_dry_run_encodes_what_its_step_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    encoded: list[str] = []

    def encode(family: Toy, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        encoded.extend(example.prompt for example in examples)
        return encoder(family, examples)

    encoder = Toy.encode
    monkeypatch.setattr(Toy, "encode", encode)
    text = dry_run(toy_config(make_data(tmp_path / "data", 30), accumulate=accumulate))
    assert "one step: loss/student" in text
    assert len(encoded) == len(set(encoded)) == 2 * (accumulate + 1)


def test_samples_are_drawn_every_few_steps_and_do_not_change_training(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    plain = toy_config(data)
    train(plain, tmp_path / "plain")
    drawing = replace(plain, sample=replace(plain.sample, every=4))
    train(drawing, tmp_path / "drawing")
    names = sorted(p.name for p in (tmp_path / "drawing/samples").iterdir())
    steps = ("000001", "000004", "000008")
    assert names == sorted(f"{kind}-{step}.png" for kind in ("rollout", "step") for step in steps)
    assert losses(tmp_path / "plain") == losses(tmp_path / "drawing")

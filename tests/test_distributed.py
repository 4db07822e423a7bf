import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import distributed
from diffdistill.bundled import LAUNCHERS
from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.distributed import Distributed, gathered
from diffdistill.errors import UserError
from diffdistill.session import build
from diffdistill.trainer import Trainer
from tests.answer_run import answer_values, save_answer_world
from tests.given_run import save_given_world
from tests.test_given_runs import given_values
from tests.test_method_copd import LORA, copd_values, save_skills
from tests.text_run import save_world, text_values
from tests.tiny_streams import stream_values
from tests.toy_run import adapted, losses, make_data, toy_values

ROOT = Path(__file__).parents[1]


def two_ranks(mode: str, values: dict[str, Any], output: Path, *resume: str) -> str:
    """Train on two processes and return what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += ["-m", "tests.distributed_worker", mode, json.dumps(values), str(output), *resume]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"


def values_of(data: Path, adapter: str, batch_size: int) -> dict[str, Any]:
    values = toy_values(data, steps=4, clip=0.05)
    values["roles"]["student"] = adapted(adapter, rank=2)
    values["data"]["batch_size"] = batch_size
    values["sample"] = {"every": 4}
    return values


def both(
    mode: str, runs: Mapping[str, Any], folder: Path, *, rel: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train on one process and on two, and return both weights; their losses are alike."""
    train(parse_config(runs["one"]), folder / "one")
    printed = two_ranks(mode, runs["two"], folder / "two")
    assert printed.startswith("exit 0"), printed
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=rel)
    one, two = weights(folder / "one"), weights(folder / "two")
    assert one.keys() == two.keys()
    return one, two


def check_alike(
    one: Mapping[str, torch.Tensor],
    two: Mapping[str, torch.Tensor],
    *,
    rtol: float,
    atol: float,
    of: str = "",
) -> None:
    """Compare the weights whose names begin with ``of``."""
    for name, value in one.items():
        if name.startswith(of):
            torch.testing.assert_close(two[name], value, rtol=rtol, atol=atol)


def weights(run: Path) -> dict[str, torch.Tensor]:
    tensors = Checkpoints(run).load()[0].tensors
    return {f"{f}/{n}": t for f, group in tensors.items() for n, t in group.items()}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_does(mode: str, adapter: str, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    train(parse_config(values_of(data, adapter, 4)), tmp_path / "one")
    printed = two_ranks(mode, values_of(data, adapter, 2), tmp_path / "two")
    assert printed.startswith("exit 0"), printed
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    check_alike(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_classifier_head_is_trained_alike_on_two_ranks(mode: str, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    runs = {}
    for name, batch_size in (("one", 4), ("two", 2)):
        values = values_of(data, "lora", batch_size)
        values["method"] = {"name": "dmd", "num_steps": 2, "student_every": 2, "gan_weight": 0.1}
        values["roles"] = {"critic": {"head": True}}
        runs[name] = values
    train(parse_config(runs["one"]), tmp_path / "one")
    printed = two_ranks(mode, runs["two"], tmp_path / "two")
    assert printed.startswith("exit 0"), printed
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    heads = [name for name in one if "role-critic/head" in name]
    assert len(heads) == 6
    check_alike(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_run_resumes_from_its_full_checkpoint(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    values = values_of(data, "none", 2)
    assert two_ranks("fsdp2", values, tmp_path / "run").startswith("exit 0")
    whole = losses(tmp_path / "run")
    printed = two_ranks("fsdp2", values, tmp_path / "run", "step-000002")
    assert printed.startswith("exit 0"), printed
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2-blocks"])
def test_two_ranks_stream_and_weigh_as_one_does(mode: str, tmp_path: Path) -> None:
    runs = {}
    for name, batch_size in (("one", 2), ("two", 1)):
        values = stream_values(tmp_path, "stream-r1")
        values["rewards"] = "tests.tiny_streams:Warmth"
        values["method"] |= {"balance_window": 4, "balance_warmup": 1, "student_every": 1}
        values["roles"] = {"student": {"lr": 1e-3}, "critic": {"adapter": "lora", "rank": 2}}
        values["data"]["batch_size"] = batch_size
        values["train"] |= {"steps": 3, "clip": 0.05, "gradient_checkpointing": True}
        runs[name] = values
    train(parse_config(runs["one"]), tmp_path / "one")
    printed = two_ranks(mode, runs["two"], tmp_path / "two")
    assert printed.startswith("exit 0"), printed
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    states = [Checkpoints(tmp_path / n).load()[0].state["method"] for n in ("one", "two")]
    assert states[0]["balance"]["seen"] == states[1]["balance"]["seen"] == 3
    for axis, history in states[0]["balance"]["history"].items():
        assert states[1]["balance"]["history"][axis] == pytest.approx(history, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "adapter", "teacher"), [("ddp", "lora", "frozen"), ("fsdp2-blocks", "none", "live")]
)
def test_two_ranks_answer_and_learn_as_one_does(
    mode: str, adapter: str, teacher: str, tmp_path: Path
) -> None:
    world = save_answer_world(tmp_path / "world")
    runs = {}
    for name, batch_size in (("one", 4), ("two", 2)):
        values = answer_values(world, data={"batch_size": batch_size})
        values["train"] |= {"steps": 3, "clip": 0.05, "gradient_checkpointing": True}
        student = adapted(adapter, rank=2, alpha=2)
        values["roles"] = {"student": student, "teacher": {"weights": teacher}}
        runs[name] = values
    one, two = both(mode, runs, tmp_path, rel=1e-4)
    check_alike(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", [LORA, {}], ids=["adapters of one base", "networks"])
def test_experts_in_a_process_each_become_what_they_become_in_one(
    form: dict[str, Any], tmp_path: Path
) -> None:
    world = save_skills(tmp_path / "world")
    method = {"placement": "groups", "watch_every": 2, "snapshot": "phase"}
    values = copd_values(world, form, method=method, train={"steps": 4, "save_every": 2})
    train(parse_config(values), tmp_path / "one")
    printed = two_ranks("ddp", values, tmp_path / "two")
    assert printed.startswith("exit 0"), printed
    assert two_ranks("ddp", values, tmp_path / "two", "step-000002").startswith("exit 0")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    check_alike(one, two, rtol=1e-3, atol=1e-5)
    logs = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    for first, second in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert first.keys() == second.keys()
        told = [key for key in first if key.endswith(("/sums", "/words"))]
        assert "reward/words" in told
        assert [second[key] for key in told] == pytest.approx(
            [first[key] for key in told], rel=1e-3, abs=1e-5
        )


@pytest.mark.slow
def test_experts_in_groups_of_processes_are_not_sharded(tmp_path: Path) -> None:
    values = copd_values(save_skills(tmp_path / "world"), method={"placement": "groups"})
    printed = two_ranks("fsdp2", values, tmp_path / "run")
    assert f"launch with {LAUNCHERS / 'ddp.yaml'}" in printed
    assert (LAUNCHERS / "ddp.yaml").is_file()


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged-adamw8bit"])
def test_8_bit_optimizers_of_sharded_networks_are_refused_before_anything_is_loaded(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Distributed.__init__

    def start_sharded(self: Distributed) -> None:
        start(self)
        self.sharded = True

    monkeypatch.setattr(Distributed, "__init__", start_sharded)
    monkeypatch.setattr("diffdistill.commands.train.build", lambda *_: pytest.fail("it was built"))
    config = parse_config(toy_values(make_data(tmp_path / "data"), optimizer=optimizer))
    with pytest.raises(UserError, match=f"train.optimizer: {optimizer} takes whole weights"):
        train(config, tmp_path / "run")


def test_the_number_of_processes_is_a_multiple_of_that_of_parts() -> None:
    processes = Distributed()
    processes.divide(3)
    assert (processes.parts, processes.readers) == (1, 1)  # one process has all parts
    processes.world, processes.rank = 4, 3
    with pytest.raises(UserError, match="launch with --num_processes 6"):
        processes.divide(3)
    processes.divide(2)
    assert (processes.part, processes.reader, processes.readers) == (1, 1, 2)


def test_a_rank_that_writes_nothing_keeps_no_full_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Sharded(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            asked.append(len(self))
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(distributed, "DTensor", Sharded)
    tensors = {"copied": torch.ones(2), "sharded": torch.ones(3).as_subclass(Sharded)}
    assert gathered(tensors, kept=False) == {}
    assert asked == [3]  # the others wait for it
    assert {name: len(full) for name, full in gathered(tensors).items()} == {
        "copied": 2,
        "sharded": 3,
    }
    assert asked == [3, 3]


def test_only_the_main_process_has_the_tensors_of_a_snapshot(tmp_path: Path) -> None:
    config = parse_config(toy_values(make_data(tmp_path / "data")))
    session, processes = build(config), Distributed()
    trainer = Trainer(session, iter(()), processes)
    assert "role-student" in trainer.snapshot().tensors
    processes.main = False
    assert trainer.snapshot().tensors == {}
    assert trainer.snapshot().state["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "method", "adapter"),
    [
        ("ddp", "bd3lm", "lora"),
        ("fsdp2", "bd3lm", "none"),
        ("fsdp2-blocks", "bd3lm", "lora"),
        ("fsdp2-blocks", "tide", "none"),
    ],
)
def test_two_ranks_train_a_language_model_as_one_does(
    mode: str, method: str, adapter: str, tmp_path: Path
) -> None:
    world = save_world(tmp_path / "world")
    runs = {}
    for name, batch_size in (("one", 4), ("two", 2)):
        values = text_values(world, method, data={"batch_size": batch_size})
        values["train"] |= {"steps": 3, "clip": 0.05, "gradient_checkpointing": True}
        values["roles"]["student"] = adapted(adapter, rank=2, alpha=2)
        runs[name] = values
    one, two = both(mode, runs, tmp_path, rel=1e-4)
    check_alike(one, two, rtol=1e-2, atol=5e-4, of="role")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "adapter"), [("ddp", "lora"), ("fsdp2-blocks", "none")])
def test_byte_heads_are_trained_alike_on_two_ranks(mode: str, adapter: str, tmp_path: Path) -> None:
    world = save_given_world(tmp_path / "world")
    runs = {}
    for name, batch_size in (("one", 4), ("two", 2)):
        values = given_values(world, "bld", data={"batch_size": batch_size})
        values["train"] |= {"steps": 3, "clip": 0.05, "gradient_checkpointing": True}
        values["roles"]["student"] = adapted(adapter, rank=2, alpha=2)
        runs[name] = values
    one, two = both(mode, runs, tmp_path, rel=1e-4)
    assert any("head.layers" in name for name in one)
    check_alike(one, two, rtol=1e-2, atol=5e-4, of="role")


@pytest.mark.slow
def test_a_sharded_teacher_is_asked_about_no_stream(tmp_path: Path) -> None:
    world = save_given_world(tmp_path / "world")
    values = given_values(world, "bld", data={"streaming": True})
    printed = two_ranks("fsdp2", values, tmp_path / "run")
    assert "asked about texts while the student trains, and it is sharded" in printed


@pytest.mark.slow
def test_more_ranks_than_samples_is_an_error(tmp_path: Path) -> None:
    values = values_of(make_data(tmp_path / "data", count=1), "lora", 1)
    printed = two_ranks("ddp", values, tmp_path / "run")
    assert "exit 0" not in printed
    assert "2 ranks cannot share 1 examples" in printed

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import checkpoints
from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.train import Interrupted, train
from diffdistill.config import parse_config
from diffdistill.trainer import Trainer
from tests.tiny_streams import stream_values
from tests.toy_run import forked, losses, make_data, toy_config


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(step: int) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        metrics = original(self)
        if self.step == step:
            die()
        return metrics

    Trainer.train_step = train_step  # type: ignore[method-assign]


def die_while_writing(count: int) -> None:
    """Die in the middle of writing the ``count``-th weight file."""
    original = checkpoints.save_file
    written = []

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        original(tensors, path)
        written.append(path)
        if len(written) == count:
            Path(path).write_bytes(Path(path).read_bytes()[:20])
            die()

    checkpoints.save_file = save_file


def die_before_rename(count: int) -> None:
    original = os.rename
    renamed = []

    def rename(source: Path, target: Path) -> None:
        renamed.append(target)
        if len(renamed) == count:
            die()
        original(source, target)

    checkpoints.os.rename = rename  # type: ignore[attr-defined]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    snapshot, path, problems = Checkpoints(run).load()
    assert path.name == "step-000008"
    assert problems == []
    return {f"{f}/{n}": t for f, group in snapshot.tensors.items() for n, t in group.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("whole")
    data = make_data(folder / "data")
    assert forked(lambda: train(toy_config(data), folder / "run")) == 0
    return data, folder / "run"


@pytest.mark.parametrize(
    "accident",
    [
        lambda: die_after_step(1),
        lambda: die_after_step(2),
        lambda: die_after_step(5),
        lambda: die_after_step(8),
        lambda: die_while_writing(1),
        lambda: die_while_writing(5),
        lambda: die_before_rename(2),
    ],
)
def test_a_run_killed_anywhere_and_resumed_is_bit_identical(
    accident: Callable[[], None], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    data, reference = whole

    def first() -> None:
        accident()
        train(toy_config(data), tmp_path)

    assert forked(first) == -signal.SIGKILL
    assert forked(lambda: train(toy_config(data), tmp_path, "latest")) == 0
    assert losses(tmp_path) == losses(reference)
    expected, resumed = final_weights(reference), final_weights(tmp_path)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert list((tmp_path / "checkpoints").glob(".writing-*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_the_step_it_came_in(
    number: signal.Signals, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    data, reference = whole

    def interrupted() -> None:
        original = Trainer.train_step

        def train_step(self: Trainer) -> dict[str, float]:
            if self.step == 4:
                os.kill(os.getpid(), number)
            return original(self)

        Trainer.train_step = train_step  # type: ignore[method-assign]
        try:
            train(toy_config(data), tmp_path)
        except Interrupted as stop:
            os._exit(stop.exit_code)

    assert forked(interrupted) == 128 + number
    assert Checkpoints(tmp_path).names()[-1] == "step-000005"
    assert forked(lambda: train(toy_config(data), tmp_path, "latest")) == 0
    assert losses(tmp_path) == losses(reference)


def test_resuming_from_an_older_checkpoint_repeats_what_came_after(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    data, reference = whole
    assert forked(lambda: train(toy_config(data, keep=None), tmp_path)) == 0
    before = losses(tmp_path)
    assert forked(lambda: train(toy_config(data), tmp_path, "step-000002")) == 0
    assert losses(tmp_path) == before == losses(reference)


def test_work_after_an_older_checkpoint_is_kept_and_the_later_ones_are_set_aside(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    data, _ = whole
    assert forked(lambda: train(toy_config(data, keep=2), tmp_path)) == 0
    shorter = toy_config(data, keep=1, save_every=1, steps=7)
    assert forked(lambda: train(shorter, tmp_path, "step-000006")) == 0
    assert Checkpoints(tmp_path).names() == ["step-000007"]
    assert Checkpoints(tmp_path).load()[0].state["step"] == 7
    assert (tmp_path / "checkpoints" / "abandoned-step-000008").is_dir()


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 2), (2, 1), (1, 1)])
def test_a_run_resumed_with_other_batches_goes_on_with_unseen_samples(
    batch_size: int, accumulate: int, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    data, _ = whole
    assert forked(lambda: train(toy_config(data, steps=4), tmp_path)) == 0
    config = toy_config(data, steps=5, accumulate=accumulate)
    config.data.batch_size = batch_size

    def resume() -> None:
        original = Trainer._accumulate

        def accumulate_and_note(self: Trainer, batch: Any, *args: Any, **options: Any) -> None:
            with (tmp_path / "ids").open("a") as file:
                file.write(f"{batch['ids'].tolist()}\n")
            original(self, batch, *args, **options)

        Trainer._accumulate = accumulate_and_note  # type: ignore[method-assign]
        train(config, tmp_path, "latest")

    assert forked(resume) == 0
    lines = (tmp_path / "ids").read_text().splitlines()
    ids = [number for line in lines for number in json.loads(line)]
    assert ids == list(range(8, 8 + batch_size * accumulate))


def test_only_the_newest_checkpoints_are_kept(whole: tuple[Path, Path]) -> None:
    _, run = whole
    assert Checkpoints(run).names() == ["step-000004", "step-000006", "step-000008"]
    assert (run / "checkpoints" / "latest").read_text() == "step-000008"


def test_a_stream_with_a_balance_of_rewards_goes_on_exactly(tmp_path: Path) -> None:
    values = stream_values(tmp_path, "stream-r1")
    values["rewards"] = "tests.tiny_streams:Warmth"
    values["method"] |= {"student_every": 1, "balance_window": 4, "balance_warmup": 1}
    config = parse_config(values)
    train(config, tmp_path / "whole")

    def killed() -> None:
        die_after_step(3)
        train(config, tmp_path / "broken")

    assert forked(killed) == -signal.SIGKILL
    train(config, tmp_path / "broken", "latest")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, two = (Checkpoints(tmp_path / name).load()[0] for name in ("whole", "broken"))
    assert one.state["method"] == two.state["method"]
    assert one.state["method"]["balance"]["seen"] == 4
    for file, tensors in one.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(two.tensors[file][name], tensor), (file, name)

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffdistill import checkpoints
from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.train import Interrupted, train
from diffdistill.trainer import Trainer
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


def test_only_the_newest_checkpoints_are_kept(whole: tuple[Path, Path]) -> None:
    _, run = whole
    assert Checkpoints(run).names() == ["step-000004", "step-000006", "step-000008"]
    assert (run / "checkpoints" / "latest").read_text() == "step-000008"

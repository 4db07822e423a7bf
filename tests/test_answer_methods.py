"""Every method for autoregressive models trains a real one, and goes on from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.text.opd import OPD
from tests.answer_run import answer_values, save_answer_world, stopped
from tests.toy_run import forked, losses

LORA = {"adapter": "lora", "rank": 4, "alpha": 8.0}
METHODS: dict[str, dict[str, Any]] = {
    "opd": {"select": "soft-or", "select_scope": "global"},
    "opsd": {},
    "grpo": {"num_answers": 2},
    "rlsd": {"num_answers": 2},
    "sdar": {"num_answers": 2, "weight": 1.0},
    "sdpo": {"num_answers": 2, "support_size": 8, "right": 0.0},
    "exopd": {"guard": "relative", "contract_probability": 0.01},
    "atesd": {"hold": 2, "lookahead": 2, "num_decisions": 2},
    "egx": {"num_answers": 2, "reward_weight": 0.5, "hold": 2, "lookahead": 2},
    "sft-answers": {},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_world(tmp_path_factory.mktemp("world"))


def values_of(world: Path, name: str, **sections: Any) -> dict[str, Any]:
    options = METHODS[name] | ({} if name == "sft-answers" else {"max_tokens": 6})
    if name in ("opsd", "atesd"):
        options |= {"top_k": 0, "top_p": 1.0}
    return answer_values(
        world,
        method={"name": name, **options, **sections.pop("method", {})},
        rewards=[{"name": "tests.answer_run:Length"}],
        **sections,
    )


def moved(run: Path) -> bool:
    """Return whether the student's adapter is no longer what it began as."""
    snapshot, _, _ = Checkpoints(run).load()
    student = snapshot.tensors["role-student"]
    return any(value.abs().sum() > 0 for name, value in student.items() if "lora_B" in name)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_a_lora_and_its_losses_are_finite(
    name: str, world: Path, tmp_path: Path
) -> None:
    roles: dict[str, Any] = {"student": LORA}
    if name in ("opd", "exopd"):  # without privilege, the student's own base has nothing to teach
        roles["teacher"] = {"path": str(world / "other")}
    train(parse_config(values_of(world, name, roles=roles)), tmp_path)
    found = losses(tmp_path)
    assert len(found) == 4
    assert all(torch.tensor(list(found.values())).isfinite())
    assert moved(tmp_path)


@pytest.mark.parametrize("name", ["opd", "atesd"])
def test_a_run_goes_on_exactly(name: str, world: Path, tmp_path: Path) -> None:
    config = parse_config(values_of(world, name))

    assert forked(lambda: train(config, tmp_path / "whole")) == 0
    assert forked(lambda: stopped(config, tmp_path / "broken")) == 1
    assert forked(lambda: train(config, tmp_path / "broken", "latest")) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.parametrize("name", ["opd", "grpo", "sft-answers"])
def test_two_micro_batches_of_two_take_the_step_of_one_of_four(
    name: str, world: Path, tmp_path: Path
) -> None:
    for label, batch_size, accumulate in (("one", 4, 1), ("two", 2, 2)):
        values = values_of(
            world,
            name,
            data={"batch_size": batch_size},
            roles={"teacher": {"path": str(world / "other")}} if name == "opd" else {},
            train={"accumulate": accumulate, "steps": 2, "lr": 0.001},
        )
        train(parse_config(values), tmp_path / label)
    one, two = (losses(tmp_path / label) for label in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


def test_a_step_of_one_micro_batch_is_not_surveyed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveys: list[Any] = []
    survey = OPD.survey
    monkeypatch.setattr(OPD, "survey", lambda *a: surveys.append(1) or survey(*a))
    for accumulate in (1, 2):
        values = values_of(
            world,
            "opd",
            roles={"teacher": {"path": str(world / "other")}},
            train={"accumulate": accumulate, "steps": 1},
        )
        train(parse_config(values), tmp_path / str(accumulate))
        assert len(surveys) == (0 if accumulate == 1 else 2)


def test_egx_trains_without_rewards(world: Path, tmp_path: Path) -> None:
    values = values_of(world, "egx", method={"reward_weight": 0.0, "num_answers": 1})
    train(parse_config(values | {"rewards": None, "train": {"steps": 1}}), tmp_path)
    assert len(losses(tmp_path)) == 1

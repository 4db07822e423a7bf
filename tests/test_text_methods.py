"""The methods for texts on real networks of two tokenizers, through ``diffdistill train``."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.methods.gold import GOLD
from diffdistill.vocabularies import matched_ids
from tests.conftest import START
from tests.text_run import make_pair, save_world, text_batch, text_values
from tests.toy_run import losses

ADDRESSES = {
    "uld": "diffdistill.methods.uld:ULD",
    "gold": "diffdistill.methods.gold:GOLD",
    "sdtt": "diffdistill.methods.sdtt:SDTT",
    "confidence": "diffdistill.methods.confidence:Confidence",
}
RUNS: dict[str, dict[str, Any]] = {
    "uld": {},
    "gold": {},
    "sdtt": {"round_updates": 2, "num_steps": 8, "last_steps": 2},
    "confidence": {"complementary": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def values_of(name: str, world: Path, **sections: Any) -> dict[str, Any]:
    like = "tide" if name in ("uld", "gold") else "bd3lm"  # whether the teacher reads otherwise
    values = text_values(world, like, **sections)
    values["method"] = {"name": ADDRESSES[name], **RUNS[name]}
    return values


@pytest.mark.parametrize("name", RUNS)
def test_a_method_trains_a_block_diffusion_student(name: str, world: Path, tmp_path: Path) -> None:
    train(parse_config(values_of(name, world)), tmp_path)
    found = list(losses(tmp_path).values())
    assert len(set(found)) == 4
    assert all(math.isfinite(value) for value in found)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line["mask_rate/student"] <= 1
    held = {key for key in Checkpoints(tmp_path).load()[0].tensors if key.startswith("role-")}
    assert held == {"role-student"} | ({"role-teacher"} if name == "sdtt" else set())


def test_sdtt_of_one_round_may_share_a_frozen_base_with_its_teacher(
    world: Path, tmp_path: Path
) -> None:
    roles = {
        "student": {"adapter": "lora", "rank": 2, "alpha": 4},
        "teacher": {"weights": "frozen"},
    }
    values = values_of("sdtt", world, roles=roles)
    values["method"]["round_updates"] = None
    train(parse_config(values), tmp_path)
    assert "role-teacher" not in Checkpoints(tmp_path).load()[0].tensors


@pytest.mark.parametrize("name", RUNS)
def test_two_micro_batches_of_two_take_the_step_of_one_of_four(
    name: str, world: Path, tmp_path: Path
) -> None:
    weights = {}
    for run, batch_size, accumulate in (("one", 4, 1), ("two", 2, 2)):
        values = values_of(
            name,
            world,
            data={"batch_size": batch_size},
            train={"accumulate": accumulate, "steps": 2, "save_every": 2, "eps": 1e-3},
        )  # Adam's own epsilon would make a step of any gradient's rounding error
        if name == "confidence":
            values["method"]["normalizer"] = "hidden"
        train(parse_config(values), tmp_path / run)
        weights[run] = Checkpoints(tmp_path / run).load()[0].tensors["role-student"]
    one, two = (losses(tmp_path / run) for run in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    for key, value in weights["one"].items():
        torch.testing.assert_close(value, weights["two"][key], rtol=1e-3, atol=1e-5)


def test_gold_matches_the_words_that_both_tokenizers_spell(world: Path) -> None:
    pair = make_pair(world)
    networks = {name: family.network() for name, family in pair.readers.items()}

    def predict(reader: Any) -> Any:
        family = pair.readers[reader]
        return lambda state, condition: family.predict(networks[reader], state, condition)

    method = GOLD(
        family=pair, draws=Draws(0), student=predict("student"), teacher=predict("teacher")
    )
    ours, theirs = method._matched
    words = [pair.spellings(reader="student"), pair.spellings(reader="teacher")]
    assert len(ours) >= 256
    assert [words[0][i] for i in ours] == [words[1][j] for j in theirs]
    assert all(torch.equal(a, b) for a, b in zip((ours, theirs), matched_ids(*words), strict=True))
    (loss,) = method.losses(text_batch(pair, 3), START)
    assert float(loss.metrics["distillation"]) > 0

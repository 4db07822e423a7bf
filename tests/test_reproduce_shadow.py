"""The script that compares shadows with LoRA and DoRA: its arms and their budgets."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffdistill.config import load_config
from diffdistill.role_building import build_roles
from tests.tiny_text import causal_lm

FOLDER = Path(__file__).parents[1] / "scripts" / "reproduce"


@pytest.fixture
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))  # scripts import each other by name
    yield importlib.import_module("shadow")
    sys.path.remove(str(FOLDER))
    for name in ("shadow", "arithmetic_runs", "collecting"):
        sys.modules.pop(name, None)


class Sized:
    """A family of networks of the size of ``arithmetic-student``, without weights."""

    adapter_targets = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip

    def network(self, path: str | None = None) -> Any:
        with torch.device("meta"):
            return causal_lm(
                hidden_size=96, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3,
                head_dim=32, intermediate_size=256, is_causal=True,
            )  # fmt: skip


def test_arms_of_one_budget_have_equally_many_parameters(script: ModuleType) -> None:
    counts: dict[str, list[int]] = {}
    family: Any = Sized()
    for name, arm in script.ARMS.items():
        if "all weights" in name:
            continue
        settings = load_config(arm.config, arm.overrides).roles
        with torch.device("meta"):
            role = build_roles(settings, family)["student"]
        budget = name.split(", ")[-2]
        counts.setdefault(budget, []).append(sum(p.numel() for p in role.parameters().values()))
    for found in counts.values():
        assert len(found) == 4 * len(script.RATES)
        assert max(found) <= 1.07 * min(found)


def test_arms_differ_in_their_adapter_and_learning_rate_alone(script: ModuleType) -> None:
    configs = [load_config(arm.config, arm.overrides).to_dict() for arm in script.ARMS.values()]
    for config in configs:
        del config["roles"], config["train"]["lr"]
    assert all(config == configs[0] for config in configs)
    assert configs[0]["data"]["path"] == "bundled:arithmetic-json-train.jsonl"
    for other, compared in script.STUDY.against.items():
        assert {other, *compared} <= set(script.ARMS)
        assert len(compared) == 4
    assert set(script.STUDY.drawn) <= set(script.STUDY.shown)

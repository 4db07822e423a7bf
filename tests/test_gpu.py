"""Bundled runs on an accelerator: that they learn there, stop, and go on. Skipped without one."""

import json
import math
from pathlib import Path

import pytest
import torch

from diffdistill.commands.train import train
from diffdistill.config import load_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIGS = [
    "d-opsd/digits",
    "dmd/digits",
    "self-forcing/digits",
    "tide-shared/python",
    "opd/arithmetic",
    "egx/arithmetic",
    "copd/skills",
    "bld/python",
    "switch-kd/digits",
]
PRECISIONS = ["fp32", "bf16"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_goes_on_where_it_stopped(name: str, precision: str, tmp_path: Path) -> None:
    here = ["tracking.tensorboard=false", f"train.precision={precision}", "train.warmup=0"]
    here += ["train.save_every=2", "train.schedule=constant"]
    train(load_config(name, [*here, "train.steps=2"]), tmp_path)
    train(load_config(name, [*here, "train.steps=4"]), tmp_path, resume="latest")
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    losses = [value for step in steps for key, value in step.items() if key.startswith("loss/")]
    assert len(losses) >= 4
    assert all(map(math.isfinite, losses))

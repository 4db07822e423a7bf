"""A config of the toy family that trains in milliseconds, and forked runs of it."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffdistill.config import RunConfig, parse_config


def adapted(adapter: str, **lora: int) -> dict[str, Any]:
    """Return the settings of a role with a LoRA of this size, or without an adapter."""
    return {"adapter": adapter, **(lora if adapter == "lora" else {})}


def make_data(folder: Path, count: int = 12) -> Path:
    """Write ``count`` random 8x8 images with numbers as captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": str(index / 10)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def toy_values(data: Path, **train: Any) -> dict[str, Any]:
    """Return the values of a toy D-OPSD config."""
    return {
        "family": {"name": "toy"},
        "method": {"name": "d-opsd", "num_steps": 2},
        "roles": {
            "student": {"adapter": "lora", "rank": 2, "alpha": 4},
            "teacher": {"weights": "ema", "decay": 0.9},
        },
        "data": {"path": str(data), "batch_size": 2, "resolution": 8, "multiple": 4},
        "train": {"steps": 8, "lr": 0.01, "save_every": 2, **train},
        "tracking": {"tensorboard": False},
    }


def toy_config(data: Path, **train: Any) -> RunConfig:
    """Return a toy D-OPSD config."""
    return parse_config(toy_values(data, **train))


def forked(task: Callable[[], None]) -> int:
    """Run ``task`` in a forked child; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            task()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def losses(run: Path) -> dict[int, float]:
    """Return the student's loss of each step in a run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({r["step"] for r in records}) == len(records)
    return {r["step"]: r["loss/student"] for r in records}

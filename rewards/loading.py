"""Finding the files of a reward on the disk: nothing is ever downloaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffdistill.errors import UserError

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the type of that name; ``auto`` is bf16 on CUDA and fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def local(path: str, reward: str, key: str, what: str) -> Path:
    """Return an existing path.

    Raises:
        UserError: If it is not given or not there.
    """
    if not path:
        raise UserError(f"reward {reward}: set {key} to {what}; nothing is downloaded")
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"reward {reward}: {key}: {path} does not exist; it should be {what}")
    return found


@contextmanager
def explained(reward: str, task: str) -> Iterator[None]:
    """Turn what the libraries raise about files within the block into one ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError)
        if not isinstance(error, known) and type(error).__name__ != "UnpicklingError":
            raise
        detail = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        raise UserError(f"reward {reward}: cannot {task}: {kind}: {detail}") from error


def read_json(file: Path, reward: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: If it is missing or holds something else.
    """
    with explained(reward, f"read {file}"):
        values = json.loads(file.read_text())
    if not isinstance(values, dict):
        raise UserError(f"reward {reward}: {file}: expected keys and values")
    return values


def read_weights(file: Path, reward: str) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file, or in a torch file without code (weights only).

    Raises:
        UserError: If it is neither.
    """
    with explained(reward, f"load {file}"):
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        return {k: v for k, v in weights.items() if isinstance(v, Tensor)}

"""A run's folder: who holds it, and what it says about itself."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from diffdistill.checkpoints import write_atomic
from diffdistill.errors import UserError

PACKAGES = ("diffdistill", "torch", "diffusers", "transformers", "accelerate", "peft")


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold the run folder ``output`` within the block; it is made if need be.

    Raises:
        UserError: If another run holds it, or it cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UserError(f"{output} is in use by another run; choose another --output") from None
    try:
        yield
    finally:
        os.close(handle)


def check_fresh(output: Path) -> None:
    """Refuse to start over in a folder that holds a run.

    Raises:
        UserError: If there are metrics of an earlier run.
    """
    metrics = output / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > 0:
        raise UserError(
            f"{output} already holds a run: continue it with --resume, or choose another --output"
        )


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_versions(output: Path) -> None:
    """Write the versions into the run's folder."""
    write_atomic(output / "versions.json", json.dumps(versions(), indent=1).encode())

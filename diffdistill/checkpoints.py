"""Checkpoints: written aside, synced and renamed, verified when read.

``DIR/checkpoints/step-NNNNNN/`` holds ``role-*.safetensors``, ``optimizer-*.safetensors``,
``state.json``, what the run attaches (where the weights come from), and ``manifest.json`` (sizes
and SHA-256 of the others); ``latest`` names the newest. A run can be killed at any moment: what is
there under its final name is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from diffdistill.config import load_config
from diffdistill.distributed import fill, gathered, like
from diffdistill.errors import UserError
from diffdistill.roles import Role
from diffdistill.session import Session, build

STEP = re.compile(r"step-[0-9]+")


@dataclass
class Snapshot:
    """What a checkpoint holds, in memory: tensors by file, and JSON values."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def role_tensors(role: Role, *, kept: bool = True) -> dict[str, Tensor]:
    """Return the full weights that are the role's own, on the CPU.

    See ``gathered`` for ``kept``.
    """
    return gathered(role.parameters(), kept=kept)


def load_role(role: Role, tensors: Mapping[str, Tensor], where: str) -> None:
    """Set the role's own weights.

    Raises:
        UserError: If names or shapes are those of another model.
    """
    own = role.parameters()
    if own.keys() != tensors.keys():
        other = sorted(own.keys() ^ tensors.keys())
        raise UserError(
            f"{where}: a checkpoint of another model: role {role.name!r} differs in "
            f"{len(other)} weights, such as {other[0]!r}"
        )
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(
                f"{where}: a checkpoint of another model: {name!r} of role {role.name!r} is "
                f"{tuple(tensors[name].shape)}, here {tuple(parameter.shape)}"
            )
        fill(parameter, tensors[name])


def optimizer_tensors(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, kept: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as full tensors, and its plain numbers, by parameter name.

    See ``gathered`` for ``kept``.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    return gathered(tensors, kept=kept), numbers


def load_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Set an optimizer's state to what ``optimizer_tensors`` returned."""
    for full, value in {**tensors, **numbers}.items():
        name, _, key = full.rpartition("/")
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if not isinstance(value, Tensor):
            state[key] = value
        elif key == "step":
            state[key] = _step(optimizer, value, parameter)
        else:
            state[key] = like(value, parameter)


def _step(optimizer: Optimizer, value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return how often a parameter was updated, ``[]``, where its optimizer reads it.

    Fused and capturable kernels read it beside the parameter, the others on the CPU: the rule of
    torch's own ``Optimizer.load_state_dict``.
    """
    (group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if group.get("fused") or group.get("capturable"):
        return value.to(parameter.device, torch.float32)
    return value


class Checkpoints:
    """The checkpoints of one run folder.

    Attributes:
        attach: Returns further small files of the checkpoint of a step, by name.
    """

    def __init__(self, output: Path, keep: int | None = None) -> None:
        self.folder = output / "checkpoints"
        self.keep = keep
        self.attach: Callable[[int], Mapping[str, bytes]] = lambda step: {}

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write the checkpoint of ``step`` atomically and drop old ones.

        Raises:
            UserError: If it cannot be written; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{step:06d}"
        aside = self.folder / f".writing-{step:06d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            _write_files(aside, snapshot, self.attach(step))
            _replace(aside, final)
            write_atomic(self.folder / "latest", final.name.encode())
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            kept = self.names()
            left = f"{kept[-1]} is intact" if kept else "there is no earlier one"
            raise UserError(f"cannot write the checkpoint {final}: {error}; {left}") from error
        self._retain()
        return final

    def names(self) -> list[str]:
        """Return the names of all complete checkpoints, oldest first."""
        found = (p.name for p in self.folder.glob("step-*") if p.is_dir())
        named = [name for name in found if STEP.fullmatch(name)]
        return sorted(named, key=_step_of)

    def load(self, which: str = "latest") -> tuple[Snapshot, Path, list[str]]:
        """Return a verified checkpoint, its folder, and what was wrong with newer ones.

        Args:
            which: ``latest`` falls back to earlier checkpoints where one is damaged; a name
                or a path must be whole.

        Raises:
            UserError: If there is none, or none that is whole.
        """
        if which != "latest":
            path = Path(which) if Path(which).is_dir() else self.folder / which
            return _read(path), path, []
        problems: list[str] = []
        for name in reversed(self.names()):
            try:
                return _read(self.folder / name), self.folder / name, problems
            except UserError as error:
                problems.append(str(error))
        detail = f": {'; '.join(problems)}" if problems else ""
        raise UserError(f"no usable checkpoint in {self.folder}{detail}")

    def clean(self) -> None:
        """Remove what a killed run left half written."""
        for pattern in (".writing-*", ".replaced-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def abandon_after(self, step: int) -> None:
        """Rename checkpoints later than ``step``, where a run goes on, to ``abandoned-*``."""
        for name in self.names():
            if _step_of(name) > step:
                _replace(self.folder / name, self.folder / f"abandoned-{name}")

    def _retain(self) -> None:
        if self.keep is not None:
            for name in self.names()[: -self.keep]:
                shutil.rmtree(self.folder / name, ignore_errors=True)


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _replace(source: Path, target: Path) -> None:
    """Rename a folder to a name that another may have; one of them is always there."""
    old = target.with_name(f".replaced-{target.name}")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def restore(
    run: Path,
    which: str = "latest",
    device: torch.device | None = None,
    overrides: Sequence[str] = (),
) -> Session:
    """Return the session of a run folder with the weights of one of its checkpoints.

    See ``restored``.
    """
    return restored(run, which, device, overrides)[0]


def restored(
    run: Path,
    which: str = "latest",
    device: torch.device | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Session, Path]:
    """Return the session of a run folder with a checkpoint's weights, and that checkpoint.

    Args:
        run: The run's folder.
        which: Which of its checkpoints.
        device: Where everything runs; None is this process's accelerator, or the CPU.
        overrides: ``section.key=value`` changes of the run's config.

    Raises:
        UserError: If the folder is no run, or has no usable checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    session = build(load_config(str(run / "config.yaml"), overrides), device)
    snapshot, path, _ = Checkpoints(run).load(which)
    load_roles(session, snapshot, path)
    return session, path


def load_roles(session: Session, snapshot: Snapshot, path: Path) -> None:
    """Set the weights of every role that has its own."""
    for role in session.roles.by_name.values():
        if role.parameters():
            tensors = snapshot.tensors.get(f"role-{role.name}")
            if tensors is None:
                raise UserError(f"{path}: a checkpoint of another model: no role {role.name!r}")
            load_role(role, tensors, str(path))


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_files(folder: Path, snapshot: Snapshot, attached: Mapping[str, bytes]) -> None:
    for name, tensors in snapshot.tensors.items():
        save_file(tensors, folder / f"{name}.safetensors")
    for name, content in attached.items():
        (folder / name).write_bytes(content)
    (folder / "state.json").write_text(json.dumps(snapshot.state))
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _read(folder: Path) -> Snapshot:
    if not folder.is_dir():
        raise UserError(f"no checkpoint {folder}")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, entry in manifest.items():
            _verify(folder / name, entry)
        tensors = {p.stem: load_file(p) for p in sorted(folder.glob("*.safetensors"))}
        return Snapshot(tensors, json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"damaged checkpoint {folder}: {error}") from error


def _verify(path: Path, entry: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes instead of {entry['bytes']}")
    if _digest(path) != entry["sha256"]:
        raise ValueError(f"{path.name} has changed since it was written")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A student's weights for an inference engine: whether they changed, and as a folder.

A folder is what transformers and peft read, and what every engine loads. In memory
(``/dev/shm``) writing one takes as long as copying it.
"""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.exporting_text import export_adapter, export_language_model
from diffdistill.rollouts import Actor

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Handover:
    """Hands over the weights of a student whenever they are others than those handed over last.

    Attributes:
        label: A name for the weights that the engine has; new with each handover.
    """

    def __init__(self, folder: str | None) -> None:
        """Create a handover.

        Args:
            folder: Where folders are written, one at a time; None is a temporary folder.
        """
        self.label = ""
        self._given = folder
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._run = secrets.token_hex(4)
        self._count = 0
        self._last: Path | None = None
        self._known: list[int] | None = None

    def due(self, student: Actor) -> bool:
        """Return whether the student has changed; it is then taken to be handed over."""
        found = fingerprint(student)
        changed = found != self._known
        self._known = found
        return changed

    def failed(self) -> None:
        """Take the weights not to be handed over after all."""
        self._known = None

    @contextmanager
    def written(self, family: CausalLM, student: Actor) -> Iterator[Path]:
        """Write the student's adapter, or all weights if it has none; yield the folder.

        The folder before it is removed after the block, and this one if the block failed.

        Raises:
            UserError: If it cannot be written.
        """
        self._count += 1
        label = f"student-{self._run}-{self._count}"
        folder = self._root() / label
        try:
            _write(family, student, folder)
            yield folder
        except BaseException:
            self.failed()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if self._last is not None:
            shutil.rmtree(self._last, ignore_errors=True)
        self.label, self._last = label, folder

    def _root(self) -> Path:
        if self._given is not None:
            return Path(self._given).expanduser().absolute()
        if self._own is None:
            self._own = tempfile.TemporaryDirectory(prefix="diffdistill-")
        return Path(self._own.name)


def _write(family: CausalLM, student: Actor, folder: Path) -> None:
    if student.adapter is None:
        export_language_model(family, student.network, folder)
        return
    weights = {name: value.detach().cpu() for name, value in student.parameters().items()}
    export_adapter(family, weights, folder, student.settings)


@torch.no_grad()
def fingerprint(student: Actor) -> list[int]:
    """Return a number for each of the student's weights that changes if any of its bits does.

    The sum of the bits as whole numbers; torch's own counters of changes miss optimizers that
    write from outside of torch.
    """
    sums = [_bits(value).sum(dtype=torch.int64) for value in student.parameters().values()]
    return torch.stack(sums).tolist() if sums else []


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(BITS[value.element_size()])


def check_served(family: CausalLM, engine: str) -> None:
    """Refuse a base that an engine cannot run as it is.

    Raises:
        UserError: If it is stored in a way of which engines have none.
    """
    if family.quantize == "int8":
        raise UserError(
            f"engine {engine} has no int8 of bitsandbytes, so it would answer with other weights: "
            "set family.quantize: nf4 or none"
        )

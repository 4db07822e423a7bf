"""What a run needs, from building it and taking one step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diffdistill.trainer import Trainer

GIB = 2**30


@dataclass
class SavedTensors:
    """The bytes that autograd keeps for backward passes: now, and at most."""

    now: int = 0
    peak: int = 0
    alive: dict[int, int] = field(default_factory=dict)


@contextmanager
def saved_tensors(ignored: set[int]) -> Iterator[SavedTensors]:
    """Measure what autograd saves within the block, each storage once.

    Args:
        ignored: Addresses of storages that are there anyway, such as weights.
    """
    record = SavedTensors()

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            self.address = tensor.untyped_storage().data_ptr()
            if self.address in ignored:
                return
            if self.address not in record.alive:
                record.now += tensor.untyped_storage().nbytes()
                record.peak = max(record.peak, record.now)
            record.alive[self.address] = record.alive.get(self.address, 0) + 1

        def __del__(self) -> None:
            if self.address in ignored or self.address not in record.alive:
                return
            record.alive[self.address] -= 1
            if record.alive[self.address] == 0:
                del record.alive[self.address]
                record.now -= self.tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield record


def nbytes(parameters: Iterator[nn.Parameter]) -> int:
    """Return the bytes of distinct parameters."""
    return sum({p.data_ptr(): p.nbytes for p in parameters}.values())


def describe(trainer: Trainer) -> str:
    """Take one step and return, as text, parameters per role and the memory of each part."""
    session = trainer.session
    modules = session.roles.modules()
    weights = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    with saved_tensors(weights) as saved:
        metrics = trainer.train_step()
    parts = {
        "weights": nbytes(p for m in modules for p in m.parameters()),
        "gradients": sum(nbytes(iter(r.parameters().values())) for r in session.roles.trained()),
        "optimizers": sum(
            value.nbytes
            for optimizer in trainer.optimizers.values()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
        "saved for backward (peak)": saved.peak,
    }
    losses = ", ".join(f"{n} {v:.4g}" for n, v in metrics.items() if n.startswith("loss/"))
    return "\n".join(
        [
            _render(_roles_table(trainer)),
            _render(_memory_table(parts)),
            f"one step: {losses}, {metrics['seconds']:.2f} s, measured peak of the process "
            f"{metrics['peak_memory_gib']:.2f} GiB",
        ]
    )


def _roles_table(trainer: Trainer) -> Table:
    table = Table("role", "weights", "parameters", "trained", "share", "adapted layers")
    roles = trainer.session.roles
    for role in roles.by_name.values():
        total = sum(p.numel() for p in role.network.parameters())
        trained = sum(p.numel() for p in role.parameters().values()) if role.trained else 0
        table.add_row(
            role.name,
            role.settings.weights,
            f"{total:,}",
            f"{trained:,}",
            f"{trained / max(total, 1):.2%}",
            str(roles.matched.get(role.name, "-")),
        )
    return table


def _memory_table(parts: dict[str, int]) -> Table:
    table = Table("estimated memory", "GiB")
    for name, size in (parts | {"total": sum(parts.values())}).items():
        table.add_row(name, f"{size / GIB:.3f}")
    return table


def _render(table: Table) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()

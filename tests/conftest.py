"""One thread, and the small parts that many tests are made of."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.method import Method
from diffdistill.pipelines.toy import Toy
from diffdistill.protocols import Model
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Role, Roles
from diffdistill.types import Batch, Condition, Loss, Progress, State

torch.set_num_threads(1)

CPU = torch.device("cpu")
START = Progress(0, 100)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def make_toy(**options: Any) -> Toy:
    return Toy(path="", device=CPU, **options)


def make_batch(size: int, *, seed: int, first_id: int = 0) -> dict[str, Any]:
    """Return random 4x4 images with random numbers as prompts."""
    rows = torch.Generator().manual_seed(seed)
    return {
        "prompt": torch.rand(size, generator=rows) - 0.5,
        "latents": torch.rand(size, 3, 4, 4, generator=rows),
        "ids": torch.arange(first_id, first_id + size),
        "prompts": [""] * size,
    }


def rows_of(batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """Return some rows of a batch, as a smaller micro-batch of the same samples."""
    index = torch.tensor(rows)
    tensors = {k: v[index] for k, v in batch.items() if isinstance(v, Tensor)}
    return tensors | {"prompts": [batch["prompts"][row] for row in rows]}


def make_roles(family: Any, *, seed: int = 7, **settings: dict[str, Any]) -> Roles:
    parsed = {name: RoleSettings(**given) for name, given in settings.items()}
    return build_roles(parsed, family, seed=seed)


def disturb(role: Role, *, seed: int, scale: float = 0.3) -> None:
    """Move a role's own weights by Gaussian noise, so that nothing is zero by symmetry."""
    rng = generator(seed)
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=rng))


def descend(losses: Iterator[Loss]) -> list[float]:
    """Back-propagate each loss before asking for the next, as the trainer does."""
    values = []
    for loss in losses:
        (loss.value * loss.count).backward()
        values.append(loss.value.item())
    return values


def gradients(role: Role) -> dict[str, Tensor]:
    """Return copies of the gradients of a role's parameters that have one."""
    return {n: p.grad.clone() for n, p in role.parameters().items() if p.grad is not None}


def clear(*modules: nn.Module) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)


def method_gradients(method: Method, role: Role, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the gradients of one optimizer step over micro-batches, divided by their counts."""
    clear(role.network)
    total = 0.0
    for batch in batches:
        for loss in method.losses(batch, START):
            (loss.value * loss.count).backward()
            total += loss.count
    return {name: gradient / total for name, gradient in gradients(role).items()}


class Spy:
    """A model that remembers what it was asked, and whether a graph was being recorded."""

    def __init__(self, model: Model, log: list[str] | None = None, name: str = "") -> None:
        self.model = model
        self.name = name
        self.log = [] if log is None else log
        self.states: list[State] = []
        self.conditions: list[Condition] = []
        self.grad_enabled: list[bool] = []

    def __call__(self, state: State, condition: Condition) -> Tensor:
        self.log.append(self.name)
        self.states.append(state)
        self.conditions.append(condition)
        self.grad_enabled.append(torch.is_grad_enabled())
        return self.model(state, condition)


class Towards:
    """The exact velocity of a distribution with one point: ``(x - point) / t``."""

    def __init__(self, point: Tensor | float) -> None:
        self.point = torch.as_tensor(point, dtype=torch.float32)

    def __call__(self, state: State, condition: Condition) -> Tensor:
        t = state.t.reshape(-1, 1, 1, 1)
        return (state.x - self.point) / t

"""What depends on how many processes train, on top of accelerate.

Gradients are reduced by us, once per optimizer step, instead of by DistributedDataParallel:
a method may back-propagate several losses into several roles of one network per step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from diffdistill.bundled import LAUNCHERS
from diffdistill.errors import UserError

BUCKET_BYTES = 256 * 2**20


class Distributed:
    """The processes of this run: one, several with copies, or several with shards (FSDP2).

    Attributes:
        rank: The number of this process.
        world: How many there are.
        main: Whether this one writes files.
        sharded: Whether networks are spread over them.
        parts: How many neighbouring processes read the same micro-batches, each for a part of the
            losses.
    """

    def __init__(self) -> None:
        self.accelerator = Accelerator()
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.main: bool = self.accelerator.is_main_process
        self.sharded: bool = self.accelerator.is_fsdp2
        self.parts = 1

    @property
    def part(self) -> int:
        """Return which part of the losses this process has."""
        return self.rank % self.parts

    @property
    def reader(self) -> int:
        """Return the number of the processes that read what this one reads."""
        return self.rank // self.parts

    @property
    def readers(self) -> int:
        """Return how many micro-batches are read at a time."""
        return self.world // self.parts

    def divide(self, parts: int) -> None:
        """Divide the losses of a batch among so many processes; one process has all of them.

        Raises:
            UserError: If the processes cannot be divided so.
        """
        if self.world == 1 or parts == 1:
            return
        if self.sharded:
            raise UserError(
                "the losses of a batch are divided among processes, and all of these must run a "
                f"sharded network together: launch with {LAUNCHERS / 'ddp.yaml'}"
            )
        if self.world % parts:
            enough = parts * math.ceil(self.world / parts)
            raise UserError(
                f"the losses of a batch are divided among {parts} processes, and {self.world} are "
                f"no multiple of that: launch with --num_processes {enough}"
            )
        self.parts = parts

    @property
    def device(self) -> torch.device:
        """Return this process's device."""
        return self.accelerator.device

    def shard(self, networks: Sequence[nn.Module]) -> None:
        """Shard the networks in place, where the run was launched with FSDP2."""
        if not self.sharded:
            return
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        plugin = self.accelerator.state.fsdp_plugin
        blocks = plugin.transformer_cls_names_to_wrap
        for network in networks:
            plugin.transformer_cls_names_to_wrap = blocks  # accelerate keeps the first network's
            fsdp2_prepare_model(self.accelerator, network)

    def synchronize_on_backward(self, network: nn.Module, enabled: bool) -> None:
        """Say whether the next backward pass of a sharded network reduces its gradients."""
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(enabled)

    def reshard(self, networks: Sequence[nn.Module]) -> None:
        """Give up the full weights that the last forward passes of sharded networks left.

        FSDP2 keeps a root module's weights whole after a forward pass, until a backward pass
        that a teacher never has.
        """
        if self.sharded:
            for network in networks:
                for module in network.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def average_gradients(self, parameters: Sequence[nn.Parameter], count: float) -> None:
        """Turn gradients of sums into those of the mean over ``count`` things on all ranks."""
        sharded = [p for p in parameters if isinstance(p, DTensor)]
        copied = [p for p in parameters if not isinstance(p, DTensor)]
        self._sum_over_ranks(copied)
        scale_gradients(copied, 1.0 / count)
        scale_gradients(sharded, self.world / count)  # FSDP2 has averaged over ranks already

    def _sum_over_ranks(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in bucket]), "sum")
            parts = flat.split([g.numel() for g in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def total(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the sum of each scalar over all ranks; the keys must agree."""
        if not values:
            return {}
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if self.world > 1:
            stacked = self.accelerator.reduce(stacked, "sum")
        return dict(zip(values, stacked.tolist(), strict=True))

    def union(self, names: Iterable[str]) -> list[str]:
        """Return the names of all ranks, each once, in one order."""
        return list(dict.fromkeys(gather_object(list(names)) if self.world > 1 else names))

    def gather(self, values: Tensor) -> Tensor:
        """Return the values ``[n]`` of all ranks, one after the other; n may differ."""
        if self.world == 1:
            return values
        sizes = self.accelerator.gather(torch.tensor([len(values)], device=self.device))
        most = int(sizes.max())
        padded = torch.nn.functional.pad(values, (0, most - len(values)))
        rows = self.accelerator.gather(padded).view(self.world, most)
        return torch.cat([row[:size] for row, size in zip(rows, sizes.tolist(), strict=True)])

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Return whether any rank says yes."""
        if self.world == 1:
            return flag
        told = torch.tensor(float(flag), device=self.device)
        return bool(self.accelerator.reduce(told, "sum").item() > 0)

    def close(self) -> None:
        """Leave the process group."""
        self.accelerator.end_training()


def scale_gradients(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply gradients of one kind, all sharded or none, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """Return the norm of all gradients; scale them where it is above ``limit``.

    Sharded and copied parameters may be mixed, which torch's own function refuses.
    """
    kinds = (
        [p for p in parameters if isinstance(p, DTensor)],
        [p for p in parameters if not isinstance(p, DTensor)],
    )
    norms = []
    for kind in kinds:
        norm = torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
    total = math.hypot(*norms)
    if limit is not None and total > limit:
        for kind in kinds:
            scale_gradients(kind, limit / total)
    return total


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for gradient in gradients:
        if size > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return [bucket for bucket in buckets if bucket]


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor on the CPU; every rank must ask for a sharded one."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], *, kept: bool = True) -> dict[str, Tensor]:
    """Return the full tensors on the CPU, by name; every rank must ask for sharded ones.

    Args:
        tensors: Sharded or not.
        kept: False only takes part for the ranks that keep them, and returns nothing: the ranks of
            a machine share its memory, which the full tensors of each of them may fill.
    """
    if kept:
        return {name: whole(tensor) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        if isinstance(tensor, DTensor):
            tensor.full_tensor()
    return {}


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter, sharded or not, to a full tensor."""
    parameter.copy_(like(value, parameter))


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a full tensor laid out as ``parameter`` is, where the shapes agree."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value

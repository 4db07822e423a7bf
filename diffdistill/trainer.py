"""The training loop: one optimizer step, many, and exact checkpoints of where it is."""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffdistill.bundled import LAUNCHERS
from diffdistill.checkpoints import (
    Snapshot,
    load_optimizer,
    load_roles,
    optimizer_tensors,
    role_tensors,
)
from diffdistill.distributed import Distributed, clip_gradients
from diffdistill.errors import UserError
from diffdistill.extra_gradients import ExtraGradients
from diffdistill.method import Method
from diffdistill.optimizers import make_optimizer
from diffdistill.role_building import copy_parameters
from diffdistill.schedules import learning_rate_factor
from diffdistill.session import Session
from diffdistill.types import Batch, Loss, Progress


@dataclass
class Sums:
    """What the losses of one step add up to, by role: values times counts, and counts."""

    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, loss: Loss) -> None:
        """Add one loss and its metrics."""
        self.count(f"loss/{loss.role}", loss.value, loss.count)
        for name, value in loss.metrics.items():
            metric = torch.as_tensor(value, device=loss.value.device)
            self.count(f"{name}/{loss.role}", metric, loss.count)

    def count(self, name: str, value: Tensor, count: float) -> None:
        """Add one value, a mean over so many things."""
        self.values[name] = self.values.get(name, 0) + value.detach() * count
        self.counts[name] += count

    def means(self, distributed: Distributed) -> tuple[dict[str, float], dict[str, float]]:
        """Return the count-weighted mean of each value over all ranks, and the counts."""
        if distributed.parts > 1:
            self._include(distributed.union(self.counts), distributed.device)
        values = distributed.total(self.values)
        counts = distributed.total(
            {n: torch.tensor(c, device=distributed.device) for n, c in self.counts.items()}
        )
        return {name: values[name] / counts[name] for name in values}, counts

    def _include(self, names: Sequence[str], device: torch.device) -> None:
        """Count what only other ranks have, in the order in which all do."""
        nothing = torch.zeros((), device=device)
        self.values = {name: self.values.get(name, nothing) for name in names}
        self.counts = {name: self.counts.get(name, 0.0) for name in names}


class Trainer:
    """Steps the optimizer of every role that a step gave a loss to.

    Args:
        session: The built run.
        batches: Endless micro-batches.
        distributed: The processes of the run; networks are sharded before.
    """

    def __init__(
        self, session: Session, batches: Iterator[Batch], distributed: Distributed
    ) -> None:
        self.session = session
        self.settings = session.config.train
        self.batches = batches
        self.distributed = distributed
        self.step = 0
        self.samples = 0
        self.bad_steps = 0
        self.updates: dict[str, int] = defaultdict(int)
        self.extra = ExtraGradients()
        self._check_shards()
        self.optimizers: dict[str, Optimizer] = {}
        for role in session.roles.trained():
            self.optimizers[role.name] = make_optimizer(self.settings, role)
        self.renewals = self._renewals()

    def train_step(self) -> dict[str, float]:
        """Train on one optimizer step's micro-batches and return its metrics.

        Raises:
            UserError: After ``max_bad_steps`` consecutive steps that were not finite.
        """
        started = time.perf_counter()
        self._seed_globals()
        batches, progress = self._looked_ahead()
        sums = Sums()
        for micro in range(self.settings.accumulate):
            last = micro + 1 == self.settings.accumulate
            self._accumulate(next(batches), progress, sums, last=last)
        self.distributed.reshard(self.session.roles.networks())
        metrics, totals = sums.means(self.distributed)
        metrics |= self._update(progress, metrics, totals)
        self.step += 1
        batch_size = self.session.config.data.batch_size
        self.samples += self.distributed.readers * self.settings.accumulate * batch_size
        metrics["seconds"] = time.perf_counter() - started
        metrics["peak_memory_gib"] = peak_memory(self.session.device) / 2**30
        return metrics

    def _looked_ahead(self) -> tuple[Iterator[Batch], Progress]:
        """Return the micro-batches of a step, and what the method must know of all of them."""
        method, distributed = self.session.method, self.distributed
        progress = Progress(
            self.step, self.settings.steps, part=distributed.part, parts=distributed.parts
        )
        counts = type(method).counts is not Method.counts
        alone = distributed.parts == 1
        assert alone or not (counts or method.pools()), "parts of a batch are not counted apart"
        several = self.settings.accumulate * distributed.world > 1
        pools = several and method.pools()  # one micro-batch is its own pool
        if not counts and not pools:
            return self.batches, progress
        batches = [next(self.batches) for _ in range(self.settings.accumulate)]
        if counts:
            progress = progress._replace(counts=self._counted(batches))
        if pools:
            progress = progress._replace(pools=self._pooled(batches, progress))
        return iter(batches), progress

    def _pooled(self, batches: Sequence[Batch], progress: Progress) -> dict[str, Tensor]:
        """Return the values of all micro-batches on all ranks, by name."""
        method = self.session.method
        found = [method.survey(batch, progress) for batch in batches]
        return {
            name: self.distributed.gather(torch.cat([values[name] for values in found]))
            for name in found[0]
        }

    def _counted(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Return what the method counts in all micro-batches on all ranks."""
        method = self.session.method
        sums: dict[str, float] = defaultdict(float)
        for batch in batches:
            for name, count in method.counts(batch).items():
                sums[name] += count
        device = self.distributed.device
        totals = {name: torch.tensor(count, device=device) for name, count in sums.items()}
        return self.distributed.total(totals)

    def _accumulate(self, batch: Batch, progress: Progress, sums: Sums, *, last: bool) -> None:
        for loss in self.session.method.losses(batch, progress):
            role = self.session.roles[loss.role]
            self.distributed.synchronize_on_backward(role.network, last and not loss.more)
            if (extra := role.extra()) is not None:
                self.extra.add(role, extra)
                sums.count(f"shadow/{role.name}", extra.value, extra.count)
            (loss.value * loss.count).backward()
            sums.add(loss)

    def _update(
        self, progress: Progress, means: dict[str, float], counts: dict[str, float]
    ) -> dict[str, float]:
        """Reduce, clip and apply the gradients; return norms and learning rates."""
        metrics: dict[str, float] = {}
        roles = [name.removeprefix("loss/") for name in means if name.startswith("loss/")]
        for name in roles:
            parameters = list(self.session.roles[name].parameters().values())
            if extra := counts.get(f"shadow/{name}"):
                self.extra.join(self.session.roles[name], counts[f"loss/{name}"] / extra)
            self.distributed.average_gradients(parameters, counts[f"loss/{name}"])
            metrics[f"grad_norm/{name}"] = clip_gradients(parameters, self.settings.clip)
        finite = all(math.isfinite(v) for v in [*means.values(), *metrics.values()])
        self._count_bad(finite, means | metrics)
        for name in roles:
            optimizer = self.optimizers[name]
            rates = self._set_lr(name, progress)
            if finite:
                optimizer.step()
                self.updates[name] += 1
                self.session.roles.average(name, self.updates[name])
                self._renew(name)
            optimizer.zero_grad(set_to_none=True)
            metrics |= {f"lr/{part}": lr for part, lr in rates.items()}
        if finite:
            self.session.method.observe(means)
        else:
            metrics["skipped"] = 1.0
        return metrics

    def _check_shards(self) -> None:
        """Refuse to spread a shadow over processes that learns to stand alone.

        Raises:
            UserError: If one is.
        """
        for role in self.session.roles.trained() if self.distributed.sharded else []:
            if role.settings.shadow is not None and role.settings.shadow.auxiliary_weight:
                raise UserError(
                    f"roles.{role.name}: what a shadow learns alone needs its whole weights in "
                    f"each process: launch with {LAUNCHERS / 'ddp.yaml'}, or set "
                    f"roles.{role.name}.shadow.auxiliary_weight: 0"
                )

    def _renewals(self) -> dict[str, Container[int]]:
        """Return when the method wants which roles renewed.

        Raises:
            UserError: If one has no weights of its own that could be.
        """
        wanted = dict(self.session.method.renewals())
        for name in wanted:
            weights = self.session.roles[name].settings.weights
            if weights != "ema":
                raise UserError(
                    f"roles.{name}: the method makes it a copy of a trained role from time to "
                    f"time, so its weights must be ema, not {weights}"
                )
        return wanted

    def _renew(self, updated: str) -> None:
        """Make copies of a role that was just updated, where it is time."""
        for name, times in self.renewals.items():
            role = self.session.roles[name]
            if role.settings.of == updated and self.updates[updated] in times:
                copy_parameters(self.session.roles[updated], role)

    def _set_lr(self, name: str, progress: Progress) -> dict[str, float]:
        """Set the learning rates of a role, and return them: of its head apart, if of its own."""
        factor = learning_rate_factor(
            progress.step, progress.total, kind=self.settings.schedule, warmup=self.settings.warmup
        )
        groups = self.optimizers[name].param_groups
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        rates = [group["lr"] for group in groups]
        return dict(zip((name, f"{name}/head"), rates, strict=False))

    def _count_bad(self, finite: bool, metrics: dict[str, float]) -> None:
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= self.settings.max_bad_steps:
            bad = ", ".join(n for n, v in metrics.items() if not math.isfinite(v))
            raise UserError(
                f"step {self.step + 1}: {self.bad_steps} steps in a row were not finite ({bad}); "
                "lower train.lr, or train in fp32; the last checkpoint is from before"
            )

    def _seed_globals(self) -> None:
        """Seed torch's global generators (dropout) by step and rank, so nothing need be saved."""
        number = self.step * self.distributed.world + self.distributed.rank
        torch.manual_seed(self.session.draws.generator("global", number).initial_seed())

    def snapshot(self) -> Snapshot:
        """Return everything that an exact continuation needs.

        Every rank must call it, and the main one, which writes files, has the tensors.
        """
        main = self.distributed.main
        tensors: dict[str, dict[str, Tensor]] = {}
        numbers: dict[str, Any] = {}
        for role in self.session.roles.by_name.values():
            if own := role_tensors(role, kept=main):
                tensors[f"role-{role.name}"] = own
        for name, optimizer in self.optimizers.items():
            parameters = self.session.roles[name].parameters()
            file, numbers[name] = optimizer_tensors(optimizer, parameters, kept=main)
            if file:
                tensors[f"optimizer-{name}"] = file
        state = {
            "step": self.step,
            "bad_steps": self.bad_steps,
            "optimizers": numbers,
            "method": self.session.method.state(),
            "samples": self.samples,
            "updates": dict(self.updates),
        }
        return Snapshot(tensors, state)

    def load(self, snapshot: Snapshot, path: Any) -> None:
        """Continue from a snapshot.

        Raises:
            UserError: If it is of another model.
        """
        load_roles(self.session, snapshot, path)
        for name, optimizer in self.optimizers.items():
            load_optimizer(
                optimizer,
                self.session.roles[name].parameters(),
                snapshot.tensors.get(f"optimizer-{name}", {}),
                snapshot.state["optimizers"].get(name, {}),
            )
        self.session.method.load_state(snapshot.state["method"])
        self.step = snapshot.state["step"]
        self.samples = snapshot.state["samples"]
        self.updates.update(snapshot.state.get("updates", {}))
        self.bad_steps = snapshot.state["bad_steps"]

    def run(self, after_step: Callable[[int, dict[str, float]], bool]) -> None:
        """Train to the end, or until ``after_step(step, metrics)`` returns False."""
        while self.step < self.settings.steps:
            metrics = self.train_step()
            if not after_step(self.step, metrics):
                return


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: the accelerator's, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""``diffdistill train``: everything around the training loop."""

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from diffdistill import catalog
from diffdistill.bundled import LAUNCHERS
from diffdistill.checkpoints import Checkpoints, write_atomic
from diffdistill.config import RunConfig
from diffdistill.distributed import Distributed
from diffdistill.errors import UserError
from diffdistill.estimates import describe
from diffdistill.evaluation.text_settings import check_evaluate
from diffdistill.feeding import Feed, open_feed
from diffdistill.lineage import at_step, check_provenance, papers, run_record
from diffdistill.pictures import Painter
from diffdistill.provenance.files import read_record
from diffdistill.reward_building import load_rewards
from diffdistill.runs import check_fresh, claimed, write_versions
from diffdistill.session import Session, build, check_servers
from diffdistill.tracking import Tracker
from diffdistill.trainer import Trainer
from diffdistill.transcripts import Scribe
from diffdistill.types import Batch


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """A signal ended the run, after a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after a checkpoint")
        self.exit_code = 128 + number


def train(config: RunConfig, output: Path, resume: str | None = None) -> None:
    """Train ``config`` in the folder ``output``.

    Args:
        config: The checked config.
        output: The run's folder.
        resume: None starts a new run, ``latest`` continues from the newest whole checkpoint (or
            starts, where there is none yet); else the name or path of a checkpoint.

    Raises:
        UserError: For anything the user can do something about.
        Interrupted: If SIGTERM or SIGINT ended the run.
    """
    distributed = Distributed()
    with claimed(output) if distributed.main else nullcontext(), _signals() as caught:
        if resume is None and distributed.main:
            check_fresh(output)
        distributed.wait()
        run = _assemble(config, output, resume, distributed)
        with closing(run.batches):
            _loop(run, output, distributed, caught)
    distributed.close()
    if caught:
        raise Interrupted(caught[0])


def dry_run(config: RunConfig) -> str:
    """Build everything, run one step, and return what was found; leaves nothing behind.

    Of the data, all is listed, and what that step needs is encoded.

    Raises:
        UserError: On several processes, or for anything wrong in the config.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--dry-run runs in one process: leave accelerate launch away")
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, data=replace(config.data, cache=f"{folder}/cache"))
        distributed = Distributed()
        run = _assemble(config, Path(folder), None, distributed, steps=1)
        with closing(run.batches):
            return describe(run.trainer)


class Run(NamedTuple):
    """A run that is ready to train."""

    trainer: Trainer
    batches: Generator[Batch]
    checkpoints: Checkpoints
    painter: Painter | Scribe
    resumed: Path | None


def _assemble(
    config: RunConfig,
    output: Path,
    resume: str | None,
    distributed: Distributed,
    steps: int | None = None,
) -> Run:
    """Return the run, at its checkpoint if one is resumed; ``steps`` is that of ``open_feed``."""
    check_evaluate(config)
    _check_optimizer(config, distributed)
    _divide(config, distributed)
    session = build(config, distributed.device)
    check_servers(session)  # before the record, in which a server's own name of its model is
    before = None if resume is None else read_record(output)
    if open_obligations := check_provenance(session, before):
        _say(distributed, open_obligations)
    if (reward := getattr(session.method, "reward", None)) is not None:
        load_rewards(reward)
    say = partial(_say, distributed)
    feed = open_feed(session, output, distributed, say, steps=steps)
    painter = _painter(session, feed, output, distributed)
    checkpoints = Checkpoints(output, config.train.keep)
    snapshot = None
    if resume is not None and (resume != "latest" or checkpoints.names()):
        snapshot, path, problems = checkpoints.load(resume)
        for problem in problems:
            _say(distributed, f"{problem}; falling back to {path.name}")
    distributed.shard(session.roles.networks())
    samples = 0 if snapshot is None else snapshot.state["samples"]
    batches = feed.after(samples, session, distributed)
    trainer = Trainer(session, batches, distributed)
    if snapshot is not None:
        trainer.load(snapshot, path)
        _say(distributed, f"resumed from {path}")
    return Run(trainer, batches, checkpoints, painter, None if snapshot is None else path)


def _check_optimizer(config: RunConfig, distributed: Distributed) -> None:
    """Refuse optimizers of bitsandbytes, which take no sharded weights, where networks are sharded.

    Raises:
        UserError: If the config names one.
    """
    if distributed.sharded and config.train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer: {config.train.optimizer} takes whole weights, and FSDP2 shards "
            f"them: set train.optimizer: adamw, or launch with {LAUNCHERS / 'ddp.yaml'}"
        )


def _divide(config: RunConfig, distributed: Distributed) -> None:
    """Give each process its part of the losses, if the method divides them.

    Raises:
        UserError: If the processes, or the engine, cannot.
    """
    options = {key: value for key, value in config.method.items() if key != "name"}
    method = catalog.load("method", config.method["name"])
    distributed.divide(method.parts(list(config.data.skills or {}), options))
    if distributed.parts > 1 and config.engine.get("name") == "vllm-server":
        raise UserError(
            "engine vllm-server has the weights of one student at a time, and with "
            "method.placement: groups there are several: set engine: vllm, or placement: shared"
        )


def _painter(
    session: Session, feed: Feed, output: Path, distributed: Distributed
) -> Painter | Scribe:
    """Return what draws pictures of the run, or writes its answers."""
    if feed.encoded is not None:
        return Painter(session, feed.encoded, output, main=distributed.main)
    return Scribe(session, output, main=distributed.main)


def _loop(run: Run, output: Path, distributed: Distributed, caught: list[int]) -> None:
    trainer, checkpoints = run.trainer, run.checkpoints
    config = trainer.session.config
    if distributed.main:
        checkpoints.clean()
        checkpoints.abandon_after(trainer.step)
        config.save(output / "config.yaml")
        write_versions(output)
        _record(run, output)
    with Tracker(config, output, trainer.step, main=distributed.main) as tracker:

        def after_step(step: int, metrics: dict[str, float]) -> bool:
            tracker.scalars(step, metrics)
            stop = distributed.any(bool(caught))
            if stop or step % config.train.save_every == 0 or step == config.train.steps:
                snapshot = trainer.snapshot()
                if distributed.main:
                    checkpoints.save(step, snapshot)
            log = tracker.picture if isinstance(run.painter, Painter) else tracker.text
            for name, path in run.painter.after_step(step):
                log(step, name, path)
            return not stop

        trainer.run(after_step)


def _record(run: Run, output: Path) -> None:
    """Write where the result comes from into the run's folder, and into each checkpoint."""
    record = run_record(run.trainer.session, output, run.resumed)
    run.checkpoints.attach = lambda step: papers(at_step(record, step))
    for name, content in papers(record).items():
        write_atomic(output / name, content)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT within the block; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before: dict[int, Any] = {}
    for kind in (signal.SIGTERM, signal.SIGINT):
        before[kind] = signal.signal(kind, handle)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(distributed: Distributed, text: str) -> None:
    distributed.accelerator.print(text)

"""Runs as processes of their own, to which the signals that this one gets are passed on."""

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from diffdistill.commands.train import Interrupted
from diffdistill.errors import UserError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def launch_run(command: Sequence[str], what: str) -> None:
    """Start a run and wait for its end.

    It has a process group of its own. The first signal that asks this process to stop is passed on
    to the whole group as SIGTERM, after which a run saves a checkpoint and ends; launchers pass
    signals on as well, and a second SIGINT would end the run at once. So a second SIGINT does.

    Args:
        command: The program and its arguments.
        what: What is run, for messages.

    Raises:
        UserError: If it cannot be started, or fails.
        Interrupted: If a signal ended it.
    """
    try:
        process = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        raise UserError(f"{what}: cannot start {shlex.join(command)}: {error}") from None
    with _passed_on(process.pid) as caught:
        code = process.wait()
    number = abs(code) if code < 0 else code - 128
    if caught or number in STOPPING:
        raise Interrupted(caught[0] if caught else number)
    if code:
        raise UserError(f"{what}: {shlex.join(command)} ended with {code}")


@contextmanager
def _passed_on(group: int) -> Iterator[list[int]]:
    """Collect signals within the block, and pass them on to a process group."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        again = bool(caught) and number == signal.SIGINT
        caught.append(number)
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGINT if again else signal.SIGTERM)

    before = {kind: signal.signal(kind, handle) for kind in STOPPING}
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)

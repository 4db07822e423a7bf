"""Collated batches, made in a thread while the one before is trained on."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from diffdistill.data.cache import EncodedDataset, Encoder, Entry
from diffdistill.data.stream import MicroBatch
from diffdistill.draws import Draws
from diffdistill.types import Batch

T = TypeVar("T")


def make_batches(
    encoded: EncodedDataset,
    family: Encoder,
    stream: Iterator[MicroBatch],
    draws: Draws,
) -> Generator[Batch, None, None]:
    """Yield the batch of each micro-batch, with ``ids`` (int64 ``[B]``) and ``prompts`` added.

    Args:
        encoded: The encoded examples.
        family: Collates them.
        stream: The micro-batches.
        draws: Decides, by id, which prompts are dropped.
    """
    return prefetched(stream, lambda micro: _make(encoded, family, micro, draws), family.device)


def prefetched(
    stream: Iterator[T], make: Callable[[T], Batch], device: torch.device
) -> Generator[Batch, None, None]:
    """Yield what ``make`` returns for each item, the next one already in the making.

    The next batch is read, collated and copied to the device by a thread. What goes wrong
    there is raised here; closing this generator ends the thread.
    """
    current = torch.cuda.current_device() if device.type == "cuda" else None

    def make_next() -> Batch | None:
        item = next(stream, None)
        return None if item is None else make(item)

    with ThreadPoolExecutor(1, "batches", initializer=_use_device, initargs=(current,)) as thread:
        upcoming = thread.submit(make_next)
        while (batch := upcoming.result()) is not None:
            upcoming = thread.submit(make_next)
            yield batch


def _use_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _make(encoded: EncodedDataset, family: Encoder, micro: MicroBatch, draws: Draws) -> Batch:
    ids = torch.tensor(micro.ids, dtype=torch.int64)
    dropped = draws.uniform("dropout", ids) < encoded.dataset.settings.prompt_dropout
    entries = [Entry(*pair) for pair in zip(micro.indices, dropped.tolist(), strict=True)]
    batch = family.collate([encoded.load(entry) for entry in entries])
    prompts = ["" if entry.dropped else encoded.dataset.prompts[entry.index] for entry in entries]
    return {**batch, "ids": ids.to(family.device), "prompts": prompts}

"""Texts that are read while a run goes on, so that a set may be larger than memory.

The order depends on the seed and the files alone: ranks agree on it without talking, and a resumed
run finds its place by counting.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from diffdistill.data.problems import Problem, settle
from diffdistill.data.settings import DataSettings
from diffdistill.data.texts import Reading, read_texts
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.types import Example

T = TypeVar("T")


class Group(NamedTuple, Generic[T]):
    """What is computed together.

    Attributes:
        ids: One number for each item that never comes again.
        items: The items.
    """

    ids: tuple[int, ...]
    items: tuple[T, ...]


def endless_texts(
    settings: DataSettings, seed: int, root: Path | None = None, *, read: Reading = read_texts
) -> Iterator[Example]:
    """Yield the texts (what ``read`` yields), epoch after epoch, each in another order.

    Raises:
        UserError: If an epoch holds no text, or a bad one that is not to be skipped.
    """
    draws = Draws(seed)
    for epoch in count():
        problems = list[Problem]()
        generator = draws.generator("stream", epoch)
        texts = _checked(read(settings, root or Path(), problems), settings, problems)
        found = False
        for text in shuffled(texts, settings.shuffle_buffer, generator):
            found = True
            yield text
        if epoch == 0:
            settle(problems, settings.on_error)
        if not found:
            raise UserError(f"there is no usable example in {settings.path or settings.source}")


def _checked(
    texts: Iterator[Example], settings: DataSettings, problems: list[Problem]
) -> Iterator[Example]:
    """Yield texts until there is a problem that is not to be skipped."""
    for text in texts:
        if settings.on_error == "error":
            settle(problems, "error")
        yield text


def shuffled(items: Iterable[T], size: int, generator: torch.Generator) -> Iterator[T]:
    """Yield all items, each in the place of a random one of the ``size`` before it."""
    waiting: list[T] = []
    for item in items:
        if len(waiting) < size:
            waiting.append(item)
            continue
        place = int(torch.randint(size, (), generator=generator))
        chosen, waiting[place] = waiting[place], item
        yield chosen
    for place in torch.randperm(len(waiting), generator=generator).tolist():
        yield waiting[place]


def groups(
    items: Iterator[T], size: int, *, rank: int = 0, world: int = 1, start: int = 0
) -> Iterator[Group[T]]:
    """Yield one rank's groups of ``size`` items: ``rank``, ``rank + world``, and so on.

    Args:
        items: All items of the run.
        size: Items in a group.
        rank: The number of the rank.
        world: The number of ranks.
        start: How many groups each rank has had already.
    """
    for number in count():
        together = tuple(islice(items, size))
        if len(together) < size:
            return
        if number >= start * world and number % world == rank:
            first = number * size
            yield Group(tuple(range(first, first + size)), together)

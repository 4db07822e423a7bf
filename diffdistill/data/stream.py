"""The infinite order in which a run meets its examples.

It depends on the seed and on the buckets only, so that ranks agree on it without talking, and
a resumed run finds its place by counting.
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import torch

from diffdistill.draws import Draws
from diffdistill.errors import UserError


class MicroBatch(NamedTuple):
    """Which examples are computed together.

    Attributes:
        number: Its number in the stream of the whole run, over all ranks.
        indices: The examples.
        ids: One number per example that never comes again; all randomness is keyed by it.
    """

    number: int
    indices: tuple[int, ...]
    ids: tuple[int, ...]


class Stream:
    """Micro-batches of examples from one bucket each, for ever.

    Each epoch is a new permutation. An example waits in the queue of its bucket until
    ``batch_size`` have come, over the end of an epoch if need be, so that none is dropped.
    """

    def __init__(
        self, buckets: Sequence[Hashable], batch_size: int, seed: int, *, repeats: int = 1
    ) -> None:
        """Create a stream.

        Args:
            buckets: What must be equal for examples to share a micro-batch, for each example.
            batch_size: The number of examples in a micro-batch.
            seed: The seed of the order.
            repeats: How many times an epoch goes over each example.
        """
        if not buckets:
            raise UserError("there are no examples to make batches of")
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {batch_size}")
        self.buckets = buckets
        self.batch_size = batch_size
        self.repeats = repeats
        self._draws = Draws(seed)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield all micro-batches."""
        return self.take(0)

    def take(self, start: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches from number ``start`` on."""
        return self._every(start, 1)

    def for_rank(self, rank: int, world: int, start: int = 0) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one rank: ``rank``, ``rank + world``, and so on.

        Args:
            rank: The number of the rank.
            world: The number of ranks.
            start: How many micro-batches each rank has had already.
        """
        if world > len(self.buckets):
            raise UserError(f"{world} ranks cannot share {len(self.buckets)} examples")
        return self._every(start * world + rank, world)

    def _every(self, start: int, step: int) -> Iterator[MicroBatch]:
        for number, indices in islice(enumerate(self._filled()), start, None, step):
            first = number * self.batch_size
            yield MicroBatch(number, indices, tuple(range(first, first + self.batch_size)))

    def _filled(self) -> Iterator[tuple[int, ...]]:
        queues: dict[Hashable, list[int]] = {bucket: [] for bucket in self.buckets}
        for index in self._order():
            queue = queues[self.buckets[index]]
            queue.append(index)
            if len(queue) == self.batch_size:
                yield tuple(queue)
                queue.clear()

    def _order(self) -> Iterator[int]:
        size = len(self.buckets)
        for epoch in count():
            generator = self._draws.generator("order", epoch)
            for place in torch.randperm(size * self.repeats, generator=generator).tolist():
                yield place % size

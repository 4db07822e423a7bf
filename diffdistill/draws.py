"""Random numbers that depend on the sample, and not on who computes it.

Every draw is keyed by (seed, purpose, id). The id numbers a sample in the stream of the whole
run, so the same sample gets the same noise in any micro-batch and on any rank, and a resumed
run needs no generator state. The scheme is ours.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Seeded random numbers, one independent stream per purpose and id."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generator(self, purpose: str, number: int) -> torch.Generator:
        """Return a fresh CPU generator for one purpose and one number."""
        key = f"{self.seed}/{purpose}/{number}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, purpose: str, ids: Tensor, shape: Sequence[int]) -> Tensor:
        """Return standard normal float32 noise ``[B, *shape]`` on the device of ``ids``."""
        rows = [
            torch.randn(tuple(shape), generator=self.generator(purpose, number))
            for number in ids.tolist()
        ]
        return torch.stack(rows).to(ids.device)

    def uniform(self, purpose: str, ids: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Return float32 numbers ``[B, *shape]`` in [0, 1), on the device of ``ids``."""
        rows = [
            torch.rand(tuple(shape), generator=self.generator(purpose, number))
            for number in ids.tolist()
        ]
        return torch.stack(rows).to(ids.device)

    def integer(self, purpose: str, number: int, high: int) -> int:
        """Return a whole number in [0, high), the same on every rank for the same ``number``."""
        generator = self.generator(purpose, number)
        return int(torch.randint(high, (), generator=generator))

"""What a family's encoders say of each example, computed once and kept on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.types import Example

Encoded = Mapping[str, Tensor]


class Examples(Protocol):
    """What is needed of a data set here (see ``dataset.ExampleDataset``)."""

    settings: DataSettings
    prompts: list[str]

    @property
    def groups(self) -> Sequence[Hashable]:
        """What must be equal for examples to share a batch."""
        ...

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Return the example."""
        ...

    def key(self, index: int) -> str:
        """Return a hash of everything the example depends on."""
        ...

    def has_videos(self) -> bool:
        """Return whether examples have videos, which are large."""
        ...


class Encoder(Protocol):
    """What is needed of a family here (see ``pipelines.flow.FlowFamily``)."""

    @property
    def device(self) -> torch.device:
        """Where batches live."""
        ...

    def encode(self, examples: Sequence[Example]) -> Sequence[Encoded]:
        """Return all tensors that training needs of each example."""
        ...

    def collate(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """Return a batch on the device."""
        ...

    def release(self) -> None:
        """Take the encoders off the device."""
        ...

    def fingerprint(self) -> str:
        """Return what identifies the encoders and their options."""
        ...


@dataclass(frozen=True)
class Entry:
    """One thing to encode: an example, or the same with empty prompts."""

    index: int
    dropped: bool = False


class EncodedDataset:
    """The encoded examples of a data set; ``prepare`` must have run on every rank.

    Attributes:
        dataset: The examples.
        folder: Where the outputs of the encoders are, one file per example.
    """

    def __init__(
        self,
        dataset: Examples,
        family: Encoder,
        folder: Path,
        batch_size: int = 8,
        keep_in_memory: int = 2 * 2**30,
    ) -> None:
        """Create an encoded data set; nothing is encoded yet.

        Args:
            dataset: The examples.
            family: Encodes them.
            folder: Where to keep the outputs; other data sets may use it too.
            batch_size: How many examples to encode at once; of videos, one at a time.
            keep_in_memory: How many bytes of outputs may stay in memory once read.
        """
        self.dataset = dataset
        self.folder = folder
        self._family = family
        self._fingerprint = family.fingerprint()
        self._batch_size = 1 if dataset.has_videos() else batch_size
        self._room = keep_in_memory
        self._memory: dict[Path, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the encoded example."""
        return self.load(Entry(index))

    def load(self, entry: Entry) -> dict[str, Tensor]:
        """Return the encoded example, with empty prompts if ``entry.dropped``.

        Raises:
            UserError: If its file is missing or damaged.
        """
        path = self.file(entry)
        if path in self._memory:
            return self._memory[path]
        try:
            tensors = dict(_unpacked(*pair) for pair in load_file(path).items())
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}. Start again to encode it") from error
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        if num_bytes <= self._room:
            self._memory[path] = tensors
            self._room -= num_bytes
        return tensors

    def file(self, entry: Entry) -> Path:
        """Return where the encoded example is, or will be."""
        content = [self.dataset.key(entry.index), self._fingerprint, entry.dropped]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def missing(
        self, rank: int = 0, world: int = 1, *, only: Iterable[int] | None = None
    ) -> list[Entry]:
        """Return what this rank has to encode: files that are not there or are damaged.

        Args:
            rank: The number of this rank.
            world: The number of ranks that share the work.
            only: The examples that will be read; None is all.
        """
        indices = range(len(self)) if only is None else only
        mine = list(self._files(indices).items())[rank::world]
        return [entry for file, entry in mine if not _is_whole(file)]

    def prepare(
        self,
        rank: int = 0,
        world: int = 1,
        progress: Callable[[int, int], None] = lambda done, total: None,
        *,
        only: Iterable[int] | None = None,
    ) -> None:
        """Encode what is missing of this rank's share, then release the encoders.

        Ranks must wait for each other after this, and before the first example is read.

        Args:
            rank: The number of this rank.
            world: The number of ranks that share the work (and the folder).
            progress: Called with how many are done, and of how many.
            only: The examples that will be read; None is all.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        missing, done = self.missing(rank, world, only=only), 0
        for entries in self._alike(missing):
            examples = [self._example(entry) for entry in entries]
            for entry, tensors in zip(entries, self._family.encode(examples), strict=True):
                _write(self.file(entry), tensors)
            done += len(entries)
            progress(done, len(missing))
        self._family.release()

    def _files(self, indices: Iterable[int]) -> dict[Path, Entry]:
        kinds = (False, True) if self.dataset.settings.prompt_dropout else (False,)
        entries = (Entry(index, dropped) for index in indices for dropped in kinds)
        return {self.file(entry): entry for entry in entries}

    def _alike(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        def group(entry: Entry) -> str:
            return repr(self.dataset.groups[entry.index])

        for _, alike in groupby(sorted(entries, key=group), key=group):
            rest = list(alike)
            while rest:
                yield rest[: self._batch_size]
                rest = rest[self._batch_size :]

    def _example(self, entry: Entry) -> Example:
        example = self.dataset[entry.index]
        if not entry.dropped:
            return example
        detailed = None if example.detailed_prompt is None else ""
        return example._replace(prompt="", detailed_prompt=detailed)


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


ZEROS = "zeros:"
"""Before the name of float32 zeros that are one number in memory: their shape is kept instead.
The latents of a video to be generated would be megabytes of them."""


SYNCED_BYTES = 2**16
"""Smaller files (texts, of which there are many) are sooner encoded again than synchronized; what a
crash of the machine left of one is found by ``EncodedDataset.missing``."""


def _packed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return name and content as they are kept."""
    tensor = tensor.detach().cpu()
    one = tensor.dtype == torch.float32 and tensor.numel() > 1 and not any(tensor.stride())
    if one and not tensor.flatten()[0]:
        return ZEROS + name, torch.tensor(tensor.shape)
    return name, tensor.contiguous().clone()


def _unpacked(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return name and content as they were given."""
    if name.startswith(ZEROS):
        return name.removeprefix(ZEROS), torch.zeros(1).expand(tensor.tolist())
    return name, tensor


def _write(file: Path, tensors: Encoded) -> None:
    content = save(dict(_packed(*pair) for pair in tensors.items()))
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as stream:
        stream.write(content)
        if len(content) >= SYNCED_BYTES:
            stream.flush()
            os.fsync(stream.fileno())
    unfinished.replace(file)

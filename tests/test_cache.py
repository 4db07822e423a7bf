"""Encoding once, and batches made in a thread."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.data.batches import make_batches
from diffdistill.data.cache import EncodedDataset, Entry
from diffdistill.data.dataset import ExampleDataset, open_dataset
from diffdistill.data.settings import DataSettings
from diffdistill.data.stream import MicroBatch, Stream
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.types import Example


@dataclass
class Lengths:
    """Encodes a prompt as its length, and remembers what it was asked."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    options: str = ""
    calls: list[list[str]] = field(default_factory=list)
    num_releases: int = 0

    def encode(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        self.calls.append([example.prompt for example in examples])
        return [{"length": torch.tensor(len(example.prompt))} for example in examples]

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        return {"length": torch.stack([e["length"] for e in encoded])}

    def release(self) -> None:
        self.num_releases += 1

    def fingerprint(self) -> str:
        return f"lengths {self.options}"


@pytest.fixture
def dataset(tmp_path: Path) -> ExampleDataset:
    return read(tmp_path)


def read(folder: Path, **options: Any) -> ExampleDataset:
    file = folder / "prompts.txt"
    file.write_text("a\nbb\nccc\ndddd\neeeee\n")
    return open_dataset(DataSettings(path=str(file), resolution=32, **options))


def prepared(dataset: ExampleDataset, folder: Path, **options: Any) -> EncodedDataset:
    encoded = EncodedDataset(dataset, Lengths(), folder, **options)
    encoded.prepare()
    return encoded


def test_examples_are_encoded_in_batches_and_the_encoders_released(
    dataset: ExampleDataset, tmp_path: Path
) -> None:
    family, heard = Lengths(), list[tuple[int, int]]()
    encoded = EncodedDataset(dataset, family, tmp_path / "cache", batch_size=2)
    encoded.prepare(progress=lambda done, total: heard.append((done, total)))
    assert family.calls == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
    assert family.num_releases == 1
    assert heard == [(2, 5), (4, 5), (5, 5)]
    assert [int(encoded[index]["length"]) for index in range(len(encoded))] == [1, 2, 3, 4, 5]


def test_only_the_examples_that_are_wanted_are_encoded(tmp_path: Path) -> None:
    dataset, family = read(tmp_path, prompt_dropout=0.5), Lengths()
    encoded = EncodedDataset(dataset, family, tmp_path / "cache")
    encoded.prepare(only=[1, 3])
    assert family.calls == [["bb", "", "dddd", ""]]
    assert int(encoded[3]["length"]) == 4
    assert len(encoded.missing()) == 6


def test_nothing_is_encoded_twice(dataset: ExampleDataset, tmp_path: Path) -> None:
    prepared(dataset, tmp_path)
    again = Lengths()
    EncodedDataset(dataset, again, tmp_path).prepare()
    assert again.calls == []
    assert again.num_releases == 1


def test_other_encoders_have_other_files(dataset: ExampleDataset, tmp_path: Path) -> None:
    prepared(dataset, tmp_path)
    other = Lengths(options="longer")
    assert len(EncodedDataset(dataset, other, tmp_path).missing()) == 5


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_a_damaged_file_is_encoded_again(
    dataset: ExampleDataset, tmp_path: Path, size: int
) -> None:
    file = prepared(dataset, tmp_path).file(Entry(1))
    file.write_bytes(file.read_bytes()[:size])
    again = Lengths()
    encoded = EncodedDataset(dataset, again, tmp_path)
    encoded.prepare()
    assert again.calls == [["bb"]]
    assert int(encoded[1]["length"]) == 2


def test_a_write_that_was_cut_short_leaves_no_file(
    dataset: ExampleDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    monkeypatch.setattr("diffdistill.data.cache.SYNCED_BYTES", 0)
    with pytest.raises(OSError, match="disk full"):
        prepared(dataset, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_file_that_is_gone_is_named(dataset: ExampleDataset, tmp_path: Path) -> None:
    encoded = prepared(dataset, tmp_path)
    encoded.file(Entry(3)).unlink()
    with pytest.raises(UserError, match=r"cannot read .*safetensors"):
        encoded[3]


def test_ranks_share_the_work(dataset: ExampleDataset, tmp_path: Path) -> None:
    families = [Lengths(), Lengths()]
    for rank, family in enumerate(families):
        EncodedDataset(dataset, family, tmp_path).prepare(rank, 2)
    assert families[0].calls == [["a", "ccc", "eeeee"]]
    assert families[1].calls == [["bb", "dddd"]]
    assert EncodedDataset(dataset, Lengths(), tmp_path).missing() == []


def test_examples_stay_in_memory_while_there_is_room(
    dataset: ExampleDataset, tmp_path: Path
) -> None:
    small, large = prepared(dataset, tmp_path), prepared(dataset, tmp_path, keep_in_memory=7)
    assert small[0]["length"] is small[0]["length"]
    assert large[0]["length"] is not large[0]["length"]


def test_a_batch_has_ids_and_prompts(dataset: ExampleDataset, tmp_path: Path) -> None:
    encoded, stream = prepared(dataset, tmp_path), Stream(dataset.groups, 2, seed=0)
    batches = make_batches(encoded, Lengths(), stream.take(3), Draws(0))
    batch, micro = next(batches), next(stream.take(3))
    batches.close()
    assert batch["ids"].tolist() == [6, 7]
    assert batch["ids"].dtype == torch.int64
    assert batch["prompts"] == [dataset.prompts[index] for index in micro.indices]
    assert batch["length"].tolist() == [len(prompt) for prompt in batch["prompts"]]


def test_batches_end_with_their_stream(dataset: ExampleDataset, tmp_path: Path) -> None:
    stream = islice(Stream(dataset.groups, 2, seed=0), 4)
    batches = list(make_batches(prepared(dataset, tmp_path), Lengths(), stream, Draws(0)))
    assert [batch["ids"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_dropped_prompts_depend_on_the_id_alone(tmp_path: Path) -> None:
    dataset = read(tmp_path, prompt_dropout=0.3)
    encoded, draws = prepared(dataset, tmp_path / "cache"), Draws(5)
    stream = islice(Stream(dataset.groups, 4, seed=0), 100)
    batches = list(make_batches(encoded, Lengths(), stream, draws))
    dropped = torch.tensor([prompt == "" for batch in batches for prompt in batch["prompts"]])
    assert torch.equal(dropped, draws.uniform("dropout", torch.arange(400)) < 0.3)
    assert 0.25 < float(dropped.float().mean()) < 0.35
    for batch in batches:
        assert batch["length"].tolist() == [len(prompt) for prompt in batch["prompts"]]


def test_an_error_in_the_thread_reaches_the_caller(dataset: ExampleDataset, tmp_path: Path) -> None:
    encoded, stream = prepared(dataset, tmp_path), Stream(dataset.groups, 1, seed=0)
    order = [micro.indices[0] for micro in islice(stream, 3)]
    encoded.file(Entry(order[2])).unlink()
    batches = make_batches(encoded, Lengths(), iter(stream), Draws(0))
    next(batches), next(batches)
    with pytest.raises(UserError, match="cannot read"):
        next(batches)
    assert not made_by_a_thread()


def test_closing_the_batches_ends_the_thread(dataset: ExampleDataset, tmp_path: Path) -> None:
    stream = Stream(dataset.groups, 2, seed=0)
    batches = make_batches(prepared(dataset, tmp_path), Lengths(), iter(stream), Draws(0))
    next(batches)
    assert made_by_a_thread()
    batches.close()
    assert not made_by_a_thread()


def test_only_one_batch_is_made_ahead(dataset: ExampleDataset, tmp_path: Path) -> None:
    taken = threading.Semaphore(0)

    def counted() -> Iterator[MicroBatch]:
        for micro in Stream(dataset.groups, 2, seed=0):
            taken.release()
            yield micro

    batches = make_batches(prepared(dataset, tmp_path), Lengths(), counted(), Draws(0))
    next(batches)
    assert [taken.acquire(timeout=5) for _ in range(2)] == [True, True]
    assert not taken.acquire(timeout=0.1)
    batches.close()


def made_by_a_thread() -> bool:
    return any(thread.name.startswith("batches") for thread in threading.enumerate())

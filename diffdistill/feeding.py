"""The batches of a run: its data opened, encoded, ordered, and collated while it trains."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffdistill.data.batches import make_batches, prefetched
from diffdistill.data.cache import Encoded, EncodedDataset, Encoder, Entry, Examples
from diffdistill.data.dataset import open_dataset
from diffdistill.data.stream import MicroBatch
from diffdistill.data.streaming import Group, endless_texts, groups
from diffdistill.data.texts import open_texts
from diffdistill.distributed import Distributed
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.pipelines.chats import Row
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.text_rows import FILLERS, TextRows
from diffdistill.question_feed import question_batches, stream_of, telling
from diffdistill.session import Session, flow_family
from diffdistill.texts import Reader
from diffdistill.types import Batch, Example

TOLD_SECONDS = 5.0
"""How long nothing more is said of how far encoding has come."""

PREFETCHED = 1
"""How many micro-batches are made before they are asked for (see ``prefetched``)."""


class Feed(NamedTuple):
    """The data of a run.

    Attributes:
        batches: Returns this rank's batches, after a number of micro-batches that it has had.
        encoded: The encoded images or videos; None of texts.
    """

    batches: Callable[[int], Generator[Batch]]
    encoded: EncodedDataset | None = None

    def after(self, samples: int, session: Session, distributed: Distributed) -> Generator[Batch]:
        """Return this rank's batches, after those that ``samples`` were drawn for on all ranks."""
        size = session.config.data.batch_size * distributed.readers
        return self.batches(math.ceil(samples / size))


def open_feed(
    session: Session,
    output: Path,
    distributed: Distributed,
    say: Callable[[str], None],
    *,
    steps: int | None = None,
) -> Feed:
    """Return the data of a run; what its encoders say of it is made where it is missing.

    All data is opened and listed in any case, but to encode it may take hours.

    Args:
        session: The built run.
        output: The run's folder.
        distributed: The processes of the run.
        say: Told how far encoding has come.
        steps: How many optimizer steps are taken, for which alone the data is encoded; None is
            any number of them, and encodes all.

    Raises:
        UserError: If the data cannot be read, or does not suit the method.
    """
    data, pair = session.config.data, session.family
    if isinstance(pair, Questions):
        return Feed(question_batches(session, pair, distributed))
    _check_packing(session)
    if isinstance(pair, TextRows) and data.streaming:
        _check_asked_apart(session, distributed)
        return _streamed(session, pair, distributed)
    dataset = _open(session)
    micros = None if steps is None else steps * session.config.train.accumulate + PREFETCHED
    if isinstance(pair, TextRows) and data.packing and micros is not None:
        full = pair.packed(pair.rows(dataset[index]) for index in range(len(dataset)))
        return _packed(session, pair, islice(full, micros * data.batch_size), distributed)
    only = None
    if micros is not None:
        first = islice(_order(session, dataset.groups, distributed, 0), micros)
        only = {index for micro in first for index in micro.indices}
    encoded = _encoded(session, pair, dataset, output, distributed, say, only)
    if isinstance(pair, TextRows) and data.packing:
        texts = (_rows(encoded.load(Entry(index)), pair) for index in range(len(encoded)))
        return _packed(session, pair, pair.packed(texts), distributed)

    def batches(start: int) -> Generator[Batch]:
        order = _order(session, dataset.groups, distributed, start)
        return make_batches(encoded, pair, order, session.draws)

    return Feed(batches, None if isinstance(pair, TextRows) else encoded)


def _check_packing(session: Session) -> None:
    """Refuse to pack texts for a model that would see across them."""
    if session.config.data.packing and isinstance(session.family, CausalPair):
        raise UserError(
            "data.packing is for masked diffusion: an autoregressive model would see one text "
            "from the next"
        )


def _check_asked_apart(session: Session, distributed: Distributed) -> None:
    """Refuse to ask a teacher about a stream where that would meddle with the student's training.

    A thread makes the next batch meanwhile: adapters of a shared network would be switched under
    the student, and ranks would call a sharded one in different order.
    """
    if not (isinstance(session.family, CausalPair) and session.family.annotator is not None):
        return
    teacher = session.roles["teacher"].network
    for wrong, told in (
        (any(role.network is teacher for role in session.roles.trained()), "shares its weights"),
        (distributed.sharded, "is sharded"),
    ):
        if wrong:
            raise UserError(
                "data.streaming: the teacher is asked about texts while the student trains, and it "
                f"{told}: set data.streaming: false"
            )


def _open(session: Session) -> Examples:
    data = session.config.data
    if isinstance(session.family, TextRows):
        return open_texts(data)
    if data.num_frames is not None:
        _check_clip(session, data.num_frames)
    dataset = open_dataset(data)
    origin = dataset.first_without_image()
    if session.method.needs_images() and origin is not None:
        name = session.config.method["name"]
        raise UserError(f"{origin}: method {name} needs an image for every prompt")
    return dataset


def _check_clip(session: Session, num_frames: int) -> None:
    """Refuse clips that the family or the method cannot take, before they are encoded."""
    try:
        flow_family(session).check_clip(num_frames)
    except UserError as error:
        raise UserError(f"data.num_frames: {error}") from None
    session.method.check_clip(num_frames)


def _encoded(
    session: Session,
    family: Encoder,
    dataset: Examples,
    output: Path,
    distributed: Distributed,
    say: Callable[[str], None],
    only: Iterable[int] | None,
) -> EncodedDataset:
    data = session.config.data
    folder = Path(data.cache) if data.cache else output / "cache"
    encoded = EncodedDataset(dataset, family, folder)
    with torch.no_grad():
        encoded.prepare(
            distributed.rank,
            distributed.world,
            _sparingly(lambda done, total: say(f"encoded {done}/{total}")),
            only=only,
        )
    distributed.wait()
    return encoded


def _sparingly(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Return what tells of progress at most every few seconds, and of the end."""
    last = -math.inf

    def told(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= TOLD_SECONDS:
            last = now
            tell(done, total)

    return told


def _order(
    session: Session, alike: Sequence[object], distributed: Distributed, start: int
) -> Iterator[MicroBatch]:
    return stream_of(session, alike).for_rank(distributed.reader, distributed.readers, start)


def _packed(
    session: Session,
    pair: TextRows[Any],
    full: Iterable[dict[Reader, Row]],
    distributed: Distributed,
) -> Feed:
    """Return full rows of texts, shuffled."""
    rows = [pair.tensors(row) for row in full]
    if not rows:
        raise UserError("there is no usable example in the data")

    def make(micro: MicroBatch) -> Batch:
        return _collated(pair, micro.ids, [rows[index] for index in micro.indices])

    def batches(start: int) -> Generator[Batch]:
        order = _order(session, [""] * len(rows), distributed, start)
        return prefetched(order, make, pair.device)

    return Feed(batches)


def _rows(encoded: Encoded, pair: TextRows[Any]) -> dict[Reader, Row]:
    """Return the rows of an encoded text."""
    return {
        reader: Row(*(encoded[f"{reader}/{name}"].tolist() for name in FILLERS))
        for reader in pair.readers
    }


def _streamed(session: Session, pair: TextRows[Any], distributed: Distributed) -> Feed:
    """Return texts that are read and encoded as they are needed."""
    data, rank, world = session.config.data, distributed.reader, distributed.readers
    texts = telling(endless_texts(data, session.config.train.seed), pair)

    def encode(group: Group[Example]) -> Batch:
        return _collated(pair, group.ids, pair.encode(group.items))

    def collate(group: Group[dict[Reader, Row]]) -> Batch:
        return _collated(pair, group.ids, [pair.tensors(row) for row in group.items])

    def batches(start: int) -> Generator[Batch]:
        where = {"rank": rank, "world": world, "start": start}
        if data.packing:
            rows = pair.packed(pair.rows(text) for text in texts)
            return prefetched(groups(rows, data.batch_size, **where), collate, pair.device)
        return prefetched(groups(texts, data.batch_size, **where), encode, pair.device)

    return Feed(batches)


def _collated(pair: TextRows[Any], ids: Sequence[int], encoded: Sequence[Encoded]) -> Batch:
    batch = pair.collate(encoded)
    numbers = torch.tensor(ids, dtype=torch.int64, device=pair.device)
    return {**batch, "ids": numbers, "prompts": [""] * len(ids)}

"""The order of micro-batches."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdistill.data.stream import MicroBatch, Stream
from diffdistill.errors import UserError

BUCKETS = st.lists(st.sampled_from("abc"), min_size=1, max_size=24)
BATCH_SIZES = st.integers(1, 5)
SEEDS = st.integers(0, 3)


def first(stream: Stream, number: int) -> list[MicroBatch]:
    return list(islice(stream, number))


def pairs(micros: list[MicroBatch]) -> set[tuple[int, int]]:
    return {pair for micro in micros for pair in zip(micro.indices, micro.ids, strict=True)}


@given(BUCKETS, BATCH_SIZES, SEEDS)
def test_a_micro_batch_is_full_and_of_one_bucket(
    buckets: list[str], batch_size: int, seed: int
) -> None:
    for micro in first(Stream(buckets, batch_size, seed), 20):
        assert len(micro.indices) == batch_size
        assert len({buckets[index] for index in micro.indices}) == 1


@given(BUCKETS, BATCH_SIZES, SEEDS)
def test_ids_count_the_samples_of_the_stream(
    buckets: list[str], batch_size: int, seed: int
) -> None:
    micros = first(Stream(buckets, batch_size, seed), 10)
    assert [id_ for micro in micros for id_ in micro.ids] == list(range(10 * batch_size))


@given(BUCKETS, BATCH_SIZES, SEEDS, st.integers(0, 40))
def test_a_resumed_stream_goes_on_where_it_was(
    buckets: list[str], batch_size: int, seed: int, start: int
) -> None:
    stream = Stream(buckets, batch_size, seed)
    assert list(islice(stream.take(start), 5)) == first(stream, start + 5)[start:]


@given(BUCKETS, BATCH_SIZES, SEEDS, st.integers(1, 4), st.integers(0, 5))
def test_ranks_share_the_stream_without_overlap(
    buckets: list[str], batch_size: int, seed: int, world: int, start: int
) -> None:
    stream = Stream(buckets * world, batch_size, seed)
    whole = first(stream, (start + 3) * world)
    for rank in range(world):
        mine = list(islice(stream.for_rank(rank, world, start), 3))
        assert mine == whole[start * world + rank :: world]


@given(st.integers(1, 30), SEEDS, st.integers(0, 4))
def test_a_step_sees_the_same_samples_however_it_is_divided(
    size: int, seed: int, step: int
) -> None:
    buckets = ["a"] * max(size, 2)
    at_once = list(islice(Stream(buckets, 8, seed).take(step), 1))
    halves = Stream(buckets, 4, seed)
    accumulated = list(islice(halves.take(2 * step), 2))
    ranks = [next(halves.for_rank(rank, 2, step)) for rank in (0, 1)]
    assert pairs(at_once) == pairs(accumulated) == pairs(ranks)


@settings(max_examples=50)
@given(BUCKETS, BATCH_SIZES, SEEDS, st.integers(1, 2))
def test_nothing_is_dropped_at_the_end_of_an_epoch(
    buckets: list[str], batch_size: int, seed: int, repeats: int
) -> None:
    epochs = batch_size  # after so many epochs every queue is empty
    number = epochs * repeats * len(buckets) // batch_size
    micros = first(Stream(buckets, batch_size, seed, repeats=repeats), number)
    seen = [index for micro in micros for index in micro.indices]
    assert sorted(seen) == sorted(list(range(len(buckets))) * epochs * repeats)


def test_an_epoch_shows_each_example_as_often_as_it_repeats() -> None:
    micros = first(Stream(["a"] * 6, 2, 0, repeats=3), 9)
    seen = [index for micro in micros for index in micro.indices]
    assert sorted(seen) == sorted([0, 1, 2, 3, 4, 5] * 3)


def test_epochs_and_seeds_differ_in_order() -> None:
    buckets = ["a"] * 16
    one, two = first(Stream(buckets, 16, 0), 2)
    (other,) = first(Stream(buckets, 16, 1), 1)
    assert len({one.indices, two.indices, other.indices}) == 3


def test_more_ranks_than_examples_are_refused() -> None:
    with pytest.raises(UserError, match="3 ranks cannot share 2 examples"):
        Stream(["a", "a"], 1, 0).for_rank(0, 3)


def test_a_stream_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no examples"):
        Stream([], 1, 0)


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1, not 0"):
        Stream(["a"], 0, 0)

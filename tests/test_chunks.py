import torch

from diffdistill.chunks import (
    chunk_sums,
    first_tokens,
    num_chunks,
    select_whole,
    sizes,
    tokens_of,
    touched,
)
from tests.conftest import randn

CHUNKS = torch.tensor([[-1, 0, 1, 1, 3, -1], [2, 2, 2, -1, -1, 0]])
COUNT = 4


def test_the_number_of_chunks_is_the_largest_on_any_side() -> None:
    assert num_chunks(CHUNKS, CHUNKS + 2) == 6
    assert num_chunks(torch.full((2, 3), -1)) == 0
    assert num_chunks(torch.zeros(2, 0, dtype=torch.int64)) == 0


def test_chunk_sums_are_those_of_a_loop() -> None:
    values = randn(2, 6, seed=0)
    expected = torch.zeros(2, COUNT)
    for row in range(2):
        for place in range(6):
            if CHUNKS[row, place] >= 0:
                expected[row, CHUNKS[row, place]] += values[row, place]
    torch.testing.assert_close(chunk_sums(values, CHUNKS, COUNT), expected)


def test_chunk_sums_hand_their_gradient_to_each_token_of_a_chunk_alone() -> None:
    values = randn(2, 6, seed=1).requires_grad_()
    factor = torch.arange(1.0, 9.0).reshape(2, 4)
    (factor * chunk_sums(values, CHUNKS, COUNT)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 1, 2, 2, 4, 0], [7, 7, 7, 0, 0, 5]]


def test_chunk_sums_of_half_precision_are_taken_in_float32() -> None:
    values = torch.full((1, 300), 1.0, dtype=torch.bfloat16)
    total = chunk_sums(values, torch.zeros(1, 300, dtype=torch.int64), 1)
    assert total.item() == 300.0  # 256 + 1 is 256 in bfloat16


def test_a_chunk_is_touched_by_any_of_its_tokens() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 0, 1, 1, 0]]).bool()
    expected = [[False, True, False, False], [False] * 4]
    assert touched(mask, CHUNKS, COUNT).tolist() == expected


def test_the_tokens_of_a_chunk_are_all_of_it_and_none_without_chunk() -> None:
    chosen = torch.tensor([[False, True, True, False], [True, False, False, True]])
    expected = [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert tokens_of(chosen, CHUNKS).int().tolist() == expected
    assert not tokens_of(torch.zeros(2, 0, dtype=torch.bool), torch.full((2, 3), -1)).any()


def test_a_whole_chunk_has_tokens_and_all_are_allowed() -> None:
    allowed = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 1]]).bool()
    expected = [[True, False, False, True], [True, False, True, False]]
    assert select_whole(allowed, CHUNKS, COUNT).tolist() == expected


def test_sizes_and_first_tokens_are_those_of_each_chunk() -> None:
    assert sizes(CHUNKS, COUNT).tolist() == [[1, 2, 0, 1], [1, 0, 3, 0]]
    assert first_tokens(CHUNKS, COUNT).tolist() == [[1, 2, 0, 4], [5, 0, 0, 0]]

import pytest
import torch
from torch import Tensor

from diffdistill.repetition import repeated_ngrams, repetition
from tests.conftest import generator, randn


def brute_repeated(tokens: Tensor, mask: Tensor, size: int) -> tuple[list[list[bool]], list[float]]:
    rows, shares = [], []
    for row, kept in zip(tokens.tolist(), mask.tolist(), strict=True):
        seen: list[list[int]] = []
        marked = [False] * len(row)
        for end in range(size, len(row) + 1):
            if all(kept[end - size : end]):
                marked[end - 1] = row[end - size : end] in seen
                seen.append(row[end - size : end])
        rows.append(marked)
        shares.append(sum(marked) / max(len(seen), 1))
    return rows, shares


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("holes", [False, True])
def test_a_token_is_marked_if_the_ngram_that_it_ends_was_there_before(
    size: int, holes: bool
) -> None:
    tokens = torch.randint(0, 2, (6, 40), generator=generator(0))
    mask = torch.arange(40) < torch.tensor([40, 25, 4, 2, 1, 0])[:, None]
    if holes:
        mask &= randn(6, 40, seed=1) > -1.6
    marked, shares = brute_repeated(tokens, mask, size)
    assert 0 < sum(map(sum, marked)) < mask.sum()
    assert repeated_ngrams(tokens, mask, size).tolist() == marked
    assert repetition(tokens, mask, size).tolist() == pytest.approx(shares)


def test_an_answer_does_not_repeat_another_one() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert not repeated_ngrams(tokens, torch.ones(2, 4, dtype=torch.bool)).any()


def test_one_word_said_again_and_again_is_repeated_from_its_second_ngram_on() -> None:
    tokens, mask = torch.full((1, 102), 7), torch.ones(1, 102, dtype=torch.bool)
    assert repeated_ngrams(tokens, mask)[0].tolist() == [False] * 3 + [True] * 99
    assert repetition(tokens, mask).item() == pytest.approx(0.99)


@pytest.mark.parametrize("width", [0, 2])
def test_answers_too_short_for_an_ngram_repeat_nothing(width: int) -> None:
    tokens, mask = torch.zeros(2, width, dtype=torch.int64), torch.ones(2, width) > 0
    assert not repeated_ngrams(tokens, mask).any()
    assert repetition(tokens, mask).tolist() == [0.0, 0.0]

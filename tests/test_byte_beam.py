"""Predictions of bytes from those of tokens: exact by enumeration, and what a beam leaves out."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffdistill.byte_beam import Context, Search, byte_probabilities
from diffdistill.spellings import ALPHABET, END, Spellings

PIECES = (None, b"a", b"b", b"c", b"ab", b"bc", b"abc", b"ca", b"c", None, None)
"""Two tokens spell "c", the first and the last ids nothing; 9 ends a text, 10 is a mark."""
ENDS = (9,)
EXACT = Search(num_beams=None, threshold=0.0)
TEXT = (6, 4, 8, 7, 5, 1)
"""abc ab c ca bc a, after the token 2 that is given."""


def spellings() -> Spellings:
    return Spellings(PIECES, ENDS)


class Toy:
    """A language model whose logits are random numbers that the whole context seeds."""

    def __init__(self, scale: float = 1.5) -> None:
        self.scale = scale
        self.asked: list[tuple[int, ...]] = []

    def logprobs(self, context: Sequence[int]) -> NDArray[np.float64]:
        digest = hashlib.sha256(repr(tuple(context)).encode()).digest()
        logits = self.scale * np.random.default_rng(list(digest)).standard_normal(len(PIECES))
        return np.asarray(logits - np.log(np.exp(logits).sum()), dtype=np.float64)

    def spelled(self, context: Sequence[int]) -> NDArray[np.float64]:
        """Return the probability of each token, given that it spells something or ends."""
        probabilities = np.exp(self.logprobs(context))
        probabilities[[0, 10]] = 0.0
        return np.asarray(probabilities / probabilities.sum())


def predicted(
    toy: Toy, text: Sequence[int], search: Search = EXACT, start: int = 1
) -> NDArray[np.float64]:
    """Return what a search makes of a text, whose tokens before ``start`` are given."""
    spelled = spellings()
    asking = byte_probabilities(spelled, text, start, len(text), search)
    try:
        wanted = next(asking)
        while True:
            contexts = [(*text[: c.given], *c.others) for c in wanted]
            toy.asked += contexts
            found: list[Any] = [spelled.outlook(toy.logprobs(context)) for context in contexts]
            wanted = asking.send(found)
    except StopIteration as done:
        rows: NDArray[np.float64] = done.value
        return rows


def covered(toy: Toy, context: tuple[int, ...], data: bytes) -> float:
    """Return the probability of all tokens after a context that cover ``data``, one by one."""
    if not data:
        return 1.0
    probabilities, total = toy.spelled(context), 0.0
    for token, piece in enumerate(PIECES):
        if piece is None:
            continue
        if piece.startswith(data):
            total += probabilities[token]
        elif data.startswith(piece):
            total += probabilities[token] * covered(toy, (*context, token), data[len(piece) :])
    return total


def ended(toy: Toy, context: tuple[int, ...], data: bytes) -> float:
    """Return the probability that the tokens after a context spell ``data``, and end there."""
    probabilities = toy.spelled(context)
    total = 0.0 if data else float(probabilities[list(ENDS)].sum())
    for token, piece in enumerate(PIECES):
        if piece is not None and data.startswith(piece):
            total += probabilities[token] * ended(toy, (*context, token), data[len(piece) :])
    return total


def spelled_by(tokens: Sequence[int]) -> bytes:
    return b"".join(PIECES[token] or b"" for token in tokens)


def enumerated(toy: Toy, text: Sequence[int]) -> NDArray[np.float64]:
    """Return the same as ``predicted``, by eq. 3 of BLD and all covers."""
    data, given = spelled_by(text[1:]), (text[0],)
    rows = np.zeros((len(data) + 1, ALPHABET))
    for place in range(len(data) + 1):
        for byte in b"abc":
            rows[place, byte] = covered(toy, given, data[:place] + bytes([byte]))
        rows[place, END] = ended(toy, given, data[:place])
        rows[place] /= covered(toy, given, data[:place])
    return rows


def distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return float(0.5 * np.abs(first - second).sum(-1).mean())


def test_all_tokenizations_together_are_the_exact_cover() -> None:
    toy, text = Toy(), (2, *TEXT)
    found, expected = predicted(toy, text), enumerated(toy, text)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-12)


def test_the_probabilities_of_a_texts_bytes_multiply_to_that_of_its_cover() -> None:
    toy, text = Toy(), (2, *TEXT)
    rows, data = predicted(toy, text), spelled_by(TEXT)
    each = [rows[place, byte] for place, byte in enumerate(data)]
    assert math.prod(each) == pytest.approx(covered(toy, (2,), data), rel=1e-10)
    whole = math.prod(each) * rows[-1, END]
    assert whole == pytest.approx(ended(toy, (2,), data), rel=1e-10)


def test_more_beams_come_closer_to_the_exact_cover_and_always_sum_to_one() -> None:
    toy = Toy()
    texts = [(2, *order) for order in itertools.islice(itertools.permutations(TEXT), 0, 720, 90)]
    errors = []
    for num_beams in (1, 2, 4, 32):
        search = Search(num_beams=num_beams, threshold=0.0)
        found = [predicted(toy, text, search) for text in texts]
        assert all(np.allclose(rows.sum(-1), 1.0) for rows in found)
        pairs = [(rows, predicted(toy, text)) for rows, text in zip(found, texts, strict=True)]
        errors.append(float(np.mean([distance(*pair) for pair in pairs])))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[3] < errors[0] / 10


def test_dropping_the_unlikely_saves_calls_and_costs_little() -> None:
    text = (2, *TEXT)
    exact, whole = Toy(), Toy()
    expected = predicted(exact, text)
    found = predicted(whole, text, Search(num_beams=None, threshold=0.02))
    assert len(whole.asked) < len(exact.asked) / 2
    assert 0 < distance(found, expected) < 0.02


def test_the_canonical_path_asks_on_the_text_alone() -> None:
    toy, text = Toy(), (2, *TEXT)
    predicted(toy, text, Search(path="canonical"))
    assert toy.asked == [text[: 1 + number] for number in range(len(TEXT) + 1)]


def test_the_first_byte_of_a_canonical_token_is_the_marginal_of_the_tokens_softmax() -> None:
    toy, text = Toy(), (2, *TEXT)
    rows = predicted(toy, text, Search(path="canonical"))
    place = 0
    for number, token in enumerate(TEXT):
        probabilities = toy.spelled(text[: 1 + number])
        for byte in b"abc":
            starting = [i for i, piece in enumerate(PIECES) if piece and piece[0] == byte]
            assert rows[place, byte] == pytest.approx(probabilities[starting].sum(), rel=1e-10)
        assert rows[place, END] == pytest.approx(probabilities[9], rel=1e-10)
        place += len(PIECES[token] or b"")


def test_the_canonical_path_leaves_out_that_a_token_ends_and_tells_what_comes() -> None:
    toy = Toy()
    canonical = Search(path="canonical")
    within = predicted(toy, (2, 6), canonical)[1]  # after a of abc
    going_on = toy.spelled((2,))[[4, 6]].sum()
    assert going_on > 0
    assert within[ord("b")] == pytest.approx(1.0)  # no other token begins with a
    assert predicted(toy, (2, 6))[1, ord("b")] < 0.95  # it may have ended there
    one, two = (predicted(toy, text, canonical)[1] for text in ((2, 6), (2, 1, 2)))
    assert distance(one[None], two[None]) > 0.05  # the same past, another future
    exact, same = (predicted(toy, text)[1] for text in ((2, 6), (2, 1, 2)))
    np.testing.assert_allclose(exact, same, atol=1e-12)


def test_marks_are_out_of_the_alphabet_and_what_is_given_is_taken_as_it_is() -> None:
    toy = Toy()
    outlook = spellings().outlook(toy.logprobs((2,)))
    assert outlook.probabilities.sum() + outlook.end == pytest.approx(1.0)
    expected = enumerated(toy, (6, *TEXT))
    np.testing.assert_allclose(predicted(toy, (6, *TEXT)), expected, atol=1e-12)
    later = predicted(toy, (2, *TEXT), start=3)
    assert len(later) == len(spelled_by(TEXT[2:])) + 1
    assert all(context[:3] == (2, *TEXT[:2]) for context in toy.asked[-5:])


class Sure(Toy):
    """Is all but certain of the longest token, whatever comes before."""

    def logprobs(self, context: Sequence[int]) -> NDArray[np.float64]:
        logits = np.zeros(len(PIECES))
        logits[6] = 12.0
        return np.asarray(logits - np.log(np.exp(logits).sum()))


def test_a_text_that_goes_on_where_nothing_was_kept_is_taken_up_from_its_own_tokens() -> None:
    toy, text = Sure(), (2, 1, 1, 4, 3)  # a a ab c
    rows = predicted(toy, text, Search(num_beams=1, threshold=1e-3))
    np.testing.assert_allclose(rows.sum(-1), 1.0)
    assert rows[0, ord("a")] > 0.99


def test_contexts_come_back_to_the_text_only_where_they_are_on_it() -> None:
    text = (5, 1, 2)
    assert Context(1).extended(1, text) == Context(2)
    assert Context(1).extended(4, text) == Context(1, (4,))
    assert Context(1, (4,)).extended(2, text) == Context(1, (4, 2))
    assert Context(3).extended(1, text) == Context(3, (1,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"threshold": 1.0}, r"threshold must be in \[0, 1\), not 1.0"),
    ],
)
def test_a_search_that_keeps_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Search(**options)

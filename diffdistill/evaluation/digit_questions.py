"""The offline world of vision-language models: questions about pictures of handwritten digits.

A picture holds two or three scans of scikit-learn's digits (8x8) from left to right, each at a
height of its own, on a black ground of 24x24 pixels. A question asks for what can be read off them,
or worked out; the answer is a number, or all of them. Everything but the scans is ours. The rows
that ship with the package were made by `scripts/make_digit_questions.py`.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE, SCAN, GRID = 24, 8, 4
"""Pixels of a picture, of a scan, and between the places where a scan may start."""
HELD_OUT_EVERY = 9
WHITE = 16.0

KINDS: Mapping[str, Callable[[Sequence[int]], object]] = {
    "all": lambda digits: " ".join(map(str, digits)),
    "left": lambda digits: digits[0],
    "right": lambda digits: digits[-1],
    "largest": max,
    "smallest": min,
    "sum": sum,
}
"""What is asked, and the answer by the digits from left to right."""


class DigitQuestion(NamedTuple):
    """A picture with a question about it.

    Attributes:
        picture: Grey levels uint8 ``[24, 24]``.
        digits: What is on it, from left to right.
        kind: Which of ``KINDS`` is asked.
    """

    picture: np.ndarray
    digits: tuple[int, ...]
    kind: str

    @property
    def question(self) -> str:
        """What is asked."""
        return f"{self.kind}?"

    @property
    def answer(self) -> str:
        """What is right."""
        return str(KINDS[self.kind](self.digits))

    def row(self) -> dict[str, Any]:
        """Return the question as a row of a data set, the picture as a PNG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.picture).save(buffer, "png", optimize=True)
        image = {"bytes": buffer.getvalue(), "path": None}
        return {"image": image, "text": self.question, "answer": self.answer}


@cache
def scans(held_out: bool) -> tuple[tuple[np.ndarray, ...], ...]:
    """The scans of each digit, uint8 ``[8, 8]``; every ninth of all scans is kept from training."""
    source = load_digits()
    levels = np.round(source.images / WHITE * 255).astype(np.uint8)
    kept = (np.arange(len(levels)) % HELD_OUT_EVERY == 0) == held_out
    return tuple(tuple(levels[kept & (source.target == digit)]) for digit in range(10))


def digit_questions(seed: int, *, held_out: bool = False) -> Iterator[DigitQuestion]:
    """Yield questions without end, each with a picture of its own; all kinds are as frequent.

    Args:
        seed: What is asked depends on it alone.
        held_out: Of the scans that are kept from training.
    """
    generator = np.random.default_rng(seed)
    kinds = list(KINDS)
    while True:
        count = int(generator.integers(2, 4))
        digits = tuple(generator.integers(0, 10, count).tolist())
        picture = _drawn(digits, scans(held_out), generator)
        yield DigitQuestion(picture, digits, kinds[generator.integers(len(kinds))])


def _drawn(
    digits: Sequence[int], known: Sequence[Sequence[np.ndarray]], generator: np.random.Generator
) -> np.ndarray:
    """Return a picture of digits from left to right, which do not overlap."""
    picture = np.zeros((SIDE, SIDE), np.uint8)
    free = (SIDE - SCAN * len(digits)) // GRID
    shifts = sorted(generator.integers(0, free + 1, len(digits)).tolist())
    for place, (digit, shift) in enumerate(zip(digits, shifts, strict=True)):
        scan = known[digit][int(generator.integers(len(known[digit])))]
        top = GRID * int(generator.integers(0, (SIDE - SCAN) // GRID + 1))
        left = SCAN * place + GRID * shift
        picture[top : top + SCAN, left : left + SCAN] = scan
    return picture

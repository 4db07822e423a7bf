r"""A second capability for the arithmetic's models: editing a word, letter by letter.

A question asks to reverse a word, to delete a letter from it, to replace one by another, or to
sort it. Its solution is a scratchpad, a line for each letter of the word: the letter, and what is
written so far. The last line is the answer, in a box. Everything is ours.

    rev bad box      del a bad box    rep a c bad box    sort bad box
    b:b              b:b              b:b                b:b
    a:ab             a:b              a:bc               a:ab
    d:dab            d:bd             d:bcd              d:abd
    \boxed{dab}      \boxed{bd}       \boxed{bcd}        \boxed{abd}

The rows that ship with the package were made by `scripts/make_editing_data.py`.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from diffdistill.evaluation.arithmetic import HELD_OUT_EVERY, Format, final_line

ALPHABET = "abcdefgh"
LEVELS = ("rev-4", "rev-6", "del-4", "del-6", "rep-4", "rep-6", "sort-4", "sort-6")
"""What is done, and the letters of the word."""

Writing = Callable[[str, str, str], str]
"""What is written after a letter: of what is written so far, the letter, and the arguments."""

OPERATIONS: Mapping[str, Writing] = {
    "rev": lambda written, letter, _: letter + written,
    "del": lambda written, letter, given: written + letter.replace(given, ""),
    "rep": lambda written, letter, given: written + letter.replace(*given),
    "sort": lambda written, letter, _: "".join(sorted(written + letter)),
}
NUM_GIVEN = {"rev": 0, "del": 1, "rep": 2, "sort": 0}
"""Letters that an operation is given besides the word."""


class Edit(NamedTuple):
    """A word to edit.

    Attributes:
        operation: One of ``OPERATIONS``.
        given: The letter to delete, or the one to replace and what by; empty for the others.
        word: The word.
    """

    operation: str
    given: str
    word: str

    @property
    def question(self) -> str:
        """What is asked."""
        return " ".join([self.operation, *self.given, self.word, "box"])

    @property
    def format(self) -> Format:
        """How the answer is wanted."""
        return "box"

    @property
    def level(self) -> str:
        """Which of ``LEVELS`` it is of."""
        return f"{self.operation}-{len(self.word)}"

    @property
    def written(self) -> list[str]:
        """What is written after each letter."""
        so_far, found = "", list[str]()
        for letter in self.word:
            so_far = OPERATIONS[self.operation](so_far, letter, self.given)
            found.append(so_far)
        return found

    @property
    def answer(self) -> str:
        """The edited word."""
        return self.written[-1]

    @property
    def solution(self) -> str:
        """The scratchpad and the answer."""
        pairs = zip(self.word, self.written, strict=True)
        lines = [f"{letter}:{written}" for letter, written in pairs]
        return "\n".join([*lines, final_line(self.answer, self.format)])

    def row(self) -> dict[str, Any]:
        """Return the edit as a row of a data set."""
        return {
            "messages": [{"role": "user", "content": self.question}],
            "solution": self.solution,
            "answer": self.answer,
        }


def read_question(question: str) -> Edit:
    """Return the edit that a question asks for."""
    operation, *given, word, _ = question.split()
    return Edit(operation, "".join(given), word)


def is_held_out(edit: Edit) -> bool:
    """Return whether an edit is kept from training, by a hash of its question."""
    digest = hashlib.blake2b(edit.question.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_EVERY == 0


def edits(seed: int, *, held_out: bool = False, levels: tuple[str, ...] = LEVELS) -> Iterator[Edit]:
    """Yield random edits, for ever and now and then one again: each level as often as another.

    None leaves nothing of a word, and letters that are given are in it.

    Args:
        seed: Determines all of them.
        held_out: Whether those that are kept from training, or those for training.
        levels: Which levels.
    """
    generator = random.Random(seed)
    while True:
        for level in generator.sample(levels, len(levels)):
            while True:
                found = _drawn(level, generator)
                if found.answer and is_held_out(found) == held_out:
                    yield found
                    break


def _drawn(level: str, generator: random.Random) -> Edit:
    operation, _, size = level.partition("-")
    word = "".join(generator.choices(ALPHABET, k=int(size)))
    given = generator.choice(word) if NUM_GIVEN[operation] else ""
    if NUM_GIVEN[operation] == 2:
        given += generator.choice(ALPHABET.replace(given, ""))
    return Edit(operation, given, word)

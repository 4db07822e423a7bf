r"""The offline world of language models that answer: arithmetic, column by column.

A question asks for a sum or a product, and in which format. Its solution is a scratchpad, a line a
step: the lowest column first, the carry of the column before as the last term, and a result of two
digits, the carry into the next column and the digit that is written down. The last line is the
answer, in a box or as a JSON object. Everything is ours.

    478+694 box     347*26 json
    8+4+0=12        7*6+0=42
    7+9+1=17        4*6+4=28
    4+6+1=11        3*6+2=20
    \boxed{1172}    7*2+8+0=22
                    4*2+0+2=10
                    3*2+2+1=09
                    {"answer": 9022}

Where the second factor has two digits, its second partial product is added to what is written
already, which is the second term: no result exceeds 9 * 9 + 9 + 9 = 99. The rows that ship with the
package were made by `scripts/make_arithmetic_data.py`.

The same steps can be written in another style, with words in place of signs (``worded``): the
numbers, and their order, are the same.

    8 and 4 and 0 make 12
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")
Format = Literal["box", "json"]

FORMATS: tuple[Format, ...] = ("box", "json")
LEVELS = ("add-2", "add-3", "add-4", "add-5", "mul-2x1", "mul-3x1", "mul-4x1", "mul-2x2", "mul-3x2")
"""Digits of both summands, or of the two factors."""
HELD_OUT_EVERY = 9
WORDS = {"+": " and ", "*": " times ", "=": " make "}
"""What stands for each sign in the other style."""


class Problem(NamedTuple):
    """A sum or a product.

    Attributes:
        first: The first number, which is not shorter than the second.
        operator: ``+`` or ``*``.
        second: The second number.
        format: How the answer is wanted.
    """

    first: int
    operator: str
    second: int
    format: Format = "box"

    @property
    def question(self) -> str:
        """What is asked, and in which format."""
        return f"{self.first}{self.operator}{self.second} {self.format}"

    @property
    def level(self) -> str:
        """Which of ``LEVELS`` it is of."""
        sizes = len(str(self.first)), len(str(self.second))
        return f"add-{sizes[0]}" if self.operator == "+" else f"mul-{sizes[0]}x{sizes[1]}"

    @property
    def answer(self) -> str:
        """The result."""
        added = self.operator == "+"
        return str(self.first + self.second if added else self.first * self.second)

    @property
    def steps(self) -> list[str]:
        """The lines of the scratchpad."""
        columns = _added if self.operator == "+" else _multiplied
        return list(columns(_digits(self.first), _digits(self.second)))

    @property
    def last_line(self) -> str:
        """The answer in its format."""
        return final_line(self.answer, self.format)

    @property
    def solution(self) -> str:
        """The scratchpad and the answer."""
        return "\n".join([*self.steps, self.last_line])

    def row(self) -> dict[str, Any]:
        """Return the problem as a row of a data set."""
        return {
            "messages": [{"role": "user", "content": self.question}],
            "solution": self.solution,
            "answer": self.answer,
        }


def final_line(answer: str, style: Format) -> str:
    """Return an answer in a format."""
    return f"\\boxed{{{answer}}}" if style == "box" else f'{{"answer": {answer}}}'


def worded(scratchpad: str) -> str:
    """Return a scratchpad, or a part of it, with words in place of signs.

    A last line stays as it is, whatever its format.
    """
    for sign, word in WORDS.items():
        scratchpad = scratchpad.replace(sign, word)
    return scratchpad


def read_question(question: str) -> Problem:
    """Return the problem that a question asks."""
    task, style = question.split()
    operator = "+" if "+" in task else "*"
    first, second = task.split(operator)
    assert style in FORMATS
    return Problem(int(first), operator, int(second), style)


def is_held_out(problem: Problem) -> bool:
    """Return whether a problem is kept from training, by a hash of its numbers in any order."""
    numbers = sorted((problem.first, problem.second))
    content = f"{numbers[0]}{problem.operator}{numbers[1]}"
    digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_EVERY == 0


def problems(
    seed: int,
    *,
    held_out: bool = False,
    formats: tuple[Format, ...] = FORMATS,
    levels: tuple[str, ...] = LEVELS,
) -> Iterator[Problem]:
    """Yield random problems, for ever and now and then one again: each level as often as another.

    Args:
        seed: Determines all of them.
        held_out: Whether those that are kept from training, or those for training.
        formats: Which formats, alike.
        levels: Which levels.
    """
    generator = random.Random(seed)
    while True:
        for level in generator.sample(levels, len(levels)):
            while True:
                found = _drawn(level, generator.choice(formats), generator)
                if is_held_out(found) == held_out:
                    yield found
                    break


def distinct(found: Iterator[T], count: int) -> list[T]:
    """Return the first problems that are not the same."""
    known: dict[T, None] = {}
    while len(known) < count:
        known.setdefault(next(found))
    return list(known)


def _drawn(level: str, style: Format, generator: random.Random) -> Problem:
    kind, _, sizes = level.partition("-")
    if kind == "add":
        first, second = (_number(int(sizes), generator) for _ in range(2))
        return Problem(first, "+", second, style)
    first, second = (_number(int(size), generator) for size in sizes.split("x"))
    return Problem(first, "*", second, style)


def _number(size: int, generator: random.Random) -> int:
    """Return a number of so many digits; of one digit, at least 2."""
    return generator.randrange(10 ** (size - 1) if size > 1 else 2, 10**size)


def _digits(number: int) -> list[int]:
    """Return the digits, the lowest first."""
    return [int(digit) for digit in reversed(str(number))]


def _added(first: list[int], second: list[int]) -> Iterator[str]:
    carry = 0
    for one, other in zip(first, second, strict=True):
        total = one + other + carry
        yield f"{one}+{other}+{carry}={total:02}"
        carry = total // 10


def _multiplied(first: list[int], second: list[int]) -> Iterator[str]:
    written = [0] * (len(first) + len(second))
    for shift, other in enumerate(second):
        carry = 0
        for place, one in enumerate(first, start=shift):
            total = one * other + written[place] + carry
            before = f"+{written[place]}" if shift else ""
            yield f"{one}*{other}{before}+{carry}={total:02}"
            carry, written[place] = divmod(total, 10)
        written[shift + len(first)] = carry

"""Rewards that can be verified: the final answer of a text against the reference of its example."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.types import Example

INTEGER = re.compile(r"([+-]?)0*([0-9]+)")
GROUPED = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3}|/0*[1-9][0-9]*)?")
"""A fraction or a number with or without a short exponent: a long one takes for ever."""
MAX_CHARACTERS = 400
"""Of a number: Python refuses to read longer ones than some thousand digits."""


@dataclass(kw_only=True)
class AnswerReward(ABC):
    """A judge of written answers that needs no network.

    A subclass says how to ``score`` them, and which ``parses``; fields with a default are its
    options.

    Attributes:
        device: Where the scores are.
    """

    device: torch.device

    @abstractmethod
    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        """Return how good each answer is, float32 ``[B]``, as a rule in [0, 1].

        Args:
            answers: Texts, without special tokens.
            examples: What each is an answer to.

        Raises:
            UserError: If an example has no answer to verify by.
        """

    def check(self, example: Example) -> None:  # noqa: B027 - some need nothing of an example
        """Refuse an example whose answers could not be scored, before any is written.

        Raises:
            UserError: If it lacks what they are verified by.
        """

    @abstractmethod
    def parses(self, answers: Sequence[str]) -> Tensor:
        """Return whether each answer keeps to the format that is asked for, bool ``[B]``."""

    def parsed(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        """Return ``parses`` of answers to examples; rewards of skills differ by the example."""
        return self.parses(answers)


@dataclass(kw_only=True)
class FinalAnswer(AnswerReward):
    """1 for the right final answer, else 0; a subclass says where in a text that answer is.

    Attributes:
        format_reward: The score of a wrong answer in the right format, in [0, 1].
        numeric: Whether answers of the same value are equal: 0.5, .50, 1/2 and 5e-1.
    """

    format_reward: float = 0.0
    numeric: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: If the format's share is none.
        """
        if not 0 <= self.format_reward <= 1:
            name = f"reward {type(self).__name__}"
            raise UserError(f"{name}: format_reward must be in [0, 1], not {self.format_reward}")

    @abstractmethod
    def final(self, answer: str) -> str | None:
        """Return the final answer that a text gives, None where it breaks the format."""

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        """Return 1 for right answers, ``format_reward`` for other ones that parse, else 0."""
        scores = []
        for answer, example in zip(answers, examples, strict=True):
            expected, found = reference(example), self.final(answer)
            wrong = 0.0 if found is None else self.format_reward
            right = found is not None and equal(found, expected, numeric=self.numeric)
            scores.append(1.0 if right else wrong)
        return torch.tensor(scores, dtype=torch.float32, device=self.device)

    def check(self, example: Example) -> None:
        """Refuse an example without an answer.

        Raises:
            UserError: If it has none.
        """
        reference(example)

    def parses(self, answers: Sequence[str]) -> Tensor:
        """Return whether each answer has a final answer in the format."""
        found = [self.final(answer) is not None for answer in answers]
        return torch.tensor(found, dtype=torch.bool, device=self.device)


def reference(example: Example) -> str:
    """Return the answer that an example is verified by.

    Raises:
        UserError: If it has none.
    """
    if example.answer is None or not example.answer.strip():
        where = example.origin or f"the question {example.prompt!r}"
        raise UserError(
            f"{where}: there is no answer to verify by: add a column 'answer' "
            "(data.answer_column names another)"
        )
    return example.answer


def equal(first: str, second: str, *, numeric: bool = False) -> bool:
    """Return whether two final answers are the same, ``normalized`` or, if wanted, by value."""
    texts = normalized(first), normalized(second)
    if texts[0] == texts[1]:
        return True
    values = [_value(text) for text in texts] if numeric else [None]
    return None not in values and values[0] == values[1]


def normalized(answer: str) -> str:
    """Return an answer without outer spaces, commas between thousands, plus and leading zeros.

    The last two of whole numbers only; ours, less than what is usual for competition problems.
    """
    text = answer.strip()
    if GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if (found := INTEGER.fullmatch(text)) is None:
        return text
    sign, digits = found.groups()
    return f"-{digits}" if sign == "-" and digits != "0" else digits


def _value(text: str) -> Fraction | None:
    if len(text) > MAX_CHARACTERS or not NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.partition("/")
    return Fraction(numerator) / Fraction(denominator or "1")

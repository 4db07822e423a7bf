"""Whether an answer ends with a JSON object, and the answer in it is right.

Source: ours, after the structured outputs of the extrapolation cliff (arXiv:2605.08737), whose
contract is a text that a strict parser reads.
"""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from diffdistill.verifying import FinalAnswer


@dataclass(kw_only=True)
class JsonAnswer(FinalAnswer):
    """Whether the last thing in a text is ``{"answer": ...}`` with the right answer.

    Attributes:
        key: The key whose value, a number or a string, is the answer.
    """

    key: str = "answer"

    def final(self, answer: str) -> str | None:
        """Return the value, as it is written, in the object at the end; None without one."""
        found = last_object(answer, self.key)
        value = None if found is None else found[self.key]
        return value.strip() or None if isinstance(value, str) else None


def last_object(text: str, key: str) -> dict[str, Any] | None:
    """Return the JSON object with ``key`` that ends a text; its numbers are strings.

    None if there is none, if anything but spaces follows it, if another object with the key comes
    before it, or if a brace before it is open.
    """
    text = text.rstrip()
    place = depth = 0
    while place < len(text):
        if text[place] == "{" and depth == 0:
            try:
                found, end = STRICT.raw_decode(text, place)
            except (ValueError, RecursionError):
                pass
            else:
                if key in found:
                    return found if end == len(text) else None
                place = end
                continue
        depth += (text[place] == "{") - (text[place] == "}")
        place += 1
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key comes twice")
    return values


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=str, parse_float=str, parse_constant=_constant
)
"""The json module allows NaN and repeated keys otherwise."""

"""What a model of tokens says of the next byte of a text, whatever tokens spell it.

Eq. 3 of BLD (arXiv:2604.07466): the probability of a byte is that of all token sequences which
cover the text with it, over that of all which cover the text without. A beam keeps the likeliest
tokenizations instead of all; which approximation the paper takes is unconfirmed. The scheme is that
of beam summing (arXiv:2412.03719), in the form of states of a trie; the code is ours.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffdistill.spellings import ALPHABET, END, Node, Outlook, Spellings

Path = Literal["beam", "canonical"]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which tokenizations of a text are followed.

    Attributes:
        path: ``beam`` follows the likeliest; ``canonical`` the one that the tokenizer makes of
            the whole text, which asks for no more than one call of the model. It has two defects:
            it leaves out that the token may have ended here, and its boundaries tell of the bytes
            to come (one after "ab" says that no longer token went on).
        num_beams: How many are kept after each byte; None is all, which is exact, and exponential.
        threshold: Those with a smaller share of the probability are dropped, and tokens that end
            with a smaller share are not followed.
    """

    path: Path = "beam"
    num_beams: int | None = 4
    threshold: float = 1e-3

    def __post_init__(self) -> None:
        """Check the options."""
        if self.num_beams is not None and self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, not {self.num_beams}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), not {self.threshold}")


class Context(NamedTuple):
    """What a model is asked after: so many tokens of a text as it is, and then others."""

    given: int
    others: tuple[int, ...] = ()

    def extended(self, token: int, text: Sequence[int]) -> "Context":
        """Return the context with one more token of a ``text`` or beside it."""
        on_path = not self.others and self.given < len(text) and text[self.given] == token
        return Context(self.given + 1) if on_path else Context(self.given, (*self.others, token))


class State(NamedTuple):
    """A tokenization of the bytes so far, whose last token is not finished.

    Attributes:
        context: The tokens before the last.
        outlook: What the model says after them.
        node: The bytes of the last, so far.
        mass: The probability, after the context, of all tokens that begin with these.
        weight: Log-probability of the context and the node, up to a constant.
    """

    context: Context
    outlook: Outlook
    node: Node
    mass: float
    weight: float


Asking: TypeAlias = Generator[list[Context], list[Outlook], NDArray[np.float64]]
"""Yields contexts, is sent what the model says after each, and returns probabilities."""


def byte_probabilities(
    spelled: Spellings, text: Sequence[int], start: int, stop: int, search: Search
) -> Asking:
    """Return the probabilities ``[M + 1, ALPHABET]`` of each byte, and of what follows the last.

    Args:
        spelled: What the tokens spell.
        text: Token ids of the whole text.
        start: The first token whose bytes are asked for; those before are taken as they are.
        stop: The token after the last.
        search: Which tokenizations are followed.
    """
    pieces = [spelled.pieces[token] for token in text[start:stop]]
    data = b"".join(pieces)
    ends = [0, *accumulate(len(piece) for piece in pieces)]
    boundaries = {place: start + number for number, place in enumerate(ends)}
    rows = np.zeros((len(data) + 1, ALPHABET))
    states: list[State] = []
    for place in range(len(data) + 1):
        if place in boundaries and (search.path == "canonical" or not states):
            states = yield from _started(spelled, [Context(boundaries[place])])
        grown = states
        if search.path == "beam":
            grown = states + (yield from _grown(spelled, states, text, search.threshold))
        rows[place] = next_byte(spelled, grown)
        if place < len(data):
            kept = _pruned(_consumed(spelled, grown, data[place]), search)
            if not kept:  # what was dropped is what the text goes on with
                kept = yield from _recovered(spelled, data, boundaries, place + 1)
            states = kept
    return rows


def next_byte(spelled: Spellings, states: Iterable[State]) -> NDArray[np.float64]:
    """Return the probabilities ``[ALPHABET]`` of the next byte; all 0 where there is none."""
    states = list(states)
    found = np.zeros(ALPHABET)
    highest = max((state.weight for state in states), default=0.0)
    for state in states:
        share = np.exp(state.weight - highest) / state.mass
        branches = spelled.branches(state.node)
        found[branches.bytes] += share * branches.masses(state.outlook)
        if state.node.depth == 0:
            found[END] += share * state.outlook.end
    total = found.sum()
    return found / total if total > 0 else found


def _started(
    spelled: Spellings, contexts: list[Context]
) -> Generator[list[Context], list[Outlook], list[State]]:
    """Return a state at the start of a token after each context."""
    outlooks = yield contexts
    return [
        State(context, outlook, spelled.root, 1.0, 0.0)
        for context, outlook in zip(contexts, outlooks, strict=True)
    ]


def _grown(
    spelled: Spellings, states: Sequence[State], text: Sequence[int], threshold: float
) -> Generator[list[Context], list[Outlook], list[State]]:
    """Return the states in which the last token of one of ``states`` ends here."""
    total = np.logaddexp.reduce([state.weight for state in states])
    found = []
    for state in states:
        for place in range(state.node.start, state.node.first):
            share = state.outlook.probabilities[place] / state.mass
            if share > 0 and np.exp(state.weight - total) * share >= threshold:
                context = state.context.extended(int(spelled.tokens[place]), text)
                found.append((context, state.weight + float(np.log(share))))
    if not found:
        return []
    started = yield from _started(spelled, [context for context, _ in found])
    return [
        state._replace(weight=weight) for state, (_, weight) in zip(started, found, strict=True)
    ]


def _consumed(spelled: Spellings, states: Iterable[State], byte: int) -> list[State]:
    """Return the states whose last token goes on with a byte."""
    found = []
    for state in states:
        node = spelled.branches(state.node).after(byte)
        if node is None:
            continue
        mass = float(state.outlook.probabilities[node.start : node.stop].sum())
        if mass > 0:
            weight = state.weight + float(np.log(mass / state.mass))
            found.append(state._replace(node=node, mass=mass, weight=weight))
    return found


def _pruned(states: Sequence[State], search: Search) -> list[State]:
    """Return the likeliest states."""
    if not states:
        return []
    ordered = sorted(states, key=lambda state: -state.weight)[: search.num_beams]
    total = np.logaddexp.reduce([state.weight for state in states])
    return [s for s in ordered if s is ordered[0] or np.exp(s.weight - total) >= search.threshold]


def _recovered(
    spelled: Spellings, data: bytes, boundaries: dict[int, int], place: int
) -> Generator[list[Context], list[Outlook], list[State]]:
    """Return the state of the tokenizer's own tokens at a place in the text; none if impossible."""
    before = max(boundary for boundary in boundaries if boundary <= place)
    states = yield from _started(spelled, [Context(boundaries[before])])
    for byte in data[before:place]:
        states = _consumed(spelled, states, byte)
    return states

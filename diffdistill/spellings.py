"""A vocabulary in the order of the bytes that its tokens spell: a trie, as ranges of a list."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

END = 256
"""Stands for the end of a text, or of a turn, where a byte is expected."""
ALPHABET = 257
"""All bytes, and the end. Other special tokens are out of it: they spell nothing."""


class Node(NamedTuple):
    """The tokens that begin with the same bytes.

    Attributes:
        start: The first of them; those up to ``first`` spell these bytes and no more.
        first: The first that goes on.
        stop: The end of the range.
        depth: How many bytes.
    """

    start: int
    first: int
    stop: int
    depth: int


class Outlook(NamedTuple):
    """What a model says of the next token, of those that spell something or end the text.

    Attributes:
        probabilities: Of each token ``[n]``, in the order of the spellings.
        end: Of all end tokens together.
    """

    probabilities: NDArray[np.float64]
    end: float


class Branches(NamedTuple):
    """How the tokens of a node go on.

    Attributes:
        bytes: The next bytes ``[k]``, in order.
        starts: Where the tokens with each begin ``[k]``.
        nodes: The node of each.
        first: The first token that goes on.
        stop: The end of the range.
    """

    bytes: NDArray[np.int64]
    starts: NDArray[np.int64]
    nodes: dict[int, Node]
    first: int
    stop: int

    def masses(self, outlook: Outlook) -> NDArray[np.float64]:
        """Return the probability of the tokens that go on with each byte, ``[k]``."""
        if not len(self.bytes):
            return np.zeros(0)
        going = outlook.probabilities[self.first : self.stop]
        return np.add.reduceat(going, self.starts - self.first)

    def after(self, byte: int) -> Node | None:
        """Return the node that a byte leads to, if any."""
        return self.nodes.get(byte)


class Spellings:
    """The tokens of a vocabulary, sorted by what they spell.

    Attributes:
        pieces: What each token id spells; empty where nothing.
        tokens: The ids of those that spell something, in order ``[n]``.
        ends: The ids of the tokens that end a text.
        root: The node of no bytes.
    """

    def __init__(self, pieces: Sequence[bytes | None], ends: Iterable[int]) -> None:
        """Take what each token id spells, None where nothing, and which ids end a text."""
        self.ends = frozenset(ends)
        self.pieces = [
            b"" if piece is None or token in self.ends else piece
            for token, piece in enumerate(pieces)
        ]
        ordered = sorted((piece, token) for token, piece in enumerate(self.pieces) if piece)
        self.tokens = np.array([token for _, token in ordered], dtype=np.int64)
        self._lengths = np.array([len(piece) for piece, _ in ordered])
        self._table = np.zeros((len(ordered), int(self._lengths.max(initial=1))), dtype=np.uint8)
        for row, (piece, _) in enumerate(ordered):
            self._table[row, : len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        self.root = Node(0, 0, len(ordered), 0)
        self._branches: dict[Node, Branches] = {}

    def outlook(self, logprobs: NDArray[np.float32]) -> Outlook:
        """Return log-probabilities ``[V]`` of token ids as those of what is in the alphabet."""
        exact = logprobs.astype(np.float64)
        spelled, ends = np.exp(exact[self.tokens]), float(np.exp(exact[sorted(self.ends)]).sum())
        total = float(spelled.sum()) + ends
        return Outlook(spelled / total, ends / total)

    def branches(self, node: Node) -> Branches:
        """Return how the tokens of a node go on."""
        known = self._branches.get(node)
        if known is None:
            known = self._branches[node] = self._branched(node)
        return known

    def _branched(self, node: Node) -> Branches:
        column = self._table[node.first : node.stop, node.depth : node.depth + 1].reshape(-1)
        found, places = np.unique(column, return_index=True)
        edges = [node.first + int(place) for place in places] + [node.stop]
        nodes = {
            int(byte): self._node(edges[i], edges[i + 1], node.depth + 1)
            for i, byte in enumerate(found)
        }
        starts = np.array(edges[:-1], dtype=np.int64)
        return Branches(found.astype(np.int64), starts, nodes, node.first, node.stop)

    def _node(self, start: int, stop: int, depth: int) -> Node:
        first = start
        while first < stop and self._lengths[first] == depth:
            first += 1
        return Node(start, first, stop, depth)

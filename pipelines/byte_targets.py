"""The bytes that student and teacher both learn of a text, and what the teacher says of each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffdistill.byte_beam import Asking, Search, byte_probabilities
from diffdistill.pipelines.branching import Branching
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.spellings import ALPHABET, END, Spellings

Columns = tuple[Sequence[int], Sequence[bool], Sequence[int]]
"""Token ids of a text, which of them are learned, and the chunk of each (see ``texts.Text``)."""

Key = tuple[int, int]
"""A byte: the number of its chunk, and its place in it; place -1 is the end after the chunk."""


class Spelled(NamedTuple):
    """One side's tokens of a text, as bytes.

    Attributes:
        keys: Of each token, the bytes that it spells; none where they are not common.
        values: Each of these bytes, in order.
    """

    keys: list[list[Key]]
    values: dict[Key, int]


class Stretch(NamedTuple):
    """Tokens in a row whose bytes are asked for.

    Attributes:
        start: The first token.
        stop: The token after the last.
        keys: The bytes, and the end after them if that is asked for too.
    """

    start: int
    stop: int
    keys: list[Key]


def spell(columns: Columns, spelled: Spellings) -> Spelled:
    """Return the bytes of the tokens that are in a chunk, and the ends right after a chunk."""
    tokens, learned, chunks = columns
    keys: list[list[Key]] = [[] for _ in tokens]
    values: dict[Key, int] = {}
    sizes: dict[int, int] = {}
    mute = {chunk for token, chunk in zip(tokens, chunks, strict=True) if not spelled.pieces[token]}
    for place, (token, chunk) in enumerate(zip(tokens, chunks, strict=True)):
        if chunk >= 0 and chunk not in mute:
            size = sizes.get(chunk, 0)
            piece = spelled.pieces[token]
            keys[place] = [(chunk, size + number) for number in range(len(piece))]
            values |= dict(zip(keys[place], piece, strict=True))
            sizes[chunk] = size + len(piece)
        elif learned[place] and token in spelled.ends and place and _spells(keys[place - 1]):
            keys[place] = [(chunks[place - 1], -1)]
            values[keys[place][0]] = END
    return Spelled(keys, values)


def stretches(keys: Sequence[Sequence[Key]]) -> Iterator[Stretch]:
    """Yield the stretches of tokens in a row whose bytes are asked for, each after some token."""
    place = 1
    while place < len(keys):
        if not _spells(keys[place]):
            place += 1
            continue
        start = place
        while place < len(keys) and _spells(keys[place]):
            place += 1
        ended = list(keys[place]) if place < len(keys) else []
        asked = [key for token in keys[start:place] for key in token]
        yield Stretch(start, place, [*asked, *ended])


def _spells(keys: Sequence[Key]) -> bool:
    """Return whether a token with these keys spells bytes."""
    return bool(keys) and keys[0][1] >= 0


def byte_columns(ours: Spelled) -> dict[str, Tensor]:
    """Return where the student's tokens are among the bytes (see ``texts.Bytes``)."""
    numbers = {key: number for number, key in enumerate(ours.values)}
    return {
        "bytes/first": _column(numbers[k[0]] if k else -1 for k in ours.keys),
        "bytes/size": _column(len(k) for k in ours.keys),
        "bytes/observed": _column(ours.values.values()),
    }


def _column(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def target_columns(
    ours: Spelled, found: Mapping[Key, NDArray[np.float64]], kept: int
) -> dict[str, Tensor]:
    """Return the most likely bytes at each of the student's, in as few bits as they need.

    Args:
        ours: The student's bytes.
        found: The teacher's probabilities ``[ALPHABET]`` of some; all 0 where it says nothing.
        kept: How many bytes are kept.
    """
    rows = np.zeros((len(ours.values), ALPHABET))
    for number, key in enumerate(ours.values):
        if key in found:
            rows[number] = found[key]
    probabilities = torch.from_numpy(rows)
    top = probabilities.topk(min(kept, ALPHABET), dim=-1)
    return {
        "bytes/ids": top.indices.to(torch.int16),
        "bytes/logprobs": top.values.clamp_min(1e-26).log().to(torch.float16),
        "bytes/known": probabilities.sum(-1) > 0,
    }


def search_bytes(
    family: CausalLM,
    network: nn.Module,
    texts: Sequence[tuple[Sequence[int], Sequence[Stretch]]],
    spelled: Spellings,
    search: Search,
) -> list[dict[Key, NDArray[np.float64]]]:
    """Return a model's probabilities ``[ALPHABET]`` of each byte of some texts.

    All stretches go forward at once, so that one call of the network serves many.

    Args:
        family: Calls the network.
        network: A causal LM of transformers.
        texts: Token ids of each text, and what is asked of it.
        spelled: What the tokens spell.
        search: Which tokenizations are followed.
    """
    found: list[dict[Key, NDArray[np.float64]]] = [{} for _ in texts]
    asked = [(row, stretch) for row, (_, parts) in enumerate(texts) for stretch in parts]
    if not asked:
        return found
    reader = Branching(family, network, [tokens for tokens, _ in texts])
    searches: list[Asking] = [
        byte_probabilities(spelled, texts[row][0], stretch.start, stretch.stop, search)
        for row, stretch in asked
    ]
    waiting = {number: next(search) for number, search in enumerate(searches)}
    while waiting:
        places = [
            (asked[number][0], context) for number, wanted in waiting.items() for context in wanted
        ]
        answers = iter([spelled.outlook(x.float().cpu().numpy()) for x in reader.logprobs(places)])
        still = {}
        for number, wanted in waiting.items():
            try:
                still[number] = searches[number].send([next(answers) for _ in wanted])
            except StopIteration as done:
                row, stretch = asked[number]
                found[row] |= dict(zip(stretch.keys, done.value, strict=False))
        waiting = still
    return found

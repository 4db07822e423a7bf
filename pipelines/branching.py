"""Next-token predictions after contexts that branch off given texts, each token called once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from diffdistill.byte_beam import Context
from diffdistill.pipelines.block_diffusion import as_mask, attention_of, project
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_sampling import positions_in
from diffdistill.projection import Projection, at, dense

Place = tuple[int, Context]
"""The number of a text, and a context that begins as it does."""


class Branching:
    """Reads texts once, and then single tokens beside them, on the keys and values of both.

    A token beside a text sees the text up to where it branches off, and the tokens of its own
    branch; its position is where it would stand. Networks whose layers see a window alone see all
    here: texts should be no longer than the window.
    """

    def __init__(
        self, family: CausalLM, network: nn.Module, texts: Sequence[Sequence[int]]
    ) -> None:
        """Read texts of token ids, none of which is empty."""
        self.family, self.network = family, network
        self.length = max(len(text) for text in texts)
        rows = [[*text, *[family.pad_id] * (self.length - len(text))] for text in texts]
        tokens = torch.tensor(rows, device=family.device)
        cache: Any = DynamicCache()
        positions = positions_in(tokens).expand_as(tokens)
        seen = torch.ones_like(tokens, dtype=torch.bool)
        self.read = self._called(tokens, seen, positions, cache)
        self.past = [(_Pool(x.keys), _Pool(x.values)) for x in cache.layers if x.is_initialized]
        self.branches: dict[Place, tuple[int, ...]] = {}
        self.size = tokens.numel()

    def logprobs(self, places: Sequence[Place]) -> list[Tensor]:
        """Return the log-probabilities ``[V]`` of the next token after each context.

        Of a context beside a text, the one without its last token must have been asked for.
        """
        aside = [place for place in places if place[1].others]
        found = iter(self._call(aside) if aside else ())
        return [next(found) if place[1].others else self._on_text(place) for place in places]

    def _on_text(self, place: Place) -> Tensor:
        row, context = place
        index = torch.tensor([row]), torch.tensor([context.given - 1])
        return dense(at(self.read, index))[0].log_softmax(-1)

    def _call(self, places: Sequence[Place]) -> Tensor:
        """Return log-probabilities ``[n, V]``, from a call with the last token of each context."""
        entries = [self._entries(place) for place in places]
        width = max(len(own) for own in entries)
        filled = torch.tensor([[0] * (width - len(own)) + own for own in entries])
        lengths = torch.tensor([len(own) for own in entries])[:, None]
        seen = torch.arange(width + 1) >= width - lengths  # [n, width + 1]
        tokens = torch.tensor([[context.others[-1]] for _, context in places])
        device = self.family.device
        filled, seen, tokens, positions = (x.to(device) for x in (filled, seen, tokens, lengths))
        cache: Any = DynamicCache([(k.at(filled), v.at(filled)) for k, v in self.past])
        mask = as_mask(seen[:, None, None], attention_of(self.network), self.family.weights_dtype)
        found = self._called(tokens, mask, positions, cache)
        layers = [layer for layer in cache.layers if layer.is_initialized]
        for (keys, values), layer in zip(self.past, layers, strict=True):
            keys.append(layer.keys[:, :, -1])
            values.append(layer.values[:, :, -1])
        for number, place in enumerate(places):
            self.branches[place] = (*self._branch(place), self.size + number)
        self.size += len(places)
        return dense(found)[:, 0].log_softmax(-1)

    def _entries(self, place: Place) -> list[int]:
        """Return what the last token of a context sees before it: places in the pools."""
        row, context = place
        start = row * self.length
        return [*range(start, start + context.given), *self._branch(place)]

    def _branch(self, place: Place) -> tuple[int, ...]:
        """Return the places in the pools of the tokens of a branch before its last."""
        row, context = place
        before = context._replace(others=context.others[:-1])
        return self.branches[row, before] if before.others else ()

    def _called(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Projection:
        found = project(self.network, tokens, mask, positions, cache)
        return self.family.of_words(found)


class _Pool:
    """Keys, or values, of tokens in the order in which they were called."""

    def __init__(self, given: Tensor) -> None:
        """Take those of the texts, ``[B, heads, L, D]``."""
        self.known = given.transpose(1, 2).flatten(0, 1)  # [B L, heads, D]
        self.size = len(self.known)

    def append(self, more: Tensor) -> None:
        """Add those of some tokens, ``[n, heads, D]``."""
        if self.size + len(more) > len(self.known):
            room = self.known.new_zeros(self.size + len(more), *self.known.shape[1:])
            self.known = torch.cat([self.known[: self.size], room])
        self.known[self.size : self.size + len(more)] = more
        self.size += len(more)

    def at(self, places: Tensor) -> Tensor:
        """Return those at places ``[n, S]`` as a cache has them, ``[n, heads, S, D]``."""
        return self.known[places].transpose(1, 2)

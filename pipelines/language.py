"""What the families of masked-diffusion language models share: mask token, lengths and layout.

A family reads texts with its own tokenizer and predicts every hidden token of a row from one call.
Subclasses differ in the call alone.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.answers import AnswerSampler
from diffdistill.pipelines.block_diffusion import SPARSE_TILE
from diffdistill.pipelines.chats import Row
from diffdistill.pipelines.network_family import NetworkFamily
from diffdistill.projection import Projection, without
from diffdistill.texts import Format
from diffdistill.types import Condition, State


@dataclass(kw_only=True)
class LanguageFamily(NetworkFamily):
    """A family of masked-diffusion language models on networks of transformers.

    Attributes:
        max_length: Tokens of the longest row, a multiple of ``block``.
        block: Tokens that are denoised together. An answer begins with a block, and is followed
            by end tokens, which are learned, up to the end of its last one.
        mask_token: Spelling of the mask token; None is the tokenizer's own, or what the network's
            config names.
    """

    max_length: int = 512
    block: int = 32
    mask_token: str | None = None

    def __post_init__(self) -> None:
        """Check the lengths; start with nothing loaded.

        Raises:
            UserError: If no row of whole blocks has the length.
        """
        if self.block < 1 or self.max_length < 1 or self.max_length % self.block:
            raise UserError(
                f"max_length {self.max_length} must be a multiple of the block of {self.block} "
                "tokens"
            )
        if self.attention == "flex_attention" and 2 * self.max_length % SPARSE_TILE:
            raise UserError(
                f"attention flex_attention needs a max_length that is a multiple of "
                f"{SPARSE_TILE // 2}, not {self.max_length}"
            )
        super().__post_init__()

    @abstractmethod
    def call(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return logits ``[B, L, V]`` about ``state.x``; ``condition`` is that of ``condition``."""

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return what ``call`` does, with an impossible mask token (SUBS, section 3 of BD3LM)."""
        found = without(self.call(network, state, condition), [self.mask_id])
        assert isinstance(found, Projection)
        return found

    def condition(self, clean: Tensor, padding: Tensor) -> Condition:
        """Return what a network is told besides the state.

        That is ``clean`` and ``padding``, and in ``pads`` ``[B]`` how much of it is on the left.

        Args:
            clean: The text without masks, ``[B, L]``.
            padding: bool ``[B, L]``: what is no text, on the left and on the right.
        """
        return {"clean": clean, "padding": padding, "pads": padding.long().cumprod(1).sum(1)}

    @abstractmethod
    def sampler(self, network: nn.Module, **options: Any) -> AnswerSampler:
        """Return what samples answers; ``options`` are those of ``AnswerSampler``."""

    def _of_the_tokenizer(self) -> dict[str, Any]:
        """Return the options of a sampler that the tokenizer gives."""
        return {"mask_id": self.mask_id, "pad_id": self.pad_id, "eos_ids": self.end_ids}

    @property
    def span(self) -> int | None:
        """How many tokens share a noise level in the bound on the likelihood; None is a row.

        That is a block where later ones are not seen.
        """
        return self.block

    def _check_network(self, network: Any, folder: Path) -> None:
        rows = network.get_input_embeddings().num_embeddings
        if self.mask_id >= rows:
            raise UserError(
                f"{folder}: the mask token has id {self.mask_id}, and the network {rows} embeddings"
            )

    @cached_property
    def mask_id(self) -> int:
        """Id of the mask token.

        Raises:
            UserError: If there is none.
        """
        words = self.tokenizer
        spelled = words.mask_token if self.mask_token is None else self.mask_token
        known = words.get_added_vocab()
        stated = loading.read_config(self.folder).get("mask_token_id")
        if spelled is None and stated is not None:
            return int(stated)
        if spelled is None:
            raise UserError(
                f"{self.path}: the tokenizer has no mask token: set mask_token to one of its "
                "special tokens, or convert the model to block diffusion, which adds one"
            )
        if spelled not in known:
            raise UserError(
                f"{self.path}: mask_token {spelled!r} is no special token of the tokenizer; it "
                f"has {', '.join(sorted(known))}"
            )
        return int(known[spelled])

    @property
    def format(self) -> Format:
        """How texts are laid out."""
        return Format(self.mask_id, self.block, self.max_length)

    @property
    def unit(self) -> int:
        """What a row's prompt, and the row, are filled up to a multiple of."""
        return self.block

    @property
    def multiple(self) -> int:
        """What the length of a batch is a multiple of."""
        if self.attention != "flex_attention":
            return self.block
        return math.lcm(self.block, SPARSE_TILE // 2)

    def lay_out(self, row: Row) -> Row:
        """Return a text as the network reads it; empty where there is nothing to learn.

        Padding in front lets the first answer begin with a block, as in sampling. What comes
        after the last answer (a line break of the template) is dropped: left visible, it would
        tell where the answer ends.
        """
        if not any(row.maskable):
            return row.part(0, 0)
        first = row.maskable.index(True)
        stop = len(row.maskable) - row.maskable[::-1].index(True)
        left = -first % self.unit
        kept = row.part(0, stop)
        ended = kept.tokens[-1] in self.tokenizer.all_special_ids
        missing = -(left + stop + (not ended)) % self.unit + (not ended)
        return Row(
            [self.pad_id] * left + kept.tokens + [self.eos_id] * missing,
            [False] * left + kept.maskable + [True] * missing,
            [-1] * left + kept.chunks + [-1] * missing,
            [-1] * left + kept.documents + [kept.documents[-1]] * missing,
        )

    def fingerprint(self) -> str:
        """Return a hash of the tokenizer and of the options that alter how texts are read."""
        return self.hashed(type(self).__name__, self.max_length, self.block, self.mask_token)

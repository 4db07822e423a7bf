"""Boundary predictors: small language models that label each token with the kind of the next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification

from diffdistill.boundaries import Offsets, first_flip
from diffdistill.errors import UserError
from diffdistill.pipelines import loading

CHARACTERS = 32
"""Of a token, at most: a longer past is not even tokenized."""


@dataclass(frozen=True)
class Boundary:
    """Predicts where an author's text turns into the other kind.

    Attributes:
        network: A token classifier of transformers with two classes, 1 being style.
        tokenizer: Its tokenizer, which need not be that of an author.
        context: Tokens that it sees, the last of a text.
    """

    network: Any
    tokenizer: Any
    context: int = 200

    @classmethod
    def load(cls, folder: Path, context: int, device: torch.device) -> "Boundary":
        """Return the predictor in a folder.

        Raises:
            UserError: If there is none.
        """
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: no boundary predictor: make it with diffdistill tessy fit-predictors"
            )
        network = classifier(folder)
        return cls(network.to(device).eval(), loading.load_tokenizer(folder, False), context)

    @torch.no_grad()
    def cuts(self, texts: Sequence[str], starts: Sequence[int], style: bool) -> list[int | None]:
        """Return where each text turns into the other kind: ``boundaries.first_flip``.

        Args:
            texts: What has been thought, new parts included.
            starts: The character from which on each is new.
            style: Whether the author's own kind is style.
        """
        behind = [max(0, start - CHARACTERS * self.context) for start in starts]
        tails = [text[skip:] for text, skip in zip(texts, behind, strict=True)]
        rows = [read(self.tokenizer, tail, last=self.context) for tail in tails]
        found = self._next_styles([ids for ids, _ in rows])
        cuts: list[int | None] = []
        for (_, offsets), styles, start, skip in zip(rows, found, starts, behind, strict=True):
            place = first_flip(offsets, styles, start - skip, style)
            cuts.append(None if place is None else place + skip)
        return cuts

    def _next_styles(self, rows: Sequence[Sequence[int]]) -> list[list[bool]]:
        if not any(rows):
            return [[] for _ in rows]
        tokens, seen = padded(rows)
        device = self.network.device
        logits = self.network(input_ids=tokens.to(device), attention_mask=seen.to(device)).logits
        styles: list[list[bool]] = logits.argmax(-1).bool().tolist()
        return [kinds[: len(row)] for kinds, row in zip(styles, rows, strict=True)]


def classifier(folder: Path) -> Any:
    """Return a token classifier of two classes, whose head may be new.

    Raises:
        UserError: If transformers cannot make one of the model in the folder.
    """
    with loading.explained(f"load a token classifier from {folder}"):
        return AutoModelForTokenClassification.from_pretrained(
            str(folder), num_labels=2, dtype=torch.float32, use_safetensors=True
        )


def read(tokenizer: Any, text: str, *, last: int | None = None) -> tuple[list[int], Offsets]:
    """Return a text's tokens, and which characters they are; only the last if so told."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    return (ids, offsets) if last is None else (ids[-last:], offsets[-last:])


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows ``[B, L]``, filled up on the right, and where they are not, int64."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return tokens, seen

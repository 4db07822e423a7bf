"""Texts as token ids, and what a method may ask of a family of text models."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from diffdistill.projection import Prediction
from diffdistill.types import Batch, Condition, State

Reader: TypeAlias = Literal["student", "teacher"]
"""Whose tokenizer and chat template a text went through."""


class Text(NamedTuple):
    """A batch of texts as one reader has them.

    Attributes:
        tokens: Token ids ``[B, L]``.
        maskable: bool ``[B, L]``: may be hidden, and counts; never a prompt or padding.
        chunks: int64 ``[B, L]``: the chunk of each token, -1 where it has none. Student and
            teacher count the same chunks of a row, from 0 (see ``alignment.align``).
    """

    tokens: Tensor
    maskable: Tensor
    chunks: Tensor


class Format(NamedTuple):
    """How one reader's texts are laid out.

    Attributes:
        mask_id: Id of the mask token, which is never predicted.
        block: Tokens that are denoised together; rows begin with a block.
        length: Tokens of the longest row.
    """

    mask_id: int
    block: int
    length: int


class TextModel(Protocol):
    """A network of token ids behind one call.

    Returns logits ``[B, L, V]``, or the ``Projection`` that they are made from; those at i are
    about ``state.x[:, i]``, and the mask token is impossible (SUBS).
    """

    def __call__(self, state: State, condition: Condition) -> Prediction:
        """Return the prediction at ``state`` under ``condition``."""
        ...


class TextFamily(Protocol):
    """A family of masked-diffusion models, with a student and a teacher that read texts.

    The two may have tokenizers, chat templates, mask tokens and lengths of their own.
    """

    def format(self, *, reader: Reader = "student") -> Format:
        """Return how the reader's texts are laid out."""
        ...

    def spellings(self, *, reader: Reader = "student") -> Sequence[bytes | None]:
        """Return what each token id of the reader spells, None of special tokens."""
        ...

    def text(self, batch: Batch, *, reader: Reader = "student") -> Text:
        """Return the texts of ``batch`` as the reader has them."""
        ...

    def noised(self, batch: Batch, t: Tensor, mask: Tensor, *, reader: Reader = "student") -> State:
        """Return the state whose tokens are hidden at ``mask``, behind the reader's mask token.

        Args:
            batch: The collated batch, or the same batch several times over: ``mask`` may have
                a multiple of its rows.
            t: The noise level ``[B]``.
            mask: bool ``[B, L]``: the tokens to hide; ``mask`` of the state.
            reader: Whose tokens.
        """
        ...

    def condition(self, batch: Batch, *, reader: Reader = "student", copies: int = 1) -> Condition:
        """Return what the reader's model is told besides the state.

        For a block-diffusion model that holds the clean text, of which a block sees the past.

        Args:
            batch: The collated batch.
            reader: Whose model.
            copies: How many times over, one after the other, the batch is to be read at once.
        """
        ...


class Bytes(NamedTuple):
    """What a batch of texts spells, byte after byte, and what a teacher says of each byte.

    Attributes:
        first: int64 ``[B, L]``: the number of each token's first byte; -1 of tokens that spell
            none of them.
        size: int64 ``[B, L]``: how many bytes each token spells.
        observed: int64 ``[B, M]``: the bytes, and ``spellings.END`` where an answer ends.
        ids: int64 ``[B, M, K]``: the teacher's most likely bytes there.
        logprobs: ``[B, M, K]``: their log-probabilities; the rest is what they leave of 1.
        known: bool ``[B, M]``: whether the teacher says anything.
    """

    first: Tensor
    size: Tensor
    observed: Tensor
    ids: Tensor
    logprobs: Tensor
    known: Tensor

"""Texts as a masked-diffusion student and its teacher read them: states and conditions."""

from dataclasses import dataclass

from torch import Tensor

from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.text_rows import TextRows
from diffdistill.texts import Format, Reader
from diffdistill.types import Batch, Condition, State


@dataclass
class TextPair(TextRows[LanguageFamily]):
    """The student's family, and the teacher's, which may be the same: a ``texts.TextFamily``.

    Where they are two, both tokenize each text, and it is cut into chunks that both spell. Where
    they are one, each token is a chunk of its own.
    """

    def format(self, *, reader: Reader = "student") -> Format:
        """Return how the reader's texts are laid out."""
        return self._family(reader).format

    def noised(self, batch: Batch, t: Tensor, mask: Tensor, *, reader: Reader = "student") -> State:
        """Return the state whose tokens are hidden at ``mask`` (see ``texts.TextFamily``)."""
        tokens = batch[f"{self._key(reader)}/tokens"]
        tokens = tokens.repeat(len(mask) // len(tokens), 1)
        return State(tokens.masked_fill(mask, self._family(reader).mask_id), t, mask)

    def condition(self, batch: Batch, *, reader: Reader = "student", copies: int = 1) -> Condition:
        """Return what the reader's model is told besides the state."""
        key = self._key(reader)
        clean, padding = batch[f"{key}/tokens"], batch[f"{key}/documents"] < 0
        return self._family(reader).condition(clean.repeat(copies, 1), padding.repeat(copies, 1))

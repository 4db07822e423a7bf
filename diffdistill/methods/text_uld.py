"""ULD and GOLD for autoregressive models: baselines of ``bld``.

The losses are those of ``methods.uld`` and ``methods.gold`` where all is hidden that is learned: an
autoregressive model predicts each token from those before it, and denoising is the cross-entropy.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffdistill.hiding import Hidden, usable_chunks
from diffdistill.methods.gold import GOLD
from diffdistill.methods.uld import ULD
from diffdistill.texts import Text
from diffdistill.types import Batch


def all_hidden(text: Text, answer: Text) -> Hidden:
    """Return that each learned token is hidden, at noise level 1."""
    level: Tensor = torch.ones(len(text.tokens), device=text.tokens.device)
    return Hidden(text.maskable, usable_chunks(text, answer), level)


@dataclass(kw_only=True)
class TextULD(ULD):
    """Learn given texts, and match the sorted probabilities of a teacher with other tokens."""

    texts: ClassVar = False
    answers: ClassVar = True
    given: ClassVar = True

    t_low: ClassVar = 0.5  # type: ignore[misc]  # no option: there are no noise levels

    def _hide(self, batch: Batch, text: Text, answer: Text) -> Hidden:
        return all_hidden(text, answer)


@dataclass(kw_only=True)
class TextGOLD(GOLD):
    """Learn given texts, and match a teacher with other tokens: token by token where both can."""

    texts: ClassVar = False
    answers: ClassVar = True
    given: ClassVar = True

    t_low: ClassVar = 0.5  # type: ignore[misc]  # as above

    def _hide(self, batch: Batch, text: Text, answer: Text) -> Hidden:
        return all_hidden(text, answer)

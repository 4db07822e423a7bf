"""The family ``mdlm``: masked diffusion of whole rows, as of LLaDA and Dream."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.masked_sampling import MaskedSampler, denoise_all
from diffdistill.projection import Projection
from diffdistill.types import Condition, State


@dataclass(kw_only=True)
class MDLM(LanguageFamily):
    """Any causal LM of transformers, run as masked diffusion: every token sees every other.

    Attributes:
        shift: Whether the network predicts a token at the place before it, as the causal LM it
            was made from (Dream).
    """

    shift: bool = False

    def call(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return logits ``[B, L, V]`` of the noised row."""
        return denoise_all(network, state.x, padding=condition["padding"], shift=self.shift)

    def sampler(self, network: nn.Module, **options: Any) -> MaskedSampler:
        """Return what samples answers: block by block, each seen as a whole (LLaDA)."""
        given = self._of_the_tokenizer() | options
        return MaskedSampler(network=network, block=self.block, shift=self.shift, **given)

    @property
    def span(self) -> None:
        """How many tokens share a noise level: those of a whole row, which is seen at once."""
        return None

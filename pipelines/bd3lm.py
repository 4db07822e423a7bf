"""The family ``bd3lm``: any causal LM of transformers as block diffusion (arXiv:2503.09573)."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffdistill.pipelines.block_diffusion import Order, denoise
from diffdistill.pipelines.block_sampling import BlockSampler
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.projection import Projection
from diffdistill.types import Condition, State


@dataclass(kw_only=True)
class BD3LM(LanguageFamily):
    """Any causal LM of transformers, run as block diffusion: a block sees the clean ones before.

    Attributes:
        order: Whether the ``noised-clean`` copies of a row are called in this order or the other
            way around; the prediction is the same.
    """

    order: Order = "noised-clean"

    def call(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return logits ``[B, L, V]`` of the noised copy, beside the clean one."""
        return denoise(
            network,
            state.x,
            condition["clean"],
            block=self.block,
            pads=condition["pads"],
            order=self.order,
        )

    def sampler(self, network: nn.Module, **options: Any) -> BlockSampler:
        """Return what samples answers, block by block on a cache."""
        given = self._of_the_tokenizer() | options
        return BlockSampler(network=network, block=self.block, **given)

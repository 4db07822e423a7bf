"""The family ``llada2``: LLaDA2.x of inclusionAI, mixtures of experts trained by block diffusion.

The network is the checkpoint's own code. It takes additive masks ``[B, 1, L, L]`` alone: a 2-D one
would be made causal, or refused. Logits are those of their own place. What is confirmed, and what
is not, is in docs/teachers-text.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.pipelines.block_diffusion import as_mask, denoise
from diffdistill.pipelines.block_sampling import BlockSampler, UncachedSampler
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.masked_sampling import denoise_all
from diffdistill.projection import Projection
from diffdistill.types import Condition, State


def additive_masks(network: nn.Module) -> None:
    """Let a network be given bool masks ``[B or 1, 1, L, K]``; its code gets additive ones.

    Additive, and of all rows, as LLaDA2's code checks. What may not be seen is the type's lowest
    number and not -inf, of which a row would be NaN.
    """
    body: Any = network.base_model
    body.register_forward_pre_hook(_made_additive, with_kwargs=True)


def _made_additive(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    mask = kwargs["attention_mask"]
    if mask.is_floating_point():
        added = mask
    else:
        dtype: Any = module.dtype
        added = as_mask(mask, "eager", dtype)
    rows: Tensor = kwargs["input_ids"]
    return args, kwargs | {"attention_mask": added.expand(len(rows), -1, -1, -1)}


@dataclass(kw_only=True)
class LLaDA2(LanguageFamily):
    """LLaDA2.x, or any causal LM of transformers that is called as one.

    Attributes:
        convention: How it is called. ``tide`` as the teacher of TIDE (its code): the noised row
            alone, of which every token sees every other, clean or masked. ``native`` as in its own
            training by block diffusion: the noised row beside the clean one, a block seeing itself
            and the clean ones before.
        cache: Whether its code takes a cache with a mask that is not square, which speeds sampling
            up; unconfirmed, so that blocks are sampled without one.
    """

    convention: Literal["tide", "native"] = "tide"
    cache: bool = False

    adapter_targets: ClassVar = (*LanguageFamily.adapter_targets, "query_key_value", "dense")

    def __post_init__(self) -> None:
        """Check the options; start with nothing loaded.

        Raises:
            UserError: If they do not go together.
        """
        super().__post_init__()
        if self.attention == "flex_attention":
            raise UserError("llada2 takes no block masks of flex_attention: set attention: sdpa")

    @property
    def unit(self) -> int:
        """What a row is filled up to a multiple of: TIDE's call knows no blocks."""
        return self.block if self.convention == "native" else 1

    def call(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return logits ``[B, L, V]`` of the noised row."""
        if self.convention == "tide":
            return denoise_all(network, state.x, padding=condition["padding"])
        clean, pads = condition["clean"], condition["pads"]
        return denoise(network, state.x, clean, block=self.block, pads=pads)

    def sampler(self, network: nn.Module, **options: Any) -> BlockSampler:
        """Return what samples answers, block by block; ``options`` are those of the sampler."""
        kind = BlockSampler if self.cache else UncachedSampler
        given = self._of_the_tokenizer() | options
        return kind(network=network, block=self.block, **given)

    @property
    def span(self) -> int | None:
        """How many tokens share a noise level: TIDE's call sees whole rows at once."""
        return self.block if self.convention == "native" else None

    def _load(self, folder: Path) -> Any:
        network = super()._load(folder)
        additive_masks(network)
        return network

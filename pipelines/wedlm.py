"""The family ``wedlm``: WeDLM of Tencent, a causal LM that fills in masks in any order.

Its network computes what Qwen3's does (WeDLM-8B) or Qwen2's (WeDLM-7B), under the same names, so
that transformers' own classes load it and no code of the checkpoint need be run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.block_diffusion import denoise
from diffdistill.pipelines.block_sampling import BlockSampler
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.reordering import ReorderedSampler, denoise_reordered
from diffdistill.projection import Projection
from diffdistill.types import Condition, State

MODEL_TYPE = "wedlm"
OF_THE_CHECKPOINT = ("model_type", "architectures", "auto_map", "transformers_version")


def masks_by_layer(network: nn.Module) -> None:
    """Let a network be given one mask; its code gets it by kind of layer, and takes it as it is.

    WeDLM's class makes a causal mask of what is no dictionary.
    """
    body: Any = network.base_model
    body.register_forward_pre_hook(_by_layer, with_kwargs=True)


def _by_layer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    mask = kwargs["attention_mask"]
    kinds = ("full_attention", "sliding_attention")
    given = mask if isinstance(mask, Mapping) else dict.fromkeys(kinds, mask)
    return args, kwargs | {"attention_mask": given}


def known_class(config: Mapping[str, Any], source: str) -> tuple[Any, Any]:
    """Return transformers' class that computes what a WeDLM config describes, and its config.

    Raises:
        UserError: If there is none.
    """
    normed, biased = config.get("qk_norm", False), config.get("attention_bias", True)
    sliding = "sliding_attention" in (config.get("layer_types") or [])
    if normed == biased or sliding:
        raise UserError(
            f"{source}: this WeDLM is neither a Qwen3 nor a Qwen2 (qk_norm {normed}, "
            f"attention_bias {biased}, sliding layers {sliding}): set trust_remote_code: true to "
            "run its own code"
        )
    values = {k: v for k, v in config.items() if k not in OF_THE_CHECKPOINT}
    if normed:
        return Qwen3ForCausalLM, Qwen3Config(**values)
    return Qwen2ForCausalLM, Qwen2Config(**values)


@dataclass(kw_only=True)
class WeDLM(LanguageFamily):
    """WeDLM, or a Qwen3 or Qwen2 that is called as one.

    Attributes:
        convention: How it is called. ``tide`` as the teacher of TIDE (its code): ``[clean ;
            noised]`` under the mask of block diffusion, in the order of the text. WeDLM was not
            trained so: a masked token then sees later ones of its block, and known tokens see
            masks. ``native`` as it was trained: causal, with the known tokens of a block first.
        trust_remote_code: Let tokenizer and network run code from the checkpoint. Not needed for
            the released models, which transformers' classes of Qwen load.
    """

    convention: Literal["tide", "native"] = "tide"

    def __post_init__(self) -> None:
        """Check the options; start with nothing loaded.

        Raises:
            UserError: If they do not go together.
        """
        super().__post_init__()
        if self.attention == "flex_attention" and self.convention == "native":
            raise UserError("wedlm's native call takes no flex_attention: set attention: sdpa")

    def call(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return logits ``[B, L, V]`` of the noised row."""
        clean, pads = condition["clean"], condition["pads"]
        if self.convention == "tide":
            return denoise(
                network, state.x, clean, block=self.block, pads=pads, order="clean-noised"
            )
        return denoise_reordered(
            network, state.x, clean, block=self.block, mask_id=self.mask_id, pads=pads
        )

    def sampler(self, network: nn.Module, **options: Any) -> BlockSampler:
        """Return what samples answers, in its convention; ``options`` are those of the sampler."""
        kind = ReorderedSampler if self.convention == "native" else BlockSampler
        given = self._of_the_tokenizer() | options
        return kind(network=network, block=self.block, **given)

    def _load(self, folder: Path) -> Any:
        config = loading.read_config(folder)
        if config.get("model_type") == MODEL_TYPE and not self.trust_remote_code:
            kind, known = known_class(config, str(folder))
            network = loading.load_frozen(kind, folder, self._load_options() | {"config": known})
        else:
            network = super()._load(folder)
        masks_by_layer(network)
        return network

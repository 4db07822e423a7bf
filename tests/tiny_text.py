"""Tiny random causal LMs of the real classes."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

WORDS = 40
MASK, EOS, PAD = 39, 38, 37

SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
NAMES = ("qwen3", "qwen3-moe", "llama")


def causal_lm(
    name: str = "qwen3", *, seed: int = 0, attention: str = "sdpa", **changes: Any
) -> Any:
    """Return a causal LM of two layers with a ``config.is_causal`` of False."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = SIZES | {"intermediate_size": 48, "is_causal": False} | changes
    if name == "qwen3":
        network: Any = Qwen3ForCausalLM(Qwen3Config(**sizes))
    elif name == "qwen3-moe":
        network = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **MOE, norm_topk_prob=True))
    else:
        network = LlamaForCausalLM(LlamaConfig(**sizes))
    network.set_attn_implementation(attention)
    return network.eval()

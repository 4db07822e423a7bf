"""Tiny random causal LMs of the real classes, and tokenizers for them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
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
    "max_position_embeddings": 1024,
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


CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[user] {{ m.content | trim }} [/user] "
    "{% else %}{{ m.content | trim }}<eos>{% endif %}{% endfor %}"
)
CODE = (
    "def add(first, second):\n    return first + second\n",
    "for number in range(10):\n    print(number, end=' ')\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n",
    "naive = 'na\u00efve \U0001f642'\nif naive:\n\n    raise ValueError(naive)\n",
)


def words(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer: of the ``student``, or of a ``teacher`` that splits otherwise.

    Their mask tokens, special tokens, ids and chat templates differ.
    """
    student = kind == "student"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=student)
    core.decoder = decoders.ByteLevel()
    marks = ["<|start|>", "<|end|>"] if student else ["<role>"]
    specials = ["<eos>", "<pad>", "<mask>"] if student else ["<pad>", "<eos>", "<role>", "<mask>"]
    core.train_from_iterator(
        CODE,
        trainers.BpeTrainer(
            vocab_size=320 if student else 300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=specials,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        mask_token="<mask>",
        chat_template=CHATML if student else BRACKETS,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


def save_lm(folder: Path, kind: str = "student", name: str = "qwen3", **changes: Any) -> Path:
    """Save a causal LM with the tokenizer of ``kind``; return its folder."""
    tokenizer = words(kind)
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | changes
    causal_lm(name, **sizes).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder

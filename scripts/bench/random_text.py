"""Text models with random weights for the benchmark of text models, and batches for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from diffdistill.config import parse_config
from diffdistill.pipelines.bd3lm import BD3LM
from diffdistill.pipelines.block_diffusion import Attention
from diffdistill.pipelines.llada2 import LLaDA2, additive_masks
from diffdistill.session import Session, build
from diffdistill.types import Batch

BLOCK = 32
VOCABULARY = 151_936
QWEN = {"head_dim": 128, "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
SIZES: dict[str, Any] = {
    "small": Qwen3Config(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, intermediate_size=768, vocab_size=4096, tie_word_embeddings=True,
    ),
    "small-teacher": Qwen3Config(
        hidden_size=384, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=48, intermediate_size=1152, vocab_size=4096, tie_word_embeddings=True,
    ),
    "student": Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        intermediate_size=3072, tie_word_embeddings=True, **QWEN,
    ),
    "dense": Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=12288, tie_word_embeddings=False, **QWEN,
    ),
    "moe": Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=4,
        num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
        intermediate_size=5120, tie_word_embeddings=False, **QWEN | {"vocab_size": 157_184},
    ),
}  # fmt: skip


def random_network(folder: Path, dtype: torch.dtype, attention: Attention, device: Any) -> Any:
    """Return a network of the config in a folder, made where it is used."""
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(folder)), dtype=dtype, attn_implementation=attention
        )
    return network.eval()


@dataclass(kw_only=True)
class RandomBD3LM(BD3LM):
    """A block-diffusion model with random weights."""

    def _load(self, folder: Path) -> Any:
        return random_network(folder, self.weights_dtype, self.attention, self.device)


@dataclass(kw_only=True)
class RandomLLaDA2(LLaDA2):
    """A mixture of experts that is called as LLaDA2, with random weights."""

    def _load(self, folder: Path) -> Any:
        network = random_network(folder, self.weights_dtype, self.attention, self.device)
        additive_masks(network)
        return network


def save_config(folder: Path, name: str) -> Path:
    """Save a config without weights, and a tokenizer of special tokens; return the folder."""
    config = SIZES[name]
    config.is_causal, config.pad_token_id, config.eos_token_id = False, None, 1
    config.architectures = ["Qwen3MoeForCausalLM" if name == "moe" else "Qwen3ForCausalLM"]
    config.save_pretrained(str(folder / name))
    core = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", mask_token="<mask>"
    )
    words.save_pretrained(str(folder / name))
    return folder / name


def session_of(folder: Path, method: dict[str, Any], full: bool) -> Session:
    """Return a session: the teacher of variant ``shared`` is dense, of ``cross`` the mixture."""
    names = ("student", "dense", "moe") if full else ("small", "small-teacher", "small-teacher")
    length = 512 if full else 256
    attention = "flex_attention" if full else "sdpa"
    options = {"block": BLOCK, "max_length": length}
    roles: dict[str, Any] = {}
    if method["name"] == "tide":
        roles["teacher"] = {"path": str(folder / names[1])}
    if method.get("variant") == "cross":
        family = {"name": f"{__name__}:RandomLLaDA2", "path": str(folder / names[2])}
        roles["teacher"] = {"family": family | options | {"max_length": length * 3 // 2}}
    values = {
        "family": {"name": f"{__name__}:RandomBD3LM", "path": str(folder / names[0]),
                   "attention": attention, **options},
        "method": method,
        "roles": roles,
        "data": {"path": "none"},
        "train": {"precision": "bf16" if full else "fp32", "lr": 1e-5},
    }  # fmt: skip
    return build(parse_config(values))


def batch_of(session: Session, rows: int) -> Batch:
    """Return random texts, of which the first quarter is the prompt.

    Chunks are two tokens of the student's and three of the teacher's.
    """
    pair: Any = session.family
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        "ids": torch.arange(rows, device=session.device),
        "prompts": [""] * rows,
    }
    for reader, family in pair.readers.items():
        length, size = family.max_length, 2 if reader == "student" else 3
        tokens = torch.randint(10, 4000, (rows, length), generator=generator)
        places = torch.arange(length).expand(rows, -1)
        maskable = places >= length // 4
        columns = {
            "tokens": tokens,
            "maskable": maskable,
            "chunks": torch.where(maskable, (places - length // 4) // size, -1),
            "documents": torch.zeros_like(tokens),
        }
        batch |= {f"{reader}/{name}": x.to(session.device) for name, x in columns.items()}
    return batch

"""Tiny random models of the real classes, saved in the real folder layouts."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with Qwen's special tokens and a short chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def klein_transformer(**changes: Any) -> Flux2Transformer2DModel:
    """Return a klein transformer of two double-stream and two single-stream blocks."""
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "timestep_guidance_channels": 256,
        "axes_dims_rope": [4, 4, 4, 4],
        "guidance_embeds": False,
    }
    return Flux2Transformer2DModel(**(config | changes))


def z_image_transformer(**changes: Any) -> ZImageTransformer2DModel:
    """Return a Z-Image transformer of two layers and one refiner of each kind."""
    config = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [512, 64, 64],
    }
    network = ZImageTransformer2DModel(**(config | changes))
    for token in (network.x_pad_token, network.cap_pad_token):
        torch.nn.init.normal_(token)
    return network


def save_klein(folder: Path, seed: int = 0) -> Path:
    """Save a FLUX.2 klein pipeline; its text encoder has three layers (use 1, 2, 3)."""
    torch.manual_seed(seed)
    words = tokenizer()
    vae = AutoencoderKLFlux2(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    config = Qwen3Config(vocab_size=len(words), num_hidden_layers=3, **TEXT)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=words,
        transformer=klein_transformer(),
        is_distilled=True,
    )
    pipeline.save_pretrained(str(folder))
    return folder


def save_z_image(folder: Path, seed: int = 0, rope_base: float = 1e6) -> Path:
    """Save a Z-Image pipeline."""
    torch.manual_seed(seed)
    words = tokenizer()
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    rope = {"rope_type": "default", "rope_theta": rope_base}
    config = Qwen3Config(vocab_size=len(words), num_hidden_layers=3, rope_parameters=rope, **TEXT)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(config),
        tokenizer=words,
        transformer=z_image_transformer(),
    )
    pipeline.save_pretrained(str(folder))
    return folder


def save_vlm(folder: Path, seed: int = 1, rope_base: float = 5e6, num_layers: int = 3) -> Path:
    """Save a Qwen3-VL with its processor, of the shape of the Z-Image text encoder."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    torch.manual_seed(seed)
    words = tokenizer()
    rope = {"rope_type": "default", "rope_theta": rope_base, "mrope_section": [2, 1, 1]}
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in VISION_TOKENS}
    config = Qwen3VLConfig(
        text_config=TEXT
        | {
            "vocab_size": len(words),
            "num_hidden_layers": num_layers,
            "rope_parameters": rope | {"mrope_interleaved": True},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(str(folder))
    vision = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(**vision),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(str(folder))
    return folder


VISION_TOKENS = ("image_pad", "video_pad", "vision_start", "vision_end")


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file in place."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

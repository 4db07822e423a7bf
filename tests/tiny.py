"""Tiny random models of the real classes, saved in the real folder layouts."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
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


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    """Return a Wan transformer of two blocks."""
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 16,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**(config | changes))


def wan_vae(**changes: Any) -> AutoencoderKLWan:
    """Return a VAE like Wan2.1's: 16 channels, strides 4 and 8."""
    config = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return AutoencoderKLWan(**(config | changes))


def wan22_vae() -> AutoencoderKLWan:
    """Return a VAE like Wan2.2-TI2V-5B's: 48 channels, strides 4 and 16, patches of 2."""
    return wan_vae(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=torch.linspace(-1.0, 1.0, 48).tolist(),
        latents_std=torch.linspace(0.5, 2.0, 48).tolist(),
    )


def umt5_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that ends each text, as UMT5's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def save_wan(folder: Path, seed: int = 0, *, like: str = "2.1") -> Path:
    """Save a Wan pipeline; ``like`` is 2.1, or 2.2 for the sizes of TI2V-5B."""
    torch.manual_seed(seed)
    words = umt5_tokenizer()
    config = UMT5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    channels = 16 if like == "2.1" else 48
    pipeline = WanPipeline(
        tokenizer=words,
        text_encoder=UMT5EncoderModel(config),
        vae=wan_vae() if like == "2.1" else wan22_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=wan_transformer(in_channels=channels, out_channels=channels),
        expand_timesteps=like != "2.1",
    )
    pipeline.save_pretrained(str(folder))
    return folder


class EvenSigmas(FlowMatchEulerDiscreteScheduler):
    """Spaces its times evenly before the shift: ``WanPipeline`` has no argument for them."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set as many times, from 1 down."""
        sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()
        super().set_timesteps(sigmas=sigmas, device=device)


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file in place."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

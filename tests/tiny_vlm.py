"""Tiny random LLaVA models with their processors, and questions about random pictures."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<eos>", "<pad>", "<image>")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUESTIONS = (("left?", "3"), ("what is the sum of these?", "12"), ("all?", "3 9"), ("sum?", "7"))


def vlm_tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes; ``extra`` is one more special token."""
    special = [*SPECIAL, *([extra] if extra else [])]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )


def save_llava(
    folder: Path,
    *,
    seed: int = 0,
    width: int = 16,
    eyes: int = 2,
    hidden: int = 32,
    side: int = 12,
    extra: str = "",
) -> Path:
    """Save a LLaVA whose encoder has ``width`` channels and patches of 4x4 of ``side`` squared."""
    torch.manual_seed(seed)
    tokenizer = vlm_tokenizer(extra)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=eyes,
        num_attention_heads=2,
        image_size=side,
        patch_size=4,
        initializer_range=0.2,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(str(folder))
    size = {"height": side, "width": side}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(str(folder))
    return folder


def save_onevision(folder: Path, *, seed: int = 0, eyes: int = 2) -> Path:
    """Save a LLaVA-OneVision: pictures are cut into tiles, and packed after the projector."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    torch.manual_seed(seed)
    tokenizer = vlm_tokenizer("<video>")
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=eyes,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=0,
    )
    tiles = [[8, 8], [8, 16], [16, 8], [16, 16]]
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=2,
        video_token_index=3,
        vision_feature_layer=-1,
        image_grid_pinpoints=tiles,
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(str(folder))
    size = {"height": 8, "width": 8}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiles),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(str(folder))
    return folder


def picture(seed: int, side: int = 12) -> bytes:
    """Return a PNG file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_questions(folder: Path) -> Path:
    """Write questions with a picture each, beside them in files."""
    rows = []
    for number, (question, answer) in enumerate(QUESTIONS):
        (folder / f"{number}.png").write_bytes(picture(number))
        rows.append({"image": f"{number}.png", "text": question, "answer": answer})
    file = folder / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def save_seeing_world(folder: Path) -> Path:
    """Save a student, a teacher that it fits, others that it does not fit, and questions."""
    save_llava(folder / "student", eyes=1)
    save_llava(folder / "teacher", seed=1, eyes=3, hidden=48)
    save_llava(folder / "wide", seed=2, width=24)
    save_llava(folder / "fine", seed=3, side=16)
    save_llava(folder / "foreign", seed=4, extra="<other>")
    write_questions(folder)
    return folder


def seeing_values(world: Path, **sections: Any) -> dict[str, Any]:
    """Return the values of a config of Switch-KD; ``sections`` are merged into them."""
    values: dict[str, Any] = {
        "family": {"name": "vlm", "path": str(world / "student")},
        "method": {"name": "switch-kd"},
        "roles": {"teacher": {"path": str(world / "teacher")}},
        "rewards": "exact",
        "data": {
            "path": str(world / "questions.jsonl"),
            "solution_column": "answer",
            "batch_size": 2,
        },
        "train": {"steps": 3, "lr": 0.01, "save_every": 2},
        "sample": {"max_tokens": 5, "batch_size": 3},
        "tracking": {"tensorboard": False},
    }
    for name, given in sections.items():
        values[name] = given if name == "rewards" else values.get(name, {}) | given
    return values

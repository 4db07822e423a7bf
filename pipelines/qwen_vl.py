"""A vision-language model whose words are those of a given text encoder.

D-OPSD's Z-Image teacher reads prompt and target image through Qwen3-VL, with the weights of its
language model overwritten by Z-Image's own text encoder. Its rotary base is left as it is unless
told otherwise: 5e6 and interleaved axes in Qwen3-VL, against 1e6 in the text encoder, so the
text alone does not give the student's embeddings exactly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from diffdistill.errors import MissingExtra, UserError
from diffdistill.pipelines.loading import explained, load_frozen, read_config


def load_reweighted(
    folder: Path, encoder: nn.Module, options: Mapping[str, Any], rope_base: float | None = None
) -> Any:
    """Return the Qwen3-VL in ``folder`` with the language weights of ``encoder``, on the CPU.

    Args:
        folder: A Qwen3-VL checkpoint.
        encoder: The text encoder, a Qwen3 with or without a head.
        options: How transformers is to load it.
        rope_base: Rotary base of the language model; None keeps the checkpoint's.

    Raises:
        UserError: If it is another model, or its language model is of another shape.
    """
    found = read_config(folder).get("model_type")
    if found != "qwen3_vl":
        raise UserError(f"vlm_path {folder}: found model type {found!r}, needed 'qwen3_vl'")
    config = Qwen3VLConfig.from_pretrained(str(folder))
    if rope_base is not None:
        config.text_config.rope_parameters["rope_theta"] = rope_base
    options = {"config": config, **options}
    vlm = load_frozen(Qwen3VLForConditionalGeneration, folder, options).model
    overwrite(vlm.language_model, getattr(encoder, "model", encoder))
    return vlm


def overwrite(target: nn.Module, source: nn.Module) -> None:
    """Copy all weights of ``source`` into ``target``.

    Raises:
        UserError: Unless both have the same weights, by name and shape.
    """
    ours, theirs = source.state_dict(), target.state_dict()
    if different := sorted(ours.keys() ^ theirs.keys()):
        raise UserError(
            f"the VLM's language model is not the text encoder's: {len(different)} weights are "
            f"in one alone, such as {different[0]}"
        )
    for name, weight in ours.items():
        if weight.shape != theirs[name].shape:
            raise UserError(
                f"the VLM's language model is not the text encoder's: {name} is "
                f"{tuple(theirs[name].shape)}, not {tuple(weight.shape)}"
            )
    target.load_state_dict(ours)


def load_processor(folder: Path, trust_remote_code: bool) -> Any:
    """Return the processor of a Qwen3-VL checkpoint.

    Raises:
        MissingExtra: If torchvision is not installed.
    """
    try:
        with explained(f"load the processor in {folder}"):
            return AutoProcessor.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise MissingExtra("torchvision", "view: vlm") from error


@torch.no_grad()
def embed(
    vlm: Any, processor: Any, prompt: str, image: Tensor | None, *, pixels: tuple[int, int]
) -> Tensor:
    """Return the last hidden states but one of one user turn, ``[L, D]``.

    The turn is the image, then the prompt; there is no system prompt.

    Args:
        vlm: The model.
        processor: Its processor.
        prompt: The text.
        image: Pixels ``[3, H, W]`` in [0, 1], or None for text alone.
        pixels: The image is scaled to have at least and at most so many pixels.
    """
    parts = [] if image is None else [{"type": "image"}]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
    rendered = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    inputs = processor(
        text=[rendered],
        images=None if image is None else [image],
        images_kwargs={"do_rescale": False, "size": size},
        return_tensors="pt",
    ).to(vlm.device)
    outputs = vlm(**inputs, output_hidden_states=True, use_cache=False)
    hidden: Tensor = outputs.hidden_states[-2][0]
    return hidden[inputs["attention_mask"][0].bool()]

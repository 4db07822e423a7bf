"""Names of weights in the original (and ComfyUI) layout: the inverse of diffusers' converters.

In that layout the query, key and value projections of FLUX.2 and Z-Image are one matrix, FLUX.2's
last modulation has shift before scale, and Wan's second and third norms change their numbers.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Place = tuple[str, int | None]
"""The original name of a module, and which third of it (0 to 2) where three are fused."""

KLEIN = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
KLEIN_DOUBLE: dict[str, Place] = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.norm_q": ("img_attn.norm.query_norm", None),
    "attn.norm_k": ("img_attn.norm.key_norm", None),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", None),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", None),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "ff.linear_in": ("img_mlp.0", None),
    "ff.linear_out": ("img_mlp.2", None),
    "ff_context.linear_in": ("txt_mlp.0", None),
    "ff_context.linear_out": ("txt_mlp.2", None),
}
KLEIN_SINGLE: dict[str, Place] = {
    "attn.to_qkv_mlp_proj": ("linear1", None),
    "attn.to_out": ("linear2", None),
    "attn.norm_q": ("norm.query_norm", None),
    "attn.norm_k": ("norm.key_norm", None),
}
KLEIN_BLOCKS = {
    "transformer_blocks": ("double_blocks", KLEIN_DOUBLE),
    "single_transformer_blocks": ("single_blocks", KLEIN_SINGLE),
}
Z_IMAGE_ATTENTION: dict[str, Place] = {
    "to_q": ("qkv", 0),
    "to_k": ("qkv", 1),
    "to_v": ("qkv", 2),
    "norm_q": ("q_norm", None),
    "norm_k": ("k_norm", None),
    "to_out.0": ("out", None),
}
WAN = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
WAN_BLOCK = {"norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
WAN_ATTENTIONS = {"attn1": "self_attn", "attn2": "cross_attn"}
WAN_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
MODULATION = "scale_shift_table"
"""A parameter that has a place of its own, for it belongs to no layer."""
SCALE_FIRST = "norm_out.linear"
"""The module whose halves, scale and shift, change places."""
NORMS = ("query_norm", "key_norm")


def klein_place(module: str) -> Place:
    """Return where a module of ``Flux2Transformer2DModel`` is in the original layout."""
    if module in KLEIN:
        return KLEIN[module], None
    blocks, number, inner = module.split(".", 2)
    original, names = KLEIN_BLOCKS[blocks]
    name, third = names[inner]
    return f"{original}.{number}.{name}", third


def z_image_place(module: str) -> Place:
    """Return where a module of ``ZImageTransformer2DModel`` is in the original layout."""
    for part in ("x_embedder", "final_layer"):
        module = module.replace(f"all_{part}.2-1", part)
    block, attention, inner = module.rpartition(".attention.")
    if not attention:
        return module, None
    name, third = Z_IMAGE_ATTENTION[inner]
    return f"{block}.attention.{name}", third


def wan_place(module: str) -> Place:
    """Return where a module of ``WanTransformer3DModel`` is in the original layout."""
    if module in WAN:
        return WAN[module], None
    blocks, number, inner = module.split(".", 2)
    attention, _, part = inner.partition(".")
    if inner == MODULATION:
        name = "modulation"
    elif attention in WAN_ATTENTIONS:
        name = f"{WAN_ATTENTIONS[attention]}.{WAN_ATTENTION[part]}"
    else:
        name = WAN_BLOCK[inner]
    return f"{blocks}.{number}.{name}", None


def original_state(state: Mapping[str, Tensor], place: Callable[[str], Place]) -> dict[str, Tensor]:
    """Return a network's weights under their original names, in the original shapes."""
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        module, dot, kind = key.rpartition(".")
        if kind == MODULATION:
            renamed[place(key)[0]] = value
            continue
        if not dot:
            renamed[key] = value
            continue
        original, third = place(module)
        name = f"{original}.{'scale' if original.endswith(NORMS) else kind}"
        if third is None:
            renamed[name] = _swapped(value) if module == SCALE_FIRST else value
        else:
            thirds[name][third] = value
    fused = {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}
    return renamed | fused


def _swapped(value: Tensor) -> Tensor:
    return torch.cat(tuple(reversed(value.chunk(2))))


def original_lora(
    adapter: Mapping[str, Tensor], place: Callable[[str], Place]
) -> dict[str, Tensor]:
    """Return LoRA factors under original names.

    Where three projections are fused, so are their adapters, exactly: the down factors are
    stacked, the up factors become the blocks of a block-diagonal matrix of three times the rank.
    """
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for key, down in adapter.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        up = adapter[f"{module}.lora_B.weight"]
        original, third = place(module)
        if third is None:
            renamed[f"{original}.lora_A.weight"] = down
            renamed[f"{original}.lora_B.weight"] = _swapped(up) if module == SCALE_FIRST else up
        else:
            thirds[original][third] = (down, up)
    for original, parts in thirds.items():
        down, up = _fused(parts)
        renamed[f"{original}.lora_A.weight"], renamed[f"{original}.lora_B.weight"] = down, up
    return renamed


def _fused(parts: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    rows = next(iter(parts.values()))[1].shape[0]
    nothing = next(iter(parts.values()))[1].new_zeros(rows, 0)
    down = torch.cat([parts[i][0] for i in sorted(parts)])
    return down, torch.block_diag(*(parts[i][1] if i in parts else nothing for i in range(3)))

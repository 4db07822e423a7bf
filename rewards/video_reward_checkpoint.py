"""The published checkpoint of VideoReward: its prompt template, settings and weights."""

import ast
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.rewards.loading import explained, read_weights

TOKENS = {
    "visual": "<|VQ_reward|>",
    "motion": "<|MQ_reward|>",
    "text": "<|TA_reward|>",
}
STATISTICS = {"visual": "VQ", "motion": "MQ", "text": "TA"}
TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
TEMPLATE_FIELD = "{text_prompt}"
WORDS = "language_model.embed_tokens.weight"
UPDATE = ".update"
NAME = "VideoReward"


def read_template(path: str, folder: Path) -> str:
    """Return the prompt around a caption, with ``{text_prompt}`` and the three tokens.

    Raises:
        UserError: If there is none, or it lacks one of these.
    """
    names = [Path(path).expanduser()] if path else []
    names = names or [folder / f"prompt_template.{kind}" for kind in ("py", "txt")]
    file = next((name for name in names if name.is_file()), None)
    if file is None:
        raise UserError(
            f"reward {NAME}: template: found no {' or '.join(map(str, names))}; put VideoAlign's "
            "prompt_template.py (github.com/KwaiVGI/VideoAlign) there: scores depend on its wording"
        )
    with explained(NAME, f"read {file}"):
        text = file.read_text()
        if file.suffix == ".py":
            text = _constant(text, TEMPLATE_NAME)
    for part in (TEMPLATE_FIELD, *TOKENS.values()):
        if text.count(part) != 1:
            raise UserError(f"reward {NAME}: template {file} has {part} {text.count(part)} times")
    return text


def _constant(source: str, name: str) -> str:
    """Return the text assigned to ``name`` in Python source, which is not run."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return str(ast.literal_eval(node.value))
    raise ValueError(f"it does not assign {name}")


def newest_checkpoint(folder: Path) -> Path:
    """Return the ``checkpoint-*`` with the largest number, or ``folder`` if there is none."""
    steps = {p: p.name.rpartition("-")[2] for p in folder.glob("checkpoint-*") if p.is_dir()}
    numbered = {p: int(step) for p, step in steps.items() if step.isdigit()}
    return max(numbered, key=numbered.__getitem__, default=folder)


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under Qwen2VLModel's present names.

    Raises:
        UserError: If the files are missing or broken.
    """
    whole = next((folder / n for n in ("model.safetensors", "model.pth") if (folder / n).is_file()), None)  # fmt: skip # noqa: E501
    pair = [folder / name for name in ("adapter_model.safetensors", "non_lora_state_dict.pth")]
    files = pair if whole is None else [whole]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"reward {NAME}: {folder} has no weights: neither model.pth nor {', '.join(missing)}"
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= {renamed(key): value for key, value in read_weights(file, NAME).items()}
    return {key: value for key, value in weights.items() if key != "lm_head.weight"}


def renamed(key: str) -> str:
    """Return the name of a weight in Qwen2VLModel, of its name in VideoAlign's checkpoint.

    PEFT's prefix and adapter name are taken off; transformers has moved the vision and language
    models since.
    """
    key = key.removeprefix("base_model.model.").replace(".default.", ".")
    if key.startswith(("model.visual.", "model.language_model.")):
        return key.removeprefix("model.")
    return key.replace("model.", "language_model.", 1) if key.startswith("model.") else key


def merged(weights: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return weights with the low-rank updates added, or apart where there is no base weight.

    Args:
        weights: Named as PEFT names them: ``base_layer``, ``lora_A``, ``lora_B``.
        lora: VideoAlign's ``peft_lora_config``.

    Raises:
        UserError: If half an update is missing, or its scale is not known.
    """
    complete: dict[str, Tensor] = {}
    for key, value in weights.items():
        if ".lora_" not in key and ".original_module." not in key:
            name = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            complete[name] = value
    for key in (k for k in weights if ".lora_" in k):
        stem, _, kind = key.partition(".lora_")
        second = weights.get(f"{stem}.lora_B.weight")
        if kind not in ("A.weight", "B.weight") or second is None or f"{stem}.lora_A.weight" not in weights:  # fmt: skip # noqa: E501
            raise UserError(f"reward {NAME}: cannot merge {key}: expected lora_A and lora_B of it")
        if kind == "B.weight":
            continue
        if "lora_alpha" not in lora:
            raise UserError(f"reward {NAME}: model_config.json: peft_lora_config has no lora_alpha")
        rank = len(weights[key])
        scale = lora["lora_alpha"] / (sqrt(rank) if lora.get("use_rslora") else rank)
        update = scale * (second.float() @ weights[key].float())
        name = f"{stem}.weight"
        known = complete.get(name)
        if known is None:
            complete[name + UPDATE] = update
        else:
            complete[name] = (known.float() + update).to(known.dtype)
    return complete


def updated(weights: dict[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base model's weights with trained ones and low-rank updates put in."""
    for name, value in trained.items():
        target = name.removesuffix(UPDATE)
        known = weights[target]
        weights[target] = (known.float() + value).to(known.dtype) if target != name else value
    return weights


def base_weights(base: Path, num_words: int) -> dict[str, Tensor]:
    """Return the weights of the Qwen2-VL in ``base``, with so many words.

    New words are the mean of all; the checkpoint brings its own.
    """
    from transformers import Qwen2VLForConditionalGeneration

    network = Qwen2VLForConditionalGeneration.from_pretrained(
        str(base), use_safetensors=True, local_files_only=True
    )
    weights: dict[str, Tensor] = dict(network.model.state_dict())
    table = weights[WORDS]
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    more = mean.expand(max(num_words - len(table), 0), -1)
    weights[WORDS] = torch.cat([table[:num_words], more])
    return weights


def tokenizer_of(newest: Path, base: Path) -> Any:
    """Return the tokenizer of the checkpoint, or of the base model with the three tokens added."""
    from transformers import AutoTokenizer

    folder = newest / "tokenizer" if (newest / "tokenizer").is_dir() else base
    with explained(NAME, f"load the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    known = tokenizer.get_vocab()
    if new := [token for token in TOKENS.values() if token not in known]:
        tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` unless the checkpoint scores at the three special tokens."""
    model = settings.get("model_config") or {}
    if not model.get("use_special_tokens") or model.get("reward_token") != "special":
        raise UserError(
            f"reward {NAME}: model_config.json: this reward needs use_special_tokens true and "
            f"reward_token 'special', found {model.get('use_special_tokens')} and "
            f"{model.get('reward_token')!r}"
        )


def statistics_of(settings: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the statistics in a checkpoint's ``inference_config``."""
    found = settings.get("inference_config") or {}
    named = {axis: (f"{short}_mean", f"{short}_std") for axis, short in STATISTICS.items()}
    return {
        axis: (found[mean], found[std])
        for axis, (mean, std) in named.items()
        if mean in found and std in found
    }

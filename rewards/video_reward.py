"""Visual quality, motion quality and text alignment of videos, by VideoReward (VideoAlign).

Source: arXiv:2501.13918, github.com/KwaiVGI/VideoAlign, MIT (code); the license of the weights was
not confirmed. A Qwen2-VL-2B with LoRA reads the video and a prompt that ends each of three criteria
with a token of its own; a linear head turns the state there into a score. Positions are
consecutive, as in the published code, and not Qwen2-VL's three-dimensional ones.

Frames come to 336 by 588 pixels (bicubic, antialiased), all of them, the last one dropped if their
number is odd, as in Stream-R1. A cell of the saliency is a patch of 2 frames by 14 by 14 pixels;
its size is the norm of the gradient in the normalized patch.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from diffdistill.errors import UserError
from diffdistill.rewarding import Reward, as_video
from diffdistill.rewards.images import normalized
from diffdistill.rewards.loading import (
    DtypeName,
    explained,
    local,
    read_json,
    read_weights,
    resolve_dtype,
)

TOKENS = {
    "visual": "<|VQ_reward|>",
    "motion": "<|MQ_reward|>",
    "text": "<|TA_reward|>",
}
STATISTICS = {"visual": "VQ", "motion": "MQ", "text": "TA"}
VIDEO = "<|video_pad|>"
TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
TEMPLATE_FIELD = "{text_prompt}"
HEAD = "rm_head.weight"
WORDS = "language_model.embed_tokens.weight"
UPDATE = ".update"
NAME = "VideoReward"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(kw_only=True)
class VideoReward(Reward):
    """Logits of VideoReward's three criteria.

    Attributes:
        path: Folder of KwaiVGI/VideoReward: ``model_config.json``, and in the newest
            ``checkpoint-*`` the weights (``model.pth`` or ``model.safetensors``, or
            ``adapter_model.safetensors`` with ``non_lora_state_dict.pth``) and the tokenizer.
        base_path: Folder of Qwen/Qwen2-VL-2B-Instruct: its config; its tokenizer and weights
            where the checkpoint has none.
        template: File of the prompt: VideoAlign's ``prompt_template.py`` (read, never run), or a
            text with ``{text_prompt}`` and the three tokens. Empty looks for either as
            ``prompt_template.py`` or ``prompt_template.txt`` in ``path``.
        height: Height of a frame in pixels, a multiple of 28.
        width: Width of a frame in pixels, a multiple of 28.
        dtype: Type of the weights; ``auto`` is bf16 on CUDA and fp32 elsewhere.
        gradient_checkpointing: Recompute blocks in the backward pass to save memory.
        reference_layout: Arrange the saliency's cells as Stream-R1's published code does, which
            takes patches to be in rows and so shuffles them within groups; for parity only.
    """

    axes: ClassVar[tuple[str, ...]] = ("visual", "motion", "text")
    default_statistics: ClassVar[Mapping[str, tuple[float, float]]] = {
        "visual": (3.6757, 2.2476),
        "motion": (1.1646, 1.3811),
        "text": (2.8105, 2.5121),
    }

    path: str = ""
    base_path: str = ""
    template: str = ""
    height: int = 336
    width: int = 588
    dtype: DtypeName = "auto"
    gradient_checkpointing: bool = True
    reference_layout: bool = False

    def __post_init__(self) -> None:
        """Load the prompt, the tokenizer, the model and its head."""
        folder = local(self.path, NAME, "path", "a folder of KwaiVGI/VideoReward")
        base = local(self.base_path, NAME, "base_path", "a folder of Qwen/Qwen2-VL-2B-Instruct")
        settings = read_json(folder / "model_config.json", NAME)
        _check_settings(settings)
        self.complete_statistics({**self.default_statistics, **_statistics(settings)})
        self.prompt = read_template(self.template, folder)
        newest = newest_checkpoint(folder)
        self.tokenizer = _tokenizer(newest, base)
        weights = merged(read_checkpoint(newest), settings.get("peft_lora_config") or {})
        self._load(weights, base)

    def _load(self, weights: dict[str, Tensor], base: Path) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLModel

        dtype = resolve_dtype(self.dtype, self.device)
        with explained(NAME, f"read the config in {base}"):
            config = Qwen2VLConfig.from_pretrained(str(base))
        self.head = self._checked_head(weights.pop(HEAD, None), config.text_config.hidden_size)
        with explained(NAME, f"load the weights in {self.path}"):
            if any(name.endswith(UPDATE) for name in weights):
                weights = _updated(_base_weights(base, len(self.tokenizer)), weights)
            config.text_config.vocab_size = len(weights[WORDS])
            network, info = Qwen2VLModel.from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
            )
        for kind in ("missing_keys", "unexpected_keys"):
            if names := sorted(info[kind]):
                what = kind.removesuffix("_keys")
                raise self.error(
                    f"{self.path}: {len(names)} weights are {what}, such as {names[0]}"
                )
        self.network = network.requires_grad_(False).eval().to(self.device)
        vision = config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.frames = vision.temporal_patch_size
        side = self.patch * self.merge
        if self.height % side or self.width % side:
            raise self.error(
                f"height {self.height} and width {self.width} must be multiples of {side}"
            )
        if self.gradient_checkpointing:
            for block in (*network.visual.blocks, *network.language_model.layers):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def _checked_head(self, head: Tensor | None, width: int) -> Tensor:
        if head is None:
            raise self.error(
                f"{self.path}: no reward head ({HEAD}) in the checkpoint; is it a VideoReward?"
            )
        if head.ndim != 2 or head.shape[0] not in (1, len(self.axes)) or head.shape[1] != width:
            raise self.error(
                f"{self.path}: the reward head {HEAD} is {list(head.shape)}, expected [1, {width}] "
                f"or [{len(self.axes)}, {width}]"
            )
        return head.float().to(self.device)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the logits ``[B]`` of the three criteria."""
        return self.score_seen(self.seen(as_video(pixels)), prompts)

    def seen(self, pixels: Tensor) -> Tensor:
        """Return the patches ``[B, N, D]`` of videos ``[B, T, 3, H, W]`` in Qwen2-VL's order."""
        pixels = pixels.to(self.device)
        count = pixels.shape[1] // self.frames * self.frames
        if count == 0:  # an image: as Qwen2-VL does, it is shown twice
            pixels = pixels[:, -1:].expand(-1, self.frames, -1, -1, -1)
            count = self.frames
        frames = pixels[:, :count].flatten(0, 1)
        if frames.shape[-2:] != (self.height, self.width):
            sides = (self.height, self.width)
            frames = interpolate(frames, sides, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        videos = normalized(frames, CLIP_MEAN, CLIP_STD).unflatten(0, (-1, count))
        return packed(videos, self.frames, self.merge, self.patch)

    def score_seen(self, seen: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the logits ``[B]`` for patches ``[B, N, D]``."""
        grid = self._grid(seen)
        network = self.network
        patches = seen.flatten(0, 1).to(network.dtype)
        sizes = torch.tensor([grid] * len(seen), device=self.device)
        video = network.visual(patches, grid_thw=sizes).pooler_output
        tokens, mask = self._tokens(prompts, seen.shape[1] // self.merge**2)
        words = network.language_model.embed_tokens(tokens)
        places = (tokens == network.config.video_token_id).unsqueeze(-1)
        states = network.language_model(
            inputs_embeds=words.masked_scatter(places, video.to(words.dtype)),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        ids = self.tokenizer.convert_tokens_to_ids(list(TOKENS.values()))
        asked = tokens.unsqueeze(-1) == torch.tensor(ids, device=self.device)  # [B, L, 3]
        index = asked.int().argmax(dim=1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
        logits = states.gather(1, index).to(self.head.dtype) @ self.head.mT  # [B, 3, 1 or 3]
        chosen = logits[..., 0] if len(self.head) == 1 else logits.diagonal(dim1=1, dim2=2)
        return dict(zip(self.axes, chosen.unbind(dim=1), strict=True))

    def _tokens(self, prompts: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
        """Return token ids ``[B, L]`` and what is not padding."""
        rows = [torch.tensor(self._row(prompt, count)) for prompt in prompts]
        filler = self.tokenizer.pad_token_id or 0
        tokens = pad_sequence(rows, batch_first=True, padding_value=filler)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return tokens.to(self.device), mask.long().to(self.device)

    def _row(self, prompt: str, count: int) -> list[int]:
        """Return the token ids of one turn of the user, with ``count`` tokens of video."""
        text = self.prompt.replace(TEMPLATE_FIELD, prompt)
        content = [{"type": "video"}, {"type": "text", "text": text}]
        with explained(NAME, "write the prompt with the tokenizer's chat template"):
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        for token in (VIDEO, *TOKENS.values()):
            if rendered.count(token) != 1:
                raise self.error(
                    f"the prompt {prompt!r} puts {token} {rendered.count(token)} times into the "
                    "rendered text, not once; check the prompt and the tokenizer's chat template"
                )
        row: list[int] = self.tokenizer(
            rendered.replace(VIDEO, VIDEO * count), add_special_tokens=False
        )["input_ids"]
        return row

    def places(self, gradient: Tensor, videos: Tensor) -> Tensor:
        """Return the size ``[B, t, h, w]`` of the gradient in each patch."""
        sizes = gradient.norm(dim=-1)
        grid = self._grid(gradient)
        return (
            sizes.unflatten(1, grid) if self.reference_layout else unpacked(sizes, grid, self.merge)
        )

    def _grid(self, seen: Tensor) -> tuple[int, int, int]:
        rows, columns = self.height // self.patch, self.width // self.patch
        return seen.shape[1] // (rows * columns), rows, columns


def packed(videos: Tensor, frames: int, merge: int, patch: int) -> Tensor:
    """Return the patches ``[B, t h w, 3 frames patch patch]`` of videos ``[B, T, 3, H, W]``.

    Qwen2-VL's order: by time, then by groups of ``merge`` by ``merge`` patches that become one
    token, then within a group.
    """
    batch, total, channels, height, width = videos.shape
    side = merge * patch
    times = (total // frames, frames)
    rows, columns = (height // side, merge, patch), (width // side, merge, patch)
    parts = videos.reshape(batch, *times, channels, *rows, *columns)
    ordered = parts.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return ordered.flatten(6).flatten(1, 5)


def unpacked(cells: Tensor, grid: tuple[int, int, int], merge: int) -> Tensor:
    """Return cells ``[B, t, h, w]`` in rows, of cells ``[B, t h w]`` in Qwen2-VL's order."""
    time, height, width = grid
    groups = cells.unflatten(1, (time, height // merge, width // merge, merge, merge))
    return groups.transpose(3, 4).flatten(4, 5).flatten(2, 3)


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


def _updated(weights: dict[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base model's weights with trained ones and low-rank updates put in."""
    for name, value in trained.items():
        target = name.removesuffix(UPDATE)
        known = weights[target]
        weights[target] = (known.float() + value).to(known.dtype) if target != name else value
    return weights


def _base_weights(base: Path, num_words: int) -> dict[str, Tensor]:
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


def _tokenizer(newest: Path, base: Path) -> Any:
    """Return the tokenizer of the checkpoint, or of the base model with the three tokens added."""
    from transformers import AutoTokenizer

    folder = newest / "tokenizer" if (newest / "tokenizer").is_dir() else base
    with explained(NAME, f"load the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    known = tokenizer.get_vocab()
    if new := [token for token in TOKENS.values() if token not in known]:
        tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` unless the checkpoint scores at the three special tokens."""
    model = settings.get("model_config") or {}
    if not model.get("use_special_tokens") or model.get("reward_token") != "special":
        raise UserError(
            f"reward {NAME}: model_config.json: this reward needs use_special_tokens true and "
            f"reward_token 'special', found {model.get('use_special_tokens')} and "
            f"{model.get('reward_token')!r}"
        )


def _statistics(settings: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the statistics in a checkpoint's ``inference_config``."""
    found = settings.get("inference_config") or {}
    named = {axis: (f"{short}_mean", f"{short}_std") for axis, short in STATISTICS.items()}
    return {
        axis: (found[mean], found[std])
        for axis, (mean, std) in named.items()
        if mean in found and std in found
    }

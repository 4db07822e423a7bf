"""Visual quality, motion quality and text alignment of videos, by VideoReward (VideoAlign).

Source: arXiv:2501.13918, github.com/KwaiVGI/VideoAlign, MIT (code); the license of the weights was
not confirmed. A Qwen2-VL-2B with LoRA reads the video and a prompt that ends each of three criteria
with a token of its own; a linear head turns the state there into a score. Positions are
consecutive, as in the published code, and not Qwen2-VL's three-dimensional ones.

Frames come to 336 by 588 pixels (bicubic, antialiased), all of them, the last one dropped if their
number is odd, as in Stream-R1. A cell of the saliency is a patch of 2 frames by 14 by 14 pixels;
its size is the norm of the gradient in the normalized patch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from diffdistill.rewarding import Reward, as_video
from diffdistill.rewards.images import normalized
from diffdistill.rewards.loading import (
    DtypeName,
    explained,
    local,
    read_json,
    resolve_dtype,
)
from diffdistill.rewards.video_reward_checkpoint import (
    NAME,
    TEMPLATE_FIELD,
    TOKENS,
    UPDATE,
    WORDS,
    base_weights,
    check_settings,
    merged,
    newest_checkpoint,
    read_checkpoint,
    read_template,
    statistics_of,
    tokenizer_of,
    updated,
)

VIDEO = "<|video_pad|>"
HEAD = "rm_head.weight"
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
        check_settings(settings)
        self.complete_statistics({**self.default_statistics, **statistics_of(settings)})
        self.prompt = read_template(self.template, folder)
        newest = newest_checkpoint(folder)
        self.tokenizer = tokenizer_of(newest, base)
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
                weights = updated(base_weights(base, len(self.tokenizer)), weights)
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

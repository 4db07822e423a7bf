"""Z-Image: captions of any length, images and captions in one stream.

The network is told ``1 - t`` and returns ``data - noise``; both are turned around here. The
privileged view reads prompt and target image through a vision-language model whose words are
those of the text encoder (see ``qwen_vl``), so its tokens take the place of the caption's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.z_image.pipeline_z_image import (
    calculate_shift,
    get_default_z_image_sigmas,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffdistill.errors import UserError
from diffdistill.pipelines import loading, qwen_vl
from diffdistill.pipelines.latent import ImageFamily, captured, cropped, stacked
from diffdistill.types import Batch, Condition, Example, State

CAPTIONS = ("text", "negative", "privileged_text")
CAPTION_MULTIPLE = 32
ENCODERS = ("Qwen3Model", "Qwen3ForCausalLM")


@dataclass(kw_only=True)
class ZImage(ImageFamily):
    """Z-Image and Z-Image-Turbo.

    Attributes:
        view: What exposure 1 shows: ``vlm`` the prompt and the target image, through the VLM in
            ``vlm_path``; ``detailed-prompt`` the example's longer prompt instead of its own;
            ``none`` is for methods without a privileged view.
        vlm_path: Folder or hub id of a Qwen3-VL of the text encoder's size (4B).
        vlm_rope_base: Rotary base of its language model. None keeps its own, as the authors'
            scripts do; the text encoder's (1e6) makes text alone embed as the student's does.
        vlm_min_pixels: The target is scaled to have at least so many pixels for the VLM.
        vlm_max_pixels: The target is scaled to have at most so many pixels for the VLM.
        vlm_max_tokens: Image and prompt tokens are cut off after so many.
    """

    view: Literal["vlm", "detailed-prompt", "none"] = "vlm"
    vlm_path: str | None = None
    vlm_rope_base: float | None = None
    vlm_min_pixels: int = 512 * 512
    vlm_max_pixels: int = 768 * 768
    vlm_max_tokens: int = 1024

    adapter_targets: ClassVar = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    views: ClassVar = ("vlm", "detailed-prompt")
    transformer_class: ClassVar = ZImageTransformer2DModel
    pipeline_class: ClassVar = ZImagePipeline
    vae_class: ClassVar = AutoencoderKL

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return the velocity of ``network``, float32 ``[B, C, H, W]``."""
        outputs = network(**_inputs(network, state, condition), return_dict=False)[0]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)

    def features(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return what the middle layer makes of the image tokens, ``[B, N, D]``."""
        layers: Any = network.layers
        with captured(layers[len(layers) // 2]) as outputs:
            network(**_inputs(network, state, condition), return_dict=False)
        num_tokens = (state.x.shape[-2] // 2) * (state.x.shape[-1] // 2)
        hidden: Tensor = outputs[0][:, :num_tokens]
        return hidden

    @torch.no_grad()
    def encode(
        self, examples: Sequence[Example], *, privileged: bool = True
    ) -> list[dict[str, Tensor]]:
        """Return caption embeddings and latents of each example (see ``FlowFamily.encode``).

        Raises:
            UserError: If an example lacks what the view shows.
        """
        view = self.view if privileged else "none"
        for example in examples:
            self._check(example, view)
        longer = [e.detailed_prompt for e in examples] if view == "detailed-prompt" else []
        texts = self._texts(sorted({"", *(e.prompt for e in examples), *filter(None, longer)}))
        encoded = []
        for example in examples:
            entry = {"text": texts[example.prompt], "negative": texts[""]}
            if view == "detailed-prompt":
                entry["privileged_text"] = texts[example.detailed_prompt or ""]
            entry["latents"] = self.target_latents(example)
            encoded.append(entry)
        if view == "vlm":
            with self.using("vlm") as vlm:
                for entry, example in zip(encoded, examples, strict=True):
                    entry["privileged_text"] = self._see(vlm, example)
        return encoded

    def _check(self, example: Example, view: str) -> None:
        if example.references:
            raise UserError(f"{example.origin}: Z-Image takes no reference images")
        if view == "detailed-prompt" and example.detailed_prompt is None:
            raise UserError(f"{example.origin}: view detailed-prompt needs a detailed prompt")
        if view == "vlm" and example.image is None:
            raise UserError(f"{example.origin}: view vlm needs a target image")
        if view == "vlm" and self.vlm_path is None:
            raise UserError("view vlm needs vlm_path, a Qwen3-VL such as Qwen/Qwen3-VL-4B-Instruct")

    def _texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings ``[L, D]`` of each prompt, on the CPU."""
        with self.using("text_encoder") as encoder:
            parts = dict.fromkeys(("scheduler", "vae", "transformer"))
            pipeline = ZImagePipeline(text_encoder=encoder, tokenizer=self._tokenizer, **parts)
            return {
                prompt: pipeline._encode_prompt(
                    [prompt],
                    device=encoder.device,
                    max_sequence_length=self.max_sequence_length,
                )[0].cpu()
                for prompt in prompts
            }

    def _see(self, vlm: Any, example: Example) -> Tensor:
        """Return what the VLM makes of target and prompt, ``[L, D]``, on the CPU."""
        assert example.image is not None
        image = cropped(example.image, self.multiple()).float().cpu()
        pixels = (self.vlm_min_pixels, self.vlm_max_pixels)
        hidden = qwen_vl.embed(vlm, self._processor, example.prompt, image, pixels=pixels)
        return hidden[: self.vlm_max_tokens].cpu()

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return a batch on the device: captions padded, their lengths under ``..._lengths``.

        Raises:
            UserError: If the latents differ in shape.
        """
        batch: dict[str, Any] = {"latents": stacked(encoded, "latents", self.device)}
        for key in CAPTIONS:
            if key in encoded[0]:
                rows = [entry[key] for entry in encoded]
                batch[key] = pad_sequence(rows, batch_first=True).to(self.device)
                batch[f"{key}_lengths"] = [len(row) for row in rows]
        return batch

    def condition(
        self, batch: Batch, *, exposure: float = 0.0, negative: bool = False
    ) -> Condition:
        """Return caption embeddings and their lengths (see ``protocols.Family``)."""
        show = self.shows(exposure)
        if show and "privileged_text" not in batch:
            raise UserError("exposure 1: the batch was encoded without its privileged view")
        key = "negative" if negative else "privileged_text" if show else "text"
        return {"text": batch[key], "lengths": batch[f"{key}_lengths"]}

    def grid(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the noise levels of ``num_steps`` calls for latents of ``shape``, from 1 to 0.

        Raises:
            UserError: If the authors' scripts have no grid of so many steps.
        """
        if self.noise_grid == "reference":
            return _reference_grid(num_steps)
        scheduler = self.scheduler()
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        values = [scheduler.config.get(k, v) for k, v in zip(keys, SHIFT_DEFAULTS, strict=True)]
        mu = calculate_shift((shape[-2] // 2) * (shape[-1] // 2), *values)
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(num_steps), mu=mu)
        return scheduler.sigmas.clone()

    def encoding_options(self) -> tuple[str, ...]:
        """Return the names of the options that alter what ``encode`` returns."""
        names = ("vlm_rope_base", "vlm_min_pixels", "vlm_max_pixels", "vlm_max_tokens")
        return (*super().encoding_options(), *(names if self.view == "vlm" else ()))

    def _encoder_folders(self) -> list[Path]:
        return super()._encoder_folders() + ([self._vlm_folder()] if self.view == "vlm" else [])

    def _vlm_folder(self) -> Path:
        if self.vlm_path is None:
            raise UserError("view vlm needs vlm_path, a Qwen3-VL such as Qwen/Qwen3-VL-4B-Instruct")
        return loading.locate(self.vlm_path, "")

    def _load_encoder(self, name: str) -> Any:
        if name == "vlm":
            return self._load_vlm()
        self._tokenizer = loading.load_tokenizer(self.part("tokenizer"), self.trust_remote_code)
        return self._load_text_encoder(self._encoder_options())

    def _load_text_encoder(self, options: Mapping[str, Any]) -> Any:
        folder = self.part("text_encoder")
        found = loading.read_config(folder).get("architectures") or [""]
        if found[0] not in ENCODERS:
            raise UserError(f"{folder}: found {found[0]!r}, needed one of {', '.join(ENCODERS)}")
        return loading.load_frozen(getattr(transformers, found[0]), folder, options)

    def _load_vlm(self) -> Any:
        """Return the VLM, never quantized: its weights are overwritten."""
        folder = self._vlm_folder()
        options = {"dtype": self.weights_dtype}
        self._processor = qwen_vl.load_processor(folder, self.trust_remote_code)
        encoder = self._load_text_encoder(options)
        return qwen_vl.load_reweighted(folder, encoder, options, self.vlm_rope_base)

    def _empty_latents(self, height: int, width: int) -> Tensor:
        side = self.multiple()
        channels = self.vae_config()["latent_channels"]
        return torch.zeros(channels, height // side * 2, width // side * 2)

    def _to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encode(pixels).latent_dist.mode()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def _to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels


SHIFT_DEFAULTS = (256, 4096, 0.5, 1.15)


def _reference_grid(num_steps: int) -> Tensor:
    """Return the grid of the authors' scripts: shift 3 for 4 steps, 8 of shift 6's 9 for 8."""
    if num_steps == 4:
        return torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
    if num_steps == 8:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
        scheduler.set_timesteps(9)
        return torch.cat([scheduler.sigmas[:8], torch.zeros(1)])
    raise UserError(f"noise_grid: reference has grids of 4 and 8 steps, not {num_steps}")


def _inputs(network: Any, state: State, condition: Condition) -> dict[str, Any]:
    """Return the transformer's arguments; lists of one tensor per sample."""
    dtype, lengths = loading.input_dtype(network), condition["lengths"]
    _check_positions(network, max(lengths), state.x.shape)
    captions = [c[:n].to(dtype) for c, n in zip(condition["text"], lengths, strict=True)]
    return {
        "x": list(state.x.to(dtype).unsqueeze(2).unbind(0)),
        "t": (1000.0 - state.t * 1000.0) / 1000.0,
        "cap_feats": captions,
    }


def _check_positions(network: Any, length: int, shape: Sequence[int]) -> None:
    """Raise a ``UserError`` if caption or image go past the network's table of positions."""
    padded = -(-length // CAPTION_MULTIPLE) * CAPTION_MULTIPLE
    caption, rows, columns = network.config.axes_lens
    if padded + 2 > caption:
        raise UserError(
            f"a caption of {length} tokens is too long, the network has {caption} positions: "
            "lower max_sequence_length, vlm_max_pixels or vlm_max_tokens"
        )
    if shape[-2] // 2 > rows or shape[-1] // 2 > columns:
        raise UserError(f"images of {rows} by {columns} patches at most, got {tuple(shape)}")

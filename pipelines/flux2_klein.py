"""FLUX.2 klein: packed latents, one text encoder, reference images as extra tokens.

The latents here are the patchified, batch-normalized map ``[B, 4 * latent channels, h, w]``;
they become tokens only at the network. The privileged view shows the target image as a further
reference image (or a longer prompt), which the network reads without any new weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.latent import ImageFamily, captured, stacked
from diffdistill.types import Batch, Condition, Example, State

SUFFIXES = {
    "reference": "Make the main subject (facial/ip details), background, and overall composition "
    "consistent with the reference image.",
    "last-reference": "Note that the last image is the output image I expect to be. Your output "
    "must be as similar as the last reference image, based on the first reference image and the "
    "editing instructions.",
}
MAX_REFERENCE_AREA = 1024 * 1024


@dataclass(kw_only=True)
class Flux2Klein(ImageFamily):
    """FLUX.2 klein, 4B or 9B, for text to image and for editing.

    Attributes:
        view: What exposure 1 adds: ``reference`` the target as the last reference image and a
            sentence that asks for consistency with it; ``last-reference`` the same with the
            sentence for editing pairs; ``detailed-prompt`` the example's longer prompt instead
            of its own; ``none`` is for methods without a privileged view.
        suffix: The sentence that the reference views append to the prompt; None takes the one
            of the D-OPSD authors' scripts.
        text_encoder_layers: Hidden layers of the text encoder, concatenated as embeddings.
    """

    view: Literal["reference", "last-reference", "detailed-prompt", "none"] = "reference"
    suffix: str | None = None
    text_encoder_layers: list[int] = field(default_factory=lambda: [9, 18, 27])

    adapter_targets: ClassVar = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    )
    views: ClassVar = ("reference", "last-reference", "detailed-prompt")
    transformer_class: ClassVar = Flux2Transformer2DModel
    pipeline_class: ClassVar = Flux2KleinPipeline
    vae_class: ClassVar = AutoencoderKLFlux2

    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded transformer, of this family's checkpoint or of ``path``.

        Raises:
            UserError: If the checkpoint is missing, broken, or of another model.
        """
        folder = loading.transformer_folder(path or self.path, None if path else self.revision)
        if loading.read_config(folder).get("guidance_embeds", True):
            loading.check_class(folder, self.transformer_class)
            raise UserError(f"{folder}: this is FLUX.2 with embedded guidance, not FLUX.2 klein")
        return super().network(path)

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return the velocity of ``network``, float32 ``[B, C, H, W]``."""
        output = network(**_inputs(network, state, condition), return_dict=False)[0]
        num_tokens = state.x.shape[-2] * state.x.shape[-1]
        velocity: Tensor = output[:, :num_tokens].movedim(1, -1).reshape(state.x.shape)
        return velocity.float()

    def features(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return what the middle block makes of the image tokens, ``[B, N, D]``."""
        blocks = [*network.transformer_blocks, *network.single_transformer_blocks]  # type: ignore[misc]
        with captured(blocks[len(blocks) // 2]) as outputs:
            network(**_inputs(network, state, condition), return_dict=False)
        num_tokens = state.x.shape[-2] * state.x.shape[-1]
        if isinstance(outputs[0], tuple):  # a double-stream block: text, image
            return outputs[0][1][:, :num_tokens]
        num_text = condition["text"].shape[1]
        return outputs[0][:, num_text : num_text + num_tokens]

    @torch.no_grad()
    def encode(
        self, examples: Sequence[Example], *, privileged: bool = True
    ) -> list[dict[str, Tensor]]:
        """Return text embeddings and latents of each example (see ``FlowFamily.encode``).

        Raises:
            UserError: If an example lacks what the view shows.
        """
        show = privileged and self.view != "none"
        longer = [self._privileged_prompt(e) if show else None for e in examples]
        prompts = {"", *(e.prompt for e in examples), *(p for p in longer if p is not None)}
        texts = self._texts(sorted(prompts))
        encoded = []
        for example, prompt in zip(examples, longer, strict=True):
            entry = {"text": texts[example.prompt], "negative": texts[""]}
            if prompt is not None:
                entry["privileged_text"] = texts[prompt]
            entry["latents"] = self.target_latents(example)
            for index, image in enumerate(example.references):
                entry[f"reference_{index}"] = self.encode_image(_limited(image))
            encoded.append(entry)
        return encoded

    def _privileged_prompt(self, example: Example) -> str:
        if self.view == "detailed-prompt":
            if example.detailed_prompt is None:
                raise UserError(f"{example.origin}: view detailed-prompt needs a detailed prompt")
            return example.detailed_prompt
        if example.image is None:
            raise UserError(f"{example.origin}: view {self.view} needs a target image")
        suffix = SUFFIXES[self.view] if self.suffix is None else self.suffix
        return f"{example.prompt} {suffix}".strip()

    def _texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings ``[L, D]`` of each prompt, on the CPU."""
        with self.using("text_encoder") as encoder:
            return {
                prompt: Flux2KleinPipeline._get_qwen3_prompt_embeds(
                    encoder,
                    self._tokenizer,
                    prompt,
                    max_sequence_length=self.max_sequence_length,
                    hidden_states_layers=self.text_encoder_layers,
                )[0].cpu()
                for prompt in prompts
            }

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return the stacked tensors of the examples on the device.

        Raises:
            UserError: If the examples differ in shapes, or in how many references they have.
        """
        if len({frozenset(entry) for entry in encoded}) > 1:
            raise UserError(
                "examples of one batch differ in how many references they have: use batch_size: 1"
            )
        return {key: stacked(encoded, key, self.device) for key in encoded[0]}

    def condition(
        self, batch: Batch, *, exposure: float = 0.0, negative: bool = False
    ) -> Condition:
        """Return text embeddings and reference latents (see ``protocols.Family``)."""
        show = self.shows(exposure)
        if show and "privileged_text" not in batch:
            raise UserError("exposure 1: the batch was encoded without its privileged view")
        text = batch["negative" if negative else "privileged_text" if show else "text"]
        count = sum(key.startswith("reference_") for key in batch)
        references = [batch[f"reference_{index}"] for index in range(count)]
        if show and self.view != "detailed-prompt":
            references.append(batch["latents"])
        return {"text": text, "references": references}

    def grid(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the noise levels of ``num_steps`` calls for latents of ``shape``, from 1 to 0."""
        mu = compute_empirical_mu(image_seq_len=shape[-2] * shape[-1], num_steps=num_steps)
        scheduler = self.scheduler()
        plain = self.noise_grid == "reference" or scheduler.config.get("use_flow_sigmas")
        sigmas = None if plain else np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(num_steps, sigmas=sigmas, mu=mu)
        return scheduler.sigmas.clone()

    def encoding_options(self) -> tuple[str, ...]:
        """Return the names of the options that alter what ``encode`` returns."""
        return (*super().encoding_options(), "suffix", "text_encoder_layers")

    def _load_encoder(self, name: str) -> Any:
        folder = self.part(name)
        self._check_layers(loading.read_config(folder))
        self._tokenizer = loading.load_tokenizer(self.part("tokenizer"), self.trust_remote_code)
        return loading.load_frozen(Qwen3ForCausalLM, folder, self._encoder_options())

    def _check_layers(self, config: Mapping[str, Any]) -> None:
        """Raise a ``UserError`` unless the chosen layers exist and fit the transformer."""
        layers, count = self.text_encoder_layers, config["num_hidden_layers"]
        if not layers or min(layers) < 0 or max(layers) > count:
            raise UserError(f"text_encoder_layers {layers}: the text encoder has {count} layers")
        folder: Path = loading.transformer_folder(self.path, self.revision)
        needed = loading.read_config(folder)["joint_attention_dim"]
        if len(layers) * config["hidden_size"] != needed:
            raise UserError(
                f"text_encoder_layers {layers}: {len(layers)} layers of width "
                f"{config['hidden_size']} do not make the {needed} that the transformer reads"
            )

    def _empty_latents(self, height: int, width: int) -> Tensor:
        side = self.multiple()
        return torch.zeros(4 * self.vae_config()["latent_channels"], height // side, width // side)

    def _to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        latents = Flux2KleinPipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
        mean, std = _normalization(vae, latents)
        return (latents - mean) / std

    def _to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _normalization(vae, latents)
        latents = Flux2KleinPipeline._unpatchify_latents(latents * std + mean)
        pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return pixels


def _normalization(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return mean.to(like), std.to(like)


def _limited(image: Tensor) -> Tensor:
    """Return a reference image no larger than the pipeline feeds, scaled as it does."""
    if image.shape[-2] * image.shape[-1] <= MAX_REFERENCE_AREA:
        return image
    picture = Image.fromarray((image.movedim(0, -1) * 255).round().byte().cpu().numpy())
    smaller = Flux2ImageProcessor._resize_to_target_area(picture, MAX_REFERENCE_AREA)
    return torch.from_numpy(np.array(smaller)).movedim(-1, 0).float() / 255


def _inputs(network: Any, state: State, condition: Condition) -> dict[str, Any]:
    """Return the transformer's arguments: noisy tokens first, then those of the references."""
    dtype = loading.input_dtype(network)
    maps = [state.x, *condition["references"]]
    tokens = torch.cat([m.to(dtype).flatten(2).movedim(1, -1) for m in maps], dim=1)
    sizes = tuple((m.shape[-2], m.shape[-1]) for m in maps)
    text = condition["text"].to(dtype)
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "timestep": (state.t * 1000.0).to(dtype) / 1000.0,
        "img_ids": _image_ids(sizes, tokens.device),
        "txt_ids": _text_ids(text.shape[1], tokens.device),
    }


@lru_cache(maxsize=64)
def _image_ids(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the coordinates ``[N, 4]`` of the noisy tokens (T = 0) and references (10, ...)."""
    maps = [torch.empty(1, 1, *size) for size in sizes]
    ids = [Flux2KleinPipeline._prepare_latent_ids(maps[0])[0]]
    if len(maps) > 1:
        ids.append(Flux2KleinPipeline._prepare_image_ids(maps[1:])[0])
    return torch.cat(ids).to(device)


@lru_cache(maxsize=16)
def _text_ids(length: int, device: torch.device) -> Tensor:
    ids: Tensor = Flux2KleinPipeline._prepare_text_ids(torch.empty(1, length, 1))[0]
    return ids.to(device)

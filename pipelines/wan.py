"""Wan: text to video, one time for all frames or one for each.

Latents are ``[B, C, F, h, w]``: the first frame alone, then groups of ``time_stride`` frames,
in the VAE's channels normalized to unit variance. Wan2.2-TI2V-5B is the same network with a VAE
of larger strides, and was trained with a time for each token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import UMT5EncoderModel

from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.latent import LatentFamily, captured, cropped, signed, stacked
from diffdistill.pipelines.loading import DtypeName
from diffdistill.schedules import shifted
from diffdistill.types import Batch, Condition, Example, State

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，"  # noqa: RUF001
    "静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"  # noqa: RUF001
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"  # noqa: RUF001
    "背景人很多，倒着走"  # noqa: RUF001
)


@dataclass(kw_only=True)
class Wan(LatentFamily):
    """Wan2.1 text to video (1.3B, 14B) and Wan2.2-TI2V-5B, without an input image.

    Attributes:
        shift: Shift of the sampling grid, ``s t / (1 + (s - 1) t)`` of evenly spaced ``t``. At 5,
            four steps are at 1, 0.9375, 0.8333 and 0.625, as Self-Forcing's students are
            trained.
        negative_prompt: What guidance leads away from. The default is that of Wan's own
            inference code, in Chinese: garish, overexposed, static, blurred details, subtitles,
            low quality, deformed hands and faces, cluttered background, walking backwards, ...
        vae_dtype: Type of the VAE's weights. Wan's is sensitive to rounding.
        vae_tiling: Decode in overlapping tiles of 256 pixels, blended at their edges: less
            memory, and slightly other pixels.
    """

    shift: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT
    vae_dtype: DtypeName = "fp32"
    vae_tiling: bool = False

    adapter_targets: ClassVar = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    )
    views: ClassVar = ()
    transformer_class: ClassVar = WanTransformer3DModel
    pipeline_class: ClassVar = WanPipeline
    vae_class: ClassVar = AutoencoderKLWan

    def __post_init__(self) -> None:
        """Check the shift; start with nothing loaded.

        Raises:
            UserError: If the shift is not positive.
        """
        super().__post_init__()
        if self.shift <= 0:
            raise UserError(f"family.shift must be above 0, not {self.shift}")

    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded transformer, of this family's checkpoint or of ``path``.

        Raises:
            UserError: If the checkpoint is missing, broken, or of another model.
        """
        folder = loading.transformer_folder(path or self.path, None if path else self.revision)
        _check_single(folder)
        config = self._transformer_config(folder)
        if config["in_channels"] != self._channels():
            loading.check_class(folder, self.transformer_class)
            raise UserError(
                f"{folder}: this transformer reads {config['in_channels']} channels and the VAE "
                f"of {self.path} has {self._channels()}; image-to-video models are not supported"
            )
        network: Any = super().network(path)
        network.inner_dim = config["num_attention_heads"] * config["attention_head_dim"]
        return network

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return the velocity of ``network``, float32 ``[B, C, F, h, w]``.

        With ``t`` ``[B, F]`` each token is told the time of its frame.
        """
        velocity: Tensor = network(**_inputs(network, state, condition), return_dict=False)[0]
        return velocity.float()

    def features(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return what the middle block makes of the tokens ``[B, N, D]``, frame after frame."""
        blocks: Any = network.blocks
        with captured(blocks[len(blocks) // 2]) as outputs:
            network(**_inputs(network, state, condition), return_dict=False)
        hidden: Tensor = outputs[0]
        return hidden

    @torch.no_grad()
    def encode(
        self, examples: Sequence[Example], *, privileged: bool = True
    ) -> list[dict[str, Tensor]]:
        """Return text embeddings and latents of each example (see ``FlowFamily.encode``).

        Raises:
            UserError: If an example has references, or lacks a size or a number of frames.
        """
        for example in examples:
            if example.references:
                raise UserError(f"{example.origin}: Wan takes no reference images")
        texts = self._texts(sorted({self.negative_prompt, *(e.prompt for e in examples)}))
        return [
            {
                "text": texts[example.prompt],
                "negative": texts[self.negative_prompt],
                "latents": self.target_latents(example),
            }
            for example in examples
        ]

    def _texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings ``[L, D]`` of each prompt without padding, on the CPU."""
        with self.using("text_encoder") as encoder:
            parts = dict.fromkeys(("vae", "scheduler"))
            pipeline = WanPipeline(text_encoder=encoder, tokenizer=self._tokenizer, **parts)
            return {
                prompt: _unpadded(
                    pipeline._get_t5_prompt_embeds(
                        prompt,
                        max_sequence_length=self.max_sequence_length,
                        device=encoder.device,
                    )[0]
                ).cpu()
                for prompt in prompts
            }

    def target_latents(self, example: Example) -> Tensor:
        """Return the latents of the target, or zeros of its size, ``[C, F, h, w]``.

        Raises:
            UserError: If the example has neither a video nor a size and a number of frames.
        """
        try:
            if example.video is not None:
                return self.encode_video(example.video)
            if example.image is not None:
                return self.encode_video(example.image[None])
            if example.size is None or example.num_frames is None:
                raise UserError("neither a video, nor a size and a number of frames")
            return self._empty_latents(example.num_frames, *example.size)
        except UserError as error:
            raise UserError(f"{example.origin}: {error}") from None

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Return float32 latents ``[C, F, h, w]`` (the mode) on the CPU.

        Args:
            video: Pixels ``[T, 3, H, W]`` in [0, 1]; T is one more than a multiple of
                ``time_stride``.
        """
        num_frames = self.num_latent_frames(len(video))
        with self.using("vae") as vae:
            pixels = signed(cropped(video, self.multiple()).to(self.device), vae.dtype)
            vae.use_tiling = False
            mode = vae.encode(pixels.movedim(0, 1)[None]).latent_dist.mode()
            mean, std = normalization(vae)
            latents: Tensor = ((mode.float() - mean) / std)[0].cpu()
        assert latents.shape[1] == num_frames, "the VAE's strides are not those of its config"
        return latents

    @torch.no_grad()
    def decode(self, sample: Tensor) -> Tensor:
        """Return pixels ``[B, T, 3, H, W]`` in [0, 1] for latents, decoded one by one."""
        with self.using("vae") as vae:
            vae.use_tiling = self.vae_tiling
            mean, std = normalization(vae)
            rows = [
                vae.decode((x * std + mean).to(vae.dtype), return_dict=False)[0]
                for x in sample.to(self.device).float().split(1)
            ]
        pixels = torch.cat(rows).movedim(2, 1).float()
        return (pixels * 0.5 + 0.5).clamp(0.0, 1.0)

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return the stacked tensors on the device; texts are padded with zeros, as Wan's are.

        Raises:
            UserError: If the latents differ in shape.
        """
        batch: dict[str, Any] = {"latents": stacked(encoded, "latents", self.device)}
        for key in ("text", "negative"):
            rows = [pad(e[key], (0, 0, 0, self.max_sequence_length - len(e[key]))) for e in encoded]
            batch[key] = torch.stack(rows).to(self.device)
        return batch

    def condition(
        self, batch: Batch, *, exposure: float = 0.0, negative: bool = False
    ) -> Condition:
        """Return text embeddings ``[B, L, D]`` (see ``protocols.Family``).

        Raises:
            UserError: If ``exposure`` is not 0: there is no privileged view.
        """
        if exposure:
            raise UserError(f"{type(self).__name__} has no privileged view: exposure must be 0")
        return {"text": batch["negative" if negative else "text"]}

    def grid(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the noise levels of ``num_steps`` calls, from 1 to 0.

        The schedulers' ``set_timesteps(num_steps)`` gives others, for it shifts twice.
        """
        return shifted(torch.linspace(1.0, 0.0, num_steps + 1), self.shift)

    @property
    def time_stride(self) -> int:
        """Pixel frames of each latent frame but the first, which is one pixel frame."""
        return int(self.vae_config().get("scale_factor_temporal") or 4)

    @property
    def space_stride(self) -> int:
        """Pixels of a latent's side."""
        return int(self.vae_config().get("scale_factor_spatial") or 8)

    def num_latent_frames(self, num_frames: int) -> int:
        """Return the latent frames of ``num_frames`` pixel frames.

        Raises:
            UserError: If it is not one more than a multiple of ``time_stride``.
        """
        stride = self.time_stride
        if num_frames < 1 or (num_frames - 1) % stride:
            lower = max(num_frames - 1, 0) // stride * stride + 1
            raise UserError(
                f"{num_frames} frames: their number must be 1 plus a multiple of {stride}, such "
                f"as {lower} or {lower + stride}"
            )
        return 1 + (num_frames - 1) // stride

    def check_clip(self, num_frames: int) -> None:
        """Refuse clips of so many pixel frames (see ``FlowFamily.check_clip``)."""
        self.num_latent_frames(num_frames)

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """Return the pixel frames of so many latent frames."""
        return 1 + (num_latent_frames - 1) * self.time_stride

    def multiple(self) -> int:
        """Return what frames' sides must be divisible by: VAE stride times patch size."""
        folder = loading.transformer_folder(self.path, self.revision)
        return self.space_stride * int(self._transformer_config(folder)["patch_size"][1])

    def encoding_options(self) -> tuple[str, ...]:
        """Return the names of the options that alter what ``encode`` returns."""
        return (*super().encoding_options(), "negative_prompt", "vae_dtype")

    def vae_weights_dtype(self) -> torch.dtype:
        """Return the type of the VAE's weights."""
        return loading.resolve_dtype(self.vae_dtype, self.device)

    def _channels(self) -> int:
        return int(self.vae_config().get("z_dim", 16))

    def _transformer_config(self, folder: Path) -> dict[str, Any]:
        """Return a transformer's config, with the class's defaults for what it leaves out."""
        plain = {"in_channels": 16, "num_attention_heads": 40, "attention_head_dim": 128}
        return {**plain, "patch_size": [1, 2, 2], **loading.read_config(folder)}

    def _load_encoder(self, name: str) -> Any:
        folder = self.part(name)
        found = loading.read_config(folder).get("model_type")
        if found != "umt5":
            raise UserError(f"{folder}: found model type {found!r}, needed 'umt5'")
        self._tokenizer = loading.load_tokenizer(self.part("tokenizer"), self.trust_remote_code)
        return loading.load_frozen(UMT5EncoderModel, folder, self._encoder_options())

    def _empty_latents(self, num_frames: int, height: int, width: int) -> Tensor:
        """Return zeros ``[C, F, h, w]``, all of them one number in memory."""
        side, multiple = self.space_stride, self.multiple()
        rows, columns = (length // multiple * multiple // side for length in (height, width))
        if not rows or not columns:
            raise UserError(f"a video of {(height, width)} pixels is under {multiple} pixels")
        shape = (self._channels(), self.num_latent_frames(num_frames), rows, columns)
        return torch.zeros(1).expand(shape)


def _check_single(folder: Path) -> None:
    """Raise a ``UserError`` if the transformer in ``folder`` is one of two experts."""
    index = folder.parent / "model_index.json"
    parts = loading.read_config(folder.parent, index.name) if index.is_file() else {}
    if (parts.get("transformer_2") or [None])[0] is not None:
        raise UserError(
            f"{folder.parent}: this checkpoint has a transformer_2 (Wan2.2-A14B); models of two "
            "experts are not supported"
        )


def normalization(vae: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the VAE's latents, float32 ``[1, C, 1, 1, 1]``."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(v, device=vae.device).view(1, -1, 1, 1, 1) for v in values)
    return mean, std


def _unpadded(text: Tensor) -> Tensor:
    """Return the rows of ``[L, D]`` before the zeros that the pipeline pads with."""
    return text[: int(text.any(dim=1).sum())]


def _inputs(network: Any, state: State, condition: Condition) -> dict[str, Any]:
    """Return the transformer's arguments, with one time for a sample or one for each token."""
    dtype, t = loading.input_dtype(network), state.t * 1000.0
    if t.ndim == 2:
        _, rows, columns = network.config.patch_size
        tokens = (state.x.shape[-2] // rows) * (state.x.shape[-1] // columns)
        t = t.repeat_interleave(tokens, dim=1)
    return {
        "hidden_states": state.x.to(dtype),
        "timestep": t,
        "encoder_hidden_states": condition["text"].to(dtype),
    }

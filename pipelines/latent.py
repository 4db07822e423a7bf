"""What the families with a diffusers checkpoint share: options, loading and the pixel side."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.flow import FlowFamily
from diffdistill.pipelines.loading import Attention, DtypeName, Quantization, explained
from diffdistill.types import Example

NO_VIEW = "none"
ENCODING_OPTIONS = ("dtype", "quantize", "max_sequence_length", "view")


@dataclass(kw_only=True)
class LatentFamily(FlowFamily):
    """A flow family whose transformer, encoders and VAE come from a diffusers checkpoint.

    Nothing is loaded before it is used.

    Attributes:
        path: Hub id or local folder in the diffusers layout.
        device: Where everything runs.
        single_file: Take the transformer from this ``.safetensors`` file, in the original or
            ComfyUI key layout; its config still comes from ``path``.
        dtype: Type of all weights; ``auto`` is bf16 on CUDA and fp32 elsewhere.
        quantize: Storage of the frozen transformer: ``nf4`` and ``int8`` (bitsandbytes, the text
            encoders too) or ``fp8`` (the transformer alone; computed in ``dtype``).
        offload: ``encoders`` lets text encoder and VAE be on the device only while they work; a
            quantized text encoder cannot move, and stays until all examples are encoded.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let tokenizer and processor run code from the checkpoint.
        attention: Attention kernels of the transformer. ``flash`` takes no masks.
        max_sequence_length: Tokens of a prompt, padding included.
    """

    path: str
    device: torch.device
    single_file: str | None = None
    dtype: DtypeName = "auto"
    quantize: Quantization = "none"
    offload: Literal["none", "encoders"] = "none"
    revision: str | None = None
    trust_remote_code: bool = False
    attention: Attention = "auto"
    max_sequence_length: int = 512

    transformer_class: ClassVar[Any]
    pipeline_class: ClassVar[Any]
    vae_class: ClassVar[Any]

    def __post_init__(self) -> None:
        """Start with nothing loaded."""
        self.weights_dtype = loading.resolve_dtype(self.dtype, self.device)
        self._loaded: dict[str, Any] = {}
        self._vae_config: dict[str, Any] | None = None

    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded transformer, of this family's checkpoint or of ``path``."""
        folder = loading.transformer_folder(path or self.path, None if path else self.revision)
        options: dict[str, Any] = {"dtype": self.weights_dtype, "quantize": self.quantize}
        if path is None and self.single_file is not None:
            network = loading.load_single_file(
                self.transformer_class, self.single_file, folder, **options
            )
        else:
            network = loading.load_transformer(self.transformer_class, folder, **options)
        loading.set_attention(network, self.attention)
        return loading.place(network, self.device, self.weights_dtype, self.quantize)

    def part(self, name: str) -> Path:
        """Return the local folder of one part of the checkpoint."""
        return loading.locate(self.path, name, self.revision)

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """Give the frozen module ``name`` on the device, loaded at its first use."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name).requires_grad_(False).eval()
        module = self._loaded[name]
        if not self._is_fixed(name):
            module.to(self.device)
        try:
            yield module
        finally:
            if self.offload == "encoders" and not self._is_fixed(name):
                self._move_off(name)

    def release(self) -> None:
        """Take text encoder, VLM and VAE off the device until they are needed again."""
        for name in list(self._loaded):
            self._move_off(name)

    def _move_off(self, name: str) -> None:
        if self._is_fixed(name):
            del self._loaded[name]
        elif self.device.type != "cpu":
            self._loaded[name].to("cpu")

    def _is_fixed(self, name: str) -> bool:
        """Return whether bitsandbytes keeps the module on its device."""
        return name == "text_encoder" and self.quantize in ("nf4", "int8")

    def _load(self, name: str) -> Any:
        if name == "vae":
            folder = self.part("vae")
            loading.check_class(folder, self.vae_class)
            options = {"torch_dtype": self.vae_weights_dtype()}
            return loading.load_frozen(self.vae_class, folder, options)
        return self._load_encoder(name)

    def vae_weights_dtype(self) -> torch.dtype:
        """Return the type of the VAE's weights."""
        return self.weights_dtype

    @abstractmethod
    def _load_encoder(self, name: str) -> Any:
        """Return the text encoder (or another encoder of the family), on the CPU."""

    def _encoder_options(self) -> dict[str, Any]:
        """Return how transformers is to load an encoder."""
        quantization = loading.bitsandbytes_config(
            self.quantize, self.weights_dtype, "transformers"
        )
        options = {"dtype": self.weights_dtype}
        return options | ({"quantization_config": quantization} if quantization else {})

    def fingerprint(self) -> str:
        """Return a hash of encoders, tokenizer, VAE and the options that alter an encoding."""
        known = {f.name for f in fields(self)}
        options = {n: getattr(self, n) for n in self.encoding_options() if n in known}
        options["dtype"] = str(self.weights_dtype)
        parts = {p.name: loading.identity(p) for p in self._encoder_folders()}
        content = json.dumps([type(self).__name__, options, parts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encoding_options(self) -> tuple[str, ...]:
        """Return the names of the options that alter what ``encode`` returns."""
        return ENCODING_OPTIONS

    def _encoder_folders(self) -> list[Path]:
        return [self.part(name) for name in ("text_encoder", "tokenizer", "vae")]

    def vae_config(self) -> dict[str, Any]:
        """Return the config of the VAE, without loading it."""
        if self._vae_config is None:
            self._vae_config = loading.read_config(self.part("vae"))
        return self._vae_config


@dataclass(kw_only=True)
class ImageFamily(LatentFamily):
    """A latent family of images, which may have privileged views.

    Attributes:
        noise_grid: ``pipeline`` trains on the noise levels that the stock pipeline samples with;
            ``reference`` on those of the D-OPSD authors' scripts.
    """

    noise_grid: Literal["pipeline", "reference"] = "pipeline"
    view: str = NO_VIEW

    def __post_init__(self) -> None:
        """Check the view; start with nothing loaded.

        Raises:
            UserError: If there is no such view.
        """
        super().__post_init__()
        if self.view not in (*self.views, NO_VIEW):
            known = ", ".join((*self.views, NO_VIEW))
            raise UserError(f"{type(self).__name__}: no view {self.view!r}; views: {known}")
        self._scheduler: Any = None

    def scheduler(self) -> Any:
        """Return the checkpoint's scheduler."""
        if self._scheduler is None:
            folder = self.part("scheduler")
            with explained(f"load the scheduler of {self.path}"):
                self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder))
        return self._scheduler

    def multiple(self) -> int:
        """Return what image sides must be divisible by: VAE stride times patch size 2."""
        return int(2 ** len(self.vae_config()["block_out_channels"]))

    def shows(self, exposure: float) -> bool:
        """Return whether the privileged view is shown.

        Raises:
            UserError: If ``exposure`` is between 0 and 1, or the family has no view to show.
        """
        if exposure not in (0.0, 1.0):
            raise UserError(f"{type(self).__name__} has exposure 0 or 1, not {exposure}")
        if exposure and self.view == NO_VIEW:
            raise UserError(f"exposure 1 needs a view; views: {', '.join(self.views)}")
        return bool(exposure)

    @abstractmethod
    def _empty_latents(self, height: int, width: int) -> Tensor:
        """Return zeros ``[C, h, w]``, the latents of an image of that size."""

    @abstractmethod
    def _to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """Return latents ``[1, C, h, w]`` of pixels ``[1, 3, H, W]`` in [-1, 1]."""

    @abstractmethod
    def _to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Return pixels in [-1, 1] of latents ``[1, C, h, w]``."""

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Return float32 latents ``[C, h, w]`` (the mode) of an image in [0, 1], on the CPU."""
        with self.using("vae") as vae:
            pixels = cropped(image, self.multiple())[None].to(self.device)
            return self._to_latents(vae, signed(pixels, vae.dtype))[0].float().cpu()

    def target_latents(self, example: Example) -> Tensor:
        """Return the latents of the target, or zeros of its size, ``[C, h, w]``.

        Raises:
            UserError: If the example has neither image nor size.
        """
        if example.image is not None:
            return self.encode_image(example.image)
        if example.size is None:
            raise UserError(f"{example.origin}: the example has neither an image nor a size")
        return self._empty_latents(*example.size)

    @torch.no_grad()
    def decode(self, sample: Tensor) -> Tensor:
        """Return pixels ``[B, 3, H, W]`` in [0, 1] for latents, decoded one by one."""
        with self.using("vae") as vae:
            rows = [self._to_pixels(vae, x[None]) for x in sample.to(self.device)]
        return (torch.cat(rows).float() * 0.5 + 0.5).clamp(0.0, 1.0)


def cropped(image: Tensor, multiple: int) -> Tensor:
    """Return the center of ``image`` ``[3, H, W]`` with sides divisible by ``multiple``.

    Raises:
        UserError: If the image is smaller than that.
    """
    height, width = (side // multiple * multiple for side in image.shape[-2:])
    if not height or not width:
        raise UserError(f"an image of {tuple(image.shape[-2:])} pixels is under {multiple} pixels")
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def signed(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels in [0, 1] as those in [-1, 1], rounded to ``dtype`` once, at the end.

    In bf16 ``2 x - 1`` would double the rounding of x, and cancel to a few levels around gray.
    """
    return (2.0 * pixels - 1.0).to(dtype)


def stacked(encoded: Sequence[Mapping[str, Tensor]], key: str, device: torch.device) -> Tensor:
    """Return the tensors of that name as one batch on the device.

    Raises:
        UserError: If their shapes differ.
    """
    rows = [entry[key] for entry in encoded]
    if len({row.shape for row in rows}) > 1:
        shapes = ", ".join(sorted({str(tuple(row.shape)) for row in rows}))
        raise UserError(f"examples of one batch differ in {key}: {shapes}; use batch_size: 1")
    return torch.stack(rows).to(device)


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what ``module`` returns within the block."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()

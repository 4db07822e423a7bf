"""Learned measures of images, from models on the disk: nothing is ever downloaded.

All take images ``[N, 3, H, W]`` in [0, 1], on any device, and return one number for each, ``[N]``,
on the device that they were given.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, normalize

from diffdistill.errors import UserError

CPU = torch.device("cpu")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VGG_LAYERS = (3, 8, 15, 22, 29)
"""relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, the layers of LPIPS (arXiv:1801.03924)."""


def local(path: str | None, key: str, what: str) -> Path:
    """Return an existing path.

    Raises:
        UserError: If it is not given or not there.
    """
    if path is None:
        raise UserError(f"set evaluate.{key} to {what}; nothing is downloaded")
    if not Path(path).exists():
        raise UserError(f"evaluate.{key}: {path} does not exist; it should be {what}")
    return Path(path)


class ClipScore:
    """Cosine of image and prompt in the space of a CLIP model.

    Args:
        network: An OpenCLIP model.
        tokenizer: Its tokenizer.
        device: Where it is computed.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Callable[[Sequence[str]], Tensor],
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.network = network.eval().to(device)
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str, path: Path, device: torch.device) -> Self:
        """Return the score of the architecture ``name`` with the weights in the file ``path``.

        It is computed on ``device``.

        Raises:
            UserError: If OpenCLIP has no such architecture or the weights do not fit.
        """
        import open_clip

        if name not in open_clip.list_models():
            raise UserError(f"evaluate.clip_model {name!r} is no built-in OpenCLIP architecture")
        try:
            network = open_clip.create_model(name, pretrained=str(path))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"evaluate.clip_path: cannot load {path}: {error}") from error
        return cls(network, open_clip.get_tokenizer(name), device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image and its prompt."""
        visual = self.network.visual
        size, mean, std = visual.image_size, visual.image_mean, visual.image_std
        pixels = _prepared(images.to(self.device), size, mean, std)
        seen = torch.cat([self.network.encode_image(part) for part in pixels.split(32)])
        told = self.network.encode_text(self.tokenizer(list(prompts)).to(self.device))
        return cosine_similarity(seen, told, dim=-1)


class PatchDistance:
    """1 - cosine of the mean patch tokens of two images, in a vision transformer such as DINOv2.

    Args:
        network: A transformers vision model.
        device: Where it is computed.
    """

    def __init__(self, network: Any, device: torch.device = CPU) -> None:
        self.device = device
        self.network = network.eval().to(device)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Return the distance in the model of a transformers folder, computed on ``device``.

        Raises:
            UserError: If it cannot be loaded, or is no vision transformer.
        """
        from transformers import AutoModel

        try:
            network = AutoModel.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"evaluate.dino_path: cannot load {path}: {error}") from error
        config = network.config
        if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
            raise UserError(f"evaluate.dino_path: {path} is no vision transformer")
        return cls(network, device)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the distance of each image to its target."""
        return 1.0 - cosine_similarity(self._seen(images), self._seen(targets), dim=-1)

    def _seen(self, images: Tensor) -> Tensor:
        """Return the mean patch token ``[N, D]``, without class and register tokens."""
        side = self.network.config.image_size
        num_patches = (side // self.network.config.patch_size) ** 2
        pixels = _prepared(images.to(self.device), side, IMAGENET_MEAN, IMAGENET_STD)
        tokens = [self.network(pixel_values=p).last_hidden_state for p in pixels.split(32)]
        return torch.cat(tokens)[:, -num_patches:].mean(dim=1)


class FeatureDistance:
    """LPIPS-style distance of two images: squared difference of unit-length VGG16 features.

    As LPIPS (arXiv:1801.03924, eq. 1) with every learned weight equal to 1, so its numbers are
    not those of the published LPIPS.

    Args:
        features: The convolutional layers of VGG16.
        device: Where it is computed.
    """

    def __init__(self, features: nn.Module, device: torch.device = CPU) -> None:
        self.device = device
        self.features = features.eval().to(device)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Return the distance with torchvision's VGG16 weights (.pth or .safetensors).

        It is computed on ``device``.

        Raises:
            UserError: If they cannot be loaded.
        """
        from torchvision.models import vgg16

        features = vgg16(weights=None).features
        try:
            features.load_state_dict(_vgg_weights(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"evaluate.perceptual_path: cannot load {path}: {error}") from error
        return cls(features, device)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the distance of each image to its target, ``[N]``, at the images' size."""
        images, targets = images.to(self.device), targets.to(self.device)
        targets = interpolate(targets, images.shape[-2:], mode="bilinear", antialias=True)
        pairs = zip(images.split(8), targets.split(8), strict=True)
        return torch.cat([self._distance(image, target) for image, target in pairs])

    def _distance(self, images: Tensor, targets: Tensor) -> Tensor:
        both = torch.cat([images, targets])
        hidden = _normalized(both, IMAGENET_MEAN, IMAGENET_STD)
        total = images.new_zeros(len(images))
        for index, layer in enumerate(self.features.children()):
            hidden = layer(hidden)
            if index in VGG_LAYERS:
                first, second = normalize(hidden, dim=1).chunk(2)
                total += (first - second).square().sum(dim=1).mean(dim=(1, 2))
        return total


def _vgg_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of the convolutional layers in a checkpoint of VGG16."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "features."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _prepared(
    images: Tensor, size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Return images, squeezed to the size of a model and normalized."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    resized = interpolate(images, sides, mode="bicubic", antialias=True).clamp(0.0, 1.0)
    return _normalized(resized, mean, std)


def _normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift, scale = (images.new_tensor(v).view(3, 1, 1) for v in (mean, std))
    return (images - shift) / scale

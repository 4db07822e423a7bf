"""Learned measures of images, from models on the disk: nothing is ever downloaded.

All take images ``[N, 3, H, W]`` in [0, 1] and return one number for each, ``[N]``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, normalize

from diffdistill.errors import UserError

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
    """

    def __init__(self, network: Any, tokenizer: Callable[[Sequence[str]], Tensor]) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str, path: Path) -> Self:
        """Return the score of the architecture ``name`` with the weights in the file ``path``.

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
        return cls(network, open_clip.get_tokenizer(name))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image and its prompt."""
        visual = self.network.visual
        pixels = _prepared(images, visual.image_size, visual.image_mean, visual.image_std)
        seen = torch.cat([self.network.encode_image(part) for part in pixels.split(32)])
        told = self.network.encode_text(self.tokenizer(list(prompts)))
        return cosine_similarity(seen, told, dim=-1)


class PatchDistance:
    """1 - cosine of the mean patch tokens of two images, in a vision transformer such as DINOv2.

    Args:
        network: A transformers vision model.
    """

    def __init__(self, network: Any) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the distance in the model of a transformers folder.

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
        return cls(network)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the distance of each image to its target."""
        return 1.0 - cosine_similarity(self._seen(images), self._seen(targets), dim=-1)

    def _seen(self, images: Tensor) -> Tensor:
        """Return the mean patch token ``[N, D]``, without class and register tokens."""
        side = self.network.config.image_size
        num_patches = (side // self.network.config.patch_size) ** 2
        pixels = _prepared(images, side, IMAGENET_MEAN, IMAGENET_STD)
        tokens = [self.network(pixel_values=p).last_hidden_state for p in pixels.split(32)]
        return torch.cat(tokens)[:, -num_patches:].mean(dim=1)


class FeatureDistance:
    """LPIPS-style distance of two images: squared difference of unit-length VGG16 features.

    As LPIPS (arXiv:1801.03924, eq. 1) with every learned weight equal to 1, so its numbers are
    not those of the published LPIPS.

    Args:
        features: The convolutional layers of VGG16.
    """

    def __init__(self, features: nn.Module) -> None:
        self.features = features.eval()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the distance with torchvision's VGG16 weights (.pth or .safetensors).

        Raises:
            UserError: If they cannot be loaded.
        """
        from torchvision.models import vgg16

        features = vgg16(weights=None).features
        try:
            features.load_state_dict(_vgg_weights(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"evaluate.perceptual_path: cannot load {path}: {error}") from error
        return cls(features)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the distance of each image to its target, ``[N]``, at the images' size."""
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
    shift, scale = (torch.tensor(v, dtype=images.dtype).view(3, 1, 1) for v in (mean, std))
    return (images - shift) / scale

"""Decoding images, and bringing them to the sizes that a batch can be made of."""

import math
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode(content: bytes) -> Image.Image:
    """Return the RGB image of a file: upright, transparency on white, 16 bits as 8."""
    with Image.open(BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode in SIXTEEN_BIT:
        levels = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def inspect(content: bytes) -> tuple[int, int]:
    """Return ``(H, W)`` of an image file, having decoded all of it.

    Raises:
        ValueError: If the file is no image, or is damaged.
    """
    try:
        with Image.open(BytesIO(content)) as image:
            image.verify()
        width, height = decode(content).size
    except Exception as error:  # Pillow raises whatever its decoders do
        raise ValueError(str(error).replace("\n", " ") or type(error).__name__) from error
    return height, width


@dataclass(frozen=True)
class Sizes:
    """The sizes that images are brought to.

    Attributes:
        multiple: What sides are divisible by.
        allowed: The sizes ``(H, W)`` to choose from; where there are none, each image is
            cropped to its own size, rounded down.
    """

    multiple: int
    allowed: tuple[tuple[int, int], ...] = ()

    def choose(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size for an image of ``size``: the nearest in aspect ratio."""
        height, width = size
        if not self.allowed:
            return height // self.multiple * self.multiple, width // self.multiple * self.multiple
        aspect = math.log(width / height)
        return min(self.allowed, key=lambda s: (abs(math.log(s[1] / s[0]) - aspect), -s[0] * s[1]))

    def fit(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Return float32 pixels ``[3, H, W]`` in [0, 1], resized to cover ``size`` and cropped."""
        pixels = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
        if self.allowed:
            scale = upscaling((image.height, image.width), size)
            sides = zip(size, (image.height, image.width), strict=True)
            cover = [max(target, round(scale * side)) for target, side in sides]
            pixels = functional.resize(
                pixels, cover, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            )
        return functional.center_crop(pixels, list(size)).clamp(0.0, 1.0)


def upscaling(size: tuple[int, int], target: tuple[int, int]) -> float:
    """Return by how much an image of ``size`` must grow to cover ``target``."""
    return max(target[0] / size[0], target[1] / size[1])


def square(resolution: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Return the one square size for images of about ``resolution``^2 pixels."""
    side = resolution // multiple * multiple
    return ((side, side),)


def aspect_buckets(resolution: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Return sizes ``(H, W)`` with aspect ratios to 1:4 and at most ``resolution``^2 pixels."""
    first = math.ceil(resolution / 2 / multiple) * multiple
    sizes = []
    for short in range(first, resolution + 1, multiple):
        long = resolution**2 // short // multiple * multiple
        sizes += [(short, long), (long, short)]
    return tuple(dict.fromkeys(sizes))

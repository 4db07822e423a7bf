"""What the rewards of images share: which frames of a video they score, and how these are sized."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from diffdistill.rewarding import Reward, as_video
from diffdistill.rewards.loading import DtypeName, explained, resolve_dtype

Fit = Literal["crop", "pad", "squash"]

ROUNDING = 1 / 512
"""Half a level of 8-bit pixels: what resizing may overshoot [0, 1] and still has a gradient."""


@dataclass(kw_only=True)
class ImageReward(Reward):
    """A reward of single images, averaged over the frames of a video.

    Attributes:
        num_frames: How many frames to score, evenly spaced; None scores all.
        dtype: Type of the weights; ``auto`` is bf16 on CUDA and fp32 elsewhere.
    """

    num_frames: int | None = 8
    dtype: DtypeName = "auto"

    def __post_init__(self) -> None:
        """Complete the statistics, and choose the type of the weights."""
        super().__post_init__()
        self.weights_dtype = resolve_dtype(self.dtype, self.device)

    @abstractmethod
    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return one score ``[N]`` for images ``[N, 3, H, W]`` in [0, 1] and their prompts.

        The images are not yet of the weights' type (see ``fitted``).
        """

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the mean score ``[B]`` of the chosen frames."""
        return self.score_seen(self.seen(as_video(pixels)), prompts)

    def seen(self, pixels: Tensor) -> Tensor:
        """Return the chosen frames ``[B, N, 3, H, W]``."""
        return pixels[:, self._chosen(pixels.shape[1])]

    def score_seen(self, seen: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the mean score ``[B]`` of frames ``[B, N, 3, H, W]``."""
        count = seen.shape[1]
        images = widened(seen.flatten(0, 1).to(self.device))
        repeated = [prompt for prompt in prompts for _ in range(count)]
        scores = self.score_images(images, repeated)
        return {self.axes[0]: widened(scores).unflatten(0, (-1, count)).mean(dim=1)}

    def fitted(self, images: Tensor, preparation: "Preparation", fit: Fit) -> Tensor:
        """Return ``prepared`` images, rounded to the type of the weights only then."""
        return prepared(images, preparation, fit).to(self.weights_dtype)

    def places(self, gradient: Tensor, videos: Tensor) -> Tensor:
        """Return the saliency ``[B, T, H, W]``: a frame not chosen has that of the nearest."""
        chosen = torch.tensor(self._chosen(videos.shape[1]))
        distance = (torch.arange(videos.shape[1])[:, None] - chosen).abs()
        return gradient.norm(dim=2)[:, distance.argmin(dim=1)]

    def _chosen(self, total: int) -> list[int]:
        """Return the middle frames of equal parts of a video."""
        count = min(self.num_frames or total, total)
        return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def widened(values: Tensor) -> Tensor:
    """Return values in float32, or wider if they are: bf16 would round cosines to 0.001."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Preparation(NamedTuple):
    """How a network wants its images.

    Attributes:
        size: Height and width.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]


def prepared(images: Tensor, preparation: Preparation, fit: Fit) -> Tensor:
    """Return images ``[N, 3, H, W]`` in [0, 1], resized (bicubic, antialiased) and normalized.

    Args:
        images: The images.
        preparation: What the network wants.
        fit: ``crop`` scales the shorter side and takes the center, ``pad`` scales the longer
            side and adds black, ``squash`` ignores proportions.
    """
    height, width = images.shape[-2:]
    rows, columns = preparation.size
    if fit == "squash":
        sides = (rows, columns)
    else:
        choose = max if fit == "crop" else min
        scale = choose(rows / height, columns / width)
        sides = (round(height * scale), round(width * scale))
    if sides != (height, width):
        images = interpolate(images, sides, mode="bicubic", antialias=True)
        images = images.clamp(-ROUNDING, 1 + ROUNDING)
    top, left = ((want - got) // 2 for want, got in zip((rows, columns), sides, strict=True))
    bottom, right = rows - sides[0] - top, columns - sides[1] - left
    return normalized(pad(images, (left, right, top, bottom)), preparation.mean, preparation.std)


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(images - mean) / std`` for ``[..., 3, H, W]``."""
    shift, scale = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images - shift) / scale


class OpenClip(NamedTuple):
    """An OpenCLIP network with what surrounds it.

    Attributes:
        network: The network.
        tokenizer: Returns token ids ``[N, L]`` of texts.
        preparation: How it wants its images.
    """

    network: Any
    tokenizer: Callable[[list[str]], Tensor]
    preparation: Preparation


def load_open_clip(name: str, file: Path, reward: Reward, dtype: torch.dtype) -> OpenClip:
    """Return the OpenCLIP architecture ``name`` with the weights in ``file``, frozen.

    Raises:
        UserError: If OpenCLIP has no such architecture, or the weights do not fit.
    """
    import open_clip

    if name not in open_clip.list_models():
        raise reward.error(f"model {name!r} is no built-in OpenCLIP architecture")
    with explained(type(reward).__name__, f"load {file} as OpenCLIP's {name}"):
        network = open_clip.create_model(name, pretrained=str(file))
        tokenizer = open_clip.get_tokenizer(name)
    network.requires_grad_(False).eval().to(reward.device, dtype)
    visual = network.visual
    size = visual.image_size
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return OpenClip(network, tokenizer, Preparation(sides, visual.image_mean, visual.image_std))

"""Three small judges of moving digits: do they look real, move as told, show the right digit.

Source: ours; trained by ``scripts/build_video_models.py`` on scans that move over a torus.
Captions look like "a seven moving right, fast". Pixels are taken as they are, in [0, 1], at any
length and size; convolutions wrap around in space, as the motion does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from diffdistill.bundled import bundled
from diffdistill.errors import UserError
from diffdistill.rewarding import Reward

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "fast")
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def parse_caption(prompt: str) -> tuple[int, str, str]:
    """Return the digit, the direction and the speed that a caption names.

    Raises:
        UserError: If it cannot be read.
    """
    words = prompt.lower().replace(",", " ").split()
    match words:
        case ["a" | "an", digit, "moving", direction, speed] if (
            digit in DIGITS and direction in DIRECTIONS and speed in SPEEDS
        ):
            return DIGITS.index(digit), direction, speed
    raise UserError(
        f"cannot read the caption {prompt!r}: the reward digits-video needs captions such as "
        f"'a seven moving right, fast' (directions {', '.join(DIRECTIONS)}; speeds "
        f"{', '.join(SPEEDS)})"
    )


class DigitsVideoLogits(NamedTuple):
    """What the networks say of videos.

    Attributes:
        visual: Logit of being real rather than generated, ``[B]``.
        direction: Logits ``[B, 4]``, in the order of ``DIRECTIONS``.
        speed: Logits ``[B, 2]``, in the order of ``SPEEDS``.
        digit: Logits ``[B, 10]``.
    """

    visual: Tensor
    direction: Tensor
    speed: Tensor
    digit: Tensor


class TorusConvolution(nn.Module):
    """A convolution that wraps around at the edges, and a smooth activation.

    Args:
        channels_in: Channels in.
        channels_out: Channels out.
        side: Rows and columns that it looks at, an odd number.
        stride: Stride in both.
    """

    def __init__(self, channels_in: int, channels_out: int, side: int, stride: int) -> None:
        super().__init__()
        self.margin = side // 2
        self.convolution = nn.Conv2d(channels_in, channels_out, side, stride=stride)
        nn.init.kaiming_normal_(self.convolution.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``[N, C', H', W']`` of ``[N, C, H, W]``."""
        padded = functional.pad(x, [self.margin] * 4, mode="circular")
        return functional.silu(self.convolution(padded))


class WindowNetwork(nn.Module):
    """Logits of short windows of a video, averaged over all places and times.

    Args:
        num_frames: Frames of a window; a shorter video is continued by its last frame.
        num_logits: Logits.
        width: Channels of the first layer.
    """

    def __init__(self, num_frames: int, num_logits: int, width: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.layers = nn.Sequential(
            TorusConvolution(3 * num_frames, width, 5, 2),
            TorusConvolution(width, 2 * width, 3, 1),
            TorusConvolution(2 * width, 2 * width, 3, 2),
            TorusConvolution(2 * width, 4 * width, 3, 1),
        )
        self.head = nn.Linear(4 * width, num_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, N]`` of videos ``[B, T, 3, H, W]``."""
        if (missing := self.num_frames - x.shape[1]) > 0:
            x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        windows = x.unfold(1, self.num_frames, 1).movedim(-1, 2)  # [B, T', frames, 3, H, W]
        features = self.layers(windows.flatten(0, 1).flatten(1, 2))
        return self.head(features.mean(dim=(2, 3)).unflatten(0, windows.shape[:2]).mean(dim=1))


class DigitsVideoNetworks(nn.Module):
    """The three networks, apart from each other: ``visual``, ``motion`` and ``text``.

    Args:
        width: Channels of the first layer.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.visual = WindowNetwork(3, 1, width)
        self.motion = WindowNetwork(3, len(DIRECTIONS) + len(SPEEDS), width)
        self.text = WindowNetwork(1, len(DIGITS), width)

    def forward(self, pixels: Tensor) -> DigitsVideoLogits:
        """Return the raw logits for videos ``[B, T, 3, H, W]`` in [0, 1]."""
        x = 2 * pixels  # the ground stays 0
        direction, speed = self.motion(x).split([len(DIRECTIONS), len(SPEEDS)], dim=-1)
        return DigitsVideoLogits(self.visual(x)[:, 0], direction, speed, self.text(x))

    def save(self, folder: Path, statistics: Mapping[str, tuple[float, float]]) -> None:
        """Write the networks, and mean and standard deviation of each axis's raw score."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        config = {"width": self.width, "statistics": {a: list(v) for a, v in statistics.items()}}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> tuple[Self, dict[str, tuple[float, float]]]:
        """Return the networks in ``folder``, and their statistics.

        Raises:
            UserError: If they are missing, or of another kind.
        """
        try:
            config = json.loads((folder / CONFIG).read_text())
            networks = cls(config["width"])
            weights = load_file(folder / WEIGHTS)
            networks.load_state_dict({k: v.float() for k, v in weights.items()})
            return networks, {a: (m, s) for a, (m, s) in config["statistics"].items()}
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            detail = " ".join(str(error).split())[:300]
            raise UserError(
                f"reward digits-video: cannot load {folder}: {type(error).__name__}: {detail}; it "
                f"needs {CONFIG} and {WEIGHTS} as DigitsVideoNetworks.save writes them"
            ) from error


def caption_scores(logits: DigitsVideoLogits, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return the raw scores ``[B]`` of the three axes for what captions name.

    ``visual`` is the logit itself; ``motion`` the log-probability of direction and speed;
    ``text`` that of the digit.
    """
    named = [parse_caption(prompt) for prompt in prompts]
    indices = [(n, DIRECTIONS.index(d), SPEEDS.index(s)) for n, d, s in named]
    digit, direction, speed = torch.tensor(indices, device=logits.visual.device).unbind(1)
    return {
        "visual": logits.visual,
        "motion": _log_probability(logits.direction, direction)
        + _log_probability(logits.speed, speed),
        "text": _log_probability(logits.digit, digit),
    }


def _log_probability(logits: Tensor, index: Tensor) -> Tensor:
    return -functional.cross_entropy(logits, index, reduction="none")


@dataclass(kw_only=True)
class DigitsVideo(Reward):
    """Visual quality, motion and digit of moving digits.

    Attributes:
        path: Folder of the networks, or ``bundled:`` and the name of a bundled model.
    """

    axes: ClassVar[tuple[str, ...]] = ("visual", "motion", "text")

    path: str = "bundled:digits-video"

    def __post_init__(self) -> None:
        """Load the networks and the statistics beside them."""
        kind, _, name = self.path.partition(":")
        folder = bundled("models", name) if kind == "bundled" else Path(self.path).expanduser()
        networks, statistics = DigitsVideoNetworks.load(folder)
        self.networks = networks.requires_grad_(False).eval().to(self.device)
        self.complete_statistics(statistics)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the raw scores; see ``caption_scores``."""
        return caption_scores(self.networks(pixels.to(self.device)), prompts)

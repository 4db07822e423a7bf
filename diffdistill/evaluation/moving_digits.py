"""Real digits that move over a torus, and a judge of generated ones (8x8 scans, offline).

A scan drifts over a canvas of 16 by 16 pixels at a constant speed and comes back on the other side,
so a video of any length exists, and all of its windows look alike: whatever changes along a long
rollout is the model's drift.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from diffdistill.evaluation.digits import frechet_distance, real_digits
from diffdistill.rewards.digits_video import DIGITS, DIRECTIONS, SPEEDS, parse_caption

SIZE = 16
NUM_FRAMES = 17
"""Frames of a training clip: 9 latent frames of a temporal stride of 2."""
HEADINGS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""The directions in pixels to the right and down."""
PACES = {"slowly": 0.5, "fast": 1.0}
"""Pixels per frame."""
PACE_LIMITS = {"slowly": (0.2, 0.75), "fast": (0.75, 1.4)}
"""Pixels per frame that count as the speed."""
START_EVERY = 4
"""Pixels between the places where a digit may start, along each axis."""
HELD_OUT_EVERY = 4
NUM_FEATURES = 24


def caption(digit: int, direction: str, speed: str) -> str:
    """The caption of a digit that moves."""
    article = "an" if digit == 8 else "a"
    return f"{article} {DIGITS[digit]} moving {direction}, {speed}"


def captions() -> list[str]:
    """All 80 captions: digits outermost, then directions, then speeds."""
    return [
        caption(digit, direction, speed)
        for digit in range(10)
        for direction in DIRECTIONS
        for speed in SPEEDS
    ]


def held_out_captions() -> list[str]:
    """The 16 captions kept from distillation: two digits for each of the 8 motions."""
    motions = [(direction, speed) for direction in DIRECTIONS for speed in SPEEDS]
    return [
        caption((index + offset) % 10, direction, speed)
        for offset in (0, 5)
        for index, (direction, speed) in enumerate(motions)
    ]


def scans(held_out: bool) -> tuple[Tensor, Tensor]:
    """The scans for training or the held-out ones, ``[N, 8, 8]`` in [0, 1], and labels ``[N]``.

    Every fourth scan of a class is held out.
    """
    images, labels = real_digits(range(10))
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        chosen = torch.arange(len(members)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        kept[members[chosen == held_out]] = True
    return images[kept, 0], labels[kept]


def velocity(text: str) -> Tensor:
    """The pixels per frame to the right and down that a caption names, ``[2]``."""
    _, direction, speed = parse_caption(text)
    return torch.tensor(HEADINGS[direction]) * PACES[speed]


def put_on_torus(images: Tensor, offsets: Tensor) -> Tensor:
    """Frames ``[N, T, 16, 16]`` of images ``[N, 8, 8]`` moved by offsets ``[N, T, 2]`` in pixels.

    Bicubic between pixels; what leaves on one side comes back on the other.
    """
    count, num_frames = offsets.shape[:2]
    border = (SIZE - images.shape[-1]) // 2
    margin = 2  # of wrapped pixels, for the bicubic kernel
    canvas = functional.pad(images.unsqueeze(1), [border] * 4)
    canvas = functional.pad(canvas, [margin] * 4, mode="circular")
    axis = torch.arange(float(SIZE))
    columns = (axis - offsets[..., :1]).remainder(SIZE)[:, :, None, :]
    rows = (axis - offsets[..., 1:]).remainder(SIZE)[..., None]
    columns, rows = torch.broadcast_tensors(columns, rows)
    places = torch.stack([columns, rows], dim=-1).flatten(1, 2) + margin
    grid = places * (2 / (SIZE + 2 * margin - 1)) - 1
    frames = functional.grid_sample(canvas, grid, mode="bicubic", align_corners=True)
    return frames.view(count, num_frames, SIZE, SIZE).clamp(0, 1)


def film(texts: Sequence[str], num_frames: int, seed: int, held_out: bool = False) -> Tensor:
    """Real videos of captions, ``[N, T, 3, 16, 16]`` in [0, 1].

    Scan and start are random; a longer video continues a shorter one of its seed.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = scans(held_out)
    draws = torch.rand(len(texts), 3, generator=generator)
    chosen = []
    for text, place in zip(texts, draws[:, 0].tolist(), strict=True):
        members = (labels == parse_caption(text)[0]).nonzero().flatten()
        chosen.append(members[int(place * len(members))])
    starts = START_EVERY * (SIZE // START_EVERY * draws[:, None, 1:]).floor()
    moves = torch.stack([velocity(text) for text in texts]).unsqueeze(1)
    offsets = starts + moves * torch.arange(float(num_frames)).view(1, -1, 1)
    frames = put_on_torus(images[torch.stack(chosen)], offsets)
    return frames.unsqueeze(2).repeat(1, 1, 3, 1, 1)


def moving_digits(
    num: int, num_frames: int = NUM_FRAMES, seed: int = 0, held_out: bool = False
) -> tuple[Tensor, list[str]]:
    """Real videos ``[N, T, 3, 16, 16]`` in [0, 1] of shuffled captions, and these captions.

    Each caption comes once before any comes again.
    """
    known = captions()
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(num / len(known))
    order = [torch.randperm(len(known), generator=generator) for _ in range(rounds)]
    texts = [known[index] for index in torch.cat(order)[:num].tolist()]
    return film(texts, num_frames, seed, held_out), texts


def grey(videos: Tensor) -> Tensor:
    """Grey frames ``[N, T, H, W]`` in [0, 1] of videos ``[N, T, C, H, W]``."""
    return videos.detach().float().cpu().mean(dim=2).clamp(0, 1)


def centers(frames: Tensor) -> Tensor:
    """Where the ink of frames ``[N, T, H, W]`` is on the torus, ``[N, T, 2]`` in pixels: x, y.

    The phase of the lowest Fourier component along each axis, which an even background leaves as
    it is.
    """
    places = []
    for axis in (3, 2):
        profile = frames.sum(dim=5 - axis)
        spectrum = torch.fft.rfft(profile, dim=-1)[..., 1]
        places.append(-spectrum.angle() * frames.shape[axis] / (2 * math.pi))
    return torch.stack(places, dim=-1).remainder(frames.shape[-1])


def steps_of(frames: Tensor) -> Tensor:
    """How far the ink of frames ``[N, T, H, W]`` moves between frames, ``[N, T - 1, 2]``."""
    size = frames.shape[-1]
    moved = centers(frames).diff(dim=1)
    return (moved + size / 2).remainder(size) - size / 2


def centered(frames: Tensor, places: Tensor) -> Tensor:
    """Frames ``[N, T, H, W]`` rolled by whole pixels so that places ``[N, T, 2]`` are central."""
    size = frames.shape[-1]
    axis = torch.arange(size)
    start = places.round().long() - size // 2
    columns = (axis + start[..., :1]).remainder(size)[:, :, None, :].expand_as(frames)
    rows = (axis + start[..., 1:]).remainder(size)[..., None].expand_as(frames)
    return frames.gather(2, rows).gather(3, columns)


def unrest(videos: Tensor) -> float:
    """Mean absolute second temporal difference of videos ``[N, T, C, H, W]``."""
    return grey(videos).diff(n=2, dim=1).abs().mean().item()


class MovingDigitsJudge:
    """Recognizes digits and motions and measures how far generated videos are from real ones.

    The digit classifier (an SVC on centered frames averaged over time) is fitted on all scans; the
    motion is measured, not learned. Videos are ``[N, T, C, 16, 16]`` in [0, 1].
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[np.ndarray, float]] = {}

    @cached_property
    def _classifier(self) -> SVC:
        pairs = [moving_digits(2400, 9, seed=5, held_out=held_out) for held_out in (False, True)]
        portraits = np.concatenate([self._portraits(videos) for videos, _ in pairs])
        labels = [parse_caption(text)[0] for _, texts in pairs for text in texts]
        return SVC(gamma=0.1, C=10.0).fit(portraits, labels)

    @cached_property
    def _features(self) -> tuple[PCA, PCA]:
        shapes, changes = self._pairs(moving_digits(800, seed=7)[0])
        parts = [PCA(NUM_FEATURES - 1, random_state=0).fit(pixels) for pixels in (shapes, changes)]
        return parts[0], parts[1]

    @staticmethod
    def _portraits(videos: Tensor) -> np.ndarray:
        """The digits of videos, centered and averaged over time, ``[N, 144]``."""
        frames = grey(videos)
        portraits = centered(frames, centers(frames)).mean(dim=1)[:, 2:-2, 2:-2]
        pixels: np.ndarray = portraits.flatten(1).double().numpy()
        return pixels

    @staticmethod
    def _pairs(videos: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Centered frames and the changes that follow, each ``[N (T - 1), 256]``."""
        frames = grey(videos)
        places = centers(frames)[:, :-1]
        shapes = centered(frames[:, :-1], places).flatten(0, 1).flatten(1)
        changes = centered(frames.diff(dim=1), places).flatten(0, 1).flatten(1)
        return shapes.double().numpy(), changes.double().numpy()

    def features(self, videos: Tensor) -> np.ndarray:
        """What frames and their changes look like, ``[N (T - 1), 48]``.

        For each of the two, 23 principal components and the size of what they leave out, which
        sees noise and blur. Both follow the digit: shape and motion count and the place does not.
        """
        found = []
        for part, pixels in zip(self._features, self._pairs(videos), strict=True):
            components = part.transform(pixels)
            rest = np.linalg.norm(pixels - part.inverse_transform(components), axis=1)
            found += [components, rest[:, None]]
        return np.concatenate(found, axis=1)

    def digits(self, videos: Tensor) -> Tensor:
        """The digit seen in each video, ``[N]``."""
        return torch.from_numpy(self._classifier.predict(self._portraits(videos))).long()

    def accuracy(self, videos: Tensor, texts: Sequence[str]) -> dict[str, float]:
        """The share of videos ``[N, T, C, H, W]`` with the digit, direction, speed of captions.

        A direction is right if no other is closer to the mean motion, a speed if the mean motion
        along the direction is within `PACE_LIMITS`; ``motion`` is both, ``all`` all three.
        """
        named = [parse_caption(text) for text in texts]
        moves = steps_of(grey(videos)).mean(dim=1)
        along = moves @ torch.tensor(list(HEADINGS.values())).mT
        wanted = torch.tensor([DIRECTIONS.index(direction) for _, direction, _ in named])
        limits = torch.tensor([PACE_LIMITS[speed] for _, _, speed in named])
        pace = moves.norm(dim=1)
        right = {
            "digit": self.digits(videos) == torch.tensor([digit for digit, _, _ in named]),
            "direction": along.argmax(dim=1) == wanted,
            "speed": (pace > limits[:, 0]) & (pace < limits[:, 1]),
        }
        right["motion"] = right["direction"] & right["speed"]
        right["all"] = right["digit"] & right["motion"]
        return {name: hits.float().mean().item() for name, hits in right.items()}

    def _real(self, texts: Sequence[str]) -> tuple[np.ndarray, float]:
        """Features and unrest of at least 1600 real held-out videos with captions in these shares.

        They are made once for each sequence of captions.
        """
        key = tuple(texts)
        if key not in self._known:
            videos = film(key * math.ceil(1600 / len(key)), NUM_FRAMES, seed=3, held_out=True)
            self._known[key] = self.features(videos), unrest(videos)
        return self._known[key]

    def frechet(self, videos: Tensor, texts: Sequence[str]) -> float:
        """The Frechet distance of videos ``[N, T, C, H, W]`` to real ones of their captions.

        The real ones are of held-out scans. A window of a long video can be compared too, because
        real videos are stationary. Few videos are far from real ones even if they are real:
        compare equally many.
        """
        return frechet_distance(self.features(videos), self._real(texts)[0])

    def flicker(self, videos: Tensor, texts: Sequence[str]) -> float:
        """The unrest of videos ``[N, T, C, H, W]`` relative to real ones; 1 is as real."""
        return unrest(videos) / self._real(texts)[1]

    def drift(self, videos: Tensor, texts: Sequence[str], window: int = NUM_FRAMES) -> float:
        """How much the Frechet distance grows from the first to the last ``window`` frames."""
        last = self.frechet(videos[:, -window:], texts)
        return last - self.frechet(videos[:, :window], texts)

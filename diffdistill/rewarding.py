"""What the rewards share: scores of finished samples, and where a score is sensitive."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.protocols import Judgment


@dataclass(kw_only=True)
class Reward(ABC):
    """A frozen, differentiable judge of finished samples.

    A subclass names its ``axes`` and says how to ``score``; the rest has defaults. Fields with a
    default are its options. It loads its networks when it is made, so that missing weights are
    found before training.

    Attributes:
        axes: Names of the scores.
        default_statistics: Mean and standard deviation of the raw score of each axis.
        device: Where its networks live.
        statistics: Mean and standard deviation of the raw score of an axis, by its name. Axes
            without an entry use those that come with the reward; without any, 0 and 1.
    """

    axes: ClassVar[tuple[str, ...]]
    default_statistics: ClassVar[Mapping[str, tuple[float, float]]] = {}

    device: torch.device
    statistics: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Complete the statistics."""
        self.complete_statistics(self.default_statistics)

    def complete_statistics(self, known: Mapping[str, Sequence[float]]) -> None:
        """Fill in the axes that have no statistics from ``known``, then with 0 and 1.

        Raises:
            UserError: If an axis does not exist, or a standard deviation is not positive.
        """
        complete = dict.fromkeys(self.axes, (0.0, 1.0))
        for axis, values in {**known, **self.statistics}.items():
            if axis not in complete:
                raise self.error(f"statistics: no axis {axis!r}; it has {', '.join(self.axes)}")
            mean, std = (float(value) for value in values)
            if not isfinite(mean) or not isfinite(std) or std <= 0:
                raise self.error(
                    f"statistics.{axis}: mean {mean} and standard deviation {std} must be finite, "
                    "and the latter positive"
                )
            complete[axis] = (mean, std)
        self.statistics = complete

    @abstractmethod
    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the raw score ``[B]`` of each axis, differentiable with respect to pixels.

        Args:
            pixels: Videos ``[B, T, 3, H, W]`` in [0, 1].
            prompts: What each should show.
        """

    def normalized(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the z-scores ``(raw - mean) / std`` of raw scores ``[B]``."""
        return {a: (s - self.statistics[a][0]) / self.statistics[a][1] for a, s in scores.items()}

    def saliency(
        self, pixels: Tensor, prompts: Sequence[str], *, micro_batch: int = 1
    ) -> Mapping[str, Tensor]:
        """Return how sensitive the raw score of each axis is to each place, ``[B, T', H', W']``.

        The norm over channels of the gradient in ``seen``, by default one pixel a place. One
        micro-batch's graph is alive at a time.
        """
        return self.judge(pixels, prompts, micro_batch=micro_batch).saliency

    def judge(
        self,
        pixels: Tensor,
        prompts: Sequence[str],
        *,
        saliency: bool = True,
        micro_batch: int = 1,
        axes: Sequence[str] | None = None,
    ) -> Judgment:
        """Return z-scores ``[B]`` and, if wanted, the saliency of the raw scores; all detached.

        All axes share one forward pass, and one micro-batch's graph is alive at a time.

        Args:
            pixels: Videos ``[B, T, 3, H, W]`` in [0, 1], or images ``[B, 3, H, W]``.
            prompts: What each should show.
            saliency: Whether to return the saliency too.
            micro_batch: How many samples to judge at a time.
            axes: The axes whose saliency is wanted; None takes all. All are scored.

        Raises:
            UserError: If a score is not finite, or the saliency is wanted of an axis that does
                not depend on the pixels.
        """
        videos = as_video(pixels)
        if len(prompts) != len(videos):
            raise ValueError(f"{len(videos)} samples, but {len(prompts)} prompts")
        wanted = tuple(self.axes if axes is None else axes) if saliency else ()
        scores: list[dict[str, Tensor]] = []
        maps: list[dict[str, Tensor]] = []
        for start in range(0, len(videos), micro_batch):
            part = slice(start, start + micro_batch)
            raw, sensitive = self._judged(videos[part], prompts[part], wanted)
            scores.append(self.normalized(raw))
            maps.append(sensitive)
        return Judgment(_joined(scores, self.axes), _joined(maps, wanted))

    def _judged(
        self, videos: Tensor, prompts: Sequence[str], wanted: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return raw scores, and the saliency of the wanted axes, of one micro-batch; detached."""
        full = videos.detach().to(torch.promote_types(videos.dtype, torch.float32))
        with torch.no_grad():
            seen = self.seen(full)
        with torch.set_grad_enabled(bool(wanted)):
            seen = seen.detach().requires_grad_(bool(wanted))
            scores = self.checked(self.score_seen(seen, prompts), prompts)
        maps = {}
        for axis in wanted:
            gradient = self._gradient(axis, scores[axis], seen, axis != wanted[-1])
            self._require_finite(axis, gradient, prompts, "the gradient of its score")
            maps[axis] = self.places(gradient, videos)
        return {axis: score.detach() for axis, score in scores.items()}, maps

    def _gradient(self, axis: str, score: Tensor, seen: Tensor, more: bool) -> Tensor:
        found = None
        if score.requires_grad:
            (found,) = torch.autograd.grad(
                score, seen, torch.ones_like(score), retain_graph=more, allow_unused=True
            )
        if found is None:
            raise self.error(f"the axis {axis!r} is not differentiable with respect to pixels")
        return found

    def seen(self, pixels: Tensor) -> Tensor:
        """Return what the saliency is taken in, made from videos: by default the pixels."""
        return pixels

    def score_seen(self, seen: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the raw scores ``[B]`` of what ``seen`` returned."""
        return self.score(seen, prompts)

    def places(self, gradient: Tensor, videos: Tensor) -> Tensor:
        """Return the size ``[B, T', H', W']`` of a gradient in what ``seen`` made of ``videos``."""
        return gradient.norm(dim=2)

    def checked(self, scores: Mapping[str, Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores of all axes in order.

        Raises:
            UserError: If one is missing, misshapen or not finite.
        """
        for axis in self.axes:
            if axis not in scores:
                found = ", ".join(scores) or "nothing"
                raise self.error(f"score returned {found}, without the axis {axis!r}")
            if scores[axis].shape != (len(prompts),):
                shape = list(scores[axis].shape)
                raise self.error(f"score of the axis {axis!r} has shape {shape}, not [B]")
            self._require_finite(axis, scores[axis], prompts, "its score")
        return {axis: scores[axis] for axis in self.axes}

    def _require_finite(self, axis: str, values: Tensor, prompts: Sequence[str], what: str) -> None:
        bad = ~values.detach().isfinite().reshape(len(prompts), -1).all(dim=1)
        if bad.any():
            index = int(bad.nonzero()[0])
            raise self.error(
                f"axis {axis!r}: {what} is not finite for the prompt {prompts[index]!r}; check the "
                "pixels (they must be finite and in [0, 1]) and the precision of its networks"
            )

    def error(self, problem: str) -> UserError:
        """Return an error that names this reward."""
        return UserError(f"reward {type(self).__name__}: {problem}")


def as_video(pixels: Tensor) -> Tensor:
    """Return videos ``[B, T, 3, H, W]``; images ``[B, 3, H, W]`` become one frame each."""
    videos = pixels.unsqueeze(1) if pixels.ndim == 4 else pixels
    if videos.ndim != 5 or videos.shape[2] != 3:
        shape = list(pixels.shape)
        raise ValueError(f"expected videos [B, T, 3, H, W] or images [B, 3, H, W], got {shape}")
    return videos


def _joined(parts: Sequence[Mapping[str, Tensor]], axes: Sequence[str]) -> dict[str, Tensor]:
    return {axis: torch.cat([part[axis] for part in parts]) for axis in axes}

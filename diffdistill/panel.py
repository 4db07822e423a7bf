"""Rewards as a run holds them: loaded when they are needed, and several that judge as one."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.protocols import Judgment, Reward


class Deferred:
    """A reward that is loaded when it is first asked: sampling and exporting need none.

    Args:
        kind: Its class.
        options: What to make it with.
    """

    def __init__(self, kind: type[Any], options: Mapping[str, Any]) -> None:
        self.axes: tuple[str, ...] = kind.axes
        self._load = lambda: kind(**options)

    @cached_property
    def loaded(self) -> Reward:
        """Return the reward."""
        reward: Reward = self._load()
        return reward

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the raw scores ``[B]``."""
        return self.loaded.score(pixels, prompts)

    def normalized(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the z-scores of raw scores."""
        return self.loaded.normalized(scores)

    def saliency(
        self, pixels: Tensor, prompts: Sequence[str], *, micro_batch: int = 1
    ) -> Mapping[str, Tensor]:
        """Return the saliency of all axes."""
        return self.loaded.saliency(pixels, prompts, micro_batch=micro_batch)

    def judge(self, pixels: Tensor, prompts: Sequence[str], **options: Any) -> Judgment:
        """Return the judgment."""
        return self.loaded.judge(pixels, prompts, **options)


class Panel:
    """A reward whose axes are those of its members.

    Args:
        members: The rewards; each keeps its own statistics and preprocessing.

    Raises:
        UserError: If two have an axis of the same name.
    """

    def __init__(self, members: Sequence[Reward]) -> None:
        self.members = members
        self.axes = tuple(axis for member in members for axis in member.axes)
        twice = {axis for axis in self.axes if self.axes.count(axis) > 1}
        if twice:
            raise UserError(f"rewards: two of them have the axis {sorted(twice)[0]!r}")

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the raw scores ``[B]`` of all members."""
        return _merged(member.score(pixels, prompts) for member in self.members)

    def normalized(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the z-scores of raw scores, each by its member's statistics."""
        return _merged(
            member.normalized({a: scores[a] for a in member.axes if a in scores})
            for member in self.members
        )

    def saliency(
        self, pixels: Tensor, prompts: Sequence[str], *, micro_batch: int = 1
    ) -> Mapping[str, Tensor]:
        """Return the saliency of all axes, each on the cells of its member."""
        return _merged(
            member.saliency(pixels, prompts, micro_batch=micro_batch) for member in self.members
        )

    def judge(
        self,
        pixels: Tensor,
        prompts: Sequence[str],
        *,
        saliency: bool,
        micro_batch: int,
        axes: Sequence[str] | None = None,
    ) -> Judgment:
        """Return the judgments of all members."""
        judged = []
        for member in self.members:
            own = [axis for axis in member.axes if axes is None or axis in axes]
            wanted = saliency and bool(own)
            judged.append(
                member.judge(pixels, prompts, saliency=wanted, micro_batch=micro_batch, axes=own)
            )
        return Judgment(_merged(j.scores for j in judged), _merged(j.saliency for j in judged))


def _merged(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {axis: value for part in parts for axis, value in part.items()}

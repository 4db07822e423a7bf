"""Several rewards that judge as one, with the axes of all."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.protocols import Judgment, Reward


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

    def saliency(self, pixels: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the saliency of all axes, each on the cells of its member."""
        return _merged(member.saliency(pixels, prompts) for member in self.members)

    def judge(
        self, pixels: Tensor, prompts: Sequence[str], *, saliency: bool, micro_batch: int
    ) -> Judgment:
        """Return the judgments of all members."""
        judged = [
            member.judge(pixels, prompts, saliency=saliency, micro_batch=micro_batch)
            for member in self.members
        ]
        return Judgment(_merged(j.scores for j in judged), _merged(j.saliency for j in judged))


def _merged(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {axis: value for part in parts for axis, value in part.items()}

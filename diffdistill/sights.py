"""What vision encoders make of pictures, and what a method may ask of a family that has them."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.rollouts import AnswerFamily
from diffdistill.types import Condition, State


class Sight(NamedTuple):
    """What a vision encoder makes of the pictures of a batch.

    Attributes:
        features: What enters the projector.
        output: All that the encoder returned; a model's own code reads it before the projector.
    """

    features: Tensor
    output: Any

    def through(self, other: "Sight") -> "Sight":
        """Return another encoder's sight with these features in it.

        Raises:
            UserError: If they do not fit there.
        """
        ours, theirs = tuple(self.features.shape), tuple(other.features.shape)
        if ours != theirs:
            raise UserError(
                f"the student's vision encoder gives {_told(ours)}, and the teacher's projector "
                f"takes {_told(theirs)}: switching needs encoders of one grid and width; set "
                "method.switch_weight: 0, or take another teacher"
            )
        return other._replace(features=self.features.to(other.features.dtype))


def _told(shape: tuple[int, ...]) -> str:
    """Return a shape ``[..., places, channels]`` in words."""
    *_, places, channels = shape
    return f"{places} places of {channels} channels ({list(shape)})"


class SeeingFamily(AnswerFamily, Protocol):
    """A family of autoregressive models that answer questions about pictures."""

    def seeing(self, condition: Condition, sight: Sight) -> Condition:
        """Return a condition under which no encoder is asked: the projector gets ``sight``."""
        ...


class SeeingModel(Protocol):
    """An ``AnswerModel`` in three parts: encoder, projector, language model."""

    def __call__(self, state: State, condition: Condition) -> Any:
        """Return the prediction at ``state`` under ``condition``."""
        ...

    def look(self, condition: Condition) -> Sight:
        """Return what its vision encoder makes of the pictures of a condition."""
        ...

"""What roles ask of any family of models: its networks, and how one is called."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.projection import Prediction
from diffdistill.sights import Sight
from diffdistill.types import Condition, State


class ModelFamily(ABC):
    """Models of one kind, whatever they predict.

    Subclasses are dataclasses: fields without a default are given by the program (``path``,
    ``device``), fields with a default are the options a config may set.

    Attributes:
        adapter_targets: Suffixes of the modules that LoRA adapts.
    """

    device: torch.device
    adapter_targets: ClassVar[tuple[str, ...]]

    @abstractmethod
    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded network, of this family's checkpoint or of ``path``."""

    @abstractmethod
    def predict(self, network: nn.Module, state: State, condition: Condition) -> Prediction:
        """Return what ``network`` predicts at ``state``: a velocity, or logits (see ``Model``)."""

    def look(self, network: nn.Module, condition: Condition) -> Sight:
        """Return what the vision encoder of ``network`` makes of the pictures of ``condition``.

        Raises:
            UserError: If the family reads no pictures.
        """
        raise UserError(
            f"{type(self).__name__} has no vision encoder to switch: take a family such as vlm"
        )

    def features(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return features ``[B, N, D]`` of the tokens from the middle of ``network``.

        Raises:
            UserError: If the family has none.
        """
        raise UserError(f"{type(self).__name__} has no features for a role's head: leave it out")

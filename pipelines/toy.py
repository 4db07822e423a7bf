"""A family that runs in microseconds and has closed forms, for tests and for writing methods.

Latents are the pixels. The prompt is a number; the privileged view is the mean of the target
image. The network's velocity is linear in what it sees, so its optimum is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.pipelines.flow import FlowFamily
from diffdistill.types import Batch, Condition, Example, State


class ToyNetwork(nn.Module):
    """``velocity = state * x + prompt * c + privilege * p``, with learned factors.

    ``mix`` is a linear layer over channels, at first the identity, so that adapters have
    something to adapt.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels, bias=False)
        nn.init.eye_(self.mix.weight)
        self.factors = nn.Parameter(torch.tensor([0.5, -1.0, -1.0]))
        self.inner_dim = channels

    def forward(self, x: Tensor, prompt: Tensor, privilege: Tensor) -> Tensor:
        """Return the velocity ``[B, C, H, W]`` for prompts and privileges ``[B]``."""
        prompt, privilege = prompt[:, None, None, None], privilege[:, None, None, None]
        mixed = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        return self.factors[0] * mixed + self.factors[1] * prompt + self.factors[2] * privilege


@dataclass(kw_only=True)
class Toy(FlowFamily):
    """Pixels as latents, numbers as prompts.

    Attributes:
        path: Ignored; the network is always new.
        device: Where tensors live.
        shift: Shift of the sampling grid.
    """

    path: str
    device: torch.device
    shift: float = 1.0

    adapter_targets: ClassVar = ("mix",)
    views: ClassVar = ("mean",)

    def network(self, path: str | None = None) -> nn.Module:
        """Return a new network; always the same weights."""
        return ToyNetwork().to(self.device)

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return the velocity of ``network``, ``[B, C, H, W]``."""
        velocity: Tensor = network(state.x, condition["prompt"], condition["privilege"])
        return velocity

    def features(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return the velocity as tokens ``[B, H W, C]``."""
        return self.predict(network, state, condition).flatten(2).movedim(1, -1)

    def encode(
        self, examples: Sequence[Example], *, privileged: bool = True
    ) -> list[dict[str, Tensor]]:
        """Return the number of each prompt, and its image as latents."""
        return [{"prompt": torch.tensor(float(e.prompt)), "latents": _image(e)} for e in examples]

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return the stacked tensors of the examples on the device."""
        return {k: torch.stack([e[k] for e in encoded]).to(self.device) for k in encoded[0]}

    def condition(
        self, batch: Batch, *, exposure: float = 0.0, negative: bool = False
    ) -> Condition:
        """Return the prompt (0 where negative), and the share ``exposure`` of the target's mean."""
        prompt = torch.zeros_like(batch["prompt"]) if negative else batch["prompt"]
        return {"prompt": prompt, "privilege": exposure * batch["latents"].mean(dim=(1, 2, 3))}

    def grid(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return evenly spaced noise levels, shifted."""
        t = torch.linspace(1.0, 0.0, num_steps + 1)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def decode(self, sample: Tensor) -> Tensor:
        """Return the latents, clamped to [0, 1]."""
        return sample.clamp(0.0, 1.0)

    def fingerprint(self) -> str:
        """Return a constant: there are no encoders."""
        return "toy"


def _image(example: Example) -> Tensor:
    return torch.zeros(3, *(example.size or (4, 4))) if example.image is None else example.image

"""A tiny streaming Wan, a batch for it, and its models in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.pipelines.streaming import viewing
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.rewarding import Reward
from diffdistill.types import Condition, State
from tests import tiny
from tests.conftest import CPU, randn

CLIP = 6
OPTIONS: dict[str, Any] = {"block_frames": 2, "window_frames": 4, "sink_frames": 0}


def make_family(folder: Path, **options: Any) -> WanStreaming:
    """Return the streaming family of a tiny checkpoint, saved if it is not there."""
    if not folder.exists():
        tiny.save_wan(folder)
    return WanStreaming(path=str(folder), device=CPU, **{**OPTIONS, **options})


def stream_batch(size: int, *, frames: int = CLIP, first_id: int = 0) -> dict[str, Any]:
    """Return a batch of ``frames`` latent frames of 4 x 4 latents."""
    ids = torch.arange(first_id, first_id + size)
    rows = [Draws(5).normal("text", ids + offset, (3, 16)) for offset in (0, 1000)]
    return {
        "ids": ids,
        "prompts": ["a clip"] * size,
        "latents": Draws(5).normal("clip", ids, (16, frames, 4, 4)),
        "text": rows[0],
        "negative": rows[1],
    }


@dataclass(kw_only=True)
class Warmth(Reward):
    """How red the clip is, and how much it changes."""

    axes: ClassVar = ("red", "change")

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        change = (pixels[:, 1:] - pixels[:, :-1]).square()
        return {
            "red": pixels[:, :, 0].square().mean(dim=(1, 2, 3)),
            "change": 50.0 * change.mean(dim=(1, 2, 3, 4)),
        }


class Exact(nn.Module):
    """A network of the family in float64: family.predict is float32 at its boundary."""

    def __init__(self, family: WanStreaming, seed: int) -> None:
        super().__init__()
        self.network: Any = family.network().double()
        with torch.no_grad():
            for index, parameter in enumerate(self.network.parameters()):
                noise = randn(*parameter.shape, seed=1000 * seed + index, dtype=torch.float64)
                parameter.add_(0.1 * noise)
        self.network.requires_grad_(True)

    def forward(self, state: State, condition: Condition) -> Tensor:
        """Return the velocity under the condition's view."""
        assert condition.get("clean") is None
        time = 1000 * state.t.double()
        if time.ndim == 2:
            time = time.repeat_interleave(4, dim=1)  # 2 x 2 tokens of a frame of 4 x 4 latents
        with viewing(self.network, condition.get("view")):
            velocity: Tensor = self.network(state.x.double(), time, condition["text"].double())[0]
        return velocity


def stream_values(folder: Path, name: str = "self-forcing", **train: Any) -> dict[str, Any]:
    """Return the values of a config that streams two prompts; ``folder`` gets what it needs."""
    checkpoint = folder / "wan"
    if not checkpoint.exists():
        tiny.save_wan(checkpoint)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red ball\na blue box\n")
    lora = {"adapter": "lora", "rank": 2, "alpha": 4}
    return {
        "family": {
            "name": "wan-streaming",
            "path": str(checkpoint),
            "max_sequence_length": 16,
            **OPTIONS,
        },
        "method": {"name": name, "num_steps": 2, "student_every": 2},
        "roles": {"student": dict(lora), "critic": dict(lora)},
        "data": {
            "path": str(prompts),
            "size": [32, 32],
            "num_frames": 4 * (CLIP - 1) + 1,
            "multiple": 16,
            "batch_size": 1,
        },
        "train": {"steps": 4, "lr": 0.01, "save_every": 2, **train},
        "tracking": {"tensorboard": False},
    }

"""Videos of any length from a student that streams: block after block, as they are made.

A stream of one prompt and seed begins as the clip that ``sampling.generate`` makes of them, and is
what an exported ``StreamingPipeline`` streams.
"""

import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.switching import block_of
from diffdistill.protocols import Model
from diffdistill.sampling import Encoded, prompt_batch, renoises
from diffdistill.session import Session
from diffdistill.types import Condition

if TYPE_CHECKING:
    from diffdistill.pipelines.wan_streaming import WanStreaming


@dataclass
class Timing:
    """How long a stream took, the model and the decoder alone.

    Attributes:
        first: Seconds until the first frame was there.
        seconds: Seconds until the last was.
        num_frames: Frames.
    """

    first: float = 0.0
    seconds: float = 0.0
    num_frames: int = 0

    @property
    def fps(self) -> float:
        """Return the frames made per second."""
        return self.num_frames / self.seconds


def streams(session: Session, name: str) -> bool:
    """Return whether the model called ``name`` streams, and does not look at a whole clip."""
    if not hasattr(session.family, "stream"):
        return False
    from diffdistill.pipelines.wan_streaming import BIDIRECTIONAL

    return name not in BIDIRECTIONAL


def streaming_family(session: Session, name: str) -> "WanStreaming":
    """Return the family, whose model ``name`` streams.

    Raises:
        UserError: If it does not.
    """
    if not hasattr(session.family, "stream"):
        family = session.config.family["name"]
        raise UserError(f"the family {family} does not stream: that needs family wan-streaming")
    if not streams(session, name):
        raise UserError(f"the {name} looks at a whole clip and does not stream: name the student")
    return cast("WanStreaming", session.family)


def num_blocks(family: "WanStreaming", num_frames: int) -> int:
    """Return how many blocks so many pixel frames need."""
    return block_of(family, num_frames - 1) + 1


def check_length(session: Session, model: Model, num_frames: int) -> None:
    """Refuse a stream that is longer than the table of rotary positions.

    Raises:
        UserError: If it is.
    """
    family = cast("WanStreaming", session.family)
    latent = num_blocks(family, num_frames) * family.block_frames
    config = getattr(getattr(model, "network", None), "config", None)
    longest = getattr(config, "rope_max_seq_len", None)
    if family.positions == "absolute" and longest is not None and latent > longest:
        raise UserError(
            f"{num_frames} frames are {latent} latent frames, and the model has absolute positions "
            f"for {longest}: ask for fewer, or train with family.positions: relative"
        )


def stream(
    session: Session,
    model: Model,
    prompts: Encoded,
    *,
    num_steps: int,
    seed: int,
    starts: Mapping[int, int] | None = None,
) -> Iterator[Tensor]:
    """Yield the pixels ``[T, 3, H, W]`` of block after block on the CPU, without end.

    Args:
        session: Gives the family; turn dropout off (see ``sampling.inference``).
        model: A role that streams.
        prompts: The prompts it is told, one after another.
        num_steps: Model calls for each block, besides the one that caches it.
        seed: Seed of the noise.
        starts: For a block from which another prompt is told, its index; None tells the first.
    """
    family = cast("WanStreaming", session.family)
    draws, told = Draws(seed), {0: 0, **(starts or {})}
    batches = [prompt_batch(session, prompts, [(i, 0)]) for i in range(len(prompts.prompts))]
    conditions = [family.condition(batch) for batch in batches]
    channels, _, *size = family.latent_shape(batches[0])
    shape, ids = (channels, family.block_frames, *size), batches[0]["ids"]
    blocks = sorted(told)

    def condition(block: int) -> Condition:
        return conditions[told[blocks[bisect_right(blocks, block) - 1]]]

    def noise(block: int) -> Tensor:
        return draws.normal(f"stream/{block}", ids, shape)

    def renoise(block: int, step: int) -> Tensor:
        return draws.normal(f"renoise/{block}/{step}", ids, shape)

    latents = family.stream(
        model,
        condition,
        noise,
        num_steps=num_steps,
        renoise=renoise if renoises(session, model) else None,
    )
    for pixels in family.watch(latents):
        yield pixels[0].float().cpu()


def timed(blocks: Iterator[Tensor], device: torch.device, timing: Timing) -> Iterator[Tensor]:
    """Yield the same blocks, and add to ``timing`` how long each took to be made."""
    while True:
        started = now(device)
        block = next(blocks, None)
        if block is None:
            return
        timing.seconds += now(device) - started
        timing.first = timing.first or timing.seconds
        timing.num_frames += len(block)
        yield block


def now(device: torch.device) -> float:
    """Return the clock in seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

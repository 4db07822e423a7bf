"""Which block of a stream holds a pixel frame, and which prompt each block is told."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffdistill.errors import UserError

if TYPE_CHECKING:
    from diffdistill.pipelines.wan_streaming import WanStreaming


def block_of(family: "WanStreaming", frame: int) -> int:
    """Return the block of a stream that holds a pixel frame."""
    return -(-frame // family.time_stride) // family.block_frames


def switched(
    family: "WanStreaming", switches: Sequence[tuple[int, str]], prompt: str
) -> tuple[list[str], dict[int, int]]:
    """Return all prompts, and for each block that begins another one its index.

    Args:
        family: Says which block holds a frame.
        switches: Pixel frame and prompt of each switch.
        prompt: The first prompt.

    Raises:
        UserError: If one is in the first block, or two are in one block, which can only be told
            one prompt.
    """
    starts: dict[int, int] = {}
    for index, (frame, text) in enumerate(sorted(switches), start=1):
        block = block_of(family, frame)
        if block < 1:
            first = family.num_pixel_frames(family.block_frames)
            raise UserError(
                f"switch {frame}:{text}: frames 0 to {first - 1} are one block, which is told the "
                f"first prompt: switch at frame {first} or later"
            )
        if block in starts:
            raise UserError(
                f"switch {frame}:{text}: the block with that frame has a switch already; a "
                f"block is {family.block_frames * family.time_stride} frames"
            )
        starts[block] = index
    return [prompt, *(text for _, text in sorted(switches))], starts

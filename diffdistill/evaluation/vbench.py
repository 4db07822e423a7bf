"""Videos in the layout that the official VBench harness scores.

It looks for ``<prompt>-<number>.mp4`` in one folder, number 0 to 4 for each prompt of its lists,
and takes the suffix from any file there, so nothing else may be in the folder
(github.com/Vchitect/VBench, prompts/README.md).
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from diffdistill.clips import save_clip
from diffdistill.errors import UserError
from diffdistill.evaluation.video import Sampling
from diffdistill.roles import Role
from diffdistill.sampling import Encoded, at_once, clip_frames, encode_prompts, generate
from diffdistill.session import Session

NUM_VIDEOS = 5
LONGEST = 220
"""Bytes of a prompt in a file's name; those of VBench's own lists are shorter."""


class Order(NamedTuple):
    """What to make.

    Attributes:
        prompts: What the model is told, by the prompt that VBench knows.
        size: ``(H, W)`` in pixels.
        num_videos: Videos of each prompt.
        seed: Seed of the noise.
        folder: Where the videos go.
    """

    prompts: Mapping[str, str]
    size: tuple[int, int]
    num_videos: int
    seed: int
    folder: Path


def file_name(prompt: str, number: int) -> str:
    """Return the name of a video: the prompt as it is, but for what no file's name can hold."""
    safe = re.sub(r"[/\x00-\x1f\x7f]", "_", prompt)
    if safe.startswith("."):
        safe = f"_{safe[1:]}"
    encoded = safe.encode()
    if len(encoded) > LONGEST:
        mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        safe = f"{encoded[:LONGEST].decode(errors='ignore')}~{mark}"
    return f"{safe}-{number}.mp4"


def write_videos(session: Session, model: Role, how: Sampling, order: Order) -> Iterator[Path]:
    """Write the videos that are not there yet, and yield each one's path.

    A video's noise depends on the place of its prompt in the list, and on its number, alone.

    Raises:
        UserError: If two prompts need one name.
    """
    names = [file_name(name, 0) for name in order.prompts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"evaluate.prompts: two prompts would be written to {twice!r}")
    told, fps = list(order.prompts.values()), session.config.pictures.fps
    for index, name in enumerate(order.prompts):
        paths = {n: order.folder / file_name(name, n) for n in range(order.num_videos)}
        missing = [number for number, path in paths.items() if not path.exists()]
        if not missing:
            continue
        (item,) = encode_prompts(session, [told[index]], order.size).items
        pixels = generate(
            session,
            model,
            Encoded(told, [item] * len(told)),  # only this prompt's is asked for
            num_steps=how.num_steps,
            seed=order.seed,
            size=order.size,
            micro_batch=at_once(order.size, clip_frames(session)),
            guidance=how.guidance,
            chosen=[(index, number) for number in missing],
        )
        for number, clip in zip(missing, pixels, strict=True):
            save_clip(clip, paths[number], fps)
            yield paths[number]

"""Video files: written frame by frame as frames come, and shown as a still.

GIFs are for small canvases, exact in space and timed to hundredths of a second; anything else is
an MP4 that every browser plays (H.264, yuv420p).
"""

import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import imageio.v2 as imageio
import numpy as np
from PIL import Image
from torch import Tensor

from diffdistill.errors import UserError

SUFFIXES = (".gif", ".mp4")
SMALL = 64
"""Sides up to which a video is a GIF where nobody says otherwise."""
QUALITY = 17
"""The constant rate factor of H.264: hardly to be told from the pixels."""


def clip_suffix(size: tuple[int, int]) -> str:
    """Return the suffix for videos of ``size`` ``(H, W)`` in pixels."""
    return ".gif" if max(size) <= SMALL else ".mp4"


def is_clip(path: Path) -> bool:
    """Return whether ``path`` is named like a video."""
    return path.suffix.lower() in SUFFIXES


def to_image(pixels: Tensor) -> Image.Image:
    """Return a PIL image of pixels ``[3, H, W]`` in [0, 1]."""
    values = pixels.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.movedim(0, -1).cpu().numpy())


def save_clip(pixels: Tensor, path: Path, fps: float) -> None:
    """Write one video ``[T, 3, H, W]`` in [0, 1] at its own size, atomically."""
    write_clip((to_image(frame) for frame in pixels), path, fps)


def write_clip(frames: Iterable[Image.Image], path: Path, fps: float) -> None:
    """Write a video of ``frames``, atomically."""
    with ClipWriter(path, fps) as writer:
        for frame in frames:
            writer.add(frame)


def still(path: Path) -> Image.Image:
    """Return the first frame of a picture or video."""
    if path.suffix.lower() != ".mp4":
        with Image.open(path) as image:
            return image.convert("RGB")
    reader: Any = imageio.get_reader(path, format="FFMPEG")
    with reader:
        return Image.fromarray(reader.get_data(0))


class Encoder(Protocol):
    """Turns frames into a file."""

    def add(self, frame: Image.Image) -> None:
        """Take the next frame."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


class ClipWriter:
    """Writes a video aside as its frames come, and puts it in place when the block ends.

    If the block is left by an error, nothing is put in place.

    Args:
        path: The file, .mp4 or .gif; its folder is made.
        fps: Frames per second.

    Raises:
        UserError: If the suffix is another, or the file cannot be written.
    """

    def __init__(self, path: Path, fps: float) -> None:
        if not is_clip(path):
            raise UserError(f"{path}: a video is a {' or '.join(SUFFIXES)} file: change the suffix")
        if fps <= 0:
            raise UserError(f"{path}: frames per second must be positive, not {fps:g}")
        self.path = path
        self.aside = path.with_name(f".{path.stem}.writing{path.suffix}")
        self.num_frames = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.aside.touch()
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from error
        kind = Gif if path.suffix.lower() == ".gif" else H264
        self.encoder: Encoder = kind(self.aside, fps)

    def __enter__(self) -> Self:
        return self

    def add(self, frame: Image.Image) -> None:
        """Append a frame; all must be of one size."""
        self.encoder.add(frame)
        self.num_frames += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.encoder.close()
            if error is None and self.num_frames:
                _sync(self.aside)
                os.replace(self.aside, self.path)
        finally:
            self.aside.unlink(missing_ok=True)


class H264:
    """Encodes frames with ffmpeg, as they come; odd sides are made even by repeating the last."""

    def __init__(self, path: Path, fps: float) -> None:
        options = ["-crf", str(QUALITY), "-movflags", "+faststart"]
        self.writer: Any = imageio.get_writer(
            path,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=None,
            macro_block_size=2,
            output_params=options,
        )

    def add(self, frame: Image.Image) -> None:
        """Encode the next frame."""
        rows, columns = frame.height % 2, frame.width % 2
        even = np.pad(np.asarray(frame.convert("RGB")), ((0, rows), (0, columns), (0, 0)), "edge")
        self.writer.append_data(even)

    def close(self) -> None:
        """Finish the file."""
        self.writer.close()


class Gif:
    """Collects frames, each with its own 256 colors, and writes them at the end, looping."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self.frames: list[Image.Image] = []

    def add(self, frame: Image.Image) -> None:
        """Keep the next frame."""
        self.frames.append(frame.convert("RGB").quantize(256, dither=Image.Dither.NONE))

    def close(self) -> None:
        """Write the file."""
        if self.frames:
            first, *others = self.frames
            first.save(
                self.path,
                format="GIF",
                save_all=True,
                append_images=others,
                duration=[*_durations(len(self.frames), self.fps)],
                loop=0,
            )


def _durations(count: int, fps: float) -> Iterator[int]:
    """Yield milliseconds for each frame, in hundredths of a second that keep the mean speed."""
    ends = [round(100 * number / fps) for number in range(count + 1)]
    for start, end in pairwise(ends):
        yield 10 * max(end - start, 1)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

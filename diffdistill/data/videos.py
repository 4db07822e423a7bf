"""Reading clips of videos: files that ffmpeg reads, animated GIFs, and folders of frames."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import imageio.v2 as imageio
from PIL import Image, ImageSequence

from diffdistill.data.images import decode

SUFFIXES = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
FRAME_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

Place = Literal["start", "center"]


class TooShort(ValueError):  # noqa: N818 - a property of the file, like the errors beside it
    """A video has fewer frames than a clip needs."""


class VideoFile(NamedTuple):
    """A video in a file, or in a folder with one image for each frame.

    Attributes:
        path: The file or folder.
        fps: Frames per second of a folder, which does not know.
    """

    path: Path
    fps: float | None = None

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def digest(self) -> str:
        """Return a hash of the bytes of the file, or of all frames, and of the speed."""
        files = frame_files(self.path) if self.path.is_dir() else [self.path]
        hashes = [str(self.fps)]
        for file in files:
            with file.open("rb") as opened:
                hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


class Stored(NamedTuple):
    """A video as it is kept.

    Attributes:
        fps: Its frames per second, None where it is not known.
        total: Returns the number of its frames.
        frames: The frames, RGB, decoded as they are asked for.
    """

    fps: float | None
    total: Callable[[], int]
    frames: Iterator[Image.Image]


@dataclass(frozen=True)
class Clip:
    """Which frames of a video are taken.

    Attributes:
        num_frames: How many.
        fps: At how many per second; the nearest stored frames are taken. None takes each.
        place: From the start of the video, or from its middle.
    """

    num_frames: int
    fps: float | None = None
    place: Place = "start"

    def indices(self, video: Stored) -> list[int]:
        """Return the numbers of the stored frames, ascending."""
        speed = 1.0
        if self.fps is not None:
            if video.fps is None:
                raise ValueError("its frames per second are not known, and data.fps is set")
            speed = video.fps / self.fps
        steps = [int(number * speed + 0.5) for number in range(self.num_frames)]
        if self.place == "start":
            return steps
        total = video.total()
        if total <= steps[-1]:
            raise self.too_short(total, steps[-1] + 1)
        first = (total - steps[-1] - 1) // 2
        return [first + step for step in steps]

    def too_short(self, found: int, needed: int) -> TooShort:
        """Return the error for a video of ``found`` frames."""
        return TooShort(f"{found} frames, and {self.num_frames} frames of a clip need {needed}")


def read_clip(video: VideoFile, clip: Clip) -> Iterator[Image.Image]:
    """Yield the frames of a clip, RGB and of one size, decoded as they are asked for.

    Raises:
        TooShort: If the video has too few frames.
        ValueError: If it is no video, or is damaged.
    """
    try:
        with _opened(video) as stored:
            yield from _taken(stored.frames, clip.indices(stored), clip)
    except TooShort:
        raise
    except Exception as error:  # ffmpeg and Pillow raise whatever their decoders do
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(lines[-1][:300]) from error


def inspect_clip(video: VideoFile, clip: Clip) -> tuple[int, int]:
    """Return ``(H, W)`` of a clip, having decoded all of it (raises what ``read_clip`` does)."""
    (width, height), *_ = [frame.size for frame in read_clip(video, clip)]
    return height, width


def _taken(frames: Iterator[Image.Image], indices: list[int], clip: Clip) -> Iterator[Image.Image]:
    """Yield the frames of those numbers; one that is named twice comes twice."""
    times, seen, size = Counter(indices), 0, None
    for number, frame in enumerate(frames):
        seen = number + 1
        if number not in times:
            continue
        size = size or frame.size
        if frame.size != size:
            raise ValueError(f"its frames differ in size: {size[::-1]} and {frame.size[::-1]}")
        yield from repeat(frame, times[number])
        if number == indices[-1]:
            return
    raise clip.too_short(seen, indices[-1] + 1)


def _opened(video: VideoFile) -> AbstractContextManager[Stored]:
    if video.path.is_dir():
        return _folder(video)
    return _gif(video.path) if video.path.suffix.lower() == ".gif" else _file(video.path)


@contextmanager
def _folder(video: VideoFile) -> Iterator[Stored]:
    files = frame_files(video.path)
    yield Stored(video.fps, lambda: len(files), (decode(file.read_bytes()) for file in files))


@contextmanager
def _gif(path: Path) -> Iterator[Stored]:
    """Yield a GIF; a frame that lasts as long as two is two (writers merge equal frames)."""
    with Image.open(BytesIO(path.read_bytes())) as image:
        durations = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(image)]
        shortest = min((d for d in durations if d > 0), default=0)
        repeats = [max(1, round(d / shortest)) if shortest else 1 for d in durations]
        fps = 1000.0 * sum(repeats) / sum(durations) if shortest else None
        frames = (
            _on_white(frame.convert("RGBA"))
            for frame, count in zip(ImageSequence.Iterator(image), repeats, strict=True)
            for _ in range(count)
        )
        yield Stored(fps, lambda: sum(repeats), frames)


def _on_white(frame: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB")


@contextmanager
def _file(path: Path) -> Iterator[Stored]:
    reader: Any = imageio.get_reader(path, format="FFMPEG")
    with reader:
        fps = reader.get_meta_data().get("fps") or None
        yield Stored(fps, reader.count_frames, (Image.fromarray(frame) for frame in reader))


def frame_files(folder: Path) -> list[Path]:
    """Return the images of a folder, in the order of their names."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in FRAME_SUFFIXES)

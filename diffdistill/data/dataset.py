"""A data set whose every example has been checked."""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.bundled import bundled
from diffdistill.data.folder import read_path
from diffdistill.data.hub import read_source
from diffdistill.data.images import Sizes, aspect_buckets, decode, inspect, square, upscaling
from diffdistill.data.problems import Problem, settle
from diffdistill.data.records import Bad, Picture, Record
from diffdistill.data.settings import DataSettings
from diffdistill.data.videos import Clip, TooShort, VideoFile, inspect_clip, read_clip
from diffdistill.errors import UserError
from diffdistill.types import Example

log = logging.getLogger(__name__)

Size = tuple[int, int]


class Item(NamedTuple):
    """A record whose images and video can be decoded, and the sizes they are brought to."""

    record: Record
    size: Size
    reference_sizes: tuple[Size, ...] = ()
    upscaling: float = 1.0


class ExampleDataset:
    """Examples, decoded when asked for.

    Attributes:
        settings: How it was read.
        buckets: ``(H, W)`` of each example's image or video, or of what to generate.
        groups: What must be equal for examples to share a batch: the bucket, and the sizes of
            the references.
        prompts: The caption of each example.
        problems: The bad examples that were skipped.
    """

    def __init__(
        self, items: list[Item], sizes: Sizes, settings: DataSettings, problems: list[Problem]
    ) -> None:
        """Create a data set of checked items (see ``open_dataset``)."""
        self.settings = settings
        self.problems = problems
        self.buckets = [item.size for item in items]
        self.groups = [(item.size, item.reference_sizes) for item in items]
        self.prompts = [item.record.prompt for item in items]
        self._items = items
        self._sizes = sizes
        self._keys: dict[int, str] = {}

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._items)

    def __getitem__(self, index: int) -> Example:
        """Return the example with its images and video decoded and brought to size."""
        record, size, reference_sizes, _ = self._items[index]
        fit = self._sizes.fit
        return Example(
            prompt=record.prompt,
            image=fit(decode(record.image.read()), size) if record.image else None,
            references=tuple(
                fit(decode(picture.read()), reference_size)
                for picture, reference_size in zip(record.references, reference_sizes, strict=True)
            ),
            detailed_prompt=record.detailed_prompt,
            size=None if record.image or record.video else size,
            origin=record.origin,
            video=self._clip(record.video, size) if record.video else None,
            num_frames=None if record.image or record.video else self.settings.num_frames,
        )

    def _clip(self, video: VideoFile, size: Size) -> Tensor:
        """Return the pixels ``[T, 3, H, W]`` of a video's clip."""
        frames = read_clip(video, clip_of(self.settings))
        return torch.stack([self._sizes.fit(frame, size) for frame in frames])

    def has_videos(self) -> bool:
        """Return whether examples have videos, which are large."""
        return any(item.record.video for item in self._items)

    def first_without_image(self) -> str | None:
        """Return where the first example without image or video came from; None if all have one."""
        missing = (r.origin for r, *_ in self._items if r.image is None and r.video is None)
        return next(missing, None)

    def key(self, index: int) -> str:
        """Return a hash of everything ``self[index]`` depends on, without decoding images."""
        if index not in self._keys:
            item = self._items[index]
            files = [hashlib.sha256(p.read()).hexdigest() for p in item.record.pictures()]
            texts = [item.record.prompt, item.record.detailed_prompt]
            sizes = [item.size, item.reference_sizes, bool(self._sizes.allowed)]
            content = [texts, bool(item.record.image), files, sizes]
            if self.settings.num_frames:
                video = item.record.video
                clip = astuple(clip_of(self.settings))
                content += [video.digest() if video else None, clip]
            self._keys[index] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return self._keys[index]


def clip_of(settings: DataSettings) -> Clip:
    """Return which frames of a video the settings take."""
    assert settings.num_frames
    return Clip(settings.num_frames, settings.fps, settings.clip)


def open_dataset(settings: DataSettings, root: Path | None = None) -> ExampleDataset:
    """Read a data set and check every example of it.

    Args:
        settings: What to read.
        root: The folder that relative paths start from; None is the current one.

    Raises:
        UserError: If nothing can be read, or an example is bad and not to be skipped.
    """
    _check(settings)
    root, problems = root or Path(), list[Problem]()
    if settings.path is None:
        records = read_source(settings, root, problems)
    else:
        records = read_path(resolve(settings.path, root), settings, problems)
    sizes = _sizes(settings)
    first, count = settings.skip_examples, settings.max_examples
    last = None if count is None else first + count
    items = _verified(records[first:last], sizes, settings, problems)
    settle(problems, settings.on_error)
    if not items:
        raise UserError(f"there is no usable example in {settings.path or settings.source}")
    _warn_of_upscaling(items)
    return ExampleDataset(items, sizes, settings, problems)


def _check(settings: DataSettings) -> None:
    if (settings.path is None) == (settings.source is None):
        raise UserError("set one of data.path and data.source")
    if settings.resolution is None and settings.size is None and not settings.buckets:
        raise UserError("data.buckets=false needs a data.resolution")
    for name in ("batch_size", "multiple", "repeats", "max_examples", "num_frames"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"data.{name} must be at least 1, not {value}")
    check_skipped(settings)
    if settings.fps is not None and settings.fps <= 0:
        raise UserError(f"data.fps must be positive, not {settings.fps}")
    if settings.num_frames is None and settings.fps is not None:
        raise UserError("data.fps is for videos: set data.num_frames")
    if settings.num_frames and settings.source is not None and settings.image_column:
        raise UserError("videos are read from data.path; data.image_column=null reads prompts only")
    _check_size(settings)
    if not 0.0 <= settings.prompt_dropout <= 1.0:
        raise UserError(f"data.prompt_dropout must be in [0, 1], not {settings.prompt_dropout}")


def check_skipped(settings: DataSettings) -> None:
    """Refuse to leave out less than no examples."""
    if settings.skip_examples < 0:
        raise UserError(f"data.skip_examples must be at least 0, not {settings.skip_examples}")


def _check_size(settings: DataSettings) -> None:
    multiple = settings.multiple
    if settings.size is not None:
        if any(side < 1 or side % multiple for side in settings.size):
            raise UserError(
                f"data.size {list(settings.size)}: sides must be divisible by data.multiple "
                f"({multiple})"
            )
    elif settings.resolution is not None and settings.resolution < multiple:
        raise UserError(
            f"data.resolution {settings.resolution} is less than data.multiple {multiple}"
        )


def resolve(path: str, root: Path) -> Path:
    """Return where ``data.path`` is."""
    name = path.removeprefix("bundled:")
    return root / Path(path).expanduser() if name == path else bundled("data", name)


def _sizes(settings: DataSettings) -> Sizes:
    if settings.size is not None:
        return Sizes(settings.multiple, (settings.size,))
    if settings.resolution is None:
        return Sizes(settings.multiple)
    make = aspect_buckets if settings.buckets else square
    return Sizes(settings.multiple, make(settings.resolution, settings.multiple))


def _verified(
    records: list[Record], sizes: Sizes, settings: DataSettings, problems: list[Problem]
) -> list[Item]:
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(partial(_verify, sizes=sizes, settings=settings), records))
    problems += [result for result in results if isinstance(result, Problem)]
    return [result for result in results if isinstance(result, Item)]


def _verify(record: Record, sizes: Sizes, settings: DataSettings) -> Item | Problem:
    try:
        measured = [_measure(picture, record.origin, sizes) for picture in record.pictures()]
        if record.video is not None:
            video = _measure_video(record.video, record.origin, sizes, clip_of(settings))
            measured.insert(0, video)
    except Bad as bad:
        return bad.problem
    if record.image is None and record.video is None:
        if not sizes.allowed:
            return Problem("no size", record.origin, "prompts without images need data.resolution")
        return Item(record, sizes.choose((1, 1)), tuple(chosen for _, chosen in measured))
    (size, target), *references = measured
    return Item(record, target, tuple(chosen for _, chosen in references), upscaling(size, target))


def _measure(picture: Picture, origin: str, sizes: Sizes) -> tuple[Size, Size]:
    try:
        size = inspect(picture.read())
    except (OSError, ValueError) as error:
        raise Bad("unreadable image", origin, f"{picture}: {error}") from error
    return size, _chosen(size, "image", origin, sizes)


def _measure_video(video: VideoFile, origin: str, sizes: Sizes, clip: Clip) -> tuple[Size, Size]:
    try:
        size = inspect_clip(video, clip)
    except TooShort as error:
        raise Bad("video too short", origin, f"{video}: {error}") from error
    except ValueError as error:
        raise Bad("unreadable video", origin, f"{video}: {error}") from error
    return size, _chosen(size, "video", origin, sizes)


def _chosen(size: Size, kind: str, origin: str, sizes: Sizes) -> Size:
    target = sizes.choose(size)
    if not all(target):
        raise Bad(f"{kind} too small", origin, f"{size} is less than {sizes.multiple}")
    return target


def _warn_of_upscaling(items: list[Item]) -> None:
    small = [item for item in items if item.upscaling > 2.0]
    if small:
        log.warning(
            "%d of %d %s are enlarged more than twice, such as that of %s",
            len(small),
            len(items),
            "videos" if small[0].record.video else "images",
            small[0].record.origin,
        )

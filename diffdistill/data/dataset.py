"""A data set whose every example has been checked."""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from diffdistill.bundled import bundled
from diffdistill.data.folder import read_path
from diffdistill.data.hub import read_source
from diffdistill.data.images import Sizes, aspect_buckets, decode, inspect, square, upscaling
from diffdistill.data.problems import Problem, settle
from diffdistill.data.records import Bad, Picture, Record
from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.types import Example

log = logging.getLogger(__name__)

Size = tuple[int, int]


class Item(NamedTuple):
    """A record whose images can be decoded, and the sizes they are brought to."""

    record: Record
    size: Size
    reference_sizes: tuple[Size, ...] = ()
    upscaling: float = 1.0


class ExampleDataset:
    """Examples, decoded when asked for.

    Attributes:
        settings: How it was read.
        buckets: ``(H, W)`` of each example's image, or of what to generate.
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
        """Return the example with its images decoded and brought to size."""
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
            size=None if record.image else size,
            origin=record.origin,
        )

    def first_without_image(self) -> str | None:
        """Return where the first example without an image came from; None if all have one."""
        missing = (item.record.origin for item in self._items if item.record.image is None)
        return next(missing, None)

    def key(self, index: int) -> str:
        """Return a hash of everything ``self[index]`` depends on, without decoding images."""
        if index not in self._keys:
            item = self._items[index]
            files = [hashlib.sha256(p.read()).hexdigest() for p in item.record.pictures()]
            texts = [item.record.prompt, item.record.detailed_prompt]
            sizes = [item.size, item.reference_sizes, bool(self._sizes.allowed)]
            content = json.dumps([texts, bool(item.record.image), files, sizes])
            self._keys[index] = hashlib.sha256(content.encode()).hexdigest()
        return self._keys[index]


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
        records = read_path(_resolve(settings.path, root), settings, problems)
    sizes = _sizes(settings)
    items = _verified(records[: settings.max_examples], sizes, settings, problems)
    settle(problems, settings.on_error)
    if not items:
        raise UserError(f"there is no usable example in {settings.path or settings.source}")
    _warn_of_upscaling(items)
    return ExampleDataset(items, sizes, settings, problems)


def _check(settings: DataSettings) -> None:
    if (settings.path is None) == (settings.source is None):
        raise UserError("set one of data.path and data.source")
    if settings.resolution is None and not settings.buckets:
        raise UserError("data.buckets=false needs a data.resolution")
    if settings.resolution is not None and settings.resolution < settings.multiple:
        raise UserError(
            f"data.resolution {settings.resolution} is less than data.multiple {settings.multiple}"
        )
    for name in ("batch_size", "multiple", "repeats", "max_examples"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"data.{name} must be at least 1, not {value}")
    if not 0.0 <= settings.prompt_dropout <= 1.0:
        raise UserError(f"data.prompt_dropout must be in [0, 1], not {settings.prompt_dropout}")


def _resolve(path: str, root: Path) -> Path:
    name = path.removeprefix("bundled:")
    return root / Path(path).expanduser() if name == path else bundled("data", name)


def _sizes(settings: DataSettings) -> Sizes:
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
    except Bad as bad:
        return bad.problem
    if record.image is None:
        if settings.resolution is None:
            return Problem("no size", record.origin, "prompts without images need data.resolution")
        target = sizes.choose((settings.resolution, settings.resolution))
        return Item(record, target, tuple(chosen for _, chosen in measured))
    (size, target), *references = measured
    return Item(record, target, tuple(chosen for _, chosen in references), upscaling(size, target))


def _measure(picture: Picture, origin: str, sizes: Sizes) -> tuple[Size, Size]:
    try:
        size = inspect(picture.read())
    except (OSError, ValueError) as error:
        raise Bad("unreadable image", origin, f"{picture}: {error}") from error
    if not all(sizes.choose(size)):
        raise Bad("image too small", origin, f"{size} is less than {sizes.multiple}")
    return size, sizes.choose(size)


def _warn_of_upscaling(items: list[Item]) -> None:
    small = [item for item in items if item.upscaling > 2.0]
    if small:
        log.warning(
            "%d of %d images are enlarged more than twice, such as that of %s",
            len(small),
            len(items),
            small[0].record.origin,
        )

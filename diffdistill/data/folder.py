"""Reading ``data.path``: a folder of images or videos with captions, or a file of prompts."""

import logging
from pathlib import Path
from typing import Any

from diffdistill.data import videos
from diffdistill.data.problems import Problem
from diffdistill.data.records import (
    Bad,
    PictureFile,
    Record,
    caption,
    collect,
    detailed_caption,
)
from diffdistill.data.settings import DataSettings
from diffdistill.data.tables import READERS, Row, read_lines, read_table
from diffdistill.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_path(path: Path, settings: DataSettings, problems: list[Problem]) -> list[Record]:
    """Return the records of a folder or a file; what is wrong is added to ``problems``.

    Raises:
        UserError: If there is no such path, or it is nothing that can be read.
    """
    if path.is_dir():
        table = _metadata(path)
        if table is None:
            targets = _targets(path, settings)
            return collect(lambda target: _sidecar(target, settings), targets, problems)
        return _read_metadata(path, table, settings, problems)
    if not path.exists():
        raise UserError(f"data.path {path} does not exist")
    if path.suffix == ".txt":
        return collect(_prompt_line, read_lines(path), problems)
    if path.suffix == ".jsonl":
        rows = read_table(path, problems)
        return collect(lambda row: _prompt_row(row, settings), rows, problems)
    raise UserError(f"data.path {path} must be a folder, or a .txt or .jsonl file of prompts")


def _metadata(folder: Path) -> Path | None:
    names = [f"metadata{suffix}" for suffix in READERS]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has more than one metadata file: keep one")
    deeper = [file for name in names for file in sorted(folder.glob(f"*/**/{name}"))]
    if deeper and not found:
        raise UserError(f"{folder} has its metadata in {deeper[0].parent}: give that as data.path")
    return found[0] if found else None


def _read_metadata(
    folder: Path, table: Path, settings: DataSettings, problems: list[Problem]
) -> list[Record]:
    rows = read_table(table, problems)
    records = collect(lambda row: _record(folder, row, settings), rows, problems)
    used = {p.path for record in records for p in record.pictures() if isinstance(p, PictureFile)}
    used |= {record.video.path for record in records if record.video}
    unused = set(_targets(folder, settings)) - used
    if unused:
        kind = "videos" if settings.num_frames else "images"
        log.warning("%d %s in %s are not used by %s", len(unused), kind, folder, table.name)
    return records


def _record(folder: Path, row: Row, settings: DataSettings) -> Record:
    name = row.values.get("file_name")
    if not isinstance(name, str) or not name:
        raise Bad("missing file", row.origin, "there is no 'file_name'")
    video = _video(folder / name, row) if settings.num_frames else None
    return Record(
        prompt=caption(row.values, settings.prompt_column, row.origin),
        image=None if video else _image(folder, name, row.origin),
        video=video,
        references=_references(folder, row, settings.reference_column),
        detailed_prompt=detailed_caption(row.values, settings.detailed_prompt_column, row.origin),
        origin=row.origin,
    )


def _image(folder: Path, name: str, origin: str) -> PictureFile:
    path = folder / name
    if path.is_dir() or path.suffix.lower() in videos.SUFFIXES - SUFFIXES:
        raise Bad("not an image", origin, f"{path}: set data.num_frames to read videos")
    return _file(folder, name, "missing file", origin)


def _video(path: Path, row: Row) -> videos.VideoFile:
    if not path.exists():
        raise Bad("missing file", row.origin, f"{path} does not exist")
    if path.is_file() and path.suffix.lower() not in videos.SUFFIXES:
        known = ", ".join(sorted(videos.SUFFIXES))
        raise Bad("not a video", row.origin, f"{path}: neither a folder of frames nor {known}")
    fps = row.values.get("fps")
    try:
        return videos.VideoFile(path, None if fps is None else float(fps))
    except (TypeError, ValueError):
        raise Bad("malformed fps", row.origin, f"not a number: {fps!r}") from None


def _references(folder: Path, row: Row, column: str | None) -> tuple[PictureFile, ...]:
    value = row.values.get(column or "reference")
    names = value if isinstance(value, list) else [value] if value else []
    if column and not names:
        raise Bad("missing reference", row.origin, f"there is no {column!r}")
    return tuple(_file(folder, name, "missing reference", row.origin) for name in names)


def _file(folder: Path, name: Any, kind: str, origin: str) -> PictureFile:
    if not isinstance(name, str):
        raise Bad(kind, origin, f"not a file name: {name!r}")
    path = folder / name
    if not path.is_file():
        raise Bad(kind, origin, f"{path} does not exist")
    return PictureFile(path)


def _targets(folder: Path, settings: DataSettings) -> list[Path]:
    """Return the images in a folder, or the videos; folders of frames are not found."""
    suffixes = videos.SUFFIXES if settings.num_frames else SUFFIXES
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes)
    return [path for path in paths if not _is_hidden(path.relative_to(folder))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _sidecar(target: Path, settings: DataSettings) -> Record:
    text = target.with_suffix(".txt")
    if not text.is_file():
        raise Bad("missing caption", str(target), f"there is no {text.name} and no metadata.jsonl")
    prompt = _text(text.read_bytes(), str(text))
    if settings.num_frames:
        return Record(prompt, video=videos.VideoFile(target), origin=str(target))
    return Record(prompt, PictureFile(target), origin=str(target))


def _prompt_line(line: tuple[bytes, str]) -> Record:
    return Record(_text(*line), origin=line[1])


def _text(data: bytes, origin: str) -> str:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Bad("malformed caption", origin, str(error)) from error
    if not text:
        raise Bad("empty caption", origin, "the file is empty")
    return text


def _prompt_row(row: Row, settings: DataSettings) -> Record:
    if "file_name" in row.values:
        raise Bad("malformed line", row.origin, "files are read from a folder: give that instead")
    return Record(
        prompt=caption(row.values, settings.prompt_column, row.origin),
        detailed_prompt=detailed_caption(row.values, settings.detailed_prompt_column, row.origin),
        origin=row.origin,
    )

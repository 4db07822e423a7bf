"""Reading ``data.source``: anything that ``datasets.load_dataset`` can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffdistill.data.problems import Problem
from diffdistill.data.records import (
    Bad,
    Picture,
    PictureFile,
    Record,
    caption,
    collect,
    detailed_caption,
)
from diffdistill.data.settings import DataSettings
from diffdistill.errors import MissingExtra, UserError


class PictureCell(NamedTuple):
    """An image in a cell of a table of ``datasets``.

    Attributes:
        table: The table; its images are not decoded.
        row: The number of the row.
        column: The name of the column.
        position: Which image, where the cell holds a list.
    """

    table: Any
    row: int
    column: str
    position: int | None = None

    def __str__(self) -> str:
        """Return the column, and the position in a list."""
        return self.column if self.position is None else f"{self.column}[{self.position}]"

    def read(self) -> bytes:
        """Return the bytes of the image, from the table or from the file it names."""
        cell = self.table[self.row][self.column]
        if self.position is not None:
            cell = cell[self.position]
        content: bytes | None = cell["bytes"]
        return Path(cell["path"]).read_bytes() if content is None else content


def read_source(settings: DataSettings, root: Path, problems: list[Problem]) -> list[Record]:
    """Return the records of ``settings.source``; what is wrong is added to ``problems``.

    Raises:
        UserError: If the source cannot be loaded or lacks a column.
    """
    table = load_source(settings, root)
    columns = [
        column
        for column in (
            settings.image_column,
            settings.prompt_column,
            settings.reference_column,
            settings.detailed_prompt_column,
        )
        if column
    ]
    for column in columns:
        if column not in table.column_names:
            known = ", ".join(table.column_names)
            hint = "; data.image_column=null reads prompts only" * (column == settings.image_column)
            raise UserError(f"{settings.source} has no column {column!r}, only {known}{hint}")
    table = undecoded(table.select_columns(columns))
    return collect(lambda row: _record(table, row, root, settings), range(len(table)), problems)


def load_source(settings: DataSettings, root: Path, *, streaming: bool = False) -> Any:
    """Return what ``datasets`` makes of ``settings.source``, read at once or while it is used.

    Raises:
        UserError: If it cannot be loaded.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", "data.source") from error
    files = [str(root / file) for file in settings.files or ()]
    where: dict[str, Any] = {"data_files": files} if files else {}
    if len(files) == 1 and Path(files[0]).is_dir():
        where = {"data_dir": files[0]}
    try:
        return datasets.load_dataset(
            settings.source, split=settings.split, streaming=streaming, **where
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot load data.source {settings.source!r}: {error}") from error


def undecoded(table: Any) -> Any:
    """Return a table of ``datasets`` whose images are left as they are stored."""
    import datasets

    raw = datasets.Image(decode=False)
    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, datasets.List(raw))
    return table


def _record(table: Any, row: int, root: Path, settings: DataSettings) -> Record:
    origin, values = f"{settings.source}:{row + 1}", table[row]
    images = _pictures(table, row, values, settings.image_column, root, origin)
    if settings.image_column and len(images) != 1:
        raise Bad("missing file", origin, f"{len(images)} images in {settings.image_column!r}")
    references = _pictures(table, row, values, settings.reference_column, root, origin)
    if settings.reference_column and not references:
        raise Bad("missing reference", origin, f"{settings.reference_column!r} is empty")
    return Record(
        prompt=caption(values, settings.prompt_column, origin),
        image=images[0] if images else None,
        references=references,
        detailed_prompt=detailed_caption(values, settings.detailed_prompt_column, origin),
        origin=origin,
    )


def _pictures(
    table: Any, row: int, values: Mapping[str, Any], column: str | None, root: Path, origin: str
) -> tuple[Picture, ...]:
    cell = values[column] if column else None
    if not cell:
        return ()
    if isinstance(cell, list):
        return tuple(
            _picture(PictureCell(table, row, str(column), i), c, root, origin)
            for i, c in enumerate(cell)
        )
    return (_picture(PictureCell(table, row, str(column)), cell, root, origin),)


def _picture(picture: PictureCell, cell: Any, root: Path, origin: str) -> Picture:
    if isinstance(cell, str):
        if not (root / cell).is_file():
            raise Bad("missing file", origin, f"{root / cell} does not exist")
        return PictureFile(root / cell)
    if not isinstance(cell, dict) or not cell.keys() >= {"bytes", "path"}:
        raise Bad("missing file", origin, f"{picture.column!r} is neither an image nor a path")
    return picture

"""The data sets, models and configs that come with the package."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from diffdistill.errors import UserError

CONFIGS = Path(__file__).parent / "configs"
LAUNCHERS = CONFIGS / "accelerate"
"""Where the configs of ``accelerate launch`` are."""


def bundled(kind: Literal["data", "models"], name: str) -> Path:
    """Return the path of a bundled data set or model.

    Raises:
        UserError: If there is none of this name.
    """
    folder = _samples() / kind
    known = sorted(path.name for path in folder.iterdir() if path.name != "README.md")
    if name not in known:
        raise UserError(f"there are no bundled {kind} {name!r}; known: {', '.join(known)}")
    return folder / name


def _samples() -> Path:
    try:
        return Path(str(files("diffdistill.samples") / "."))
    except ModuleNotFoundError:  # a checkout without links
        return Path(__file__).parents[1] / "samples"

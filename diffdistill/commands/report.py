"""``diffdistill report``."""

from collections.abc import Sequence
from pathlib import Path

from diffdistill.checkpoints import write_atomic
from diffdistill.report.build import build_report


def report(
    runs: Sequence[Path],
    *,
    output: Path = Path("report.html"),
    title: str = "Distillation report",
    figures: Sequence[tuple[str, Path]] = (),
) -> Path:
    """Write one self-contained HTML page about one or several runs, and return its path.

    Args:
        runs: The runs' folders.
        output: The page.
        title: Its title.
        figures: Title and file (PNG, GIF, MP4) of pictures to put first.

    Raises:
        UserError: If a folder holds no run, or a picture is missing.
    """
    page = build_report(runs, title=title, figures=figures)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page.encode())
    return output

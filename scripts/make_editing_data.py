"""Make the bundled edits of words, for training and held out.

python scripts/make_editing_data.py [--folder samples/data]
"""

import argparse
import json
from pathlib import Path

from diffdistill.evaluation.arithmetic import distinct
from diffdistill.evaluation.editing import edits

FILES: dict[str, tuple[bool, int]] = {
    "editing-train": (False, 3000),
    "editing-held-out": (True, 400),
}
"""Whether held out, and the number of edits of each file."""


def rows(name: str) -> list[str]:
    """The lines of a file."""
    held_out, count = FILES[name]
    return [json.dumps(edit.row()) + "\n" for edit in distinct(edits(0, held_out=held_out), count)]


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("samples/data"))
    options = parser.parse_args()
    for name in FILES:
        path = options.folder / f"{name}.jsonl"
        path.write_text("".join(rows(name)), encoding="utf-8")
        print(f"{path}: {FILES[name][1]} edits, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Make the bundled arithmetic: sums and products, for training and held out, in two formats.

python scripts/make_arithmetic_data.py [--folder samples/data]
"""

import argparse
import json
from pathlib import Path

from diffdistill.evaluation.arithmetic import Format, distinct, problems

FILES: dict[str, tuple[Format, bool, int]] = {
    "arithmetic-train": ("box", False, 3000),
    "arithmetic-held-out": ("box", True, 400),
    "arithmetic-json-train": ("json", False, 1000),
    "arithmetic-json-held-out": ("json", True, 400),
}
"""The format, whether held out, and the number of problems of each file."""


def rows(name: str) -> list[str]:
    """The lines of a file."""
    style, held_out, count = FILES[name]
    found = distinct(problems(0, held_out=held_out, formats=(style,)), count)
    return [json.dumps(problem.row()) + "\n" for problem in found]


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("samples/data"))
    options = parser.parse_args()
    for name in FILES:
        path = options.folder / f"{name}.jsonl"
        path.write_text("".join(rows(name)), encoding="utf-8")
        print(f"{path}: {FILES[name][2]} problems, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

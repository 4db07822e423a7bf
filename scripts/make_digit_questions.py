"""Make the bundled questions about pictures of digits, for training and held out.

python scripts/make_digit_questions.py [--folder samples/data]
"""

import argparse
from itertools import islice
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from diffdistill.evaluation.digit_questions import digit_questions

FILES = {"digit-questions-train": (0, False, 1500), "digit-questions-held-out": (1, True, 600)}
"""The seed, whether held out, and the number of questions of each file."""


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("samples/data"))
    options = parser.parse_args()
    for name, (seed, held_out, count) in FILES.items():
        path = options.folder / f"{name}.parquet"
        rows = [found.row() for found in islice(digit_questions(seed, held_out=held_out), count)]
        parquet.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
        print(f"{path}: {count} questions, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

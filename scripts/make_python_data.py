"""Make the bundled Python data: functions of the standard library, for training and held out.

python scripts/make_python_data.py [--folder samples/data]
"""

import argparse
import json
import platform
from pathlib import Path

from diffdistill.evaluation.python_source import Document, corpus, library_files


def write_rows(path: Path, documents: list[Document]) -> None:
    """Write JSON lines."""
    lines = [json.dumps(document.row(), ensure_ascii=False) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("samples/data"))
    options = parser.parse_args()
    train, held_out = corpus(library_files())
    for name, documents in (("train", train), ("held-out", held_out)):
        path = options.folder / f"python-{name}.jsonl"
        write_rows(path, documents)
        chats = sum(bool(document.header) for document in documents)
        print(f"{path}: {chats} chats, {len(documents) - chats} texts, {path.stat().st_size} bytes")
    print(f"of Python {platform.python_version()}")


if __name__ == "__main__":
    main()

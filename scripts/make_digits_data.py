"""Make the bundled digits: images of eights and nines, and prompts for the other classes.

python scripts/make_digits_data.py [--size 16] [--folder samples/data]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = (8, 9)
NUM_IMAGES = 40
WHITE = 16.0  # the brightest level of the source


def caption(digit: int) -> str:
    """Return what is in an image of ``digit``."""
    return f"a handwritten {WORDS[digit]}"


def enlarge(levels: np.ndarray, size: int) -> Image.Image:
    """Return a grey image of ``size`` x ``size`` for levels ``[8, 8]`` in [0, 16]."""
    pixels = torch.from_numpy(levels / WHITE)[None]
    pixels = resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=True)
    return Image.fromarray((pixels[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def write_images(folder: Path, size: int) -> None:
    """Write the first images of each class, and their metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    digits, rows = load_digits(), []
    for digit in CLASSES:
        for number, index in enumerate(np.flatnonzero(digits.target == digit)[:NUM_IMAGES]):
            name = f"{digit}-{number:02}.png"
            enlarge(digits.images[index], size).save(folder / name)
            rows.append({"file_name": name, "text": caption(digit)})
    write_rows(folder / "metadata.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the data set and the prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=16, help="side of the images in pixels")
    parser.add_argument("--folder", type=Path, default=Path("samples/data"))
    options = parser.parse_args()
    write_images(options.folder / "digits-8-9", options.size)
    others = [digit for digit in range(len(WORDS)) if digit not in CLASSES]
    write_rows(options.folder / "digits-prompts.jsonl", [{"text": caption(d)} for d in others])


if __name__ == "__main__":
    main()

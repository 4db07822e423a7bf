"""Images and videos in a grid, and their files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from diffdistill.checkpoints import write_atomic
from diffdistill.clips import to_image, write_clip

MIN_TILE = 96
MIN_WIDTH = 320
MAX_WIDTH = 4096
GAP = 4
FONT_SIZE = 13
LINE = 17


def save_grid(
    pixels: Tensor,
    path: Path,
    columns: int,
    captions: Sequence[str] | None = None,
    row_captions: Sequence[str] | None = None,
    *,
    fps: float = 16.0,
) -> None:
    """Write images ``[N, 3, H, W]`` in [0, 1], ``columns`` in a row, atomically, as a PNG.

    Videos ``[N, T, 3, H, W]`` become one video, a GIF or MP4. Small images are enlarged to at
    least 96 pixels without smoothing; large ones are reduced where the grid would be wider than
    4096.

    Args:
        pixels: The images, row by row.
        path: The file; its folder is made.
        columns: Images in a row.
        captions: Text over each column; may have several lines.
        row_captions: One line over each row.
        fps: Frames per second of a video.
    """
    if pixels.ndim == 5:
        sheets = (draw_grid(frame, columns, captions, row_captions) for frame in pixels.unbind(1))
        write_clip(sheets, path, fps)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    draw_grid(pixels, columns, captions, row_captions).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def save_image(pixels: Tensor, path: Path) -> None:
    """Write one image ``[3, H, W]`` in [0, 1] as PNG, at its own size, atomically."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def draw_grid(
    pixels: Tensor,
    columns: int,
    captions: Sequence[str] | None = None,
    row_captions: Sequence[str] | None = None,
) -> Image.Image:
    """Return the picture that ``save_grid`` writes."""
    tiles = resized(pixels, columns)
    height, width = tiles.shape[-2:]
    header = LINE * max((len(c.splitlines()) for c in captions or ()), default=0)
    label = LINE if row_captions else 0
    rows = -(-len(tiles) // columns)
    total = (columns * (width + GAP) + GAP, header + rows * (label + height + GAP) + GAP)
    total = (max(total[0], MIN_WIDTH if row_captions else 0), total[1])
    sheet = Image.new("RGB", total, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for column, caption in enumerate(captions or ()):
        draw.multiline_text((GAP + column * (width + GAP), 1), caption, "black", font, spacing=2)
    for row in range(rows):
        top = GAP + header + row * (label + height + GAP)
        if row_captions:
            draw.text((GAP, top), _fitted(row_captions[row], total[0], font), "black", font)
        for column, tile in enumerate(tiles[row * columns : (row + 1) * columns]):
            sheet.paste(to_image(tile), (GAP + column * (width + GAP), top + label))
    return sheet


def resized(pixels: Tensor, columns: int = 1) -> Tensor:
    """Return images ``[N, 3, H, W]`` of the size they have in a grid."""
    height, width = pixels.shape[-2:]
    if max(height, width) < MIN_TILE:
        factor = -(-MIN_TILE // max(height, width))
        return interpolate(pixels, scale_factor=factor, mode="nearest")
    widest = max(1, (MAX_WIDTH - GAP) // columns - GAP)
    if width <= widest:
        return pixels
    smaller = (max(1, height * widest // width), widest)
    return interpolate(pixels, size=smaller, mode="bilinear", antialias=True)


def _fitted(text: str, width: int, font: Any) -> str:
    """Return ``text`` in one line, cut where it would be wider than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width - 2 * GAP:
        return text
    while text and font.getlength(f"{text}...") > width - 2 * GAP:
        text = text[:-1]
    return f"{text}..."

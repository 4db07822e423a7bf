"""Video files: exact where they can be, whole or not there, and never a traceback."""

import os
from collections.abc import Iterator
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from diffdistill.clips import ClipWriter, clip_suffix, save_clip, still, to_image, write_clip
from diffdistill.errors import UserError
from diffdistill.grids import draw_grid, save_grid


def ramp(num_frames: int, height: int = 16, width: int = 16) -> Tensor:
    """A video whose frames are gray and brighter one after another."""
    levels = torch.linspace(0.1, 0.9, num_frames).view(-1, 1, 1, 1)
    return levels.expand(num_frames, 3, height, width)


def frames_of(path: Path) -> np.ndarray:
    """All frames ``[T, H, W, 3]``."""
    with imageio.get_reader(path) as reader:
        return np.stack([frame[..., :3] for frame in reader])


def test_a_gif_of_few_colors_is_exact(tmp_path: Path) -> None:
    video = ramp(5)
    video = torch.cat([video[:, :, :8], 1 - video[:, :, 8:]], dim=2)
    save_clip(video, tmp_path / "deep" / "clip.gif", 10.0)
    expected = (video * 255).round().byte().movedim(1, -1).numpy()
    assert np.array_equal(frames_of(tmp_path / "deep" / "clip.gif"), expected)


def test_a_gif_keeps_its_mean_speed_and_loops(tmp_path: Path) -> None:
    save_clip(ramp(17), tmp_path / "clip.gif", 16.0)
    with Image.open(tmp_path / "clip.gif") as gif:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert set(durations) <= {60, 70}
    assert sum(durations) == round(100 * 17 / 16) * 10


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_an_mp4_has_every_frame_on_even_sides_at_its_speed(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    video = ramp(9, *size)
    save_clip(video, tmp_path / "clip.mp4", 24.0)
    frames = frames_of(tmp_path / "clip.mp4")
    assert frames.shape == (9, *(side + side % 2 for side in size), 3)
    levels = frames.mean(axis=(1, 2, 3)) / 255
    assert levels == pytest.approx(video.mean(dim=(1, 2, 3)).numpy(), abs=0.02)
    with imageio.get_reader(tmp_path / "clip.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 24.0
        assert reader.get_meta_data()["pix_fmt"].startswith("yuv420p")
        assert reader.get_meta_data()["codec"] == "h264"


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_the_still_of_a_video_is_its_first_frame(tmp_path: Path, suffix: str) -> None:
    save_clip(ramp(3), tmp_path / f"clip{suffix}", 16.0)
    found = np.asarray(still(tmp_path / f"clip{suffix}"))
    assert found.shape == (16, 16, 3)
    assert found.mean() == pytest.approx(0.1 * 255, abs=2)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_an_error_midway_leaves_the_old_file_and_nothing_aside(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"old")

    def broken() -> Iterator[Image.Image]:
        yield to_image(ramp(1)[0])
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_clip(broken(), path, 16.0)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_wrong_suffix_speed_or_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clip.avi: a video is a .gif or .mp4 file"):
        ClipWriter(tmp_path / "clip.avi", 16.0)
    with pytest.raises(UserError, match="frames per second must be positive"):
        ClipWriter(tmp_path / "clip.gif", 0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        ClipWriter(tmp_path / "file" / "clip.gif", 16.0)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="Permission denied"):
            ClipWriter(tmp_path / "locked" / "clip.gif", 16.0)


def test_small_canvases_are_gifs() -> None:
    assert clip_suffix((64, 64)) == ".gif"
    assert clip_suffix((64, 65)) == ".mp4"


def test_a_grid_of_videos_is_the_grid_of_their_frames(tmp_path: Path) -> None:
    videos = torch.stack([ramp(3), 1 - ramp(3), ramp(3)])
    save_grid(videos, tmp_path / "grid.gif", 2, ["a", "b"], ["one", "two"])
    frames = frames_of(tmp_path / "grid.gif")
    assert len(frames) == 3
    for index, frame in enumerate(frames):
        expected = np.asarray(draw_grid(videos[:, index], 2, ["a", "b"], ["one", "two"]))
        assert np.array_equal(frame, expected)

"""Reading clips of videos, and data of prompts for videos."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffdistill.data.cache import EncodedDataset
from diffdistill.data.dataset import ExampleDataset, open_dataset
from diffdistill.data.settings import DataSettings
from diffdistill.data.videos import Clip, Stored, TooShort, VideoFile, inspect_clip, read_clip
from diffdistill.errors import UserError
from diffdistill.types import Example
from tests.test_data import write_metadata

LENGTH, FPS = 20, 10
KINDS = ("a.mp4", "a.webm", "a.avi", "a.gif", "frames")


def greys(length: int = LENGTH, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Return frames ``[T, H, W, 3]`` whose grey is 12 times their number."""
    levels = (12 * np.arange(length)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (length, *size, 3)).copy()


def save(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Save a video in the format of the suffix; a path without one is a folder of frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame) for frame in frames]
    if not path.suffix:
        path.mkdir()
        for number, image in enumerate(images):
            image.save(path / f"{number:03}.png")
    elif path.suffix == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // fps)
    else:
        more = {"codec": "libvpx", "bitrate": "2M"} if path.suffix == ".webm" else {}
        imageio.mimsave(path, list(frames), fps=fps, macro_block_size=8, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the same video in each format."""
    root = tmp_path_factory.mktemp("videos")
    for kind in KINDS:
        save(root / kind, greys())
    return root


def numbers(path: Path, clip: Clip) -> list[int]:
    """Return which frames of ``greys`` a clip has."""
    frames = read_clip(VideoFile(path, FPS), clip)
    return [round(float(np.asarray(frame).mean()) / 12) for frame in frames]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (Clip(5), [0, 1, 2, 3, 4]),
        (Clip(5, place="center"), [7, 8, 9, 10, 11]),
        (Clip(5, fps=5.0), [0, 2, 4, 6, 8]),
        (Clip(5, fps=20.0), [0, 1, 1, 2, 2]),
        (Clip(4, fps=7.5), [0, 1, 3, 4]),
        (Clip(5, fps=5.0, place="center"), [5, 7, 9, 11, 13]),
        (Clip(20, place="center"), list(range(20))),
    ],
)
def test_a_clip_has_the_frames_nearest_to_its_times(
    folder: Path, kind: str, clip: Clip, expected: list[int]
) -> None:
    assert numbers(folder / kind, clip) == expected
    assert inspect_clip(VideoFile(folder / kind, FPS), clip) == (32, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_must_have_the_frames_of_a_clip(folder: Path, kind: str) -> None:
    for clip, needed in ((Clip(21), 21), (Clip(21, place="center"), 21), (Clip(12, fps=5.0), 23)):
        with pytest.raises(TooShort, match=f"20 frames, .* {clip.num_frames} .* need {needed}"):
            inspect_clip(VideoFile(folder / kind, FPS), clip)


def test_equal_frames_of_a_gif_are_counted_though_writers_merge_them(tmp_path: Path) -> None:
    frames = greys()[[0, 1, 1, 1, 2, 3]]
    save(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 4  # type: ignore[attr-defined]
    assert numbers(tmp_path / "a.gif", Clip(6)) == [0, 1, 1, 1, 2, 3]
    assert numbers(tmp_path / "a.gif", Clip(3, fps=5.0)) == [0, 1, 2]


def test_clips_are_taken_evenly_whatever_the_speeds() -> None:
    for stored in (12.0, 23.976, 25.0, 30.0, 60.0):
        video = Stored(stored, lambda: 10_000, iter(()))
        steps = Clip(81, fps=16.0).indices(video)
        times = torch.tensor(steps) / stored - torch.arange(81) / 16.0
        assert times.abs().max() <= 0.5 / stored + 1e-6
        assert all(a <= b for a, b in pairwise(steps))


def open_videos(path: Path, **options: Any) -> ExampleDataset:
    values: dict[str, Any] = {"resolution": 32, "multiple": 16, "num_frames": 5} | options
    return open_dataset(DataSettings(path=str(path), **values))


def test_a_folder_with_metadata_gives_clips_of_the_buckets_size(tmp_path: Path) -> None:
    save(tmp_path / "wide.mp4", greys(size=(32, 64)))
    save(tmp_path / "frames", greys(size=(40, 40)))
    write_metadata(
        tmp_path,
        {"file_name": "wide.mp4", "text": "a wide one"},
        {"file_name": "frames", "text": "a square one", "fps": 20},
    )
    dataset = open_videos(tmp_path, fps=10.0)
    assert dataset.prompts == ["a wide one", "a square one"]
    assert dataset.buckets == [(16, 64), (32, 32)]
    wide, square = dataset[0], dataset[1]
    assert wide.image is None
    assert (wide.size, wide.num_frames) == (None, None)
    assert _levels(wide.video) == [0, 1, 2, 3, 4]
    assert _levels(square.video) == [0, 2, 4, 6, 8]
    assert wide.video is not None
    assert wide.video.shape == (5, 3, 16, 64)
    assert wide.video.dtype == torch.float32
    assert wide.without_target() == Example("a wide one", size=(16, 64), num_frames=5,
                                            origin=wide.origin)  # fmt: skip
    assert dataset.first_without_image() is None
    assert dataset.has_videos()


def _levels(video: Tensor | None) -> list[int]:
    assert video is not None
    return [round(level) for level in (video.mean(dim=(1, 2, 3)) * 255 / 12).tolist()]


def test_captions_may_lie_beside_the_videos(tmp_path: Path) -> None:
    save(tmp_path / "a.gif", greys())
    (tmp_path / "a.txt").write_text("getting brighter\n")
    (tmp_path / "b.png").write_bytes(b"not asked for")
    dataset = open_videos(tmp_path)
    assert dataset.prompts == ["getting brighter"]
    assert _levels(dataset[0].video) == [0, 1, 2, 3, 4]


def test_a_gif_is_an_image_where_no_videos_are_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "a.gif", greys())
    (tmp_path / "a.txt").write_text("black")
    example = open_videos(tmp_path, num_frames=None)[0]
    assert example.video is None
    assert example.image is not None
    assert example.image.max() == 0.0


def test_every_problem_of_a_video_is_named_with_file_and_line(tmp_path: Path) -> None:
    save(tmp_path / "good.mp4", greys())
    save(tmp_path / "short.gif", greys(3))
    save(tmp_path / "small.gif", greys(size=(8, 64)))
    save(tmp_path / "mixed", greys())
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "002.png")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-500])
    (tmp_path / "text.gif").write_text("not a video")
    (tmp_path / "still.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    names = ["short.gif", "small.gif", "mixed", "broken.mp4", "text.gif", "still.png", "empty"]
    rows = [{"file_name": name, "text": name} for name in [*names, "gone.mp4", "good.mp4"]]
    write_metadata(tmp_path, *rows, {"file_name": "mixed", "text": "mixed", "fps": "fast"})
    dataset = open_videos(tmp_path, resolution=None, on_error="skip")
    assert dataset.prompts == ["good.mp4"]
    kinds = {int(p.origin.rpartition(":")[2]): p.kind for p in dataset.problems}
    assert kinds == {
        1: "video too short",
        2: "video too small",
        3: "unreadable video",
        4: "unreadable video",
        5: "unreadable video",
        6: "not a video",
        7: "video too short",
        8: "missing file",
        10: "malformed fps",
    }
    with pytest.raises(UserError, match="9 bad examples") as error:
        open_videos(tmp_path, resolution=None)
    assert f"{tmp_path}/metadata.jsonl:1: video too short: {tmp_path}/short.gif: 3 frames" in str(
        error.value
    )
    assert "its frames differ in size: (32, 48) and (8, 8)" in str(error.value)


def test_folders_of_frames_need_their_speed_where_another_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "frames", greys())
    write_metadata(tmp_path, {"file_name": "frames", "text": "a"})
    assert len(open_videos(tmp_path)) == 1
    with pytest.raises(UserError, match=r"jsonl:1: unreadable video: .*not known, and data\.fps"):
        open_videos(tmp_path, fps=8.0)


def test_videos_among_images_are_refused_with_a_hint(tmp_path: Path) -> None:
    save(tmp_path / "a.mp4", greys(5))
    write_metadata(tmp_path, {"file_name": "a.mp4", "text": "a"})
    with pytest.raises(UserError, match=r"not an image: .*a\.mp4: set data\.num_frames"):
        open_videos(tmp_path, num_frames=None)


def test_prompts_ask_for_videos_of_one_size_and_length(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "a cat"}))
    dataset = open_videos(tmp_path / "p.jsonl", size=(480, 832), num_frames=81, resolution=None)
    assert dataset.buckets == [(480, 832)]
    assert dataset[0] == Example("a cat", size=(480, 832), num_frames=81,
                                 origin=f"{tmp_path}/p.jsonl:1")  # fmt: skip
    assert dataset.first_without_image() == f"{tmp_path}/p.jsonl:1"
    assert not dataset.has_videos()


def test_one_size_is_that_of_images_and_videos_too(tmp_path: Path) -> None:
    save(tmp_path / "a.gif", greys(size=(64, 64)))
    (tmp_path / "a.txt").write_text("black")
    video = open_videos(tmp_path, size=(16, 48))[0].video
    image = open_videos(tmp_path, size=(16, 48), num_frames=None)[0].image
    assert video is not None
    assert image is not None
    assert (video.shape, image.shape) == ((5, 3, 16, 48), (3, 16, 48))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, not 0"),
        ({"fps": 0.0}, "data.fps must be positive"),
        ({"fps": 8.0, "num_frames": None}, r"fps is for videos: set data\.num_frames"),
        ({"size": (480, 840)}, r"size \[480, 840\]: sides must be divisible by .* \(16\)"),
        ({"source": "json", "path": None}, "image_column=null reads prompts only"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"path": "p.txt", "multiple": 16, "num_frames": 5} | options
    with pytest.raises(UserError, match=message):
        open_dataset(DataSettings(**values))


def test_the_key_changes_with_everything_a_clip_depends_on(tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return open_videos(tmp_path, **options).key(0)

    def describe(**more: Any) -> None:
        write_metadata(tmp_path, {"file_name": "v", "text": "a", **more})

    save(tmp_path / "v", greys())
    describe(fps=8)
    keys = [key(), key(num_frames=9), key(fps=4.0), key(clip="center"), key(size=(16, 16))]
    assert key() == keys[0]
    describe(fps=16)
    keys.append(key())
    Image.new("RGB", (48, 32)).save(tmp_path / "v" / "010.png")
    keys.append(key())
    (tmp_path / "p.txt").write_text("a")
    keys += [open_videos(tmp_path / "p.txt", num_frames=n).key(0) for n in (None, 5, 9)]
    assert len(set(keys)) == len(keys)


class Shapes:
    """Encodes an example as the shape of its latents, and remembers how many came at once."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, examples: Any) -> list[dict[str, Tensor]]:
        self.calls.append(len(examples))
        return [
            {"latents": torch.zeros(1).expand(2, 3, 4), "ones": torch.ones(1).expand(3),
             "zeros": torch.zeros(3), "zero": torch.zeros(())}
            for _ in examples
        ]  # fmt: skip

    def release(self) -> None:
        """Have nothing to release."""

    def fingerprint(self) -> str:
        return "shapes"


def test_videos_are_encoded_one_at_a_time(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.gif", greys(5))
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    for path, calls in ((tmp_path, [1, 1, 1, 1]), (tmp_path / "prompts.txt", [3])):
        family = Shapes()
        dataset = open_videos(path, on_error="skip")
        EncodedDataset(dataset, family, tmp_path / "cache").prepare()  # type: ignore[arg-type]
        assert family.calls == calls[: len(dataset)]


def test_empty_latents_are_kept_as_their_shape(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    family: Any = Shapes()
    dataset = open_videos(tmp_path / "prompts.txt")
    encoded = EncodedDataset(dataset, family, tmp_path / "cache", keep_in_memory=40)
    encoded.prepare()
    loaded, expected = encoded[0], family.encode([None])[0]
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert loaded["latents"].untyped_storage().nbytes() == 4
    assert encoded[0] is loaded

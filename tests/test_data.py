"""Reading and checking examples."""

import json
import logging
import runpy
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.bundled import bundled
from diffdistill.data.dataset import ExampleDataset, open_dataset
from diffdistill.data.images import Sizes, aspect_buckets, decode, inspect, square
from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.types import Example

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(path: Path, size: tuple[int, int] = (16, 16), color: tuple[int, int, int] = RED) -> None:
    """Save an image of one color; ``size`` is (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], color).save(path)


def write_metadata(folder: Path, *rows: dict[str, Any] | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def open_small(path: Path, /, **options: Any) -> ExampleDataset:
    values: dict[str, Any] = {"path": str(path), "resolution": 16, "multiple": 8} | options
    return open_dataset(DataSettings(**values))


def examples(dataset: ExampleDataset) -> list[Example]:
    return [dataset[index] for index in range(len(dataset))]


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_folder_with_metadata_gives_captions_and_pixels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", color=RED)
    save(tmp_path / "b.png", color=BLUE)
    write_metadata(
        tmp_path,
        {"file_name": "b.png", "text": " a blue square ", "detailed_text": "a very blue square"},
        {"file_name": "a.png", "text": "a red square"},
    )
    blue, red = examples(open_small(tmp_path))
    assert (blue.prompt, red.prompt) == ("a blue square", "a red square")
    assert (blue.detailed_prompt, red.detailed_prompt) == ("a very blue square", None)
    assert blue.origin == f"{tmp_path}/metadata.jsonl:1"
    assert blue.image is not None
    assert blue.image.dtype == torch.float32
    assert blue.image.shape == (3, 16, 16)
    assert blue.image.mean(dim=(1, 2)).tolist() == [0.0, 0.0, 1.0]


def test_captions_may_lie_beside_the_images(tmp_path: Path) -> None:
    save(tmp_path / "deeper" / "a.png")
    (tmp_path / "deeper" / "a.txt").write_text("a red square\n")
    save(tmp_path / ".hidden" / "b.png")
    assert [example.prompt for example in examples(open_small(tmp_path))] == ["a red square"]


def test_metadata_may_be_csv(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"red, square"\n')
    assert open_small(tmp_path).prompts == ["red, square"]


def test_a_bad_line_of_csv_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,\na.png,red,square\n")
    with pytest.raises(UserError, match=r"csv:2: missing caption") as error:
        open_small(tmp_path)
    assert "csv:3: malformed line: more cells than the header" in str(error.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"metadata.{suffix}").write_bytes(b"file_name\n\xff\xfe\n")
    with pytest.raises(UserError, match=rf"cannot read .*metadata\.{suffix}"):
        open_small(tmp_path)


def test_metadata_may_be_parquet(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    table = datasets.Dataset.from_dict({"file_name": ["a.png"], "text": ["red"]})
    table.data.table.to_pandas().to_parquet(tmp_path / "metadata.parquet")
    assert open_small(tmp_path).prompts == ["red"]


def test_references_are_read_and_sized(tmp_path: Path) -> None:
    save(tmp_path / "target.png")
    save(tmp_path / "wide.png", size=(8, 32), color=BLUE)
    write_metadata(
        tmp_path,
        {"file_name": "target.png", "text": "one", "reference": "wide.png"},
        {"file_name": "target.png", "text": "two", "reference": ["wide.png", "target.png"]},
    )
    dataset = open_small(tmp_path)
    assert [len(example.references) for example in examples(dataset)] == [1, 2]
    assert dataset[0].references[0].shape == (3, 8, 32)
    assert dataset[0].references[0][2].min() == 1.0
    assert dataset.groups[1] == ((16, 16), ((8, 32), (16, 16)))


def test_prompts_need_no_images(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    dataset = open_small(tmp_path / "prompts.txt")
    assert dataset.prompts == ["a cat", "a dog"]
    assert dataset[1].image is None
    assert dataset[1].size == (16, 16)
    assert dataset[1].origin.endswith("prompts.txt:3")


def test_prompts_may_be_json_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"caption": "a cat"}\n')
    assert open_small(tmp_path / "prompts.jsonl", prompt_column="caption").prompts == ["a cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"file_name": "a.png", "text": "red"}', "p.jsonl:1: .*give that instead"),
        ("p.md", "a cat", "must be a folder, or a .txt or .jsonl file"),
        ("p.txt", "\n\n", "no usable example"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_small(tmp_path / name)


def test_prompts_without_images_need_a_resolution(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=r"p\.txt:1: no size: .*need data\.resolution"):
        open_small(tmp_path / "p.txt", resolution=None)


def test_every_problem_is_named_with_file_and_line(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    (tmp_path / "text.png").write_text("not an image")
    write_metadata(
        tmp_path,
        {"file_name": "a.png"},
        {"file_name": "a.png", "text": "  "},
        {"file_name": "a.png", "text": 3},
        '{"file_name": ',
        "[]",
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "a.png", "text": "red", "reference": "lost.png"},
        {"file_name": "broken.png", "text": "broken"},
        {"file_name": "text.png", "text": "text"},
        {"text": "no file"},
        {"file_name": "a.png", "text": "red", "reference": [1]},
        {"file_name": "a.png", "text": "good"},
    )
    dataset = open_small(tmp_path, on_error="skip")
    assert dataset.prompts == ["good"]
    kinds = {int(p.origin.rpartition(":")[2]): p.kind for p in dataset.problems}
    assert kinds == {
        1: "missing caption",
        2: "empty caption",
        3: "malformed caption",
        4: "malformed line",
        5: "malformed line",
        6: "missing file",
        7: "missing reference",
        8: "unreadable image",
        9: "unreadable image",
        10: "missing file",
        11: "missing reference",
    }
    with pytest.raises(UserError, match=r"11 bad examples .*2 x malformed line") as error:
        open_small(tmp_path)
    assert f"{tmp_path}/metadata.jsonl:1: missing caption: there is no 'text'" in str(error.value)


def test_only_the_first_ten_problems_are_shown(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    write_metadata(tmp_path, *[{"file_name": "a.png"}] * 13)
    with pytest.raises(UserError, match=r"13 x missing caption[\s\S]*and 3 more") as error:
        open_small(tmp_path)
    assert str(error.value).count("there is no 'text'") == 10


def test_skipped_examples_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png"}, {"file_name": "a.png", "text": "red"})
    open_small(tmp_path, on_error="skip")
    assert "skipped 1 bad examples (1 x missing caption)" in caplog.text


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match="no usable example"):
        open_small(tmp_path, on_error="skip")


def test_an_image_without_a_caption_beside_it_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: missing caption: there is no a\.txt"):
        open_small(tmp_path)


@pytest.mark.parametrize(
    ("content", "kind"), [(b" \n", "empty caption"), (b"\xff\xfe\xff", "malformed caption")]
)
def test_a_bad_caption_file_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: {kind}"):
        open_small(tmp_path)


def test_a_truncated_jpeg_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "jpeg")
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "a.txt").write_text("noise")
    with pytest.raises(UserError, match=r"a\.jpg: unreadable image: [^(]*a\.jpg: .*truncated"):
        open_small(tmp_path)


def test_a_required_reference_must_be_there(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "red"})
    with pytest.raises(UserError, match=r"jsonl:1: missing reference: there is no 'source'"):
        open_small(tmp_path, reference_column="source")


def test_a_required_detailed_caption_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a cat", "detailed_text": "not this"}')
    with pytest.raises(UserError, match=r"jsonl:1: missing caption: there is no 'long'"):
        open_small(tmp_path / "p.jsonl", detailed_prompt_column="long")


def test_unused_and_small_images_are_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "a.png", size=(4, 4))
    save(tmp_path / "b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "red"})
    assert open_small(tmp_path)[0].image.shape == (3, 16, 16)  # type: ignore[union-attr]
    assert "1 images in" in caplog.text
    assert "1 of 1 images are enlarged more than twice" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, "set one of data.path and data.source"),
        ({"source": "json"}, "set one of data.path and data.source"),
        ({"path": "gone"}, "gone does not exist"),
        ({"path": "bundled:gone"}, "no bundled data 'gone'; known: .*digits-8-9"),
        ({"resolution": 4}, "resolution 4 is less than data.multiple 8"),
        ({"resolution": None, "buckets": False}, "needs a data.resolution"),
        ({"repeats": 0}, "repeats must be at least 1, not 0"),
        ({"prompt_dropout": 1.5}, r"prompt_dropout must be in \[0, 1\], not 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_small(tmp_path, **options)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable example"):
        open_small(tmp_path)


def test_metadata_in_a_deeper_folder_is_pointed_at(tmp_path: Path) -> None:
    write_metadata(tmp_path / "train", {"file_name": "a.png", "text": "red"})
    with pytest.raises(UserError, match=r"has its metadata in .*train: give that"):
        open_small(tmp_path)


def test_two_metadata_files_are_refused(tmp_path: Path) -> None:
    write_metadata(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match="more than one metadata file"):
        open_small(tmp_path)


def test_only_the_first_examples_are_read_if_so_asked(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    assert open_small(tmp_path / "p.txt", max_examples=2).prompts == ["one", "two"]
    skipped = open_small(tmp_path / "p.txt", max_examples=1, skip_examples=1)
    assert skipped.prompts == ["two"]


def test_relative_paths_start_from_the_root(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n")
    settings = DataSettings(path="p.txt", resolution=32)
    assert open_dataset(settings, tmp_path).prompts == ["one"]


def test_buckets_keep_the_area_and_the_aspect() -> None:
    sizes = Sizes(32, aspect_buckets(1024, 32))
    assert all(h * w <= 1024**2 and h % 32 == w % 32 == 0 for h, w in sizes.allowed)
    assert {(w, h) for h, w in sizes.allowed} == set(sizes.allowed)
    assert sizes.choose((3000, 3000)) == (1024, 1024)
    assert sizes.choose((1080, 1920)) == (768, 1344)
    assert sizes.choose((100, 9000)) == (512, 2048)


def test_without_buckets_images_are_square(tmp_path: Path) -> None:
    save(tmp_path / "a.png", size=(16, 64))
    (tmp_path / "a.txt").write_text("wide")
    assert open_small(tmp_path, buckets=False).buckets == [(16, 16)]
    assert open_small(tmp_path).buckets == [(8, 32)]
    assert square(1000, 32) == ((992, 992),)


def test_without_a_resolution_images_are_cropped_and_not_resized(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 27, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("noise")
    dataset = open_small(tmp_path, resolution=None)
    assert dataset.buckets == [(16, 24)]
    image = dataset[0].image
    assert image is not None
    middle = torch.from_numpy(pixels[1:17, 2:26]).movedim(-1, 0) / 255
    torch.testing.assert_close(image, middle)


def test_without_a_resolution_images_must_not_be_too_small(tmp_path: Path) -> None:
    save(tmp_path / "a.png", size=(7, 16))
    (tmp_path / "a.txt").write_text("flat")
    with pytest.raises(UserError, match=r"image too small: \(7, 16\) is less than 8"):
        open_small(tmp_path, resolution=None)


def test_images_are_cropped_in_the_middle() -> None:
    image = Image.new("RGB", (48, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    pixels = Sizes(16, ((16, 16),)).fit(image, (16, 16))
    torch.testing.assert_close(pixels[2], torch.ones(16, 16))


def test_pixels_stay_in_range_when_resized() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (40, 40, 3), dtype=np.uint8) * 255
    pixels = Sizes(16, ((64, 64),)).fit(Image.fromarray(noise), (64, 64))
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)


def test_images_are_turned_as_their_exif_data_says() -> None:
    image = Image.new("RGB", (8, 4), RED)
    exif = image.getexif()
    exif[0x0112] = 6
    content = encoded(image, "jpeg", exif=exif)
    assert inspect(content) == (8, 4)
    assert decode(content).size == (4, 8)


def test_transparency_is_put_on_white() -> None:
    assert decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))).getpixel((0, 0)) == (255,) * 3
    half = decode(encoded(Image.new("LA", (1, 1), (0, 51)))).getpixel((0, 0))
    assert half == (204, 204, 204)


def test_transparent_palettes_are_put_on_white() -> None:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([0, 0, 0])
    assert decode(encoded(image, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_grey_sixteen_bit_and_cmyk_images_become_rgb() -> None:
    assert decode(encoded(Image.new("L", (1, 1), 7))).getpixel((0, 0)) == (7, 7, 7)
    deep = Image.fromarray(np.full((1, 1), 128 * 257, dtype=np.uint16))
    assert decode(encoded(deep)).getpixel((0, 0)) == (128, 128, 128)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert decode(encoded(cmyk, "tiff")).getpixel((0, 0)) == RED


def test_floating_point_images_are_refused() -> None:
    content = encoded(Image.new("F", (1, 1), 0.5), "tiff")
    with pytest.raises(ValueError, match="no fixed range"):
        inspect(content)


def test_the_key_changes_with_everything_an_example_depends_on(tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return open_small(tmp_path, **options).key(0)

    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "red"})
    keys = [key()]
    assert key() == keys[0]
    write_metadata(tmp_path, {"file_name": "a.png", "text": "crimson"})
    keys.append(key())
    write_metadata(tmp_path, {"file_name": "a.png", "text": "crimson", "reference": "b.png"})
    keys.append(key())
    save(tmp_path / "b.png", color=BLUE)
    keys.append(key())
    save(tmp_path / "a.png", color=BLUE)
    keys += [key(), key(resolution=32), key(resolution=None)]
    assert len(set(keys)) == len(keys)


def test_the_bundled_digits_are_eights_and_nines() -> None:
    settings = DataSettings(path="bundled:digits-8-9", resolution=16, multiple=16)
    dataset = open_dataset(settings)
    assert dataset.prompts == ["a handwritten eight"] * 40 + ["a handwritten nine"] * 40
    assert dataset.buckets == [(16, 16)] * 80
    image = dataset[0].image
    assert image is not None
    assert (float(image.min()), float(image.max())) == (0.0, 1.0)


def test_the_bundled_prompts_are_of_the_other_digits() -> None:
    prompts = bundled("data", "digits-prompts.jsonl").read_text()
    assert [json.loads(line)["text"].split()[-1] for line in prompts.splitlines()] == [
        "zero", "one", "two", "three", "four", "five", "six", "seven",
    ]  # fmt: skip


def test_bundled_data_is_found_in_a_checkout_without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(package: str) -> None:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr("diffdistill.bundled.files", fail)
    assert (bundled("data", "digits-8-9") / "metadata.jsonl").is_file()


def test_the_bundled_digits_are_what_the_script_makes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "make_digits_data.py"))
    script["write_images"](tmp_path, 16)
    bundle = bundled("data", "digits-8-9")
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in bundle.iterdir() if path.suffix != ".md")
    for name in made[:-1]:
        assert decode((tmp_path / name).read_bytes()) == decode((bundle / name).read_bytes())
    assert (tmp_path / made[-1]).read_text() == (bundle / made[-1]).read_text()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what ``datasets`` writes in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.mark.usefixtures("hub_cache")
def test_a_source_may_be_json_with_paths_of_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png", color=BLUE)
    rows = [{"image": "a.png", "text": "blue"}, {"image": "gone.png", "text": "gone"}]
    (tmp_path / "d.json").write_text("\n".join(map(json.dumps, rows)))
    settings = DataSettings(
        source="json", files=["d.json"], resolution=16, multiple=8, on_error="skip"
    )
    dataset = open_dataset(settings, tmp_path)
    assert dataset.prompts == ["blue"]
    assert str(dataset.problems[0]).startswith("json:2: missing file: ")
    assert dataset[0].image[2].min() == 1.0  # type: ignore[index]


@pytest.mark.usefixtures("hub_cache")
def test_a_source_may_be_a_folder_of_images(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", color=BLUE)
    write_metadata(tmp_path / "images", {"file_name": "a.png", "text": "blue"})
    settings = DataSettings(source="imagefolder", files=["images"], resolution=16, multiple=8)
    dataset = open_dataset(settings, tmp_path)
    assert dataset.prompts == ["blue"]
    assert dataset[0].image[2].min() == 1.0  # type: ignore[index]


@pytest.mark.usefixtures("hub_cache")
def test_a_source_may_hold_images_and_lists_of_references(tmp_path: Path) -> None:
    features = datasets.Features(
        image=datasets.Image(), text=datasets.Value("string"), refs=datasets.List(datasets.Image())
    )
    red, blue = (Image.new("RGB", (16, 16), color) for color in (RED, BLUE))
    rows = {"image": [red, red], "text": ["one", "two"], "refs": [[blue, red], []]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    settings = DataSettings(
        source="parquet",
        files=["d.parquet"],
        reference_column="refs",
        resolution=16,
        multiple=8,
        on_error="skip",
    )
    dataset = open_dataset(settings, tmp_path)
    assert [problem.kind for problem in dataset.problems] == ["missing reference"]
    assert [float(reference[2].mean()) for reference in dataset[0].references] == [1.0, 0.0]


@pytest.mark.usefixtures("hub_cache")
def test_a_source_with_other_things_than_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(
        '{"image": 3, "text": "three"}\n{"image": null, "text": "none"}'
    )
    with pytest.raises(UserError, match="json:1: missing file: 'image' is neither") as error:
        open_dataset(DataSettings(source="json", files=["d.json"]), tmp_path)
    assert "json:2: missing file: 0 images in 'image'" in str(error.value)


@pytest.mark.usefixtures("hub_cache")
def test_a_damaged_image_of_a_source_is_named_by_row_and_column(tmp_path: Path) -> None:
    features = datasets.Features(image=datasets.Image(decode=False), text=datasets.Value("string"))
    rows = {"image": [{"bytes": b"not an image", "path": None}], "text": ["one"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    settings = DataSettings(source="parquet", files=["d.parquet"])
    with pytest.raises(UserError, match="parquet:1: unreadable image: image: cannot identify"):
        open_dataset(settings, tmp_path)


@pytest.mark.usefixtures("hub_cache")
def test_a_source_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"prompt": "a cat"}')
    options: dict[str, Any] = {"source": "json", "files": ["d.json"], "resolution": 32}
    with pytest.raises(UserError, match=r"no column 'image', only prompt; data.image_column=null"):
        open_dataset(DataSettings(**options), tmp_path)
    prompts = DataSettings(**options, image_column=None, prompt_column="prompt")
    assert open_dataset(prompts, tmp_path).prompts == ["a cat"]


@pytest.mark.usefixtures("hub_cache")
def test_a_source_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    settings = DataSettings(source="json", files=["gone.json"])
    with pytest.raises(UserError, match=r"cannot load data.source 'json'"):
        open_dataset(settings, tmp_path)


@pytest.fixture(autouse=True)
def logging_reaches_the_test(caplog: pytest.LogCaptureFixture) -> None:
    """Record warnings whatever the program set."""
    caplog.set_level(logging.WARNING, "diffdistill")

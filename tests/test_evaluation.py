"""Quality against steps: intervals, groups, learned measures, previews and samples."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from diffdistill.commands.evaluate import evaluate
from diffdistill.commands.preview import Comparison, compare, preview, verdict
from diffdistill.commands.sample import sample
from diffdistill.commands.sessions import models, open_session
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.evaluation.digits import real_digits
from diffdistill.evaluation.few_step import (
    EvaluateSettings,
    Group,
    at_once,
    confidence_interval,
    few_step,
    parse_settings,
)
from diffdistill.evaluation.groups import chosen_examples, make_groups, read_prompts
from diffdistill.evaluation.perceptual import ClipScore, FeatureDistance, PatchDistance
from diffdistill.sampling import encode_prompts
from diffdistill.session import Session, build
from diffdistill.types import Example
from tests.conftest import CPU, Towards
from tests.toy_run import make_data, toy_config, toy_values

DIGITS = {"metrics": "digits", "digit_prompt": "{number}", "num_images": 30, "num_seeds": 2}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


def write_config(data: Path, **sections: Any) -> str:
    values = {**toy_values(data), **sections}
    values["sample"] = {"size": [8, 8], **values.get("sample", {})}
    path = data.parent / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_confidence_interval_is_students_t() -> None:
    values = [0.3, 0.5, 0.4]
    mean, low, high = confidence_interval(values)
    expected = stats.t.interval(0.95, 2, loc=0.4, scale=stats.sem(values))
    assert (mean, low, high) == pytest.approx((0.4, *expected))
    assert confidence_interval([0.7, 0.7]) == pytest.approx((0.7, 0.7, 0.7))


def test_one_seed_has_no_interval() -> None:
    assert confidence_interval([0.5]) == (0.5, None, None)


def test_an_unknown_key_of_evaluate_is_an_error_with_a_hint() -> None:
    with pytest.raises(
        UserError, match=r"evaluate.num_seed: unknown key, did you mean 'num_seeds'"
    ):
        parse_settings({"num_seed": 3})
    with pytest.raises(UserError, match="metrics"):
        parse_settings({"metrics": ["fid"]})


def test_one_metric_may_stand_without_a_list() -> None:
    assert parse_settings({"metrics": "digits"}).metrics == ["digits"]


def test_about_four_megapixels_are_made_at_once() -> None:
    assert at_once((1024, 1024)) == 4
    assert at_once((16, 16)) == 64
    assert at_once((4096, 4096)) == 1


def make_session(data: Path) -> Session:
    return build(toy_config(data), CPU)


def test_rows_hold_the_mean_over_seeds_of_every_model_and_step_count(data: Path) -> None:
    session = make_session(data)
    calls: list[Tensor] = []

    def measure(pixels: Tensor) -> dict[str, float]:
        calls.append(pixels)
        return {"brightness": float(pixels.mean())}

    group = Group("all", encode_prompts(session, ["0", "1"], (8, 8)), (8, 8), 3, measure)
    settings = EvaluateSettings(num_steps=[1, 2], num_seeds=2)
    found = {"bright": Towards(0.75), "dark": Towards(0.25)}
    rows = list(few_step(session, found, [group], settings))
    assert [(row.model, row.num_steps) for row in rows] == [
        ("bright", 1),
        ("bright", 2),
        ("dark", 1),
        ("dark", 2),
    ]
    assert [row.mean for row in rows] == pytest.approx([0.75, 0.75, 0.25, 0.25])
    assert rows[0].seeds == [0, 1]
    assert rows[0].values == pytest.approx([0.75, 0.75])
    assert {tuple(pixels.shape) for pixels in calls} == {(6, 3, 8, 8)}


def test_real_digits_are_recognized_in_the_group_of_their_class(data: Path) -> None:
    session = make_session(data)
    settings = parse_settings({**DIGITS, "groups": {"old": [0, 1], "new": [8]}, "size": [8, 8]})
    old, new = make_groups(session, settings)
    assert (old.name, old.encoded.prompts) == ("old", ["0", "1"])
    scans = {label: real_digits([label])[0][:30] for label in (0, 1, 8)}
    right = old.measure(torch.cat([scans[0], scans[1]]))
    wrong = old.measure(torch.cat([scans[1], scans[0]]))
    assert right["accuracy"] == 1.0
    assert wrong["accuracy"] == 0.0
    assert right["frechet"] == pytest.approx(wrong["frechet"])
    assert new.measure(scans[8])["accuracy"] == 1.0


def test_a_frechet_distance_of_too_few_images_is_an_error(data: Path) -> None:
    settings = parse_settings({**DIGITS, "num_images": 2, "groups": {"new": [8]}, "size": [8, 8]})
    with pytest.raises(UserError, match=r"needs more than 24 images, not 1 x 2"):
        make_groups(make_session(data), settings)


def test_a_digit_prompt_must_tell_the_classes_apart(data: Path) -> None:
    settings = parse_settings({"metrics": "digits", "digit_prompt": "a digit", "size": [8, 8]})
    with pytest.raises(UserError, match=r"has no .word. and no .number."):
        make_groups(make_session(data), settings)


@pytest.mark.parametrize(
    ("metric", "key"),
    [("clip", "clip_path"), ("dino", "dino_path"), ("perceptual", "perceptual_path")],
)
def test_without_a_local_model_the_error_says_what_to_set(
    data: Path, metric: str, key: str
) -> None:
    with pytest.raises(UserError, match=rf"set evaluate.{key} to .*; nothing is downloaded"):
        make_groups(make_session(data), parse_settings({"metrics": metric}))


def test_nothing_to_measure_is_an_error(data: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.metrics is empty"):
        make_groups(make_session(data), EvaluateSettings())


def test_the_patch_distance_falls_to_zero_as_an_image_becomes_its_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    distance = PatchDistance.load(tmp_path, CPU)
    image, target = torch.rand(2, 1, 3, 32, 32)
    mixed = [float(distance(torch.lerp(image, target, s), target)) for s in (0.0, 0.5, 1.0)]
    assert mixed[0] > mixed[1] > mixed[2]
    assert mixed[2] == pytest.approx(0.0, abs=1e-6)


class Plain(nn.Sequential):
    """Thirty layers that change nothing, in the place of VGG16's."""

    def __init__(self) -> None:
        super().__init__(*[nn.Identity() for _ in range(30)])


def test_the_feature_distance_is_that_of_unit_length_features() -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (mean + std * torch.tensor([2.0, 0.0, 0.0])).view(1, 3, 1, 1).expand(-1, -1, 4, 4)
    target = (mean + std * torch.tensor([0.0, 3.0, 0.0])).view(1, 3, 1, 1).expand(-1, -1, 4, 4)
    distance = FeatureDistance(Plain())
    torch.testing.assert_close(distance(image, target), torch.tensor([5 * 2.0]))
    torch.testing.assert_close(distance(image, image), torch.tensor([0.0]))


def test_damaged_vgg_weights_are_one_line(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"evaluate.perceptual_path: cannot load"):
        FeatureDistance.load(tmp_path / "vgg.pth", CPU)


class FlatClip:
    """Sees an image's mean color, and reads three numbers."""

    visual = SimpleNamespace(image_size=(4, 4), image_mean=(0.0,) * 3, image_std=(1.0,) * 3)

    def eval(self) -> "FlatClip":
        return self

    def to(self, device: torch.device) -> "FlatClip":
        self.device = device
        return self

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return tokens


def read_colors(prompts: Sequence[str]) -> Tensor:
    return torch.tensor([[float(word) for word in prompt.split()] for prompt in prompts])


def test_the_clip_score_is_the_cosine_of_image_and_its_own_prompt() -> None:
    score = ClipScore(FlatClip(), read_colors)
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])[..., None, None].expand(2, 3, 8, 8)
    torch.testing.assert_close(
        score(images, ["1 0 0", "1 1 0"]), torch.tensor([1.0, 0.5**0.5]), atol=1e-5, rtol=0
    )


def test_measures_are_computed_on_the_device_they_are_given(tmp_path: Path) -> None:
    meta, images = torch.device("meta"), torch.rand(2, 3, 32, 32)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    distance = PatchDistance.load(tmp_path, meta)
    assert {p.device.type for p in distance.network.parameters()} == {"meta"}
    assert distance(images, images).device.type == "meta"
    assert FeatureDistance(Plain(), meta)(images, images).device.type == "meta"
    score = ClipScore(FlatClip(), read_colors, meta)
    assert score.network.device == meta
    assert score(images, ["1 0 0", "1 1 0"]).device.type == "meta"


@pytest.mark.parametrize(("metric", "name"), [("clip", "ClipScore"), ("dino", "PatchDistance")])
def test_models_of_metrics_are_loaded_on_the_device_of_the_session(
    data: Path, monkeypatch: pytest.MonkeyPatch, metric: str, name: str
) -> None:
    given: list[Any] = []

    class Loader:
        @classmethod
        def load(cls, *arguments: Any) -> Any:
            given.extend(arguments)
            return lambda images, others: torch.zeros(len(images))

    monkeypatch.setattr(f"diffdistill.evaluation.groups.{name}", Loader)
    session = make_session(data)
    path = str(data / "0.png")
    make_groups(session, EvaluateSettings(metrics=[metric], clip_path=path, dino_path=path))
    assert given[-1] is session.device


def test_an_architecture_that_would_be_downloaded_is_refused() -> None:
    with pytest.raises(UserError, match="no built-in OpenCLIP architecture"):
        ClipScore.load("hf-hub:someone/something", Path("weights.pt"), CPU)


def test_prompts_are_read_from_lines_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "b.jsonl").write_text('{"text": "a cat"}\n')
    assert read_prompts(tmp_path / "a.txt") == ["a cat", "a dog"]
    assert read_prompts(tmp_path / "b.jsonl") == ["a cat"]
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(tmp_path / "c.txt")


def test_evaluate_writes_rows_and_shows_them(data: Path, tmp_path: Path) -> None:
    config = write_config(data, evaluate={**DIGITS, "num_steps": [1, 2], "groups": {"new": [0]}})
    shown = evaluate(config, output=tmp_path / "out" / "evaluation.json")
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    keys = {(r["model"], r["num_steps"], r["metric"], r["group"]) for r in rows}
    assert keys == {
        (model, steps, metric, "new")
        for model in ("base", "student")
        for steps in (1, 2)
        for metric in ("accuracy", "frechet")
    }
    by_model = [[r["values"] for r in rows if r["model"] == m] for m in ("base", "student")]
    assert by_model[0] == by_model[1], "a LoRA student before training is the base"
    assert all(r["low"] <= r["mean"] <= r["high"] for r in rows)
    assert "2 steps" in shown
    assert "accuracy" in shown


def test_evaluate_names_the_suites_and_models_there_are(data: Path) -> None:
    config = write_config(data, evaluate={**DIGITS, "roles": ["studnt"]})
    with pytest.raises(UserError, match="no suite 'fid' for images and videos; there is few-step"):
        evaluate(config, suite="fid")
    with pytest.raises(UserError, match=r"no model 'studnt', did you mean 'student'\?"):
        evaluate(config)


def test_of_a_run_only_what_is_looked_at_can_be_overridden(data: Path) -> None:
    with pytest.raises(UserError, match="of a run, only data, sample, evaluate"):
        open_session(str(data), overrides=["train.lr=1"])
    with pytest.raises(UserError, match="has no checkpoint 'step-000002'"):
        open_session(write_config(data), "step-000002")


def test_models_need_a_name(data: Path) -> None:
    with pytest.raises(UserError, match="name at least one model"):
        models(make_session(data), [])


def test_sample_puts_one_block_of_columns_for_each_model(data: Path, tmp_path: Path) -> None:
    path = sample(
        write_config(data),
        prompts=["0.1", "0.2"],
        num_images=2,
        compare=["base", "student", "teacher"],
        output=tmp_path / "out.png",
        separate=True,
    )
    with Image.open(path) as grid:
        assert grid.width == 6 * (96 + 4) + 4
        assert grid.height == 3 * 17 + 2 * (17 + 96 + 4) + 4
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert len(files) == 12
    assert files[0] == "000-0-1-00-base.png"
    with Image.open(tmp_path / "out" / files[0]) as image:
        assert image.size == (8, 8)


def test_sample_takes_distinct_prompts_of_the_data(data: Path, tmp_path: Path) -> None:
    path = sample(write_config(data, sample={"num_steps": 1}), output=tmp_path / "out.png")
    with Image.open(path) as grid:
        assert grid.height == 2 * 17 + 8 * (17 + 96 + 4) + 4


def test_chosen_examples_are_spread_over_the_commonest_size() -> None:
    class Dataset(list[Example]):
        buckets = [(8, 8), (4, 4), (8, 8), (8, 8), (8, 8)]

    dataset = Dataset(Example(str(index)) for index in range(5))
    assert [e.prompt for e in chosen_examples(dataset, 2)] == ["0", "3"]  # type: ignore[arg-type]
    assert [e.prompt for e in chosen_examples(dataset, 9)] == ["0", "2", "3", "4"]  # type: ignore[arg-type]


def gray_session(network_factor: float) -> tuple[Session, list[Example]]:
    """Return a session whose teacher adds ``network_factor`` times what it sees of the target."""
    values = {
        "family": {"name": "toy"},
        "method": {"name": "d-opsd", "num_steps": 1},
        "data": {"path": "unused"},
    }
    session = build(parse_config(values), CPU)
    for role in session.roles.by_name.values():
        role.network.factors.data = torch.tensor([1.0, 0.0, network_factor])  # type: ignore[union-attr, operator]
    return session, [Example("0", image=torch.full((3, 4, 4), level)) for level in (0.5, 0.75)]


def test_preview_measures_both_sides_against_the_target() -> None:
    session, examples = gray_session(-1.0)
    comparisons = compare(session, examples, seed=0)
    assert [c.teacher for c in comparisons] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert [c.student for c in comparisons] == pytest.approx([0.25, 0.5625])
    assert "there is something to learn" in verdict(comparisons)
    assert "closer in 2/2" in verdict(comparisons)


def test_preview_warns_when_the_teacher_is_no_better() -> None:
    session, examples = gray_session(0.0)
    told = verdict(compare(session, examples, seed=0))
    assert told.startswith("WARNING: the teacher, shown the target, is not clearly closer")
    assert "D-OPSD cannot work with this view" in told


def test_preview_goes_by_the_mean_and_counts_the_examples() -> None:
    image = torch.zeros(3, 3, 4, 4)
    mixed = [Comparison("a", image, 0.2, 0.1), Comparison("b", image, 0.2, 0.5)]
    assert verdict(mixed).startswith("WARNING")
    assert "0.3 against 0.2, closer in 1/2" in verdict(mixed)


def test_preview_wants_more_than_a_hair_between_teacher_and_student() -> None:
    image = torch.zeros(3, 3, 4, 4)
    assert verdict([Comparison("a", image, 0.2, 0.199)]).startswith("WARNING")
    assert verdict([Comparison("a", image, 0.2, 0.18)]).startswith("The teacher")


def test_preview_writes_a_picture_and_a_table(data: Path, tmp_path: Path) -> None:
    text = preview(write_config(data), num_examples=3, output=tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as grid:
        assert grid.height == 2 * 17 + 3 * (17 + 96 + 4) + 4
    assert "teacher MSE" in text
    assert str(tmp_path / "p.png") in text


def test_preview_of_prompts_alone_is_an_error() -> None:
    session, _ = gray_session(0.0)
    with pytest.raises(UserError, match="preview needs data with images"):
        compare(session, [Example("0", size=(4, 4))], seed=0)

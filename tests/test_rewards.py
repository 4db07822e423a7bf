import inspect
import math
import weakref
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import catalog
from diffdistill.errors import UserError
from diffdistill.options import options_model
from diffdistill.rewarding import Reward, as_video
from diffdistill.rewards.digits_video import (
    DIRECTIONS,
    SPEEDS,
    DigitsVideo,
    DigitsVideoNetworks,
    parse_caption,
)
from diffdistill.verifying import AnswerReward
from tests.conftest import CPU, randn

PROMPTS = ["a seven moving right, fast", "an eight moving up, slowly", "a zero moving left, fast"]


class Quadratic(Reward):
    """Two axes with known gradients."""

    axes = ("brightness", "contrast")

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        weight = torch.tensor([float(len(prompt)) for prompt in prompts])
        flat = pixels.flatten(1)
        return {"contrast": flat.square().sum(1), "brightness": weight * flat.sum(1)}


def videos(*, seed: int = 0, size: tuple[int, ...] = (3, 5, 3, 8, 6)) -> Tensor:
    return randn(*size, seed=seed).mul(0.15).add(0.5).clamp(0.05, 0.95)


def digits_video(folder: Path) -> DigitsVideo:
    torch.manual_seed(0)
    networks = DigitsVideoNetworks(4)
    networks.save(folder, {"visual": (0.5, 2.0), "motion": (-1.0, 0.5), "text": (-2.0, 1.0)})
    return DigitsVideo(device=CPU, path=str(folder))


def assert_gradient_is_the_slope(
    reward: Any, pixels: Tensor, prompts: Sequence[str], *, eps: float, rtol: float = 1e-3
) -> None:
    """Compare each axis's directional derivative with a central difference."""
    pixels = pixels.double()
    direction = randn(*pixels.shape, seed=9, dtype=torch.float64)
    leaf = pixels.clone().requires_grad_()
    scores = reward.score(leaf, prompts)
    with torch.no_grad():
        above = reward.score(pixels + eps * direction, prompts)
        below = reward.score(pixels - eps * direction, prompts)
    for axis in reward.axes:
        (gradient,) = torch.autograd.grad(scores[axis].sum(), leaf, retain_graph=True)
        slope = (above[axis] - below[axis]) / (2 * eps)
        told = (gradient * direction).flatten(1).sum(1)
        assert slope.abs().max() > 0
        torch.testing.assert_close(told, slope.to(told), rtol=rtol, atol=rtol * float(slope.abs().max()))  # fmt: skip # noqa: E501


def test_z_scores_use_the_given_statistics_and_0_and_1_without_any() -> None:
    reward = Quadratic(device=CPU, statistics={"contrast": (2.0, 4.0)})
    scores = {"brightness": torch.tensor([3.0]), "contrast": torch.tensor([10.0])}
    assert reward.normalized(scores) == {"brightness": 3.0, "contrast": 2.0}


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"sharpness": (0.0, 1.0)}, "Quadratic: statistics: no axis 'sharpness'; it has bright"),
        ({"contrast": (0.0, 0.0)}, r"statistics.contrast: mean 0.0 and standard deviation 0.0"),
        ({"contrast": (math.nan, 1.0)}, r"statistics.contrast: mean nan"),
    ],
)
def test_statistics_of_no_axis_or_without_spread_are_an_error(
    statistics: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Quadratic(device=CPU, statistics=statistics)


@pytest.mark.parametrize(("micro_batch", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3])])
def test_the_saliency_is_taken_in_micro_batches(micro_batch: int, sizes: list[int]) -> None:
    reward = Quadratic(device=CPU)
    whole = reward.saliency(videos(), PROMPTS, micro_batch=3)
    score, asked = reward.score, list[int]()

    def spied(pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        asked.append(len(pixels))
        return score(pixels, prompts)

    reward.score = spied  # type: ignore[method-assign]
    found = reward.saliency(videos(), PROMPTS, micro_batch=micro_batch)
    assert asked == sizes
    for axis in reward.axes:
        torch.testing.assert_close(found[axis], whole[axis])


def test_the_saliency_is_the_norm_over_channels_of_the_raw_scores_gradient() -> None:
    reward = Quadratic(device=CPU, statistics={"contrast": (2.0, 4.0)})
    pixels = videos()
    saliency = reward.saliency(pixels, PROMPTS)
    torch.testing.assert_close(saliency["contrast"], 2 * pixels.norm(dim=2))
    lengths = torch.tensor([float(len(prompt)) for prompt in PROMPTS])
    expected = (lengths * math.sqrt(3))[:, None, None, None].expand(3, 5, 8, 6)
    torch.testing.assert_close(saliency["brightness"], expected)


def test_judging_calls_the_network_once_a_micro_batch_and_shares_it_between_axes() -> None:
    reward = Quadratic(device=CPU)
    reward.judge(videos(), PROMPTS, saliency=True, micro_batch=2)
    assert reward.calls == 2


@pytest.mark.parametrize("saliency", [True, False])
def test_a_judgment_is_the_same_in_any_micro_batch_and_a_constant(saliency: bool) -> None:
    reward = Quadratic(device=CPU, statistics={"contrast": (2.0, 4.0)})
    pixels = videos().requires_grad_()
    whole = reward.judge(pixels, PROMPTS, saliency=saliency, micro_batch=8)
    parts = reward.judge(pixels, PROMPTS, saliency=saliency, micro_batch=1)
    assert list(whole.scores) == list(reward.axes)
    assert list(whole.saliency) == (list(reward.axes) if saliency else [])
    for one, other in zip(whole, parts, strict=True):
        for axis in one:
            torch.testing.assert_close(one[axis], other[axis])
            assert not one[axis].requires_grad
    torch.testing.assert_close(
        whole.scores["contrast"], (pixels.detach().square().flatten(1).sum(1) - 2.0) / 4.0
    )


def test_judging_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        judged = Quadratic(device=CPU).judge(videos(), PROMPTS, saliency=True, micro_batch=1)
    assert judged.saliency["contrast"].shape == (3, 5, 8, 6)


def test_one_graph_is_alive_at_a_time() -> None:
    kept: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            kept.append(weakref.ref(self))

    class Tracked(Quadratic):
        def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
            alive.append(sum(saved() is not None for saved in kept))
            return super().score(pixels, prompts)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        Tracked(device=CPU).judge(videos(), PROMPTS, saliency=True, micro_batch=1)
    assert alive == [0, 0, 0]
    assert kept


def test_an_image_is_a_video_of_one_frame() -> None:
    images = videos()[:, 0]
    judged = Quadratic(device=CPU).judge(images, PROMPTS, saliency=True, micro_batch=2)
    assert judged.saliency["contrast"].shape == (3, 1, 8, 6)
    with pytest.raises(ValueError, match=r"expected videos .* got \[3, 8, 6\]"):
        as_video(images[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_an_error_with_reward_axis_and_prompt(bad: float) -> None:
    pixels = videos()
    pixels[1, 0, 0, 0, 0] = bad
    reward = Quadratic(device=CPU)
    for saliency in (True, False):
        with pytest.raises(
            UserError, match=r"Quadratic: axis 'brightness': its score .* 'an eight moving up, slow"
        ):
            reward.judge(pixels, PROMPTS, saliency=saliency, micro_batch=2)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    class Root(Quadratic):
        axes = ("contrast",)

        def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
            return {"contrast": (pixels - 0.5).square().flatten(1).sum(1).sqrt()}

    pixels = torch.full((1, 2, 3, 4, 4), 0.5)
    assert Root(device=CPU).judge(pixels, ["x"], saliency=False, micro_batch=1).scores
    with pytest.raises(UserError, match="Root: axis 'contrast': the gradient of its score is not"):
        Root(device=CPU).judge(pixels, ["x"], saliency=True, micro_batch=1)


def test_an_axis_without_a_gradient_has_scores_but_no_saliency() -> None:
    class Blind(Quadratic):
        def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
            scores = super().score(pixels, prompts)
            return {**scores, "brightness": torch.ones(len(prompts))}

    assert Blind(device=CPU).judge(videos(), PROMPTS, saliency=False, micro_batch=3).scores
    with pytest.raises(UserError, match="'brightness' is not differentiable"):
        Blind(device=CPU).judge(videos(), PROMPTS, saliency=True, micro_batch=3)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"brightness": torch.ones(3)}, "score returned brightness, without the axis 'contrast'"),
        (
            {"brightness": torch.ones(3), "contrast": torch.ones(3, 1)},
            r"axis 'contrast' has shape \[3, 1\], not \[B\]",
        ),
    ],
)
def test_scores_that_are_no_scores_of_the_axes_are_an_error(
    scores: dict[str, Tensor], message: str
) -> None:
    class Wrong(Quadratic):
        def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
            return scores

    with pytest.raises(UserError, match=message):
        Wrong(device=CPU).judge(videos(), PROMPTS, saliency=False, micro_batch=3)


def test_as_many_prompts_as_samples_are_needed() -> None:
    with pytest.raises(ValueError, match="3 samples, but 1 prompts"):
        Quadratic(device=CPU).judge(videos(), ["x"], saliency=False, micro_batch=1)


@pytest.mark.parametrize("name", sorted(catalog.REWARDS))
def test_every_reward_is_a_reward_whose_options_are_documented(name: str) -> None:
    reward = catalog.load("reward", name)
    assert issubclass(reward, Reward | AnswerReward)
    assert not reward.__abstractmethods__
    if issubclass(reward, Reward):
        assert isinstance(reward.axes, tuple)
        assert set(reward.default_statistics) <= set(reward.axes)
    options = options_model(reward).model_fields
    assert {f.name for f in fields(reward)} - set(options) == {"device"}
    assert [key for key, option in options.items() if not option.description] == []
    module = inspect.getmodule(reward)
    assert module is not None
    assert "Source: " in (module.__doc__ or "")


def test_a_users_reward_is_taken_from_a_file_only_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "my_reward.py"
    file.write_text(
        "from diffdistill.rewarding import Reward\n"
        "class Bright(Reward):\n"
        "    axes = ('bright',)\n"
        "    def score(self, pixels, prompts):\n"
        "        return {'bright': pixels.mean(dim=(1, 2, 3, 4))}\n"
        "class NoAxes(Reward):\n"
        "    def score(self, pixels, prompts):\n"
        "        return {}\n"
        "class NoScore(Reward):\n"
        "    axes = ('a',)\n"
        "class Other:\n"
        "    pass\n"
    )
    bright = catalog.load("reward", f"{file}:Bright")
    assert bright is catalog.load("reward", f"{file}:Bright")
    judged = bright(device=CPU).judge(videos(), PROMPTS, saliency=True, micro_batch=1)
    torch.testing.assert_close(judged.scores["bright"], videos().mean(dim=(1, 2, 3, 4)))
    for name, message in {
        "Absent": "there is no Absent in it; its classes: Bright, NoAxes, NoScore, Other",
        "Other": "Other must be a subclass of diffdistill.rewarding.Reward",
        "NoScore": "it must define score",
        "NoAxes": "it must name its axes",
    }.items():
        with pytest.raises(UserError, match=message):
            catalog.load("reward", f"{file}:{name}")


def test_a_file_that_is_missing_or_broken_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.py:X: there is no file .*absent.py"):
        catalog.load("reward", f"{tmp_path}/absent.py:X")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"broken.py:X: cannot run .*No module named"):
            catalog.load("reward", f"{tmp_path}/broken.py:X")
    with pytest.raises(UserError, match="unknown reward 'clop', did you mean 'clip'"):
        catalog.load("reward", "clop")


@pytest.mark.parametrize(
    ("caption", "meaning"),
    [
        ("a seven moving right, fast", (7, "right", "fast")),
        ("An eight moving up, slowly", (8, "up", "slowly")),
        ("a zero  moving left slowly", (0, "left", "slowly")),
    ],
)
def test_a_caption_names_digit_direction_and_speed(
    caption: str, meaning: tuple[int, str, str]
) -> None:
    assert parse_caption(caption) == meaning


@pytest.mark.parametrize(
    "caption", ["", "a cat", "a ten moving up, fast", "a seven moving away, fast", "seven up fast"]
)
def test_a_caption_that_cannot_be_read_is_an_error_that_shows_one(caption: str) -> None:
    with pytest.raises(UserError, match=r"cannot read the caption .*'a seven moving right, fast'"):
        parse_caption(caption)


def test_the_captions_of_the_moving_digits_are_read_as_they_were_written() -> None:
    from diffdistill.evaluation.moving_digits import caption

    for digit in range(10):
        for direction in DIRECTIONS:
            for speed in SPEEDS:
                assert parse_caption(caption(digit, direction, speed)) == (digit, direction, speed)


def test_digits_video_scores_what_the_caption_names(tmp_path: Path) -> None:
    reward = digits_video(tmp_path)
    pixels = videos(size=(3, 17, 3, 16, 16))
    logits = reward.networks(pixels)
    scores = reward.score(pixels, PROMPTS)
    assert [part.shape for part in logits] == [(3,), (3, 4), (3, 2), (3, 10)]
    for row, (digit, direction, speed) in enumerate(map(parse_caption, PROMPTS)):
        motion = (
            logits.direction[row].log_softmax(0)[DIRECTIONS.index(direction)]
            + logits.speed[row].log_softmax(0)[SPEEDS.index(speed)]
        )
        torch.testing.assert_close(scores["motion"][row], motion)
        torch.testing.assert_close(scores["text"][row], logits.digit[row].log_softmax(0)[digit])
    assert torch.equal(scores["visual"], logits.visual)
    assert reward.statistics["motion"] == (-1.0, 0.5)


@pytest.mark.parametrize("num_frames", [1, 2, 17, 40])
def test_digits_video_takes_any_length(tmp_path: Path, num_frames: int) -> None:
    reward = digits_video(tmp_path)
    pixels = videos(size=(2, num_frames, 3, 16, 16))
    judged = reward.judge(pixels, PROMPTS[:2], saliency=True, micro_batch=1)
    assert judged.saliency["visual"].shape == (2, num_frames, 16, 16)


def test_digits_video_sees_the_same_at_every_place_of_the_torus(tmp_path: Path) -> None:
    reward = digits_video(tmp_path)
    pixels = videos(size=(3, 5, 3, 16, 16))
    moved = pixels.roll((4, -8), dims=(3, 4))
    for one, other in zip(reward.networks(pixels), reward.networks(moved), strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_digits_video_is_its_slope(tmp_path: Path) -> None:
    reward = digits_video(tmp_path)
    reward.networks.double()
    assert_gradient_is_the_slope(
        reward, videos(size=(3, 6, 3, 16, 16)), PROMPTS, eps=1e-4, rtol=1e-6
    )


def test_no_gradient_reaches_the_networks_of_digits_video(tmp_path: Path) -> None:
    reward = digits_video(tmp_path)
    reward.judge(videos(size=(3, 5, 3, 16, 16)), PROMPTS, saliency=True, micro_batch=2)
    assert_frozen(reward.networks)


def assert_frozen(network: nn.Module) -> None:
    assert not network.training
    for parameter in network.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_digits_video_without_its_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load .*config.json"):
        DigitsVideo(device=CPU, path=str(tmp_path))
    digits_video(tmp_path)
    (tmp_path / "config.json").write_text('{"width": 5, "statistics": {}}')
    with pytest.raises(UserError, match=r"digits-video: cannot load .*size mismatch"):
        DigitsVideo(device=CPU, path=str(tmp_path))


def test_half_precision_pixels_are_judged_in_full_precision() -> None:
    pixels = videos().bfloat16()
    judged = Quadratic(device=CPU).judge(pixels, PROMPTS, saliency=True, micro_batch=3)
    assert judged.saliency["contrast"].dtype == torch.float32
    torch.testing.assert_close(judged.saliency["contrast"], 2 * pixels.float().norm(dim=2))

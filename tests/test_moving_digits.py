"""Digits that move over a torus: what their captions say is what they do, and the judge sees it."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffdistill.bundled import bundled
from diffdistill.evaluation.moving_digits import (
    HEADINGS,
    PACES,
    SIZE,
    MovingDigitsJudge,
    captions,
    centered,
    centers,
    film,
    grey,
    held_out_captions,
    moving_digits,
    put_on_torus,
    scans,
    steps_of,
)
from diffdistill.rewards.digits_video import parse_caption


@pytest.fixture(scope="module")
def judge() -> MovingDigitsJudge:
    return MovingDigitsJudge()


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, list[str]]:
    return moving_digits(240, seed=21, held_out=True)


def phase_correlation(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The whole pixels ``(x, y)`` by which an image ``[H, W]`` was rolled to give another."""
    cross = torch.fft.fft2(second) * torch.fft.fft2(first).conj()
    peak = int(torch.fft.ifft2(cross / (cross.abs() + 1e-9)).real.argmax())
    rows, columns = divmod(peak, SIZE)
    return tuple((place + SIZE // 2) % SIZE - SIZE // 2 for place in (columns, rows))  # type: ignore[return-value]


def corrupted(videos: Tensor, amount: float) -> Tensor:
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(4))
    return (videos + amount * noise).clamp(0, 1)


def test_there_are_eighty_captions_and_all_can_be_read() -> None:
    named = {parse_caption(text) for text in captions()}
    assert len(named) == 80
    assert {direction for _, direction, _ in named} == set(HEADINGS)
    assert {speed for _, _, speed in named} == set(PACES)


def test_the_held_out_captions_have_every_digit_and_two_of_each_motion() -> None:
    named = [parse_caption(text) for text in held_out_captions()]
    assert len(set(named)) == 16
    assert {digit for digit, _, _ in named} == set(range(10))
    motions = [motion for _, *motion in named]
    assert all(motions.count(motion) == 2 for motion in motions)


def test_the_bundled_prompts_are_the_captions_in_two_parts() -> None:
    lists = [
        [json.loads(line)["text"] for line in bundled("data", name).read_text().splitlines()]
        for name in ("moving-digits-prompts.jsonl", "moving-digits-held-out.jsonl")
    ]
    assert lists[1] == held_out_captions()
    assert sorted(lists[0] + lists[1]) == sorted(captions())


def test_the_same_seed_gives_the_same_videos_and_another_seed_others() -> None:
    videos, texts = moving_digits(6, 5, seed=3)
    again, same_texts = moving_digits(6, 5, seed=3)
    others, _ = moving_digits(6, 5, seed=4)
    assert videos.shape == (6, 5, 3, SIZE, SIZE)
    assert videos.min() >= 0
    assert videos.max() <= 1
    assert torch.equal(videos, again)
    assert texts == same_texts
    assert not torch.equal(videos, others)


def test_a_longer_video_continues_a_shorter_one() -> None:
    short, _ = moving_digits(4, 3, seed=3)
    long, _ = moving_digits(4, 200, seed=3)
    torch.testing.assert_close(long[:, :3], short)
    assert long.shape[1] == 200


def test_each_caption_comes_once_before_any_comes_again() -> None:
    _, texts = moving_digits(200, 1, seed=5)
    assert sorted(texts[:80]) == sorted(captions())
    assert sorted(texts[80:160]) == sorted(captions())


def test_training_and_held_out_scans_are_all_scans_in_two_parts() -> None:
    trained, labels = scans(held_out=False)
    kept, kept_labels = scans(held_out=True)
    assert len(trained) + len(kept) == 1797
    distances = torch.cdist(trained.flatten(1), kept.flatten(1))
    assert distances.min() > 0
    for digit in range(10):
        share = (kept_labels == digit).sum() / (
            (labels == digit).sum() + (kept_labels == digit).sum()
        )
        assert 0.22 < share < 0.26


def test_whole_steps_roll_the_canvas_and_nothing_is_lost_at_its_edges() -> None:
    images, _ = scans(held_out=True)
    offsets = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [-7.0, 12.0], [16.0, -32.0]]])
    frames = put_on_torus(images[:1], offsets)[0]
    torch.testing.assert_close(frames[0, 4:12, 4:12], images[0], atol=1e-5, rtol=0)
    rolled = [frames[0].roll((int(y), int(x)), (0, 1)) for x, y in offsets[0]]
    torch.testing.assert_close(frames, torch.stack(rolled), atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", HEADINGS)
@pytest.mark.parametrize("speed", PACES)
def test_the_motion_is_what_the_caption_says(direction: str, speed: str) -> None:
    frames = grey(
        film([f"a {digit} moving {direction}, {speed}" for digit in ("two", "six")], 9, 7)
    )
    for video in frames:
        move = phase_correlation(video[0], video[6])
        assert move == tuple(6 * PACES[speed] * part for part in HEADINGS[direction])


def test_the_center_is_found_on_the_torus_and_an_even_background_does_not_move_it() -> None:
    blob = torch.zeros(1, 1, SIZE, SIZE)
    blob[0, 0, 3, 15] = blob[0, 0, 3, 1] = 1.0  # around column 0, row 3
    torch.testing.assert_close(
        centers(0.2 + blob)[0, 0].add(0.5).remainder(SIZE), torch.tensor([0.5, 3.5])
    )
    assert centered(blob, centers(blob))[0, 0, 8].nonzero().flatten().tolist() == [7, 9]


def test_measured_steps_are_the_filmed_ones() -> None:
    videos, texts = moving_digits(80, 20, seed=9)
    for move, text in zip(steps_of(grey(videos)).mean(dim=1), texts, strict=True):
        _, direction, speed = parse_caption(text)
        named = torch.tensor(HEADINGS[direction]) * PACES[speed]
        torch.testing.assert_close(move, named, atol=0.02, rtol=0)


def test_the_judge_agrees_with_captions_of_real_videos_only(
    judge: MovingDigitsJudge, real: tuple[Tensor, list[str]]
) -> None:
    videos, texts = real
    right = judge.accuracy(videos, texts)
    assert right["digit"] > 0.98
    assert right["motion"] == 1
    wrong = judge.accuracy(videos.flip(1), texts)
    assert wrong["direction"] == 0
    assert wrong["speed"] == 1
    still = judge.accuracy(videos[:, :1].expand_as(videos), texts)
    assert still["speed"] == 0


def test_the_frechet_distance_of_real_videos_is_small_and_grows_with_corruption(
    judge: MovingDigitsJudge, real: tuple[Tensor, list[str]]
) -> None:
    videos, texts = real
    distances = [judge.frechet(corrupted(videos, amount), texts) for amount in (0, 0.1, 0.2, 0.4)]
    assert distances[0] < 0.35
    assert distances == sorted(distances)
    assert distances[-1] > 4 * distances[0]
    soft = functional.avg_pool2d(videos.flatten(0, 1), 3, stride=1, padding=1).view_as(videos)
    assert judge.frechet(soft, texts) > 2 * distances[0]
    still = videos[:, :1].expand_as(videos).lerp(videos, 0.05)
    assert judge.frechet(still, texts) > 2 * distances[0]


def test_the_frechet_distance_does_not_depend_on_where_the_digit_is(
    judge: MovingDigitsJudge, real: tuple[Tensor, list[str]]
) -> None:
    videos, texts = real
    moved = videos.roll((5, -3), (-2, -1))
    assert judge.frechet(moved, texts) == pytest.approx(judge.frechet(videos, texts), rel=1e-3)


def test_flicker_is_one_for_real_videos_and_more_for_uneven_ones(
    judge: MovingDigitsJudge, real: tuple[Tensor, list[str]]
) -> None:
    videos, texts = real
    assert judge.flicker(videos, texts) == pytest.approx(1, abs=0.05)
    brightness = 1 - 0.5 * (torch.arange(videos.shape[1]) % 2).view(1, -1, 1, 1, 1)
    assert judge.flicker(videos * brightness, texts) > 1.2
    assert judge.flicker(videos[:, :1].expand_as(videos), texts) == 0


def test_drift_is_small_for_real_videos_and_positive_for_ones_that_fade(
    judge: MovingDigitsJudge,
) -> None:
    texts = captions() * 2
    videos = film(texts, 51, seed=13, held_out=True)
    assert abs(judge.drift(videos, texts)) < 0.1
    fading = torch.linspace(1, 0.4, 51).view(1, -1, 1, 1, 1)
    assert judge.drift(videos * fading, texts) > 0.3
    assert judge.drift(videos * fading.flip(1), texts) < -0.3

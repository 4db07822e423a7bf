import pytest
import torch

from diffdistill.readouts import GuidanceForm, clean, clean_of, guided, guided_clean, per_sample
from diffdistill.types import Condition, State
from tests.conftest import Spy, make_toy, randn


def times(state: State, condition: Condition) -> torch.Tensor:
    """Return a velocity that tells the two conditions apart."""
    return condition["factor"] * state.x


POSITIVE, NEGATIVE = {"factor": 3.0}, {"factor": -1.0}


def test_clean_of_undoes_noise_at_every_noise_level() -> None:
    data, noise = randn(4, 3, 2, 2, seed=0), randn(4, 3, 2, 2, seed=1)
    state = make_toy().noise(data, torch.tensor([0.0, 0.3, 0.7, 1.0]), noise)
    torch.testing.assert_close(clean_of(state, noise - data), data)


def test_noise_is_data_at_zero_and_noise_at_one() -> None:
    data, noise = randn(2, 3, 2, 2, seed=2), randn(2, 3, 2, 2, seed=3)
    state = make_toy().noise(data, torch.tensor([0.0, 1.0]), noise)
    assert torch.equal(state.x[0], data[0])
    assert torch.equal(state.x[1], noise[1])


def test_clean_asks_the_model_once_and_passes_its_gradient_times_minus_t() -> None:
    velocity = randn(2, 1, 1, 1, seed=4).requires_grad_()
    state = State(randn(2, 1, 1, 1, seed=5), torch.tensor([0.25, 1.0]))
    spy = Spy(lambda _state, _condition: velocity)
    clean(spy, state, {}).sum().backward()
    assert len(spy.states) == 1
    assert velocity.grad is not None
    assert velocity.grad.flatten().tolist() == [-0.25, -1.0]


def test_per_sample_scales_each_frame_where_frames_differ() -> None:
    like, values = torch.ones(2, 3, 4, 1, 2), torch.arange(8.0).reshape(2, 4)
    scaled = per_sample(values, like) * like
    assert scaled.shape == like.shape
    for sample in range(2):
        for frame in range(4):
            assert (scaled[sample, :, frame] == values[sample, frame]).all()


def test_per_sample_scales_rows_and_nothing_else() -> None:
    like = torch.ones(2, 3, 4, 5, 6)
    scaled = per_sample(torch.tensor([2.0, 5.0]), like) * like
    assert scaled.shape == like.shape
    assert (scaled[0] == 2.0).all()
    assert (scaled[1] == 5.0).all()


@pytest.mark.parametrize(
    ("scale", "form", "expected"),
    [
        (1.0, "standard", 3.0),
        (0.0, "standard", -1.0),
        (4.0, "standard", 15.0),  # -1 + 4 (3 + 1)
        (0.0, "extra", 3.0),
        (3.0, "extra", 15.0),  # 3 + 3 (3 + 1)
    ],
)
def test_guidance_moves_from_the_negative_through_the_positive(
    scale: float, form: GuidanceForm, expected: float
) -> None:
    assert guided(torch.tensor(3.0), torch.tensor(-1.0), scale, form).item() == expected


def test_extra_guidance_equals_standard_guidance_of_one_more() -> None:
    positive, negative = randn(8, seed=6), randn(8, seed=7)
    for scale in (0.0, 1.5, 3.0):
        extra = guided(positive, negative, scale, "extra")
        assert torch.equal(extra, guided(positive, negative, scale + 1.0, "standard"))
        torch.testing.assert_close(extra, positive + scale * (positive - negative))


def test_guided_clean_guides_the_velocity_before_reading_it_out() -> None:
    state = State(randn(2, 1, 2, 2, seed=8), torch.tensor([0.5, 0.2]))
    read = guided_clean(times, state, POSITIVE, NEGATIVE, scale=4.0)
    torch.testing.assert_close(read, state.x - per_sample(state.t, state.x) * 15.0 * state.x)


@pytest.mark.parametrize(("form", "neutral"), [("standard", 1.0), ("extra", 0.0)])
def test_neutral_guidance_is_one_call_under_the_prompt(form: GuidanceForm, neutral: float) -> None:
    state = State(randn(1, 1, 2, 2, seed=9), torch.tensor([0.5]))
    spy = Spy(times)
    read = guided_clean(spy, state, POSITIVE, NEGATIVE, scale=neutral, form=form)
    assert spy.conditions == [POSITIVE]
    torch.testing.assert_close(read, -0.5 * state.x)


@pytest.mark.parametrize(("form", "scale"), [("standard", 0.0), ("extra", 1.0)])
def test_any_other_guidance_asks_under_both_prompts(form: GuidanceForm, scale: float) -> None:
    state = State(randn(1, 1, 2, 2, seed=10), torch.tensor([0.5]))
    spy = Spy(times)
    guided_clean(spy, state, POSITIVE, NEGATIVE, scale=scale, form=form)
    assert spy.conditions == [POSITIVE, NEGATIVE]

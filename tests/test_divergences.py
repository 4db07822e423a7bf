import math

import pytest
import torch

from diffdistill.divergences import along, masked_mean, matching_direction, mse, softplus_gan
from tests.conftest import randn


def test_mse_is_the_squared_difference_of_each_entry() -> None:
    error = mse(torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0, -2.5]]))
    assert error.tolist() == [[9.0, 0.25]]


def test_mse_gives_the_student_twice_the_difference_and_the_teacher_nothing() -> None:
    student = randn(3, 4, seed=0).requires_grad_()
    teacher = randn(3, 4, seed=1).requires_grad_()
    mse(student, teacher).sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach())


def test_mse_of_half_precision_is_taken_in_float32() -> None:
    student = torch.tensor([300.0], dtype=torch.float16)
    error = mse(student, torch.zeros(1, dtype=torch.float16))
    assert error.dtype == torch.float32
    assert error.item() == 90000.0  # overflows float16


def brute_direction(
    sample: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Eq. 7 of DMD in x0 space, one number at a time."""
    rows = []
    for x, r, f in zip(sample.tolist(), real.tolist(), fake.tolist(), strict=True):
        scale = sum(abs(a - b) for a, b in zip(x, r, strict=True)) / len(x) + epsilon
        rows.append([(b - a) / scale for a, b in zip(r, f, strict=True)])
    return torch.tensor(rows, dtype=sample.dtype)


def distribution_matching(
    sample: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, epsilon: float = 0.0
) -> torch.Tensor:
    """DMD's loss map."""
    return along(sample, matching_direction(sample, real, fake, epsilon=epsilon))


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_distribution_matching_has_the_gradient_of_dmd(epsilon: float) -> None:
    sample, real, fake = (randn(3, 5, seed=s, dtype=torch.float64) for s in (0, 1, 2))
    sample.requires_grad_()
    error = distribution_matching(sample, real, fake, epsilon=epsilon)
    error.sum().backward()
    expected = brute_direction(sample.detach(), real, fake, epsilon)
    torch.testing.assert_close(sample.grad, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(error.detach(), 0.5 * expected.square(), rtol=1e-9, atol=1e-12)


def test_distribution_matching_moves_the_sample_from_fake_to_real() -> None:
    sample = torch.zeros(1, 2, requires_grad=True)
    real, fake = torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])
    distribution_matching(sample, real, fake).sum().backward()
    assert sample.grad is not None
    moved = sample - 0.1 * sample.grad
    assert moved.tolist() == pytest.approx([pytest.approx([0.2, -0.2])])


def test_distribution_matching_does_not_depend_on_the_scale_of_a_sample() -> None:
    sample, real, fake = (randn(2, 6, seed=s, dtype=torch.float64) for s in (3, 4, 5))
    scale = torch.tensor([[1.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(
        distribution_matching(scale * sample, scale * real, scale * fake),
        distribution_matching(sample, real, fake),
    )


def test_distribution_matching_normalizes_over_all_axes_of_a_sample() -> None:
    sample, real, fake = (randn(2, 3, 4, 4, seed=s) for s in (6, 7, 8))
    torch.testing.assert_close(
        distribution_matching(sample, real, fake).flatten(1),
        distribution_matching(sample.flatten(1), real.flatten(1), fake.flatten(1)),
    )


@pytest.mark.parametrize("fake", [0.0, 1.0], ids=["0/0", "1/0"])
def test_distribution_matching_counts_a_division_by_zero_as_nothing(fake: float) -> None:
    sample = torch.zeros(1, 3, requires_grad=True)
    error = distribution_matching(sample, torch.zeros(1, 3), torch.full((1, 3), fake))
    error.sum().backward()
    assert error.tolist() == [[0.0, 0.0, 0.0]]
    assert sample.grad is not None
    assert sample.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_distribution_matching_gives_no_gradient_to_the_scores() -> None:
    sample, real, fake = (randn(2, 3, seed=s).requires_grad_() for s in (9, 10, 11))
    distribution_matching(sample, real, fake).sum().backward()
    assert real.grad is None
    assert fake.grad is None
    assert sample.grad is not None


def test_masked_mean_divides_by_what_the_mask_chooses_and_not_by_the_weight() -> None:
    error = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    weight = torch.tensor([[2.0], [10.0]])
    assert masked_mean(error).item() == pytest.approx(21 / 6)
    assert masked_mean(error, mask).item() == pytest.approx((1 + 3 + 6) / 3)
    assert masked_mean(error, weight=weight).item() == pytest.approx((2 * 6 + 10 * 15) / 6)
    assert masked_mean(error, mask, weight).item() == pytest.approx((2 + 6 + 60) / 3)


def test_masked_mean_broadcasts_its_mask_before_counting() -> None:
    error = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert masked_mean(error, torch.tensor([[True], [False]])).item() == pytest.approx(1.5)


def test_masked_mean_lets_no_masked_nan_through_to_value_or_gradient() -> None:
    error = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    value = masked_mean(error, torch.tensor([True, False, True]))
    value.backward()
    assert value.item() == 2.0
    assert error.grad is not None
    assert error.grad.tolist() == [0.5, 0.0, 0.5]


def test_masked_mean_of_nothing_is_zero() -> None:
    assert masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_count_weighted_means_of_parts_are_the_mean_of_the_whole() -> None:
    error = randn(10, seed=12)
    mask = randn(10, seed=13) > 0
    parts = [(error[:3], mask[:3]), (error[3:], mask[3:])]
    total = sum(masked_mean(e, m) * m.sum() for e, m in parts)
    torch.testing.assert_close(total / mask.sum(), masked_mean(error, mask))


def test_softplus_gan_is_the_cross_entropy_of_two_logits() -> None:
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    expected = [2 * math.log(2), math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))]
    assert softplus_gan(real, fake).tolist() == pytest.approx(expected)


def test_softplus_gan_raises_the_logit_of_data_and_lowers_that_of_samples() -> None:
    real, fake = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    softplus_gan(real, fake).sum().backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad.item(), fake.grad.item()) == (-0.5, 0.5)


def test_softplus_gan_stays_finite_at_large_logits() -> None:
    error = softplus_gan(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert error.tolist() == [1000.0]

import itertools
import math

import pytest
import torch

from diffdistill.divergences import (
    Divergence,
    along,
    calm,
    chunk_clamped,
    chunk_probability,
    logprob_mse,
    masked_mean,
    matching_direction,
    mse,
    reverse_binary_kl,
    reverse_calm,
    softplus_gan,
    tidal_probability,
    total_variation,
)
from tests.conftest import generator, randn


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


def brute_kl(first: list[float], second: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(first, second, strict=True))


def test_total_variation_is_the_most_that_any_set_of_tokens_differs_by() -> None:
    student, teacher = randn(4, 5, seed=20), randn(4, 5, seed=21)
    gaps = torch.softmax(student, -1) - torch.softmax(teacher, -1)
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
    expected = (gaps @ sets.T).max(dim=-1).values
    torch.testing.assert_close(total_variation(student, teacher), expected)


def test_the_error_of_logprobs_is_a_mean_over_the_vocabulary_without_the_impossible() -> None:
    student, teacher = randn(4, 5, seed=22), randn(4, 5, seed=23)
    gaps = torch.log_softmax(student, -1) - torch.log_softmax(teacher, -1)
    torch.testing.assert_close(logprob_mse(student, teacher), gaps.square().sum(-1) / 5)
    more = [torch.cat([side, torch.full((4, 1), -math.inf)], 1) for side in (student, teacher)]
    more[0].requires_grad_()
    error = logprob_mse(*more)
    torch.testing.assert_close(error.detach(), gaps.square().sum(-1) / 6)
    error.sum().backward()
    assert more[0].grad is not None
    assert more[0].grad.isfinite().all()
    assert not more[0].grad[:, 5].any()


@pytest.mark.parametrize("divergence", [total_variation, logprob_mse])
def test_distances_of_predictions_vanish_where_they_agree_and_move_the_student_alone(
    divergence: Divergence,
) -> None:
    student, teacher = randn(3, 5, seed=24).requires_grad_(), randn(3, 5, seed=25).requires_grad_()
    assert divergence(student, student + 2.0).abs().max() < 1e-6  # logits up to a constant
    before = divergence(student, teacher)
    before.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (divergence(student - 0.1 * student.grad, teacher) < before).all()


def test_the_tidal_target_of_chunks_mixes_probabilities_and_stays_inside() -> None:
    student = torch.tensor([0.2, 0.2, 0.2, 0.0]).requires_grad_()
    teacher = torch.tensor([0.8, 0.8, 0.8, 0.0])
    target = tidal_probability(student, teacher, torch.tensor([0.0, 0.25, 1.0, 0.5]))
    assert target.tolist() == pytest.approx([0.2, 0.35, 0.8, 1e-7])
    assert not target.requires_grad


def test_the_temperature_of_chunks_divides_their_log_likelihood_and_both_ends_are_clamped() -> None:
    logprob = torch.tensor([0.0, -1.0, -40.0])
    assert chunk_probability(logprob, 2.0).tolist() == pytest.approx(
        [1 - 1e-7, math.exp(-0.5), 1e-7]
    )
    assert chunk_clamped(logprob, 2.0).tolist() == [True, False, True]
    assert chunk_clamped(torch.tensor([-32.0, -32.5]), 2.0).tolist() == [False, True]


def test_bfloat16_likelihoods_are_clamped_in_float32() -> None:
    probability = chunk_probability(torch.zeros(1, dtype=torch.bfloat16), 1.0)
    assert probability.dtype == torch.float32
    assert probability.item() < 1.0


@pytest.mark.parametrize("divergence", [calm, reverse_calm, reverse_binary_kl])
def test_clamped_chunks_give_no_gradient_and_a_finite_loss(divergence: Divergence) -> None:
    logprob = torch.tensor([0.0, -100.0, -math.inf]).requires_grad_()
    for p in (1e-7, 0.3, 1 - 1e-7):
        error = divergence(chunk_probability(logprob, 2.0), torch.full((3,), p))
        error.sum().backward()
        assert error.isfinite().all()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [0.0, 0.0, 0.0]


def slope(divergence: Divergence, s: float, p: float) -> float:
    """Return the derivative in the student's log-likelihood x, where s = exp(x)."""
    x = torch.tensor(math.log(s)).requires_grad_()
    divergence(x.exp(), torch.tensor(p)).backward()
    assert x.grad is not None
    return x.grad.item()


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("s", [0.001, 0.3, 0.6, 0.999])
def test_the_slopes_of_calm_and_its_reverse_are_the_papers(s: float, p: float) -> None:
    forward = -(p - (1 - p) * s / (1 - s))
    assert slope(calm, s, p) == pytest.approx(forward, rel=2e-3, abs=1e-5)
    reverse = -s * math.log(p / (1 - p))
    assert slope(reverse_calm, s, p) == pytest.approx(reverse, rel=1e-4, abs=1e-6)
    true = s * (math.log(s / (1 - s)) - math.log(p / (1 - p)))
    assert slope(reverse_binary_kl, s, p) == pytest.approx(true, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize(("p", "least"), [(0.49, 0), (0.51, -1)])
def test_reverse_calm_is_linear_and_least_at_an_end_and_the_others_at_the_teacher(
    p: float, least: int
) -> None:
    s = torch.linspace(0.01, 0.99, 99)
    teacher = torch.full_like(s, p)
    published = reverse_calm(s, teacher)
    assert published.diff().diff().abs().max() < 1e-5
    assert published.argmin() == torch.arange(99)[least]
    for divergence in (calm, reverse_binary_kl):
        assert s[divergence(s, teacher).argmin()].item() == pytest.approx(p)


def test_reverse_calm_is_the_true_divergence_and_the_students_entropy() -> None:
    s, p = torch.rand(20, generator=generator(28)), torch.rand(20, generator=generator(29))
    expected = [
        brute_kl([a, 1 - a], [b, 1 - b]) for a, b in zip(s.tolist(), p.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        reverse_binary_kl(s, p), torch.tensor(expected), rtol=1e-3, atol=1e-5
    )
    entropy = torch.distributions.Bernoulli(s).entropy()
    torch.testing.assert_close(reverse_calm(s, p) - entropy, reverse_binary_kl(s, p))


def test_the_slope_of_reverse_calm_is_bounded_at_both_ends_and_that_of_calm_at_one() -> None:
    bound = math.log((1 - 1e-7) / 1e-7)
    for p in (1e-7, 1 - 1e-7):
        for s in (1e-7, 0.5, 1 - 1e-6):
            assert abs(slope(reverse_calm, s, p)) <= bound * s * (1 + 1e-4)
    assert abs(slope(calm, 1e-6, 0.02)) < 0.03
    assert slope(calm, 0.9999, 0.02) > 9e3  # divided by T = 2, the note's 4.9e3


def test_chunk_divergences_give_the_teacher_no_gradient() -> None:
    for divergence in (calm, reverse_calm, reverse_binary_kl):
        s, p = torch.full((3,), 0.3).requires_grad_(), torch.full((3,), 0.6).requires_grad_()
        divergence(s, p).sum().backward()
        assert p.grad is None
        assert s.grad is not None

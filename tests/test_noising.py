from itertools import product
from math import comb, factorial

import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.noising import (
    MaskNoise,
    TokenLogprob,
    likelihood_bound,
    mask_rate,
    nelbo,
    nelbo_weight,
    per_token,
    span_ranks,
    span_sums,
    span_times,
)
from tests.conftest import randn

MASK = 99


def everything(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def tokens(rows: int, length: int) -> Tensor:
    return torch.arange(rows * length).reshape(rows, length) % 7


def test_tokens_are_masked_at_the_rate_of_their_noise_level() -> None:
    noise = MaskNoise(mask_id=MASK, block=50)
    clean = tokens(400, 200)
    noised = noise(clean, everything(400, 200), Draws(0), torch.arange(400))
    assert noised.t.shape == (400, 4)
    assert (noised.x[noised.masked] == MASK).all()
    assert torch.equal(noised.x[~noised.masked], clean[~noised.masked])
    share = span_sums(noised.masked, 50) / 50
    standard = (share - noised.t) / (noised.t * (1 - noised.t) / 50).clamp(min=1e-4).sqrt()
    assert abs(standard.mean().item()) < 4 / 40
    assert standard.std().item() == pytest.approx(1.0, abs=0.1)


def test_a_sequence_has_one_noise_level_and_blocks_have_their_own() -> None:
    whole = MaskNoise(mask_id=MASK)(tokens(2, 6), everything(2, 6), Draws(0), torch.arange(2))
    assert whole.t.shape == (2, 1)
    blocks = MaskNoise(mask_id=MASK, block=4)
    noised = blocks(tokens(2, 6), everything(2, 6), Draws(0), torch.arange(2))
    assert noised.t.shape == (2, 2)
    level = per_token(noised.t, 6, 4)
    assert level[0].tolist() == [noised.t[0, 0].item()] * 4 + [noised.t[0, 1].item()] * 2


def test_a_sample_is_masked_alike_in_any_micro_batch() -> None:
    noise = MaskNoise(mask_id=MASK, block=4, stratify=6, low=0.3, high=0.8, resample=True)
    clean, ids = tokens(6, 12), torch.arange(6)
    full = noise(clean, everything(6, 12), Draws(0), ids)
    for rows in ([0, 1], [5, 2, 3]):
        part = noise(clean[rows], everything(len(rows), 12), Draws(0), ids[rows])
        assert torch.equal(part.x, full.x[rows])
        assert torch.equal(part.t, full.t[rows])


def test_tokens_that_are_not_maskable_stay() -> None:
    maskable = randn(3, 8, seed=1) > 0
    noise = MaskNoise(mask_id=MASK, low=1.0, high=1.0)
    noised = noise(tokens(3, 8), maskable, Draws(0), torch.arange(3))
    assert torch.equal(noised.masked, maskable)


@pytest.mark.parametrize("stratify", [1, 4])
def test_stratified_levels_fall_one_into_each_part(stratify: int) -> None:
    ids = torch.arange(8)
    times = span_times(Draws(0), "t", ids, 3, stratify=stratify)
    for group in times.reshape(-1, stratify * 3):
        parts = (group * stratify * 3).floor().long()
        assert sorted(parts.tolist()) == list(range(stratify * 3))


@pytest.mark.parametrize("stratify", [0, 1, 4])
def test_each_level_alone_is_uniform(stratify: int) -> None:
    times = span_times(Draws(1), "t", torch.arange(4000), 2, stratify=stratify)
    for place in range(2):
        counts = torch.histc(times[:, place], bins=10, min=0.0, max=1.0)
        assert (counts - 400).abs().max() < 4 * 400**0.5


def test_levels_are_drawn_from_the_clipped_interval() -> None:
    noise = MaskNoise(mask_id=MASK, block=2, low=0.45, high=0.95)
    t = noise(tokens(200, 4), everything(200, 4), Draws(0), torch.arange(200)).t
    assert t.min() >= 0.45
    assert t.max() < 0.95
    assert t.mean().item() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)])
def test_an_interval_outside_of_the_unit_interval_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 < low <= high <= 1"):
        MaskNoise(mask_id=MASK, low=low, high=high)


@pytest.mark.parametrize(("low", "high"), [(0.45, 0.95), (0.6, 0.7), (0.24, 0.26)])
def test_resampled_blocks_have_a_share_within_the_interval(low: float, high: float) -> None:
    noise = MaskNoise(mask_id=MASK, block=8, low=low, high=high, resample=True)
    maskable = everything(100, 24)
    maskable[:, 20:] = False  # four of the last block's tokens are left
    masked = noise(tokens(100, 24), maskable, Draws(0), torch.arange(100)).masked
    share = span_sums(masked, 8) / span_sums(maskable, 8)
    known = [k for n in (8, 4) for k in range(n + 1) if low <= k / n <= high]
    within = (share >= low) & (share <= high)
    assert within[:, :2].all() or not known
    assert not masked[~maskable].any()


def test_blocks_that_were_within_the_interval_are_not_resampled() -> None:
    options = {"mask_id": MASK, "block": 8, "low": 0.3, "high": 0.9}
    args = (tokens(50, 24), everything(50, 24), Draws(0), torch.arange(50))
    plain = MaskNoise(**options)(*args).masked
    again = MaskNoise(**options, resample=True)(*args).masked
    share = span_sums(plain, 8) / 8
    within = per_token((share >= 0.3) & (share <= 0.9), 24, 8)
    assert torch.equal(plain[within], again[within])
    assert not torch.equal(plain, again)


def test_ranks_count_smaller_values_of_the_same_span() -> None:
    values, mask = randn(4, 10, seed=2), randn(4, 10, seed=3) > -0.5
    ranks = span_ranks(values, mask, 4)
    for row in range(4):
        for i in range(10):
            span = range(i // 4 * 4, min(i // 4 * 4 + 4, 10))
            smaller = sum(bool(mask[row, j]) and values[row, j] < values[row, i] for j in span)
            assert ranks[row, i] == smaller if mask[row, i] else ranks[row, i] > 4


def test_the_mask_rate_is_a_share_of_what_may_be_masked() -> None:
    maskable = everything(2, 4)
    maskable[1] = False
    masked = torch.tensor([[True, False, False, False], [False] * 4])
    assert mask_rate(masked, maskable) == 0.25
    assert mask_rate(masked & False, maskable & False) == 0


def test_the_weight_is_one_over_t() -> None:
    t = torch.tensor([0.25, 1.0])
    assert nelbo_weight(t).tolist() == [4.0, 1.0]
    assert nelbo_weight(t, "uniform").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("exact", [True, False])
def test_the_bound_of_a_factorized_model_is_its_likelihood(block: int | None, exact: bool) -> None:
    clean = torch.randint(5, (3, 12), generator=torch.Generator().manual_seed(0))
    table = randn(3, 12, 5, seed=1).log_softmax(-1)
    own = table.gather(2, clean[..., None])[..., 0]
    maskable = everything(3, 12)
    maskable[:, :3] = False
    args = (lambda x, masked: own, clean, maskable, Draws(0), torch.arange(3))
    if exact:
        found = likelihood_bound(*args, mask_id=MASK, block=block, num_draws=400)
    else:
        noise = MaskNoise(mask_id=MASK, block=block, low=1e-4)
        found = nelbo(*args, noise=noise, num_draws=1500)
    expected = -(own * maskable).sum(1).double()
    assert ((found.value - expected).abs() < 4 * found.error + 0.01).all()
    assert (found.error < 0.1 * expected).all()
    assert found.num_tokens.tolist() == [9, 9, 9]
    mean, error = found.per_token()
    assert mean == pytest.approx(expected.sum().item() / 27, abs=4 * error + 0.001)


def joint_model(joint: Tensor, clean: Tensor, block: int | None) -> TokenLogprob:
    """The exact conditionals of a joint distribution, by summing over what is masked.

    With a block, tokens see the clean blocks before and their own block, and nothing later.
    """
    length = joint.ndim

    def logprob(x: Tensor, masked: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for row, i in product(range(len(x)), range(length)):
            end = length if block is None else (i // block + 1) * block
            start = 0 if block is None else i // block * block
            known = [j for j in range(end) if j != i and (j < start or not bool(masked[row, j]))]
            picked = joint
            for j in range(length):
                if j in known:
                    picked = picked.select(j, int(clean[row, j])).unsqueeze(j)
            total = picked.sum()
            out[row, i] = (picked.select(i, int(clean[row, i])).sum() / total).log()
        return out

    return logprob


@pytest.mark.parametrize("block", [None, 2])
def test_the_bound_of_exact_conditionals_is_tight(block: int | None) -> None:
    joint = randn(2, 2, 2, 2, seed=5, dtype=torch.float64).mul(1.5).exp()
    joint = joint / joint.sum()
    clean = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    model = joint_model(joint, clean, block)
    found = likelihood_bound(
        model, clean, everything(2, 4), Draws(0), torch.arange(2), mask_id=MASK, block=block,
        num_draws=300,
    )  # fmt: skip
    expected = torch.stack([-joint[tuple(row)].log() for row in clean])
    assert ((found.value - expected).abs() < 4 * found.error).all()
    assert (found.error < 0.1).all()


def test_counts_equal_the_integral_over_noise_levels_exactly() -> None:
    """Enumerate every mask of one span of 4: weight times chance is that of the integral."""
    for size in range(1, 5):
        by_count = (1 / 4) * (4 / size) / comb(4, size)
        integral = factorial(size - 1) * factorial(4 - size) / factorial(4)
        assert by_count == pytest.approx(integral)


def test_counts_are_uniform_and_weighted_with_their_share() -> None:
    seen: dict[int, int] = {}

    def logprob(x: Tensor, masked: Tensor) -> Tensor:
        for count in masked.sum(1).tolist():
            seen[count] = seen.get(count, 0) + 1
        return -(masked / masked.sum(1, keepdim=True)).double()  # n / k times this sums to n / k

    found = likelihood_bound(
        logprob, tokens(200, 4), everything(200, 4), Draws(0), torch.arange(200), mask_id=MASK,
        block=None, num_draws=10,
    )  # fmt: skip
    assert sorted(seen) == [1, 2, 3, 4]
    assert max(abs(count - 500) for count in seen.values()) < 4 * 500**0.5
    assert found.value.mean().item() == pytest.approx((4 + 2 + 4 / 3 + 1) / 4, abs=0.1)


def test_a_sequence_without_maskable_tokens_costs_nothing() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    found = likelihood_bound(
        lambda x, masked: torch.full(x.shape, -torch.inf), tokens(2, 4), nothing, Draws(0),
        torch.arange(2), mask_id=MASK, block=2, num_draws=3,
    )  # fmt: skip
    assert found.value.tolist() == [0.0, 0.0]
    assert found.error.tolist() == [0.0, 0.0]

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.policy import (
    Importance,
    Mean,
    Ratio,
    Reweighting,
    Scale,
    aggregate,
    cispo_map,
    clipped_policy_map,
    discounted,
    group_advantages,
    informed_weights,
    k3_penalty,
    reweighted_advantages,
    sampler_weights,
)
from tests.conftest import randn

LENGTHS = [5, 2, 0, 4]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def logprobs(seed: int) -> Tensor:
    return randn(4, 5, seed=seed, dtype=torch.float64) - 2.0


def advantages(seed: int) -> Tensor:
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    return signs * randn(4, seed=seed, dtype=torch.float64).abs()


def brute_advantages(rewards: list[float], size: int, scale: Scale) -> list[float]:
    found = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        spread = {"group": group, "batch": rewards, "none": []}[scale]
        deviation = statistics.stdev(spread) if len(spread) > 1 else 0.0
        by = 1.0 if scale == "none" else deviation + 1e-4
        found += [(reward - statistics.mean(group)) / by for reward in group]
    return found


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_advantages_are_rewards_in_deviations_from_the_mean_of_their_group(
    scale: Scale, size: int
) -> None:
    rewards = randn(6, seed=0, dtype=torch.float64)
    found = group_advantages(rewards, size, scale)
    expected = brute_advantages(rewards.tolist(), size, scale)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing_at_all(scale: Scale) -> None:
    rewards = torch.tensor([0.1, 0.7]).repeat_interleave(7)  # whose means are rounded
    assert group_advantages(rewards, 7, scale).tolist() == [0.0] * 14
    assert group_advantages(torch.tensor([0.3]), 1, scale).tolist() == [0.0]


def brute_ratios(new: Tensor, old: Tensor, kind: Ratio) -> list[list[float]]:
    rows = []
    for row, length in enumerate(LENGTHS):
        changes = (new - old)[row, :length].tolist()
        if kind == "sequence" and length:
            changes = [sum(changes) / length] * length
        rows.append([math.exp(change) for change in changes])
    return rows


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_the_clipped_loss_is_ppos_one_token_at_a_time(ratio: Ratio, dual: float | None) -> None:
    old, gains = logprobs(2), advantages(3)
    noise = 0.1 * randn(4, 5, seed=1, dtype=torch.float64)
    new = old + torch.tensor([[0.5], [0.6], [0.0], [-0.5]]) + noise
    found = clipped_policy_map(new, old, gains, 0.2, 0.28, ratio=ratio, mask=MASK, dual_clip=dual)
    regions = set()
    for row, changes in enumerate(brute_ratios(new, old, ratio)):
        gain = gains[row].item()
        for place, change in enumerate(changes):
            pessimist = max(-gain * change, -gain * min(max(change, 0.8), 1.28))
            if dual is not None and gain < 0:  # as dual-clip PPO writes it
                pessimist = min(pessimist, -gain * dual)
            assert found[row, place].item() == pytest.approx(pessimist, rel=1e-9)
            regions.add((gain > 0, change < 0.8, change > 1.28))
    assert len(regions) > 2


def test_fresh_answers_have_the_plain_policy_gradient() -> None:
    new, gains = logprobs(4).requires_grad_(), advantages(5)
    for kind in ("token", "sequence"):
        loss = clipped_policy_map(new, new, gains, 0.2, 0.2, ratio=kind, mask=MASK)
        gradient = torch.autograd.grad(loss[MASK].sum(), new)[0]
        torch.testing.assert_close(gradient, torch.where(MASK, -gains[:, None], 0.0))
    loss = cispo_map(new, new, gains, 5.0, ratio="token", mask=MASK)
    gradient = torch.autograd.grad(loss[MASK].sum(), new)[0]
    torch.testing.assert_close(gradient, torch.where(MASK, -gains[:, None], 0.0))


def test_what_is_clipped_has_no_gradient_but_in_cispo() -> None:
    change = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]]).log().requires_grad_()
    old, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    gains = torch.tensor([2.0, -2.0])
    loss = clipped_policy_map(change, old, gains, 0.2, 0.2, ratio="token", mask=mask)
    gradient = torch.autograd.grad(loss.sum(), change)[0]
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, -2.0, 0.0], [0.0, 2.0, 3.0]]))
    loss = cispo_map(change, old, gains, 1.2, ratio="token", mask=mask)
    gradient = torch.autograd.grad(loss.sum(), change)[0]
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, -2.0, -2.4], [1.0, 2.0, 2.4]]))


def test_padding_reaches_neither_a_sequences_ratio_nor_the_gradient() -> None:
    new, old = logprobs(6).masked_fill(~MASK, -math.inf), logprobs(7)
    new.requires_grad_()
    gains = advantages(8)
    loss = clipped_policy_map(new, old, gains, 0.2, 0.2, ratio="sequence", mask=MASK)
    value, count = aggregate(loss, MASK, "grpo", max_tokens=5)
    value.backward()
    assert count == 4
    assert value.isfinite()
    assert new.grad is not None
    assert not new.grad[~MASK].any()
    assert new.grad.isfinite().all()


def test_advantages_of_tokens_take_the_place_of_those_of_answers() -> None:
    new, old, gains = logprobs(9), logprobs(10), advantages(11)
    each = gains[:, None].expand(4, 5)
    for function, limits in ((clipped_policy_map, (0.2, 0.2)), (cispo_map, (2.0,))):
        found = [function(new, old, g, *limits, ratio="token", mask=MASK) for g in (gains, each)]
        torch.testing.assert_close(*found, rtol=0, atol=0)


def test_only_the_student_is_trained() -> None:
    new, others = logprobs(25).requires_grad_(), logprobs(26).requires_grad_()
    gains = advantages(27).requires_grad_()
    losses = (
        clipped_policy_map(new, others, gains, 0.2, 0.2, ratio="token", mask=MASK),
        cispo_map(new, others, gains, 5.0, ratio="token", mask=MASK),
        k3_penalty(new, others),
    )
    sum(losses, torch.zeros(())).sum().backward()
    assert new.grad is not None
    assert others.grad is None
    assert gains.grad is None


def test_k3_is_the_divergence_in_value_and_the_opposite_one_in_gradient() -> None:
    logits, reference = (randn(6, seed=s, dtype=torch.float64) for s in (12, 13))
    logits.requires_grad_()
    ours, theirs = logits.log_softmax(0), reference.log_softmax(0)
    penalty = k3_penalty(ours, theirs)
    assert (penalty >= 0).all()
    expected = (ours.exp().detach() * penalty).sum()
    torch.testing.assert_close(expected, (ours.exp() * (ours - theirs)).sum())
    gradient = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(gradient, ours.exp().detach() - theirs.exp())


def test_k3_keeps_its_digits_where_models_nearly_agree() -> None:
    near = k3_penalty(torch.tensor([-1.0]), torch.tensor([-1.0 + 3 * 2**-12]))
    assert near.item() == pytest.approx(4.5 * 2**-24, rel=1e-3)


def brute_mean(error: Tensor, kind: Mean, rows: Sequence[int], max_tokens: int) -> float:
    own = [error[row, : LENGTHS[row]].tolist() for row in rows]
    if kind == "grpo":
        return sum(sum(row) / max(len(row), 1) for row in own) / len(own)
    total = sum(map(sum, own))
    return total / (len(own) * max_tokens if kind == "dr-grpo" else sum(map(len, own)))


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "dapo"])
def test_the_trainers_mean_over_micro_batches_is_the_mean_of_the_step(kind: Mean) -> None:
    error = logprobs(14).masked_fill(~MASK, math.nan)
    whole, count = aggregate(error, MASK, kind, max_tokens=7)
    assert whole.item() == pytest.approx(brute_mean(error, kind, range(4), 7), rel=1e-9)
    assert count == (sum(LENGTHS) if kind == "dapo" else 4)
    parts = [aggregate(error[r], MASK[r], kind, max_tokens=7) for r in (slice(0, 1), slice(1, 4))]
    assert sum(c for _, c in parts) == count
    torch.testing.assert_close(sum(v * c for v, c in parts) / count, whole)


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "dapo"])
def test_answers_without_a_token_come_to_zero_with_a_gradient_of_zero(kind: Mean) -> None:
    error = torch.full((2, 3), math.nan, requires_grad=True)
    value, count = aggregate(error, torch.zeros(2, 3, dtype=torch.bool), kind, max_tokens=3)
    value.backward()
    assert value.item() == 0.0
    assert count == (1 if kind == "dapo" else 2)
    assert error.grad is not None
    assert not error.grad.any()


TRL_NAMES = {"grpo": "grpo", "dr-grpo": "dr_grpo", "dapo": "dapo", "cispo": "cispo"}


def trl_loss(
    new: Tensor, old: Tensor, reference: Tensor, gains: Tensor, kind: str, **settings: Any
) -> Tensor:
    """Return what TRL's trainer makes of log-probabilities, without a trainer."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl")
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, sync_gradients=True
        ),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            use_bias_correction_kl=False, delta=settings["dual_clip"], steps_per_generation=1
        ),
        importance_sampling_level=settings["ratio"],
        loss_type=TRL_NAMES[kind],
        beta=0.04,
        epsilon_low=0.2,
        epsilon_high=1.5 if kind == "cispo" else 0.28,
        max_completion_length=7,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    tokens = torch.zeros(4, 5, dtype=torch.int64)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": tokens[:, :1],
        "completion_ids": tokens,
        "completion_mask": MASK.long(),
        "advantages": gains,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": MASK.sum(),
    }
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "dapo", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("dual", [None, 1.6])
def test_losses_and_gradients_are_those_of_trl(kind: Any, ratio: Ratio, dual: float | None) -> None:
    new, old, reference = (logprobs(seed) for seed in (15, 16, 17))
    gains = advantages(18)
    new.requires_grad_()
    expected = trl_loss(new, old, reference, gains, kind, ratio=ratio, dual_clip=dual)
    if kind == "cispo":
        error = cispo_map(new, old, gains, 1.5, ratio=ratio, mask=MASK)
    else:
        error = clipped_policy_map(
            new, old, gains, 0.2, 0.28, ratio=ratio, mask=MASK, dual_clip=dual
        )
    error = error + 0.04 * k3_penalty(new, reference)
    mean: Mean = "dapo" if kind == "cispo" else kind
    found = aggregate(error, MASK, mean, max_tokens=7)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def brute_reweighted(
    gain: float, student: float, teacher: float, form: Reweighting, share: float, clip: float
) -> float:
    ratio = math.exp(teacher - student) if form == "rlsd" else math.exp(student - teacher)
    weight = ratio if gain > 0 else 1 / ratio
    return gain * ((1 - share) + share * min(max(weight, 1 - clip), 1 + clip))


@pytest.mark.parametrize("form", ["rlsd", "rlrt"])
@pytest.mark.parametrize("rewarded", [None, [True, False, True, False]])
def test_advantages_are_reweighted_by_the_papers_formula(
    form: Reweighting, rewarded: list[bool] | None
) -> None:
    gains, student, teacher = advantages(19), logprobs(20), logprobs(21)
    chosen = None if rewarded is None else torch.tensor(rewarded)
    found = reweighted_advantages(
        gains, student, teacher, MASK, form=form, share=0.3, clip=0.6, rewarded=chosen
    )
    for row, length in enumerate(LENGTHS):
        gain = gains[row].item()
        for place in range(5):
            pair = student[row, place].item(), teacher[row, place].item()
            expected = brute_reweighted(gain, *pair, form, 0.3, 0.6)
            if rewarded is not None and not rewarded[row]:
                expected = gain
            expected *= place < length
            assert found[row, place].item() == pytest.approx(expected, rel=1e-9)


def test_the_two_forms_credit_opposite_tokens_of_a_success() -> None:
    gains, student = torch.ones(1), torch.full((1, 2), -1.0)
    teacher, mask = torch.tensor([[-0.5, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    rlsd, rlrt = (
        reweighted_advantages(gains, student, teacher, mask, form=form, share=0.5, clip=1.0)[0]
        for form in ("rlsd", "rlrt")
    )
    assert rlsd[0] > 1.0 > rlsd[1]
    assert rlrt[0] < 1.0 < rlrt[1]


@pytest.mark.parametrize("form", ["rlsd", "rlrt"])
def test_without_a_share_or_a_gap_an_advantage_is_itself(form: Reweighting) -> None:
    gains, student = torch.tensor([1.5, -0.5, 0.0, 2.0]), randn(4, 5, seed=22).requires_grad_()
    teacher = randn(4, 5, seed=23).masked_fill(~MASK, math.nan)
    plain = torch.where(MASK, gains[:, None], 0.0)
    for other, share in ((teacher, 0.0), (student, 0.5)):
        found = reweighted_advantages(gains, student, other, MASK, form=form, share=share, clip=1.0)
        torch.testing.assert_close(found, plain)
        assert not found.requires_grad


def test_informed_weights_are_the_share_of_the_gaps_still_to_come() -> None:
    gap = torch.tensor([[1.0, -3.0, 0.0, 4.0, 99.0], [-2.0, 99.0, 99.0, 99.0, 99.0]])
    mask = torch.arange(5) < torch.tensor([[4], [1]])
    expected = [[1.5, 1 + 0.5 * 7 / 8, 1.25, 1.25, 0.0], [1.5, 0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(informed_weights(gap, mask), torch.tensor(expected))
    assert informed_weights(0.0 * gap, mask, 2.0)[mask].tolist() == [3.0] * 5
    assert informed_weights(gap, mask, 0.0)[mask].tolist() == [1.0] * 5


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("width", [1, 5, 8])
def test_discounted_sums_look_ahead_within_an_answer(gamma: float, width: int) -> None:
    values = randn(3, width, seed=24, dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor([[width], [width // 2], [0]])
    found = discounted(values.masked_fill(~mask, math.nan), mask, gamma)
    for row in range(3):
        ahead, expected = 0.0, [0.0] * width
        for place in reversed(range(int(mask[row].sum()))):
            ahead = expected[place] = values[row, place].item() + gamma * ahead
        assert found[row].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_weights_of_what_another_model_sampled_are_ratios_up_to_a_bound() -> None:
    logprob = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 9.0]])
    sampler = torch.tensor([[-2.0, -2.5, -2.0], [-1.5, -1.2, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    ratio = torch.tensor(
        [[math.e, math.exp(0.5), math.exp(-1.0)], [math.exp(0.5), math.exp(0.2), 1.0]]
    )
    whole = torch.tensor([[math.exp(0.5)] * 3, [math.exp(0.7)] * 3])
    expected: dict[Importance, Tensor] = {
        "token-truncate": ratio.clamp(max=2.0),
        "token-mask": torch.where(ratio <= 2.0, ratio, 0.0),
        "sequence-truncate": whole.clamp(max=2.0),
        "sequence-mask": torch.where(whole <= 2.0, whole, 0.0),
    }
    for kind, value in expected.items():
        found = sampler_weights(logprob.requires_grad_(), sampler, mask, kind, 2.0)
        assert not found.requires_grad
        torch.testing.assert_close(found[mask], value[mask])
        same = sampler_weights(sampler, sampler, mask, kind, 2.0)
        assert torch.equal(same[mask], torch.ones(5))


def test_weights_stay_finite_where_the_ratio_does_not() -> None:
    logprob, mask = torch.full((1, 3), -1.0), torch.ones(1, 3).bool()
    expected: dict[Importance, tuple[float, float]] = {
        "token-truncate": (100.0, 2.0),
        "token-mask": (100.0, 0.0),
        "sequence-truncate": (40.0, 2.0),
        "sequence-mask": (40.0, 0.0),
    }
    for kind, (gap, value) in expected.items():
        found = sampler_weights(logprob, logprob - gap, mask, kind, 2.0)
        assert found.tolist() == [[value] * 3]


def test_weights_make_rewards_of_anothers_samples_those_of_the_students_own() -> None:
    logits, other, rewards = (randn(6, seed=seed) for seed in (1, 2, 3))
    p, mu = logits.log_softmax(-1), other.log_softmax(-1)
    mask = torch.ones(6, 1).bool()
    weights = sampler_weights(p[:, None], mu[:, None], mask, "token-truncate", 1e9)[:, 0]
    torch.testing.assert_close((mu.exp() * weights * rewards).sum(), (p.exp() * rewards).sum())


def test_a_pool_of_rewards_measures_each_group_of_the_step_alike() -> None:
    rewards = randn(12, seed=4)
    whole = group_advantages(rewards, 3, "batch")
    parts = [group_advantages(part, 3, "batch", pool=rewards) for part in rewards.split([3, 9])]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(group_advantages(rewards[:3], 3, "batch"), whole[:3])

import math
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdistill.selection import Rule, Scope, bounds, normalized, select_tokens, token_scores
from tests.conftest import generator, randn

RULES: list[Rule] = ["entropy", "divergence", "soft-or", "q3"]


def answers(lengths: list[int], *, width: int, seed: int) -> dict[str, Tensor]:
    """Return random measures of answers, with numbers in their padding too."""
    parts = {
        name: randn(len(lengths), width, seed=seed + i, dtype=torch.float64).abs()
        for i, name in enumerate(("entropy", "divergence", "opposite"))
    }
    return parts | {"mask": torch.arange(width) < torch.tensor(lengths)[:, None]}


def scores_of(rule: Rule, given: dict[str, Tensor], scope: Scope, **options: Any) -> Tensor:
    order = ("entropy", "divergence", "opposite", "mask")
    return token_scores(rule, *(given[name] for name in order), scope=scope, **options)


def rows_of(given: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in given.items()}


def pools(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"pool_{name}": given[name][given["mask"]] for name in ("entropy", "divergence")}


def stretch(value: float, pool: list[float], quantile: float | None) -> float:
    high = max(pool) if quantile is None else float(np.quantile(pool, quantile))
    low = min(pool)
    return (min(value, high) - low) / (high - low)


def brute_score(rule: Rule, h: float, d: float, opposite: float, pool: list[list[float]]) -> float:
    """Eq. 7 and section 7.3 of TIP, one token at a time."""
    unsure = stretch(h, pool[0], 0.98)
    wrong = stretch(d, pool[1], None)
    both = 1 - (1 - unsure) * (1 - wrong)
    return {"entropy": unsure, "divergence": d, "soft-or": both, "q3": opposite * (1 - unsure)}[
        rule
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", ["rollout", "micro-batch"])
def test_scores_are_the_papers_one_token_at_a_time(rule: Rule, scope: Scope) -> None:
    given = answers([9, 4, 7], width=9, seed=0)
    found = scores_of(rule, given, scope)
    names = ("entropy", "divergence")
    whole = [given[name][given["mask"]].tolist() for name in names]
    for row in range(3):
        tokens = given["mask"][row]
        own = [given[name][row][tokens].tolist() for name in names]
        for place in tokens.nonzero()[:, 0].tolist():
            numbers = (given[n][row, place].item() for n in (*names, "opposite"))
            expected = brute_score(rule, *numbers, own if scope == "rollout" else whole)
            assert found[row, place].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("retention", [0.1, 0.29, 0.5, 0.7, 1.0])
def test_the_best_of_each_answer_are_kept_and_as_many_as_the_paper_says(retention: float) -> None:
    lengths = [100, 10, 3, 1, 0, 57]
    scores = randn(6, 100, seed=1)
    mask = torch.arange(100) < torch.tensor(lengths)[:, None]
    found = select_tokens(scores, mask, retention)
    for row, length in enumerate(lengths):
        count = min(length, max(1, math.floor(Fraction(str(retention)) * length)))
        ranked = sorted(range(length), key=lambda i: -scores[row, i].item())
        assert found[row].nonzero()[:, 0].tolist() == sorted(ranked[:count])


@pytest.mark.parametrize("sampled", [False, True])
def test_tokens_between_holes_of_the_mask_are_chosen_and_none_in_the_holes(sampled: bool) -> None:
    mask = randn(8, 12, seed=2) > 0
    mask[3] = False
    numbers = torch.rand(8, 12, generator=generator(3)) if sampled else None
    scores = torch.where(mask, randn(8, 12, seed=4).abs(), 1e9)  # padding that would win
    found = select_tokens(scores, mask, 0.5, numbers=numbers)
    assert not (found & ~mask).any()
    tokens = mask.sum(1)
    assert found.sum(1).tolist() == torch.where(tokens > 0, (tokens // 2).clamp(min=1), 0).tolist()
    assert torch.equal(select_tokens(scores, mask, 1.0, numbers=numbers), mask)


def test_of_equal_scores_the_first_are_kept() -> None:
    scores, mask = torch.zeros(1, 6), torch.ones(1, 6, dtype=torch.bool)
    mask[0, 0] = False
    found = select_tokens(scores, mask, 0.4)
    assert found[0].tolist() == [False, True, True, False, False, False]


def test_a_token_that_the_student_is_wrongly_sure_of_is_dropped_by_entropy_alone() -> None:
    given = answers([10], width=10, seed=5)
    given["entropy"][0, 4] = 0.0
    given["divergence"][0, 4] = given["opposite"][0, 4] = 50.0
    kept = {
        rule: select_tokens(scores_of(rule, given, "rollout"), given["mask"], 0.5)[0, 4].item()
        for rule in RULES
    }
    assert kept == {"entropy": False, "divergence": True, "soft-or": True, "q3": True}


@pytest.mark.parametrize("divergence", [0.0, 0.3])
def test_soft_or_without_a_difference_in_divergence_is_entropy(divergence: float) -> None:
    given = answers([10, 6], width=10, seed=6)
    given["divergence"] = torch.full_like(given["divergence"], divergence)
    soft, entropy = (scores_of(rule, given, "micro-batch") for rule in ("soft-or", "entropy"))
    torch.testing.assert_close(soft, entropy, rtol=0, atol=0)


def test_one_huge_divergence_leaves_of_soft_or_the_entropy_unless_it_is_clipped() -> None:
    given = answers([64], width=64, seed=7)
    given["divergence"][0, 10] = 1e9
    others = torch.arange(64) != 10
    entropy = scores_of("entropy", given, "rollout")
    flat = scores_of("soft-or", given, "rollout")
    assert flat[0, 10] == 1.0
    assert (flat - entropy)[0, others].abs().max() < 1e-6
    clipped = scores_of("soft-or", given, "rollout", divergence_clip_quantile=0.9)
    assert (clipped - entropy)[0, others].mean() > 0.1


def test_the_vocabulary_does_not_matter_to_scores() -> None:
    given = answers([12, 5], width=12, seed=8)
    shares = given | {"entropy": given["entropy"] / math.log(151_936)}
    for rule in RULES:
        torch.testing.assert_close(
            scores_of(rule, given, "micro-batch"), scores_of(rule, shares, "micro-batch")
        )


@pytest.mark.parametrize("rule", [*RULES, "none"])
def test_padding_and_the_other_answers_do_not_change_a_choice_within_a_rollout(rule: Rule) -> None:
    given = answers([9, 5, 1, 0], width=9, seed=9)
    whole = select_tokens(scores_of(rule, given, "rollout"), given["mask"], 0.4)
    for row, length in enumerate([9, 5, 1, 0]):
        alone = {name: values[row : row + 1, :length] for name, values in given.items()}
        found = select_tokens(scores_of(rule, alone, "rollout"), alone["mask"], 0.4)
        assert found[0].tolist() == whole[row, :length].tolist()
    given["divergence"] = torch.where(given["mask"], given["divergence"], 1e9)
    given["entropy"] = torch.where(given["mask"], given["entropy"], -5.0)
    again = select_tokens(scores_of(rule, given, "rollout"), given["mask"], 0.4)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("rule", RULES)
def test_with_the_pools_of_a_step_its_micro_batches_do_not_matter(rule: Rule) -> None:
    given = answers([9, 5, 7, 1], width=9, seed=10)
    whole = scores_of(rule, given, "micro-batch")
    everything = pools(given)
    everything = {name: pool.flip(0) for name, pool in everything.items()}
    parts = [
        scores_of(rule, rows_of(given, rows), "global", **everything)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(
        torch.cat(parts)[given["mask"]], whole[given["mask"]], rtol=0, atol=0
    )


@pytest.mark.parametrize("rule", ["entropy", "soft-or", "q3"])
def test_without_the_pools_micro_batches_matter(rule: Rule) -> None:
    given = answers([9, 5, 7, 1], width=9, seed=10)
    whole = scores_of(rule, given, "micro-batch")
    part = scores_of(rule, rows_of(given, slice(0, 1)), "micro-batch")
    assert (part - whole[:1]).abs().max() > 0.01


@pytest.mark.parametrize("quantile", [None, 0.0, 0.37, 0.98, 1.0])
def test_bounds_are_the_least_value_and_the_interpolated_quantile(quantile: float | None) -> None:
    values = randn(3, 7, seed=11, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    found = bounds(values, mask, "rollout", clip_quantile=quantile)
    for row in range(3):
        own = values[row][mask[row]]
        high = own.quantile(1.0 if quantile is None else quantile)
        torch.testing.assert_close(found.high[row, 0], high, rtol=1e-12, atol=0)
        assert found.low[row, 0] == own.min()


def test_answers_of_one_token_and_of_none_are_scored_without_a_nan() -> None:
    for lengths in ([1, 0], [0, 0]):
        given = answers(lengths, width=4, seed=12)
        for rule in RULES:
            for scope in ("rollout", "micro-batch", "global"):
                found = scores_of(rule, given, scope, **pools(given))
                assert found[given["mask"]].isfinite().all()
                chosen = select_tokens(found, given["mask"], 0.1)
                assert torch.equal(chosen, given["mask"])
    empty = torch.ones(1, 0)
    assert normalized(empty, bounds(empty, empty > 0, "rollout")).shape == (1, 0)


def test_values_beyond_the_bounds_are_clipped() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0, 7.0]])
    around = bounds(values, values > -1, "global", pool=torch.tensor([1.0, 3.0]))
    assert normalized(values, around).tolist() == [[0.0, 0.0, 0.5, 1.0]]


def test_tokens_are_drawn_in_proportion_to_their_scores_without_replacement() -> None:
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0])
    count = 20_000
    numbers = torch.rand(count, 4, generator=generator(13))
    mask = torch.ones(count, 4, dtype=torch.bool)
    found = select_tokens(weights.expand(count, 4), mask, 0.5, numbers=numbers)
    shares = (found.long() * 2 ** torch.arange(4)).sum(1).bincount(minlength=16) / count
    expected = [0.0] * 16
    for first, second in permutations(range(4), 2):
        chance = weights[first] / 8 * weights[second] / (8 - weights[first])
        expected[2**first + 2**second] += chance.item()
    for share, chance in zip(shares.tolist(), expected, strict=True):
        assert abs(share - chance) <= 4 * math.sqrt(chance * (1 - chance) / count)


def test_without_scores_tokens_are_drawn_alike() -> None:
    numbers = torch.rand(8000, 5, generator=generator(14))
    mask = torch.ones(8000, 5, dtype=torch.bool)
    for scores in (
        torch.zeros(8000, 5),
        token_scores("none", *[numbers] * 3, mask, scope="rollout"),
    ):
        found = select_tokens(scores, mask, 0.4, numbers=numbers)
        torch.testing.assert_close(found.float().mean(0), torch.full((5,), 0.4), rtol=0, atol=0.03)


def test_a_token_with_a_score_is_drawn_before_any_without() -> None:
    scores = torch.tensor([0.0, 0.5, 0.0, 0.2]).expand(500, 4)
    numbers = torch.rand(500, 4, generator=generator(15))
    numbers[0] = torch.tensor([0.0, 0.99, 0.0, 0.99])
    found = select_tokens(scores, torch.ones(500, 4, dtype=torch.bool), 0.5, numbers=numbers)
    assert found[1:].float().mean(0).tolist() == [0.0, 1.0, 0.0, 1.0]
    again = select_tokens(scores, torch.ones(500, 4, dtype=torch.bool), 0.5, numbers=numbers)
    assert torch.equal(found, again)


def test_scores_and_choices_give_no_gradient() -> None:
    given = answers([6], width=6, seed=16)
    given = {n: v if n == "mask" else v.requires_grad_() for n, v in given.items()}
    for rule in RULES:
        assert not scores_of(rule, given, "rollout").requires_grad

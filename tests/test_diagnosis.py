"""What a diagnosis measures and how it judges, by closed forms and brute force."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from diffdistill.draws import Draws
from diffdistill.evaluation.calibration import (
    Contract,
    bounds,
    quantile,
    recommended,
    strengths,
)
from diffdistill.evaluation.means import Means
from diffdistill.evaluation.position_maps import consensus_gap, reverse_kl, token_ranks
from diffdistill.evaluation.prefix_probe import Graded, compared, cut
from diffdistill.evaluation.target_sampling import Swept, boundary
from diffdistill.evaluation.verdicts import (
    AGGREGATED,
    AGREE,
    BIASED,
    CUT_OFF,
    EXPLODED,
    PREFIXES,
    TOO_FAR,
    trends,
    verdicts,
)
from diffdistill.extrapolation import fixed_point, teacher_relative_floor
from diffdistill.projection import Projection, token_maps
from diffdistill.supports import top_logprobs
from diffdistill.text.grpo import GRPO
from tests.conftest import generator
from tests.toy_answers import FirstToken, Network, Questions, question_batch
from tests.toy_texts import only_loss

WORDS = 7


def projection(seed: int) -> Projection:
    rng = generator(seed)
    hidden = torch.randn(3, 4, 5, generator=rng, dtype=torch.float64)
    return Projection(hidden, torch.randn(WORDS, 5, generator=rng, dtype=torch.float64))


def logits_of(found: Projection) -> torch.Tensor:
    return found.hidden @ found.weight.T


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.rand(3, 4, generator=generator(9)) < 0.7


# maps of positions


def test_a_rank_counts_the_tokens_that_are_likelier(mask: torch.Tensor) -> None:
    found = projection(1)
    tokens = torch.randint(WORDS, (3, 4), generator=generator(2))
    order = logits_of(found).argsort(-1, descending=True)
    expected = (order == tokens[..., None]).int().argmax(-1) + 1
    ranks = token_ranks(found, tokens, mask)
    assert torch.equal(ranks, expected.masked_fill(~mask, 0))
    assert torch.equal(token_ranks(logits_of(found), tokens, mask), ranks)
    first = top_logprobs(found, 3)
    assert torch.equal(token_ranks(first, tokens, mask), ranks.clamp(max=4))


def test_equally_likely_tokens_share_the_best_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    for token, rank in ((0, 4), (1, 1), (2, 1), (3, 3)):
        assert token_ranks(logits, torch.tensor([token]), torch.tensor([True])).item() == rank


def test_contexts_that_agree_have_no_gap_and_certain_ones_that_do_not_a_large_one() -> None:
    everywhere = torch.ones(3, 4, dtype=torch.bool)
    same = projection(1)
    assert consensus_gap([same, same, same], everywhere).max() < 1e-12
    sure = torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[0.0, 50.0, 0.0]])
    gap = consensus_gap(sure, torch.tensor([True])).item()
    assert gap == pytest.approx(25 - math.log(2), rel=1e-4)  # exp(mean) is e^-25 twice
    never = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert consensus_gap(never, torch.tensor([True])).item() > 1e6


def test_the_gap_is_the_least_mean_reverse_kl_of_any_student(mask: torch.Tensor) -> None:
    sides, temperature = [projection(seed) for seed in (1, 2, 3)], 1.3
    teachers = torch.stack([F.log_softmax(logits_of(s) / temperature, -1) for s in sides])
    brute = -teachers.mean(0).exp().sum(-1).log()
    gap = consensus_gap(sides, mask, temperature=temperature)
    torch.testing.assert_close(gap, brute.masked_fill(~mask, 0.0))

    def loss(student: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [reverse_kl(student, s, mask, temperature=temperature) for s in sides]
        ).mean(0)

    best = temperature * teachers.mean(0)  # normalized, it is the geometric mean
    torch.testing.assert_close(loss(best), gap)
    for seed in (4, 5):
        assert (loss(logits_of(projection(seed)))[mask] > gap[mask]).all()


def test_a_servers_first_tokens_bound_the_reverse_kl_from_below(mask: torch.Tensor) -> None:
    student, teacher = projection(1), projection(2)
    whole = token_maps(student, teacher, ["reverse-kl"], mask=mask)["reverse-kl"]
    torch.testing.assert_close(reverse_kl(student, teacher, mask), whole)
    few, more = (reverse_kl(student, top_logprobs(teacher, k), mask)[mask] for k in (2, WORDS - 1))
    assert (few <= more + 1e-12).all()
    torch.testing.assert_close(more, whole[mask])  # one token left is the tail itself


# the prefix probe


def test_prefixes_are_cut_uniformly_and_the_same_each_time() -> None:
    drafts = [list(range(10))] * 400
    lengths = [len(prefix) for prefix in cut(drafts, Draws(1))]
    assert set(lengths) == set(range(10))
    assert sum(lengths) / 400 == pytest.approx(4.5, abs=0.5)
    assert cut(drafts, Draws(1)) == cut(drafts, Draws(1))
    assert all(prefix == list(range(len(prefix))) for prefix in cut(drafts, Draws(2)))
    assert cut([[]], Draws(1)) == [[]]


def test_answers_that_turn_are_counted_both_ways() -> None:
    alone = Graded(torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 1, 1, 1]).bool())
    after = Graded(torch.tensor([1, 0, 0, 1]).bool(), torch.tensor([1, 1, 0, 1]).bool())
    assert compared(alone, after) == {
        "alone_right": 0.75,
        "prefixed_right": 0.5,
        "alone_parses": 1.0,
        "prefixed_parses": 0.75,
        "right_to_wrong": 2.0,
        "wrong_to_right": 1.0,
    }


# verdicts

FINE = {
    "repetition": 0.1, "ended": 1.0, "length": 50.0, "reverse_kl": 0.3, "overlap": 0.9,
    "student_mass": 0.97, "teacher_mass": 0.99, "uncorrected": 0.0,
    "context_kl": 0.3, "shuffled_kl": 0.33, "consensus_kl": 0.3, "consensus_gap": 0.03,
    "irreducible_share": 0.1, "alone_right": 0.8, "prefixed_right": 0.79,
    "right_to_wrong": 5.0, "wrong_to_right": 4.0,
    "student_mass_before": 0.95, "student_mass_after": 0.96,
    "answer_tokens_before": 50.0, "answer_tokens_after": 60.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "mode", "told"),
    [
        # the numbers of Many Faces: 123 of 198 right, then 91; 40 turn wrong, 8 right
        (
            {
                "alone_right": 123 / 198,
                "prefixed_right": 91 / 198,
                "right_to_wrong": 40,
                "wrong_to_right": 8,
            },
            PREFIXES,
            "62% alone and in 46%",
        ),
        ({"uncorrected": 1.0, "student_mass": 0.31, "teacher_mass": 0.86}, BIASED, "0.310"),
        ({"student_mass_after": 0.5}, BIASED, "from 0.950 to 0.500"),
        ({"irreducible_share": 0.8, "consensus_gap": 0.24}, AGGREGATED, "0.24 (80%)"),
        ({"shuffled_kl": 0.9}, AGGREGATED, "0.3 with a question's own solution and 0.9"),
        ({"shuffled_kl": 0.1}, AGGREGATED, "0.1 with another's"),
        ({"repetition": 0.79}, EXPLODED, "79% of the 3-grams"),
        ({"answer_tokens_after": 200.0}, EXPLODED, "from 50 to 200"),
        ({"ended": 0.25}, CUT_OFF, "25% of the answers end"),
        ({"reverse_kl": 0.001}, AGREE, "0.001 nats"),
        ({"overlap": 0.3}, TOO_FAR, "30%"),
    ],
)
def test_a_number_points_to_its_failure_mode_alone(
    changes: dict[str, float], mode: str, told: str
) -> None:
    assert verdicts(FINE) == []
    [found] = verdicts(FINE | changes)
    assert found.mode == mode
    assert told in found.because


@pytest.mark.parametrize(
    "changes",
    [
        {"student_mass": 0.31, "teacher_mass": 0.86},  # corrected
        {"alone_right": 0.8, "prefixed_right": 0.7, "right_to_wrong": 2, "wrong_to_right": 1},
        {"shuffled_kl": 1e-3, "context_kl": 1e-4},  # nobody would care
    ],
)
def test_what_may_be_chance_or_is_small_points_to_nothing(changes: dict[str, float]) -> None:
    assert verdicts(FINE | changes) == []


def test_what_was_not_measured_points_to_nothing() -> None:
    assert verdicts({}) == []
    assert [v.mode for v in verdicts({"repetition": 1.0})] == [EXPLODED]


def test_trends_compare_the_first_and_the_last_tenth_of_training() -> None:
    rows: list[dict[str, float]] = [{"student_mass/student": 1.0 - i / 20} for i in range(20)]
    rows.insert(5, {"other": 3.0})
    found = trends(rows)
    assert found["student_mass_before"] == pytest.approx((1.0 + 0.95) / 2)
    assert found["student_mass_after"] == pytest.approx((0.1 + 0.05) / 2)
    assert "answer_tokens_before" not in found
    assert trends(rows[:1]) == {}


def test_means_are_over_all_numbers_and_none_is_no_mean() -> None:
    means = Means()
    means.add("a", torch.tensor([1.0, 2.0]))
    means.add("a", torch.tensor([[True]]))
    means.add("b", torch.tensor([]))
    assert means.found() == {"a": pytest.approx(4 / 3)}


# strengths


def contract(*pairs: tuple[float, float]) -> Contract:
    p, b = (torch.tensor(side, dtype=torch.float64).log() for side in zip(*pairs, strict=True))
    return Contract(p, b, 100)


def test_a_recommended_strength_is_below_where_the_tail_shrinks_to_its_kappath_part() -> None:
    found = contract((0.95, 0.6), (0.99, 0.6), (0.97, 0.98))
    critical = strengths(found, teacher_relative_floor(2.0))
    assert len(critical) == 2  # the third leads nowhere
    for strength, p, b in zip(critical, (0.95, 0.99), (0.6, 0.6), strict=True):
        sides = (torch.tensor(x, dtype=torch.float64).log() for x in (p, b))
        tail = 1 - fixed_point(*sides, strength).exp()
        assert tail.item() == pytest.approx((1 - p) / 2)
    low = recommended(found, 2.0, 0.03)
    assert low == pytest.approx(0.97 * critical.min().item())
    assert recommended(found, 4.0, 0.03) > low > recommended(found, 1.0, 0.03) == 1.0


def test_bounds_are_looser_with_larger_divisors_and_smaller_tails() -> None:
    rows = bounds(contract((0.95, 0.5), (0.98, 0.5), (0.995, 0.7)))
    relative, constant = rows[:4], rows[4:]
    for kind in (relative, constant):
        lows = [row.low for row in kind]
        assert lows == sorted(lows)
    assert all(row.unsafe == 0 for row in relative)
    assert constant[0].unsafe == pytest.approx(1 / 3)  # 0.995 leaves less than 0.01


def test_a_quantile_is_one_of_the_values() -> None:
    values = torch.tensor([3.0, 1.0, 2.0])
    assert [quantile(values, share) for share in (0.0, 0.4, 0.5, 1.0)] == [1.0, 1.0, 2.0, 3.0]
    assert math.isnan(quantile(values[:0], 0.5))


def test_the_boundary_is_the_first_strength_whose_answers_break_the_format() -> None:
    def swept(*rates: float) -> list[Swept]:
        return [Swept(1 + i / 10, rate, 0.0, 1.0) for i, rate in enumerate(rates)]

    assert boundary(swept(0.9, 0.88, 0.9)) is None
    assert boundary(swept(0.9, 0.88, 0.8, 0.2)) == 1.2
    assert boundary(swept(0.9, 0.88, 0.8, 0.2)[::-1]) == 1.2


def test_the_share_of_answers_in_the_format_is_logged_with_the_reward() -> None:
    models: dict[str, Any] = {"student": Network(1), "reference": Network(3)}
    reward: Any = FirstToken()
    method: Any = GRPO(family=Questions(), draws=Draws(0), reward=reward, num_answers=4, **models)
    batch = question_batch(4)
    loss = only_loss(method, batch)
    firsts = [text[0] for text in method.family.spelled(method.family.rollouts[-1])]
    expected = sum(first != "0" for first in firsts) / len(firsts)
    assert 0 < expected < 1
    assert loss.metrics["parse_rate"] == expected

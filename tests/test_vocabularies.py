import itertools
import math

import pytest
import torch

from diffdistill.vocabularies import (
    chunk_distribution,
    generalized_jsd,
    gold,
    matched_ids,
    uld,
)
from tests.conftest import randn


def test_tokens_are_matched_by_what_they_spell() -> None:
    student = [None, b"a", b" the", b"\xc3", b"b"]
    teacher = [b" the", None, b"c", b"\xc3", b"a"]
    ours, theirs = matched_ids(student, teacher)
    assert ours.tolist() == [1, 2, 3]
    assert theirs.tolist() == [4, 0, 3]


def test_vocabularies_without_a_common_token_match_nothing() -> None:
    ours, theirs = matched_ids([b"a"], [b"b", None])
    assert ours.shape == theirs.shape == (0,)
    assert ours.dtype == torch.int64


def test_a_spelling_is_matched_once() -> None:
    ours, theirs = matched_ids([b"a", b"a"], [b"a"])
    assert (ours.tolist(), theirs.tolist()) == ([0], [0])


def test_uld_is_the_least_distance_over_all_ways_to_pair_the_tokens() -> None:
    """Sorting solves the transport between the two lists of probabilities (ULD, section 3)."""
    student, teacher = randn(5, 3, seed=0), randn(5, 4, seed=1)
    errors = uld(student, teacher)
    for row in range(5):
        p = [*torch.softmax(student[row], 0).tolist(), 0.0]
        q = torch.softmax(teacher[row], 0).tolist()
        costs = [
            sum(abs(a - b) for a, b in zip(p, order, strict=True))
            for order in itertools.permutations(q)
        ]
        assert errors[row].item() == pytest.approx(min(costs), abs=1e-6)


def test_uld_is_blind_to_the_order_of_tokens_and_zero_for_the_same_probabilities() -> None:
    student = randn(4, 6, seed=2)
    assert uld(student, student.flip(-1)).tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_uld_moves_the_student_alone() -> None:
    student, teacher = randn(4, 6, seed=3).requires_grad_(), randn(4, 5, seed=4).requires_grad_()
    before = uld(student, teacher)
    before.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    after = uld(student - 0.1 * student.grad, teacher)
    assert (after < before).all()


def test_a_chunk_of_two_words_sums_to_the_likelihood_of_the_second() -> None:
    later = torch.tensor([0.3, 1.0]).log()
    merged = chunk_distribution(randn(2, 5, seed=5), later, 2.0)
    torch.testing.assert_close(merged.sum(-1), torch.tensor([0.3, 1.0]))
    torch.testing.assert_close(merged[1], torch.softmax(randn(2, 5, seed=5)[1] / 2.0, -1))


def jsd_by_hand(first: list[float], second: list[float], beta: float) -> float:
    total = 0.0
    for a, b in zip(first, second, strict=True):
        middle = beta * b + (1 - beta) * a
        total += beta * b * math.log(b / middle) + (1 - beta) * a * math.log(a / middle)
    return total


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_the_generalized_divergence_is_that_of_its_definition(beta: float) -> None:
    p, q = (torch.softmax(randn(3, 4, seed=s), -1) for s in (6, 7))
    expected = [jsd_by_hand(a, b, beta) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert generalized_jsd(p, q, beta).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_generalized_divergence_has_a_kl_at_either_end() -> None:
    p, q = (torch.softmax(randn(3, 4, seed=s), -1) for s in (8, 9))
    kl = torch.nn.functional.kl_div
    forward = kl(p.log(), q, reduction="none").sum(-1)
    reverse = kl(q.log(), p, reduction="none").sum(-1)
    torch.testing.assert_close(generalized_jsd(p, q, 0.0), forward)
    torch.testing.assert_close(generalized_jsd(p, q, 1.0), reverse)


def test_gold_without_matches_is_uld_and_with_all_matched_the_divergence() -> None:
    student, teacher = randn(3, 4, seed=10), randn(3, 4, seed=11)
    p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
    nothing = torch.zeros(0, dtype=torch.int64)
    torch.testing.assert_close(gold(p, q, (nothing, nothing)), uld(student, teacher))
    everything = torch.arange(4)
    order = torch.tensor([2, 0, 3, 1])
    expected = generalized_jsd(p, q[:, order], 0.5)
    torch.testing.assert_close(gold(p, q, (everything, order)), expected)


def test_gold_weighs_its_two_parts_by_the_matched_share_of_the_teacher() -> None:
    p, q = torch.softmax(randn(3, 4, seed=12), -1), torch.softmax(randn(3, 5, seed=13), -1)
    matched = torch.tensor([1, 3]), torch.tensor([4, 0])
    alike = generalized_jsd(p[:, matched[0]], q[:, matched[1]], 0.5)
    ours = p[:, [0, 2]].sort(-1, descending=True).values
    theirs = q[:, [1, 2, 3]].sort(-1, descending=True).values
    apart = (ours - theirs[:, :2]).abs().sum(-1) + theirs[:, 2]
    torch.testing.assert_close(gold(p, q, matched), 0.4 * alike + 0.6 * apart)


def test_gold_gives_the_teacher_no_gradient() -> None:
    p = torch.softmax(randn(3, 4, seed=14), -1).requires_grad_()
    q = torch.softmax(randn(3, 4, seed=15), -1).requires_grad_()
    gold(p, q, (torch.arange(2), torch.arange(2))).sum().backward()
    assert q.grad is None
    assert p.grad is not None

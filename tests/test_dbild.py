"""DBiLD against its formula written out pair by pair, and what follows from it."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffdistill.dbild import Leaders, dbild, knee
from diffdistill.projection import Projection, dense
from diffdistill.text.exopd import ExOPD
from tests.conftest import randn
from tests.test_method_opd import both_logits, make
from tests.toy_answers import Network, question_batch
from tests.toy_texts import only_loss

WORDS = 23
SHARP = Leaders(curve=16, fewest_leaders=3, most_leaders=9)


def logits_of(seed: int, rows: int = 6) -> Tensor:
    return (2.0 * randn(rows, WORDS, seed=seed, dtype=torch.float64)).requires_grad_()


def written_out(
    student: Tensor, teacher: Tensor, leaders: Leaders, temperature: float, kind: str
) -> Tensor:
    """Return DBiLD of one row, of loops over the pairs of each side's leaders."""
    total = torch.zeros((), dtype=student.dtype)
    for leader in (teacher, student.detach()):
        ranked = leader.sort(descending=True)
        curve = ranked.values[: leaders.curve]
        y = (curve - curve.min()) / (curve.max() - curve.min())
        below = [1 - i / (len(y) - 1) - y[i].item() for i in range(len(y))]
        count = below.index(max(below)) + 1
        count = min(max(count, leaders.fewest_leaders), leaders.most_leaders)
        ids = ranked.indices[:count].tolist()
        s, t = (
            torch.stack([(z[i] - z[j]) / temperature for i, j in combinations(ids, 2)]).softmax(-1)
            for z in (student, teacher)
        )
        over, under = (s, t) if kind == "reverse-kl" else (t, s)
        total = total + (over * (over.log() - under.log())).sum()
    return total


@pytest.mark.parametrize("kind", ["reverse-kl", "forward-kl"])
@pytest.mark.parametrize("leaders", [SHARP, Leaders(), Leaders(16, 8, 8)])
def test_dbild_is_its_formula_written_out_pair_by_pair(kind: Any, leaders: Leaders) -> None:
    student, teacher = logits_of(0), logits_of(1).detach()
    found = dbild(student, teacher, leaders=leaders, divergence=kind, temperature=2.0)
    expected = torch.stack(
        [written_out(s, t, leaders, 2.0, kind) for s, t in zip(student, teacher, strict=True)]
    )
    torch.testing.assert_close(found["divergence"], expected)
    ours, theirs = (
        torch.autograd.grad(x.sum(), student)[0] for x in (found["divergence"], expected)
    )
    torch.testing.assert_close(ours, theirs)
    for side in ("teacher_leaders", "student_leaders"):
        assert found[side].ge(leaders.fewest_leaders).all()
        assert found[side].le(min(leaders.most_leaders, WORDS)).all()


def test_its_gradient_is_that_of_finite_differences() -> None:
    teacher = logits_of(1, 2).detach()

    def value(student: Tensor) -> Tensor:
        return dbild(student, teacher, leaders=SHARP)["divergence"]

    assert torch.autograd.gradcheck(value, logits_of(0, 2))


def test_equal_sides_are_at_no_distance_and_learn_nothing() -> None:
    student = logits_of(0)
    found = dbild(student, student.detach().clone())["divergence"]
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)
    slope = torch.autograd.grad(found.sum(), student)[0]
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def test_a_shift_of_all_logits_changes_nothing_and_the_gradient_shifts_none() -> None:
    student, teacher = logits_of(0), logits_of(1).detach()
    found = dbild(student, teacher)["divergence"]
    torch.testing.assert_close(dbild(student + 5.0, teacher - 3.0)["divergence"], found)
    slope = torch.autograd.grad(found.sum(), student)[0]
    torch.testing.assert_close(slope.sum(-1), torch.zeros(6).double(), atol=1e-12, rtol=0)
    assert slope.abs().max() > 1e-3


def test_it_compares_differences_and_not_the_probabilities_of_the_leaders() -> None:
    student, teacher = logits_of(0), logits_of(1).detach()
    leaders = Leaders(3, 3, 3)
    ids = teacher.topk(3).indices
    s, t = (F.log_softmax(z.gather(-1, ids), -1) for z in (student, teacher))
    masked_softmax = (s.exp() * (s - t)).sum(-1)
    found = dbild(student, teacher, leaders=leaders, temperature=1.0)["divergence"]
    assert not torch.allclose(found, masked_softmax, rtol=0.05)


def test_two_leaders_would_teach_nothing_so_three_are_the_fewest() -> None:
    one_pair = torch.randn(1, dtype=torch.float64, requires_grad=True)
    value = (one_pair.softmax(-1) * one_pair.log_softmax(-1)).sum()
    assert torch.autograd.grad(value, one_pair)[0].item() == 0.0
    for wrong in ((16, 2, 9), (16, 9, 8), (8, 3, 9)):
        with pytest.raises(ValueError, match="3 <= fewest_leaders <= most_leaders <= curve"):
            Leaders(*wrong)


@pytest.mark.parametrize(("bend", "steep"), [(1, 1.0), (4, 1.0), (4, 100.0), (9, 0.01)])
def test_the_knee_of_two_straight_lines_is_where_they_meet(bend: int, steep: float) -> None:
    falling = 10.0 - (9.0 / bend) * torch.arange(bend + 1)
    flat = 1.0 - 0.02 * torch.arange(1, 40 - bend)
    curve = torch.cat([falling, flat]).double()
    assert knee(steep * curve - 7.0).item() == bend + 1
    assert knee(torch.stack([curve, curve])).tolist() == [bend + 1] * 2


def test_equal_logits_have_the_fewest_leaders() -> None:
    assert Leaders(16, 3, 9).count(torch.zeros(2, 16)).tolist() == [3, 3]


def test_a_steeper_curve_has_fewer_leaders() -> None:
    x = torch.linspace(0, 1, 64)
    counts = [knee(torch.exp(-rate * x)).item() for rate in (3.0, 10.0, 40.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_projected_logits_are_compared_as_dense_ones_and_masked_rows_are_zero() -> None:
    sides = [
        Projection(
            randn(2, 3, 4, seed=s, dtype=torch.float64).requires_grad_(),
            randn(WORDS, 4, seed=s + 1, dtype=torch.float64).requires_grad_(),
        )
        for s in (0, 10)
    ]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    found = dbild(*sides, mask=mask)
    expected = dbild(*(dense(side) for side in sides))
    for name, value in found.items():
        assert (value[~mask] == 0).all()
        torch.testing.assert_close(value[mask], expected[name][mask])
    leaves = [sides[0].hidden, sides[0].weight]
    ours = torch.autograd.grad(found["divergence"].sum(), leaves)
    theirs = torch.autograd.grad((expected["divergence"] * mask).sum(), leaves)
    for pair in zip(ours, theirs, strict=True):
        torch.testing.assert_close(*pair)
    value = dbild(*sides)["divergence"].sum()
    assert torch.autograd.grad(value, [sides[1].hidden], allow_unused=True) == (None,)


def test_suppressed_tokens_make_no_number_of_it_invalid() -> None:
    student, teacher = logits_of(0).detach(), logits_of(1).detach()
    both = student.clone()
    both[:, :15] = -torch.inf
    teacher[:, :15] = -torch.inf
    both.requires_grad_()
    found = dbild(both, teacher)["divergence"]
    slope = torch.autograd.grad(found.sum(), both)[0]
    assert found.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_an_on_policy_method_takes_it_for_its_divergence(temperature: float) -> None:
    options = {"curve": 6, "most_leaders": 6, "temperature": temperature}
    method, batch = make(divergence="dbild", **options), question_batch(4)
    loss = only_loss(method, batch)
    ours, theirs, mask = both_logits(method, batch)
    expected = dbild(ours, theirs, leaders=Leaders(6, 3, 6), temperature=temperature)["divergence"]
    torch.testing.assert_close(loss.value, expected[mask].mean())
    assert 3 <= loss.metrics["teacher_leaders"] <= 6


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(ValueError, match="leave support full"):
        make(divergence="dbild", support="teacher")
    with pytest.raises(ValueError, match="3 <= fewest_leaders"):
        make(fewest_leaders=2)
    with pytest.raises(ValueError, match="compares with the teacher alone"):
        make(ExOPD, divergence="dbild", reference=Network(3).double())

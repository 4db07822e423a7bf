import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.methods.sdtt import SDTT
from diffdistill.projection import dense
from diffdistill.types import Batch, Condition, State
from tests.conftest import Spy, randn, rows_of
from tests.toy_texts import (
    MASKS,
    Texts,
    network,
    only_loss,
    student_gradients,
    toy_text_batch,
)

DIVERGENCES = ["reverse-kl", "forward-kl", "tvd", "mse"]
MASK = MASKS["student"]


def make_method(**options: Any) -> SDTT:
    """Return a method whose teacher takes two steps of a quarter of the way."""
    settings: dict[str, Any] = {
        "family": Texts(), "draws": Draws(0), "student": network(), "teacher": network(seed=2),
        "num_steps": 4, "last_steps": 1,
    }  # fmt: skip
    return SDTT(**(settings | options))


def by_hand(batch: Batch, spies: tuple[Spy, Spy]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities ``[K, V]`` of student and target, one hidden token at a time."""
    condition = {"bias": batch["bias"]}
    (seen,) = spies[0].states
    logs = torch.log_softmax(dense(spies[0].model(seen, condition)).detach(), -1)
    told = [
        torch.log_softmax(dense(spies[1].model(state, condition)).detach(), -1)
        for state in spies[1].states
    ]
    ours, theirs = [], []
    for row, i in itertools.product(*map(range, seen.x.shape)):
        if seen.x[row, i] != MASK:
            continue
        # The last step that still saw it hidden.
        last = max(n for n, state in enumerate(spies[1].states) if state.x[row, i] == MASK)
        ours.append(logs[row, i])
        theirs.append(told[last][row, i])
    return torch.stack(ours), torch.stack(theirs)


def divergence_by_hand(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    p, q = ours.exp(), theirs.exp()
    known = p > 0  # all but the mask token
    logs = torch.where(known, ours - theirs, 0.0)
    if name == "reverse-kl":
        return (p * logs).sum(-1)  # KL(student || teacher)
    if name == "forward-kl":
        return (q * -logs).sum(-1)
    return 0.5 * (p - q).abs().sum(-1) if name == "tvd" else logs.square().mean(-1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_steps", [2, 3])
def test_each_token_is_compared_with_the_step_that_settled_it_and_else_the_last(
    divergence: str, teacher_steps: int
) -> None:
    spies = Spy(network()), Spy(network(seed=2))
    batch = toy_text_batch(8)
    method = make_method(
        student=spies[0], teacher=spies[1], divergence=divergence, teacher_steps=teacher_steps
    )
    loss = only_loss(method, batch)
    assert len(spies[1].states) == teacher_steps
    ours, theirs = by_hand(batch, spies)
    assert 0.1 < float(loss.metrics["settled"]) < 0.9
    torch.testing.assert_close(loss.value, divergence_by_hand(divergence, ours, theirs).mean())
    assert loss.count == len(ours)
    assert loss.role == "student"


def test_the_names_of_the_kls_are_those_of_the_references_calls() -> None:
    ours, theirs = (torch.log_softmax(randn(5, 6, seed=s), -1) for s in (0, 1))
    kl = torch.nn.functional.kl_div
    for name, first, second in (("reverse-kl", theirs, ours), ("forward-kl", ours, theirs)):
        expected = kl(first, second, log_target=True, reduction="batchmean")
        found = make_method(divergence=name)._error(ours, theirs).mean()
        torch.testing.assert_close(found, expected)


def test_only_the_student_gets_a_gradient_and_the_teacher_no_graph() -> None:
    spy = Spy(network(seed=2))
    method = make_method(teacher=spy)
    assert student_gradients(method, [toy_text_batch()]).abs().sum() > 0
    assert all(p.grad is None for p in spy.model.parameters())  # type: ignore[attr-defined]
    assert spy.grad_enabled == [False, False]


def test_the_teacher_goes_on_from_what_it_settled_at_a_level_one_step_lower() -> None:
    spies = Spy(network()), Spy(network(seed=2))
    only_loss(make_method(student=spies[0], teacher=spies[1]), toy_text_batch(64))
    (seen,), (first, second) = spies[0].states, spies[1].states
    assert torch.equal(seen.x, first.x)
    torch.testing.assert_close(second.t, (seen.t - 0.999 / 4).clamp(min=1e-3))
    shown = first.x != MASK
    assert torch.equal(second.x[shown], first.x[shown])
    assert not ((second.x == MASK) & shown).any()
    assert second.mask is not None
    assert torch.equal(second.mask, second.x == MASK)


def test_a_token_is_settled_with_the_share_of_its_level_that_a_step_goes() -> None:
    spy = Spy(network(seed=2))
    only_loss(make_method(teacher=spy), toy_text_batch(600))
    first, second = spy.states
    hidden = first.x == MASK
    settled = hidden & (second.x != MASK)
    chance = (0.999 / 4 / first.t).clamp(max=1.0)[:, None].expand_as(hidden)
    for low, high in ((0.0, 0.2497), (0.25, 0.5), (0.5, 1.0)):
        chosen = hidden & ((first.t >= low) & (first.t < high))[:, None]
        expected = chance[chosen].sum()
        error = (chance * (1 - chance))[chosen].sum().sqrt()
        assert (settled[chosen].sum() - expected).abs() <= 4 * error
        assert chosen.sum() > 100


def test_what_the_teacher_settles_is_drawn_from_its_prediction() -> None:
    logits = torch.tensor([-torch.inf, -torch.inf, 0.0, 1.0, 2.0, -1.0, 0.5])

    def constant(state: State, condition: Condition) -> Tensor:
        return logits.expand(*state.x.shape, 7)

    spy = Spy(constant)
    only_loss(make_method(teacher=spy), toy_text_batch(900))
    first, second = spy.states
    drawn = second.x[(first.x == MASK) & (second.x != MASK)]
    found = drawn.bincount(minlength=7) / len(drawn)
    assert len(drawn) > 2000
    torch.testing.assert_close(found, logits.softmax(0), rtol=0, atol=0.04)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_has_nothing_to_learn_from_itself_in_steps_of_no_length(divergence: str) -> None:
    student = network()
    method = make_method(
        student=student, teacher=student, divergence=divergence, num_steps=10**9, last_steps=8
    )
    batch = toy_text_batch()
    loss = only_loss(method, batch)
    assert float(loss.metrics["settled"]) == 0.0
    assert loss.value.item() == pytest.approx(0.0, abs=1e-6)
    assert student_gradients(method, [batch]).abs().max() < 1e-6
    longer = make_method(student=student, teacher=student, divergence=divergence)
    assert only_loss(longer, batch).value.item() > 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_micro_batches_do_not_change_the_step(divergence: str) -> None:
    method, batch = make_method(divergence=divergence), toy_text_batch(6)
    parts = [rows_of(batch, rows) for rows in ([0, 1], [2], [3, 4, 5])]
    torch.testing.assert_close(
        student_gradients(method, [batch]), student_gradients(method, parts), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_plain_logits_give_the_loss_and_gradient_of_projections(divergence: str) -> None:
    batch = toy_text_batch()
    methods: list[Any] = [make_method(divergence=divergence) for _ in range(2)]
    methods[1].student.dense = methods[1].teacher.dense = True
    torch.testing.assert_close(*(only_loss(method, batch).value for method in methods))
    torch.testing.assert_close(*(student_gradients(method, [batch]) for method in methods))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("everything", [True, False])
def test_nothing_and_everything_hidden_give_finite_losses_in_bfloat16(
    divergence: str, everything: bool
) -> None:
    method: Any = make_method(divergence=divergence, t_low=1 - 1e-6)
    for model in (method.student, method.teacher):
        model.to(torch.bfloat16)
    batch = toy_text_batch()
    batch["bias"] = batch["bias"].to(torch.bfloat16)
    batch["student/maskable"] = batch["student/maskable"] & everything
    loss = only_loss(method, batch)
    loss.value.backward()
    assert loss.count == (40 if everything else 1)
    assert loss.value.isfinite()
    assert bool(loss.value > 0) == everything
    assert all(p.grad.isfinite().all() for p in method.student.parameters() if p.grad is not None)


def test_rounds_double_the_step_until_the_student_needs_the_last_steps() -> None:
    method = make_method(num_steps=1024, last_steps=8, round_updates=3)
    assert method.rounds == 7
    assert method.renewals() == {"teacher": range(3, 21, 3)}  # six times
    steps = []
    for _ in range(30):
        steps.append(method.step)
        method.observe({})
    expected = [0.999 / 1024 * 2 ** min(update // 3, 6) for update in range(30)]
    assert steps == pytest.approx(expected)
    assert 0.999 / (2 * steps[-1]) == pytest.approx(8)  # the student's last steps


@pytest.mark.parametrize(
    ("num_steps", "teacher_steps", "last_steps", "rounds"),
    [(1024, 2, 1, 10), (1024, 2, 512, 1), (1000, 2, 8, 6), (729, 3, 1, 6), (4, 4, 1, 1)],
)
def test_the_number_of_rounds(
    num_steps: int, teacher_steps: int, last_steps: int, rounds: int
) -> None:
    method = make_method(num_steps=num_steps, teacher_steps=teacher_steps, last_steps=last_steps)
    assert method.rounds == rounds
    after = [num_steps / teacher_steps**r for r in (rounds, rounds + 1)]
    assert after[0] >= last_steps > after[1]


def test_without_rounds_the_teacher_stays() -> None:
    method = make_method(round_updates=None)
    assert method.renewals() == {}
    method.observe({})
    assert (method.rounds, method.round) == (1, 0)


def test_counting_goes_on_from_a_checkpoint() -> None:
    method, other = make_method(round_updates=2), make_method(round_updates=2)
    for _ in range(3):
        method.observe({})
    other.load_state(method.state())
    assert other.step == method.step == pytest.approx(0.999 / 2)


def test_training_brings_one_step_nearer_to_two() -> None:
    student = network(scale=0.3)
    method = make_method(student=student, teacher=network(seed=2, scale=0.3))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    errors = []
    for step in range(120):
        optimizer.zero_grad()
        loss = only_loss(method, toy_text_batch(8, first_id=8 * step))
        loss.value.backward()
        optimizer.step()
        errors.append(loss.value.item())
    assert sum(errors[-10:]) < 0.2 * sum(errors[:10])


def test_options_out_of_range_are_refused() -> None:
    wrong = {"teacher_steps": 1, "round_updates": 0, "last_steps": 0, "t_low": 0.0, "stratify": -1}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            make_method(**{name: value})
    with pytest.raises(ValueError, match=r"num_steps must be at least .* = 16, not 8"):
        make_method(num_steps=8, last_steps=8)

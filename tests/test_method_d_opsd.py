import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.methods.d_opsd import DOPSD
from diffdistill.pipelines.toy import ToyNetwork
from diffdistill.protocols import Model
from diffdistill.readouts import clean_of
from diffdistill.roles import Roles
from diffdistill.types import Condition, State
from tests.conftest import (
    START,
    Spy,
    clear,
    descend,
    disturb,
    gradients,
    make_batch,
    make_roles,
    make_toy,
    method_gradients,
    randn,
    rows_of,
)

LORA = {"adapter": "lora", "rank": 2, "alpha": 4.0}
FULL = {"adapter": "none"}
LIVE = {"weights": "live"}
FROZEN = {"weights": "frozen"}
EMA = {"weights": "ema", "decay": 0.9}


def make_method(
    student: dict[str, Any], teacher: dict[str, Any], *, shift: float = 1.0, **options: Any
) -> tuple[DOPSD, Roles]:
    family = make_toy(shift=shift)
    roles = make_roles(family, student=student, teacher=teacher)
    players: dict[str, Model] = {"student": roles["student"], "teacher": roles["teacher"]}
    return DOPSD(family=family, draws=Draws(0), **players, **options), roles


def loss_values(method: DOPSD, batch: dict[str, Any]) -> list[float]:
    with torch.no_grad():
        return [loss.value.item() for loss in method.losses(batch, START)]


# closed forms


@pytest.mark.parametrize("exposure", [0.5, 1.0])
def test_the_loss_of_equal_weights_is_the_square_of_what_the_privilege_adds(
    exposure: float,
) -> None:
    method, _ = make_method(FULL, FROZEN, exposure=exposure)
    batch = make_batch(5, seed=0)
    expected = batch["latents"].mean(dim=(1, 2, 3)).mul(exposure).square().mean().item()
    assert loss_values(method, batch) == pytest.approx([expected] * 4, rel=1e-5)


def test_sigma2_scales_each_loss_with_the_square_of_its_noise_level() -> None:
    method, _ = make_method(FULL, FROZEN, shift=3.0, num_steps=3, weight="sigma2")
    batch = make_batch(5, seed=1)
    privilege = batch["latents"].mean(dim=(1, 2, 3)).square().mean().item()
    levels = [1.0, 3 * 2 / 3 / (1 + 2 * 2 / 3), 3 * 1 / 3 / (1 + 2 * 1 / 3)]
    expected = [t**2 * privilege for t in levels]
    assert loss_values(method, batch) == pytest.approx(expected, rel=1e-5)


def test_sigma2_is_the_error_of_the_clean_predictions() -> None:
    method, roles = make_method(LORA, FROZEN, num_steps=3, weight="sigma2")
    disturb(roles["student"], seed=2)
    batch = make_batch(4, seed=3)
    spy = Spy(roles["student"])
    method.student = spy
    found = loss_values(method, batch)
    shown = method.family.condition(batch, exposure=1.0)
    for state, value in zip(spy.states, found, strict=True):
        with torch.no_grad():
            student = clean_of(state, roles["student"](state, spy.conditions[0]))
            teacher = clean_of(state, roles["teacher"](state, shown))
        assert value == pytest.approx((student - teacher).square().mean().item(), rel=1e-5)


# no privilege, no loss


@pytest.mark.parametrize("kind", [LORA, FULL])
def test_a_live_teacher_without_exposure_has_nothing_to_teach(kind: dict[str, Any]) -> None:
    method, roles = make_method(kind, LIVE, exposure=0.0)
    disturb(roles["student"], seed=4)
    assert descend(method.losses(make_batch(3, seed=5), START)) == [0.0] * 4
    assert all(gradient.abs().sum() == 0 for gradient in gradients(roles["student"]).values())


def test_a_live_teacher_with_exposure_has_something_to_teach() -> None:
    method, roles = make_method(LORA, LIVE, exposure=1.0)
    disturb(roles["student"], seed=4)
    assert min(descend(method.losses(make_batch(3, seed=5), START))) > 0.1
    assert any(gradient.abs().sum() > 0 for gradient in gradients(roles["student"]).values())


# who is asked what


@pytest.mark.parametrize("num_steps", [1, 4])
def test_student_and_teacher_are_asked_once_at_each_state_and_in_turn(num_steps: int) -> None:
    method, roles = make_method(LORA, FROZEN, num_steps=num_steps)
    log: list[str] = []
    student = method.student = Spy(roles["student"], log, "student")
    teacher = method.teacher = Spy(roles["teacher"], log, "teacher")
    descend(method.losses(make_batch(3, seed=6), START))
    assert log == ["student", "teacher"] * num_steps
    for ours, theirs in zip(student.states, teacher.states, strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.t, theirs.t)
    assert teacher.grad_enabled == [False] * num_steps
    assert student.grad_enabled == [True] * num_steps


def test_only_the_teacher_sees_the_target() -> None:
    method, roles = make_method(LORA, FROZEN, exposure=0.5)
    student = method.student = Spy(roles["student"])
    teacher = method.teacher = Spy(roles["teacher"])
    batch = make_batch(3, seed=7)
    descend(method.losses(batch, START))
    mean = batch["latents"].mean(dim=(1, 2, 3))
    for told in student.conditions:
        assert torch.equal(told["privilege"], torch.zeros(3))
        assert torch.equal(told["prompt"], batch["prompt"])
    for told in teacher.conditions:
        torch.testing.assert_close(told["privilege"], 0.5 * mean)
        assert torch.equal(told["prompt"], batch["prompt"])


def test_the_losses_are_the_students_and_say_when_the_last_one_comes() -> None:
    method, _ = make_method(LORA, FROZEN, num_steps=3)
    losses = list(method.losses(make_batch(5, seed=8), START))
    assert [(loss.role, loss.count, loss.more) for loss in losses] == [
        ("student", 5, True),
        ("student", 5, True),
        ("student", 5, False),
    ]


@pytest.mark.parametrize("kind", [LORA, FULL])
@pytest.mark.parametrize("teacher", [EMA, FROZEN, LIVE])
def test_gradient_reaches_the_student_and_never_the_teacher(
    kind: dict[str, Any], teacher: dict[str, Any]
) -> None:
    method, roles = make_method(kind, teacher)
    disturb(roles["student"], seed=9)
    descend(method.losses(make_batch(3, seed=10), START))
    own = {id(p) for p in roles["student"].parameters().values()}
    reached = {id(p) for n in roles.networks() for p in n.parameters() if p.grad is not None}
    assert reached == own


def test_a_live_teacher_gives_the_gradient_of_a_frozen_copy_of_the_student() -> None:
    """No gradient through the teacher: the two differ only in sharing memory."""
    batch = make_batch(3, seed=11)
    found = []
    for teacher in (LIVE, {"weights": "ema", "decay": 0.0}):
        method, roles = make_method(FULL, teacher)
        disturb(roles["student"], seed=12)
        roles.average("student")
        found.append(method_gradients(method, roles["student"], [batch]))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


# the walk


def test_the_states_carry_no_graph() -> None:
    method, roles = make_method(LORA, FROZEN)
    disturb(roles["student"], seed=13)
    student = method.student = Spy(roles["student"])
    descend(method.losses(make_batch(2, seed=14), START))
    assert [state.x.requires_grad for state in student.states] == [False] * 4


def test_one_loss_after_another_gives_the_gradient_of_their_sum() -> None:
    method, roles = make_method(FULL, FROZEN)
    disturb(roles["student"], seed=15)
    batch = make_batch(3, seed=16)
    network = roles["student"].network
    descend(method.losses(batch, START))
    found = gradients(roles["student"])

    clear(network)
    total = torch.zeros(())
    for loss in method.losses(batch, START):
        total = total + loss.value * loss.count
    total.backward()
    for name, gradient in gradients(roles["student"]).items():
        torch.testing.assert_close(found[name], gradient)

    clear(network)  # and by hand, at states that a second walk visits without gradients
    shown, prompt = method.family.condition(batch, exposure=1.0), method.family.condition(batch)
    noise = method.draws.normal("rollout", batch["ids"], (3, 4, 4))
    with torch.no_grad():
        walk = method.family.walk(roles["student"], prompt, noise, num_steps=4)
        states = [state for state, _ in walk]
        targets = [roles["teacher"](state, shown) for state in states]
    by_hand = torch.zeros(())
    for state, target in zip(states, targets, strict=True):
        by_hand = by_hand + (roles["student"](state, prompt) - target).square().mean(0).sum() * 3
    (by_hand / (3 * 4 * 4)).backward()
    for name, gradient in gradients(roles["student"]).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


class Kept:
    """One tensor that a graph has saved."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_one_graph_is_alive_at_a_time() -> None:
    method, roles = make_method(FULL, FROZEN, num_steps=3)
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    found: list[int] = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    def student(state: State, condition: Condition) -> Tensor:
        found.append(len(alive))
        return roles["student"](state, condition)

    method.student = student
    peaks = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for loss in method.losses(make_batch(2, seed=17), START):
            peaks.append(len(alive))
            loss.value.backward()
            del loss
    assert found == [0, 0, 0]
    assert min(peaks) == max(peaks) > 0


def linear_family_role(state_factor: float, prompt_factor: float, shift: float) -> Roles:
    roles = make_roles(make_toy(shift=shift), student=FULL)
    network = roles["student"].network
    assert isinstance(network, ToyNetwork)
    with torch.no_grad():
        network.factors.copy_(torch.tensor([state_factor, prompt_factor, 0.0]))
    return roles


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 1.0), (4, 1.0), (7, 1.0), (4, 3.0)])
def test_euler_steps_of_a_linear_velocity_have_a_closed_form(num_steps: int, shift: float) -> None:
    """With v = a x + b, x + b / a shrinks by 1 + a (t' - t) in each step."""
    a, b, prompt = 0.7, -0.4, torch.tensor([0.5, 2.0])
    roles = linear_family_role(a, b, shift)
    family, noise = make_toy(shift=shift), randn(2, 3, 2, 2, seed=18)
    uniform = [1 - k / num_steps for k in range(num_steps + 1)]
    grid = [shift * t / (1 + (shift - 1) * t) for t in uniform]
    offset = (b * prompt / a).reshape(2, 1, 1, 1)
    expected, states = noise, []
    condition = {"prompt": prompt, "privilege": torch.zeros(2)}
    for k in range(num_steps):
        states.append(expected)
        expected = (expected + offset) * (1 + a * (grid[k + 1] - grid[k])) - offset
    walk = family.walk(roles["student"], condition, noise, num_steps=num_steps)
    with torch.no_grad():
        for (state, velocity), x, t in zip(walk, states, grid, strict=False):
            torch.testing.assert_close(state.x, x, rtol=1e-5, atol=1e-5)
            assert state.t.tolist() == pytest.approx([t, t])
            torch.testing.assert_close(velocity, a * (x + offset), rtol=1e-4, atol=1e-5)
    sample = family.sample(roles["student"], condition, noise, num_steps=num_steps)
    torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)


def test_euler_steps_along_the_true_velocity_end_at_the_data() -> None:
    noise, data = randn(2, 3, 4, 4, seed=19), randn(2, 3, 4, 4, seed=20)
    for num_steps in (1, 3):
        sample = make_toy(shift=2.0).sample(
            lambda _state, _condition: noise - data, {}, noise, num_steps=num_steps
        )
        torch.testing.assert_close(sample, data)


# samples, not batches, decide


def test_the_first_state_is_the_noise_of_the_samples() -> None:
    method, roles = make_method(LORA, FROZEN)
    student = method.student = Spy(roles["student"])
    batch = make_batch(3, seed=21, first_id=40)
    descend(method.losses(batch, START))
    expected = Draws(0).normal("rollout", torch.tensor([40, 41, 42]), (3, 4, 4))
    assert torch.equal(student.states[0].x, expected)
    assert student.states[0].t.tolist() == [1.0, 1.0, 1.0]


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    method, roles = make_method(LORA, FROZEN)
    disturb(roles["student"], seed=22)
    batch = make_batch(5, seed=23)
    whole = method_gradients(method, roles["student"], [batch])
    parts = [rows_of(batch, [0, 1, 2]), rows_of(batch, [3, 4])]
    split = method_gradients(method, roles["student"], parts)
    assert whole
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)


# it learns


def test_the_loss_falls_when_the_student_moves_to_the_teacher() -> None:
    method, roles = make_method(LORA, FROZEN)
    disturb(roles["student"], seed=24)
    batch = make_batch(4, seed=25)
    before = sum(descend(method.losses(batch, START)))
    with torch.no_grad():
        for parameter in roles["student"].parameters().values():
            parameter.sub_(1e-4 * parameter.grad)
    assert sum(loss_values(method, batch)) < before


@pytest.mark.parametrize("weight", ["uniform", "sigma2"])
def test_the_student_learns_the_mean_of_what_the_teacher_sees(weight: str) -> None:
    """Two targets under one prompt c and one noise, so no state tells them apart.

    The teacher's velocity is 0.5 x - c - p. Least squares replaces p with its mean, so the
    student's optimum is 0.5 x - c - mean(p): the prompt factor -1 - mean(p) / c, the state
    factor times the mixing as before, and the variance of p is the loss that stays.
    """
    prompt, means = 0.8, torch.tensor([0.2, 1.0])
    ids = torch.arange(4)
    latents = means.repeat(4).reshape(8, 1, 1, 1).expand(8, 3, 4, 4)
    batch = {
        "prompt": torch.full((8,), prompt),
        "latents": latents,
        "ids": ids.repeat_interleave(2),
    }
    method, roles = make_method(FULL, FROZEN, num_steps=2, weight=weight)
    network = roles["student"].network
    assert isinstance(network, ToyNetwork)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 400)
        descend(method.losses(batch, START))
        optimizer.step()
        optimizer.zero_grad()
    levels = [1.0, 1.0] if weight == "uniform" else [1.0, 0.25]
    left = [t * 0.16 for t in levels]
    assert network.factors[1].item() == pytest.approx(-1 - 0.6 / prompt, abs=2e-3)
    mixing = (network.factors[0] * network.mix.weight).detach()
    torch.testing.assert_close(mixing, 0.5 * torch.eye(3), rtol=0, atol=2e-3)
    assert loss_values(method, batch) == pytest.approx(left, rel=1e-3)

from typing import Any

import pytest
import torch

from diffdistill.draws import Draws
from diffdistill.methods.d_opsd import DOPSD
from diffdistill.methods.off_policy import OffPolicy
from diffdistill.roles import Roles
from tests.conftest import (
    START,
    Spy,
    descend,
    disturb,
    gradients,
    make_batch,
    make_roles,
    make_toy,
    method_gradients,
    rows_of,
)

LORA = {"adapter": "lora", "rank": 2}
FROZEN = {"weights": "frozen"}
LIVE = {"weights": "live"}
BOTH = pytest.mark.parametrize("states", ["data", "teacher"])


def make_method(
    teacher: dict[str, Any], *, shift: float = 1.0, **options: Any
) -> tuple[OffPolicy, Roles]:
    family = make_toy(shift=shift)
    roles = make_roles(family, student=LORA, teacher=teacher)
    method = OffPolicy(
        family=family,
        draws=Draws(0),
        student=roles["student"],
        teacher=roles["teacher"],
        **options,
    )
    return method, roles


@BOTH
@pytest.mark.parametrize("exposure", [0.25, 1.0])
def test_the_loss_of_equal_weights_is_the_square_of_what_the_privilege_adds(
    states: str, exposure: float
) -> None:
    method, _ = make_method(FROZEN, states=states, exposure=exposure)
    batch = make_batch(4, seed=0)
    expected = batch["latents"].mean(dim=(1, 2, 3)).mul(exposure).square().mean().item()
    assert descend(method.losses(batch, START)) == pytest.approx([expected] * 4, rel=1e-5)


@BOTH
def test_sigma2_scales_each_loss_with_the_square_of_its_noise_level(states: str) -> None:
    method, _ = make_method(FROZEN, states=states, num_steps=2, weight="sigma2")
    batch = make_batch(4, seed=1)
    privilege = batch["latents"].mean(dim=(1, 2, 3)).square().mean().item()
    expected = [privilege, 0.25 * privilege]
    assert descend(method.losses(batch, START)) == pytest.approx(expected, rel=1e-5)


@BOTH
def test_a_live_teacher_without_exposure_has_nothing_to_teach(states: str) -> None:
    method, roles = make_method(LIVE, states=states, exposure=0.0)
    disturb(roles["student"], seed=2)
    assert descend(method.losses(make_batch(3, seed=3), START)) == [0.0] * 4


def test_data_states_are_the_target_noised_to_the_levels_of_the_grid() -> None:
    method, roles = make_method(FROZEN, shift=3.0, num_steps=3)
    spy = method.student = Spy(roles["student"])
    batch = make_batch(2, seed=4)
    descend(method.losses(batch, START))
    noise = Draws(0).normal("rollout", batch["ids"], (3, 4, 4))
    levels = [1.0, 2 / (1 + 4 / 3), 1 / (1 + 2 / 3)]
    assert [state.t[0].item() for state in spy.states] == pytest.approx(levels)
    for state, t in zip(spy.states, levels, strict=True):
        torch.testing.assert_close(state.x, (1 - t) * batch["latents"] + t * noise)


def test_teacher_states_are_the_teachers_own_walk_under_its_own_view() -> None:
    method, roles = make_method(FROZEN, states="teacher", num_steps=3)
    disturb(roles["student"], seed=5, scale=1.0)
    spy = method.student = Spy(roles["student"])
    batch = make_batch(2, seed=6)
    descend(method.losses(batch, START))
    prompt = batch["prompt"].reshape(2, 1, 1, 1)
    privilege = batch["latents"].mean(dim=(1, 2, 3), keepdim=True)
    x = Draws(0).normal("rollout", batch["ids"], (3, 4, 4))
    for state in spy.states:
        torch.testing.assert_close(state.x, x)
        x = x - (0.5 * x - prompt - privilege) / 3
    assert len(spy.states) == 3


@BOTH
def test_each_state_costs_one_call_of_each_and_only_the_student_has_a_graph(states: str) -> None:
    method, roles = make_method(FROZEN, states=states, num_steps=3)
    disturb(roles["student"], seed=7)
    student = method.student = Spy(roles["student"])
    teacher = method.teacher = Spy(roles["teacher"])
    batch = make_batch(3, seed=8)
    losses = list(method.losses(batch, START))
    assert student.grad_enabled == [True] * 3
    assert teacher.grad_enabled == [False] * 3
    assert [told["privilege"].abs().sum().item() for told in student.conditions] == [0.0] * 3
    assert all((told["privilege"] > 0).all() for told in teacher.conditions)
    assert [(loss.role, loss.count, loss.more) for loss in losses] == [
        ("student", 3, True),
        ("student", 3, True),
        ("student", 3, False),
    ]


@BOTH
@pytest.mark.parametrize("teacher", [FROZEN, LIVE, {"weights": "ema"}])
def test_gradient_reaches_the_student_and_never_the_teacher(
    states: str, teacher: dict[str, Any]
) -> None:
    method, roles = make_method(teacher, states=states)
    disturb(roles["student"], seed=9)
    descend(method.losses(make_batch(3, seed=10), START))
    own = {id(p) for p in roles["student"].parameters().values()}
    reached = {id(p) for n in roles.networks() for p in n.parameters() if p.grad is not None}
    assert reached == own


@BOTH
def test_with_one_step_every_state_is_pure_noise_and_the_method_is_d_opsd(states: str) -> None:
    method, roles = make_method(FROZEN, states=states, num_steps=1)
    disturb(roles["student"], seed=11)
    batch = make_batch(3, seed=12)
    on_policy = DOPSD(
        family=method.family,
        draws=Draws(0),
        student=roles["student"],
        teacher=roles["teacher"],
        num_steps=1,
    )
    expected = method_gradients(on_policy, roles["student"], [batch])
    found = method_gradients(method, roles["student"], [batch])
    assert any(gradient.abs().sum() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_teacher_states_of_a_live_teacher_without_exposure_are_the_students_own() -> None:
    method, roles = make_method(LIVE, states="teacher", exposure=0.0)
    disturb(roles["student"], seed=13)
    spy = method.student = Spy(roles["student"])
    batch = make_batch(2, seed=14)
    descend(method.losses(batch, START))
    noise = Draws(0).normal("rollout", batch["ids"], (3, 4, 4))
    prompt = method.family.condition(batch)
    with torch.no_grad():
        walk = method.family.walk(roles["student"], prompt, noise, num_steps=4)
        for seen, (state, _) in zip(spy.states, walk, strict=True):
            torch.testing.assert_close(seen.x, state.x)


@BOTH
def test_micro_batches_add_up_to_the_whole_batch(states: str) -> None:
    method, roles = make_method(FROZEN, states=states)
    disturb(roles["student"], seed=15)
    batch = make_batch(5, seed=16)
    whole = method_gradients(method, roles["student"], [batch])
    parts = [rows_of(batch, [1, 4, 0]), rows_of(batch, [3, 2])]
    assert whole
    for name, gradient in method_gradients(method, roles["student"], parts).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


@BOTH
def test_the_loss_falls_when_the_student_moves_to_the_teacher(states: str) -> None:
    method, roles = make_method(FROZEN, states=states)
    disturb(roles["student"], seed=17)
    batch = make_batch(4, seed=18)
    before = sum(descend(method.losses(batch, START)))
    found = gradients(roles["student"])
    with torch.no_grad():
        for name, parameter in roles["student"].parameters().items():
            parameter.sub_(1e-4 * found[name])
    assert sum(descend(method.losses(batch, START))) < before

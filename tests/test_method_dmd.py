from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffdistill.draws import Draws
from diffdistill.methods.dmd import DMD
from diffdistill.pipelines.toy import ToyNetwork
from diffdistill.readouts import clean_of
from diffdistill.roles import Roles
from diffdistill.types import Condition, Loss, Progress, State
from tests.conftest import (
    START,
    Spy,
    Towards,
    clear,
    descend,
    disturb,
    gradients,
    make_batch,
    make_roles,
    make_toy,
    rows_of,
)

LORA: dict[str, Any] = {"adapter": "lora", "rank": 2}
HEAD: dict[str, Any] = {**LORA, "head": True}
FROZEN = {"weights": "frozen"}
GAN = {"gan_weight": 0.5, "gan_critic_weight": 0.25}


def make_method(critic: dict[str, Any] = LORA, **options: Any) -> tuple[DMD, Roles]:
    """Return a method whose student and critic are different adapters of the teacher."""
    family = make_toy()
    roles = make_roles(family, student=LORA, teacher=FROZEN, critic=critic)
    disturb(roles["student"], seed=1)
    disturb(roles["critic"], seed=2)
    players: dict[str, Any] = {n: roles[n] for n in ("student", "teacher", "critic")}
    return DMD(family=family, draws=Draws(0), **players, **options), roles


class Point(nn.Module):
    """A student whose samples are one learned point, whatever the state."""

    def __init__(self, point: float) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.full((1, 3, 4, 4), point))

    def forward(self, state: State, condition: Condition) -> Tensor:
        return (state.x - self.point) / state.t.reshape(-1, 1, 1, 1)


def make_points(student: float, teacher: float, critic: float, **options: Any) -> DMD:
    """Return a method of three distributions with one point each, all known exactly."""
    players: dict[str, Any] = {
        "student": Point(student),
        "teacher": Towards(teacher),
        "critic": Towards(critic),
    }
    return DMD(family=make_toy(), draws=Draws(0), **players, **options)


def losses_by_role(losses: Iterator[Loss]) -> dict[str, Loss]:
    return {loss.role: loss for loss in losses}


def student_loss(method: DMD, batch: dict[str, Any]) -> Loss:
    return next(iter(method.losses(batch, START)))


# the direction


def test_a_critic_that_agrees_with_the_teacher_gives_the_student_no_gradient() -> None:
    method, roles = make_method()
    method.critic = roles["teacher"]
    loss = student_loss(method, make_batch(3, seed=0))
    loss.value.backward()
    assert loss.value.item() == 0.0
    assert gradients(roles["student"])
    assert all(gradient.abs().sum() == 0 for gradient in gradients(roles["student"]).values())


def test_the_gradient_points_from_fake_to_real_with_unit_strength() -> None:
    """Sample and critic at 2, teacher at 5: g = (2 - 5) / |2 - 5| = -1, the loss g^2 / 2."""
    method = make_points(2.0, 5.0, 2.0)
    loss = student_loss(method, make_batch(3, seed=1))
    loss.value.backward()
    student = method.student
    assert isinstance(student, Point)
    assert loss.value.item() == pytest.approx(0.5, rel=1e-4)
    expected = torch.full((1, 3, 4, 4), -1 / (3 * 4 * 4))  # of a mean over 48 numbers
    torch.testing.assert_close(student.point.grad, expected, rtol=1e-3, atol=0)


def test_epsilon_is_added_to_the_normalizer() -> None:
    method = make_points(2.0, 5.0, 2.0, epsilon=3.0)
    assert student_loss(method, make_batch(3, seed=2)).value.item() == pytest.approx(0.125, 1e-4)


def test_the_student_learns_the_point_of_the_teacher_and_the_critic_follows() -> None:
    """The critic is exact at every step, so the student walks to 3 and stays there."""
    method = make_points(-1.0, 3.0, -1.0)
    student = method.student
    assert isinstance(student, Point)
    optimizer = torch.optim.SGD(student.parameters(), lr=48 * 0.1)
    for step in range(60):
        method.critic = Towards(student.point.detach().clone())  # type: ignore[assignment]
        student_loss(method, make_batch(2, seed=3, first_id=2 * step)).value.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(student.point.detach().mean(), torch.tensor(3.0), rtol=0, atol=0.11)


# guidance


class Told:
    """A velocity that tells the prompt from the negative prompt."""

    def __call__(self, state: State, condition: Condition) -> Tensor:
        return state.x * 0.5 + condition["prompt"].reshape(-1, 1, 1, 1)


def student_gradient(method: DMD, roles: Roles, batch: dict[str, Any]) -> dict[str, Tensor]:
    clear(roles["student"].network)
    student_loss(method, batch).value.backward()
    return gradients(roles["student"])


def test_extra_guidance_equals_standard_guidance_of_one_more() -> None:
    batch, found = make_batch(3, seed=4), []
    for form, scale in (("extra", 2.0), ("standard", 3.0)):
        method, roles = make_method(guidance=scale, guidance_form=form)
        found.append(student_gradient(method, roles, batch))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_guidance_pushes_the_teacher_away_from_the_negative_prompt() -> None:
    """The guided velocity of ``Told`` is 0.5 x + scale * prompt: the negative prompt is 0."""
    method, roles = make_method(guidance=4.0)
    spy = method.teacher = Spy(Told())
    batch = make_batch(3, seed=5)
    found = student_gradient(method, roles, batch)
    asked = [told["prompt"] for told in spy.conditions]
    assert torch.equal(asked[0], batch["prompt"])
    assert torch.equal(asked[1], torch.zeros(3))
    plain, plain_roles = make_method()
    plain.teacher = lambda state, told: Told()(state, {"prompt": 4.0 * told["prompt"]})
    for name, gradient in student_gradient(plain, plain_roles, batch).items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize(("form", "neutral"), [("standard", 1.0), ("extra", 0.0)])
def test_without_guidance_the_teacher_is_asked_once(form: str, neutral: float) -> None:
    method, roles = make_method(guidance=neutral, guidance_form=form)
    spy = method.teacher = Spy(roles["teacher"])
    student_loss(method, make_batch(2, seed=6))
    assert len(spy.states) == 1


# whose turn it is, and what each loss reaches


@pytest.mark.parametrize(
    ("ratio", "first", "second"),
    [("every-step", ["student", "critic"], ["critic"]), ("alternating", ["student"], ["critic"])],
)
def test_the_student_has_a_turn_in_every_third_step(
    ratio: str, first: list[str], second: list[str]
) -> None:
    method, _ = make_method(student_every=3, ratio=ratio)
    batch = make_batch(2, seed=7)
    turns = [[x.role for x in method.losses(batch, Progress(s, 9))] for s in range(4)]
    assert turns == [first, second, second, first]


def test_outside_its_turn_the_student_samples_without_a_graph() -> None:
    method, roles = make_method(exit="last", num_steps=3)
    spy = method.student = Spy(roles["student"])
    descend(method.losses(make_batch(2, seed=8), Progress(1, 9)))
    assert spy.grad_enabled == [False] * 3
    assert gradients(roles["student"]) == {}


@pytest.mark.parametrize("gan", [False, True])
@pytest.mark.parametrize("role", ["student", "critic"])
def test_each_loss_reaches_its_own_role_and_no_other(role: str, gan: bool) -> None:
    method, roles = make_method(HEAD if gan else LORA, **(GAN if gan else {}), guidance=2.0)
    for loss in method.losses(make_batch(3, seed=9), START):
        if loss.role == role:
            loss.value.backward()
    own = {id(p) for p in roles[role].parameters().values()}
    reached = {id(p) for m in roles.modules() for p in m.parameters() if p.grad is not None}
    assert reached == own


def test_losses_count_samples() -> None:
    method, _ = make_method()
    losses = method.losses(make_batch(3, seed=10), START)
    assert [(loss.role, loss.count, loss.more) for loss in losses] == [
        ("student", 3, False),
        ("critic", 3, False),
    ]


# the student's sampling


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_only_the_last_call_of_the_student_has_a_graph(sampler: str) -> None:
    method, roles = make_method(exit="last", num_steps=3, sampler=sampler)
    spy = method.student = Spy(roles["student"])
    student_loss(method, make_batch(2, seed=11))
    assert spy.grad_enabled == [False, False, True]
    assert not any(state.x.requires_grad for state in spy.states)


def test_a_random_exit_visits_every_step_and_is_the_same_for_all_micro_batches() -> None:
    method, roles = make_method(num_steps=3)
    batch = make_batch(4, seed=12)

    def calls(rows: list[int], step: int) -> int:
        spy = method.student = Spy(roles["student"])
        descend(method.losses(rows_of(batch, rows), Progress(step, 99)))
        return len(spy.states)

    found = [calls([0, 1], step) for step in range(30)]
    assert set(found) == {1, 2, 3}
    assert [calls([2, 3], step) for step in range(30)] == found


def test_the_renoise_sampler_adds_fresh_noise_to_the_clean_prediction() -> None:
    method, roles = make_method(exit="last", num_steps=3)
    spy = method.student = Spy(roles["student"])
    batch = make_batch(2, seed=13)
    with torch.no_grad():
        next(iter(method.losses(batch, START)))
        draws = Draws(0)
        x = draws.normal("rollout", batch["ids"], (3, 4, 4))
        for index, (state, now) in enumerate(zip(spy.states, (1.0, 2 / 3, 1 / 3), strict=True)):
            torch.testing.assert_close(state.x, x)
            assert state.t.tolist() == pytest.approx([now, now])
            clean = x - now * roles["student"](state, spy.conditions[0])
            noise = draws.normal(f"renoise/{index}", batch["ids"], (3, 4, 4))
            x = (1 - (now - 1 / 3)) * clean + (now - 1 / 3) * noise


def test_the_last_exit_scores_the_sample_that_the_pipeline_would_give() -> None:
    method, roles = make_method(exit="last", sampler="euler", num_steps=3)
    batch = make_batch(2, seed=14)
    noise = Draws(0).normal("rollout", batch["ids"], (3, 4, 4))
    prompt = method.family.condition(batch)
    expected = make_toy().sample(roles["student"], prompt, noise, num_steps=3)
    seen: list[Tensor] = []

    def critic(state: State, condition: Condition) -> Tensor:
        """Undo the noising of the student's turn, to see what was scored."""
        t = state.t.reshape(-1, 1, 1, 1)
        noise = Draws(0).normal("noise/student", batch["ids"], (3, 4, 4))
        seen.append((state.x - t * noise) / (1 - t))
        return torch.zeros_like(state.x)

    method.critic = critic  # type: ignore[assignment]
    student_loss(method, batch)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-3)


def test_scores_are_compared_at_levels_within_the_range_and_shifted_to_noise() -> None:
    batch, found = make_batch(500, seed=15), {}
    for shift in (1.0, 5.0):
        method = make_points(
            0.0, 1.0, 0.0, score_shift=shift, score_low=0.1, score_high=0.8, num_steps=1
        )
        spy = Spy(method.critic)
        method.critic = spy  # type: ignore[assignment]
        list(method.losses(batch, START))
        found[shift] = [state.t for state in spy.states]
    for levels in (*found[1.0], *found[5.0]):
        assert levels.min().item() == pytest.approx(0.1, abs=0.02)
        assert levels.max().item() == pytest.approx(0.8, abs=1e-6)
    assert found[1.0][0].mean().item() == pytest.approx(0.48, abs=0.04)
    assert (found[5.0][0] >= found[1.0][0]).all()
    assert not torch.equal(found[1.0][0], found[1.0][1])  # the critic has draws of its own


def test_teacher_and_critic_score_one_and_the_same_state() -> None:
    method, roles = make_method()
    teacher = method.teacher = Spy(roles["teacher"])
    critic = Spy(roles["critic"])
    method.critic = critic  # type: ignore[assignment]
    student_loss(method, make_batch(2, seed=16))
    assert torch.equal(teacher.states[0].x, critic.states[0].x)
    assert torch.equal(teacher.states[0].t, critic.states[0].t)
    assert teacher.grad_enabled == critic.grad_enabled == [False]


# the critic


def test_the_critic_is_at_rest_when_it_predicts_noise_minus_sample() -> None:
    batch = make_batch(3, seed=17)
    exact = losses_by_role(make_points(2.0, 5.0, 2.0).losses(batch, START))["critic"]
    assert exact.value.item() == pytest.approx(0.0, abs=1e-6)
    away = losses_by_role(make_points(2.0, 5.0, 3.0).losses(batch, START))["critic"]
    assert away.value.item() > 1.0


def test_the_critics_loss_is_flow_matching_on_the_students_sample() -> None:
    method, _ = make_method(exit="last", num_steps=1)
    critic = Spy(lambda state, _condition: torch.zeros_like(state.x))
    method.critic = critic  # type: ignore[assignment]
    batch = make_batch(3, seed=18)
    with torch.no_grad():
        loss = losses_by_role(method.losses(batch, Progress(1, 9)))["critic"]
    noise = Draws(0).normal("noise/critic", batch["ids"], (3, 4, 4))
    (state,) = critic.states
    t = state.t.reshape(-1, 1, 1, 1)
    sample = (state.x - t * noise) / (1 - t)
    assert loss.value.item() == pytest.approx((noise - sample).square().mean().item(), rel=1e-3)


# the adversarial term


def test_the_adversarial_term_needs_a_head() -> None:
    with pytest.raises(ValueError, match=r"roles\.critic\.head"):
        make_method(LORA, gan_weight=0.1)


def test_the_students_adversarial_gradient_passes_through_the_critic() -> None:
    """Against a graph from the student through noising and critic to the logit, by hand."""
    options = {"exit": "last", "num_steps": 1}
    batch = make_batch(3, seed=19)
    plain, plain_roles = make_method(HEAD, **options)
    without = student_gradient(plain, plain_roles, batch)
    method, roles = make_method(HEAD, **options, **GAN)
    found = student_gradient(method, roles, batch)

    clear(*roles.modules())
    spy = Spy(roles["teacher"])
    method.teacher = spy
    student_loss(method, batch)
    level, prompt = spy.states[0].t, method.family.condition(batch)
    start = State(Draws(0).normal("rollout", batch["ids"], (3, 4, 4)), torch.ones(3))
    sample = clean_of(start, roles["student"](start, prompt))
    noise = Draws(0).normal("noise/student", batch["ids"], (3, 4, 4))
    logits = roles["critic"].discriminate(method.family.noise(sample, level, noise), prompt)
    realism = softplus(-logits).mean()
    own = roles["student"].parameters()
    expected = torch.autograd.grad(realism, list(own.values()))
    for (name, gradient), adversarial in zip(found.items(), expected, strict=True):
        assert adversarial.abs().sum() > 1e-3
        torch.testing.assert_close(
            gradient, without[name] + 0.5 * adversarial, rtol=1e-3, atol=1e-4
        )


def test_the_adversarial_losses_have_the_values_that_their_weights_say() -> None:
    batch = make_batch(3, seed=20)
    plain = losses_by_role(make_method(HEAD)[0].losses(batch, START))
    gan = losses_by_role(make_method(HEAD, **GAN)[0].losses(batch, START))
    for role, weight in (("student", 0.5), ("critic", 0.25)):
        term = float(gan[role].metrics["gan"])
        assert term > 0.1
        expected = plain[role].value.item() + weight * term
        assert gan[role].value.item() == pytest.approx(expected, rel=1e-5)
        assert not torch.as_tensor(gan[role].metrics["gan"]).requires_grad


class Detector:
    """A critic whose logit is the mean of the state."""

    head = True

    def __call__(self, state: State, condition: Condition) -> Tensor:
        return state.x * 0.0

    def discriminate(self, state: State, condition: Condition) -> Tensor:
        return state.x.mean(dim=(1, 2, 3))


def test_the_adversarial_term_moves_the_sample_to_where_the_logit_is_higher() -> None:
    method = make_points(0.0, 0.0, 0.0)
    method.gan_weight, method.critic = 1.0, Detector()
    method.teacher = method.critic  # so that the matching term is silent
    student = method.student
    assert isinstance(student, Point)
    student_loss(method, make_batch(2, seed=21)).value.backward()
    assert student.point.grad is not None
    assert (student.point.grad < 0).all()


def test_the_critics_adversarial_term_tells_noised_data_from_noised_samples() -> None:
    """Data at 4 and samples at 0 in one noise: their mean logits differ by 4 (1 - t)."""
    method = make_points(0.0, 0.0, 0.0)
    method.gan_weight, method.gan_critic_weight, method.critic = 1.0, 1.0, Detector()
    batch = make_batch(2, seed=22)
    batch["latents"] = torch.full((2, 3, 4, 4), 4.0)
    found = losses_by_role(method.losses(batch, START))["critic"].metrics["gan"]
    ids = batch["ids"]
    t = Draws(0).uniform("time/critic", ids).clamp(0.02, 0.98)
    noise = t * Draws(0).normal("noise/critic", ids, (3, 4, 4)).mean(dim=(1, 2, 3))
    expected = (softplus(-(4 * (1 - t) + noise)) + softplus(noise)).mean()
    assert float(found) == pytest.approx(expected.item(), rel=1e-4)


# samples, not batches, decide


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    method, roles = make_method(HEAD, **GAN)
    batch = make_batch(5, seed=23)

    def total(batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        clear(*roles.modules())
        for part in batches:
            descend(method.losses(part, START))
        return {
            f"{n}.{key}": gradient
            for n in ("student", "critic")
            for key, gradient in gradients(roles[n]).items()
        }

    whole = total([batch])
    parts = total([rows_of(batch, [3, 0]), rows_of(batch, [1, 2, 4])])
    assert len(whole) == len(parts) == 2 + 2 + 6
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-4)


def test_the_critic_learns_the_velocity_of_the_students_samples() -> None:
    """Samples are 1 in every pixel and t is 1/2: noise - sample = 2 x - 2 under the prompt 1."""
    method = make_points(1.0, 0.0, 0.0, score_low=0.5, score_high=0.5, num_steps=1)
    critic = make_roles(method.family, critic={})["critic"]
    method.critic = critic
    network = critic.network
    assert isinstance(network, ToyNetwork)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for step in range(1, 300):
        batch = make_batch(4, seed=24, first_id=4 * step)
        batch["prompt"] = torch.ones(4)
        for loss in method.losses(batch, Progress(step, 10**6)):
            if loss.role == "critic":
                loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
    mixing = (network.factors[0] * network.mix.weight).detach()
    torch.testing.assert_close(mixing, 2 * torch.eye(3), rtol=0, atol=0.02)
    assert network.factors[1].item() == pytest.approx(-2.0, abs=0.02)

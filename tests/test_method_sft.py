from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.methods.sft import SFT
from diffdistill.pipelines.toy import ToyNetwork
from diffdistill.roles import Roles
from diffdistill.types import Condition, State
from tests.conftest import (
    START,
    Spy,
    Towards,
    descend,
    disturb,
    gradients,
    make_batch,
    make_roles,
    make_toy,
    method_gradients,
    rows_of,
)


def make_method(**options: Any) -> tuple[SFT, Roles]:
    family = make_toy()
    roles = make_roles(family, student={"adapter": "lora", "rank": 2})
    return SFT(family=family, draws=Draws(0), student=roles["student"], **options), roles


def nothing(state: State, condition: Condition) -> Tensor:
    return torch.zeros_like(state.x)


def test_the_target_is_noise_minus_data() -> None:
    method, _ = make_method()
    method.student = nothing
    batch = make_batch(4, seed=0)
    noise = Draws(0).normal("noise", batch["ids"], (3, 4, 4))
    expected = (noise - batch["latents"]).square().mean().item()
    assert descend_without_graph(method, batch) == pytest.approx([expected])


def descend_without_graph(method: SFT, batch: dict[str, Any]) -> list[float]:
    with torch.no_grad():
        return [loss.value.item() for loss in method.losses(batch, START)]


def test_the_true_velocity_has_no_loss_at_any_noise_level() -> None:
    batch = make_batch(6, seed=1)
    for time in ("uniform", "logit-normal"):
        method, _ = make_method(time=time)
        method.student = Towards(batch["latents"])
        assert descend_without_graph(method, batch) == pytest.approx([0.0], abs=1e-6)


def test_the_student_is_asked_once_on_the_way_from_data_to_noise_and_told_the_prompt() -> None:
    method, roles = make_method()
    spy = method.student = Spy(roles["student"])
    batch = make_batch(4, seed=2)
    (loss,) = method.losses(batch, START)
    (state,), (told,) = spy.states, spy.conditions
    t = state.t.reshape(-1, 1, 1, 1)
    noise = Draws(0).normal("noise", batch["ids"], (3, 4, 4))
    torch.testing.assert_close(state.x, (1 - t) * batch["latents"] + t * noise)
    assert torch.equal(told["prompt"], batch["prompt"])
    assert torch.equal(told["privilege"], torch.zeros(4))
    assert (loss.role, loss.count, loss.more) == ("student", 4, False)


def times(batch: dict[str, Any], **options: Any) -> Tensor:
    method, _ = make_method(**options)
    spy = method.student = Spy(nothing)
    descend_without_graph(method, batch)
    return spy.states[0].t


def test_noise_levels_have_the_density_that_was_asked_for() -> None:
    batch = make_batch(3000, seed=3)
    uniform = times(batch, time="uniform")
    quantiles = torch.quantile(uniform, torch.tensor([0.1, 0.5, 0.9]))
    assert quantiles.tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    normal = torch.logit(times(batch, time="logit-normal", mean=-1.0, std=0.5))
    assert normal.mean().item() == pytest.approx(-1.0, abs=0.04)
    assert normal.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("time", ["uniform", "logit-normal"])
def test_shift_multiplies_the_odds_of_noise(time: str) -> None:
    batch = make_batch(16, seed=4)
    plain, moved = times(batch, time=time), times(batch, time=time, shift=4.0)
    torch.testing.assert_close(moved / (1 - moved), 4 * plain / (1 - plain), rtol=1e-4, atol=0)


def test_the_gradient_reaches_the_adapter_and_not_the_base() -> None:
    method, roles = make_method()
    disturb(roles["student"], seed=5)
    descend(method.losses(make_batch(3, seed=6), START))
    own = roles["student"].parameters()
    assert set(gradients(roles["student"])) == set(own)
    base = [p for p in roles["student"].network.parameters() if id(p) not in map(id, own.values())]
    assert len(base) == 2
    assert all(parameter.grad is None for parameter in base)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    method, roles = make_method()
    disturb(roles["student"], seed=7)
    batch = make_batch(5, seed=8)
    whole = method_gradients(method, roles["student"], [batch])
    parts = [rows_of(batch, [4]), rows_of(batch, [2, 0, 1, 3])]
    assert whole
    for name, gradient in method_gradients(method, roles["student"], parts).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def test_the_student_learns_the_velocity_of_constant_images() -> None:
    """At t = 1/2, an image of prompt c in every pixel has noise - data = 2 x - 2 c."""
    family = make_toy()
    roles = make_roles(family, student={})
    method = SFT(family=family, draws=Draws(0), student=roles["student"], std=0.0)
    network = roles["student"].network
    assert isinstance(network, ToyNetwork)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for step in range(300):
        batch = make_batch(8, seed=step, first_id=8 * step)
        batch["latents"] = batch["prompt"].reshape(8, 1, 1, 1).expand(8, 3, 4, 4)
        descend(method.losses(batch, START))
        optimizer.step()
        optimizer.zero_grad()
    mixing = (network.factors[0] * network.mix.weight).detach()
    torch.testing.assert_close(mixing, 2 * torch.eye(3), rtol=0, atol=0.01)
    assert network.factors[1].item() == pytest.approx(-2.0, abs=0.01)

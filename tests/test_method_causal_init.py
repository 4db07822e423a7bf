from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill.draws import Draws
from diffdistill.methods.causal_init import CausalInit
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.readouts import clean_of, guided
from tests.conftest import START, Spy, clear
from tests.tiny_streams import CLIP, Exact, make_family, stream_batch


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> WanStreaming:
    folder: Path = tmp_path_factory.mktemp("stream") / "wan"
    return make_family(folder)


@pytest.fixture(scope="module")
def players(family: WanStreaming) -> dict[str, Exact]:
    return {name: Exact(family, seed) for seed, name in enumerate(("student", "teacher"))}


def make_method(family: WanStreaming, players: dict[str, Any], **options: Any) -> CausalInit:
    return CausalInit(family=family, draws=Draws(0), **players, **options)


def test_a_trajectory_passes_through_the_states_of_the_teachers_own_sampling(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(family, players, guidance=1.0, num_steps=4, num_teacher_steps=4)
    batch = stream_batch(2)
    prompt = family.condition(batch)
    states, end = method._trajectory(batch, prompt)
    noise = Draws(0).normal("rollout", batch["ids"], (16, CLIP, 4, 4))
    with torch.no_grad():
        walked = list(family.walk(players["teacher"], prompt, noise, num_steps=4))
    torch.testing.assert_close(states, torch.stack([s.x for s, _ in walked]).double())
    torch.testing.assert_close(end, clean_of(*walked[-1]).double(), rtol=1e-5, atol=1e-6)


def test_more_teacher_steps_keep_the_students_levels_and_refine_the_end(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    batch = stream_batch(1)
    ends = []
    for steps in (4, 64, 128):
        method = make_method(family, players, guidance=1.0, num_teacher_steps=steps)
        states, end = method._trajectory(batch, family.condition(batch))
        assert len(states) == 4
        ends.append(end)
    assert (ends[1] - ends[2]).norm() < 0.2 * (ends[0] - ends[2]).norm()


def test_the_teacher_is_guided(family: WanStreaming, players: dict[str, Exact]) -> None:
    batch = stream_batch(1)
    method = make_method(family, players, guidance=3.0)
    state = family.noise(batch["latents"], torch.tensor([0.5]), batch["latents"].flip(0))
    prompt, negative = (family.condition(batch, negative=n) for n in (False, True))
    teacher = players["teacher"]
    expected = guided(teacher(state, prompt), teacher(state, negative), 3.0, "standard")
    assert torch.equal(method._guided(state, prompt, negative), expected)


def test_each_block_is_at_a_level_and_in_the_state_of_that_level(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(family, players, num_steps=4)
    batch = stream_batch(2)
    levels = family.grid(4, (16, CLIP, 4, 4))
    # states that say which level, sample and frame they are
    states = torch.arange(4 * 2 * CLIP).view(4, 2, 1, CLIP, 1, 1).expand(4, 2, 16, CLIP, 4, 4)
    seen = set()
    for use in range(12):
        mixed = method._mixed(batch, states, levels, use)
        for row in range(2):
            for frame in range(CLIP):
                level = levels.tolist().index(mixed.t[row, frame].item())
                assert (mixed.x[row, :, frame] == states[level, row, :, frame]).all()
                assert mixed.t[row, frame] == mixed.t[row, frame // 2 * 2]
                seen.add(level)
    assert seen == {0, 1, 2, 3}


def test_ode_regression_predicts_the_end_without_seeing_later_blocks(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    student = Spy(players["student"])
    method = make_method(family, {**players, "student": student}, num_uses=2, num_teacher_steps=4)
    batch = stream_batch(1)
    losses = list(method.losses(batch, START))
    assert len(losses) == 2
    assert not method.needs_images()
    _, end = method._trajectory(batch, family.condition(batch))
    state, condition = student.states[1], student.conditions[1]
    again = clean_of(state, players["student"](state, condition))
    expected = (again - end).square().mean().item()
    assert losses[1].value.item() == pytest.approx(expected, rel=1e-5)
    assert condition["view"].groups[0].sees == (0, 1)


@pytest.mark.parametrize("mode", ["teacher-forcing", "diffusion-forcing"])
def test_forcing_denoises_blocks_at_levels_of_their_own(family: WanStreaming, mode: str) -> None:
    network: Any = family.network().requires_grad_(True)

    def student(state: Any, condition: Any) -> torch.Tensor:
        return family.predict(network, state, condition)

    spy = Spy(student)
    players: dict[str, Any] = {"student": spy, "teacher": Spy(student)}
    method = make_method(family, players, mode=mode)
    batch = stream_batch(2)
    [loss] = list(method.losses(batch, START))
    assert method.needs_images()
    assert not players["teacher"].states
    state, condition = spy.states[0], spy.conditions[0]
    assert (condition["clean"] is not None) == (mode == "teacher-forcing")
    assert state.t.shape == (2, CLIP)
    blocks = state.t.view(2, -1, 2)
    assert torch.equal(blocks[..., 0], blocks[..., 1])
    assert blocks[..., 0].unique().numel() == blocks[..., 0].numel()
    noise = Draws(0).normal("noise", batch["ids"], (16, CLIP, 4, 4))
    level = state.t[:, None, :, None, None]
    torch.testing.assert_close(state.x, (1 - level) * batch["latents"] + level * noise)
    velocity = student(state, condition)
    torch.testing.assert_close(
        loss.value, (velocity - (noise - batch["latents"])).square().mean(), rtol=1e-5, atol=0
    )


def test_the_teacher_of_a_regression_gets_no_gradient(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    clear(*players.values())
    method = make_method(family, players, num_uses=1, num_teacher_steps=4)
    for loss in method.losses(stream_batch(1), START):
        loss.value.backward()
    assert all(p.grad is None for p in players["teacher"].parameters())
    assert any(p.grad is not None for p in players["student"].parameters())
    clear(*players.values())

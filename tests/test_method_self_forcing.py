import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.methods.dmd import DMD
from diffdistill.methods.self_forcing import SelfForcing
from diffdistill.pipelines.streaming import cached_frames, next_block
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.readouts import clean_of
from diffdistill.session import build
from diffdistill.types import Condition, Loss, Progress, State
from tests import tiny
from tests.conftest import CPU, START, Spy, clear, randn, rows_of
from tests.tiny_streams import CLIP, Exact, make_family, stream_batch, stream_values

CRITIC_TURN = Progress(1, 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream") / "wan"


@pytest.fixture(scope="module")
def family(folder: Path) -> WanStreaming:
    return make_family(folder)


@pytest.fixture(scope="module")
def players(family: WanStreaming) -> dict[str, Exact]:
    return {name: Exact(family, seed) for seed, name in enumerate(("student", "teacher", "critic"))}


def make_method(family: WanStreaming, players: dict[str, Any], **options: Any) -> SelfForcing:
    return SelfForcing(family=family, draws=Draws(0), **players, **options)


def student_losses(losses: Iterator[Loss]) -> list[Loss]:
    """The student's losses, each back-propagated before the next is asked for."""
    found = []
    for loss in losses:
        if loss.role == "student":
            (loss.value * loss.count).backward()
            found.append(loss)
    return found


def student_gradients(method: SelfForcing, *batches: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of the count-weighted mean, as the trainer descends it."""
    student: Any = method.student
    clear(student)
    losses = [loss for batch in batches for loss in student_losses(method.losses(batch, START))]
    total = sum(loss.count for loss in losses)
    named = student.named_parameters()
    found = {name: p.grad / total for name, p in named if p.grad is not None}
    clear(student)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"exits": "per-block"}, {"exit": "last"}, {"sampler": "euler"}, {"epsilon": 1e-6}],
)
def test_the_gradient_block_by_block_is_that_of_the_whole_graph(
    family: WanStreaming, players: dict[str, Exact], options: dict[str, Any]
) -> None:
    whole, block = (
        student_gradients(
            make_method(family, players, backward=backward, **options),
            stream_batch(2),
        )
        for backward in ("whole", "block")
    )
    assert whole.keys() == block.keys()
    assert len(whole) > 20
    for name, gradient in whole.items():
        torch.testing.assert_close(block[name], gradient, rtol=1e-9, atol=1e-12)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_of_the_blocks_losses_is_the_loss_of_the_whole(
    family: WanStreaming, players: dict[str, Exact], reduction: str
) -> None:
    [whole], blocks = (
        student_losses(
            make_method(family, players, backward=b, reduction=reduction).losses(
                stream_batch(2), START
            )
        )
        for b in ("whole", "block")
    )
    assert len(blocks) == CLIP // 2
    assert sum(loss.count for loss in blocks) == pytest.approx(whole.count)
    mean = sum(loss.value * loss.count for loss in blocks) / whole.count
    torch.testing.assert_close(mean, whole.value)
    assert [loss.more for loss in blocks] == [True, True, False]


def test_one_micro_batch_of_two_is_two_of_one(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(family, players)
    batch = stream_batch(2)
    together = student_gradients(method, batch)
    apart = student_gradients(method, rows_of(batch, [0]), rows_of(batch, [1]))
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-7, atol=1e-10)


def test_a_clip_of_one_block_without_a_past_is_image_dmd(
    folder: Path, players: dict[str, Exact]
) -> None:
    alone = make_family(folder, block_frames=CLIP, window_frames=None)
    options: dict[str, Any] = {"guidance": 4.0, "score_shift": 5.0, "exit": "last"}
    method = make_method(alone, players, **options, sampler="euler", backward="whole")
    image = DMD(family=alone, draws=Draws(0), **players, **options, sampler="euler")
    batch = stream_batch(1)
    values = [next(iter(m.losses(batch, START))).value for m in (method, image)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-9)


def test_only_the_last_call_of_a_block_has_a_graph(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    student = Spy(players["student"])
    method = make_method(
        family, {**players, "student": student}, backward="whole", exit="last", num_steps=3
    )
    next(iter(method.losses(stream_batch(1), START)))
    # three steps for each of three blocks, and one call to cache each block but the last
    once = [False, False, True]
    assert student.grad_enabled == [*once, False, *once, False, *once]


def test_block_by_block_costs_one_more_call_for_each_block(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    calls = []
    for backward in ("whole", "block"):
        student = Spy(players["student"])
        method = make_method(family, {**players, "student": student}, backward=backward)
        student_losses(method.losses(stream_batch(1), START))
        calls.append(len(student.states))
    assert calls[1] == calls[0] + CLIP // 2


def test_the_critics_turn_keeps_no_graph_of_the_student(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    student = Spy(players["student"])
    method = make_method(family, {**players, "student": student}, backward="whole")
    [loss] = list(method.losses(stream_batch(1), CRITIC_TURN))
    assert loss.role == "critic"
    assert not any(student.grad_enabled)
    clear(*players.values())
    loss.value.backward()
    assert all(p.grad is None for n in ("student", "teacher") for p in players[n].parameters())
    assert any(p.grad is not None for p in players["critic"].parameters())
    clear(*players.values())


def test_the_students_losses_reach_the_student_alone(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    clear(*players.values())
    student_losses(make_method(family, players).losses(stream_batch(1), START))
    assert all(p.grad is None for n in ("critic", "teacher") for p in players[n].parameters())
    clear(*players.values())


def test_blocks_exit_together_or_each_at_its_own_step(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    steps = [
        make_method(family, players, exits=kind)._exits(40, 3) for kind in ("shared", "per-block")
    ]
    assert len(set(steps[0])) == 1
    assert set(steps[1]) == {0, 1, 2, 3}


def test_the_teacher_and_the_critic_see_the_clip_in_both_directions(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    watched = {name: Spy(players[name]) for name in ("teacher", "critic")}
    method = make_method(family, {**players, **watched})
    student_losses(method.losses(stream_batch(1), START))
    for spy in watched.values():
        assert all("view" not in condition for condition in spy.conditions)
        assert all(state.x.shape[2] == CLIP for state in spy.states)


# long streams


def test_of_a_long_stream_the_last_clip_is_scored(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    critic = Spy(players["critic"])
    method = make_method(family, {**players, "critic": critic}, rollout_frames=CLIP + 8)
    lengths = {method._stream_frames(CLIP, step) for step in range(60)}
    assert lengths == {CLIP, CLIP + 2, CLIP + 4, CLIP + 6, CLIP + 8}
    step = next(s for s in range(0, 100, 5) if method._stream_frames(CLIP, s) > CLIP)
    losses = student_losses(method.losses(stream_batch(1), Progress(step, 100)))
    assert len(losses) == CLIP // 2 - 1  # nothing is learned from the first block
    assert critic.states[0].x.shape[2] == CLIP


def test_the_first_scored_frame_of_a_long_stream_is_encoded_anew(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(family, players, rollout_frames=CLIP + 2)
    step = next(s for s in range(100) if method._stream_frames(CLIP, s) > CLIP)
    rollout = method._roll_out(
        stream_batch(1), family.condition(stream_batch(1)), Progress(step, 100), False
    )
    scored = method._scored(rollout, CLIP)
    assert scored.first == 2
    assert scored.learned == 4
    stream = rollout.sample
    assert torch.equal(scored.sample[:, :, 1:], stream[:, :, 3:])
    still = family.decode(stream[:, :, :3])[0, -1:]
    torch.testing.assert_close(scored.sample[0, :, :1].float(), family.encode_video(still))


@pytest.mark.parametrize("reencode", [True, False])
def test_the_gradient_of_a_long_stream_is_the_same_block_by_block(
    family: WanStreaming, players: dict[str, Exact], reencode: bool
) -> None:
    options: dict[str, Any] = {"rollout_frames": CLIP + 4, "reencode": reencode}
    seed = next(s for s in range(50) if Draws(s).integer("frames", 0, 3) == 2)
    gradients = []
    for backward in ("whole", "block"):
        method = make_method(family, players, backward=backward, **options)
        method.draws = Draws(seed)
        gradients.append(student_gradients(method, stream_batch(1)))
    assert gradients[0].keys() == gradients[1].keys()
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_a_repeated_call_that_gives_another_sample_gets_the_same_direction(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    class Shaken(torch.nn.Module):
        """A student whose calls with a graph are off by a constant."""

        def __init__(self, shift: float) -> None:
            super().__init__()
            self.exact = players["student"]
            self.shift = shift

        def forward(self, state: State, condition: Condition) -> Tensor:
            return self.exact(state, condition) + self.shift * torch.is_grad_enabled()

    gradients = [
        student_gradients(
            make_method(family, {**players, "student": Shaken(shift)}), stream_batch(1)
        )
        for shift in (0.0, 3.0)
    ]
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("frames", "problem"), [(CLIP - 2, "must be"), (CLIP + 1, "must be")])
def test_a_stream_that_does_not_fit_is_refused(
    family: WanStreaming, players: dict[str, Exact], frames: int, problem: str
) -> None:
    method = make_method(family, players, rollout_frames=frames)
    with pytest.raises(UserError, match=problem):
        next(iter(method.losses(stream_batch(1), START)))


def test_a_stream_of_absolute_positions_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    values = stream_values(tmp_path, compile=True)
    with pytest.raises(UserError, match=r"set family\.positions: relative"):
        build(parse_config(values), CPU)
    assert not compiled
    values["family"]["positions"] = "relative"
    build(parse_config(values), CPU)
    assert compiled


def test_a_long_stream_of_one_block_clips_has_nothing_to_learn(
    folder: Path, players: dict[str, Exact]
) -> None:
    alone = make_family(folder, block_frames=CLIP, window_frames=None)
    method = make_method(alone, players, rollout_frames=2 * CLIP)
    with pytest.raises(UserError, match="reencode"):
        next(iter(method.losses(stream_batch(1), START)))


def test_blocks_let_go_of_their_past_once_they_are_learned(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    pasts: list[Any] = []
    student = Spy(players["student"])
    losses = make_method(family, {**players, "student": student}).losses(stream_batch(1), START)
    for loss in losses:
        if loss.role == "critic":
            break
        (loss.value * loss.count).backward()
        pasts = [c["view"].past[0].layers[0].keys for c in student.conditions if c["view"].past]
        kept = [weakref.ref(keys) for keys in pasts]
    student.conditions.clear()
    del pasts, loss
    assert kept
    assert not any(reference() is not None for reference in kept)
    clear(*players.values())


# the family's streams


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"sink_decay": 2.0}, r"in \[0, 1\]"),
        ({"sink_decay": 0.9, "sink_frames": 2, "window_frames": 5}, "whole blocks"),
        ({"sink_decay": 0.9, "sink_frames": 2, "window_frames": 6}, "positions: relative"),
        ({"context_noise": 1.0}, "context_noise"),
        ({"shift": 0.0}, "shift"),
        ({"window_frames": 3, "sink_frames": 2}, "window_frames"),
    ],
)
def test_a_family_that_cannot_stream_so_is_refused(
    folder: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        make_family(folder, **options)


def test_a_whole_clip_with_relative_positions_and_a_sink_is_refused(folder: Path) -> None:
    family = make_family(folder, positions="relative", sink_frames=2)
    with pytest.raises(UserError, match="positions: absolute"):
        family.causal(family.condition(stream_batch(1)), CLIP)


def test_a_roll_out_is_the_stream_of_the_same_noise(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    batch = stream_batch(1)
    condition = family.condition(batch)
    noise = batch["latents"]

    def renoise(block: int, step: int) -> Tensor:
        ids = batch["ids"]
        return Draws(3).normal(f"{block}/{step}", ids, (16, 2, 4, 4))

    rolled = family.rollout(
        players["student"], condition, noise, num_steps=3, exits=[2] * 3, renoise=renoise
    ).sample
    stream = family.stream(
        players["student"],
        lambda block: condition,
        lambda block: noise[:, :, 2 * block : 2 * block + 2],
        num_steps=3,
        renoise=renoise,
    )
    for index, block in zip(range(3), stream, strict=False):
        torch.testing.assert_close(block, rolled[:, :, 2 * index : 2 * index + 2])


def test_finished_blocks_are_cached_clean(family: WanStreaming, players: dict[str, Exact]) -> None:
    batch, student = stream_batch(1), Spy(players["student"])
    rolled = family.rollout(
        student, family.condition(batch), batch["latents"], num_steps=2, exits=[1, 0, 1],
        renoise=None,
    ).sample  # fmt: skip
    caching = [
        state
        for state, told in zip(student.states, student.conditions, strict=True)
        if told["view"].kept is not None
    ]
    assert len(caching) == 2
    for index, state in enumerate(caching):
        assert state.t.item() == 0.0
        assert torch.equal(state.x, rolled[:, :, 2 * index : 2 * index + 2])


def test_a_stream_of_one_block_takes_the_same_steps_as_the_bidirectional_model(
    folder: Path, players: dict[str, Exact]
) -> None:
    alone = make_family(folder, block_frames=CLIP, window_frames=None)
    batch = stream_batch(1)
    walk = alone.walk(players["student"], alone.condition(batch), batch["latents"], num_steps=4)
    expected = [clean_of(*step) for step in walk][-1]
    streamed = alone.sample(
        players["student"], alone.condition(batch), batch["latents"], num_steps=4
    )
    torch.testing.assert_close(streamed, expected, rtol=1e-6, atol=1e-7)


def test_a_prompt_switch_recaches_what_is_visible(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    first, second = (family.condition(stream_batch(1, first_id=i)) for i in (0, 7))
    noise = stream_batch(1, frames=10)["latents"]

    def run(switch: int, told: Any) -> list[Tensor]:
        stream = family.stream(
            players["student"],
            lambda block: first if block < switch else told,
            lambda block: noise[:, :, 2 * block : 2 * block + 2],
            num_steps=2,
            renoise=None,
        )
        return [block for _, block in zip(range(5), stream, strict=False)]

    same = {**first}  # equal, but another object: what was cached is cached again
    torch.testing.assert_close(run(1, same)[1], run(9, same)[1])
    switched = run(3, second)
    assert torch.equal(torch.cat(switched[:3]), torch.cat(run(9, second)[:3]))
    assert not torch.allclose(switched[3], run(9, second)[3], atol=1e-4)


def test_after_a_prompt_switch_the_past_is_what_the_new_prompt_makes_of_it(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    first, second = (family.condition(stream_batch(1, first_id=i)) for i in (0, 7))
    noise = stream_batch(1)["latents"].split(2, dim=2)
    student = players["student"]
    stream = family.stream(
        student, lambda block: second if block else first, lambda block: noise[block],
        num_steps=1, renoise=None,
    )  # fmt: skip
    before, after = next(stream), next(stream)
    view = next_block(family.cache(), 2, keep=True)
    with torch.no_grad():
        student(State(before, torch.zeros(1)), {**second, "view": view})
        cache = family.cache().extended(cached_frames(view))
        state = State(noise[1], torch.ones(1))
        expected = clean_of(state, student(state, {**second, "view": next_block(cache, 2)}))
    torch.testing.assert_close(after, expected)


def test_pixels_of_a_stream_are_those_of_the_whole(family: WanStreaming) -> None:
    latents = stream_batch(1)["latents"]
    whole = family.decode(latents)
    parts = list(family.watch(iter(latents.split(2, dim=2))))
    assert [part.shape[1] for part in parts] == [5, 8, 8]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)


def test_pixels_of_a_stream_of_a_residual_decoder_are_those_of_the_whole(tmp_path: Path) -> None:
    tiny.save_wan(tmp_path / "wan22", like="2.2")
    family = make_family(tmp_path / "wan22")
    latents = randn(1, 48, CLIP, 2, 2, seed=0)
    parts = list(family.watch(iter(latents.split(2, dim=2))))
    torch.testing.assert_close(
        torch.cat(parts, dim=1), family.decode(latents), rtol=1e-5, atol=1e-6
    )


def test_two_streams_may_be_watched_at_once(family: WanStreaming) -> None:
    clips = [stream_batch(1, first_id=i)["latents"] for i in (0, 3)]
    streams = [family.watch(iter(clip.split(2, dim=2))) for clip in clips]
    shown = [torch.cat(pair, dim=0) for pair in zip(*streams, strict=True)]
    expected = torch.cat([family.decode(clip) for clip in clips])
    torch.testing.assert_close(torch.cat(shown, dim=1), expected, rtol=1e-5, atol=1e-6)


def test_a_causal_call_sees_the_clean_past_if_it_is_given(family: WanStreaming) -> None:
    network = family.network()
    batch = stream_batch(1)
    state = family.noise(batch["latents"], torch.full((1, CLIP), 0.5), batch["latents"].flip(1))
    condition = family.condition(batch)
    blind = family.predict(network, state, family.causal(condition, CLIP))
    told = family.predict(network, state, family.causal(condition, CLIP, clean=batch["latents"]))
    torch.testing.assert_close(blind[:, :, :2], told[:, :, :2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(blind[:, :, 2:], told[:, :, 2:], atol=1e-4)
    assert told.shape == blind.shape


def test_levels_of_the_sampling_grid_fall(family: WanStreaming) -> None:
    assert all(a > b for a, b in pairwise(family.grid(4, (16, 6, 4, 4)).tolist()))


def test_a_step_of_the_critic_alone_holds_on_to_no_past(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(family, players)
    batch = stream_batch(1)
    prompt = family.condition(batch)
    assert not method._roll_out(batch, prompt, CRITIC_TURN, False).calls
    assert len(method._roll_out(batch, prompt, START, True).calls) == CLIP // 2

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.methods.self_forcing import SelfForcing
from diffdistill.methods.stream_r1 import StreamR1
from diffdistill.panel import Panel
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.rewarding import Reward
from diffdistill.types import Batch, Loss
from tests.conftest import CPU, START, clear, rows_of
from tests.tiny_streams import CLIP, Exact, make_family, stream_batch


@dataclass(kw_only=True)
class Brightness(Reward):
    """Mean brightness of the first frame, and of the left half."""

    axes: ClassVar = ("early", "left")
    scale: float = 1.0
    offset: float = 0.0

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        half = pixels.shape[-1] // 2
        early = pixels[:, :1].square().mean(dim=(1, 2, 3, 4))
        left = pixels[..., :half].square().mean(dim=(1, 2, 3, 4))
        return {
            "early": self.scale * early + self.offset,
            "left": self.scale * left + self.offset,
        }


@dataclass(kw_only=True)
class Constant(Brightness):
    """The same score for every clip."""

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        zero = 0.0 * pixels.sum(dim=(1, 2, 3, 4))
        return dict.fromkeys(self.axes, zero + self.offset)


@dataclass(kw_only=True)
class Coarse(Reward):
    """Mean brightness, whose saliency has one cell for a frame."""

    axes: ClassVar = ("coarse",)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"coarse": pixels.square().mean(dim=(1, 2, 3, 4))}

    def places(self, gradient: Tensor, videos: Tensor) -> Tensor:
        return gradient.norm(dim=2).mean(dim=(2, 3), keepdim=True)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> WanStreaming:
    folder: Path = tmp_path_factory.mktemp("stream") / "wan"
    return make_family(folder)


@pytest.fixture(scope="module")
def players(family: WanStreaming) -> dict[str, Exact]:
    return {name: Exact(family, seed) for seed, name in enumerate(("student", "teacher", "critic"))}


def make_method(
    family: WanStreaming, players: dict[str, Any], reward: Reward | None = None, **options: Any
) -> StreamR1:
    reward = reward or Brightness(device=CPU)
    draws = Draws(0)
    return StreamR1(family=family, draws=draws, reward=reward, **players, **options)


def student_losses(method: SelfForcing, batch: Batch) -> list[Loss]:
    return [loss for loss in method.losses(batch, START) if loss.role == "student"]


def value(method: SelfForcing, batch: Batch) -> float:
    losses = student_losses(method, batch)
    return sum(x.value.item() * x.count for x in losses) / sum(x.count for x in losses)


@pytest.mark.parametrize("backward", ["whole", "block"])
def test_with_neutral_settings_it_is_self_forcing_bit_for_bit(
    family: WanStreaming, players: dict[str, Exact], backward: str
) -> None:
    neutral: dict[str, Any] = {"beta": 0.0, "space_strength": 0.0, "time_strength": 0.0}
    plain = SelfForcing(family=family, draws=Draws(0), **players, backward=backward)
    gradients = []
    for method in (plain, make_method(family, players, **neutral, backward=backward)):
        clear(players["student"])
        for loss in student_losses(method, stream_batch(1)):
            (loss.value * loss.count).backward()
        found = [p.grad for p in players["student"].parameters() if p.grad is not None]
        gradients.append([g.clone() for g in found])
    clear(players["student"])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_flat_saliency_is_no_saliency(family: WanStreaming, players: dict[str, Exact]) -> None:
    batch = stream_batch(1)
    flat = make_method(family, players, Constant(device=CPU), beta=0.0)
    plain = SelfForcing(family=family, draws=Draws(0), **players)
    assert value(flat, batch) == value(plain, batch)


def test_a_constant_reward_scales_the_loss_by_its_exponential(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    batch = stream_batch(1)
    plain = SelfForcing(family=family, draws=Draws(0), **players)
    scaled = make_method(family, players, Constant(device=CPU, offset=0.7), beta=2.0)
    expected = torch.exp(torch.tensor(2.0 * 0.7)).item() * value(plain, batch)
    assert value(scaled, batch) == pytest.approx(expected, rel=1e-6)


def test_every_clip_has_a_weight_of_its_own(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(family, players, Brightness(device=CPU, scale=30.0))
    batch = stream_batch(2)
    apart = [value(method, rows_of(batch, [row])) for row in range(2)]
    assert value(method, batch) == pytest.approx(sum(apart) / 2, rel=1e-6)


def test_the_weights_of_places_have_mean_one_and_follow_the_reward(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(family, players, beta=0.0, axes=["early"])
    batch = stream_batch(2)
    weight, _ = method._weigh(batch, batch["latents"])
    assert weight.shape == (2, 1, CLIP, 4, 4)
    torch.testing.assert_close(weight.mean(dim=(1, 2, 3, 4)), torch.ones(2))
    per_frame = weight.mean(dim=(0, 1, 3, 4))
    assert per_frame.argmax() == 0  # the reward looks at the first frame alone
    torch.testing.assert_close(per_frame[0] / per_frame[1:], torch.full((CLIP - 1,), 5.0))


def test_the_weaker_axis_gets_more_of_the_saliency(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    statistics = {"early": (-3.0, 1.0), "left": (3.0, 1.0)}  # early is far above its mean
    method = make_method(
        family, players, Brightness(device=CPU, statistics=statistics), beta=0.0, time_strength=0.0
    )
    batch = stream_batch(1)
    weight, _ = method._weigh(batch, batch["latents"])
    alone = make_method(family, players, beta=0.0, axes=["left"], time_strength=0.0)
    expected, _ = alone._weigh(batch, batch["latents"])
    torch.testing.assert_close(weight[:, :, 1:], expected[:, :, 1:], rtol=1e-3, atol=1e-3)


UNEVEN = {"left": (2.0, 1.0)}
"""Statistics by which the left half is the weaker axis."""
FLOOR = 0.15
"""The smallest weight of a place, by default."""


def over_the_whole_clip(fused: Tensor) -> Tensor:
    """The weights ``[B, 1, F, h, w]`` of ``joint`` saliency, in plain formulas."""
    low, high = (fused.flatten(1).aminmax(dim=1)[i].view(-1, 1, 1, 1) for i in (0, 1))
    weight = ((fused - low) / (high - low)).clamp(min=FLOOR)
    return (weight / weight.mean(dim=(1, 2, 3), keepdim=True))[:, None]


def exact_in_time(saliency: Tensor) -> Tensor:
    """Saliency ``[B, 21, 32, 32]`` on 6 x 4 x 4 latents: frame 0, then means of four frames."""
    groups = saliency[:, 1:].unflatten(1, (CLIP - 1, 4)).mean(dim=2)
    frames = torch.cat([saliency[:, :1], groups], dim=1)
    return interpolate(frames, (4, 4), mode="bilinear", antialias=True)


def trilinear(saliency: Tensor) -> Tensor:
    """Saliency ``[B, 21, 32, 32]`` on 6 x 4 x 4 latents, as one volume."""
    return interpolate(saliency[:, None], (CLIP, 4, 4), mode="trilinear")[:, 0]


@pytest.mark.parametrize(
    ("time_map", "on_latents"), [("exact", exact_in_time), ("interpolate", trilinear)]
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_joint_saliency_of_any_time_map_and_temperature_is_its_formula(
    family: WanStreaming,
    players: dict[str, Exact],
    time_map: Any,
    on_latents: Callable[[Tensor], Tensor],
    temperature: float,
) -> None:
    reward = Brightness(device=CPU, statistics=UNEVEN)
    options: dict[str, Any] = {"time_map": time_map, "temperature": temperature}
    method = make_method(family, players, reward, beta=0.0, saliency="joint", **options)
    batch = stream_batch(2)
    weight, _ = method._weigh(batch, batch["latents"])
    judged = reward.judge(family.decode(batch["latents"]), batch["prompts"])
    scores = torch.stack([judged.scores[axis] for axis in reward.axes])
    shares = (-scores / temperature).softmax(dim=0)[..., None, None, None]
    maps = torch.stack([on_latents(judged.saliency[axis]) for axis in reward.axes])
    torch.testing.assert_close(weight, over_the_whole_clip((shares * maps).sum(dim=0)))


@pytest.mark.parametrize(
    "options",
    [{"saliency": "factored"}, {"time_map": "interpolate"}, {"temperature": 4.0}],
)
def test_the_options_of_the_saliency_matter(
    family: WanStreaming, players: dict[str, Exact], options: dict[str, Any]
) -> None:
    reward, batch = Brightness(device=CPU, statistics=UNEVEN), stream_batch(2)
    weights = [
        make_method(family, players, reward, **{"saliency": "joint", **more})._weigh(
            batch, batch["latents"]
        )[0]
        for more in ({}, options)
    ]
    assert (weights[0] / weights[1] - 1).abs().max() > 0.05


@pytest.mark.parametrize(("reward_batch", "sizes"), [(1, [1, 1, 1]), (2, [2, 1])])
def test_the_reward_judges_so_many_clips_at_a_time(
    family: WanStreaming, players: dict[str, Exact], reward_batch: int, sizes: list[int]
) -> None:
    reward, batch = Brightness(device=CPU), stream_batch(3)
    expected, _ = make_method(family, players, reward, reward_batch=3)._weigh(
        batch, batch["latents"]
    )
    score, asked = reward.score, list[int]()

    def spied(pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        asked.append(len(pixels))
        return score(pixels, prompts)

    reward.score = spied  # type: ignore[method-assign]
    method = make_method(family, players, reward, reward_batch=reward_batch)
    weight, _ = method._weigh(batch, batch["latents"])
    assert asked == sizes
    torch.testing.assert_close(weight, expected)


def test_reward_forcing_is_one_axis_without_saliency(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    reward = Brightness(device=CPU, scale=3.0)
    method = make_method(
        family, players, reward, axes=["left"], space_strength=0.0, time_strength=0.0
    )
    batch = stream_batch(2)
    weight, metrics = method._weigh(batch, batch["latents"])
    scores = reward.judge(family.decode(batch["latents"]), batch["prompts"], saliency=False).scores
    torch.testing.assert_close(weight[:, 0, 0, 0, 0], torch.exp(2.0 * scores["left"]))
    assert set(metrics) == {"reward/early", "reward/left", "balance_penalty"}


def test_no_gradient_reaches_teacher_critic_or_decoder(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    clear(*players.values())
    for loss in student_losses(make_method(family, players), stream_batch(1)):
        loss.value.backward()
    for name in ("teacher", "critic"):
        assert all(p.grad is None for p in players[name].parameters())
    with family.using("vae") as vae:
        assert all(p.grad is None for p in vae.parameters())
    assert any(p.grad is not None for p in players["student"].parameters())
    clear(*players.values())


def test_the_critics_loss_is_not_weighted(family: WanStreaming, players: dict[str, Exact]) -> None:
    plain = SelfForcing(family=family, draws=Draws(0), **players)
    weighted = make_method(family, players, Brightness(device=CPU, scale=5.0))
    critics = [
        [loss.value for loss in m.losses(stream_batch(1), START) if loss.role == "critic"]
        for m in (plain, weighted)
    ]
    assert torch.equal(critics[0][0], critics[1][0])


def test_uneven_axes_lower_the_weight_after_the_warm_up(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(
        family, players, balance_window=4, balance_warmup=4, space_strength=0.0, time_strength=0.0
    )
    batch = stream_batch(1)
    before, _ = method._weigh(batch, batch["latents"])
    for step in range(4):
        method.observe({"reward/early/student": float(step), "reward/left/student": 0.0})
    after, metrics = method._weigh(batch, batch["latents"])
    penalty = 0.5 * torch.tensor([2.0, 0.0]).std()
    torch.testing.assert_close(after, before * torch.exp(-2.0 * penalty))
    assert metrics["balance_penalty"].item() == pytest.approx(penalty.item())


def test_a_step_of_the_critic_alone_is_not_observed(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    method = make_method(family, players)
    method.observe({"loss/critic": 1.0})
    assert method._balance.seen == 0
    restored = make_method(family, players)
    method.observe({"reward/early/student": 1.0, "reward/left/student": 0.0})
    restored.load_state(method.state())
    assert restored._balance.state() == method._balance.state()


def test_an_unknown_axis_is_named(family: WanStreaming, players: dict[str, Exact]) -> None:
    with pytest.raises(ValueError, match="once: early, left"):
        make_method(family, players, axes=["motion"])


def test_a_panel_has_the_axes_of_its_members_on_their_own_cells(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    coarse = Coarse(device=CPU, statistics={"coarse": (1.0, 2.0)})
    panel = Panel([Brightness(device=CPU), coarse])
    assert panel.axes == ("early", "left", "coarse")
    method = make_method(family, players, panel)
    batch = stream_batch(2)
    weight, metrics = method._weigh(batch, batch["latents"])
    assert weight.shape == (2, 1, CLIP, 4, 4)
    pixels = family.decode(batch["latents"])
    raw = coarse.score(pixels, batch["prompts"])["coarse"]
    assert metrics["reward/coarse"].item() == pytest.approx(((raw - 1) / 2).mean().item())
    assert panel.normalized(panel.score(pixels, batch["prompts"])).keys() == set(panel.axes)
    assert panel.saliency(pixels, batch["prompts"])["coarse"].shape[-1] == 1


def test_a_panel_refuses_two_axes_of_one_name() -> None:
    with pytest.raises(UserError, match="early"):
        Panel([Brightness(device=CPU), Brightness(device=CPU)])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"space_floor": -1.0},
        {"space_strength": 3.0},
        {"balance": -1.0},
        {"balance_window": 2},
        {"reward_batch": 0},
        {"axes": ["left", "left"]},
        {"score_low": 0.9, "score_high": 0.1},
    ],
)
def test_an_option_out_of_range_is_refused(
    family: WanStreaming, players: dict[str, Exact], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make_method(family, players, **options)


def test_saliency_is_taken_of_the_chosen_axes_alone(
    family: WanStreaming, players: dict[str, Exact]
) -> None:
    reward = Brightness(device=CPU)
    asked = []
    gradient = reward._gradient

    def spied(axis: str, *rest: Any) -> Tensor:
        asked.append(axis)
        return gradient(axis, *rest)

    reward._gradient = spied  # type: ignore[method-assign]
    batch = stream_batch(1)
    _, metrics = make_method(family, players, reward, axes=["left"])._weigh(batch, batch["latents"])
    assert asked == ["left"]
    assert "reward/early" in metrics  # what is not trained on is still watched

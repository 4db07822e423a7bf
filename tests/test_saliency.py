import pytest
import torch

from diffdistill.saliency import factored, joint, on_latents, over_space, over_time, stretched
from tests.conftest import randn

SHAPE = (3, 2, 4)


def salient(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed, dtype=torch.float64).abs()


def test_stretched_values_reach_from_zero_to_one() -> None:
    values = salient(2, 3, 4)
    out = stretched(values, (1, 2))
    assert out.amin((1, 2)).tolist() == [0, 0]
    assert out.amax((1, 2)).tolist() == [1, 1]
    assert (out.flatten(1).argsort(1) == values.flatten(1).argsort(1)).all()


def test_a_flat_map_is_stretched_to_ones() -> None:
    assert (stretched(torch.full((1, 2, 3), 0.7), (1, 2)) == 1).all()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_weights_have_mean_one(strength: float) -> None:
    maps = salient(2, *SHAPE)
    ones = torch.ones(2, dtype=torch.float64)
    time = over_time(maps, strength=strength, floor=0.2)
    torch.testing.assert_close(time.mean(1).flatten(), ones)
    space = over_space(maps, strength=strength, floor=0.15)
    torch.testing.assert_close(space.mean((2, 3)), torch.ones(2, 3, dtype=torch.float64))
    both = factored(
        maps, time_strength=strength, space_strength=strength, time_floor=0.2, space_floor=0.15
    )
    torch.testing.assert_close(both.mean((1, 2, 3)), ones)
    whole = joint(maps, strength=strength, floor=0.5)
    torch.testing.assert_close(whole.mean((1, 2, 3)), ones)


def test_no_place_outweighs_another_by_more_than_the_floor_allows() -> None:
    maps = salient(2, *SHAPE)
    space = over_space(maps, strength=1.0, floor=0.15)
    torch.testing.assert_close(
        space.amax((2, 3)) / space.amin((2, 3)), torch.full((2, 3), 1 / 0.15, dtype=torch.float64)
    )
    time = over_time(maps, strength=1.0, floor=0.2)
    torch.testing.assert_close(
        (time.amax(1) / time.amin(1)).flatten(), torch.full((2,), 5.0, dtype=torch.float64)
    )


def test_more_salient_places_weigh_more() -> None:
    maps = torch.zeros(1, 2, 1, 2)
    maps[0, 1] = torch.tensor([[1.0, 3.0]])
    weight = factored(
        maps, time_strength=1.0, space_strength=1.0, time_floor=0.2, space_floor=0.15
    )[0, :, 0]
    assert weight[1, 1] > weight[1, 0]
    assert weight[1].mean() > weight[0].mean()


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_without_strength_or_without_saliency_every_weight_is_exactly_one(strength: float) -> None:
    maps = salient(2, *SHAPE) if strength == 0 else torch.full((2, *SHAPE), 3.0)
    weight = factored(
        maps, time_strength=strength, space_strength=strength, time_floor=0.2, space_floor=0.15
    )
    assert (weight == 1).all()
    assert (joint(maps, strength=strength, floor=0.5) == 1).all()


def test_samples_are_weighed_alone() -> None:
    maps = salient(3, *SHAPE)
    options = {"time_strength": 1.0, "space_strength": 1.0, "time_floor": 0.2, "space_floor": 0.1}
    together = factored(maps, **options)
    for index in range(3):
        alone = factored(maps[index : index + 1], **options)
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=0)


def test_the_exact_time_map_follows_the_video_autoencoder() -> None:
    frames = torch.arange(9.0).view(1, 9, 1, 1).expand(1, 9, 2, 2)
    mapped = on_latents(frames, (3, 2, 2), num_frames=9, time_map="exact")
    # frame 0 alone, then the means of frames 1-4 and 5-8
    assert mapped[0, :, 0, 0].tolist() == [0.0, 2.5, 6.5]


def test_cells_of_two_frames_are_given_to_both() -> None:
    cells = torch.arange(4.0).view(1, 4, 1, 1)  # frames 0-1, 2-3, 4-5, 6-7; frame 8 has none
    mapped = on_latents(cells, (3, 1, 1), num_frames=9, time_map="exact")
    brute = [0.0, (0 + 1 + 1 + 2) / 4, (2 + 3 + 3 + 3) / 4]
    assert mapped.flatten().tolist() == pytest.approx(brute)


def test_the_reference_interpolation_puts_frames_elsewhere() -> None:
    spike = torch.zeros(1, 80, 1, 1)
    spike[0, 0] = 1.0
    exact, resized = (
        on_latents(spike, (21, 1, 1), num_frames=81, time_map=kind)  # type: ignore[arg-type]
        for kind in ("exact", "interpolate")
    )
    assert exact.flatten().argmax() == 0
    assert exact.flatten()[0] == 1.0
    assert resized.flatten()[0] < 0.5


def test_a_still_has_one_latent_frame() -> None:
    mapped = on_latents(torch.ones(1, 1, 4, 4), (1, 2, 2), num_frames=1, time_map="exact")
    assert mapped.shape == (1, 1, 2, 2)
    assert (mapped == 1).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_weights_do_not_depend_on_the_scale_of_the_saliency(scale: float) -> None:
    maps = salient(2, *SHAPE)
    options = {"time_strength": 1.0, "space_strength": 1.0, "time_floor": 0.2, "space_floor": 0.1}
    torch.testing.assert_close(factored(scale * maps, **options), factored(maps, **options))
    torch.testing.assert_close(
        joint(scale * maps, strength=1.0, floor=0.5), joint(maps, strength=1.0, floor=0.5)
    )


def test_no_saliency_at_all_weighs_all_places_alike() -> None:
    assert (joint(torch.zeros(1, *SHAPE), strength=1.0, floor=0.5) == 1).all()

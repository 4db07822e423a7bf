import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from diffdistill.beta_policy import BetaPolicy, Start, beta_sample
from diffdistill.draws import Draws
from diffdistill.exposure_control import (
    ExposureController,
    Running,
    advantages,
    grounding_reward,
    progress_reward,
    random_exposure,
)
from diffdistill.types import Progress
from tests.conftest import generator, randn

World = Callable[[int, float], dict[str, float]]

TOTAL = 10_000


def make_controller(seed: int = 0, **options: Any) -> ExposureController:
    return ExposureController(draws=Draws(seed), **options)


def make_policy(start: Start = "neutral", *, width: int = 3, disturbed: bool = False) -> BetaPolicy:
    policy = BetaPolicy(width=width, learning_rate=0.01, start=start, generator=generator(3))
    if disturbed:
        with torch.no_grad():
            for i, weight in enumerate(policy.weights):
                weight.add_(0.5 * randn(*weight.shape, seed=i, dtype=torch.float64))
    return policy


def live(controller: ExposureController, world: World, steps: range) -> list[float]:
    """Let steps of training come to what the world makes of an exposure; return the exposures."""
    exposures = []
    for step in steps:
        exposures.append(controller.exposure(Progress(step, TOTAL)))
        controller.observe(step, **world(step, exposures[-1]))
    return exposures


def noisy(step: int, exposure: float) -> dict[str, float]:
    """Return measurements without any pattern, the same for a step whoever asks."""
    rng = np.random.default_rng(step)
    names = ("loss", "mismatch", "probe", "grounding", "confidence")
    return dict(zip(names, (exposure * rng.random(5)).tolist(), strict=True))


def still(step: int, exposure: float) -> dict[str, float]:
    return dict.fromkeys(("loss", "mismatch", "probe", "grounding", "confidence"), 0.0)


class Falling:
    """A probe that falls with every step, the more the nearer the exposure is to the best."""

    def __init__(self, best: float) -> None:
        self.best = best
        self.probe = 0.0

    def __call__(self, step: int, exposure: float) -> dict[str, float]:
        measured = still(step, exposure) | {"probe": self.probe}
        self.probe -= math.exp(-(((exposure - self.best) / 0.2) ** 2))
        return measured


def mean_of(controller: ExposureController) -> float:
    metrics = controller.metrics()
    return metrics["policy_a"] / (metrics["policy_a"] + metrics["policy_b"])


def weights_of(controller: ExposureController) -> Any:
    return controller.state()["policy"]


def test_the_exposure_is_constant_within_a_hold_window() -> None:
    controller = make_controller(hold=4)
    exposures = live(controller, noisy, range(40))
    windows = [exposures[i : i + 4] for i in range(0, 40, 4)]
    assert all(len(set(window)) == 1 for window in windows)
    assert len({window[0] for window in windows}) == 10


def test_ranks_agree_without_talking() -> None:
    one, other = make_controller(), make_controller()
    for step in range(60):
        torch.manual_seed(step)
        first = one.exposure(Progress(step, TOTAL))
        torch.manual_seed(step + 1)
        # a rank with more micro-batches asks more often
        assert [other.exposure(Progress(step, TOTAL)) for _ in range(3)] == [first] * 3
        for controller in (one, other):
            controller.observe(step, **noisy(step, first))
    assert one.state() == other.state()
    assert live(make_controller(1), noisy, range(5)) != live(make_controller(), noisy, range(5))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    live(make_controller(), noisy, range(60))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_policy_changes_only_when_enough_decisions_have_matured() -> None:
    controller = make_controller()
    changed = []
    before = weights_of(controller)
    for step in range(100):
        live(controller, noisy, range(step, step + 1))
        after = weights_of(controller)
        if after != before:
            changed.append(step)
        before = after
    # windows start at 0, 5, ..., and the 8th and 16th are rewarded 10 steps later
    assert changed == [7 * 5 + 10, 15 * 5 + 10]
    assert controller.metrics()["policy_updates"] == 2.0


def test_the_policy_learns_without_a_graph_and_reaches_no_student() -> None:
    controller = make_controller()
    with torch.no_grad():
        live(controller, noisy, range(50))
    assert controller.metrics()["policy_updates"] == 1.0
    # what a method gets has no graph, and no tensor of a student is ever asked for
    before = weights_of(controller)
    student = torch.nn.Parameter(torch.ones(()))
    (student * controller.exposure(Progress(50, TOTAL))).backward()
    assert weights_of(controller) == before
    assert type(controller.exposure(Progress(50, TOTAL))) is float


def test_a_decision_is_rewarded_for_the_steps_that_follow_it() -> None:
    controller = make_controller(hold=2, lookahead=4, reward_discount=0.5, num_decisions=9)
    probes = [9.0, 7.0, 6.0, 6.5, 2.5, 2.5, 0.0]
    groundings = [100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    for step, (probe, grounding) in enumerate(zip(probes, groundings, strict=True)):
        exposure = controller.exposure(Progress(step, TOTAL))
        measured = noisy(step, exposure) | {"probe": probe, "grounding": grounding}
        controller.observe(step, **measured)
    (_, _, *first), (_, _, *second) = controller.state()["matured"]
    # the first step of each does not count: 9 to 7, 6 to 6.5
    assert first == pytest.approx([0.5 * 1.0 + 0.125 * 4.0, (1 + 1 + 0.75 + 0.5) / 1.875])
    assert second == pytest.approx([0.5 * 4.0 + 0.125 * 2.5, (3 + 2 + 1.25 + 0.75) / 1.875])


def test_a_decision_with_a_skipped_step_is_never_rewarded() -> None:
    controller = make_controller(num_decisions=50)
    live(controller, noisy, range(12))
    controller.exposure(Progress(12, TOTAL))
    live(controller, noisy, range(13, 27))
    # the look-aheads of the windows at 5 and 10 hold step 12; those at 0 and 15 do not
    numbers = [row[1] for row in controller.state()["matured"]]
    assert len(numbers) == 2
    assert controller.state()["waiting"][0][0] == 4


def test_the_step_of_the_switch_earns_nothing() -> None:
    assert progress_reward([9.0, 5.0, 5.0, 5.0], 0.9) == 0.0
    assert progress_reward([5.0, 5.0, 4.0, 2.0], 0.9) == pytest.approx(0.9 * 1.0 + 0.81 * 2.0)


def test_progress_counts_only_what_falls() -> None:
    assert progress_reward([0.0, 0.0, 5.0, 3.0, 9.0], 0.5) == pytest.approx(0.25 * 2.0)


def test_grounding_is_a_discounted_mean() -> None:
    assert grounding_reward([50.0, -3.0, -3.0, -3.0], 0.7) == pytest.approx(-3.0)
    assert grounding_reward([0.0, 1.0, 2.0], 0.5) == pytest.approx((1.0 + 0.5 * 2.0) / 1.5)


def test_noise_alone_earns_its_floor() -> None:
    weights = sum(0.9**i for i in range(1, 10))
    noise = randn(8000, 11, seed=5, dtype=torch.float64).mul(0.2).tolist()
    earned = sum(progress_reward(row, 0.9) for row in noise) / len(noise)
    assert earned == pytest.approx(0.564 * 0.2 * weights, rel=0.02)

    controller = make_controller(controller_lr=1e-9)
    probes = randn(1500, seed=6).mul(0.2).tolist()
    live(controller, lambda step, _: still(step, 0.0) | {"probe": probes[step]}, range(1500))
    assert controller.noise_floor() == pytest.approx(0.564 * 0.2 * weights, rel=0.15)
    metrics = controller.metrics()
    assert metrics["noise_floor"] == controller.noise_floor()
    assert metrics["progress_reward"] == pytest.approx(controller.noise_floor(), rel=0.2)


def test_the_noise_floor_of_a_straight_line_is_next_to_nothing() -> None:
    controller = make_controller()
    live(controller, lambda step, _: still(step, 0.0) | {"probe": 50.0 - 0.01 * step}, range(100))
    assert controller.noise_floor() < 0.01 * 0.4 * 10
    assert make_controller().noise_floor() == 0.0


def test_advantages_have_mean_zero_and_deviation_one() -> None:
    found = advantages([1.0, 2.0, 3.0, 6.0])
    expected = (np.array([1.0, 2.0, 3.0, 6.0]) - 3.0) / np.std([1.0, 2.0, 3.0, 6.0])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7)
    assert advantages([4.0, 4.0, 4.0]).tolist() == [0.0, 0.0, 0.0]


def reference_loss(
    weights: list[np.ndarray], rows: np.ndarray, used: np.ndarray, gains: np.ndarray, target: float
) -> float:
    """Return the loss of the policy by numpy and scipy alone."""
    hidden = np.tanh(rows @ weights[0].T + weights[1])
    a, b = (1.0 + np.logaddexp(0.0, hidden @ weights[2].T + weights[3])).T
    excess = np.maximum(0.0, stats.beta.entropy(a, b) - target)
    return float(np.mean(-gains * stats.beta.logpdf(used, a, b) + 0.1 * excess**2))


def test_the_gradient_is_that_of_the_log_density_of_what_was_used() -> None:
    policy = make_policy(disturbed=True)
    rows = randn(4, 6, seed=11, dtype=torch.float64)
    used = torch.tensor([0.05, 0.3, 0.7, 0.999], dtype=torch.float64)
    gains = torch.tensor([1.0, -0.5, 0.25, -0.75], dtype=torch.float64)
    loss = policy.loss(rows, used, gains, entropy_target=-0.2, entropy_penalty=0.1)
    loss.backward()
    weights = [weight.detach().numpy().copy() for weight in policy.weights]
    given = (rows.numpy(), used.numpy(), gains.numpy(), -0.2)
    assert loss.item() == pytest.approx(reference_loss(weights, *given), rel=1e-12)
    for weight, own in zip(policy.weights, weights, strict=True):
        assert weight.grad is not None
        for index in np.ndindex(own.shape):
            values = []
            for change in (1e-5, -1e-5):
                kept = own[index]
                own[index] = kept + change
                values.append(reference_loss(weights, *given))
                own[index] = kept
            slope = (values[0] - values[1]) / 2e-5
            assert weight.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_a_step_of_adam_raises_the_density_of_what_did_well() -> None:
    policy = make_policy()
    rows = torch.zeros(2, 6, dtype=torch.float64)
    used = torch.tensor([0.2, 0.8], dtype=torch.float64)
    good = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = policy.loss(rows, used, good, entropy_target=0.0, entropy_penalty=0.1)
    policy.descend(loss)
    a, b = policy.concentrations(rows[0])
    assert stats.beta.logpdf(0.2, a.item(), b.item()) > stats.beta.logpdf(0.8, a.item(), b.item())
    # the first step of Adam is the learning rate in the direction of the sign
    np.testing.assert_allclose(policy.weights[3].tolist(), [-0.01, 0.01], rtol=1e-6)


def test_only_too_much_entropy_costs_something() -> None:
    rows, nothing = torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    used = torch.full((2,), 0.4, dtype=torch.float64)
    policy = make_policy()
    a, b = (value[0].item() for value in policy.concentrations(rows))
    entropy = float(stats.beta.entropy(a, b))
    for target, cost in ((entropy - 0.3, 2.0 * 0.09), (entropy + 0.3, 0.0), (0.0, 0.0)):
        for weight in policy.weights:
            weight.grad = None
        loss = policy.loss(rows, used, nothing, entropy_target=target, entropy_penalty=2.0)
        assert loss.item() == pytest.approx(cost)
        loss.backward()
        moved = policy.weights[3].grad
        assert moved is not None
        assert bool((moved < 0).all()) == (cost > 0)


def test_a_policy_starts_without_preference_or_with_nearly_all_exposed() -> None:
    rows = randn(5, 6, seed=1, dtype=torch.float64)
    a, b = make_policy("neutral").concentrations(rows)
    torch.testing.assert_close(a, torch.full_like(a, 1.0 + math.log(2.0)))
    torch.testing.assert_close(b, a)
    a, b = make_policy("full").concentrations(rows)
    assert ((a - 1.0) / (a + b - 2.0) > 0.99).all()
    exposures = live(make_controller(start_exposure="full"), still, range(200))
    assert sum(exposures) / 200 == pytest.approx(7.0 / 8.02, abs=0.03)


def test_a_distribution_of_the_policy_has_one_peak() -> None:
    policy = make_policy(disturbed=True, width=8)
    a, b = policy.concentrations(20.0 * randn(500, 6, seed=2, dtype=torch.float64))
    assert (a > 1.0).all()
    assert (b > 1.0).all()


def test_samples_have_the_distribution_they_are_drawn_from() -> None:
    rng = generator(9)
    drawn = [beta_sample(1.7, 4.0, rng) for _ in range(2000)]
    assert stats.kstest(drawn, stats.beta(1.7, 4.0).cdf).pvalue > 0.01
    assert beta_sample(1.7, 4.0, generator(9)) == drawn[0]


def test_exposures_are_clipped_and_remembered_as_clipped() -> None:
    controller = make_controller(
        lowest_exposure=0.4, highest_exposure=0.6, hold=2, num_decisions=100
    )
    exposures = live(controller, still, range(100))
    assert set(exposures) > {0.4, 0.6}
    assert all(0.4 <= exposure <= 0.6 for exposure in exposures)
    assert [row[1] for row in controller.state()["matured"]] == exposures[0:90:2]


@pytest.mark.parametrize("best", [0.3, 0.8])
def test_the_policy_moves_to_the_exposure_under_which_the_probe_falls(best: float) -> None:
    controller = make_controller(hold=3, lookahead=3, num_decisions=16, width=8, controller_lr=0.03)
    live(controller, Falling(best), range(3 * 16 * 40))
    assert mean_of(controller) == pytest.approx(best, abs=0.1)


def test_the_policy_moves_to_the_exposure_under_which_the_teacher_is_grounded() -> None:
    def world(step: int, exposure: float) -> dict[str, float]:
        return still(step, exposure) | {"grounding": -abs(exposure - 0.8)}

    options: dict[str, Any] = {"hold": 3, "lookahead": 3, "num_decisions": 16, "width": 8}
    controller = make_controller(controller_lr=0.03, teacher_share=0.5, **options)
    live(controller, world, range(3 * 16 * 40))
    assert mean_of(controller) > 0.65
    ignorant = make_controller(controller_lr=0.03, teacher_share=0.0, **options)
    live(ignorant, world, range(3 * 16 * 10))
    assert mean_of(ignorant) == pytest.approx(0.5)


def first_gradient(factor: float, **options: Any) -> list[float]:
    """Return Adam's first moment of the last bias, with a probe that falls so much faster."""
    falling = Falling(0.3)

    def world(step: int, exposure: float) -> dict[str, float]:
        measured = falling(step, exposure) | {"grounding": 5.0 * exposure - 7.0}
        return measured | {"probe": factor * measured["probe"]}

    controller = make_controller(hold=2, lookahead=2, num_decisions=16, **options)
    live(controller, world, range(34))
    assert controller.metrics()["policy_updates"] == 1.0
    return weights_of(controller)["moments"][3]["exp_avg"]


def test_both_terms_of_the_reward_count_in_standard_deviations() -> None:
    # a policy that starts neutral does not depend on its features before the first update
    assert first_gradient(8.0) == pytest.approx(first_gradient(1.0), rel=1e-5)
    assert first_gradient(1.0, teacher_share=0.5) != pytest.approx(first_gradient(1.0), rel=0.01)


def test_the_policy_sees_averages_of_training() -> None:
    controller = make_controller(hold=2, memory=0.5)
    exposures = live(controller, noisy, range(4))
    controller.exposure(Progress(4, 9))
    assert controller.state()["current"][0:2] == [2, 4]
    features = controller.state()["current"][2]
    averages = {}
    rows = [noisy(step, exposures[step]) | {"exposure": exposures[step]} for step in range(4)]
    for name in ("exposure", "loss", "mismatch", "probe"):
        averages[name] = 0.5 * rows[0][name] + 0.5 * rows[1][name]
        for row in rows[2:]:
            averages[name] = 0.5 * averages[name] + 0.5 * row[name]
    assert features == pytest.approx([0.5, *averages.values(), rows[3]["confidence"]])


@pytest.mark.parametrize("stop", [0, 7, 31, 60])
def test_a_resumed_controller_goes_on_where_it_was(stop: int) -> None:
    options: dict[str, Any] = {"hold": 3, "lookahead": 7, "num_decisions": 3}
    whole = make_controller(**options)
    live(whole, noisy, range(stop))
    resumed = make_controller(start_exposure="full", **options)
    resumed.load_state(json.loads(json.dumps(whole.state())))
    assert resumed.state() == whole.state()
    steps = range(stop, stop + 60)
    assert live(resumed, noisy, steps) == live(whole, noisy, steps)
    assert resumed.state() == whole.state()
    assert whole.metrics()["policy_updates"] >= 5.0
    assert whole.metrics() == resumed.metrics()


def test_running_moments_are_those_of_all_values_at_first() -> None:
    running = Running(0.99)
    values = randn(50, seed=4, dtype=torch.float64).tolist()
    for value in values:
        running.add(value)
    assert running.mean == pytest.approx(np.mean(values))
    assert running.variance == pytest.approx(np.var(values))
    assert running.standard(2.0) == pytest.approx((2.0 - np.mean(values)) / np.std(values))


def test_running_moments_forget() -> None:
    running = Running(0.8)
    for value in [1000.0] * 10 + [0.0, 1.0] * 200:
        running.add(value)
    shares = 0.2 * 0.8 ** np.arange(400)
    values = np.array([1.0, 0.0] * 200)
    mean = (shares * values).sum()
    assert running.mean == pytest.approx(mean)
    assert running.variance == pytest.approx((shares * (values - mean) ** 2).sum())


def test_a_random_exposure_is_uniform_and_held() -> None:
    drawn = [random_exposure(Draws(0), step, hold=4) for step in range(4000)]
    assert all(len(set(drawn[i : i + 4])) == 1 for i in range(0, 4000, 4))
    assert stats.kstest(drawn[::4], "uniform").pvalue > 0.01
    some = [random_exposure(Draws(0), step, lowest=0.2, highest=0.4) for step in range(500)]
    assert 0.2 <= min(some) < 0.22
    assert 0.38 < max(some) <= 0.4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hold", 1),
        ("lookahead", 1),
        ("num_decisions", 1),
        ("width", 0),
        ("reward_discount", 0.0),
        ("reward_discount", 1.1),
        ("controller_lr", 0.0),
        ("lowest_exposure", 0.0),
        ("lowest_exposure", 1.0),
        ("highest_exposure", 1.0),
        ("teacher_share", -0.1),
        ("entropy_penalty", -0.1),
        ("start_exposure", "half"),
        ("memory", 1.0),
    ],
)
def test_an_option_out_of_its_range_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        make_controller(**{option: value})

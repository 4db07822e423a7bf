from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_confidence_aware_loss

from diffdistill.draws import Draws
from diffdistill.methods.confidence import Confidence
from diffdistill.projection import dense
from tests.conftest import START, Spy, rows_of
from tests.toy_texts import (
    MASKS,
    Texts,
    network,
    only_loss,
    student_gradients,
    toy_text_batch,
)

MASK = MASKS["student"]


def make_method(**options: Any) -> Confidence:
    settings: dict[str, Any] = {"family": Texts(), "draws": Draws(0), "student": network()}
    return Confidence(**(settings | options))


@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("complementary", [True, False])
def test_loss_and_gradient_are_those_of_diffusers(
    weight: float, temperature: float, complementary: bool
) -> None:
    batch, student = toy_text_batch(8), network()
    spy = Spy(student)
    method = make_method(
        student=spy,
        confidence_weight=weight,
        temperature=temperature,
        complementary=complementary,
    )
    losses = list(method.losses(batch, START))
    assert len(losses) == len(spy.states) == 1 + complementary
    for state, loss in zip(spy.states, losses, strict=True):
        # diffusers' entropy takes the logarithm of probabilities, which for the impossible
        # mask token has no gradient: leave that token out.
        logits = dense(student(state, {"bias": batch["bias"]}))[..., 1:]
        labels = (batch["student/tokens"] - 1).masked_fill(state.x != MASK, -100)
        expected, denoising, entropy = compute_confidence_aware_loss(
            logits, labels, lambda_conf=weight, temperature=temperature
        )
        torch.testing.assert_close(loss.value, expected)
        torch.testing.assert_close(loss.metrics["denoising"], denoising.detach())
        if weight:
            torch.testing.assert_close(loss.metrics["entropy"], entropy.detach())
        parameters = list(student.parameters())
        ours = torch.autograd.grad(loss.value, parameters)
        theirs = torch.autograd.grad(expected, parameters)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_two_views_hide_every_token_once() -> None:
    spy = Spy(network())
    losses = list(make_method(student=spy, complementary=True).losses(toy_text_batch(16), START))
    first, second = (state.x == MASK for state in spy.states)
    assert not (first & second).any()
    assert torch.equal(first | second, toy_text_batch(16)["student/maskable"])
    assert sum(loss.count for loss in losses) == 160
    assert [loss.more for loss in losses] == [True, False]
    torch.testing.assert_close(spy.states[0].t, 1.0 - spy.states[1].t)


def test_blocks_have_their_own_noise_levels_and_sequences_one() -> None:
    batch = toy_text_batch(2000)
    correlations = {}
    for levels in ("block", "sequence"):
        spy = Spy(network())
        only_loss(make_method(student=spy, levels=levels), batch)
        hidden = (spy.states[0].x == MASK).float()
        correlations[levels] = torch.corrcoef(torch.stack([hidden[:, 5], hidden[:, 10]]))[0, 1]
    # Two coins of one uniform bias correlate by a third; strata repel independent ones.
    assert correlations["sequence"] == pytest.approx(1 / 3, abs=0.08)
    assert correlations["block"] < 0.08


def test_the_entropy_of_wrong_predictions_has_no_gradient() -> None:
    batch = toy_text_batch(4)
    student = network()
    wrong = Spy(student)
    with torch.no_grad():
        student.head[2:] = student.head[2]  # all alike but the token that is never in a text
        student.own[:] = student.head[1] * 3  # and it is the most likely
    method = make_method(student=wrong, confidence_weight=5.0)
    loss = only_loss(method, batch)
    assert loss.metrics["right"] == 0
    assert loss.metrics["entropy"] == 0
    torch.testing.assert_close(loss.value.detach(), loss.metrics["denoising"])


def test_training_makes_right_predictions_certain() -> None:
    entropies = {}
    for weight in (0.0, 2.0):
        student = network(scale=0.5)
        method = make_method(student=student, confidence_weight=weight, t_high=0.5)
        optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss = only_loss(method, toy_text_batch(4))
            loss.value.backward()
            optimizer.step()
        entropies[weight] = float(loss.metrics["entropy"])
    assert entropies[2.0] < 0.5 * entropies[0.0]


@pytest.mark.parametrize("complementary", [True, False])
def test_micro_batches_do_not_change_the_step_but_for_the_mean_over_right_ones(
    complementary: bool,
) -> None:
    batch = toy_text_batch(6)
    parts = [rows_of(batch, rows) for rows in ([0, 1], [2], [3, 4, 5])]
    for options, same in (
        ({"normalizer": "hidden"}, True),
        ({"confidence_weight": 0.0}, True),
        ({"normalizer": "right"}, False),
    ):
        method = make_method(complementary=complementary, **options)
        whole, divided = student_gradients(method, [batch]), student_gradients(method, parts)
        assert torch.allclose(whole, divided, rtol=1e-4, atol=1e-6) == same


def test_plain_logits_give_the_loss_and_gradient_of_projections() -> None:
    batch = toy_text_batch()
    methods: list[Any] = [make_method() for _ in range(2)]
    methods[1].student.dense = True
    torch.testing.assert_close(*(only_loss(method, batch).value for method in methods))
    torch.testing.assert_close(*(student_gradients(method, [batch]) for method in methods))


@pytest.mark.parametrize("everything", [True, False])
def test_nothing_and_everything_hidden_give_finite_losses_in_bfloat16(everything: bool) -> None:
    method: Any = make_method(t_low=1.0, complementary=True)
    method.student.to(torch.bfloat16)
    batch = toy_text_batch()
    batch["bias"] = batch["bias"].to(torch.bfloat16)
    batch["student/maskable"] = batch["student/maskable"] & everything
    first, second = method.losses(batch, START)
    (first.value + second.value).backward()
    assert first.count == (40 if everything else 1)
    assert bool(first.value > 0) == everything
    assert second.value == 0
    assert all(p.grad.isfinite().all() for p in method.student.parameters())


def test_options_out_of_range_are_refused() -> None:
    for name, value in (("temperature", 0.0), ("t_low", 0.0), ("t_high", 1.5)):
        with pytest.raises(ValueError, match=name):
            make_method(**{name: value})

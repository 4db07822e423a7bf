"""The methods on exposure, gate and extrapolation: exopd, atesd, and egx, which joins them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.exposure_control import random_exposure
from diffdistill.projection import dense
from diffdistill.text.atesd import ATESD
from diffdistill.text.egx import EGX
from diffdistill.text.exopd import ExOPD
from diffdistill.text.opd import OPD
from diffdistill.text.opsd import OPSD
from diffdistill.text.sdar import SDAR
from diffdistill.types import Example
from tests.conftest import START
from tests.toy_answers import FirstToken, Network, Questions, question_batch
from tests.toy_texts import only_loss, student_gradients

PLAIN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 5}
NEUTRAL: dict[str, Any] = {"exposure_policy": "fixed", "strength": 1.0, "gate_beta": 0.0}


def make(kind: Any = EGX, **options: Any) -> Any:
    parts: dict[str, Any] = {}
    if kind in (EGX, ExOPD, SDAR):
        parts["reference"] = Network(3).double()
    if kind in (EGX, SDAR):
        parts["reward"] = FirstToken()
    return kind(
        family=Questions(),
        draws=Draws(0),
        student=options.pop("student", None) or Network(1).double(),
        **parts | {"teacher": Network(2).double()} | PLAIN | options,
    )


def gradient(method: Any, batch: Any = None, step: int = 0) -> Tensor:
    loss = next(method.losses(batch or question_batch(4), START._replace(step=step)))
    parameters = list(method.student.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.value, parameters)])


def test_egx_at_its_neutral_settings_is_opsd_bit_for_bit() -> None:
    assert torch.equal(gradient(make(**NEUTRAL)), gradient(make(OPSD)))


def test_egx_without_a_rewarded_term_needs_no_reward() -> None:
    method = make(**NEUTRAL, reward=None)
    assert torch.equal(gradient(method), gradient(make(OPSD)))
    for options in ({"reward_weight": 0.5, "num_answers": 2}, {"branch": True}):
        with pytest.raises(ValueError, match="reward_weight and branch need rewards"):
            make(reward=None, **options)


@pytest.mark.parametrize("gate_on", ["teacher", "target"])
def test_egx_gates_centered_over_the_step_take_the_same_step(gate_on: str) -> None:
    options: dict[str, Any] = {
        "exposure_policy": "fixed", "gate_scale": "centered", "gate_scope": "global",
        "gate_on": gate_on, "guard": "none", "strength": 1.3,
    }  # fmt: skip
    whole = student_gradients(make(**options), [question_batch(4)])
    parts = [question_batch(1), question_batch(3, first_id=1)]
    torch.testing.assert_close(student_gradients(make(**options), parts), whole)


def test_egx_with_extrapolation_alone_is_exopd_bit_for_bit() -> None:
    options: dict[str, Any] = {"strength": 1.3, "divergence": "reverse-kl", "guard": "none"}
    joint = make(**NEUTRAL | options)
    assert torch.equal(gradient(joint), gradient(make(ExOPD, exposure=1.0, **options)))


def test_egx_with_exposure_alone_is_atesd_bit_for_bit() -> None:
    joint, alone = make(**NEUTRAL | {"exposure_policy": "learned"}), make(ATESD)
    for step in (0, 7):
        assert torch.equal(gradient(joint, step=step), gradient(alone, step=step))


def test_egx_with_the_gate_alone_is_the_distilled_term_of_sdar() -> None:
    gated = {"gate_beta": 5.0, "gate_scale": "plain", "gap_form": True}
    joint = make(**NEUTRAL | gated)
    both, neither = (make(SDAR, weight=w, num_answers=2) for w in (1.0, 0.0))
    alone = make(**NEUTRAL | gated | {"num_answers": 2})
    torch.testing.assert_close(gradient(alone), gradient(both) - gradient(neither))
    assert not torch.allclose(gradient(joint), gradient(make(OPSD)))


def test_a_reward_is_added_to_egx_as_in_grpo() -> None:
    options = NEUTRAL | {"num_answers": 4, "reward_weight": 0.7}
    with_reward, without = make(**options), make(**options | {"reward_weight": 0.0})
    plain = make(SDAR, weight=0.0, num_answers=4)
    expected = gradient(without) + 0.7 * gradient(plain)
    torch.testing.assert_close(gradient(with_reward), expected)


def test_at_strength_1_the_reference_is_not_even_asked() -> None:
    method = make(ExOPD, strength=1.0)
    assert torch.equal(gradient(method), gradient(make(OPD)))
    assert not method.reference.calls


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.25])
def test_exopds_target_mixes_teacher_and_reference_in_logits(strength: float) -> None:
    method, batch = make(ExOPD, strength=strength), question_batch(4)
    loss = only_loss(method, batch)
    answers = method.family.rollouts[-1]
    state, told = method.family.state(answers), method.family.condition(batch)
    ours, theirs, base = (
        F.log_softmax(dense(model(state, told)), -1)
        for model in (method.student, method.teacher, method.reference)
    )
    target = F.log_softmax(strength * theirs + (1 - strength) * base, -1)
    expected = (ours.exp() * (ours - target)).sum(-1)[answers.mask].mean()
    torch.testing.assert_close(loss.value, expected)


def test_a_strength_may_change_over_the_first_steps() -> None:
    method = make(ExOPD, strength_start=0.5, strength=0.8, strength_steps=200)
    for step, expected in ((0, 0.5), (100, 0.65), (200, 0.8), (900, 0.8)):
        (loss,) = method.losses(question_batch(2), START._replace(step=step))
        assert float(loss.metrics["strength"]) == pytest.approx(expected)


def test_the_student_that_is_the_reference_has_nothing_to_learn_at_strength_0() -> None:
    method = make(ExOPD, strength=0.0, reference=Network(1).double())
    assert gradient(method).abs().max() < 1e-12


def test_a_guard_lowers_the_strength_at_sure_tokens_alone() -> None:
    sure = Network(2, scale=2.0).double()
    options: dict[str, Any] = {"strength": 1.5, "teacher": sure, "reference": Network(2).double()}
    bare = only_loss(make(ExOPD, **options), question_batch(6))
    assert bare.metrics["strength"] == 1.5
    guarded = only_loss(
        make(ExOPD, guard="relative", contract_probability=0.6, **options), question_batch(6)
    )
    assert 1.0 <= guarded.metrics["strength"] < 1.5
    never = {"guard": "relative", "contract_probability": 0.9999}
    loose = only_loss(make(ExOPD, **never, **options), question_batch(6))
    assert guarded.metrics["strength"] < loose.metrics["strength"] <= 1.5


def test_the_gate_on_the_teacher_does_not_change_with_the_strength() -> None:
    gates = {}
    for place in ("teacher", "target"):
        for strength in (1.0, 1.4):
            options = {"exposure_policy": "fixed", "guard": "none", "strength": strength}
            method = make(gate_on=place, **options)
            gates[place, strength] = only_loss(method, question_batch(4)).metrics["gate"]
    assert gates["teacher", 1.0] == gates["teacher", 1.4] == gates["target", 1.0]
    assert gates["target", 1.0] != gates["target", 1.4]


def test_answers_are_the_same_whatever_exposure_gate_and_strength() -> None:
    options: list[dict[str, Any]] = [{}, NEUTRAL, {"strength": 2.0}, {"gate": "entropy"}]
    methods = [make(**o) for o in options]
    for method in methods:
        only_loss(method, question_batch(4))
    tokens = methods[0].family.rollouts[0].tokens
    assert all(torch.equal(m.family.rollouts[0].tokens, tokens) for m in methods)


def test_a_context_that_tells_nothing_leaves_nothing_to_learn() -> None:
    method = make(teacher=Network(1).double(), reference=Network(1).double(), strength=1.4)
    batch = question_batch(4)
    batch["examples"] = [e._replace(solution="", answer="") for e in batch["examples"]]
    assert gradient(method, batch).abs().max() < 1e-12


def test_only_questions_with_an_answer_that_parses_are_left_to_the_teacher() -> None:
    class Odd(FirstToken):
        def parsed(self, answers: Any, examples: Any) -> Tensor:
            return torch.tensor([i // 2 % 2 == 1 for i in range(len(answers))])

    method = make(branch=True, num_answers=2)
    method.reward = Odd()
    loss = only_loss(method, question_batch(4))
    assert loss.count == method.family.rollouts[-1].mask[[2, 3, 6, 7]].sum()


def observed(method: Any, steps: int, start: int = 0) -> list[float]:
    """Train without an optimizer; return the exposures."""
    exposures = []
    for step in range(start, start + steps):
        (loss,) = method.losses(question_batch(3, first_id=3 * step), START._replace(step=step))
        metrics = {f"{name}/student": float(v) for name, v in loss.metrics.items()}
        method.observe(metrics | {"loss/student": loss.value.item()})
        exposures.append(float(loss.metrics["exposure"]))
    return exposures


def test_an_exposure_is_held_and_then_drawn_anew() -> None:
    exposures = observed(make(ATESD), 15)
    assert len(set(exposures)) == 3
    assert all(len(set(exposures[start : start + 5])) == 1 for start in (0, 5, 10))


def test_the_controller_goes_on_from_a_checkpoint_as_if_nothing_had_happened() -> None:
    options = {"hold": 2, "lookahead": 3, "num_decisions": 2, "controller_lr": 0.1}
    whole = observed(make(ATESD, **options), 24)
    first, second = make(ATESD, **options), make(ATESD, **options)
    begun = observed(first, 13)
    second.load_state(first.state())
    assert begun + observed(second, 11, start=13) == whole
    frozen = observed(make(ATESD, **options | {"controller_lr": 1e-9}), 24)
    assert whole != frozen


def test_the_probe_does_not_depend_on_what_is_shown() -> None:
    probes = set()
    for lowest, highest in ((0.05, 0.06), (0.9, 0.99)):
        method = make(ATESD, lowest_exposure=lowest, highest_exposure=highest)
        probes.add(float(only_loss(method, question_batch(4)).metrics["probe"]))
    assert len(probes) == 1


def test_the_controllers_numbers_leave_the_student_no_gradient() -> None:
    method, batch = make(ATESD), question_batch(4)
    loss = only_loss(method, batch)
    assert not any(torch.as_tensor(v).requires_grad for v in loss.metrics.values())
    fixed = make(OPSD, exposure=float(loss.metrics["exposure"]))
    torch.testing.assert_close(
        student_gradients(make(ATESD), [batch]), student_gradients(fixed, [batch])
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OPSD, {"exposure": 0.5}),
        (SDAR, {"exposure": 0.5}),
        (ExOPD, {"exposure": 0.5}),
        (ATESD, {"exposure_policy": "fixed", "exposure": 0.5}),
        (ATESD, {"exposure_policy": "random"}),
        (EGX, {}),
    ],
)
def test_a_question_without_a_final_answer_is_of_no_use_below_a_full_exposure(
    kind: Any, options: dict[str, Any]
) -> None:
    bare = Example("?", solution="It is four.")
    method = make(kind, **options)
    with pytest.raises(UserError, match="there is no final answer to show"):
        method.check_question(bare)
    method.check_question(bare._replace(answer="4"))
    whole = {"exposure": 1.0} | ({"exposure_policy": "fixed"} if kind in (ATESD, EGX) else {})
    make(kind, **whole).check_question(bare)


@pytest.mark.parametrize("policy", ["fixed", "random"])
def test_without_a_controller_nothing_is_watched(policy: str) -> None:
    method = make(ATESD, exposure_policy=policy)
    loss = only_loss(method, question_batch(3))
    assert "probe" not in loss.metrics
    assert len(method.student.calls) == 1 + 5  # one for the loss, the others of the rollout


@pytest.mark.parametrize("policy", ["fixed", "random"])
def test_without_a_controller_its_bounds_are_none(policy: str) -> None:
    bounds = {"hold": 1, "lookahead": 1, "lowest_exposure": 0.0, "highest_exposure": 1.0}
    method, other = (make(ATESD, exposure_policy=policy, **bounds) for _ in range(2))
    drawn = observed(method, 3)
    assert drawn == observed(make(ATESD, exposure_policy=policy, **bounds | {"lookahead": 9}), 3)
    assert (len(set(drawn)) == 1) == (policy == "fixed")
    other.load_state(method.state())
    assert other.state() == method.state() == {"controller": None, "step": 2}
    other.load_state(make(ATESD).state())  # of a checkpoint with a controller
    for wrong in ({"hold": 0}, {"lowest_exposure": 0.5, "highest_exposure": 0.4}):
        with pytest.raises(ValueError, match="|".join(wrong)):
            make(ATESD, exposure_policy=policy, **wrong)


def test_a_random_exposure_is_drawn_for_each_window_from_the_seed() -> None:
    drawn = observed(make(ATESD, exposure_policy="random"), 6)
    expected = [
        random_exposure(Draws(0), step, hold=5, lowest=0.05, highest=0.999) for step in range(6)
    ]
    assert drawn == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"support": "teacher"}, "support: full"),
        ({"strength": -1.0}, "strength must be at least 0"),
        ({"guard": "constant", "guard_size": 2.0}, r"guard_size must be in \(0, 1\)"),
        ({"exposure": 1.5}, r"exposure must be in \[0, 1\]"),
        ({"hold": 1}, "hold must be at least 2"),
        ({"lowest_exposure": 0.0}, "lowest_exposure must be above 0 and below highest_exposure"),
        ({"highest_exposure": 1.0}, "highest_exposure must be below 1"),
        ({"reward_discount": 0.0}, r"reward_discount must be in \(0, 1\]"),
        ({"controller_lr": 0.0}, "controller_lr must be above 0"),
        ({"reward_weight": 1.0}, "num_answers must be at least 2"),
        ({"gap_form": True, "gate_beta": 0.0}, "gate_beta above 0"),
        ({"discount": 0.5}, "divergence: sampled"),
        ({"divergence": "sampled", "token_clip": 1.0}, "token_clip null"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(**options)

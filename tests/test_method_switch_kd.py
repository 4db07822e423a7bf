"""Switch-KD on networks of a few numbers: what each term is, and whom it reaches."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.dbild import Leaders, dbild
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.projection import dense
from diffdistill.sights import Sight
from diffdistill.text.switch_kd import SwitchKD
from diffdistill.types import Batch, Condition, State
from tests.conftest import START, generator
from tests.toy_answers import Network, Questions, question_batch
from tests.toy_texts import only_loss, student_gradients

LEADERS = Leaders(6, 3, 6)
TERMS = ("answer_weight", "align_weight", "switch_weight")


class Seer(Network):
    """Eyes make features of the question, which the rest reads as it reads a question."""

    def __init__(self, seed: int, *, places: int = 1) -> None:
        super().__init__(seed)
        self.eyes = nn.Parameter(torch.randn(4, 4, generator=generator(seed + 20)))
        self.places, self.looks = places, 0

    def look(self, condition: Condition) -> Sight:
        self.looks += 1
        features = condition["told"].to(self.eyes.dtype) @ self.eyes
        return Sight(features[:, None].repeat(1, self.places, 1), "output")

    def forward(self, state: State, condition: Condition) -> Any:
        sight = condition["sight"] if "sight" in condition else self.look(condition)
        return super().forward(state, {**condition, "told": sight.features[:, 0]})


class Seeing(Questions):
    """Questions whose numbers are the picture."""

    def seeing(self, condition: Condition, sight: Sight) -> Condition:
        return {**condition, "sight": sight}


def make(*, teacher: Seer | None = None, **options: Any) -> Any:
    few = {"curve": 6, "most_leaders": 6}
    given = (few if options.get("divergence", "dbild") == "dbild" else {}) | options
    teacher = (teacher or Seer(2)).double().requires_grad_(False)
    return SwitchKD(
        family=Seeing(), draws=Draws(0), student=Seer(1).double(), teacher=teacher, **given
    )


def alone(term: str, **options: Any) -> Any:
    """Return a method with one term."""
    return make(**(dict.fromkeys(TERMS, 0.0) | {term: 1.0} | options))


def composed(method: Any, batch: Batch) -> dict[str, Tensor]:
    """Return each term, made of the three routes written out."""
    student, teacher = method.student, method.teacher
    answers = method.family.given(batch)
    state, told = method.family.state(answers), method.family.condition(batch)
    seen = student.look(told)
    routes = {
        "student": student(state, told),
        "teacher": teacher(state, told),
        "switched": teacher(state, {**told, "sight": seen}),
    }
    logits = {name: dense(found) for name, found in routes.items()}
    mask = answers.mask

    def apart(name: str) -> Tensor:
        maps = dbild(logits[name], logits["teacher"], leaders=LEADERS, temperature=3.0)
        return maps["divergence"][mask].mean()

    return {
        "answer_weight": F.cross_entropy(logits["student"][mask], answers.tokens[mask]),
        "align_weight": apart("student"),
        "switch_weight": apart("switched"),
    }


def test_the_loss_is_the_weighted_sum_of_its_three_terms() -> None:
    weights = {"answer_weight": 0.5, "align_weight": 2.0, "switch_weight": 3.0}
    method, batch = make(**weights), question_batch(4)
    loss = only_loss(method, batch)
    expected = composed(method, batch)
    total = sum(weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(loss.value, total)
    assert loss.count == method.family.given(batch).mask.sum()
    parameters = list(method.student.parameters())
    pairs = zip(
        torch.autograd.grad(loss.value, parameters),
        torch.autograd.grad(total, parameters),
        strict=True,
    )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)
    told = {name: loss.metrics[name] for name in ("answers", "align", "switch")}
    for name, value in zip(TERMS, told.values(), strict=True):
        torch.testing.assert_close(value, expected[name].detach())


@pytest.mark.parametrize("term", TERMS)
def test_a_term_alone_is_what_it_is_in_the_sum(term: str) -> None:
    method, batch = alone(term), question_batch(3)
    torch.testing.assert_close(only_loss(method, batch).value, composed(method, batch)[term])


def test_the_switched_term_trains_the_students_eyes_and_nothing_else() -> None:
    method = alone("switch_weight")
    only_loss(method, question_batch(3)).value.backward()
    reached = {
        n for n, p in method.student.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert reached == {"eyes"}
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("term", ["answer_weight", "align_weight"])
def test_the_other_terms_train_all_of_the_student_and_nothing_of_the_teacher(term: str) -> None:
    method = alone(term)
    only_loss(method, question_batch(3)).value.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.student.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())


def test_the_gradient_through_the_frozen_teacher_is_that_of_finite_differences() -> None:
    method, batch = alone("switch_weight"), question_batch(2)
    only_loss(method, batch).value.backward()
    eyes = method.student.eyes
    for place in ((0, 0), (2, 1), (3, 3)):
        found = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                eyes[place] += step
            found.append(only_loss(method, batch).value.item())
            with torch.no_grad():
                eyes[place] -= step
        slope = (found[0] - found[1]) / 2e-5
        assert eyes.grad[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_each_encoder_is_asked_once_and_only_where_a_term_needs_it() -> None:
    for options, looks in (
        ({}, (1, 1)),
        ({"switch_weight": 0.0}, (1, 1)),
        ({"switch_weight": 0.0, "align_weight": 0.0}, (1, 0)),
    ):
        method = make(**options)
        only_loss(method, question_batch(2))
        assert (method.student.looks, method.teacher.looks) == looks


def test_without_the_teachers_terms_it_is_plain_fine_tuning() -> None:
    method, batch = alone("answer_weight", answer_weight=2.0), question_batch(3)
    found = only_loss(method, batch)
    assert not method.teacher.calls
    torch.testing.assert_close(found.value, 2.0 * composed(method, batch)["answer_weight"])


@pytest.mark.parametrize("divergence", ["dbild", "forward-kl", "reverse-kl"])
@pytest.mark.parametrize("term", ["align_weight", "switch_weight"])
def test_a_teacher_that_is_the_student_teaches_nothing(term: str, divergence: str) -> None:
    method = alone(term, divergence=divergence, teacher=Seer(1))
    gradient = student_gradients(method, [question_batch(3)])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl"])
def test_a_kl_compares_the_whole_vocabulary_at_the_temperature(kind: str) -> None:
    method = alone("align_weight", divergence=kind, temperature=2.0)
    batch = question_batch(3)
    answers = method.family.given(batch)
    state, told = method.family.state(answers), method.family.condition(batch)
    p, q = (
        F.log_softmax(dense(side(state, told)) / 2.0, -1)[answers.mask]
        for side in (method.student, method.teacher)
    )
    over, under = (q, p) if kind == "forward-kl" else (p, q)
    expected = (over.exp() * (over - under)).sum(-1).mean()
    torch.testing.assert_close(only_loss(method, batch).value, expected)


def test_the_squared_temperature_multiplies_both_divergences_and_not_the_answers() -> None:
    batch = question_batch(3)
    plain, squared = (
        only_loss(make(temperature=2.0, temperature_factor=how), batch).metrics
        for how in ("none", "squared")
    )
    for name, factor in (("answers", 1.0), ("align", 4.0), ("switch", 4.0)):
        torch.testing.assert_close(squared[name], factor * plain[name])


def test_micro_batches_take_the_same_step() -> None:
    whole = student_gradients(make(), [question_batch(4)])
    parts = [question_batch(1), question_batch(3, first_id=1)]
    torch.testing.assert_close(student_gradients(make(), parts), whole)


def test_eyes_of_another_grid_are_an_error_that_says_both() -> None:
    method = make(teacher=Seer(2, places=3))
    with pytest.raises(UserError, match=r"gives 1 places of 4 channels .* takes 3 places of 4"):
        only_loss(method, question_batch(2))
    blind = make(teacher=Seer(2, places=3), switch_weight=0.0)
    assert only_loss(blind, question_batch(2)).value.isfinite()


def test_a_frozen_encoder_is_an_error_where_only_it_could_learn() -> None:
    method = make()
    method.student.eyes.requires_grad_(False)
    with pytest.raises(UserError, match="nothing of the student's vision encoder is trained"):
        only_loss(method, question_batch(2))
    with torch.no_grad():
        assert list(method.losses(question_batch(2), START))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        (dict.fromkeys(TERMS, 0.0), "one of them above it"),
        ({"align_weight": -1.0}, "at least 0"),
        ({"fewest_leaders": 2}, "3 <= fewest_leaders"),
        (
            {"divergence": "forward-kl", "curve": 64},
            "curve is for divergence: dbild, not forward-kl",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(**options)

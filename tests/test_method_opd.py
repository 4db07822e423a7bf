from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffdistill.draws import Draws
from diffdistill.projection import dense
from diffdistill.text.opd import OPD
from diffdistill.text.opsd import OPSD
from diffdistill.tokenwise import Maps
from tests.conftest import START
from tests.toy_answers import Network, Questions, question_batch
from tests.toy_texts import only_loss, student_gradients


def make(kind: Any = OPD, *, teacher: Network | None = None, **options: Any) -> Any:
    return kind(
        family=Questions(),
        draws=Draws(0),
        student=Network(1).double(),
        teacher=(teacher or Network(2)).double(),
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options,
    )


def both_logits(method: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of both sides at the method's last rollout, and its mask."""
    answers = method.family.rollouts[-1]
    state = method.family.state(answers)
    exposure = getattr(method, "exposure", None)
    theirs = method.family.condition(batch, reader="teacher", exposure=exposure)
    ours = method.student(state, method.family.condition(batch))
    return dense(ours), dense(method.teacher(state, theirs)), answers.mask


def naive(kind: str, ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    p, q = F.log_softmax(ours, -1), F.log_softmax(theirs, -1).detach()
    forward, reverse = (q.exp() * (q - p)).sum(-1), (p.exp() * (p - q)).sum(-1)
    middle = ((p.exp() + q.exp()) / 2).log()
    jsd = ((q.exp() * (q - middle)).sum(-1) + (p.exp() * (p - middle)).sum(-1)) / 2
    return {"forward-kl": forward, "reverse-kl": reverse, "jsd": jsd}[kind][mask].mean()


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_opd_is_the_mean_divergence_over_the_tokens_of_the_students_answers(kind: str) -> None:
    method, batch = make(divergence=kind), question_batch(4)
    loss = only_loss(method, batch)
    expected = naive(kind, *both_logits(method, batch))
    torch.testing.assert_close(loss.value, expected)
    assert loss.count == method.family.rollouts[-1].mask.sum()
    parameters = list(method.student.parameters())
    pairs = zip(
        torch.autograd.grad(loss.value, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)


def test_a_temperature_divides_the_logits_of_both_sides() -> None:
    method, batch = make(temperature=1.7), question_batch(4)
    loss = only_loss(method, batch)
    ours, theirs, mask = both_logits(method, batch)
    torch.testing.assert_close(loss.value, naive("reverse-kl", ours / 1.7, theirs / 1.7, mask))


@pytest.mark.parametrize(
    "options", [{}, {"divergence": "sampled"}, {"support": "teacher", "support_size": 3}]
)
def test_a_teacher_that_is_the_student_teaches_nothing(options: dict[str, Any]) -> None:
    method = make(teacher=Network(1), **options)
    gradient = student_gradients(method, [question_batch(3)])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize("support", ["teacher", "student", "intersection"])
@pytest.mark.parametrize("correction", ["tail", "hybrid"])
def test_on_a_few_tokens_it_is_still_told_how_likely_the_answers_are(
    support: str, correction: str
) -> None:
    batch = question_batch(4)
    method = make(support=support, support_size=3, correction=correction)
    found, whole = only_loss(method, batch).metrics, only_loss(make(), batch).metrics
    for name in ("logprob", "sampler_gap"):
        torch.testing.assert_close(found[name], whole[name])


@pytest.mark.parametrize("options", [{}, {"divergence": "sampled"}, {"select": "soft-or"}])
def test_only_the_student_learns(options: dict[str, Any]) -> None:
    method = make(**options)
    only_loss(method, question_batch(3)).value.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"select": "soft-or", "select_scope": "rollout"},
        {"select": "soft-or", "select_scope": "global"},
        {"select": "q3", "select_scope": "global", "retention": 0.3},
    ],
)
def test_micro_batches_take_the_same_step(options: dict[str, Any]) -> None:
    whole = student_gradients(make(**options), [question_batch(4)])
    parts = [question_batch(1), question_batch(3, first_id=1)]
    torch.testing.assert_close(student_gradients(make(**options), parts), whole)


def test_scores_of_the_micro_batch_depend_on_what_it_is() -> None:
    options: dict[str, Any] = {"select": "soft-or", "retention": 0.4}
    whole = student_gradients(make(**options), [question_batch(4)])
    parts = [question_batch(1), question_batch(3, first_id=1)]
    assert not torch.allclose(student_gradients(make(**options), parts), whole)


def test_a_survey_of_the_step_answers_each_question_once() -> None:
    method = make(select="soft-or", select_scope="global")
    student_gradients(method, [question_batch(2), question_batch(2, first_id=2)])
    assert len(method.family.rollouts) == 2


def test_selection_keeps_its_share_of_each_answer_and_costs_the_others_nothing() -> None:
    method, batch = make(select="divergence", retention=0.5), question_batch(6)
    loss = only_loss(method, batch)
    lengths = method.family.rollouts[-1].mask.sum(1)
    assert loss.count == (lengths // 2).clamp(min=1).sum()
    everything = only_loss(make(), batch)
    assert loss.value > everything.value  # the largest divergences are above the mean


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_gradients_made_in_the_forward_pass_are_those_made_after_it(kind: str) -> None:
    batch = question_batch(4)
    planned, after = (
        student_gradients(make(divergence=kind, token_clip=clip), [batch]) for clip in (None, 1e9)
    )
    torch.testing.assert_close(planned, after)


def test_a_plain_divergence_plans_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    slope = Maps.slope

    def watched(self: Any, *args: Any) -> Any:
        made.append(args)
        return slope(self, *args)

    monkeypatch.setattr(Maps, "slope", watched)
    for options, planned in (({}, True), ({"token_clip": 1.0}, False)):
        made.clear()
        loss = only_loss(make(**options), question_batch(4))
        assert bool(made) == planned
        made.clear()
        loss.value.backward()
        assert bool(made) != planned


def test_all_tokens_retained_is_no_selection() -> None:
    kept = only_loss(make(select="soft-or", retention=1.0), question_batch(3))
    assert kept.value == only_loss(make(), question_batch(3)).value


def test_given_answers_are_learned_where_the_step_is_off_policy() -> None:
    method, batch = make(on_policy_share=0.0), question_batch(3)
    loss = only_loss(method, batch)
    assert not method.family.rollouts
    assert loss.count == 6  # a token and the end, three times


def test_a_warm_up_learns_the_forward_kl_at_what_the_teacher_writes() -> None:
    options: dict[str, Any] = {"divergence": "forward-kl", "on_policy_share": 0.0}
    method, batch = make(off_policy="teacher", num_answers=2, **options), question_batch(3)
    loss = only_loss(method, batch)
    answers = method.family.rollouts[-1]
    rows = method.family.repeated(batch, 2)
    expected = naive("forward-kl", *both_logits(method, rows))
    torch.testing.assert_close(loss.value, expected)
    assert "sampler_gap" not in loss.metrics  # who wrote it is no older student
    other = make(off_policy="teacher", num_answers=2, **options)
    other.student = Network(5).double()  # whoever learns, the teacher writes the same
    only_loss(other, batch)
    assert torch.equal(other.family.rollouts[-1].tokens, answers.tokens)
    assert make(off_policy="teacher", **options).solutions() == "unused"
    assert make(**options).solutions() == "learned"


def test_the_share_of_on_policy_steps_is_kept() -> None:
    method, batch = make(on_policy_share=0.3), question_batch(1)
    for step in range(200):
        list(method.losses(batch, START._replace(step=step)))
    assert 40 <= len(method.family.rollouts) <= 80


def test_answers_depend_neither_on_what_the_teacher_is_shown_nor_on_the_loss() -> None:
    first = make(OPSD, exposure=1.0)
    others = [make(OPSD, exposure=0.25), make(OPSD, divergence="jsd"), make(select="q3")]
    for method in (first, *others):
        only_loss(method, question_batch(4))
    tokens = first.family.rollouts[0].tokens
    assert all(torch.equal(method.family.rollouts[0].tokens, tokens) for method in others)


def test_opsd_shows_the_solution_to_the_teacher_alone() -> None:
    method = make(OPSD)
    only_loss(method, question_batch(2))
    assert {call["exposure"] for call in method.teacher.calls} == {1.0}
    assert {call["exposure"] for call in method.student.calls} == {None}


def test_opsd_of_the_same_weights_learns_from_what_is_shown_alone() -> None:
    shown = student_gradients(make(OPSD, teacher=Network(1)), [question_batch(3)])
    assert shown.abs().max() > 1e-3
    hidden = student_gradients(make(OPD, teacher=Network(1)), [question_batch(3)])
    assert hidden.abs().max() < 1e-12


def test_a_clipped_token_keeps_its_direction() -> None:
    method, batch = make(token_clip=0.05), question_batch(3)
    loss = only_loss(method, batch)
    ours, theirs, mask = both_logits(method, batch)
    p, q = F.log_softmax(ours, -1), F.log_softmax(theirs, -1).detach()
    error = (p.exp() * (p - q)).sum(-1)[mask]
    scale = (0.05 / error.detach()).clamp(max=1.0)
    assert scale.min() < 1
    torch.testing.assert_close(loss.value, (error * scale).mean())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"support": "teacher", "correction": "none"}, "allow_biased"),
        ({"entry_clip": 0.05}, "forward-kl or jsd"),
        ({"curve": 64}, "curve is for divergence: dbild, not reverse-kl: leave it 128"),
        ({"fewest_leaders": 4}, "fewest_leaders is for divergence: dbild"),
        ({"most_leaders": 8}, "most_leaders is for divergence: dbild"),
        ({"pair_divergence": "forward-kl"}, "pair_divergence is for divergence: dbild"),
        ({"divergence": "sampled", "support": "teacher"}, "leave support full"),
        ({"divergence": "sampled", "on_policy_share": 0.5}, "student's own"),
        (
            {"support": "teacher", "correction": "hybrid", "on_policy_share": 0.5},
            "correction hybrid needs answers of the student's own",
        ),
        (
            {"support": "teacher", "correction": "hybrid", "divergence": "forward-kl"},
            "correction hybrid is for divergence: reverse-kl, not forward-kl",
        ),
        ({"divergence": "jsd", "beta": 0.0}, "beta 0 makes .* set divergence: forward-kl, or"),
        ({"divergence": "jsd", "beta": 1.0}, "beta 1 makes .* set divergence: reverse-kl, or"),
        ({"retention": 0.0}, r"retention must be in \(0, 1\]"),
        ({"top_p": 0.0}, "top_p"),
        ({"on_policy_share": 2.0}, "on_policy_share"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(**options)

"""The methods that verify answers: grpo, rlsd, sdar and sdpo."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffdistill.draws import Draws
from diffdistill.projection import dense
from diffdistill.text.grpo import GRPO
from diffdistill.text.rlsd import RLSD
from diffdistill.text.sdar import SDAR
from diffdistill.text.sdpo import SDPO, siblings
from diffdistill.types import Batch, Example
from tests.conftest import START
from tests.toy_answers import FirstToken, Network, Questions, question_batch
from tests.toy_texts import only_loss, student_gradients


class Same(FirstToken):
    """Rewards all answers alike."""

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        return torch.ones(len(answers))


def make(kind: Any = GRPO, *, reward: Any = None, **options: Any) -> Any:
    parts: dict[str, Any] = {}
    if kind is not GRPO:
        parts["teacher"] = Network(2).double()
    if kind is not SDPO:
        parts["reference"] = Network(3).double()
    return kind(
        family=Questions(),
        draws=Draws(0),
        student=Network(1).double(),
        reward=reward or FirstToken(),
        **parts | {"num_answers": 4} | options,
    )


def sampled(method: Any, batch: Batch) -> tuple[Any, Tensor]:
    """Return the answers of the last rollout, and the student's log-probability of each token."""
    answers = method.family.rollouts[-1]
    rows = method.family.repeated(batch, 4)
    found = dense(method.student(method.family.state(answers), method.family.condition(rows)))
    return answers, F.log_softmax(found, -1).gather(-1, answers.tokens[..., None])[..., 0]


def scores(method: Any, batch: Batch, answers: Any) -> Tensor:
    rows = method.family.repeated(batch, 4)
    return method.reward.score(method.family.spelled(answers), rows["examples"])


def gradient(value: Tensor, method: Any) -> Tensor:
    parameters = list(method.student.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


@pytest.mark.parametrize("aggregation", ["grpo", "dr-grpo", "dapo"])
def test_grpo_raises_tokens_of_answers_that_are_better_than_their_siblings(
    aggregation: str,
) -> None:
    method, batch = make(aggregation=aggregation, max_tokens=5), question_batch(6)
    loss = only_loss(method, batch)
    answers, logprob = sampled(method, batch)
    groups = scores(method, batch, answers).view(6, 4).double()
    assert 0 < groups.mean() < 1
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    terms = torch.where(answers.mask, -advantages.view(-1, 1) * logprob, 0.0)
    lengths = answers.mask.sum(1).clamp(min=1)
    expected = {
        "grpo": (terms.sum(1) / lengths).mean(),
        "dr-grpo": terms.sum() / (24 * 5),
        "dapo": terms.sum() / answers.mask.sum(),
    }[aggregation]
    torch.testing.assert_close(gradient(loss.value, method), gradient(expected, method))


def test_equal_rewards_teach_nothing() -> None:
    found = student_gradients(make(reward=Same()), [question_batch(3)])
    assert found.abs().max() == 0


@pytest.mark.parametrize("aggregation", ["grpo", "dr-grpo", "dapo"])
def test_micro_batches_take_the_same_step(aggregation: str) -> None:
    options: dict[str, Any] = {"aggregation": aggregation, "max_tokens": 5}
    whole = student_gradients(make(**options), [question_batch(4)])
    parts = [question_batch(1), question_batch(3, first_id=1)]
    torch.testing.assert_close(student_gradients(make(**options), parts), whole)


@pytest.mark.parametrize("kind", [GRPO, SDAR])
def test_rewards_in_units_of_the_steps_deviation_take_the_same_step(kind: Any) -> None:
    options: dict[str, Any] = {"scale_rewards": "batch"}
    whole = student_gradients(make(kind, **options), [question_batch(4)])
    parts = [question_batch(1), question_batch(3, first_id=1)]
    method = make(kind, **options)
    torch.testing.assert_close(student_gradients(method, parts), whole)
    assert len(method.family.rollouts) == 2
    assert len(method.student.calls) == 2 * 5 + 2  # five tokens are written, and read once


def test_gates_centered_over_the_step_take_the_same_step() -> None:
    options: dict[str, Any] = {"gate_scale": "centered", "weight": 1.0}
    whole = student_gradients(make(SDAR, **options), [question_batch(4)])
    parts = [question_batch(1), question_batch(3, first_id=1)]
    pooled = student_gradients(make(SDAR, gate_scope="global", **options), parts)
    torch.testing.assert_close(pooled, whole)
    assert not torch.allclose(student_gradients(make(SDAR, **options), parts), whole)


def test_gates_of_a_step_and_tokens_of_a_step_cannot_be_chosen_by_one_survey() -> None:
    options: dict[str, Any] = {"gate_scale": "centered", "gate_scope": "global"}
    with pytest.raises(ValueError, match="set one of them to micro-batch"):
        make(SDAR, select="entropy", select_scope="global", **options)


IMPORTANCES = ["token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_sampler_that_is_the_student_needs_no_weights(importance: str) -> None:
    batch = question_batch(4)
    plain, weighed = (
        student_gradients(make(**options), [batch]) for options in ({}, {"importance": importance})
    )
    torch.testing.assert_close(weighed, plain)


def test_another_samplers_tokens_are_weighed_and_the_gap_is_told() -> None:
    class Shifted(Questions):
        def rollout(self, *args: Any, **kwargs: Any) -> Any:
            found = super().rollout(*args, **kwargs)
            return found._replace(logprobs=torch.where(found.mask, found.logprobs - 0.2, 0.0))

    batch, plain = question_batch(4), make(scale_rewards="none")
    whole = gradient(only_loss(plain, batch).value, plain)
    method = make(scale_rewards="none", importance="token-truncate")
    method.family = Shifted()
    loss = only_loss(method, batch)
    torch.testing.assert_close(gradient(loss.value, method), torch.e**0.2 * whole)
    torch.testing.assert_close(loss.metrics["sampler_gap"], torch.tensor(0.2).double())
    method.importance_most = 1.1
    torch.testing.assert_close(gradient(only_loss(method, batch).value, method), 1.1 * whole)


def test_answers_that_were_cut_teach_nothing_if_they_are_dropped() -> None:
    method, batch = make(drop_cut=True, scale_rewards="none"), question_batch(6)
    loss = only_loss(method, batch)
    answers, logprob = sampled(method, batch)
    assert 0 < answers.ended.sum() < len(answers.ended)
    groups = scores(method, batch, answers).view(6, 4).double()
    advantages = (groups - groups.mean(1, keepdim=True)).view(-1, 1)
    kept = answers.mask & answers.ended[:, None]
    expected = -(advantages * logprob)[kept].mean()
    torch.testing.assert_close(gradient(loss.value, method), gradient(expected, method))


def test_a_reference_pulls_the_student_towards_it() -> None:
    batch = question_batch(4)
    method = make(reward=Same(), reference_weight=1.0)
    loss = only_loss(method, batch)
    answers, ours = sampled(method, batch)
    method.student, kept = method.reference, method.student
    _, theirs = sampled(method, batch)
    method.student = kept
    gap = theirs.detach() - ours
    expected = (gap.exp() - gap - 1)[answers.mask].mean()
    torch.testing.assert_close(gradient(loss.value, method), gradient(expected, method))


def test_a_reference_that_is_the_student_is_refused_a_weight() -> None:
    class Live(Network):
        settings = type("Settings", (), {"weights": "live"})

    with pytest.raises(ValueError, match=r"roles.reference.weights: frozen"):
        make(reference=Live(), reference_weight=0.1)
    make(reference=Live())


def test_rlsd_of_a_teacher_that_agrees_is_grpo() -> None:
    batch = question_batch(4)
    plain = gradient(only_loss(method := make(), batch).value, method)
    for form in ("rlsd", "rlrt"):
        other = make(RLSD, form=form, exposure=None, teacher=Network(1).double())
        found = gradient(only_loss(other, batch).value, other)
        torch.testing.assert_close(found, plain)
    told = make(RLSD, teacher=Network(1).double())
    assert not torch.allclose(gradient(only_loss(told, batch).value, told), plain)


def test_rlsds_share_falls_to_grpo() -> None:
    batch = question_batch(4)
    method, plain = make(RLSD, share_steps=10), make()
    loss = next(method.losses(batch, START._replace(step=10)))
    torch.testing.assert_close(
        gradient(loss.value, method), gradient(only_loss(plain, batch).value, plain)
    )


def test_sdar_adds_the_gated_log_ratio_of_sampled_tokens_to_grpo() -> None:
    batch = question_batch(4)
    method, plain = make(SDAR, weight=0.3), make()
    loss = only_loss(method, batch)
    answers, ours = sampled(method, batch)
    rows = method.family.repeated(batch, 4)
    shown = method.family.condition(rows, reader="teacher", exposure=1.0)
    found = F.log_softmax(dense(method.teacher(method.family.state(answers), shown)), -1)
    theirs = found.gather(-1, answers.tokens[..., None])[..., 0].detach()
    gate = torch.sigmoid(5.0 * (theirs - ours.detach()))
    expected = 0.3 * (gate * (theirs - ours))[answers.mask].mean()
    rewarded = gradient(only_loss(plain, batch).value, plain)
    torch.testing.assert_close(gradient(loss.value, method), rewarded + gradient(expected, method))


def test_sdar_without_its_term_is_grpo_and_its_teacher_gets_no_gradient() -> None:
    batch = question_batch(4)
    method, plain = make(SDAR, weight=0.0), make()
    loss = only_loss(method, batch)
    torch.testing.assert_close(
        gradient(loss.value, method), gradient(only_loss(plain, batch).value, plain)
    )
    only_loss(make(SDAR, teacher=method.teacher), batch).value.backward()
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("gate", ["gap", "entropy", "soft-or"])
def test_every_gate_of_sdar_is_one_half_at_slope_0(gate: str) -> None:
    loss = only_loss(make(SDAR, gate=gate, gate_beta=0.0), question_batch(3))
    assert loss.metrics["gate"] == 0.5
    loss = only_loss(make(SDAR, gate=gate, gate_beta=0.0, gate_scale="unit"), question_batch(3))
    assert loss.metrics["gate"] == 1.0


def test_a_sibling_is_the_next_right_answer_to_the_same_question_and_never_oneself() -> None:
    texts = ["a", "b", "c", "d", "e", "f"]
    right = torch.tensor([True, False, True, False, True, False])
    assert siblings(texts, right, 3) == ["c", "c", "a", "e", None, "e"]


def test_sdpo_learns_only_where_a_sibling_was_right_and_shows_it_to_the_teacher() -> None:
    method, batch = make(SDPO, support="full"), question_batch(6)
    loss = only_loss(method, batch)
    answers = method.family.rollouts[-1]
    texts = method.family.spelled(answers)
    shown = siblings(texts, scores(method, batch, answers) >= 1, 4)
    taught = torch.tensor([text is not None for text in shown])
    assert 0 < taught.sum() < len(taught)
    assert loss.count == answers.mask[taught].sum()
    rows = method.family.repeated(batch, 4)
    rows = method.family.with_solutions(rows, [text or "-" for text in shown])
    told = method.family.condition(rows, reader="teacher", exposure=1.0)["told"]
    torch.testing.assert_close(method.teacher.calls[-1]["told"], told)


def test_sdpo_of_wrong_answers_alone_teaches_nothing() -> None:
    class Wrong:
        def score(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
            return torch.zeros(len(answers))

    found = student_gradients(make(SDPO, reward=Wrong(), support_size=4), [question_batch(3)])
    assert found.abs().max() == 0


@pytest.mark.parametrize("kind", [GRPO, SDPO])
def test_one_answer_has_nothing_to_be_compared_with(kind: Any) -> None:
    with pytest.raises(ValueError, match="num_answers must be at least 2"):
        make(kind, num_answers=1)

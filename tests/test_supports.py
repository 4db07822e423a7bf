import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from diffdistill.projection import Projection, dense, token_maps
from diffdistill.supports import (
    Correction,
    Support,
    TruncatedDivergence,
    logprobs_at,
    top_logprobs,
    truncated_divergence,
)
from tests.conftest import randn

ROWS, WIDTH, WORDS = (2, 3), 4, 11
KINDS = get_args(TruncatedDivergence)


def projection(seed: int, *, dtype: torch.dtype = torch.float64) -> Projection:
    hidden = randn(*ROWS, WIDTH, seed=seed, dtype=dtype)
    weight = randn(WORDS, WIDTH, seed=seed + 1, dtype=dtype)
    return Projection(hidden, weight, randn(WORDS, seed=seed + 2, dtype=dtype))


def logits_of(seed: int) -> Tensor:
    """Return logits ``[2, 3, V]``."""
    return dense(projection(seed)).requires_grad_()


def slope(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), logits)[0]


def on_support(logits: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return probabilities of both sides on the teacher's k most likely tokens."""
    ids = teacher.topk(k, dim=-1).indices
    return logits.softmax(-1).gather(-1, ids), teacher.softmax(-1).gather(-1, ids)


def divergence(student: Tensor | Projection, teacher: Any, **options: Any) -> Tensor:
    given: dict[str, Any] = {
        "divergence": "reverse-kl", "support": "teacher", "k": 4, "correction": "generalized",
    }  # fmt: skip
    return truncated_divergence(student, teacher, **given | options)["divergence"]


def test_the_most_likely_tokens_are_those_of_the_whole_softmax() -> None:
    prediction, tokens = projection(0), torch.tensor([[0, 1, 2], [3, 4, 5]])
    found = top_logprobs(prediction, 4, tokens=tokens, temperature=2.0)
    logprobs = dense(prediction).div(2.0).log_softmax(-1)
    expected = logprobs.topk(4)
    assert torch.equal(found.ids, expected.indices)
    torch.testing.assert_close(found.logprobs, expected.values)
    torch.testing.assert_close(found.tokens, logprobs.gather(-1, tokens[..., None])[..., 0])
    assert top_logprobs(prediction, 1).tokens is None
    assert not top_logprobs(logits_of(0), 1).logprobs.requires_grad


def test_log_probabilities_at_ids_and_their_gradients_are_those_of_the_dense_softmax() -> None:
    prediction = projection(0)
    leaves = [x.requires_grad_() for x in prediction[:3] if isinstance(x, Tensor)]
    ids = torch.randint(WORDS, (*ROWS, 5), generator=torch.Generator().manual_seed(1))
    ids[..., 1] = ids[..., 0]  # a token may be asked for twice
    found = logprobs_at(prediction, ids, temperature=2.0)
    logits = prediction.hidden @ prediction.weight.T + prediction.bias
    expected = logits.div(2.0).log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(found, expected)
    upstream = randn(*ROWS, 5, seed=3, dtype=torch.float64)
    ours = torch.autograd.grad(found, leaves, upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves, upstream))


def test_masked_rows_are_zero_and_may_hold_any_id() -> None:
    prediction, teacher = projection(0), projection(10)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    ids = torch.full((*ROWS, 2), 3).masked_fill(~mask[..., None], -100)
    found = logprobs_at(prediction, ids, mask=mask)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found[mask], logprobs_at(prediction, ids.clamp_min(0))[mask])
    top = top_logprobs(prediction, 2, mask=mask)
    assert (top.ids[~mask] == 0).all()
    options: dict[str, Any] = {
        "divergence": "jsd", "support": "student", "k": 3, "correction": "tail",
    }  # fmt: skip
    whole = truncated_divergence(prediction, teacher, **options)
    part = truncated_divergence(prediction, teacher, mask=mask, **options)
    for name, value in part.items():
        assert (value[~mask] == 0).all()
        torch.testing.assert_close(value[mask], whole[name][mask])


@pytest.mark.parametrize("support", get_args(Support))
def test_the_answers_tokens_are_told_and_change_nothing(support: Support) -> None:
    logits, teacher = logits_of(0), dense(projection(10))
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5]])
    options: dict[str, Any] = {
        "divergence": "reverse-kl", "support": support, "k": 4, "correction": "tail",
    }  # fmt: skip
    plain = truncated_divergence(logits, teacher, **options)
    found = truncated_divergence(logits, teacher, tokens=tokens, **options)
    logprob = found.pop("logprob")
    expected = logits.detach().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(logprob, expected)
    assert not logprob.requires_grad
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(*(slope(x["divergence"], logits) for x in (found, plain)))


def test_the_generalized_gradient_is_that_of_stopped_log_probabilities() -> None:
    logits, teacher = logits_of(0), dense(projection(10))
    p, q = on_support(logits, teacher, 4)
    stopped = (p * (p.log().detach() - q.log())).sum(-1)
    found = divergence(logits, teacher)
    torch.testing.assert_close(found, (p * (p / q).log() - p + q).sum(-1))
    torch.testing.assert_close(slope(found, logits), slope(stopped, logits), rtol=0, atol=1e-15)


def test_what_truncation_adds_to_the_gradient_is_that_of_the_mass_on_the_support() -> None:
    logits, teacher = logits_of(0), dense(projection(10))
    bare = divergence(logits, teacher, correction="none", allow_biased=True)
    mass = on_support(logits, teacher, 4)[0].sum(-1)
    difference = slope(bare, logits) - slope(divergence(logits, teacher), logits)
    torch.testing.assert_close(difference, slope(mass, logits), rtol=0, atol=1e-15)
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "correction", "factor"),
    [
        ("reverse-kl", "none", lambda q: q / math.e),
        ("forward-kl", "none", lambda q: q / q.sum(-1, keepdim=True)),
        ("jsd", "none", lambda q: q),
        ("reverse-kl", "generalized", lambda q: q),
        ("forward-kl", "generalized", lambda q: q),
        ("jsd", "generalized", lambda q: q),
        ("reverse-kl", "tail", lambda q: q),
        ("forward-kl", "tail", lambda q: q),
    ],
)
def test_where_descent_ends_with_the_rest_of_the_vocabulary_free(
    kind: TruncatedDivergence, correction: Correction, factor: Any
) -> None:
    """The student with p = factor(q) on the support has no gradient; any other has one."""
    teacher = dense(projection(10))[0]
    ids = teacher.topk(4, dim=-1).indices
    q = teacher.softmax(-1).gather(-1, ids)
    p = teacher.softmax(-1)
    rest = 1.0 - factor(q).sum(-1, keepdim=True)
    if kind == "forward-kl" and correction == "none":
        rest = torch.full_like(rest, 1e-12)  # all mass is on the support
    p = (rest * p / (1.0 - q.sum(-1, keepdim=True))).scatter(-1, ids, factor(q))
    options: dict[str, Any] = {"divergence": kind, "correction": correction, "allow_biased": True}
    ends = p.log().requires_grad_()
    assert slope(divergence(ends, teacher, **options), ends).abs().max() < 1e-10
    near = (p.log() + 0.1 * randn(*p.shape, seed=1)).requires_grad_()
    assert slope(divergence(near, teacher, **options), near).abs().max() > 1e-3


def test_a_renormalized_divergence_leaves_the_mass_on_the_support_free() -> None:
    teacher = dense(projection(10))
    ids = teacher.topk(4, dim=-1).indices
    for kind in KINDS:
        moved = teacher.clone().scatter_add(-1, ids, torch.full(ids.shape, 2.0).double())
        moved.requires_grad_()
        value = divergence(moved, teacher, divergence=kind, correction="renorm")
        assert value.abs().max() < 1e-12
        assert slope(value, moved).abs().max() < 1e-12
        p, q = (x / x.sum(-1, keepdim=True) for x in on_support(logits_of(0), teacher, 4))
        known = token_maps(p.log(), q.log(), [kind])[kind]
        found = divergence(logits_of(0), teacher, divergence=kind, correction="renorm")
        torch.testing.assert_close(found, known)


@pytest.mark.parametrize("support", get_args(Support))
def test_the_hybrid_estimate_is_the_whole_reverse_kl_in_expectation(support: Support) -> None:
    logits, teacher = logits_of(0), dense(projection(10))
    p = logits.detach().softmax(-1)
    value, gradient = torch.zeros(ROWS).double(), torch.zeros_like(p)
    for token in range(WORDS):
        found = divergence(
            logits, teacher, support=support, correction="hybrid",
            tokens=torch.full(ROWS, token), k=3,
        )  # fmt: skip
        value += p[..., token] * found.detach()
        gradient += p[..., token, None] * slope(found, logits)
    whole = token_maps(logits, teacher, ["reverse-kl"])["reverse-kl"]
    torch.testing.assert_close(value, whole.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, slope(whole, logits), rtol=0, atol=1e-10)


def test_the_hybrid_estimate_of_another_samplers_tokens_is_weighed_to_the_same() -> None:
    logits, teacher = logits_of(0), dense(projection(10))
    sampler = dense(projection(20)).log_softmax(-1).detach()
    for clip, exact in ((1e9, True), (0.5, False)):
        value, gradient = torch.zeros(ROWS).double(), torch.zeros_like(logits.detach())
        for token in range(WORDS):
            found = divergence(
                logits, teacher, support="teacher", correction="hybrid", k=3,
                tokens=torch.full(ROWS, token), sampler=sampler[..., token], importance_clip=clip,
            )  # fmt: skip
            share = sampler[..., token].exp()
            value += share * found.detach()
            gradient += share[..., None] * slope(found, logits)
        whole = token_maps(logits, teacher, ["reverse-kl"])["reverse-kl"]
        assert torch.allclose(value, whole.detach(), rtol=0, atol=1e-10) == exact
        assert torch.allclose(gradient, slope(whole, logits), rtol=0, atol=1e-10) == exact


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_bucket_is_a_lower_bound_and_never_negative(kind: TruncatedDivergence) -> None:
    logits, teacher = logits_of(0), dense(projection(10))
    whole = token_maps(logits, teacher, [kind])[kind]
    last = torch.zeros(ROWS).double()
    for k in range(1, WORDS + 1):
        found = divergence(logits, teacher, divergence=kind, correction="tail", k=k)
        assert (found >= last - 1e-12).all()  # more buckets, more is seen
        assert (found <= whole + 1e-12).all()
        last = found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correction", [c for c in get_args(Correction) if c != "hybrid"])
@pytest.mark.parametrize("support", get_args(Support))
def test_the_whole_vocabulary_as_support_is_the_whole_divergence(
    kind: TruncatedDivergence, correction: Correction, support: Support
) -> None:
    student, teacher = projection(0), projection(10)
    leaves = [x.requires_grad_() for x in student[:3] if isinstance(x, Tensor)]
    found = truncated_divergence(
        student, teacher, divergence=kind, support=support, k=WORDS, correction=correction,
        temperature=1.5, beta=0.3, allow_biased=True,
    )  # fmt: skip
    whole = token_maps(student, teacher, [kind], temperature=1.5, beta=0.3)[kind]
    torch.testing.assert_close(found["divergence"], whole)
    ours = torch.autograd.grad(found["divergence"].sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(whole.sum(), leaves))
    for name in ("student_mass", "teacher_mass", "overlap"):
        torch.testing.assert_close(found[name], torch.ones(ROWS).double())
        assert not found[name].requires_grad


@pytest.mark.parametrize("support", get_args(Support))
def test_masses_and_overlap_are_those_of_sets_of_tokens(support: Support) -> None:
    student, teacher = logits_of(0), dense(projection(10))
    found = truncated_divergence(
        student, teacher, divergence="reverse-kl", support=support, k=4, correction="renorm"
    )
    p, q = student.softmax(-1), teacher.softmax(-1)
    for row in ((i, j) for i in range(ROWS[0]) for j in range(ROWS[1])):
        ours, theirs = (set(x[row].topk(4).indices.tolist()) for x in (student, teacher))
        sets = {"teacher": theirs, "student": ours, "intersection": ours & theirs}
        chosen = sorted(sets[support])
        assert found["overlap"][row] == len(ours & theirs) / 4
        torch.testing.assert_close(found["student_mass"][row], p[row][chosen].sum().detach())
        torch.testing.assert_close(found["teacher_mass"][row], q[row][chosen].sum())


@pytest.mark.parametrize("correction", ["generalized", "renorm", "tail"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_intersection_says_nothing(kind: Any, correction: Any) -> None:
    logits = torch.arange(WORDS).double().expand(*ROWS, -1).clone().requires_grad_()
    options: dict[str, Any] = {"divergence": kind, "support": "intersection"}
    found = divergence(logits, -logits.detach(), correction=correction, **options)
    assert found.abs().max() < 1e-15
    assert (slope(found, logits) == 0).all()


@pytest.mark.parametrize("correction", get_args(Correction))
@pytest.mark.parametrize("support", ["teacher", "intersection"])
def test_a_server_that_gives_its_top_k_is_as_good_as_the_teacher(
    correction: Correction, support: Support
) -> None:
    student, teacher, tokens = projection(0), projection(10), torch.tensor([[1, 2, 3], [4, 5, 6]])
    given = top_logprobs(teacher, 6, tokens=tokens, temperature=2.0)
    options: dict[str, Any] = {
        "correction": correction, "support": support, "tokens": tokens, "temperature": 2.0,
        "allow_biased": True,
    }  # fmt: skip
    hidden = student.hidden.requires_grad_()
    found, expected = (divergence(student, side, **options) for side in (given, teacher))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope(found, hidden), slope(expected, hidden))


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = logits_of(0), logits_of(10)
    given = top_logprobs(teacher, 4)
    served = given._replace(logprobs=given.logprobs.requires_grad_())
    value = divergence(student, teacher).sum() + divergence(student, served).sum()
    found = torch.autograd.grad(
        value, [student, teacher, served.logprobs], allow_unused=True
    )  # fmt: skip
    assert [gradient is None for gradient in found] == [False, True, True]


def test_suppressed_tokens_of_both_sides_count_as_nothing() -> None:
    student, teacher = dense(projection(0)), dense(projection(10))
    student[..., 2] = teacher[..., 2] = -torch.inf
    student.requires_grad_()
    kept = [i for i in range(WORDS) if i != 2]
    for kind in KINDS:
        found = divergence(student, teacher, divergence=kind, k=WORDS, support="student")
        cut = token_maps(student[..., kept], teacher[..., kept], [kind])[kind]
        torch.testing.assert_close(found, cut)
        assert slope(found, student).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "none"}, "say allow_biased"),
        ({"correction": "hybrid", "divergence": "jsd"}, "hybrid is of the reverse KL"),
        ({"correction": "hybrid"}, "needs the tokens"),
        ({"k": 0}, "k is 0, and there are 1 to 11 tokens"),
        ({"k": WORDS + 1}, "k is 12, and there are 1 to 11 tokens"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(projection(0), projection(10), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"support": "student"}, "use support teacher or intersection"),
        ({"correction": "hybrid", "tokens": torch.zeros(ROWS).long()}, "TopK.tokens"),
        ({"k": 5}, "k is 5, and there are 1 to 4 tokens"),
    ],
)
def test_what_a_server_does_not_tell_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(projection(0), top_logprobs(projection(10), 4), **options)

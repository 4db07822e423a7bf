import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill.projection import (
    Projection,
    TokenMap,
    cross_entropy,
    dense,
    token_logprob,
    token_maps,
    without,
)
from tests.conftest import randn

ROWS, WIDTH, WORDS = (2, 5), 4, 7
ALL: tuple[TokenMap, ...] = (
    "logprob",
    "teacher-logprob",
    "raw-teacher-logprob",
    "entropy",
    "teacher-entropy",
    "forward-kl",
    "reverse-kl",
    "jsd",
)


def projection(seed: int, *, words: int = WORDS, dtype: torch.dtype = torch.float64) -> Projection:
    hidden = randn(*ROWS, WIDTH, seed=seed, dtype=dtype)
    weight = randn(words, WIDTH, seed=seed + 1, dtype=dtype)
    return Projection(hidden, weight, randn(words, seed=seed + 2, dtype=dtype))


def some_tokens() -> Tensor:
    return torch.randint(WORDS, ROWS, generator=torch.Generator().manual_seed(9))


def oracle(student: Tensor, teacher: Tensor, tokens: Tensor, beta: float) -> dict[str, Tensor]:
    """Every map from dense logits, by the textbook formula with probabilities."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    m = beta * q + (1 - beta) * p
    pick = F.one_hot(tokens, student.shape[-1])
    return {
        "logprob": (p.log() * pick).sum(-1),
        "teacher-logprob": (q.log() * pick).sum(-1),
        "raw-teacher-logprob": (q.log() * pick).sum(-1),
        "entropy": -(p * p.log()).sum(-1),
        "teacher-entropy": -(q * q.log()).sum(-1),
        "forward-kl": (q * (q / p).log()).sum(-1),
        "reverse-kl": (p * (p / q).log()).sum(-1),
        "jsd": beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1),
    }


def leaves_of(student: Projection) -> list[Tensor]:
    return [x.requires_grad_() for x in student[:3] if isinstance(x, Tensor)]


@pytest.mark.parametrize("tile_rows", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_map_and_its_gradients_equal_the_dense_formula(
    tile_rows: int, temperature: float
) -> None:
    student, teacher, tokens = projection(0), projection(10), some_tokens()
    leaves = leaves_of(student)
    maps = token_maps(
        student, teacher, ALL, tokens=tokens, temperature=temperature, beta=0.3,
        tile_rows=tile_rows,
    )  # fmt: skip
    logits = student.hidden @ student.weight.T + student.bias
    target = teacher.hidden @ teacher.weight.T + teacher.bias
    expected = oracle(logits / temperature, target / temperature, tokens, 0.3)
    for index, name in enumerate(ALL):
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-9, atol=1e-11)
        if "teacher" in name:
            assert not maps[name].requires_grad
            continue
        upstream = randn(*ROWS, seed=50 + index, dtype=torch.float64)
        found = torch.autograd.grad(maps[name], leaves, upstream, retain_graph=True)
        known = torch.autograd.grad(expected[name], leaves, upstream, retain_graph=True)
        torch.testing.assert_close(found, known, rtol=1e-8, atol=1e-10)


def test_gradients_of_several_maps_at_once_pass_gradcheck() -> None:
    teacher, tokens = projection(10), some_tokens()

    def maps(*parts: Tensor) -> tuple[Tensor, ...]:
        wanted: tuple[TokenMap, ...] = ("logprob", "entropy", "forward-kl", "reverse-kl", "jsd")
        student = Projection(parts[0], parts[1], parts[2], scale=0.7, softcap=3.0)
        found = token_maps(student, teacher, wanted, tokens=tokens, tile_rows=4)
        return tuple(found.values())

    assert torch.autograd.gradcheck(maps, leaves_of(projection(0)))


def test_plain_logits_give_the_same_maps_and_gradients() -> None:
    logits, target, tokens = dense(projection(0)), dense(projection(10)), some_tokens()
    logits.requires_grad_()
    maps = token_maps(logits, target, ALL, tokens=tokens, tile_rows=3)
    expected = oracle(logits, target, tokens, 0.5)
    for name in ALL:
        torch.testing.assert_close(maps[name], expected[name])
    torch.autograd.gradcheck(lambda x: token_logprob(x, tokens, tile_rows=3), [logits])


def test_logits_are_scaled_and_then_softly_capped() -> None:
    student = projection(0)
    product = student.hidden @ student.weight.T + student.bias
    changed = student._replace(scale=0.7, softcap=3.0)
    expected = 3.0 * torch.tanh(0.7 * product / 3.0)
    torch.testing.assert_close(dense(changed), expected)
    found = token_maps(changed, None, ("entropy",))["entropy"]
    torch.testing.assert_close(found, token_maps(expected, None, ("entropy",))["entropy"])


def test_a_projection_may_be_compared_with_logits() -> None:
    student, teacher = projection(0), projection(10)
    mixed = token_maps(student, dense(teacher), ("reverse-kl",))
    torch.testing.assert_close(mixed, token_maps(student, teacher, ("reverse-kl",)))


def test_cross_entropy_is_that_of_torch() -> None:
    student, tokens = projection(0, dtype=torch.float32), some_tokens()
    expected = F.cross_entropy(dense(student).flatten(0, 1), tokens.flatten(), reduction="none")
    torch.testing.assert_close(cross_entropy(student, tokens).flatten(), expected)


def test_masked_rows_are_zero_and_may_hold_any_token() -> None:
    student, tokens = projection(0), some_tokens()
    leaves = leaves_of(student)
    mask = randn(*ROWS, seed=3) > 0
    masked = cross_entropy(student, tokens.masked_fill(~mask, -100), mask=mask, tile_rows=2)
    full = cross_entropy(student, tokens)
    assert (masked[~mask] == 0).all()
    torch.testing.assert_close(masked[mask], full[mask])
    found = torch.autograd.grad(masked.sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((full * mask).sum(), leaves))


def test_an_empty_mask_gives_zeros_and_zero_gradients() -> None:
    student, teacher = projection(0), projection(10)
    leaves = leaves_of(student)
    nothing = torch.zeros(ROWS, dtype=torch.bool)
    maps = token_maps(student, teacher, ALL, tokens=some_tokens(), mask=nothing)
    total = torch.stack(list(maps.values())).sum()
    assert total == 0
    assert all((g == 0).all() for g in torch.autograd.grad(total, leaves))


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = projection(0), projection(10)
    inputs = [*leaves_of(student), *leaves_of(teacher)]
    maps = token_maps(student, teacher, ALL, tokens=some_tokens())
    found = torch.autograd.grad(torch.stack(list(maps.values())).sum(), inputs, allow_unused=True)
    assert [g is None for g in found] == [False] * 3 + [True] * 3


def test_divergences_of_equal_predictions_are_zero_and_flat() -> None:
    student = projection(0)
    hidden = student.hidden.requires_grad_()
    maps = token_maps(student, student, ("forward-kl", "reverse-kl", "jsd"))
    for value in maps.values():
        torch.testing.assert_close(value, torch.zeros_like(value))
        gradient = torch.autograd.grad(value.sum(), hidden, retain_graph=True)[0]
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_jsd_tends_to_both_kls_divided_by_its_knob() -> None:
    student, teacher, small = projection(0), projection(10), 1e-6
    kls = token_maps(student, teacher, ("forward-kl", "reverse-kl"))
    near_forward = token_maps(student, teacher, ("jsd",), beta=small)["jsd"] / small
    near_reverse = token_maps(student, teacher, ("jsd",), beta=1 - small)["jsd"] / small
    torch.testing.assert_close(near_forward, kls["forward-kl"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near_reverse, kls["reverse-kl"], rtol=1e-3, atol=1e-4)
    for end in (0.0, 1.0):
        assert (token_maps(student, teacher, ("jsd",), beta=end)["jsd"] == 0).all()


def test_a_mixed_target_leads_from_the_student_to_the_teacher() -> None:
    student, teacher = projection(0), projection(10)
    hidden = student.hidden.requires_grad_()
    share = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)).double()
    found = token_maps(student, teacher, ("forward-kl",), share=share, temperature=2.0)
    own, target = dense(student), dense(teacher)
    r = ((1 - share[..., None]) * own + share[..., None] * target).div(2.0).softmax(-1).detach()
    expected = (r * (r.log() - (own / 2.0).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(found["forward-kl"], expected)
    torch.testing.assert_close(
        torch.autograd.grad(found["forward-kl"].sum(), hidden)[0],
        torch.autograd.grad(expected.sum(), hidden)[0],
    )
    ends = {
        part: token_maps(student, teacher, ("forward-kl",), share=torch.full(ROWS, part).double())
        for part in (0.0, 1.0)
    }
    zero = ends[0.0]["forward-kl"]
    torch.testing.assert_close(zero, torch.zeros_like(zero))
    torch.testing.assert_close(ends[1.0], token_maps(student, teacher, ("forward-kl",)))


def test_only_the_shared_part_of_two_vocabularies_is_compared() -> None:
    student, teacher = projection(0), projection(10, words=WORDS + 4)
    hidden = student.hidden.requires_grad_()
    found = token_maps(student, teacher, ("forward-kl", "reverse-kl"), shared=5)
    cut = token_maps(dense(student)[..., :5], dense(teacher)[..., :5], ("forward-kl", "reverse-kl"))
    torch.testing.assert_close(found, cut)
    torch.testing.assert_close(
        torch.autograd.grad(found["reverse-kl"].sum(), hidden)[0],
        torch.autograd.grad(cut["reverse-kl"].sum(), hidden)[0],
    )
    with pytest.raises(AssertionError, match="vocabularies of 7 and 11"):
        token_maps(student, teacher, ("jsd",))


def test_suppressed_logits_of_both_sides_count_as_nothing() -> None:
    own, target = dense(projection(0)), dense(projection(10))
    own[..., 2] = target[..., 2] = -torch.inf
    own.requires_grad_()
    kept = [0, 1, 3, 4, 5, 6]
    wanted: tuple[TokenMap, ...] = ("entropy", "forward-kl", "reverse-kl", "jsd")
    maps = token_maps(own, target, wanted)
    torch.testing.assert_close(maps, token_maps(own[..., kept], target[..., kept], wanted))
    for value in maps.values():
        assert torch.autograd.grad(value.sum(), own, retain_graph=True)[0].isfinite().all()


def test_suppressing_tokens_of_a_projection_or_of_logits_leaves_the_rest_normalized() -> None:
    student, teacher, kept = projection(0), projection(10), [0, 1, 3, 4, 6]
    leaves = leaves_of(student)
    tokens = torch.tensor(kept)[some_tokens() % 5]
    wanted: tuple[TokenMap, ...] = ("logprob", "entropy", "forward-kl", "reverse-kl", "jsd")
    for of in (lambda x: x, dense):
        own, other = without(of(student), [2, 5]), without(of(teacher), [2, 5])
        maps = token_maps(own, other, wanted, tokens=tokens, tile_rows=3)
        places = torch.tensor([kept.index(i) for i in tokens.flatten().tolist()]).reshape(ROWS)
        expected = token_maps(
            dense(student)[..., kept], dense(teacher)[..., kept], wanted, tokens=places
        )
        torch.testing.assert_close(maps, expected)
        for name in wanted:
            found = torch.autograd.grad(maps[name].sum(), leaves, retain_graph=True)
            known = torch.autograd.grad(expected[name].sum(), leaves, retain_graph=True)
            torch.testing.assert_close(found, known)
    bare = without(student._replace(bias=None), [2])
    assert (dense(bare)[..., 2] == -torch.inf).all()
    assert dense(student).isfinite().all()


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    student = projection(0)
    hidden = student.hidden.requires_grad_()
    cross_entropy(student, some_tokens()).sum().backward()
    assert hidden.grad is not None
    assert student.weight.grad is None


def test_half_precision_is_summed_in_single_precision() -> None:
    exact = projection(0, dtype=torch.float32)
    rounded = Projection(*(x.bfloat16() for x in exact[:3] if isinstance(x, Tensor)))
    leaves = leaves_of(rounded)
    value = cross_entropy(rounded, some_tokens(), tile_rows=2)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, cross_entropy(exact, some_tokens()), rtol=0.05, atol=0.05)
    assert {g.dtype for g in torch.autograd.grad(value.sum(), leaves)} == {torch.bfloat16}


def test_under_autocast_the_product_is_in_half_precision_and_the_rest_is_not() -> None:
    student, tokens = projection(0, dtype=torch.float32), some_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_entropy(student, tokens)
    product = (student.hidden.bfloat16() @ student.weight.bfloat16().T).float() + student.bias
    expected = F.cross_entropy(product.flatten(0, 1), tokens.flatten(), reduction="none")
    torch.testing.assert_close(found.flatten(), expected)


def test_no_more_than_one_tile_of_logits_is_there_at_a_time() -> None:
    rows, words, tile = 64, 32, 8
    student = Projection(
        randn(rows, WIDTH, seed=0).requires_grad_(), randn(words, WIDTH, seed=1).requires_grad_()
    )
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (words,):
                largest = max(largest, result.numel())
            return result

    with Watch():
        cross_entropy(student, torch.zeros(rows, dtype=torch.long), tile_rows=tile).sum().backward()
    assert largest == tile * words


def test_a_projection_of_no_rows_has_no_logits() -> None:
    empty = projection(0)._replace(hidden=randn(0, WIDTH, seed=0, dtype=torch.float64))
    assert dense(empty).shape == (0, WORDS)


STRENGTHS = torch.tensor([[1.0, 1.25, 0.0, 2.0, 0.5], [1.25, 1.0, 1.5, 0.0, 3.0]]).double()


def strengthened(**options: Any) -> dict[str, Tensor]:
    student, teacher, reference = projection(0), projection(10), projection(20)
    return token_maps(
        student, teacher, ALL, tokens=some_tokens(), reference=reference, **options
    )  # fmt: skip


def test_a_target_beyond_the_teacher_is_a_mixture_of_log_probabilities() -> None:
    found = strengthened(strength=STRENGTHS, temperature=2.0, beta=0.3, tile_rows=3)
    theirs, others = (dense(projection(n)).div(2.0).log_softmax(-1) for n in (10, 20))
    mixed = STRENGTHS[..., None] * theirs + (1 - STRENGTHS[..., None]) * others
    expected = oracle(dense(projection(0)) / 2.0, mixed, some_tokens(), 0.3)
    raw = oracle(dense(projection(0)) / 2.0, theirs, some_tokens(), 0.3)["teacher-logprob"]
    torch.testing.assert_close(found, expected | {"raw-teacher-logprob": raw})


def test_the_gradient_against_a_target_is_that_against_its_logits() -> None:
    student, reference = projection(0), projection(20)
    leaves = leaves_of(student)
    wanted: tuple[TokenMap, ...] = ("forward-kl", "reverse-kl", "jsd")
    found = token_maps(
        student, projection(10), wanted, reference=reference, strength=STRENGTHS, tile_rows=3
    )
    part = STRENGTHS[..., None]
    target = part * dense(projection(10)) + (1 - part) * dense(reference)
    expected = token_maps(student, target, wanted)
    for name in wanted:
        ours = torch.autograd.grad(found[name].sum(), leaves, retain_graph=True)
        theirs = torch.autograd.grad(expected[name].sum(), leaves, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def test_strength_one_is_bitwise_the_teacher_alone_and_zero_the_reference() -> None:
    student, teacher, tokens = projection(0), projection(10), some_tokens()
    alone = token_maps(student, teacher, ALL, tokens=tokens)
    found = strengthened(strength=torch.ones(ROWS).double())
    assert all(torch.equal(found[name], alone[name]) for name in ALL)
    reference = token_maps(student, projection(20), ALL, tokens=tokens)
    found = strengthened(strength=torch.zeros(ROWS).double())
    for name in set(ALL) - {"raw-teacher-logprob"}:
        assert torch.equal(found[name], reference[name])


@pytest.mark.parametrize("side", ["teacher", "reference", "both"])
def test_what_is_impossible_to_a_side_of_the_target_stays_impossible(side: str) -> None:
    own, teacher, reference = (dense(projection(n)) for n in (0, 10, 20))
    for name, logits in {"teacher": teacher, "reference": reference}.items():
        if side in (name, "both"):
            logits[..., 2] = -torch.inf
    own[..., 2] = -torch.inf
    own.requires_grad_()
    strength = STRENGTHS.clamp(0.25, 2.0)
    strength[STRENGTHS == 1.0] = 1.5
    tokens = some_tokens()
    options: dict[str, Any] = {"tokens": tokens, "strength": strength}
    maps = token_maps(own, teacher, ALL, reference=reference, **options)
    kept = [0, 1, 3, 4, 5, 6]
    options["tokens"] = torch.where(tokens > 2, tokens - 1, tokens % 2)
    cut = token_maps(
        own[..., kept], teacher[..., kept], ALL, reference=reference[..., kept], **options
    )
    picks = tokens != 2
    for name in ALL:
        usable = picks if "logprob" in name else torch.ones_like(picks)
        if name != "raw-teacher-logprob" or side != "reference":
            torch.testing.assert_close(maps[name][usable], cut[name][usable])
    assert maps["teacher-logprob"][~picks].isneginf().all()
    total = maps["forward-kl"] + maps["reverse-kl"] + maps["jsd"]
    assert torch.autograd.grad(total.sum(), own)[0].isfinite().all()


def test_the_raw_teacher_is_read_beside_a_mixture_with_the_student() -> None:
    share = torch.full(ROWS, 0.5).double()
    wanted: tuple[TokenMap, ...] = ("raw-teacher-logprob", "teacher-logprob")
    found = token_maps(projection(0), projection(10), wanted, tokens=some_tokens(), share=share)
    raw = token_logprob(projection(10), some_tokens())
    torch.testing.assert_close(found["raw-teacher-logprob"], raw)
    assert not torch.allclose(found["teacher-logprob"], raw)


def test_a_clip_of_entries_is_that_of_opsd() -> None:
    student, teacher, clip = projection(0), projection(10), 0.05
    maps = token_maps(student, teacher, ("forward-kl", "jsd"), beta=0.3, entry_clip=clip)
    p, q = dense(student).softmax(-1), dense(teacher).softmax(-1)
    m = 0.3 * q + 0.7 * p
    entries = {
        "forward-kl": q * (q / p).log(),
        "jsd": 0.3 * q * (q / m).log() + 0.7 * p * (p / m).log(),
    }
    for name, found in maps.items():
        assert (entries[name] > clip).any()
        torch.testing.assert_close(found, entries[name].clamp(max=clip).sum(-1))


def test_the_gradient_of_a_clipped_forward_kl_lowers_what_is_clipped() -> None:
    teacher = dense(projection(10))
    logits = dense(projection(0)).requires_grad_()
    value = token_maps(logits, teacher, ("forward-kl",), entry_clip=0.05)["forward-kl"]
    found = torch.autograd.grad(value.sum(), logits)[0]
    p, q = logits.softmax(-1), teacher.softmax(-1)
    below = q * (q / p).log() < 0.05
    rest = (q * below).sum(-1, keepdim=True)
    torch.testing.assert_close(found, (p * rest - below * q).detach())
    assert (found[~below] > 0).all()  # descent lowers them, and the teacher wants them raised
    assert (q > p)[~below].all()


def test_gradients_of_clipped_maps_pass_gradcheck() -> None:
    teacher = dense(projection(10))

    def maps(logits: Tensor) -> tuple[Tensor, ...]:
        wanted: tuple[TokenMap, ...] = ("forward-kl", "jsd")
        return tuple(token_maps(logits, teacher, wanted, entry_clip=0.05, beta=0.3).values())

    assert torch.autograd.gradcheck(maps, [dense(projection(0)).requires_grad_()])


def test_padding_of_two_sizes_is_impossible_to_both_sides() -> None:
    student, teacher = projection(0, words=WORDS + 2), projection(10, words=WORDS + 5)
    hidden = student.hidden.requires_grad_()
    tokens = some_tokens()
    found = token_maps(student, teacher, ALL, tokens=tokens, shared=WORDS)
    ours, theirs = dense(student).clone(), dense(teacher)[..., : WORDS + 2].clone()
    ours[..., WORDS:] = theirs[..., WORDS:] = -torch.inf
    expected = token_maps(ours, theirs, ALL, tokens=tokens)
    torch.testing.assert_close(found, expected)
    for name in ("logprob", "entropy", "forward-kl", "reverse-kl", "jsd"):
        pair = [
            torch.autograd.grad(x[name].sum(), hidden, retain_graph=True)[0]
            for x in (found, expected)
        ]
        torch.testing.assert_close(*pair)


def test_the_log_probability_of_padding_is_minus_infinity_and_flat() -> None:
    student = projection(0, words=WORDS + 2)
    hidden = student.hidden.requires_grad_()
    tokens = some_tokens()
    tokens[0, 3], tokens[1, 1] = WORDS, WORDS + 1
    found = token_maps(student, None, ("logprob",), tokens=tokens, shared=WORDS)["logprob"]
    assert found.isneginf().nonzero().tolist() == [[0, 3], [1, 1]]
    slope = torch.autograd.grad(found, hidden, torch.ones(ROWS).double())[0]
    assert (slope == 0).all(-1).equal(found.isneginf())


class Products(TorchDispatchMode):
    """Remembers how many rows went through matrix products with a vocabulary."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.rows = words, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "mm" in str(func) and found.shape[-1] == self.words:
            self.rows += len(found)
        return found


def test_rows_that_are_masked_out_or_not_trained_cost_nothing() -> None:
    student, teacher, rows = projection(0), projection(10), math.prod(ROWS)
    leaves_of(student)
    mask = torch.zeros(ROWS, dtype=torch.bool)
    mask[0, 1:4] = True
    with Products(WORDS) as all_rows:
        maps = token_maps(
            student, teacher, ("reverse-kl", "entropy", "teacher-entropy"), tile_rows=3
        )
    assert all_rows.rows == 2 * rows  # student and teacher
    with Products(WORDS) as masked:
        token_maps(student, teacher, ("reverse-kl",), mask=mask)
    assert masked.rows == 2 * 3
    with Products(WORDS) as trained:
        (maps["reverse-kl"] * mask).sum().backward(retain_graph=True)
    assert trained.rows == 2 * 3
    with Products(WORDS) as own:
        maps["entropy"].sum().backward()
    assert own.rows == rows  # the entropy's gradient does not need the teacher


def test_the_last_tile_is_not_projected_again_unless_it_is_asked_twice() -> None:
    student, teacher = projection(0), projection(10)
    leaves = leaves_of(student)
    value = token_maps(student, teacher, ("reverse-kl",), tile_rows=4)["reverse-kl"].sum()
    known = torch.autograd.grad(dense_reverse_kl(student, teacher).sum(), leaves)
    for projected in (8, 10):
        with Products(WORDS) as products:
            found = torch.autograd.grad(value, leaves, retain_graph=True)
        assert products.rows == 2 * projected
        torch.testing.assert_close(found, known)


def test_a_part_of_the_last_tile_may_be_trained() -> None:
    student, teacher = projection(0), projection(10)
    leaves = leaves_of(student)
    mask = torch.zeros(ROWS, dtype=torch.bool)
    mask[0, 2] = mask[1, 2] = mask[1, 4] = True
    value = token_maps(student, teacher, ("reverse-kl",), tile_rows=4)["reverse-kl"]
    found = torch.autograd.grad((value * mask).sum(), leaves)
    known = torch.autograd.grad((dense_reverse_kl(student, teacher) * mask).sum(), leaves)
    torch.testing.assert_close(found, known)


@pytest.mark.parametrize("frozen", [False, True])
def test_planned_gradients_are_those_of_the_backward_pass_without_its_cost(frozen: bool) -> None:
    student, teacher = projection(0), projection(10)
    leaves = leaves_of(student)[: 1 if frozen else 3]
    if frozen:
        student = student._replace(weight=student.weight.detach(), bias=student.bias.detach())
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    weight = randn(*ROWS, seed=4, dtype=torch.float64).abs()
    wanted: tuple[TokenMap, ...] = ("reverse-kl", "entropy", "logprob")

    def loss(**options: Any) -> Tensor:
        maps = token_maps(
            student, teacher, wanted, tokens=some_tokens(), mask=mask, tile_rows=3, **options
        )
        total = (weight * maps["reverse-kl"]).sum() - 0.5 * (mask * maps["logprob"]).sum()
        return -3.0 * total / mask.sum()

    value = loss(planned={"reverse-kl": weight, "logprob": -0.5 * mask})
    with Products(WORDS) as products:
        found = torch.autograd.grad(value, leaves, retain_graph=True)
    assert products.rows == 0
    known = torch.autograd.grad(loss(), leaves)
    torch.testing.assert_close(found, known)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), known)  # made again


@pytest.mark.parametrize("maps", [("reverse-kl",), ("reverse-kl", "entropy")])
@pytest.mark.parametrize("frozen", [False, True])
def test_under_a_frozen_head_any_gradient_of_one_map_costs_nothing_more(
    frozen: bool, maps: tuple[TokenMap, ...]
) -> None:
    student, teacher = projection(0), projection(10)
    leaves = leaves_of(student)[: 1 if frozen else 3]
    if frozen:
        student = student._replace(weight=student.weight.detach(), bias=student.bias.detach())
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    weights = {name: randn(*ROWS, seed=seed, dtype=torch.float64) for seed, name in enumerate(maps)}
    weights["reverse-kl"][1, 2] = 0.0

    def loss(**options: Any) -> Tensor:
        found = token_maps(
            student, teacher, ("reverse-kl", "entropy"), mask=mask, tile_rows=3, **options
        )
        return sum((weight * found[name]).sum() for name, weight in weights.items())  # type: ignore[return-value]

    value = loss(trained="reverse-kl")
    with Products(WORDS) as products:
        found = torch.autograd.grad(value, leaves)
    assert (products.rows == 0) == (frozen and len(maps) == 1)
    torch.testing.assert_close(found, torch.autograd.grad(loss(), leaves))


def test_nothing_is_planned_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdistill.recompute._Sums", None)  # what gradients are summed in
    student, ones = projection(0), torch.ones(ROWS)
    constant = token_maps(student, None, ("entropy",), planned={"entropy": ones})
    leaves_of(student)
    with torch.no_grad():
        token_maps(student, None, ("entropy",), planned={"entropy": ones})
    assert not constant["entropy"].requires_grad


@pytest.mark.parametrize("planned", ["another map", "other weights", "too many", "nothing"])
def test_a_plan_that_is_not_kept_only_costs_time(planned: str) -> None:
    student, teacher = projection(0), projection(10)
    leaves = leaves_of(student)
    ones = torch.ones(ROWS)
    plans: dict[str, dict[TokenMap, Tensor]] = {
        "another map": {"entropy": ones},
        "other weights": {"reverse-kl": ones.scatter(1, torch.tensor([[2]]), 1.1)},
        "too many": {"reverse-kl": ones, "entropy": ones},
        "nothing": {"reverse-kl": 0.0 * ones},
    }
    maps = token_maps(student, teacher, ("reverse-kl", "entropy"), planned=plans[planned])
    small = 1e-12 * maps["reverse-kl"].sum()
    found = torch.autograd.grad(small, leaves)
    known = torch.autograd.grad(1e-12 * dense_reverse_kl(student, teacher).sum(), leaves)
    torch.testing.assert_close(found, known, rtol=1e-7, atol=0.0)


def dense_reverse_kl(student: Projection, teacher: Projection) -> Tensor:
    return oracle(
        student.hidden @ student.weight.T + student.bias,
        teacher.hidden @ teacher.weight.T + teacher.bias,
        some_tokens(), 0.5,
    )["reverse-kl"]  # fmt: skip


def test_gradients_of_half_precision_are_summed_in_float32() -> None:
    rows, words = 64, 16
    hidden, weight = randn(rows, WIDTH, seed=0), randn(words, WIDTH, seed=1)
    tokens = torch.arange(rows) % words
    parts = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    cross_entropy(Projection(*parts), tokens, tile_rows=1).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in parts]
    cross_entropy(Projection(*exact), tokens).sum().backward()
    for found, expected in zip(parts, exact, strict=True):
        assert found.grad.dtype == torch.bfloat16
        error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_entropy_and_gradients_are_those_of_trl(beta: float) -> None:
    trl = pytest.importorskip("trl.kernels.chunked_divergence", reason="needs trl")
    sides = [projection(n, dtype=torch.float32) for n in (0, 10)]
    student = sides[0]._replace(scale=0.7, softcap=3.0)
    leaves = leaves_of(student)
    found, entropy = trl.ChunkedDivergenceFunction.apply(
        student.hidden.flatten(0, 1), *student[1:3], sides[1].hidden.flatten(0, 1), *sides[1][1:3],
        beta, 1.7, 0.7, 3.0,
    )  # fmt: skip
    name: TokenMap = {0.0: "forward-kl", 1.0: "reverse-kl"}.get(beta, "jsd")
    maps = token_maps(student, sides[1], (name, "entropy"), temperature=1.7, beta=beta, tile_rows=3)
    torch.testing.assert_close(maps[name].flatten(), found)
    torch.testing.assert_close(maps["entropy"].flatten(), entropy)
    upstream = randn(*ROWS, seed=5)
    ours = torch.autograd.grad(maps[name], leaves, upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(found, leaves, upstream.flatten()))

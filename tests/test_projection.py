import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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
        if name.startswith("teacher"):
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

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
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

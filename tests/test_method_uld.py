import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.methods.gold import GOLD
from diffdistill.methods.uld import ULD
from diffdistill.projection import dense
from diffdistill.types import Batch
from tests.conftest import Spy, rows_of
from tests.toy_texts import (
    SPELLED,
    WORDS,
    Level,
    Network,
    Texts,
    network,
    only_loss,
    student_gradients,
    toy_text_batch,
)

KINDS: dict[str, tuple[type[ULD], dict[str, Any]]] = {
    "uld": (ULD, {}),
    "uld of chunks": (ULD, {"pairs": "chunk", "temperature": 1.5}),
    "gold": (GOLD, {"temperature": 0.8}),
    "gold by position": (GOLD, {"pairs": "position", "beta": 0.3, "matched_weight": 0.7}),
}


def make_method(kind: str = "uld", **options: Any) -> ULD:
    cls, settings = KINDS[kind]
    parts = {"student": network(), "teacher": network("teacher", 2)}
    given: dict[str, Any] = {"family": Texts(), "draws": Draws(0)} | parts | settings | options
    return cls(**given)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_student_gets_a_gradient_and_the_teacher_no_graph(kind: str) -> None:
    spy = Spy(network("teacher", 2))
    method = make_method(kind, teacher=spy)
    assert student_gradients(method, [toy_text_batch()]).abs().sum() > 0
    assert all(p.grad is None for p in spy.model.parameters())  # type: ignore[attr-defined]
    assert spy.grad_enabled == [False]


def distributions(method: ULD, batch: Batch, row: int, pairs: str) -> list[tuple[Any, Any]]:
    """Return the probabilities of both sides for each pair of a row with all hidden, one by one."""
    sides = []
    for name, model in (("student", method.student), ("teacher", method.teacher)):
        tokens, maskable = batch[f"{name}/tokens"][row], batch[f"{name}/maskable"][row]
        state = method.family.noised(
            batch,
            torch.ones(len(batch["ids"])),
            batch[f"{name}/maskable"],
            reader=name,  # type: ignore[arg-type]
        )
        logits = dense(model(state, {"bias": batch["bias"]}))[row].double()
        probs = torch.softmax(logits / method.temperature, -1)
        numbers = batch[f"{name}/chunks"][row].tolist()
        groups = [[place] for place in maskable.nonzero()[:, 0].tolist()]
        if pairs == "chunk":
            groups = [
                [place for place, other in enumerate(numbers) if other == chunk]
                for chunk in range(max(numbers) + 1)
            ]
        merged = []
        for group in groups:
            likelihood = 1.0
            for place in group[1:]:
                likelihood = likelihood * probs[place, tokens[place]]
            merged.append(probs[group[0]] * likelihood)
        sides.append(merged)
    return list(zip(*sides, strict=False))


def transport(first: Tensor, second: Tensor) -> Tensor:
    """Return the least L1 distance over all ways to pair the entries, by trying all of them."""
    size = max(len(first), len(second))
    p, q = (torch.cat([x, x.new_zeros(size - len(x))]) for x in (first, second))
    orders = torch.tensor(list(itertools.permutations(range(size))))
    return (p - q[orders]).abs().sum(-1).min()


def with_few_words(method: ULD) -> ULD:
    """Return a method whose vocabularies are small enough to try all pairings: 5 and 6 words."""
    method.student, method.teacher = Network(5, 0, 1), Network(6, 1, 2)
    return method


@pytest.mark.parametrize("kind", ["uld", "uld of chunks"])
def test_uld_is_the_cost_of_transport_between_the_pairs(kind: str) -> None:
    batch = toy_text_batch(2)
    for name in WORDS:
        batch[f"{name}/tokens"] = batch[f"{name}/tokens"].clamp(max=4)
    method = with_few_words(make_method(kind, draws=Level(1.0)))
    expected = [
        transport(*pair)
        for row in range(2)
        for pair in distributions(method, batch, row, method.pairs)
    ]
    assert len(expected) == 2 * (8 if kind == "uld" else 6)
    loss = only_loss(method, batch)
    torch.testing.assert_close(
        loss.metrics["distillation"], torch.stack(expected).mean().float(), rtol=1e-5, atol=1e-6
    )
    assert loss.value == loss.metrics["denoising"] + loss.metrics["distillation"]


def gold_by_hand(p: Tensor, q: Tensor, method: GOLD) -> Tensor:
    """Return GOLD's distance of two lists of probabilities."""
    pairs = [
        (i, SPELLED["teacher"].index(word))
        for i, word in enumerate(SPELLED["student"])
        if word is not None and word in SPELLED["teacher"]
    ]
    assert len(pairs) == 4
    alike = torch.zeros(())
    for i, j in pairs:
        middle = method.beta * q[j] + (1 - method.beta) * p[i]
        alike = alike + method.beta * q[j] * (q[j] / middle).log()
        alike = alike + (1 - method.beta) * p[i] * (p[i] / middle).log()
    ours, theirs = zip(*pairs, strict=True)
    rest = transport(
        torch.stack([x for i, x in enumerate(p) if i not in ours]),
        torch.stack([x for j, x in enumerate(q) if j not in theirs]),
    )
    share = 4 / 9 if method.matched_weight is None else method.matched_weight
    return share * alike + (1 - share) * rest


@pytest.mark.parametrize("kind", ["gold", "gold by position"])
def test_gold_is_a_divergence_of_words_that_both_have_and_transport_of_the_rest(kind: str) -> None:
    batch = toy_text_batch(2)
    method = make_method(kind, draws=Level(1.0))
    assert isinstance(method, GOLD)
    expected = [
        gold_by_hand(*pair, method)
        for row in range(2)
        for pair in distributions(method, batch, row, method.pairs)
    ]
    found = only_loss(method, batch).metrics["distillation"]
    torch.testing.assert_close(found, torch.stack(expected).mean().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_is_that_of_trl(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.gold.gold_trainer", reason="needs trl")
    method = make_method(kind, draws=Level(1.0))
    batch = toy_text_batch(1)
    keep = batch["student/chunks"][0] != -1
    keep[:2] = True  # no token without a chunk: TRL has none
    for part in ("tokens", "maskable", "chunks"):
        batch[f"student/{part}"] = batch[f"student/{part}"][:, keep]
    hybrid = isinstance(method, GOLD)
    weight = getattr(method, "matched_weight", None)
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=method.temperature,
        uld_teacher_temperature=method.temperature,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=method.pairs == "chunk",
        uld_token_merge_strategy="observed",
        uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=weight,
        uld_hybrid_unmatched_weight=None if weight is None else 1.0 - weight,
        beta=getattr(method, "beta", None),
    )
    sides: dict[str, dict[str, Any]] = {}
    for name, model in (("student", method.student), ("teacher", method.teacher)):
        words = enumerate(SPELLED[name])
        vocabulary = {f"{name}-{i}" if word is None else word: i for i, word in words}
        mask, chunks = batch[f"{name}/maskable"], batch[f"{name}/chunks"]
        state = method.family.noised(batch, torch.ones(1), mask, reader=name)  # type: ignore[arg-type]
        # In bytes a chunk ends where its number says, and a token within it where no other does.
        places = torch.arange(chunks.shape[1])
        within = chunks == chunks.roll(-1, dims=1)
        inner = 10 * chunks + places % 4 + (5 if name == "teacher" else 1)
        ends = torch.where(within, inner, 10 * chunks + 10)
        sides[name] = {
            "vocabulary": SimpleNamespace(get_vocab=lambda vocabulary=vocabulary: vocabulary),
            "logits": dense(model(state, {"bias": batch["bias"]})),
            "labels": batch[f"{name}/tokens"].masked_fill(~mask, -100),
            "ids": batch[f"{name}/tokens"],
            "offsets": torch.stack([ends, ends], -1),
        }
    oracle = trl.ULDLoss(config, *(side["vocabulary"] for side in sides.values()))
    keys = ("logits", "labels", "ids", "offsets")
    expected = oracle(*(side[key] for key in keys for side in sides.values()))
    torch.testing.assert_close(only_loss(method, batch).metrics["distillation"], expected.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_plain_logits_give_the_loss_and_gradient_of_projections(kind: str) -> None:
    batch = toy_text_batch()
    methods: list[Any] = [make_method(kind), make_method(kind)]
    methods[1].student.dense = methods[1].teacher.dense = True
    torch.testing.assert_close(*(only_loss(method, batch).value for method in methods))
    torch.testing.assert_close(*(student_gradients(method, [batch]) for method in methods))


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_see_their_pairs_hidden(kind: str) -> None:
    student, teacher = Spy(network()), Spy(network("teacher", 2))
    method = make_method(kind, student=student, teacher=teacher)
    batch = toy_text_batch(16)
    only_loss(method, batch)
    (seen,), (judged,) = student.states, teacher.states
    assert seen.mask is not None
    assert judged.mask is not None
    assert torch.equal(seen.t, judged.t)
    assert not seen.mask[:, :2].any()
    if method.pairs == "position":
        assert torch.equal(seen.mask[:, 2:10], judged.mask[:, 2:])  # two are left over
        assert 0 < seen.mask[:, 10:].float().mean() < 1
        return
    for row, chunk in itertools.product(range(16), range(6)):
        hidden = seen.mask[row][batch["student/chunks"][row] == chunk]
        others = judged.mask[row][batch["teacher/chunks"][row] == chunk]
        assert hidden[0] == hidden.all() == others.all() == others.any()


def test_denoising_is_that_of_the_likelihood_bound() -> None:
    batch = toy_text_batch(256)
    uniform = network(scale=0.0)
    loss = only_loss(make_method(student=uniform), batch)
    assert float(loss.metrics["denoising"]) == pytest.approx(
        torch.log(torch.tensor(6.0)).item(),
        rel=0.1,  # the mask token is impossible
    )


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_do_not_change_the_step(kind: str) -> None:
    method, batch = make_method(kind), toy_text_batch(6)
    parts = [rows_of(batch, rows) for rows in ([0, 1], [2], [3, 4, 5])]
    chunks = [method.counts(part)["chunks"] / len(part["ids"]) for part in parts]
    assert len(set(chunks)) > 1
    torch.testing.assert_close(
        student_gradients(method, [batch]), student_gradients(method, parts), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0.0, 1.0])
def test_nothing_and_everything_hidden_give_finite_losses_in_bfloat16(
    kind: str, number: float
) -> None:
    method: Any = make_method(kind, draws=Level(number), t_low=1e-12)
    for model in (method.student, method.teacher):
        model.to(torch.bfloat16)
    batch = toy_text_batch()
    batch["bias"] = batch["bias"].to(torch.bfloat16)
    loss = only_loss(method, batch)
    loss.value.backward()
    assert loss.value.isfinite()
    assert bool(loss.value > 0) == bool(number)
    assert all(p.grad.isfinite().all() for p in method.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_alone_brings_the_student_nearer_to_the_teacher(kind: str) -> None:
    student = network(scale=0.3)
    method = make_method(kind, student=student, distillation_weight=1e6)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    errors = []
    for step in range(120):
        optimizer.zero_grad()
        loss = only_loss(method, toy_text_batch(8, first_id=8 * (step % 4)))
        loss.value.backward()
        optimizer.step()
        errors.append(float(loss.metrics["distillation"]))
    assert sum(errors[-4:]) < 0.6 * sum(errors[:4])


def test_options_out_of_range_are_refused() -> None:
    for name, value in (("temperature", 0.0), ("t_low", 1.0)):
        with pytest.raises(ValueError, match=name):
            make_method(**{name: value})
    for name, value in (("beta", 1.5), ("matched_weight", -0.1)):
        with pytest.raises(ValueError, match=name):
            make_method("gold", **{name: value})

"""Identities of TIDE that hold however it is implemented, by hand on tables of logits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.divergences import (
    CHUNK_EPSILON,
    calm,
    chunk_probability,
    reverse_binary_kl,
    reverse_calm,
)
from diffdistill.draws import Draws
from diffdistill.methods.tide import Tide
from diffdistill.texts import Format, Reader
from diffdistill.types import Batch, Condition, Progress, State
from tests.conftest import Spy, randn
from tests.toy_texts import Level, Texts, toy_text_batch

HALF = Progress(50, 101)
BOUND = math.log((1 - CHUNK_EPSILON) / CHUNK_EPSILON)
ChunkLoss = Callable[[Tensor, Tensor], Tensor]


class Open(Texts):
    """Texts whose mask tokens are no words of the tables, so that nothing is suppressed."""

    def format(self, *, reader: Reader = "student") -> Format:
        return super().format(reader=reader)._replace(mask_id=99)


class Table:
    """Predicts the same logits ``[B, L, 7]``, parameters, whatever it is shown."""

    def __init__(self, batch: Batch, reader: str, seed: int, scale: float = 1.0) -> None:
        shape = (*batch[f"{reader}/tokens"].shape, 7)
        self.logits = (scale * randn(*shape, seed=seed)).requires_grad_()

    def __call__(self, state: State, condition: Condition) -> Tensor:
        return self.logits


def one_tokenizer(size: int) -> dict[str, Any]:
    """Return texts that both sides have in the same tokens, each a chunk."""
    batch = toy_text_batch(size)
    places = torch.arange(12).expand(size, -1)
    batch["student/chunks"] = torch.where(batch["student/maskable"], places - 2, -1)
    return batch | {f"teacher/{p}": batch[f"student/{p}"] for p in ("tokens", "maskable", "chunks")}


def two_tokenizers(size: int) -> dict[str, Any]:
    batch = toy_text_batch(size)
    return batch | {"teacher/tokens": batch["teacher/tokens"].clamp(max=6)}


def make_tide(student: Any, teacher: Any, **options: Any) -> Tide:
    settings: dict[str, Any] = {"family": Open(), "draws": Draws(0), "exposure": 0.0}
    return Tide(student=student, teacher=teacher, **(settings | options))


def of_distillation(method: Tide, table: Table, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return value and gradient in the student's logits of the distillation term alone."""
    gradients = []
    for weight in (1.0, 0.0):
        method.distillation_weight = weight
        (loss,) = method.losses(batch, HALF)
        gradients.append(torch.autograd.grad(loss.value, table.logits)[0])
    return torch.as_tensor(loss.metrics["distillation"]), gradients[0] - gradients[1]


# (b) TIDAL


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_tidal_is_the_weighted_gap_to_the_mixed_target(temperature: float) -> None:
    """``T w(t) (softmax(s / T) - r) / N`` at each hidden token, and 0 at all others."""
    batch = one_tokenizer(6)
    student, teacher = Table(batch, "student", 0), Table(batch, "teacher", 1)
    spy = Spy(student)
    method = make_tide(spy, teacher, variant="shared", temperature=temperature)
    _, found = of_distillation(method, student, batch)
    seen = spy.states[0]
    assert seen.mask is not None
    expected = torch.zeros_like(found)
    for row, i in seen.mask.nonzero().tolist():
        t, s, z = seen.t[row], student.logits.detach()[row, i], teacher.logits.detach()[row, i]
        rate = (0.1 + 0.8 * 0.5) * (1 - t)  # halfway through training
        r = torch.softmax(((1 - rate) * s + rate * z) / temperature, -1)
        gap = torch.softmax(s / temperature, -1) - r
        weight = torch.exp(-((t - 0.5) ** 2) / (2 * 0.15**2))
        expected[row, i] = temperature * weight * gap / seen.mask.sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
def test_where_all_is_hidden_tidal_learns_nothing(divergence: str) -> None:
    batch = one_tokenizer(4)
    student, teacher = Table(batch, "student", 0), Table(batch, "teacher", 1)
    options: dict[str, Any] = {"variant": "shared", "divergence": divergence, "weight": "uniform"}
    method = make_tide(student, teacher, draws=Level(1.0), **options)
    value, gradient = of_distillation(method, student, batch)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
    method = make_tide(student, teacher, draws=Level(1.0), **options, tidal="training")
    value, gradient = of_distillation(method, student, batch)
    assert value > 1e-2
    assert gradient.abs().max() > 1e-3


def test_tidal_of_chunks_is_calm_to_the_mixed_probability_without_the_square_of_t() -> None:
    batch = two_tokenizers(5)
    student, teacher = (Table(batch, name, seed, 0.3) for seed, name in enumerate(SIDES))
    spy = Spy(student)
    method = make_tide(spy, teacher, variant="calm-tidal", temperature=3.0)
    value, _ = of_distillation(method, student, batch)
    seen = spy.states[0]
    errors = []
    for row, chunk, (s, p) in chunk_likelihoods(batch, student, teacher, seen, 3.0):
        del chunk
        rate = 0.5 * (1 - seen.t[row].item())
        mixed = (1 - rate) * s + rate * p
        errors.append(-(mixed * math.log(s) + (1 - mixed) * math.log(1 - s)))
    assert value.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


SIDES = ("student", "teacher")


def chunk_likelihoods(
    batch: Batch, student: Table, teacher: Table, seen: State, temperature: float
) -> list[tuple[int, int, tuple[float, float]]]:
    """Return row, number and ``exp(LP / T)`` of both sides of each chunk that was hidden."""
    found = []
    logs = [torch.log_softmax(side.logits.detach().double(), -1) for side in (student, teacher)]
    assert seen.mask is not None
    for row in range(len(seen.x)):
        for chunk in range(6):
            places = [(batch[f"{n}/chunks"][row] == chunk).nonzero()[:, 0].tolist() for n in SIDES]
            if not seen.mask[row, places[0][0]]:
                continue
            sums = [
                sum(log[row, i, batch[f"{name}/tokens"][row, i]].item() for i in mine)
                for log, name, mine in zip(logs, SIDES, places, strict=True)
            ]
            pair = (math.exp(sums[0] / temperature), math.exp(sums[1] / temperature))
            found.append((row, chunk, pair))
    return found


# (d) chunks


SLOPES: dict[str, Callable[[float, float], float]] = {
    "calm": lambda s, p: -(p - (1 - p) * s / (1 - s)),
    "reverse-calm": lambda s, p: -s * math.log(p / (1 - p)),
    "reverse-binary-kl": lambda s, p: s * math.log(s * (1 - p) / ((1 - s) * p)),
}
"""Of each divergence in ``log s``."""


@pytest.mark.parametrize("divergence", SLOPES)
@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_the_gradient_of_chunks_reaches_each_token_divided_by_the_temperature(
    divergence: str, temperature: float
) -> None:
    """``(dL / dlog s) / T / C`` times the gradient of the log-likelihood of each token."""
    batch = two_tokenizers(4)
    student, teacher = (Table(batch, name, seed, 0.5) for seed, name in enumerate(SIDES))
    spy = Spy(student)
    method = make_tide(spy, teacher, divergence=divergence, temperature=temperature)
    _, found = of_distillation(method, student, batch)
    chunks = chunk_likelihoods(batch, student, teacher, spy.states[0], temperature)
    expected = torch.zeros_like(found)
    for row, chunk, pair in chunks:
        slope = SLOPES[divergence](*pair) / temperature / len(chunks)
        for i in (batch["student/chunks"][row] == chunk).nonzero()[:, 0].tolist():
            own = torch.nn.functional.one_hot(batch["student/tokens"][row, i], 7)
            gap = own - torch.softmax(student.logits.detach()[row, i], -1)
            expected[row, i] = slope * gap
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def slope(divergence: ChunkLoss, logprob: float, p: float, temperature: float) -> float:
    """Return the derivative in a chunk's log-likelihood, through the clamp, at p."""
    x = torch.tensor(logprob).requires_grad_()
    divergence(chunk_probability(x, temperature), torch.tensor(p)).backward()
    assert x.grad is not None
    return x.grad.item()


def test_forward_calm_and_the_true_divergence_rest_where_both_sides_agree() -> None:
    for p in (0.1, 0.5, 0.9):
        logprob = 2.0 * math.log(p)  # s = p at T = 2
        assert slope(calm, logprob, p, 2.0) == pytest.approx(0.0, abs=1e-6)
        assert slope(reverse_binary_kl, logprob, p, 2.0) == pytest.approx(0.0, abs=1e-6)
        published = -p * math.log(p / (1 - p)) / 2.0
        assert slope(reverse_calm, logprob, p, 2.0) == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("logprob", [-0.01, -1.0, -10.0])
def test_reverse_calm_lowers_a_chunk_that_the_teacher_doubts_and_raises_any_other(
    logprob: float,
) -> None:
    for p in (1e-7, 0.01, 0.49):
        assert slope(reverse_calm, logprob, p, 2.0) > 0  # descent lowers the likelihood
    for p in (0.51, 0.99, 1 - 1e-7):
        assert slope(reverse_calm, logprob, p, 2.0) < 0
    assert slope(reverse_calm, logprob, 0.5, 2.0) == 0


@pytest.mark.parametrize("temperature", [2.0, 5.0, 100.0])
def test_a_badly_aligned_chunk_pulls_hardest_and_is_damped_by_the_student_alone(
    temperature: float,
) -> None:
    """A teacher that finds a chunk impossible is at the clamp, where the coefficient is largest."""
    worst = chunk_probability(torch.tensor(-1e4), temperature).item()
    assert worst == pytest.approx(CHUNK_EPSILON)
    for logprob in (-0.1, -5.0, -20.0):
        s = math.exp(logprob / temperature)
        found = slope(reverse_calm, logprob, worst, temperature)
        assert found == pytest.approx(BOUND * s / temperature, rel=1e-4)
        doubtful = slope(reverse_calm, logprob, 0.5001, temperature)
        assert abs(doubtful) < 1e-3 * found


@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_a_chunk_beyond_the_clamp_gets_no_gradient(temperature: float) -> None:
    ends = -math.log(1 / CHUNK_EPSILON) * temperature, -CHUNK_EPSILON * temperature
    for divergence in (calm, reverse_calm, reverse_binary_kl):
        assert slope(divergence, 1.01 * ends[0], 0.3, temperature) == 0
        assert slope(divergence, 0.99 * ends[0], 0.3, temperature) != 0
        assert slope(divergence, 0.1 * ends[1], 0.3, temperature) == 0
        assert slope(divergence, 1000 * ends[1], 0.3, temperature) != 0


# (c) CompDemo


def test_the_split_is_new_for_each_draw_and_alike_in_any_batch() -> None:
    batch = two_tokenizers(6)
    teacher = Spy(Table(batch, "teacher", 1))
    method = make_tide(Table(batch, "student", 0), teacher, exposure=0.5, draws=Level(1.0))
    list(method.losses(batch, HALF))
    list(method.losses(batch | {"ids": batch["ids"] + 6}, HALF))
    list(method.losses(batch, HALF._replace(step=51)))
    first, later, again = (teacher.states[n].mask for n in (0, 2, 4))
    assert first is not None
    assert later is not None
    assert again is not None
    assert not torch.equal(first, later)  # the same texts, drawn again
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) > 1  # samples are split on their own


# (i) normalizers


def test_denoising_is_over_the_maskable_tokens_and_distillation_over_the_chunks() -> None:
    """Twice the same text: the sums double and the means stay."""
    one = two_tokenizers(1)
    student, teacher = (Table(one, name, seed) for seed, name in enumerate(SIDES))
    two = {name: value.repeat(2, *(1,) * (value.ndim - 1)) if isinstance(value, Tensor) else value
           for name, value in one.items()}  # fmt: skip
    doubled = Table(two, "student", 0), Table(two, "teacher", 1)
    for table, single in zip(doubled, (student, teacher), strict=True):
        table.logits = single.logits.detach().repeat(2, 1, 1).requires_grad_()
    (alone,) = make_tide(student, teacher).losses(one, HALF)
    (twice,) = make_tide(*doubled).losses(two, HALF)
    torch.testing.assert_close(alone.value, twice.value)
    assert twice.count == 2 * alone.count == 20
    wide = {name: torch.nn.functional.pad(value, (0, 4), value=-1 if name.endswith("chunks") else 0)
            if "/" in name else value for name, value in one.items()}  # fmt: skip
    padded = Table(wide, "student", 2), Table(wide, "teacher", 3)
    for table, single in zip(padded, (student, teacher), strict=True):
        kept = single.logits.shape[1]
        table.logits = torch.cat([single.logits.detach(), table.logits.detach()[:, kept:]], 1)
    (longer,) = make_tide(*padded).losses(wide, HALF)
    torch.testing.assert_close(alone.value.detach(), longer.value)
    assert longer.count == 10

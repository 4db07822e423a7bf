"""Baselines of BLD on given texts: SFT, ALM, and the autoregressive forms of ULD and GOLD."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.methods.text_uld import TextGOLD, TextULD
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.projection import dense
from diffdistill.roles import Roles
from diffdistill.text.alm import ALM
from diffdistill.text.sft import SFT
from diffdistill.types import Batch
from tests.conftest import START, gradients
from tests.given_run import (
    given_batch,
    make_causal_pair,
    make_given_method,
    make_given_roles,
    save_given_world,
)
from tests.toy_texts import only_loss

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "alm": (ALM, {"temperature": 4.0}),
    "alm reversed": (ALM, {"divergence": "reverse", "token_weight": 0.0, "temperature": 2.0}),
    "uld": (TextULD, {}),
    "uld of chunks": (TextULD, {"pairs": "chunk", "temperature": 1.5}),
    "gold": (TextGOLD, {}),
    "sft": (SFT, {}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_given_world(tmp_path_factory.mktemp("baselines"))


class Made:
    """A method with what it is made of, and a batch."""

    def __init__(self, world: Path, kind: str, teacher: str = "teacher", **options: Any) -> None:
        cls, settings = KINDS[kind]
        self.pair: CausalPair = make_causal_pair(world, teacher)
        self.roles: Roles = make_given_roles(self.pair)
        self.method: Any = make_given_method(cls, self.pair, self.roles, **(settings | options))
        self.batch: Batch = given_batch(self.pair)

    def gradients(self, *batches: Batch) -> dict[str, Tensor]:
        student, totals = self.roles["student"], dict[str, float]()
        for parameter in student.parameters().values():
            parameter.grad = None
        for batch in batches:
            for name, count in self.method.counts(batch).items():
                totals[name] = totals.get(name, 0.0) + count
        weight = 0.0
        for batch in batches:
            loss = only_loss(self.method, batch, START._replace(counts=totals))
            (loss.value * loss.count).backward()
            weight += loss.count
        return {name: gradient / weight for name, gradient in gradients(student).items()}

    @torch.no_grad()
    def logprobs(self, reader: Any) -> Tensor:
        """Return the log-probabilities ``[B, L, V]`` of a reader's tokens."""
        pair, batch = self.pair, self.batch
        role = self.roles[reader]
        found = role(pair.state(batch, reader=reader), pair.condition(batch, reader=reader))
        return dense(found).detach().log_softmax(-1)

    def cross_entropy(self) -> float:
        text, logprobs = self.pair.text(self.batch), self.logprobs("student")
        own = logprobs.gather(-1, text.tokens[..., None])[..., 0][text.maskable]
        return -float(own.mean())


def chunk_logprobs(made: Made) -> list[tuple[float, float]]:
    """Return the log-likelihood of each chunk to student and teacher, summed one by one."""
    sums: dict[str, dict[tuple[int, int], float]] = {"student": {}, "teacher": {}}
    for reader, found in sums.items():
        text, logprobs = made.pair.text(made.batch, reader=reader), made.logprobs(reader)  # type: ignore[arg-type]
        for row, place in (text.chunks >= 0).nonzero().tolist():
            key = (row, int(text.chunks[row, place]))
            value = float(logprobs[row, place, text.tokens[row, place]])
            found[key] = found.get(key, 0.0) + value
    ours, theirs = sums.values()
    return [(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()]


def test_alm_is_the_binary_divergence_of_each_chunk_and_sft(world: Path) -> None:
    made = Made(world, "alm", chunk_weight=0.7)
    terms = []
    for ours, theirs in chunk_logprobs(made):
        s, p = (min(math.exp(x / 4.0), 1 - 1e-7) for x in (ours, theirs))
        terms.append(-(p * math.log(s) + (1 - p) * math.log(1 - s)))
    assert len(terms) > 10
    expected = made.cross_entropy() + 0.7 * sum(terms) / len(terms)
    assert only_loss(made.method, made.batch).value.item() == pytest.approx(expected, rel=1e-3)


def test_alm_rests_where_the_student_is_its_teacher_and_reversed_is_a_divergence(
    world: Path,
) -> None:
    made = Made(world, "alm reversed", "same")
    copy = made.roles["teacher"].network.state_dict()
    assert only_loss(made.method, made.batch).value > 1e-3
    made.roles["student"].network.load_state_dict(copy)
    assert only_loss(made.method, made.batch).value.item() == pytest.approx(0.0, abs=1e-4)
    assert max(float(g.abs().max()) for g in made.gradients(made.batch).values()) < 1e-4


@pytest.mark.parametrize("kind", ["alm", "uld", "uld of chunks", "gold"])
def test_without_its_teacher_each_baseline_is_sft(kind: str, world: Path) -> None:
    name = "chunk_weight" if kind == "alm" else "distillation_weight"
    made, plain = Made(world, kind, **{name: 0.0}), Made(world, "sft")
    value = only_loss(made.method, made.batch).value
    torch.testing.assert_close(value, only_loss(plain.method, plain.batch).value)
    assert value.item() == pytest.approx(plain.cross_entropy(), rel=1e-4)
    expected = plain.gradients(plain.batch)
    for key, gradient in made.gradients(made.batch).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-3)


def test_uld_by_position_sorts_the_probabilities_of_the_same_number_of_tokens(world: Path) -> None:
    made = Made(world, "uld", distillation_weight=2.0)
    ours, theirs = (made.logprobs(reader).exp() for reader in ("student", "teacher"))
    masks = [made.pair.text(made.batch, reader=r).maskable for r in ("student", "teacher")]  # type: ignore[arg-type]
    distances = []
    for row in range(4):
        for first, second in zip(ours[row][masks[0][row]], theirs[row][masks[1][row]]):  # noqa: B905
            size = max(len(first), len(second))
            sides = [torch.zeros(size), torch.zeros(size)]
            for side, probabilities in zip(sides, (first, second), strict=True):
                side[: len(probabilities)] = probabilities.sort(descending=True).values
            distances.append(float((sides[0] - sides[1]).abs().sum()))
    expected = made.cross_entropy() + 2.0 * sum(distances) / len(distances)
    assert only_loss(made.method, made.batch).value.item() == pytest.approx(expected, rel=1e-3)


def test_uld_of_chunks_compares_the_first_token_times_the_likelihood_of_the_rest(
    world: Path,
) -> None:
    made = Made(world, "uld of chunks")
    sides: list[dict[tuple[int, int], Tensor]] = []
    for reader in ("student", "teacher"):
        text = made.pair.text(made.batch, reader=reader)  # type: ignore[arg-type]
        logits = made.logprobs(reader) / 1.5
        logprobs, found = logits.log_softmax(-1), dict[tuple[int, int], Tensor]()
        for row, place in (text.chunks >= 0).nonzero().tolist():
            key, token = (row, int(text.chunks[row, place])), text.tokens[row, place]
            if key in found:
                found[key] = found[key] * logprobs[row, place, token].exp()
            else:
                found[key] = logprobs[row, place].exp()
        sides.append(found)
    keys = sides[0].keys() & sides[1].keys()
    width = max(len(found[key]) for found in sides for key in keys)
    distances = []
    for key in keys:
        first, second = (
            torch.cat([found[key], torch.zeros(width - len(found[key]))]).sort().values
            for found in sides
        )
        distances.append(float((first - second).abs().sum()))
    loss = only_loss(made.method, made.batch)
    expected = made.cross_entropy() + sum(distances) / len(distances)
    assert loss.value.item() == pytest.approx(expected, rel=1e-3)
    assert float(loss.metrics["mask_rate"]) == float(loss.metrics["noise_level"]) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_student_gets_a_gradient(kind: str, world: Path) -> None:
    made = Made(world, kind)
    assert any(gradient.any() for gradient in made.gradients(made.batch).values())
    assert all(p.grad is None for p in made.roles["teacher"].network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_in_any_micro_batches(kind: str, world: Path) -> None:
    made = Made(world, kind)
    parts = [given_batch(made.pair, 1, first_id=number) for number in range(4)]
    whole, split = made.gradients(made.batch), made.gradients(*parts)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-3)

"""BLD: its loss by hand, its heads, and the simpler methods that it is at neutral settings."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.byte_heads import NUM_OUTPUTS, AutoregressiveHeads, ParallelHeads
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.projection import dense
from diffdistill.roles import Roles
from diffdistill.spellings import ALPHABET
from diffdistill.text.bld import BLD
from diffdistill.text.sft import SFT
from diffdistill.types import Batch, Progress
from tests.conftest import START, generator, gradients
from tests.given_run import (
    given_batch,
    make_causal_pair,
    make_given_method,
    make_given_roles,
    save_given_world,
)
from tests.toy_texts import only_loss

LORA = {"adapter": "lora", "rank": 2, "alpha": 4.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_given_world(tmp_path_factory.mktemp("bld"))


def speak(head: torch.nn.Module | None) -> None:
    """Give heads some weights: they begin at zero."""
    for number, parameter in enumerate(head.parameters() if head is not None else ()):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator(number))


class Made:
    """A method with what it is made of, and a batch."""

    def __init__(self, world: Path, cls: Any = BLD, size: int = 4, **options: Any) -> None:
        self.pair: CausalPair = make_causal_pair(world)
        settings, silent = options.pop("roles", None), options.pop("silent", False)
        self.roles: Roles = make_given_roles(self.pair, settings)
        self.method: Any = make_given_method(cls, self.pair, self.roles, **options)
        if not silent:
            speak(self.roles["student"].head)
        self.batch: Batch = given_batch(self.pair, size)

    def gradients(self, *batches: Batch) -> dict[str, Tensor]:
        """Return the gradients of one optimizer step over micro-batches."""
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


def by_hand(made: Made, reduction: str = "sum") -> tuple[float, float, float]:
    """Return the three terms of eq. 5, token by token and byte by byte."""
    pair, student, batch = made.pair, made.roles["student"], made.batch
    text, known = pair.text(batch), pair.bytes(batch)
    with torch.no_grad():
        prediction = student(pair.state(batch), pair.condition(batch))
    words = dense(prediction).detach().log_softmax(-1)
    tokens = learned = matched = 0.0
    num_tokens = num_bytes = 0
    head: Any = student.head
    for row, place in text.maskable.nonzero().tolist():
        num_tokens += 1
        tokens -= float(words[row, place, text.tokens[row, place]])
        if known.first[row, place] < 0:
            continue
        for slot in range(min(int(known.size[row, place]), made.method.num_bytes)):
            number = int(known.first[row, place]) + slot
            outputs = head.layers(prediction.hidden[row, place]).reshape(-1, NUM_OUTPUTS)
            logprobs = outputs[slot].detach().log_softmax(-1)
            num_bytes += 1
            learned -= float(logprobs[known.observed[row, number]])
            if not known.known[row, number]:
                continue
            teacher = known.logprobs[row, number].float()
            ours = logprobs[known.ids[row, number]]
            rests = [max(1.0 - float(x.exp().sum()), 1e-7) for x in (teacher, ours)]
            matched += float((teacher.exp() * (teacher - ours)).sum())
            matched += rests[0] * math.log(rests[0] / rests[1])
    divisor = num_tokens if reduction == "sum" else num_bytes
    return tokens / num_tokens, learned / divisor, matched / divisor


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_is_the_papers_equation_token_by_token(reduction: str, world: Path) -> None:
    options = {"byte_weight": 0.7, "kl_weight": 0.3, "num_bytes": 3, "num_kept": 6}
    made = Made(world, reduction=reduction, **options)
    loss = only_loss(made.method, made.batch)
    tokens, learned, matched = by_hand(made, reduction)
    assert matched > 0.01
    expected = tokens + 0.7 * learned + 0.3 * matched
    assert loss.value.item() == pytest.approx(expected, rel=1e-4)
    assert loss.count == int(made.pair.text(made.batch).maskable.sum())
    assert float(loss.metrics["cross_entropy"]) == pytest.approx(tokens, rel=1e-5)


def test_without_bytes_it_is_sft_and_the_heads_rest(world: Path) -> None:
    made = Made(world, byte_weight=0.0, kl_weight=0.0)
    plain = Made(world, SFT, roles={"student": {}})
    found, expected = (m.gradients(m.batch) for m in (made, plain))
    for name, gradient in expected.items():
        torch.testing.assert_close(found.pop(name), gradient)
    assert found.keys() == {"head.layers.weight", "head.layers.bias"}
    assert all(not gradient.any() for gradient in found.values())
    values = [only_loss(m.method, m.batch).value for m in (made, plain)]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("head", ["parallel", "autoregressive"])
def test_heads_begin_silent_and_give_the_network_nothing_but_what_sft_does(
    head: str, world: Path
) -> None:
    made, plain = Made(world, head=head, silent=True), Made(world, SFT, roles={"student": {}})
    found, expected = (m.gradients(m.batch) for m in (made, plain))
    for name, gradient in expected.items():
        torch.testing.assert_close(found.pop(name), gradient)
    assert any(gradient.any() for gradient in found.values())
    metrics = only_loss(made.method, made.batch).metrics
    assert float(metrics["byte_cross_entropy"]) == pytest.approx(math.log(NUM_OUTPUTS), rel=1e-5)


@pytest.mark.parametrize("head", ["parallel", "autoregressive"])
@pytest.mark.parametrize("role", [{}, LORA])
def test_the_loss_reaches_student_and_heads_and_never_the_teacher(
    role: dict[str, Any], head: str, world: Path
) -> None:
    roles = {"student": role, "teacher": {"weights": "frozen"}}
    options = {"head_width": 8} if head == "autoregressive" else {}
    made = Made(world, roles=roles, head=head, **options)
    found = made.gradients(made.batch)
    names = {name.partition(".")[0] for name, gradient in found.items() if gradient.any()}
    assert "head" in names
    assert len(names) > 1
    teacher = made.roles["teacher"].network
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_step_is_the_same_in_any_micro_batches(reduction: str, world: Path) -> None:
    made = Made(world, reduction=reduction, kl_weight=1.0)
    parts = [given_batch(made.pair, 1, first_id=number) for number in range(4)]
    whole, split = made.gradients(made.batch), made.gradients(*parts)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-3)


def test_the_teacher_is_asked_once_for_each_text_and_not_in_training(world: Path) -> None:
    made = Made(world)
    calls: list[int] = []
    network: Any = made.roles["teacher"].network
    network.base_model.register_forward_hook(lambda *_: calls.append(1))
    only_loss(made.method, made.batch)
    assert calls == []
    given_batch(made.pair, 1)
    assert calls


def test_what_is_kept_depends_on_all_that_the_search_does(world: Path) -> None:
    base = Made(world, size=1).method.annotation()
    for options in ({"num_beams": 2}, {"threshold": 0.1}, {"path": "canonical"}, {"num_kept": 3}):
        assert Made(world, size=1, **options).method.annotation() != base
    assert Made(world, size=1, byte_weight=0.3).method.annotation() == base
    canonical = Made(world, size=1, path="canonical").method.annotation()
    assert "num_beams" not in canonical
    assert "threshold" not in canonical
    rounded = Made(world, size=1)
    rounded.roles["teacher"].autocast = torch.bfloat16
    assert rounded.method.annotation() != base


def test_the_beam_and_the_canonical_path_teach_otherwise(world: Path) -> None:
    beam, canonical = Made(world), Made(world, path="canonical")
    first, second = (only_loss(m.method, m.batch).metrics["byte_kl"] for m in (beam, canonical))
    assert abs(float(first) - float(second)) > 1e-3


# heads


def fitted(head: torch.nn.Module, hidden: Tensor, observed: Tensor, steps: int = 300) -> float:
    """Return the mean cross-entropy of bytes after training a head alone, in nats a byte."""
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    value = torch.zeros(())
    for _ in range(steps):
        logits = head(hidden, observed)
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), observed.flatten())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return value.item()


def test_parallel_heads_mix_over_prefixes_and_autoregressive_ones_do_not() -> None:
    observed = torch.tensor([[1, 1], [2, 2]]).repeat(8, 1)  # the second byte is the first
    hidden = torch.ones(16, 4)
    torch.manual_seed(0)
    parallel = fitted(ParallelHeads(4, 2), hidden, observed)
    assert parallel == pytest.approx(math.log(2), abs=0.02)  # ln 2 for each byte
    autoregressive = fitted(AutoregressiveHeads(4, 2, 8), hidden, observed)
    assert autoregressive == pytest.approx(math.log(2) / 2, abs=0.02)  # the second is certain


def test_an_autoregressive_head_sees_the_bytes_before_its_own_and_no_later() -> None:
    torch.manual_seed(0)
    head, hidden = AutoregressiveHeads(4, 3, 8), torch.randn(1, 4)
    speak(head)
    observed = torch.tensor([[5, 6, 7]])
    base = head(hidden, observed)
    for place in range(3):
        changed = observed.clone()
        changed[0, place] = ALPHABET - 1
        differs = (head(hidden, changed) - base).abs().amax(-1)[0] > 0
        assert differs.tolist() == [slot > place for slot in range(3)]


def test_parallel_heads_are_as_large_as_the_paper_says() -> None:
    head = ParallelHeads(3072, 10)
    assert sum(p.numel() for p in head.parameters()) == 10 * (3072 + 1) * 260


def test_heads_read_the_state_before_the_token_and_cannot_copy_it(world: Path) -> None:
    """The shift test: of random tokens no head may say more than their entropy."""
    made = Made(world, size=1)
    student, pair = made.roles["student"], made.pair
    network: Any = student.network
    tokens = torch.randint(97, 105, (64, 32), generator=generator(0))  # eight letters, evenly
    letters = {int(token): number for number, token in enumerate(tokens.unique())}
    observed = torch.tensor([letters[int(token)] for token in tokens.flatten()]).view_as(tokens)
    batch = {"student/tokens": tokens, "teacher/tokens": tokens}
    batch |= {f"{r}/maskable": torch.ones_like(tokens).bool() for r in ("student", "teacher")}
    batch |= {f"{r}/chunks": torch.full_like(tokens, -1) for r in ("student", "teacher")}
    with torch.no_grad():
        right = student(pair.state(batch), pair.condition(batch)).hidden
        shifted = network.base_model(input_ids=tokens).last_hidden_state[:, 1:]
    values = []
    for hidden in (right, shifted):
        torch.manual_seed(1)
        head = ParallelHeads(hidden.shape[-1], 1)
        values.append(fitted(head, hidden.flatten(0, 1), observed[:, 1:].reshape(-1, 1), steps=80))
    assert values[0] > math.log(8) - 0.12  # 1984 tokens for 260 outputs of 32 channels
    assert values[1] < 0.5  # a state that has seen the token gives it away


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"threshold": -0.1}, r"threshold must be in \[0, 1\)"),
        ({"num_kept": 0}, "num_kept must be from 1 to 257, not 0"),
        ({"num_kept": 258}, "num_kept must be from 1 to 257, not 258"),
        ({"num_bytes": 0}, "num_bytes must be at least 1, not 0"),
        ({"head_width": 0}, "head_width must be at least 1, not 0"),
        ({"head_width": 8}, "head_width is for head: autoregressive: leave it 128"),
        ({"path": "canonical", "num_beams": 2}, "num_beams is for path: beam: leave it 4"),
        ({"path": "canonical", "threshold": 0.1}, "threshold is for path: beam: leave it 0.001"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = dict.fromkeys(("family", "draws", "student", "teacher"))
    with pytest.raises(ValueError, match=message):
        BLD(**parts, **options)


def test_progress_does_not_matter(world: Path) -> None:
    made = Made(world)
    values = [only_loss(made.method, made.batch, Progress(step, 9)).value for step in (0, 8)]
    assert values[0] == values[1]

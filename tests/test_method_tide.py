from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.methods.tide import Tide
from diffdistill.projection import Projection
from diffdistill.texts import Format, Reader, Text
from diffdistill.types import Batch, Condition, Loss, Progress, State
from tests.conftest import Spy, generator, rows_of

MASKS = {"student": 0, "teacher": 1}
HALF = Progress(50, 101)
VARIANTS = ["cross", "shared", "calm-tidal"]
NONE: dict[str, Any] = {"tidal": "none", "exposure": 0.0, "weight": "uniform"}


@dataclass
class Texts:
    """Reads texts from the batch; student and teacher have different mask tokens.

    Where a mask token is suppressed is said by ``masks``; by default it is no token of the network.
    """

    masks: tuple[int, int] = (99, 99)

    def format(self, *, reader: Reader = "student") -> Format:
        return Format(self.masks[reader == "teacher"], block=1, length=64)

    def text(self, batch: Batch, *, reader: Reader = "student") -> Text:
        parts = (batch[f"{reader}/{name}"] for name in Text._fields)
        return Text(*parts)

    def noised(self, batch: Batch, t: Tensor, mask: Tensor, *, reader: Reader = "student") -> State:
        tokens = batch[f"{reader}/tokens"].repeat(len(mask) // len(batch["ids"]), 1)
        return State(tokens.masked_fill(mask, MASKS[reader]), t, mask)

    def condition(self, batch: Batch, *, reader: Reader = "student", copies: int = 1) -> Condition:
        return {"bias": batch["bias"].repeat(copies, 1)}


class Network(nn.Module):
    """Logits from each token, the mean of all, and the condition."""

    def __init__(self, vocabulary: int, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        size = (vocabulary, vocabulary)
        self.own = nn.Parameter(scale * torch.randn(size, generator=generator(seed)))
        self.context = nn.Parameter(scale * torch.randn(size, generator=generator(seed + 100)))

    def forward(self, state: State, condition: Condition) -> Tensor:
        mean = self.context[state.x].mean(dim=1, keepdim=True)
        return self.own[state.x] + mean + condition["bias"][:, None]


def make_batch(
    size: int = 4, *, vocabulary: int = 7, seed: int = 0, same: bool = False
) -> dict[str, Any]:
    """Return texts of 12 student tokens and 10 of the teacher (12 of both if ``same``).

    The first two are a prompt. Chunks have 1:1, 2:1, 1:2 and 3:2 tokens; one token has none.
    """
    rng = generator(seed)
    student = [-1, -1, 0, 1, 1, 2, 3, 3, 3, 4, -1, 5]
    teacher = [-1, -1, 0, 1, 2, 2, 3, 3, 4, 5]
    if same:
        student = teacher = [-1, -1, *range(10)]
    batch: dict[str, Any] = {"ids": torch.arange(size), "prompts": [""] * size}
    batch["bias"] = torch.zeros(size, 1)
    for name, chunks in (("student", student), ("teacher", teacher)):
        length = len(chunks)
        batch[f"{name}/tokens"] = torch.randint(2, vocabulary, (size, length), generator=rng)
        batch[f"{name}/maskable"] = (torch.arange(length) >= 2).expand(size, -1)
        batch[f"{name}/chunks"] = torch.tensor(chunks).expand(size, -1)
    if same:
        batch["teacher/tokens"] = batch["student/tokens"]
    return batch


def make_method(variant: str = "cross", *, vocabulary: int = 7, **options: Any) -> Tide:
    parts: dict[str, Any] = {
        "student": Network(vocabulary, 1),
        "teacher": Network(vocabulary, 2),
    }
    settings: dict[str, Any] = {"family": Texts(), "draws": Draws(0), "variant": variant}
    return Tide(**(settings | parts | options))


def only_loss(method: Tide, batch: Batch, progress: Progress = HALF) -> Loss:
    (loss,) = method.losses(batch, progress)
    return loss


def student_gradient(method: Tide, batch: Batch, progress: Progress = HALF) -> Tensor:
    student: Any = method.student
    student.zero_grad(set_to_none=True)
    only_loss(method, batch, progress).value.backward()
    return torch.cat([student.own.grad.flatten(), student.context.grad.flatten()])


def batch_for(variant: str, size: int = 4) -> dict[str, Any]:
    return make_batch(size, same=variant == "shared")


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_student_gets_a_gradient_and_the_teacher_no_graph(variant: str) -> None:
    spy = Spy(Network(7, 2))
    method = make_method(variant, teacher=spy)
    assert student_gradient(method, batch_for(variant)).abs().sum() > 0
    assert all(p.grad is None for p in spy.model.parameters())  # type: ignore[attr-defined]
    assert spy.grad_enabled == [False] * len(spy.states)
    assert [loss.role for loss in method.losses(batch_for(variant), HALF)] == ["student"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_sides_see_the_active_chunks_hidden_behind_their_own_mask_token(variant: str) -> None:
    student, teacher = Spy(Network(7, 1)), Spy(Network(7, 2))
    batch = batch_for(variant, 16)
    method = make_method(variant, student=student, teacher=teacher, exposure=0.0)
    only_loss(method, batch)
    (seen,), (judged,) = student.states, teacher.states
    assert torch.equal(seen.t, judged.t)
    for state, name in ((seen, "student"), (judged, "teacher")):
        assert state.mask is not None
        expected = batch[f"{name}/tokens"].masked_fill(state.mask, MASKS[name])
        assert torch.equal(state.x, expected)
        assert not state.mask[:, :2].any()
    assert seen.mask is not None
    assert judged.mask is not None
    for row in range(16):
        for chunk in range(int(batch["student/chunks"].max()) + 1):
            hidden = seen.mask[row][batch["student/chunks"][row] == chunk]
            shown = judged.mask[row][batch["teacher/chunks"][row] == chunk]
            assert hidden.unique().numel() == 1  # no chunk is split
            assert hidden[0] == shown.all() == shown.any()


def test_a_token_without_chunk_is_hidden_from_the_student_alone_and_still_learned() -> None:
    batch = make_batch(64)
    spy = Spy(Network(7, 1))
    only_loss(make_method(student=spy), batch)
    assert spy.states[0].mask is not None
    assert 0 < spy.states[0].mask[:, 10].float().mean() < 1


def test_the_share_of_hidden_tokens_follows_the_noise_level_and_is_raised_by_chunks() -> None:
    batch = make_batch(512)
    loss = only_loss(make_method(), batch)
    assert loss.metrics["noise_level"].item() == pytest.approx(0.5, abs=0.03)  # type: ignore[union-attr]
    rate = float(loss.metrics["mask_rate"])
    # Of ten tokens five are in chunks of size 2 and 3: hidden with 1 - (1 - t)^n on average.
    expected = (5 * 1 / 2 + 2 * 2 / 3 + 3 * 3 / 4) / 10
    assert rate == pytest.approx(expected, abs=0.03)
    loss = only_loss(make_method("shared"), make_batch(512, same=True))
    assert float(loss.metrics["mask_rate"]) == pytest.approx(0.5, abs=0.03)


def by_hand(method: Tide, batch: Batch, states: tuple[State, State]) -> tuple[Tensor, Tensor]:
    """Return the denoising term and the mean chunk loss of ``cross``, one chunk at a time."""
    seen, judged = states
    assert seen.mask is not None
    condition = {"bias": batch["bias"]}
    logs = [
        torch.log_softmax(model(state, condition), dim=-1)
        for model, state in ((method.student, seen), (method.teacher, judged))
    ]
    denoising, errors = torch.zeros(()), []
    for row in range(len(batch["ids"])):
        for place in seen.mask[row].nonzero()[:, 0].tolist():
            token = batch["student/tokens"][row, place]
            denoising = denoising - logs[0][row, place, token] / seen.t[row]
        for chunk in range(int(batch["student/chunks"].max()) + 1):
            chosen = [batch[f"{n}/chunks"][row] == chunk for n in ("student", "teacher")]
            if not seen.mask[row][chosen[0]].any():
                continue
            sums = [
                log[row][mine].gather(1, batch[f"{name}/tokens"][row][mine][:, None]).sum()
                for log, mine, name in zip(logs, chosen, ("student", "teacher"), strict=True)
            ]
            s, p = ((x / method.temperature).exp().clamp(1e-7, 1 - 1e-7) for x in sums)
            errors.append(-(s * p.log() + (1 - s) * (1 - p).log()))
    return denoising / batch["student/maskable"].sum(), torch.stack(errors).mean()


def test_cross_is_the_published_sum_of_denoising_and_reverse_calm() -> None:
    spies = Spy(Network(7, 1, 0.3)), Spy(Network(7, 2, 0.3))
    batch = make_batch(6)
    method = make_method(student=spies[0], teacher=spies[1], distillation_weight=0.7)
    loss = only_loss(method, batch)
    denoising, distillation = by_hand(method, batch, (spies[0].states[0], spies[1].states[0]))
    torch.testing.assert_close(loss.value, denoising + 0.7 * distillation)
    torch.testing.assert_close(loss.metrics["distillation"], distillation.detach())
    assert loss.count == batch["student/maskable"].sum()


def test_shared_is_the_published_kl_to_the_mixed_target() -> None:
    spies = Spy(Network(7, 1)), Spy(Network(7, 2))
    batch = make_batch(6, same=True)
    method = make_method("shared", student=spies[0], teacher=spies[1], exposure=0.0)
    loss = only_loss(method, batch)
    seen, judged = spies[0].states[0], spies[1].states[0]
    assert seen.mask is not None
    s, z = (
        spy.model(state, {"bias": batch["bias"]}).detach()
        for spy, state in zip(spies, (seen, judged), strict=True)
    )
    rate = (0.5 * (1 - seen.t))[:, None, None]  # halfway through training
    target = torch.softmax(((1 - rate) * s + rate * z) / 2, dim=-1)
    divergence = (target * (target.log() - torch.log_softmax(s / 2, dim=-1))).sum(-1)
    weight = torch.exp(-((seen.t - 0.5) ** 2) / (2 * 0.15**2))[:, None]
    expected = 4 * (weight * divergence)[seen.mask].sum() / seen.mask.sum()
    torch.testing.assert_close(loss.metrics["distillation"], expected)


@pytest.mark.parametrize("variant", ["shared", "calm-tidal"])
def test_at_rate_zero_nothing_depends_on_the_teacher(variant: str) -> None:
    batch = batch_for(variant)
    zero = {"rate_start": 0.0, "rate_end": 0.0}
    one = student_gradient(make_method(variant, **zero), batch)
    other = student_gradient(make_method(variant, teacher=Network(7, 9), **zero), batch)
    alone = student_gradient(make_method(variant, distillation_weight=0.0), batch)
    assert torch.equal(one, other)
    # In logits the student is then its own target, and at rest; so it is in chunk space.
    torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["shared", "calm-tidal"])
def test_a_higher_rate_moves_the_student_further_towards_the_teacher(variant: str) -> None:
    batch = batch_for(variant)
    alone = student_gradient(make_method(variant, distillation_weight=0.0), batch)
    pulls = [
        (student_gradient(make_method(variant, rate_start=r, rate_end=r), batch) - alone).norm()
        for r in (0.2, 0.5, 0.9)
    ]
    assert pulls[0] < pulls[1] < pulls[2]


@pytest.mark.parametrize("variant", ["shared", "calm-tidal"])
def test_the_rate_follows_training(variant: str) -> None:
    batch = batch_for(variant)
    start = student_gradient(make_method(variant), batch, Progress(0, 101))
    fixed = make_method(variant, rate_start=0.1, rate_end=0.1)
    torch.testing.assert_close(start, student_gradient(fixed, batch))
    end = student_gradient(make_method(variant), batch, Progress(100, 101))
    noise = make_method(variant, tidal="noise")
    torch.testing.assert_close(end, student_gradient(noise, batch, Progress(0, 101)))


def test_full_rate_without_noise_axis_is_plain_distillation() -> None:
    batch = make_batch(same=True)
    mixed = make_method("shared", tidal="training", rate_start=1.0, rate_end=1.0)
    plain = make_method("shared", tidal="none")
    torch.testing.assert_close(student_gradient(mixed, batch), student_gradient(plain, batch))


@pytest.mark.parametrize(
    ("chunk_loss", "token_loss"),
    [("calm", "forward-kl"), ("reverse-binary-kl", "reverse-kl")],
)
def test_with_one_tokenizer_and_two_words_cross_is_shared(chunk_loss: str, token_loss: str) -> None:
    """One token a chunk at T = 1: of two words, a token's likelihood is the whole prediction."""
    batch = make_batch(8, same=True, vocabulary=3)
    for name in MASKS:
        batch[f"{name}/tokens"] = batch["student/tokens"] % 2
    options = NONE | {"temperature": 1.0, "vocabulary": 2}
    cross = make_method("cross", divergence=chunk_loss, **options)
    shared = make_method("shared", divergence=token_loss, **options)
    torch.testing.assert_close(student_gradient(cross, batch), student_gradient(shared, batch))
    if chunk_loss == "reverse-binary-kl":
        values = [only_loss(m, batch).value for m in (cross, shared)]
        torch.testing.assert_close(*values)


def test_reverse_calm_differs_from_the_true_divergence_in_its_gradient() -> None:
    batch = make_batch(8)
    published, true = make_method(), make_method(divergence="reverse-binary-kl")
    gap = student_gradient(published, batch) - student_gradient(true, batch)
    assert gap.abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_two_passes_never_hide_the_same_and_each_half_is_read_where_it_was_hidden(
    variant: str,
) -> None:
    spy, student = Spy(Network(7, 2)), Spy(Network(7, 1))
    batch = batch_for(variant, 256)
    method = make_method(variant, teacher=spy, student=student, exposure=0.5)
    only_loss(method, batch)
    first, second = (state.mask for state in spy.states)
    assert first is not None
    assert second is not None
    whole = Spy(Network(7, 2))
    only_loss(make_method(variant, teacher=whole, exposure=0.0), batch)
    assert not (first & second).any()
    assert whole.states[0].mask is not None
    assert torch.equal(first | second, whole.states[0].mask)
    assert 0.4 < first.sum() / (first | second).sum() < 0.6


class Coded:
    """A teacher whose likelihoods are a code of how much of a text it sees hidden."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, state: State, condition: Condition) -> Tensor:
        self.calls += 1
        hidden = (state.x == MASKS["teacher"]).sum(dim=1)
        logits = torch.zeros(*state.x.shape, 7)
        logits[..., 0] = 0.1 * hidden[:, None]
        return logits


def test_each_half_has_the_likelihood_of_the_pass_that_hid_it() -> None:
    batch = make_batch(16)
    spy = Spy(Coded())
    method = make_method(teacher=spy, exposure=0.3)
    text, answer = (method.family.text(batch, reader=r) for r in ("student", "teacher"))
    hidden = method._hide(batch, text, answer)
    likelihood = method._judge(batch, answer, hidden)
    masks = [state.mask for state in spy.states]
    expected = []
    for row, chunk in hidden.active.nonzero().tolist():
        places = batch["teacher/chunks"][row] == chunk
        (mask,) = (m for m in masks if m is not None and m[row][places].all())
        each = torch.log(torch.tensor(6.0) + (0.1 * mask[row].sum()).exp())
        expected.append(-places.sum() * each)
    torch.testing.assert_close(likelihood, torch.stack(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_doubled_batch_is_two_passes(variant: str) -> None:
    batch = batch_for(variant) | {"bias": torch.arange(4.0)[:, None]}
    spy = Spy(Network(7, 2))
    doubled = make_method(variant, teacher=spy, exposure=0.5, passes="doubled")
    two = make_method(variant, exposure=0.5)
    torch.testing.assert_close(only_loss(doubled, batch).value, only_loss(two, batch).value)
    assert [len(state.x) for state in spy.states] == [8]


@pytest.mark.parametrize("variant", VARIANTS)
def test_exposure_at_either_end_is_one_pass_that_is_shown_nothing(variant: str) -> None:
    batch = batch_for(variant)
    spies = [Spy(Network(7, 2)), Spy(Network(7, 2))]
    values = [
        only_loss(make_method(variant, teacher=spy, exposure=exposure), batch).value
        for spy, exposure in zip(spies, (0.0, 1.0), strict=True)
    ]
    assert torch.equal(*values)
    assert [len(spy.states) for spy in spies] == [1, 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_draws_of_a_sample_depend_on_neither_batch_nor_padding(variant: str) -> None:
    batch = batch_for(variant, 4)
    padded = dict(batch)
    for name in MASKS:
        for part, filler in (("tokens", 2), ("maskable", False), ("chunks", -1)):
            key = f"{name}/{part}"
            more = torch.full((4, 5), filler, dtype=batch[key].dtype)
            padded[key] = torch.cat([batch[key], more], dim=1)
    whole, longer, part = Spy(Network(7, 1)), Spy(Network(7, 1)), Spy(Network(7, 1))
    only_loss(make_method(variant, student=whole), batch)
    only_loss(make_method(variant, student=longer), padded)
    only_loss(make_method(variant, student=part), rows_of(batch, [2, 3]))
    assert torch.equal(longer.states[0].x[:, : whole.states[0].x.shape[1]], whole.states[0].x)
    assert torch.equal(part.states[0].x, whole.states[0].x[2:])


def test_chunks_that_hold_a_prompt_token_on_either_side_never_count() -> None:
    batch = make_batch(32)
    for name in MASKS:
        changed = batch[f"{name}/maskable"].clone()
        batch[f"{name}/maskable"] = changed
    batch["student/maskable"][:, 4] = False  # in chunk 1
    batch["teacher/maskable"][:, 9] = False  # is chunk 5
    method = make_method()
    texts = [method.family.text(batch, reader=r) for r in ("student", "teacher")]
    hidden = method._hide(batch, *texts)
    assert hidden.active.any(dim=0).tolist() == [True, False, True, True, True, False]
    assert not hidden.mask[:, 4].any()


def test_shared_compares_only_pairs_of_single_tokens() -> None:
    batch = make_batch(32)
    singles = [2, 9, 11], [2, 8, 9]  # chunks 0, 4 and 5 are one token on both sides
    batch["teacher/tokens"] = batch["teacher/tokens"].clone()
    batch["teacher/tokens"][:, singles[1]] = batch["student/tokens"][:, singles[0]]
    method = make_method("shared")
    texts = [method.family.text(batch, reader=r) for r in ("student", "teacher")]
    hidden = method._hide(batch, *texts)
    assert hidden.active.any(dim=0).tolist() == [True, False, False, False, True, True]


def test_shared_slices_both_sides_to_the_shared_vocabulary() -> None:
    batch = make_batch(same=True)
    large = Network(9, 2)
    with torch.no_grad():
        large.own[:, 7:] = 50.0
    small = Network(7, 2)
    with torch.no_grad():
        for name in ("own", "context"):
            getattr(small, name).copy_(getattr(large, name)[:7, :7])
    values = [only_loss(make_method("shared", teacher=m), batch).value for m in (large, small)]
    torch.testing.assert_close(*values)
    fewer = only_loss(make_method("shared", teacher=small, shared_vocabulary=5), batch)
    assert fewer.value != values[1]


def test_shared_refuses_two_vocabularies() -> None:
    with pytest.raises(UserError, match="variant shared needs one vocabulary"):
        only_loss(make_method("shared"), make_batch(same=True) | shuffled(make_batch(same=True)))


def shuffled(batch: Batch) -> dict[str, Tensor]:
    return {"teacher/tokens": batch["teacher/tokens"] % 5 + 2}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("t", [0.0, 1.0], ids=["nothing hidden", "all hidden"])
def test_the_loss_is_finite_in_bfloat16_at_both_ends(variant: str, t: float) -> None:
    batch = batch_for(variant)
    models = [Network(7, seed, 40.0).to(torch.bfloat16) for seed in (1, 2)]
    method = make_method(variant, student=models[0], teacher=models[1], draws=Constant(t))
    gradient = student_gradient(method, batch)
    loss = only_loss(method, batch)
    assert loss.value.isfinite()
    assert gradient.isfinite().all()
    assert float(loss.metrics["mask_rate"]) == t
    if t == 0.0:
        assert loss.value == 0
        assert not gradient.any()


class Constant(Draws):
    """Noise levels at one end: 0 hides nothing, 1 everything."""

    def __init__(self, t: float) -> None:
        super().__init__(0)
        self.t = t

    def uniform(self, purpose: str, ids: Tensor, shape: Sequence[int] = ()) -> Tensor:
        if shape:
            return super().uniform(purpose, ids, shape)
        return torch.full(ids.shape, 1.0 if self.t else -1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_without_chunks_or_maskable_tokens_give_a_finite_loss(variant: str) -> None:
    batch = batch_for(variant)
    bare = batch | {f"{n}/chunks": torch.full_like(batch[f"{n}/chunks"], -1) for n in MASKS}
    loss = only_loss(make_method(variant), bare)
    assert float(loss.metrics["active_chunks"]) == 0
    assert float(loss.metrics["distillation"]) == 0
    torch.testing.assert_close(loss.value.detach(), loss.metrics["denoising"])
    empty = bare | {f"{n}/maskable": torch.zeros_like(bare[f"{n}/maskable"]) for n in MASKS}
    loss = only_loss(make_method(variant), empty)
    assert loss.value == 0
    assert loss.count == 1


def test_the_share_of_clamped_chunks_is_logged() -> None:
    batch = make_batch(8)
    sharp = only_loss(make_method(student=Network(7, 1, 400.0)), batch)
    assert 0.5 < float(sharp.metrics["clamp_share"]) <= 1.0
    flat = only_loss(make_method(student=Network(7, 1, 0.1)), batch)
    assert float(flat.metrics["clamp_share"]) == 0.0
    assert "clamp_share" not in only_loss(make_method("shared"), make_batch(same=True)).metrics


def test_denoising_counts_each_hidden_token_with_the_inverse_of_the_noise_level() -> None:
    batch = make_batch(256, same=True)
    uniform = Network(7, 1, 0.0)
    loss = only_loss(make_method("shared", student=uniform), batch)
    # An unbiased estimate of the NELBO per token: log 7 whatever the noise level.
    expected = torch.log(torch.tensor(7.0)).item()
    assert float(loss.metrics["denoising"]) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("variant", "divergence"), [("cross", "reverse-binary-kl"), ("shared", "forward-kl")]
)
def test_distillation_alone_brings_the_student_to_the_teacher(
    variant: str, divergence: str
) -> None:
    batch = make_batch(16, same=True)
    parts = {"student": Network(7, 1, 0.3), "teacher": Network(7, 2, 0.3)}
    method = make_method(
        variant, divergence=divergence, distillation_weight=1e6, temperature=1.0, **parts, **NONE
    )
    optimizer = torch.optim.Adam(parts["student"].parameters(), lr=0.03)
    errors = []
    for step in range(150):
        optimizer.zero_grad()
        loss = only_loss(method, batch, Progress(step, 150))
        loss.value.backward()
        optimizer.step()
        errors.append(float(loss.metrics["distillation"]))
    assert errors[-1] < 0.1 * errors[0]


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="variant shared has no divergence calm; it has forward"):
        make_method("shared", divergence="calm")
    with pytest.raises(ValueError, match="variant cross has no divergence reverse-kl"):
        make_method(divergence="reverse-kl")
    with pytest.raises(ValueError, match=r"exposure must be in \[0, 1\], not 1.5"):
        make_method(exposure=1.5)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        make_method(temperature=0.0)
    with pytest.raises(ValueError, match="t_low"):
        make_method(t_low=0.0)


class Projected(Network):
    """The same logits, as hidden states and an output head."""

    def forward(self, state: State, condition: Condition) -> Any:
        return Projection(super().forward(state, condition), torch.eye(len(self.own)))


class Widest(TorchDispatchMode):
    """Remembers the most rows of ``size`` numbers that any tensor had."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple) else (found,):
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == self.size:
                self.rows = max(self.rows, value.numel() // self.size)
        return found


@pytest.mark.parametrize("passes", ["two", "doubled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_give_the_loss_and_gradient_of_their_logits(variant: str, passes: str) -> None:
    batch = batch_for(variant)
    parts: dict[str, Any] = {"student": Projected(7, 1), "teacher": Projected(7, 2)}
    methods = make_method(variant, passes=passes), make_method(variant, passes=passes, **parts)
    torch.testing.assert_close(*(only_loss(method, batch).value for method in methods))
    torch.testing.assert_close(*(student_gradient(method, batch) for method in methods))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_tokens_that_are_not_hidden_are_never_computed(variant: str) -> None:
    class Headed(nn.Module):
        """Constant hidden states of 3 numbers, and a head with 50 words."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self.head = nn.Parameter(torch.randn(50, 3, generator=generator(seed)))

        def forward(self, state: State, condition: Condition) -> Any:
            return Projection(torch.ones(*state.x.shape, 3), self.head)

    batch = batch_for(variant, 8)
    student = Spy(Headed(1))
    method = make_method(variant, student=student, teacher=Headed(2))
    with Widest(50) as widest:
        only_loss(method, batch).value.backward()
    assert student.states[0].mask is not None
    hidden = int(student.states[0].mask.sum())
    assert 3 < widest.rows <= hidden < batch["student/tokens"].numel()


def test_a_token_that_one_side_cannot_predict_is_left_out_of_the_comparison() -> None:
    batch = make_batch(same=True)
    banned = [0, 1]
    dense = [Network(7, seed) for seed in (1, 2)]
    for model, token in zip(dense, banned, strict=True):
        with torch.no_grad():
            model.own[:, token] = -torch.inf
    method = make_method("shared", family=Texts((0, 1)), student=dense[0], teacher=dense[1])
    loss = only_loss(method, batch)
    assert loss.value.isfinite()
    for model in dense:
        with torch.no_grad():
            model.own[:, banned] = -torch.inf
    without_both = only_loss(method, batch).metrics["distillation"]
    torch.testing.assert_close(loss.metrics["distillation"], without_both)


@pytest.mark.parametrize("variant", VARIANTS)
def test_distillation_is_a_mean_over_the_chunks_of_the_step(variant: str) -> None:
    """Micro-batches with unlike numbers of chunks have the gradient of one batch."""
    batch = batch_for(variant, 4)
    batch["student/maskable"] = batch["student/maskable"].clone()
    batch["student/maskable"][3, 4:] = False
    method = make_method(variant, distillation_weight=5.0)
    parts = [rows_of(batch, [0, 1, 2]), rows_of(batch, [3])]
    sums = [method.counts(part) for part in parts]
    counts = {name: sum(part[name] for part in sums) for name in ("chunks", "tokens")}
    assert counts == method.counts(batch)
    assert sums[0]["chunks"] > 3 * sums[1]["chunks"]
    progress = HALF._replace(counts=counts)
    total = torch.zeros(())
    student: Any = method.student
    for part in parts:
        loss = only_loss(method, part, progress)
        total = total + loss.value * loss.count / counts["tokens"]
    student.zero_grad(set_to_none=True)
    total.backward()
    found = torch.cat([student.own.grad.flatten(), student.context.grad.flatten()])
    torch.testing.assert_close(found, student_gradient(method, batch))

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.methods.bd3lm import BD3LM, BOUND
from diffdistill.projection import Projection
from diffdistill.texts import Format, Reader, Text
from diffdistill.types import Batch, Condition, Loss, Progress, State
from tests.conftest import Spy, rows_of
from tests.test_method_tide import Network

START = Progress(0, 100)
MASK, LENGTH, BLOCK, WORDS = 0, 12, 4, 7


@dataclass
class Texts:
    """Rows of tokens from the batch, in blocks of 4."""

    length: int = LENGTH

    def format(self, *, reader: Reader = "student") -> Format:
        return Format(MASK, BLOCK, self.length)

    def text(self, batch: Batch, *, reader: Reader = "student") -> Text:
        tokens, maskable = batch["tokens"], batch["maskable"]
        return Text(tokens, maskable, torch.full_like(tokens, -1))

    def noised(self, batch: Batch, t: Tensor, mask: Tensor, *, reader: Reader = "student") -> State:
        return State(batch["tokens"].masked_fill(mask, MASK), t, mask)

    def condition(self, batch: Batch, *, reader: Reader = "student", copies: int = 1) -> Condition:
        return {"bias": torch.zeros(len(batch["ids"]), 1)}


class Uniform:
    """Says the same of every word, with a learnable strength for gradients."""

    def __init__(self) -> None:
        self.scale = torch.zeros(WORDS, requires_grad=True)

    def __call__(self, state: State, condition: Condition) -> Tensor:
        return self.scale.expand(*state.x.shape, WORDS)


def make_batch(size: int = 4, *, first_id: int = 0, prompt: int = 2, pad: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, WORDS, (64, LENGTH), generator=rng).repeat(9, 1)
    tokens = torch.nn.functional.pad(tokens[first_id : first_id + size], (0, pad), value=1)
    maskable = (torch.arange(LENGTH + pad) >= prompt) & (torch.arange(LENGTH + pad) < LENGTH)
    return {
        "ids": torch.arange(first_id, first_id + size),
        "tokens": tokens,
        "maskable": maskable.expand(size, -1),
        "prompts": [""] * size,
    }


def make_method(student: Any = None, **options: Any) -> BD3LM:
    settings: dict[str, Any] = {"family": Texts(), "draws": Draws(0)} | options
    return BD3LM(student=student or Uniform(), **settings)


def only_loss(method: BD3LM, batch: Batch, progress: Progress = START) -> Loss:
    (loss,) = method.losses(batch, progress)
    return loss


@pytest.mark.parametrize("levels", ["block", "sequence"])
def test_a_student_that_knows_nothing_is_bounded_by_the_logarithm_of_the_vocabulary(
    levels: Any,
) -> None:
    loss = only_loss(make_method(levels=levels, stratify=512), make_batch(512))
    assert loss.value.item() == pytest.approx(math.log(WORDS), rel=0.04)
    assert loss.metrics["nll_bound"] == loss.value
    assert float(loss.metrics["noise_level"]) == pytest.approx(0.5, abs=0.01)
    assert float(loss.metrics["mask_rate"]) == pytest.approx(0.5, abs=0.02)
    assert loss.count == 512 * 10


def test_the_loss_is_the_weighted_cross_entropy_of_what_is_hidden_and_nothing_else() -> None:
    spy = Spy(Network(WORDS, 1))
    batch = make_batch(3)
    method = make_method(spy)
    loss = only_loss(method, batch)
    state = spy.states[0]
    assert state.mask is not None
    noised = method._noised(batch, method.family.text(batch), BOUND, "mask")
    logs = torch.log_softmax(spy.model(state, spy.conditions[0]), dim=-1)
    total = torch.zeros(())
    for row, place in state.mask.nonzero().tolist():
        assert state.x[row, place] == MASK
        word, t = batch["tokens"][row, place], noised.t[row, place // BLOCK]
        total = total - logs[row, place, word] / t
    torch.testing.assert_close(loss.value, total / batch["maskable"].sum())
    assert not state.mask[:, :2].any()


def test_levels_of_a_sequence_are_shared_by_its_blocks_and_those_of_blocks_are_not() -> None:
    batch = make_batch(4)
    text = Texts().text(batch)
    assert make_method(levels="sequence")._noised(batch, text, BOUND, "mask").t.shape == (4, 1)
    levels = make_method()._noised(batch, text, BOUND, "mask").t
    assert levels.shape == (4, 3)
    assert levels.unique().numel() == 12


@pytest.mark.parametrize("stratify", [0, 1, 8])
def test_levels_fall_evenly_into_as_many_parts_as_samples_are_stratified(stratify: int) -> None:
    batch = make_batch(8)
    t = make_method(stratify=stratify)._noised(batch, Texts().text(batch), (1e-9, 1.0), "mask").t
    parts = (t * 24).floor().flatten().sort().values.tolist()
    assert (parts == list(range(24))) == (stratify == 8)
    per_sample = (t * 3).floor().sort(dim=1).values.tolist()
    assert (per_sample == [[0, 1, 2]] * 8) == (stratify == 1)


def test_uniform_weights_are_the_mean_error_of_hidden_tokens_times_the_mask_rate() -> None:
    loss = only_loss(make_method(weight="uniform"), make_batch(64))
    expected = math.log(WORDS) * float(loss.metrics["mask_rate"])
    assert loss.value.item() == pytest.approx(expected, rel=1e-5)
    assert "nll_bound" not in loss.metrics


def test_a_clipped_interval_hides_that_share_alone_and_is_no_bound() -> None:
    method = make_method(t_low=0.6, t_high=0.8, resample=True)
    batch = make_batch(64, prompt=0)
    text = method.family.text(batch)
    noised = method._noised(batch, text, method.interval, "mask")
    shares = noised.masked.unflatten(1, (3, BLOCK)).float().mean(-1)
    assert ((shares >= 0.6) & (shares <= 0.8)).all()  # 3 of 4 tokens
    assert "nll_bound" not in only_loss(method, batch).metrics


@pytest.mark.parametrize("levels", ["block", "sequence"])
def test_the_noise_of_a_sample_depends_on_neither_its_batch_nor_its_padding(levels: Any) -> None:
    spies = [Spy(Network(WORDS, 1)) for _ in range(3)]
    options: dict[str, Any] = {"levels": levels, "family": Texts(32), "stratify": 4}
    for spy, batch in zip(
        spies, (make_batch(4), rows_of(make_batch(4), [2, 3]), make_batch(4, pad=8)), strict=True
    ):
        only_loss(make_method(spy, **options), batch)
    whole, part, padded = (spy.states[0].x for spy in spies)
    assert torch.equal(part, whole[2:])
    assert torch.equal(padded[:, :LENGTH], whole)


def test_four_samples_at_once_have_the_gradient_of_two_and_two() -> None:
    def gradient(batches: list[Batch]) -> Tensor:
        student = Network(WORDS, 1)
        losses = [only_loss(make_method(student, stratify=4), batch) for batch in batches]
        total = sum(loss.count for loss in losses)
        for loss in losses:
            (loss.value * loss.count / total).backward()
        assert student.own.grad is not None
        return student.own.grad

    batch = dict(make_batch(4))
    batch["maskable"] = batch["maskable"].clone()
    batch["maskable"][3, 5:] = False
    parts = [rows_of(batch, [0, 1]), rows_of(batch, [2, 3])]
    torch.testing.assert_close(gradient([batch]), gradient(parts))


def test_projections_give_the_loss_of_their_logits() -> None:
    dense = Network(WORDS, 1)

    def projected(state: State, condition: Condition) -> Projection:
        return Projection(dense(state, condition), torch.eye(WORDS))

    values = [only_loss(make_method(model), make_batch()).value for model in (dense, projected)]
    torch.testing.assert_close(*values)


def test_rows_with_nothing_to_learn_give_no_loss_and_a_gradient_of_zero() -> None:
    student = Uniform()
    batch = dict(make_batch(2))
    batch["maskable"] = torch.zeros_like(batch["maskable"])
    loss = only_loss(make_method(student), batch)
    loss.value.backward()
    assert loss.value == 0
    assert loss.count == 1
    assert student.scale.grad is None or not student.scale.grad.any()


# the search


def searched(method: BD3LM, size: int = 512) -> dict[str, float]:
    loss = only_loss(method, make_batch(size))
    metrics = {f"{name}/student": float(value) for name, value in loss.metrics.items()}
    method.observe(metrics)
    return metrics


def test_the_search_takes_the_interval_whose_loss_varies_least() -> None:
    """Of a student that knows nothing, the loss of a block is log V times hidden / (4 t)."""
    method = make_method(
        search_every=5, search_widths=[0.4], search_stride=0.3, family=Texts(), stratify=0
    )
    metrics = searched(method)
    labels = ["0.001-1", "0.001-0.4", "0.3-0.7", "0.6-1"]
    found = {
        label: metrics[f"search/{label}^2/student"] - metrics[f"search/{label}/student"] ** 2
        for label in labels
    }
    assert set(metrics) >= {f"search/{label}/student" for label in labels}
    # A block of n maskable tokens has variance E[(1 - t) / t] log(V)^2 / n; of two blocks in
    # three n is 4, of the first it is 2.
    expected = math.log(WORDS) ** 2 * (math.log(1 / 0.6) / 0.4 - 1) * (2 / 4 + 1 / 2) / 3
    assert found["0.6-1"] == pytest.approx(expected, rel=0.15)
    assert min(found, key=found.__getitem__) == "0.6-1"
    assert method.interval == (0.6, 1.0)


def test_the_search_asks_only_in_its_steps_without_graphs_and_the_next_step_uses_its_interval() -> (
    None
):
    spy = Spy(Network(WORDS, 1))
    method = make_method(spy, search_every=5, search_widths=[0.5], search_stride=0.5)
    searched(method, 64)
    assert spy.grad_enabled == [True, False, False, False]
    only_loss(method, make_batch(2), Progress(1, 100))
    assert len(spy.states) == 5
    low, high = method.interval
    loss = only_loss(method, make_batch(64), Progress(2, 100))
    assert (loss.metrics["t_low"], loss.metrics["t_high"]) == (low, high)
    assert low - 0.1 < float(loss.metrics["noise_level"]) < high


def test_a_step_without_a_search_keeps_the_interval_and_a_checkpoint_restores_it() -> None:
    method = make_method(search_every=5)
    method.observe({"denoising/student": 1.0})
    assert method.interval == BOUND
    method.interval = (0.3, 0.8)
    other = make_method(search_every=5)
    other.load_state(method.state())
    assert other.interval == (0.3, 0.8)


def test_the_intervals_tried_are_all_of_those_widths_and_the_whole() -> None:
    found = make_method(search_widths=[0.8, 0.9], search_stride=0.05)._candidates()
    expected = [(0.001, 0.8), (0.05, 0.85), (0.1, 0.9), (0.15, 0.95), (0.2, 1.0)]
    assert found == [BOUND, *expected, (0.001, 0.9), (0.05, 0.95), (0.1, 1.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_low": 0.0}, "low and high"),
        ({"t_low": 0.9, "t_high": 0.5}, "low and high"),
        ({"stratify": -1}, "stratify must be at least 0"),
        ({"search_stride": 0.0}, "search_stride must be above 0"),
        ({"search_widths": [1.5]}, "search_widths in"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(**options)

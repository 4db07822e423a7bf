import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.pipelines.unmasking import (
    Schedule,
    Step,
    Unmasking,
    next_time,
    nucleus,
    propose,
    step_counts,
    suppressed,
    uniform_double,
)
from tests.conftest import randn

WORDS, MASK = 12, 11


def run(
    unmasking: Unmasking,
    logits: Tensor,
    *,
    masked: Tensor | None = None,
    first_id: int = 0,
    seed: int = 0,
) -> list[Step]:
    """Settle a window under a model that always predicts the same logits ``[B, W, V]``."""
    size = logits.shape[:2]
    masked = torch.ones(size, dtype=torch.bool) if masked is None else masked
    tokens = torch.where(masked, MASK, 7)
    ids = torch.arange(first_id, first_id + len(logits))
    return list(
        unmasking.settle(
            lambda x: logits, tokens, masked, Draws(seed), ids, purpose="test", banned=[MASK]
        )
    )


SCHEDULES: tuple[Schedule, ...] = ("low-confidence", "random", "threshold", "first-hitting")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_schedule_settles_each_masked_token_once_and_no_given_one(
    schedule: Schedule, temperature: float
) -> None:
    masked = randn(3, 8, seed=1) > -0.3
    masked[2] = False
    unmasking = Unmasking(schedule=schedule, temperature=temperature)
    steps = run(unmasking, randn(3, 8, WORDS, seed=2), masked=masked)
    times = torch.stack([step.settled for step in steps]).sum(0)
    assert torch.equal(times == 1, masked)
    assert (times <= 1).all()
    last = steps[-1]
    assert not last.masked.any()
    assert (last.tokens[masked] != MASK).all()
    assert (last.tokens[~masked] == 7).all()


def test_most_confident_tokens_settle_first() -> None:
    logits = randn(2, 8, WORDS, seed=3)
    steps = run(Unmasking(num_steps=4), logits)
    confidence = suppressed(logits, [MASK]).softmax(-1).amax(-1)
    order = confidence.argsort(dim=1, descending=True)
    assert len(steps) == 4
    for row in range(2):
        for index, step in enumerate(steps):
            expected = sorted(order[row, 2 * index : 2 * index + 2].tolist())
            assert step.settled[row].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize(("total", "num_steps"), [(7, 3), (8, 4), (3, 5), (32, 32), (0, 2)])
def test_steps_share_tokens_evenly_and_the_first_ones_get_the_rest(
    total: int, num_steps: int
) -> None:
    counts = [int(step_counts(torch.tensor([total]), num_steps, i)) for i in range(num_steps)]
    assert sum(counts) == total
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1


def test_a_threshold_settles_all_above_it_and_else_the_best() -> None:
    probs = torch.tensor([[0.95, 0.5, 0.91, 0.6], [0.3, 0.4, 0.5, 0.6]])
    logits = torch.full((2, 4, 3), -torch.inf)
    logits[..., 0], logits[..., 1] = probs.log(), (1 - probs).log()
    logits = torch.cat([logits, torch.full((2, 4, WORDS - 3), -torch.inf)], -1)
    steps = run(Unmasking(schedule="threshold", threshold=0.9), logits)
    first = [row.nonzero()[:, 0].tolist() for row in steps[0].settled]
    assert first == [[0, 2], [0]]  # confidences of row 1: 0.7, 0.6, 0.5, 0.6


def test_first_hitting_times_are_those_of_sorted_uniform_numbers() -> None:
    steps = run(Unmasking(schedule="first-hitting"), torch.zeros(3000, 4, WORDS))
    times = torch.stack([step.t for step in steps], dim=1)
    assert (times.diff(dim=1) < 0).all()
    expected = torch.tensor([4, 3, 2, 1]) / 5  # means of the order statistics
    torch.testing.assert_close(times.mean(0), expected, rtol=0, atol=0.02)
    spread = torch.tensor([4 * 1, 3 * 2, 2 * 3, 1 * 4]) / (25 * 6)
    torch.testing.assert_close(times.var(0), spread, rtol=0.1, atol=0.0)
    assert next_time(torch.tensor([0.75]), torch.tensor([2])).item() == 0.5


@pytest.mark.parametrize("schedule", ["first-hitting", "random"])
def test_random_schedules_begin_anywhere(schedule: Schedule) -> None:
    logits = randn(1, 4, WORDS, seed=1).expand(2000, 4, WORDS)
    first = run(Unmasking(schedule=schedule), logits)[0].settled
    assert (first.sum(1) == 1).all()
    assert (first.sum(0) - 500).abs().max() < 4 * 500**0.5


def test_the_mask_token_is_never_proposed() -> None:
    logits = torch.zeros(4, 8, WORDS)
    logits[..., MASK] = 20.0
    for temperature in (0.0, 1.0):
        last = run(Unmasking(temperature=temperature), logits)[-1]
        assert (last.tokens != MASK).all()
    assert logits[..., MASK].min() == 20.0  # the model's own logits are left alone


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_proposals_are_distributed_as_the_tempered_softmax(temperature: float) -> None:
    logits = randn(6, seed=4)
    logits[2] = -torch.inf
    numbers = uniform_double(Draws(0), "test", torch.arange(20), 1000)
    tokens, probs = propose(logits.expand(20, 1000, 6), numbers, temperature=temperature)
    expected = (logits.double() / temperature).softmax(-1) * 20000
    counts = tokens.flatten().bincount(minlength=6)
    assert counts[2] == 0
    kept = expected > 0
    assert ((counts - expected).square() / expected)[kept].sum() < 20.5  # 0.999 of chi2(4) is 18.5
    torch.testing.assert_close(probs, logits.softmax(-1)[tokens])


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert nucleus(probs, 0.6).tolist() == pytest.approx([0.0, 0.4, 0.0, 0.3])
    assert nucleus(probs, 0.75).tolist() == pytest.approx([0.0, 0.4, 0.2, 0.3])
    assert nucleus(probs, 1e-9).tolist() == pytest.approx([0.0, 0.4, 0.0, 0.0])
    assert nucleus(probs, 1.0) is probs


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_row_settles_alike_alone_and_in_a_batch(schedule: Schedule) -> None:
    logits, masked = randn(3, 8, WORDS, seed=5), randn(3, 8, seed=6) > -0.5
    unmasking = Unmasking(schedule=schedule, temperature=1.0, top_p=0.9, threshold=0.3)
    batch = run(unmasking, logits, masked=masked)[-1].tokens
    for row in range(3):
        alone = run(unmasking, logits[row : row + 1], masked=masked[row : row + 1], first_id=row)[
            -1
        ].tokens
        assert torch.equal(alone[0], batch[row])
    assert not torch.equal(run(unmasking, logits, masked=masked, seed=1)[-1].tokens, batch)


def test_nothing_masked_asks_nobody() -> None:
    assert run(Unmasking(), randn(1, 4, WORDS, seed=0), masked=torch.zeros(1, 4).bool()) == []


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_settings_without_a_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Unmasking(**wrong)  # type: ignore[arg-type]

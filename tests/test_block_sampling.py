from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.pipelines import block_sampling
from diffdistill.pipelines.block_diffusion import (
    causal_mask,
    denoise,
    lay_out_prompts,
    positions_of,
)
from diffdistill.pipelines.block_sampling import BlockSampler, Past, UncachedSampler
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.projection import dense
from tests.tiny_text import EOS, MASK, NAMES, PAD, causal_lm

CPU = torch.device("cpu")
BLOCK = 4
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [], [8, 9, 10, 11]]
IDS = torch.arange(len(PROMPTS))


def sampler(network: Any, **changes: Any) -> BlockSampler:
    options: dict[str, Any] = {"block": BLOCK, "mask_id": MASK, "pad_id": PAD, "max_tokens": 12}
    return BlockSampler(network=network, **(options | changes))


def sampling(**changes: Any) -> Unmasking:
    return Unmasking(**({"temperature": 1.0, "top_p": 0.9} | changes))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor, Tensor]]:
    """Each noised block that the network was asked: tokens before it, the block, the logits."""
    seen: list[tuple[int, Tensor, Tensor]] = []
    stock = Past.logits

    def logits(past: Past, tokens: Tensor) -> Tensor:
        found = stock(past, tokens)
        seen.append((past.length, tokens, found))
        return found

    monkeypatch.setattr(block_sampling.Past, "logits", logits)
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_on_the_cache_equal_those_of_training_and_of_encoding_all_again(
    name: str, attention: str, calls: list[tuple[int, Tensor, Tensor]]
) -> None:
    network = causal_lm(name, attention=attention)
    unmasking = sampling(num_steps=2)
    answers = torch.stack(sampler(network, unmasking=unmasking).sample(PROMPTS, Draws(0), IDS))
    prompts, pads = lay_out_prompts(PROMPTS, block=BLOCK, pad_id=PAD, device=CPU)
    clean = torch.cat([prompts, answers], 1)
    assert len(calls) == 6
    for length, tokens, logits in calls:
        stop = length + BLOCK
        noised = clean.clone()
        noised[:, length:stop] = tokens
        with torch.no_grad():
            trained = dense(denoise(network, noised, clean, block=BLOCK, pads=pads))
            again = network(
                noised[:, :stop],
                attention_mask=causal_mask(pads, 0, stop, BLOCK, attention=attention),
                position_ids=positions_of(pads, 0, stop),
            ).logits
        torch.testing.assert_close(logits, trained[:, length:stop], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, again[:, length:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["low-confidence", "random", "threshold", "first-hitting"])
def test_a_row_gets_the_same_text_alone_and_in_a_batch(schedule: str) -> None:
    network = causal_lm()
    own = sampler(network, eos_ids=[EOS, 3], unmasking=sampling(schedule=schedule, threshold=0.4))
    # Not the empty one: all its positions are equally confident, and rounding decides.
    prompts = [prompt or [12] for prompt in PROMPTS]
    batch = own.sample(prompts, Draws(0), IDS)
    for row, prompt in enumerate(prompts):
        [alone] = own.sample([prompt], Draws(0), IDS[row : row + 1])
        assert torch.equal(alone, batch[row])
    again = own.sample(prompts, Draws(1), IDS)
    assert any(not torch.equal(one, two) for one, two in zip(batch, again, strict=True))


def test_a_batch_with_longer_prompts_changes_nothing_greedily_either() -> None:
    own = sampler(causal_lm())
    long = [[1, 2], [5] * 30]
    [alone] = own.sample(long[:1], Draws(0), IDS[:1])
    assert torch.equal(own.sample(long, Draws(0), IDS[:2])[0], alone)


def test_answers_end_after_the_block_with_an_end_token() -> None:
    network, ends = causal_lm(), [3, 5, 9]
    endless = sampler(network, unmasking=sampling()).sample(PROMPTS, Draws(3), IDS)
    ended = sampler(network, unmasking=sampling(), eos_ids=ends)
    answers = ended.sample(PROMPTS, Draws(3), IDS)
    lengths = set()
    for answer, full in zip(answers, endless, strict=True):
        places = torch.isin(full, torch.tensor(ends)).nonzero()[:, 0].tolist()
        expected = full[: places[0] + 1] if places else full
        lengths.add(len(expected))
        assert torch.equal(answer, expected)
    assert len(lengths) > 1
    events = list(ended.stream(PROMPTS, Draws(3), IDS))
    for before, after in pairwise(events):
        going = ~torch.isin(before.tokens, torch.tensor(ends)).any(1)
        assert after.rows.tolist() == before.rows[going].tolist()


def test_given_tokens_stay_and_steer_their_own_block_and_later_ones_only() -> None:
    network = causal_lm()
    own = sampler(network, unmasking=sampling(), eos_ids=[3, 5, 9])
    plain = sampler(network, unmasking=sampling()).sample(PROMPTS, Draws(0), IDS)
    canvas = torch.full((4, 10), MASK)
    canvas[:, 5], canvas[:, 9] = 20, 21
    filled = own.sample(PROMPTS, Draws(0), IDS, canvas=canvas)
    for answer, free in zip(filled, plain, strict=True):
        assert len(answer) == 10  # given tokens follow, so no end token ends it
        assert answer[5] == 20
        assert answer[9] == 21
        assert not (answer == MASK).any()
        assert torch.equal(answer[:4], free[:4])
    assert any(not torch.equal(a[4:], f[4:10]) for a, f in zip(filled, plain, strict=True))
    nothing = own.sample(PROMPTS, Draws(0), IDS, canvas=torch.full((4, 12), MASK))
    expected = own.sample(PROMPTS, Draws(0), IDS)
    assert all(torch.equal(a, b) for a, b in zip(nothing, expected, strict=True))


def test_a_block_that_is_given_asks_nothing(calls: list[tuple[int, Tensor, Tensor]]) -> None:
    canvas = torch.full((1, 8), MASK)
    canvas[0, :4] = 7
    [answer] = sampler(causal_lm()).sample([[1]], Draws(0), IDS[:1], canvas=canvas)
    assert answer[:4].tolist() == [7] * 4
    assert {length for length, _, _ in calls} == {8}


def test_blocks_appear_as_they_settle() -> None:
    own = sampler(causal_lm(), unmasking=sampling(num_steps=2))
    events = list(own.stream(PROMPTS, Draws(0), IDS, every_step=True))
    assert [event.block for event in events] == [0] * 3 + [1] * 3 + [2] * 3
    assert [event.step is None for event in events] == [False, False, True] * 3
    for first, second, done in zip(events[::3], events[1::3], events[2::3], strict=True):
        assert ((first.tokens == MASK).sum(1) == 2).all()
        assert torch.equal(second.tokens, done.tokens)
        settled = first.tokens != MASK
        assert torch.equal(first.tokens[settled], done.tokens[settled])
    blocks = [event.tokens for event in own.stream(PROMPTS, Draws(0), IDS)]
    assert torch.equal(torch.cat(blocks, 1), torch.stack(own.sample(PROMPTS, Draws(0), IDS)))


def test_a_noised_block_leaves_nothing_in_the_cache() -> None:
    past = Past(causal_lm(), BLOCK, torch.zeros(1, dtype=torch.long), "sdpa")
    with torch.no_grad():
        past.append(torch.full((1, 8), 5))
        before = past.cache.layers[0].keys.clone()
        past.logits(torch.full((1, BLOCK), MASK))
        assert torch.equal(past.cache.layers[0].keys, before)
        past.append(torch.full((1, BLOCK), 6))
    assert past.cache.get_seq_length() == past.length == 12


def test_guidance_moves_the_logits_from_the_negative_prompt(
    calls: list[tuple[int, Tensor, Tensor]],
) -> None:
    network = causal_lm()
    prompts, negatives = PROMPTS[:2], [[30], [31, 32, 33, 34, 35]]
    own = sampler(network, guidance=2.5, max_tokens=BLOCK, unmasking=Unmasking(num_steps=1))
    [event] = own.stream(prompts, Draws(0), IDS[:2], negatives=negatives)
    alone = []
    for side in (prompts, negatives):
        tokens, pads = lay_out_prompts(side, block=BLOCK, pad_id=PAD, device=CPU)
        past = Past(network, BLOCK, pads, "sdpa")
        with torch.no_grad():
            past.append(tokens)
            alone.append(past.logits(torch.full((2, BLOCK), MASK)))
    expected = alone[1] + 2.5 * (alone[0] - alone[1])
    expected[..., MASK] = -torch.inf
    assert torch.equal(event.tokens, expected.argmax(-1))
    torch.testing.assert_close(calls[0][2], torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_guidance_away_from_the_prompt_itself_changes_nothing() -> None:
    network = causal_lm()
    plain = sampler(network).sample(PROMPTS, Draws(0), IDS)
    own = sampler(network, guidance=3.0)
    same = own.sample(PROMPTS, Draws(0), IDS, negatives=PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    default = own.sample(PROMPTS, Draws(0), IDS)
    masked = own.sample(PROMPTS, Draws(0), IDS, negatives=[[MASK] * len(p) for p in PROMPTS])
    assert all(torch.equal(a, b) for a, b in zip(default, masked, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain, default, strict=True))


def test_guided_rows_that_end_leave_the_others_as_they_were() -> None:
    network, ends = causal_lm(), [3, 5, 9]
    options: dict[str, Any] = {"guidance": 1.5, "eos_ids": ends, "unmasking": sampling()}
    own = sampler(network, **options)
    batch = own.sample(PROMPTS, Draws(3), IDS)
    assert len({len(answer) for answer in batch}) > 1
    for row, prompt in enumerate(PROMPTS):
        [alone] = own.sample([prompt], Draws(3), IDS[row : row + 1])
        assert torch.equal(alone, batch[row])


def test_a_network_with_flex_attention_samples_with_sdpa() -> None:
    network = causal_lm()
    expected = sampler(network).sample(PROMPTS, Draws(0), IDS)
    network.set_attn_implementation("flex_attention")
    found = sampler(network).sample(PROMPTS, Draws(0), IDS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert network.config._attn_implementation == "flex_attention"


def test_sampling_records_no_graph() -> None:
    network = causal_lm()
    [event, *_] = sampler(network).stream([[1]], Draws(0), IDS[:1], every_step=True)
    assert event.step is not None
    assert not event.step.confidence.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_without_a_cache_the_same_is_sampled(
    guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = causal_lm()
    options: dict[str, Any] = {"eos_ids": [3, 5, 9], "unmasking": sampling(), "guidance": guidance}
    expected = sampler(network, **options).sample(PROMPTS, Draws(1), IDS)
    options |= {"block": BLOCK, "mask_id": MASK, "pad_id": PAD, "max_tokens": 12}
    own = UncachedSampler(network=network, **options)
    given: list[Any] = []
    stock = network.model.forward

    def forward(**kwargs: Any) -> Any:
        given.append((kwargs["use_cache"], len(kwargs)))
        return stock(**kwargs)

    monkeypatch.setattr(network.model, "forward", forward)
    found = own.sample(PROMPTS, Draws(1), IDS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert set(given) == {(False, 4)}  # tokens, mask, positions, and no cache

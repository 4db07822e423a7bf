from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.pipelines.block_sampling import BlockSampler
from diffdistill.pipelines.masked_sampling import MaskedSampler, denoise_all, shifted_right
from diffdistill.pipelines.unmasking import Schedule, Unmasking
from diffdistill.projection import dense
from tests.tiny_text import MASK, NAMES, PAD, causal_lm

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
IDS = torch.arange(len(PROMPTS))


def sampler(network: Any, **changes: Any) -> MaskedSampler:
    options: dict[str, Any] = {"mask_id": MASK, "pad_id": PAD, "max_tokens": 8}
    return MaskedSampler(network=network, **(options | changes))


def ask(network: Any, tokens: list[int]) -> Tensor:
    """Logits of one row that sees all of itself, without any of our code."""
    mask = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool)
    with torch.no_grad():
        logits: Tensor = network(torch.tensor([tokens]), attention_mask=mask).logits
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_predicts_what_it_does_alone(name: str, attention: str) -> None:
    tokens = [3, MASK, 5, MASK]
    expected = ask(causal_lm(name), tokens)
    padded = torch.tensor([[PAD, PAD, *tokens], [1, 2, 3, 4, 5, 6], [PAD, *tokens, PAD]])
    network = causal_lm(name, attention=attention)
    with torch.no_grad():
        found = dense(denoise_all(network, padded, padding=padded == PAD))
    assert found.isfinite().all()
    torch.testing.assert_close(found[:1, 2:], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2:, 1:-1], expected, rtol=1e-5, atol=1e-5)


def test_a_network_without_a_mask_sees_in_both_directions_as_its_config_says() -> None:
    network, tokens = causal_lm(), [3, MASK, 5, MASK]
    with torch.no_grad():
        found = network(torch.tensor([tokens])).logits
    torch.testing.assert_close(found, ask(network, tokens), rtol=1e-5, atol=1e-5)


def test_dreams_shift_moves_predictions_one_place_later() -> None:
    network, tokens = causal_lm(), [3, MASK, 5, MASK]
    with torch.no_grad():
        found = dense(denoise_all(network, torch.tensor([tokens]), shift=True))
    own = ask(network, tokens)
    torch.testing.assert_close(found[:, 1:], own[:, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 0], own[:, 0], rtol=1e-5, atol=1e-5)
    values = torch.arange(4).repeat(2, 1)[..., None]
    padding = torch.tensor([[False] * 4, [True] * 2 + [False] * 2])
    shifted = shifted_right(values, padding)[..., 0]
    assert shifted[0].tolist() == [0, 0, 1, 2]
    assert shifted[1, 2:].tolist() == [2, 2]  # the first token after the padding, and its output


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block", [None, 4])
def test_greedy_sampling_equals_a_loop_written_by_hand(shift: bool, block: int | None) -> None:
    network = causal_lm()
    own = sampler(network, shift=shift, block=block)
    for prompt, found in zip(PROMPTS, own.sample(PROMPTS, Draws(0), IDS), strict=True):
        row = prompt + [MASK] * 8
        for index in range(8):
            logits = ask(network, row)[0]
            logits = torch.cat([logits[:1], logits[:-1]]) if shift else logits
            logits[:, MASK] = -torch.inf
            best, token = logits.softmax(-1).max(-1)
            end = len(row) if block is None else len(prompt) + (index // block + 1) * block
            places = [i for i in range(end) if row[i] == MASK]
            place = max(places, key=lambda i: best[i])
            row[place] = int(token[place])
        assert found.tolist() == row[len(prompt) :]


@pytest.mark.parametrize("schedule", ["low-confidence", "random", "threshold", "first-hitting"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_row_gets_the_same_text_alone_and_in_a_batch(schedule: Schedule, guidance: float) -> None:
    unmasking = Unmasking(schedule=schedule, temperature=1.0, threshold=0.3, top_p=0.95)
    own = sampler(
        causal_lm(), unmasking=unmasking, guidance=guidance, block=4, eos_ids=[3, 5, 9, 12]
    )
    batch = own.sample(PROMPTS, Draws(2), IDS)
    for row, prompt in enumerate(PROMPTS):
        [alone] = own.sample([prompt], Draws(2), IDS[row : row + 1])
        assert torch.equal(alone, batch[row])


def test_one_block_without_a_past_is_what_block_diffusion_samples() -> None:
    network = causal_lm()
    blocks = BlockSampler(network=network, block=12, mask_id=MASK, pad_id=PAD, max_tokens=8)
    canvas = torch.full((1, 12), MASK)
    canvas[0, :4] = torch.tensor([8, 9, 10, 11])
    [one] = blocks.sample([[]], Draws(0), IDS[:1], canvas=canvas)
    [other] = sampler(network).sample([[8, 9, 10, 11]], Draws(0), IDS[:1])
    assert torch.equal(one[4:], other)


def test_given_tokens_stay_and_are_seen_from_everywhere() -> None:
    network = causal_lm()
    canvas = torch.full((3, 8), MASK)
    canvas[:, 7] = 20
    own = sampler(network, block=4, eos_ids=[3, 5])
    filled = torch.stack(own.sample(PROMPTS, Draws(0), IDS, canvas=canvas))
    assert (filled[:, 7] == 20).all()
    assert not (filled == MASK).any()
    assert (canvas[:, :7] == MASK).all()
    free = torch.stack(sampler(network, block=4).sample(PROMPTS, Draws(0), IDS))
    assert not torch.equal(filled[:, :4], free[:, :4])


def test_rows_end_at_an_end_token() -> None:
    network, ends = causal_lm(), [3, 5, 9, 12]
    unmasking = Unmasking(temperature=1.0)
    free = sampler(network, block=4, unmasking=unmasking).sample(PROMPTS, Draws(2), IDS)
    ended = sampler(network, block=4, unmasking=unmasking, eos_ids=ends)
    for answer, full in zip(ended.sample(PROMPTS, Draws(2), IDS), free, strict=True):
        places = [i for i, token in enumerate(full.tolist()) if token in ends]
        assert answer.tolist() == full.tolist()[: places[0] + 1 if places else None]


def test_steps_can_be_watched() -> None:
    own = sampler(causal_lm(), unmasking=Unmasking(num_steps=4))
    events = list(own.stream(PROMPTS, Draws(0), IDS, every_step=True))
    left = [int((event.tokens[0] == MASK).sum()) for event in events]
    assert left == [6, 4, 2, 0, 0]
    assert events[-1].step is None


def test_guidance_moves_the_logits_from_the_masked_prompt() -> None:
    network, prompt = causal_lm(), [1, 2, 3]
    own = sampler(network, guidance=3.0, max_tokens=4, unmasking=Unmasking(num_steps=1))
    [found] = own.sample([prompt], Draws(0), IDS[:1])
    positive = ask(network, prompt + [MASK] * 4)[0, 3:]
    negative = ask(network, [MASK] * 7)[0, 3:]
    expected = negative + 3.0 * (positive - negative)
    expected[:, MASK] = -torch.inf
    assert found.tolist() == expected.argmax(-1).tolist()

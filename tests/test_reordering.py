from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from diffdistill.caches import cache_argument
from diffdistill.draws import Draws
from diffdistill.pipelines.reordering import (
    ReorderedSampler,
    denoise_reordered,
    in_order,
    known_first,
    reordered_mask,
)
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.projection import dense
from tests.tiny_text import MASK, NAMES, PAD, causal_lm

BLOCK = 4
ROW = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
HIDDEN = [3, 4, 6, 8, 9, 10, 11]
"""Places of ROW that are masked: the end of the first block, some of the second, all the third."""

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [], [8, 9, 10, 11]]
IDS = torch.arange(len(PROMPTS))


def hidden_row() -> Tensor:
    noised = torch.tensor([ROW])
    noised[0, HIDDEN] = MASK
    return noised


def denoise(network: Any, noised: Tensor, clean: Tensor, **changes: Any) -> Tensor:
    options: dict[str, Any] = {"block": BLOCK, "mask_id": MASK}
    with torch.no_grad():
        return dense(denoise_reordered(network, noised, clean, **(options | changes)))


def ask_in_turn(network: Any, tokens: list[int], positions: list[int]) -> Tensor:
    """Logits ``[n, V]`` of a causal LM that is given one token after the other, on its cache.

    Without a mask, and without any of our code.
    """
    cache, found = DynamicCache(), []
    for token, position in zip(tokens, positions, strict=True):
        with torch.no_grad():
            output = network(
                torch.tensor([[token]]),
                position_ids=torch.tensor([[position]]),
                use_cache=True,
                **{cache_argument(network.model): cache},
            )
        found.append(output.logits[0, -1])
    return torch.stack(found)


def test_a_block_is_called_known_tokens_first() -> None:
    masked = hidden_row() == MASK
    assert known_first(masked, BLOCK).tolist() == [[0, 1, 2, 3, 5, 7, 4, 6, 8, 9, 10, 11]]


def test_an_order_and_its_inverse_are_none() -> None:
    values = torch.randn(2, 12, 3)
    order = known_first(torch.rand(2, 12) < 0.5, BLOCK)
    assert torch.equal(in_order(in_order(values, order), order.argsort(1)), values)
    assert torch.equal(in_order(values, order)[1, 2], values[1, order[1, 2]])


@pytest.mark.parametrize("pads", [[0], [2, 5]])
def test_the_mask_is_that_of_its_description(pads: list[int]) -> None:
    length = 8
    found = reordered_mask(length, BLOCK, pads=torch.tensor(pads), dtype=torch.float32)
    for row, left in enumerate(pads):
        for query in range(2 * length):
            for key in range(2 * length):
                q, k = query % length, key % length
                if key < length and query < length:
                    expected = k <= q  # clean tokens are causal
                elif key < length:
                    expected = k // BLOCK < q // BLOCK  # noised ones see clean blocks before
                elif query < length:
                    expected = False  # nobody clean sees anything noised
                else:
                    expected = k // BLOCK == q // BLOCK and k <= q
                expected = (expected and k >= left) or query == key
                assert bool(found[row, 0, query, key]) == expected


def test_additive_and_bool_masks_say_the_same() -> None:
    options: dict[str, Any] = {"pads": torch.tensor([1]), "dtype": torch.bfloat16}
    allowed = reordered_mask(8, BLOCK, **options)
    added = reordered_mask(8, BLOCK, attention="eager", **options)
    assert torch.equal(added == 0, allowed)
    assert (added[~allowed] == torch.finfo(torch.bfloat16).min).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_masked_token_is_predicted_as_by_the_causal_lm_that_reads_all_before_in_turn(
    name: str, attention: str
) -> None:
    network = causal_lm(name, is_causal=True, attention=attention)
    found = denoise(network, hidden_row(), torch.tensor([ROW]))
    for start in range(0, len(ROW), BLOCK):
        places = range(start, start + BLOCK)
        known = [place for place in range(start + BLOCK) if place not in HIDDEN or place < start]
        masked = [place for place in places if place in HIDDEN]
        tokens = [ROW[place] for place in known] + [MASK] * len(masked)
        expected = ask_in_turn(network, tokens, known + masked)[len(known) :]
        torch.testing.assert_close(found[0, masked], expected, rtol=1e-4, atol=1e-5)


def test_an_earlier_masked_token_is_seen_as_a_mask_and_a_later_one_is_not_seen() -> None:
    network, clean = causal_lm(), torch.tensor([ROW])
    noised = hidden_row()
    alone = noised.clone()
    alone[0, 11] = ROW[11]  # the last of the third block is known
    found, other = denoise(network, noised, clean), denoise(network, alone, clean)
    assert torch.allclose(found[:, :8], other[:, :8], atol=1e-5)
    assert not torch.allclose(found[:, 8], other[:, 8], atol=1e-3)
    changed = clean.clone()
    changed[0, HIDDEN[-4:]] = 20  # what is hidden in the last block
    torch.testing.assert_close(denoise(network, noised, changed), found, rtol=1e-5, atol=1e-5)


def test_where_the_known_tokens_of_a_prompt_are_cut_into_blocks_makes_no_difference() -> None:
    """A causal LM that reads a prompt and then masks does not know where a block began."""
    network, clean = causal_lm(), torch.tensor([ROW])
    noised = clean.clone()
    noised[0, 6:] = MASK
    whole = denoise(network, noised, clean, block=12)
    cut = denoise(network, noised, clean, block=6)
    torch.testing.assert_close(whole[:, 6:], cut[:, 6:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_not_seen_and_never_nan(attention: str, dtype: torch.dtype) -> None:
    network = causal_lm(attention=attention).to(dtype)
    noised, clean = hidden_row()[:, 4:], torch.tensor([ROW[4:]])
    expected = denoise(network, noised, clean)
    longer = [torch.cat([torch.full((1, 4), PAD), row], 1) for row in (noised, clean)]
    found = denoise(network, longer[0], longer[1], pads=torch.tensor([4]))
    assert found.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found[:, 4:], expected, rtol=tolerance, atol=tolerance)


def test_a_gradient_reaches_what_a_masked_token_sees_and_nothing_else() -> None:
    network = causal_lm(tie_word_embeddings=False)
    found = denoise_reordered(network, hidden_row(), torch.tensor([ROW]), block=BLOCK, mask_id=MASK)
    dense(found)[0, 6].logsumexp(-1).backward()
    reached = network.get_input_embeddings().weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    # place 6 sees the clean first block, what is known of its own (tokens 6 and 8), and masks
    assert reached == [1, 2, 3, 4, 6, 8, MASK]


def sampler(network: Any, **changes: Any) -> ReorderedSampler:
    options: dict[str, Any] = {"block": BLOCK, "mask_id": MASK, "pad_id": PAD, "max_tokens": 8}
    return ReorderedSampler(network=network, **(options | changes))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_sampling_equals_a_loop_written_by_hand(name: str) -> None:
    """The loop of WeDLM's ``generate_wedlm``: all known tokens, then the masks, without a cache."""
    network = causal_lm(name, is_causal=True)
    for prompt, found in zip(PROMPTS, sampler(network).sample(PROMPTS, Draws(0), IDS), strict=True):
        row = list(prompt)
        for _ in range(2):
            row += [MASK] * BLOCK
            while MASK in row:
                known = [i for i, token in enumerate(row) if token != MASK]
                masked = [i for i, token in enumerate(row) if token == MASK]
                order = known + masked
                with torch.no_grad():
                    logits = network(
                        torch.tensor([[row[i] for i in order]]), position_ids=torch.tensor([order])
                    ).logits[0, len(known) :]
                logits[:, MASK] = -torch.inf
                best, token = logits.softmax(-1).max(-1)
                place = int(best.argmax())
                row[masked[place]] = int(token[place])
        assert found.tolist() == row[len(prompt) :]


def test_a_row_gets_the_same_text_alone_and_in_a_batch() -> None:
    own = sampler(
        causal_lm(), unmasking=Unmasking(temperature=1.0, num_steps=2), guidance=2.0, eos_ids=[3, 5]
    )
    batch = own.sample(PROMPTS, Draws(2), IDS)
    for row, prompt in enumerate(PROMPTS):
        [alone] = own.sample([prompt], Draws(2), IDS[row : row + 1])
        assert torch.equal(alone, batch[row])

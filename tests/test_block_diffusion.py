from itertools import product
from math import factorial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import DynamicCache

from diffdistill.caches import cache_argument
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.noising import MaskNoise, likelihood_bound, nelbo
from diffdistill.pipelines.block_diffusion import (
    Attention,
    Order,
    attention_of,
    causal_mask,
    chat_tokens,
    clean_logprob,
    denoise,
    dense_attention,
    full_mask,
    lay_out_prompts,
    positions_of,
    project,
    training_mask,
)
from diffdistill.projection import dense
from tests.tiny import tokenizer
from tests.tiny_text import MASK, NAMES, PAD, causal_lm

ORDERS: tuple[Order, ...] = ("noised-clean", "clean-noised")


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(30, shape, generator=torch.Generator().manual_seed(seed))


def noised_of(clean: Tensor, seed: int = 5) -> Tensor:
    hidden = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(hidden, MASK, clean)


def table(length: int, block: int, order: Order, pads: list[int]) -> Tensor:
    """The mask as three rules of the paper, in loops."""
    allowed = torch.zeros(len(pads), 2 * length, 2 * length, dtype=torch.bool)
    for row, q, k in product(range(len(pads)), range(2 * length), range(2 * length)):
        clean_q, clean_k = [(i >= length) == (order == "noised-clean") for i in (q, k)]
        block_q, block_k = q % length // block, k % length // block
        diagonal = block_q == block_k and clean_q == clean_k
        offset = block_q > block_k and clean_k and not clean_q
        causal = block_q >= block_k and clean_k and clean_q
        shown = k % length >= pads[row] or q == k
        allowed[row, q, k] = (diagonal or offset or causal) and shown
    return allowed


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pads", [[0], [0, 2, 1]])
@pytest.mark.parametrize(("length", "block"), [(8, 4), (6, 3), (5, 1), (10, 4), (4, 4)])
def test_the_training_mask_is_the_three_rules_of_the_paper(
    length: int, block: int, pads: list[int], order: Order
) -> None:
    pads = [min(pad, block - 1) for pad in pads]
    given = torch.tensor(pads)
    expected = table(length, block, order, pads)
    if not any(pads):
        expected = expected[:1]
    mask = training_mask(length, block, pads=given, order=order)
    assert torch.equal(mask[:, 0], expected)
    added = training_mask(length, block, pads=given, order=order, attention="eager")
    assert torch.equal(added[:, 0] == 0, expected)
    assert (added[:, 0][~expected] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pads", [[0], [0, 5, 3]])
@pytest.mark.parametrize("block", [8, 24])
def test_flex_attention_is_given_the_same_rules(block: int, pads: list[int], order: Order) -> None:
    flex = training_mask(
        64, block, pads=torch.tensor(pads), order=order, attention="flex_attention"
    )
    assert isinstance(flex, BlockMask)
    found = create_mask(flex.mask_mod, len(pads), 1, 128, 128, "cpu")[:, 0]
    assert torch.equal(found, table(64, block, order, pads))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pads", [None, [0, 7]])
def test_flex_attention_with_the_block_mask_equals_sdpa(pads: list[int] | None) -> None:
    length, block = 192, 32  # more than one tile of 128
    given = None if pads is None else torch.tensor(pads)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 2 * length, 8, generator=rng) for _ in range(3))
    flex = training_mask(length, block, pads=given, attention="flex_attention")
    assert isinstance(flex, BlockMask)
    assert flex.sparsity() > 0
    found = torch.nn.attention.flex_attention.flex_attention(q, k, v, block_mask=flex)
    mask = training_mask(length, block, pads=given)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_masks_without_padding_are_made_once() -> None:
    options: dict[str, Any] = {"attention": "flex_attention"}
    first = training_mask(64, 4, **options)
    assert training_mask(64, 4, pads=torch.tensor([0, 0]), **options) is first
    assert training_mask(64, 6, **options) is not first
    assert training_mask(12, 4) is training_mask(12, 4)


def test_a_causal_mask_of_a_part_is_a_part_of_the_mask_of_all() -> None:
    pads = torch.tensor([0, 3, 5])
    whole = causal_mask(pads, 0, 12, 4)
    for start, stop in ((0, 8), (8, 12), (4, 8)):
        part = causal_mask(pads, start, stop, 4)
        assert torch.equal(part, whole[:, :, start:stop, :stop])
    both = training_mask(12, 4, pads=torch.tensor([0, 3, 1]))
    assert torch.equal(both[:, :, 12:, 12:], causal_mask(torch.tensor([0, 3, 1]), 0, 12, 4))


def test_the_full_mask_hides_padding_only() -> None:
    mask = full_mask(torch.tensor([0, 2]), 4)[:, 0]
    assert mask[0].all()
    assert mask[1, 2:, 2:].all()
    assert not mask[1, 2:, :2].any()
    assert torch.equal(mask[1, :2, :2], torch.eye(2, dtype=torch.bool))


def test_prompts_of_a_batch_end_at_the_same_block_boundary() -> None:
    tokens, pads = lay_out_prompts(
        [[1, 2, 3, 4, 5], [6], []], block=4, pad_id=PAD, device=torch.device("cpu")
    )
    assert tokens.tolist() == [[PAD] * 3 + [1, 2, 3, 4, 5], [PAD] * 7 + [6], [PAD] * 8]
    assert pads.tolist() == [3, 7, 8]
    assert positions_of(pads, 0, 8)[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert positions_of(pads, 8, 10).tolist() == [[5, 6], [1, 2], [0, 1]]


@pytest.mark.parametrize("name", NAMES)
def test_both_orders_predict_the_same_and_as_each_block_alone_does(name: str) -> None:
    network, block = causal_lm(name), 4
    clean = ids(2, 12)
    noised = noised_of(clean)
    with torch.no_grad():
        first, other = (
            dense(denoise(network, noised, clean, block=block, order=order)) for order in ORDERS
        )
        torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-5)
        none = torch.zeros(2, dtype=torch.long)
        for start in range(0, 12, block):
            stop = start + block
            tokens = torch.cat([clean[:, :start], noised[:, start:stop]], 1)
            mask = causal_mask(none, 0, stop, block)
            alone = network(tokens, attention_mask=mask, position_ids=positions_of(none, 0, stop))
            torch.testing.assert_close(
                alone.logits[:, start:], first[:, start:stop], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_with_padding_predicts_what_it_does_without(attention: Attention) -> None:
    """The oracle is the unpadded row with a mask written by hand, of a first block of 2."""
    network = causal_lm(attention=attention)
    clean = ids(1, 10)
    noised = torch.cat([clean[:, :2], noised_of(clean)[:, 2:]], 1)
    padded = [torch.cat([torch.full((1, 2), PAD), x], 1) for x in (noised, clean)]
    with torch.no_grad():
        found = dense(denoise(network, *padded, block=4, pads=torch.tensor([2])))[:, 2:]
        blocks = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2]).repeat(2)
        is_noised = torch.arange(20) < 10
        q, k = blocks[:, None], blocks[None]
        same = (q == k) & (is_noised[:, None] == is_noised)
        allowed = same | ((k < q) & ~is_noised)
        positions = torch.arange(10).repeat(2)[None]
        network.set_attn_implementation("sdpa")
        expected = network(
            torch.cat([noised, clean], 1), attention_mask=allowed[None, None],
            position_ids=positions,
        ).logits[:, :10]  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_eager_and_sdpa_agree_and_no_padding_makes_them_nan(name: str) -> None:
    clean = ids(3, 8)
    noised = noised_of(clean)
    pads = torch.tensor([0, 3, 2])
    logits, gradients = [], []
    for attention in ("sdpa", "eager"):
        network = causal_lm(name, attention=attention)
        found = dense(denoise(network, noised, clean, block=4, pads=pads))
        found.square().mean().backward()
        logits.append(found.detach())
        gradients.append(network.get_input_embeddings().weight.grad)
    assert logits[0].isfinite().all()
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_a_bool_mask_under_eager_would_be_wrong_without_a_word() -> None:
    """Why the mask's form follows the network's attention."""
    network = causal_lm(attention="eager")
    clean = ids(1, 8)
    both = torch.cat([noised_of(clean), clean], 1)
    positions = torch.arange(8).repeat(2)[None]
    with torch.no_grad():
        wrong = network(both, attention_mask=training_mask(8, 4), position_ids=positions).logits
        right = dense(denoise(network, both[:, :8], clean, block=4))
    assert wrong.isfinite().all()
    assert not torch.allclose(wrong[:, :8], right, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_projection_is_the_networks_own_prediction(name: str) -> None:
    network = causal_lm(name)
    tokens, none = ids(2, 6), torch.zeros(2, dtype=torch.long)
    mask, positions = full_mask(none, 6), positions_of(none, 0, 6)
    with torch.no_grad():
        found = dense(project(network, tokens, mask, positions))
        expected = network(tokens, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found, expected)


def test_the_likelihood_bound_of_a_network_is_the_sum_over_all_masks() -> None:
    """Oracle: every mask of every block, with its weight in the integral over noise levels."""
    network, clean, block = causal_lm(), ids(1, 6), 2
    none, expected = torch.zeros(1, dtype=torch.long), 0.0
    for start in range(2, 6, block):
        stop = start + block
        for chosen in ([start], [start + 1], [start, start + 1]):
            tokens = clean[:, :stop].clone()
            tokens[:, chosen] = MASK
            mask = causal_mask(none, 0, stop, block)
            with torch.no_grad():
                logits = network(tokens, attention_mask=mask).logits[0]
            logits[:, MASK] = -torch.inf
            losses = -logits.log_softmax(-1)[chosen, clean[0, chosen]]
            integral = factorial(len(chosen) - 1) * factorial(block - len(chosen)) / factorial(2)
            expected += integral * losses.sum().item()
    rows = 40
    clean, numbers = clean.expand(rows, 6), torch.arange(rows)
    maskable = (torch.arange(6) >= 2).expand(rows, 6)
    logprob = clean_logprob(network, clean, block=block, mask_id=MASK)
    found = likelihood_bound(
        logprob, clean, maskable, Draws(0), numbers, mask_id=MASK, block=block, num_draws=10
    )
    noise = MaskNoise(mask_id=MASK, block=block)
    rough = nelbo(logprob, clean, maskable, Draws(0), numbers, noise=noise, num_draws=20)
    for estimate in (found, rough):
        mean, error = estimate.per_token()
        assert mean * 4 == pytest.approx(expected, abs=4 * 4 * error)
        assert error * 4 < 0.05 * expected


@pytest.mark.slow
def test_a_network_with_flex_attention_predicts_what_it_does_with_sdpa() -> None:
    clean = ids(2, 64)
    noised, pads = noised_of(clean), torch.tensor([0, 2])
    logits = []
    for attention in ("sdpa", "flex_attention"):
        network = causal_lm(attention=attention, head_dim=16)
        with torch.no_grad():
            logits.append(dense(denoise(network, noised, clean, block=4, pads=pads)))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_given_is_always_appended_to() -> None:
    """Why sampling drops a noised block's entries itself."""
    network, cache = causal_lm(), DynamicCache()
    none = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        project(network, ids(1, 4), full_mask(none, 4), positions_of(none, 0, 4), cache)
        assert cache.get_seq_length() == 4
        given = {cache_argument(network.base_model): cache}
        network(ids(1, 4), use_cache=False, **given)
        assert cache.get_seq_length() == 8
        with pytest.raises(ValueError, match="positive"):
            cache.crop(4)
        cache.crop(-4)
    assert cache.get_seq_length() == 4


def test_flex_attention_is_not_trained_on_the_cpu_but_gives_way_to_sdpa_in_sampling() -> None:
    network = causal_lm(attention="flex_attention")
    clean = ids(1, 64)
    with pytest.raises(UserError, match="no backward pass on the CPU"):
        denoise(network, noised_of(clean), clean, block=4)
    with dense_attention(network) as attention:
        assert attention == attention_of(network) == "sdpa"
    assert attention_of(network) == "flex_attention"
    with pytest.raises(UserError, match="multiple of 64 tokens, not 12"):
        denoise(network, clean[:, :12], clean[:, :12], block=4)


def test_attention_without_masks_is_refused() -> None:
    network = causal_lm()
    network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_2"):
        attention_of(network)


def test_chat_tokens_are_a_plain_list_of_ids() -> None:
    words = tokenizer()
    found = chat_tokens(words, [{"role": "user", "content": "hi"}])
    assert isinstance(found, list)
    assert words.decode(found) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

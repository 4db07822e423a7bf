import pytest
import torch

from diffdistill.draws import Draws
from diffdistill.hiding import by_position, chunk_share, denoising, hide, usable_chunks
from diffdistill.texts import Text
from tests.conftest import randn
from tests.toy_texts import Level, Texts, toy_text_batch


def texts(size: int) -> tuple[Text, Text]:
    batch = toy_text_batch(size)
    return Texts().text(batch), Texts().text(batch, reader="teacher")


def test_chunks_are_usable_where_both_sides_may_hide_all_of_them() -> None:
    text, answer = texts(1)
    maskable = text.maskable.clone()
    maskable[0, 4] = False  # half of chunk 1
    assert usable_chunks(text, answer).tolist() == [[True] * 6]
    only = usable_chunks(text._replace(maskable=maskable), answer)
    assert only.tolist() == [[True, False, True, True, True, True]]
    short = answer._replace(chunks=answer.chunks.masked_fill(answer.chunks == 5, -1))
    assert usable_chunks(text, short).tolist() == [[True] * 5 + [False]]


def test_by_position_the_ith_tokens_are_a_pair_up_to_the_shorter() -> None:
    text, answer = (by_position(side) for side in texts(2))
    assert text.chunks[0].tolist() == [-1, -1, *range(10)]
    assert answer.chunks[1].tolist() == [-1, -1, *range(8)]
    assert usable_chunks(text, answer)[0].tolist() == [True] * 8 + [False] * 2


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_at_either_level_nothing_or_all_is_hidden(number: float) -> None:
    text, answer = texts(3)
    usable = usable_chunks(text, answer)
    hidden = hide(Level(number), torch.arange(3), text, usable, t_low=1e-12)
    assert torch.equal(hidden.mask, text.maskable & bool(number))
    assert torch.equal(hidden.active, usable & bool(number))


def test_denoising_counts_each_token_with_the_inverse_of_its_noise_level() -> None:
    text, _ = texts(3)
    logprobs, t = -randn(3, 12, seed=0).abs() * text.maskable, torch.tensor([0.1, 0.5, 1.0])
    expected = sum(-logprobs[row, i] / t[row] for row in range(3) for i in range(2, 12)) / 30
    torch.testing.assert_close(denoising(logprobs, text, t), expected)


def test_means_of_chunks_in_micro_batches_add_up_to_that_of_the_step() -> None:
    chunks, tokens = [3.0, 0.0, 5.0], [10.0, 4.0, 6.0]
    means = [2.0, 0.0, 1.0]
    counts = [{"chunks": c, "tokens": t} for c, t in zip(chunks, tokens, strict=True)]
    step = {"chunks": 8.0, "tokens": 20.0}
    shares = [chunk_share(mine, step) for mine in counts]
    weighted = sum(t * s * m for t, s, m in zip(tokens, shares, means, strict=True)) / 20
    assert weighted == pytest.approx((3 * 2.0 + 5 * 1.0) / 8)
    assert chunk_share(counts[0], {}) == 1.0
    assert chunk_share({"chunks": 0.0, "tokens": 0.0}, step) == 0.0


def test_a_chunk_is_hidden_whole_if_a_token_of_it_is_and_it_is_usable() -> None:
    """Against the mask that the same numbers give without any chunks."""
    ids, (text, answer) = torch.arange(64), texts(64)
    usable = usable_chunks(text, answer)
    usable[:, 2] = False
    found = hide(Draws(1), ids, text, usable, t_low=1e-3)
    alone = text._replace(chunks=torch.full_like(text.chunks, -1))
    tokens = hide(Draws(1), ids, alone, usable[:, :0], t_low=1e-3).mask
    for row in range(64):
        for place in range(12):
            chunk = int(text.chunks[row, place])
            mates = text.chunks[row] == chunk
            whole = chunk >= 0 and chunk != 2 and bool(tokens[row][mates].any())
            assert bool(found.mask[row, place]) == (whole or bool(tokens[row, place]))
            if chunk >= 0:
                assert bool(found.active[row, chunk]) == whole
    rate = tokens[:, 2:].float().mean(dim=1)
    assert (rate - found.t).abs().mean() < 0.15

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.pipelines.streaming import (
    Cache,
    CachedFrames,
    KeysValues,
    View,
    block_causal,
    cached_frames,
    install,
    next_block,
    teacher_forcing,
    viewing,
)
from tests.conftest import randn

FRAMES, BLOCK, SIZE = 8, 2, 4
TOKENS = (SIZE // 2) ** 2


def tiny(dtype: torch.dtype = torch.float32) -> Any:
    """A random stock Wan transformer of two layers."""
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=64,
    )
    return network.to(dtype)


def call(network: Any, x: Tensor, view: View | None, level: float = 0.5) -> Tensor:
    """The velocity of ``x`` under a view."""
    text = randn(len(x), 3, 8, seed=9, dtype=x.dtype)
    time = torch.full((len(x),), 1000 * level, dtype=x.dtype)
    with viewing(network, view):
        velocity: Tensor = network(x, time, text, return_dict=False)[0]
    return velocity


def streamed(network: Any, x: Tensor, cache: Cache) -> Tensor:
    """Each block of ``x`` over the cached blocks before it."""
    parts = []
    for block in x.split(BLOCK, dim=2):
        view = next_block(cache, block.shape[2], keep=True)
        parts.append(call(network, block, view))
        cache = cache.extended(cached_frames(view))
    return torch.cat(parts, dim=2)


class Masked:
    """The stock processor with a dense mask over frames: an oracle that shares no code."""

    def __init__(self, stock: Any, visible: Tensor) -> None:
        self.stock = stock
        tokens = visible.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
        self.mask = tokens[None, None]
        self._attention_backend = None

    def __call__(self, attn: Any, hidden: Tensor, text: Any, mask: Any, rotary: Any) -> Tensor:
        result: Tensor = self.stock(attn, hidden, text, self.mask, rotary)
        return result


def dense(network: Any, x: Tensor, window: int | None, sink: int) -> Tensor:
    """The velocity under a dense block-causal mask, by the stock code."""
    frames = x.shape[2]
    visible = torch.zeros(frames, frames, dtype=torch.bool)
    for query in range(frames):
        end = (query // BLOCK + 1) * BLOCK
        for key in range(end):
            near = window is None or key >= end - (window - sink) or key < sink
            visible[query, key] = near
    for block in network.blocks:
        block.attn1.set_processor(Masked(block.attn1.processor, visible))
    text = randn(len(x), 3, 8, seed=9, dtype=x.dtype)
    velocity: Tensor = network(x, torch.full((len(x),), 500.0, dtype=x.dtype), text)[0]
    return velocity


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (6, 2), (4, 0), (5, 1)])
def test_streaming_with_a_cache_is_the_block_causal_forward(window: int | None, sink: int) -> None:
    x = randn(2, 4, FRAMES, SIZE, SIZE, seed=1)
    expected = dense(tiny(), x, window, sink)
    network = tiny()
    install(network)
    view = block_causal(FRAMES, BLOCK, window=window, sink=sink)
    torch.testing.assert_close(call(network, x, view), expected, rtol=1e-5, atol=1e-6)
    cache = Cache(window, sink)
    torch.testing.assert_close(streamed(network, x, cache), expected, rtol=1e-5, atol=1e-6)


def test_the_window_hides_what_left_it() -> None:
    x = randn(1, 4, FRAMES, SIZE, SIZE, seed=1)
    network = tiny()
    install(network)
    whole, windowed = (streamed(network, x, Cache(window)) for window in (None, 4))
    assert torch.equal(whole[:, :, :4], windowed[:, :, :4])
    assert not torch.allclose(whole[:, :, 4:], windowed[:, :, 4:], atol=1e-4)


def test_without_a_view_the_network_is_the_stock_one() -> None:
    x = randn(2, 4, FRAMES, SIZE, SIZE, seed=1)
    stock = tiny()
    text = randn(2, 3, 8, seed=9)
    expected = stock(x, torch.full((2,), 500.0), text, return_dict=False)[0]
    install(stock)
    assert torch.equal(call(stock, x, None), expected)


def test_a_view_that_sees_everything_is_the_bidirectional_forward() -> None:
    x = randn(2, 4, FRAMES, SIZE, SIZE, seed=1, dtype=torch.float64)
    network = tiny(torch.float64)
    install(network)
    torch.testing.assert_close(
        call(network, x, block_causal(FRAMES, FRAMES)), call(network, x, None)
    )


def test_no_gradient_reaches_a_block_from_a_later_one() -> None:
    network = tiny(torch.float64)
    install(network)
    first = randn(1, 4, BLOCK, SIZE, SIZE, seed=1, dtype=torch.float64).requires_grad_()
    view = next_block(Cache(), BLOCK, keep=True)
    call(network, first, view)
    later = randn(1, 4, BLOCK, SIZE, SIZE, seed=2, dtype=torch.float64)
    cache = Cache().extended(cached_frames(view))
    call(network, later, next_block(cache, BLOCK)).sum().backward()
    assert first.grad is None
    assert network.blocks[0].attn1.to_k.weight.grad is not None


def test_relative_positions_are_absolute_ones_until_frames_leave_the_window() -> None:
    x = randn(1, 4, FRAMES, SIZE, SIZE, seed=1, dtype=torch.float64)
    network = tiny(torch.float64)
    install(network)
    absolute, relative = (
        streamed(network, x, Cache(4, positions=p)) for p in ("absolute", "relative")
    )
    # Rotary attention depends on differences alone: without a sink both are the same stream.
    torch.testing.assert_close(relative, absolute, rtol=1e-5, atol=1e-6)
    sunk = [streamed(network, x, Cache(6, 2, positions=p)) for p in ("absolute", "relative")]
    torch.testing.assert_close(sunk[0][:, :, :6], sunk[1][:, :, :6], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(sunk[0][:, :, 6:], sunk[1][:, :, 6:], atol=1e-5)


def test_relative_positions_go_on_where_the_table_of_absolute_ones_ends() -> None:
    x = randn(1, 4, 70, SIZE, SIZE, seed=1)
    network = tiny()
    install(network)
    assert streamed(network, x, Cache(4, 2, positions="relative")).isfinite().all()
    with pytest.raises(UserError, match="beyond the model's 64 rotary positions"):
        streamed(network, x, Cache(4, 2))


def frames_of(*values: float) -> CachedFrames:
    """Frames of one token whose keys and values are the given numbers."""
    tensor = torch.tensor(values).view(1, -1, 1, 1)
    return CachedFrames(len(values), (KeysValues(tensor, -tensor),))


def visible(cache: Cache) -> list[float]:
    """The keys that the next block sees."""
    return [float(v) for part in cache.parts() for v in part.layers[0].keys.flatten()]


def test_the_cache_keeps_the_sink_and_the_newest_frames() -> None:
    cache = Cache(window=5, sink=1)
    seen = []
    for start in range(0, 8, 2):
        cache = cache.extended(frames_of(start, start + 1))
        seen.append(visible(cache))
    assert seen == [[0, 1], [0, 2, 3], [0, 4, 5], [0, 6, 7]]
    assert cache.start == 8


def test_evicted_frames_are_averaged_into_the_sink() -> None:
    cache = Cache(window=4, sink=1, sink_decay=0.9)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        cache = cache.extended(frames_of(value))
    # 2 and 3 have left; the sink began as 1.
    expected = 0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 3.0
    assert visible(cache) == pytest.approx([expected, 4.0, 5.0])


def test_extending_a_cache_leaves_the_old_one_as_it_was() -> None:
    old = Cache(window=4, sink=1, sink_decay=0.5).extended(frames_of(1.0, 2.0))
    before = visible(old)
    old.extended(frames_of(3.0, 4.0)).extended(frames_of(5.0, 6.0))
    assert visible(old) == before


def test_teacher_forcing_sees_the_clean_past_and_the_noised_present() -> None:
    network = tiny(torch.float64)
    install(network)
    clean = randn(1, 4, FRAMES, SIZE, SIZE, seed=1, dtype=torch.float64)
    noised = randn(1, 4, FRAMES, SIZE, SIZE, seed=2, dtype=torch.float64)
    both = torch.cat([clean, noised], dim=2)
    forced = call(network, both, teacher_forcing(FRAMES, BLOCK, window=6, sink=2))
    cache, parts = Cache(6, 2), []
    for known, block in zip(clean.split(BLOCK, 2), noised.split(BLOCK, 2), strict=True):
        parts.append(call(network, block, next_block(cache, BLOCK)))
        view = next_block(cache, BLOCK, keep=True)
        call(network, known, view)
        cache = cache.extended(cached_frames(view))
    torch.testing.assert_close(forced[:, :, FRAMES:], torch.cat(parts, dim=2), rtol=1e-9, atol=1e-9)


def test_checkpointed_blocks_are_recomputed_under_the_view_of_the_forward() -> None:
    gradients = []
    for checkpointing in (False, True):
        network = tiny(torch.float64)
        install(network)
        if checkpointing:
            network.enable_gradient_checkpointing()
        x = randn(1, 4, FRAMES, SIZE, SIZE, seed=1, dtype=torch.float64).requires_grad_()
        velocity = call(network, x, block_causal(FRAMES, BLOCK))
        call(network, x.detach(), None)  # another call with another view comes between
        velocity.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # diffusers' own cross-attention norms
def test_under_autocast_the_cache_is_kept_in_half_precision() -> None:
    network = tiny()
    install(network)
    with torch.no_grad():
        for block in network.blocks:  # so that what is cached matters
            block.attn1.to_out[0].weight.mul_(20)
    past, x = (randn(1, 4, BLOCK, SIZE, SIZE, seed=s) for s in (1, 2))
    view = next_block(Cache(), BLOCK, keep=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        call(network, past, view)
        cache = Cache().extended(cached_frames(view))
        velocity = call(network, x, next_block(cache, BLOCK)).float()
    assert {t.dtype for layer in cached_frames(view).layers for t in layer} == {torch.bfloat16}
    exact = streamed(network, torch.cat([past, x], dim=2), Cache())[:, :, BLOCK:]
    alone = call(network, x, next_block(Cache(), BLOCK))
    assert (velocity - exact).norm() < 0.2 * (alone - exact).norm()

"""Block-causal attention with a cache of keys and values, on the stock Wan transformer.

Who sees whom is a property of the *call* (a ``View``), not of the network: without a view the
same weights attend in both directions, so that a causal student and a bidirectional critic may
be adapters of one base. The view travels with the rotary embedding, the one argument that
diffusers hands to every self-attention, also when a block is recomputed in the backward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from diffdistill.errors import UserError

Positions = Literal["absolute", "relative"]


class KeysValues(NamedTuple):
    """Detached keys and values of one layer, each ``[B, frames * tokens, heads, width]``."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class CachedFrames:
    """What all layers keep of consecutive latent frames."""

    num_frames: int
    layers: tuple[KeysValues, ...]

    def part(self, start: int, stop: int) -> "CachedFrames":
        """Return the frames from ``start`` to ``stop``, as views."""
        tokens = self.layers[0].keys.shape[1] // self.num_frames
        kept = slice(start * tokens, stop * tokens)
        layers = tuple(KeysValues(k[:, kept], v[:, kept]) for k, v in self.layers)
        return CachedFrames(stop - start, layers)

    def averaged(self, evicted: "CachedFrames", decay: float) -> "CachedFrames":
        """Return these frames moved towards as many evicted ones."""
        pairs = zip(self.layers, evicted.layers, strict=True)
        layers = tuple(
            KeysValues(own.keys.lerp(other.keys, 1.0 - decay),
                       own.values.lerp(other.values, 1.0 - decay))
            for own, other in pairs
        )  # fmt: skip
        return CachedFrames(self.num_frames, layers)


@dataclass(frozen=True)
class Cache:
    """The past of a stream; a new object for each block, so that an old one can be replayed.

    Attributes:
        window: Latent frames that a block sees, itself included; None is all.
        sink: First latent frames that stay visible, part of the window.
        sink_decay: Average evicted frames into the sink with this decay (the EMA sink of
            Reward Forcing, 0.999 there); None keeps the first frames as they are.
        positions: ``absolute`` counts frames from the start of the stream; ``relative`` from
            the oldest visible frame, for streams longer than the model was trained for.
        start: Absolute index of the next frame.
        sunk: The sink frames so far.
        recent: The other visible frames, oldest first.
    """

    window: int | None = None
    sink: int = 0
    sink_decay: float | None = None
    positions: Positions = "absolute"
    start: int = 0
    sunk: tuple[CachedFrames, ...] = ()
    recent: tuple[CachedFrames, ...] = ()

    def parts(self) -> tuple[CachedFrames, ...]:
        """Return everything visible, oldest first."""
        return self.sunk + self.recent

    def extended(self, block: CachedFrames) -> "Cache":
        """Return the cache after ``block``, without what the next such block will not see."""
        missing = self.sink - sum(part.num_frames for part in self.sunk)
        sunk, recent = self.sunk, self.recent
        if missing > 0:
            taken = min(missing, block.num_frames)
            sunk = (*sunk, block.part(0, taken))
        else:
            taken = 0
        if taken < block.num_frames:
            recent = (*recent, block.part(taken, block.num_frames))
        cache = replace(self, start=self.start + block.num_frames, sunk=sunk, recent=recent)
        return cache if self.window is None else cache._trimmed(block.num_frames)

    def _trimmed(self, coming: int) -> "Cache":
        """Return the cache with room in the window for ``coming`` frames."""
        assert self.window is not None
        room = self.window - coming - sum(part.num_frames for part in self.sunk)
        sunk, recent = self.sunk, list(self.recent)
        while (excess := sum(part.num_frames for part in recent) - max(room, 0)) > 0:
            oldest = recent.pop(0)
            gone = min(excess, oldest.num_frames)
            if gone < oldest.num_frames:
                recent.insert(0, oldest.part(gone, oldest.num_frames))
            sunk = self._absorbed(sunk, oldest.part(0, gone))
        return replace(self, sunk=sunk, recent=tuple(recent))

    def _absorbed(
        self, sunk: tuple[CachedFrames, ...], evicted: CachedFrames
    ) -> tuple[CachedFrames, ...]:
        if self.sink_decay is None or len(sunk) != 1 or sunk[0].num_frames != evicted.num_frames:
            return sunk
        return (sunk[0].averaged(evicted, self.sink_decay),)


class Group(NamedTuple):
    """Latent frames of a call that see the same frames of it.

    Attributes:
        start: The first of them.
        stop: The frame after the last.
        sees: The frames of the call that they see.
    """

    start: int
    stop: int
    sees: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """Who sees whom in one call.

    Attributes:
        positions: Rotary position of each latent frame of the call.
        groups: Which frames see which; together all frames, in order.
        past: Cached frames, seen by every frame of the call.
        past_positions: Rotary positions of the cached frames, whose keys are not yet turned;
            None where the cached keys already are.
        kept: Where each layer puts its keys and values of this call; None keeps nothing.
    """

    positions: tuple[int, ...]
    groups: tuple[Group, ...]
    past: tuple[CachedFrames, ...] = ()
    past_positions: tuple[int, ...] | None = None
    kept: list[KeysValues] | None = field(default=None, compare=False)


def next_block(cache: Cache, num_frames: int, *, keep: bool = False) -> View:
    """Return the view of the block after ``cache``: it sees itself and all that is cached.

    With ``keep``, the call fills ``kept`` for ``cached_frames``.
    """
    everyone = (Group(0, num_frames, tuple(range(num_frames))),)
    kept: list[KeysValues] | None = [] if keep else None
    if cache.positions == "absolute":
        positions = tuple(range(cache.start, cache.start + num_frames))
        return View(positions, everyone, cache.parts(), None, kept)
    past = sum(part.num_frames for part in cache.parts())
    positions = tuple(range(past, past + num_frames))
    return View(positions, everyone, cache.parts(), tuple(range(past)), kept)


def cached_frames(view: View) -> CachedFrames:
    """Return what a call with ``keep`` left."""
    assert view.kept, "the call was not asked to keep its keys and values"
    return CachedFrames(len(view.positions), tuple(view.kept))


def block_causal(num_frames: int, block: int, *, window: int | None = None, sink: int = 0) -> View:
    """Return the view of a whole clip at once: each block sees itself and the blocks before.

    It equals block-by-block calls with a ``Cache`` of the same window and sink.
    """
    groups = tuple(
        Group(start, start + block, (*_past(start, block, window, sink),
                                     *range(start, start + block)))
        for start in range(0, num_frames, block)
    )  # fmt: skip
    return View(tuple(range(num_frames)), groups)


def teacher_forcing(
    num_frames: int, block: int, *, window: int | None = None, sink: int = 0
) -> View:
    """Return the view of a clean clip followed by the same clip noised.

    A noised block sees itself and the *clean* blocks before it; a clean block sees itself and
    the clean blocks before it.
    """
    clean = block_causal(num_frames, block, window=window, sink=sink)
    noised = tuple(
        Group(
            group.start + num_frames,
            group.stop + num_frames,
            tuple(f + num_frames if group.start <= f < group.stop else f for f in group.sees),
        )
        for group in clean.groups
    )
    return View(clean.positions * 2, clean.groups + noised)


def _past(start: int, block: int, window: int | None, sink: int) -> tuple[int, ...]:
    """Return the earlier frames that a block sees."""
    if window is None:
        return tuple(range(start))
    sunk = range(min(sink, start))
    oldest = max(start - max(window - block - sink, 0), len(sunk))
    return (*sunk, *range(oldest, start))


class Rotary(NamedTuple):
    """Rotary factors ``[1, tokens, 1, width]`` of a call and of its past, and the view."""

    cos: Tensor
    sin: Tensor
    past_cos: Tensor | None
    past_sin: Tensor | None
    view: View


class ViewedRotary(nn.Module):
    """Stands in for the transformer's rotary embedding, and adds the view of the call."""

    view: View | None = None

    def __init__(self, stock: WanRotaryPosEmbed) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, hidden_states: Tensor) -> Any:
        """Return stock factors without a view, and a ``Rotary`` with one."""
        if self.view is None:
            return self.stock(hidden_states)
        size = tuple(n // p for n, p in zip(hidden_states.shape[3:], self.stock.patch_size[1:],
                                            strict=True))  # fmt: skip
        cos, sin = self._factors(self.view.positions, size)
        past = self.view.past_positions
        past_cos, past_sin = (None, None) if past is None else self._factors(past, size)
        return Rotary(cos, sin, past_cos, past_sin, self.view)

    def _factors(self, positions: Sequence[int], size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return factors of frames at any positions, of a grid of ``size`` ``(h, w)``."""
        stock: Any = self.stock
        splits = [stock.t_dim, stock.h_dim, stock.w_dim]
        height, width = size
        known = len(stock.freqs_cos)
        if max(positions, default=0) >= known:
            raise UserError(
                f"latent frame {max(positions)} is beyond the model's {known} rotary positions: "
                "make a shorter video, or set family.positions: relative and a window_frames"
            )
        frames = torch.tensor(positions, dtype=torch.long, device=stock.freqs_cos.device)
        factors = []
        for buffer in (stock.freqs_cos, stock.freqs_sin):
            time, rows, columns = buffer.split(splits, dim=1)
            shape = (len(positions), height, width, -1)
            parts = (
                time[frames][:, None, None].expand(shape),
                rows[:height][None, :, None].expand(shape),
                columns[:width][None, None].expand(shape),
            )
            factors.append(torch.cat(parts, dim=-1).flatten(0, 2)[None, :, None])
        return factors[0], factors[1]


class ViewedAttention:
    """Self-attention that follows the view of the call; without one it is the stock processor."""

    def __init__(self, stock: Any, layer: int) -> None:
        self.stock = stock
        self.layer = layer

    # diffusers' ``set_attention_backend`` sets this on the processors it finds.
    @property
    def _attention_backend(self) -> Any:
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Return what the frames of the call see, ``[B, tokens, width]``."""
        if not isinstance(rotary_emb, Rotary):
            stock: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
            return stock
        shape = (attn.heads, -1)
        query = _normed(attn.norm_q, attn.to_q(hidden_states)).unflatten(2, shape)
        key = _normed(attn.norm_k, attn.to_k(hidden_states)).unflatten(2, shape)
        value = attn.to_v(hidden_states).unflatten(2, shape)
        # Under autocast the norms are float32: cached keys would be twice as large as values.
        query = turned(query, rotary_emb.cos, rotary_emb.sin).type_as(value)
        raw, key = key.type_as(value), turned(key, rotary_emb.cos, rotary_emb.sin).type_as(value)
        if rotary_emb.view.kept is not None:
            keys = key if rotary_emb.past_cos is None else raw
            rotary_emb.view.kept.append(KeysValues(keys.detach(), value.detach()))
        seen = self._attend(query, key, value, rotary_emb).flatten(2, 3).type_as(query)
        projected: Tensor = attn.to_out[1](attn.to_out[0](seen))
        return projected

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary) -> Tensor:
        view = rotary.view
        past = [part.layers[self.layer] for part in view.past]
        past_keys, past_values = [p.keys for p in past], [p.values for p in past]
        if rotary.past_cos is not None and rotary.past_sin is not None and past:
            past_keys = [turned(_joined(past_keys), rotary.past_cos, rotary.past_sin)]
        tokens = key.shape[1] // len(view.positions)
        outputs = []
        for group in view.groups:
            outputs.append(
                dispatch_attention_fn(
                    query[:, group.start * tokens : group.stop * tokens],
                    _joined([*past_keys, *_frames(key, group.sees, tokens)]),
                    _joined([*past_values, *_frames(value, group.sees, tokens)]),
                    backend=self._attention_backend,
                )
            )
        return _joined(outputs)


def _normed(norm: Any, heads: Tensor) -> Tensor:
    """Return normalized heads, in the type of the norm's weights: mixed types are not fused."""
    normed: Tensor = norm(heads.to(norm.weight.dtype))
    return normed


def _frames(tensor: Tensor, frames: Sequence[int], tokens: int) -> list[Tensor]:
    """Return the tokens of some frames, as views of runs of neighbors."""
    runs: list[list[int]] = []
    for frame in frames:
        if runs and runs[-1][1] == frame:
            runs[-1][1] = frame + 1
        else:
            runs.append([frame, frame + 1])
    return [tensor[:, start * tokens : stop * tokens] for start, stop in runs]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return parts in a row along the tokens; a single one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``[B, tokens, heads, width]`` turned by rotary factors, as diffusers' Wan does."""
    first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return pairs.flatten(-2).type_as(heads)


def install(network: Any) -> None:
    """Let calls of a stock Wan transformer have a view, in place."""
    network.rope = ViewedRotary(network.rope)
    for layer, block in enumerate(network.blocks):
        block.attn1.set_processor(ViewedAttention(block.attn1.processor, layer))


@contextmanager
def viewing(network: Any, view: View | None) -> Iterator[None]:
    """Let the calls of ``network`` within the block have ``view``."""
    before, network.rope.view = network.rope.view, view
    try:
        yield
    finally:
        network.rope.view = before

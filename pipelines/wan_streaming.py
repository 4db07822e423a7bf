"""Wan as a causal student that streams: blocks of frames, each denoised over a cache of the past.

The roll-out is Self-Forcing's (arXiv:2506.08009): a block is denoised in a few steps from the
cached keys and values of the *clean* blocks before it, then run once more, clean, to be cached.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.pipelines.streaming import (
    Cache,
    Positions,
    block_causal,
    cached_frames,
    install,
    next_block,
    teacher_forcing,
    viewing,
)
from diffdistill.pipelines.wan import Wan, normalization
from diffdistill.pipelines.wan_decoding import StreamingDecoder
from diffdistill.protocols import Model
from diffdistill.readouts import clean_of
from diffdistill.types import BlockRollout, Condition, ModelCall, State

BIDIRECTIONAL = ("teacher", "critic")
"""The roles that look at a whole clip in both directions; all others stream."""

Renoise = Callable[[int, int], Tensor]
"""Fresh noise ``[B, C, block, h, w]`` for a block and a step."""

CONTEXT = -1
"""The step that asks ``Renoise`` for the noise of a block to cache."""


class Past(NamedTuple):
    """What a stream goes on from.

    Attributes:
        cache: Keys and values of the blocks that the next one sees.
        blocks: First frame and clean latents of each of those blocks.
    """

    cache: Cache
    blocks: tuple[tuple[int, Tensor], ...] = ()


@dataclass(kw_only=True)
class WanStreaming(Wan):
    """Wan with calls that see the past alone, a cache, and roll-outs of any length.

    Attributes:
        block_frames: Latent frames that are denoised together; 3 in Self-Forcing.
        window_frames: Latent frames that a block sees, itself included; None is all. 9 in
            Reward Forcing and Stream-R1.
        sink_frames: First latent frames that stay visible, part of the window; 3 there.
        sink_decay: Average the blocks that leave the window into the sink with this decay
            (0.999 in Reward Forcing); None keeps the sink as it is. Needs relative positions and
            a sink of one block. In Reward Forcing's training no block leaves the cache; here it
            does where a clip is longer than the window.
        positions: Rotary positions of cached frames: ``absolute`` (Self-Forcing) counts from
            the start of the video; ``relative`` (Reward Forcing) from the oldest visible
            frame, so that a video longer than the training clips has no unseen positions.
        context_noise: Noise level at which finished blocks are cached; 0 in Self-Forcing.
    """

    block_frames: int = 3
    window_frames: int | None = 9
    sink_frames: int = 3
    sink_decay: float | None = None
    positions: Positions = "absolute"
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check that a block fits the window beside the sink.

        Raises:
            UserError: If it does not.
        """
        super().__post_init__()
        if self.block_frames < 1 or self.sink_frames < 0:
            raise UserError("family.block_frames must be at least 1, family.sink_frames 0")
        least = self.block_frames + self.sink_frames
        if self.window_frames is not None and self.window_frames < least:
            raise UserError(
                f"family.window_frames {self.window_frames} is less than a block and the sink "
                f"({self.block_frames} + {self.sink_frames})"
            )
        if not 0.0 <= self.context_noise < 1.0:
            raise UserError(f"family.context_noise must be in [0, 1), not {self.context_noise}")
        if self.sink_decay is not None:
            self._check_sink()

    def _check_sink(self) -> None:
        """Refuse an averaged sink whose frames would not meet frames of their own positions."""
        window = self.window_frames
        whole = window is not None and (window - self.sink_frames) % self.block_frames == 0
        assert self.sink_decay is not None
        if not 0.0 <= self.sink_decay <= 1.0:
            raise UserError(f"family.sink_decay must be in [0, 1], not {self.sink_decay}")
        if self.sink_frames != self.block_frames or not whole or self.positions != "relative":
            raise UserError(
                "family.sink_decay averages whole blocks: it needs sink_frames equal to "
                "block_frames, a window_frames that is a multiple of it, and positions: relative"
            )

    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded transformer whose calls may have a view of the past."""
        network = super().network(path)
        install(network)
        return network

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return the velocity ``[B, C, F, h, w]``, as far as the condition's view lets it see."""
        told = {k: v for k, v in condition.items() if k not in ("view", "clean")}
        context = condition.get("clean")
        with viewing(network, condition.get("view")):
            if context is None:
                return super().predict(network, state, told)
            both = _after_clean(context, state)
            return super().predict(network, both, told)[:, :, context.shape[2] :]

    def causal(
        self, condition: Condition, num_frames: int, *, clean: Tensor | None = None
    ) -> Condition:
        """Return a condition for one call on a whole clip in which no block sees a later one.

        It is what block-by-block calls see, but for ``context_noise``.

        Args:
            condition: What the model is told besides.
            num_frames: Latent frames of the clip, a multiple of the block.
            clean: The clip without noise ``[B, C, F, h, w]``: past blocks are seen clean
                (teacher forcing). None lets blocks see the noised past (diffusion forcing).
        """
        self._check_frames(num_frames)
        if self.positions == "relative" and self.sink_frames and self.window_frames is not None:
            raise UserError(
                "a whole clip at once has absolute positions: with a sink and a window, train "
                "with family.positions: absolute, or without the sink"
            )
        make = block_causal if clean is None else teacher_forcing
        view = make(num_frames, self.block_frames, window=self.window_frames, sink=self.sink_frames)
        return {**condition, "view": view, "clean": clean}

    def rollout(
        self,
        student: Model,
        condition: Condition,
        noise: Tensor,
        *,
        num_steps: int,
        exits: Sequence[int],
        renoise: Renoise | None,
        graph_from: int | None = None,
        keep_calls: bool = True,
    ) -> BlockRollout:
        """Return a clip that the student streamed, and the calls that ended each block.

        Args:
            student: The model that acts.
            condition: What it is told.
            noise: ``[B, C, F, h, w]``, F a multiple of the block.
            num_steps: Steps of the sampling grid.
            exits: For each block, the step whose clean prediction is taken; its last one is
                ``num_steps - 1``.
            renoise: Fresh noise between two steps of a block; None takes Euler steps.
            graph_from: The first block whose exit call keeps its graph (the calls before an
                exit never do); None keeps no graph.
            keep_calls: Whether to return the calls, which hold on to the past of every block.
        """
        self._check_frames(noise.shape[2])
        sampler = BlockSampler(self, student, num_steps, renoise)
        past, clips, calls = Past(self.cache()), [], []
        blocks = noise.split(self.block_frames, dim=2)
        for index, block in enumerate(blocks):
            call = sampler.approach(condition, past, block, index, exits[index])
            with torch.set_grad_enabled(graph_from is not None and index >= graph_from):
                clip = clean_of(call.state, student(call.state, call.condition))
            clips.append(clip)
            if keep_calls:
                calls.append(call)
            if index + 1 < len(blocks):
                past = sampler.remembered(condition, past, clip.detach())
        return BlockRollout(torch.cat(clips, dim=2), calls)

    @torch.no_grad()
    def stream(
        self,
        student: Model,
        conditions: Callable[[int], Condition],
        noise: Callable[[int], Tensor],
        *,
        num_steps: int,
        renoise: Renoise | None,
    ) -> Iterator[Tensor]:
        """Yield the clean latents ``[B, C, block, h, w]`` of block after block, without end.

        Args:
            student: The model that acts.
            conditions: What it is told in a block. Where that changes, the visible past is
                cached anew under the new condition (as LongLive does at a prompt switch). An
                averaged sink begins anew there, from the first block alone: the blocks that
                had left the window are no more.
            noise: The initial noise of a block.
            num_steps: Model calls for each block, besides the one that caches it.
            renoise: Fresh noise between two steps of a block; None takes Euler steps.
        """
        sampler = BlockSampler(self, student, num_steps, renoise)
        past, told = Past(self.cache()), conditions(0)
        for index in count():
            condition = conditions(index)
            if condition is not told:
                past, told = sampler.retold(condition, past), condition
            call = sampler.approach(told, past, noise(index), index, num_steps - 1)
            clip = clean_of(call.state, student(call.state, call.condition))
            yield clip
            past = sampler.remembered(told, past, clip)

    @torch.no_grad()
    def sample(
        self,
        student: Model,
        condition: Condition,
        noise: Tensor,
        *,
        num_steps: int,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Return clean latents ``[B, C, F, h, w]``: streamed, or whole for teacher and critic.

        ``renoise`` gives noise of the whole clip.
        """
        if getattr(student, "name", "") in BIDIRECTIONAL:
            return super().sample(student, condition, noise, num_steps=num_steps)
        size = self.block_frames

        def part(block: int, step: int) -> Tensor:
            assert renoise is not None
            return renoise(step)[:, :, block * size : (block + 1) * size]

        self._check_frames(noise.shape[2])
        blocks = noise.split(size, dim=2)
        # A roll-out would keep the cached past of each block, a stream only that of the last.
        clips = self.stream(
            student,
            lambda index: condition,
            blocks.__getitem__,
            num_steps=num_steps,
            renoise=None if renoise is None else part,
        )
        return torch.cat(list(islice(clips, len(blocks))), dim=2)

    @torch.no_grad()
    def watch(self, latents: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the pixels ``[B, T, 3, H, W]`` in [0, 1] of a stream's blocks as they come."""
        with self.using("vae") as vae:
            decode = StreamingDecoder(vae, *normalization(vae))
            for block in latents:
                yield decode(block)

    def reencoded(self, stream: Tensor) -> Tensor:
        """Return the last frame of ``[B, C, F, h, w]``, encoded anew as the first of a video.

        Self-Forcing does so where it scores the end of a long stream: the first latent of a
        clip stands for one pixel frame, and a later one for ``time_stride``.
        """
        stills = self.decode(stream)[:, -1:]
        latents = torch.stack([self.encode_video(still) for still in stills])
        return latents.to(stream.device, stream.dtype)

    def cache(self) -> Cache:
        """Return the cache of a stream that has not begun."""
        return Cache(self.window_frames, self.sink_frames, self.sink_decay, self.positions)

    def check_clip(self, num_frames: int) -> None:
        """Refuse clips of so many pixel frames (see ``FlowFamily.check_clip``)."""
        latent, block = self.num_latent_frames(num_frames), self.block_frames
        if latent % block:
            whole = latent // block * block
            fitting = [str(self.num_pixel_frames(n)) for n in (whole, whole + block) if n]
            raise UserError(
                f"{num_frames} frames are {latent} latent frames, which are not a multiple of "
                f"family.block_frames ({block}): choose such as {' or '.join(fitting)}"
            )

    def _check_frames(self, num_frames: int) -> None:
        if num_frames % self.block_frames:
            raise UserError(
                f"{num_frames} latent frames are not a multiple of family.block_frames "
                f"({self.block_frames})"
            )


@dataclass(frozen=True)
class BlockSampler:
    """Denoises and caches blocks with one student.

    Attributes:
        family: Gives the grid, the cache and the size of blocks.
        student: The model that acts.
        num_steps: Steps of the sampling grid.
        renoise: Fresh noise between two steps of a block; None takes Euler steps.
    """

    family: WanStreaming
    student: Model
    num_steps: int
    renoise: Renoise | None

    @torch.no_grad()
    def approach(
        self, condition: Condition, past: Past, noise: Tensor, index: int, last: int
    ) -> ModelCall:
        """Return the call of step ``last`` of block ``index``; the steps before it are taken."""
        grid = self.family.grid(self.num_steps, noise.shape[1:]).tolist()
        told = {**condition, "view": next_block(past.cache, noise.shape[2])}
        state = State(noise, _level(noise, grid[0]))
        again = None if self.renoise is None else partial(self.renoise, index)
        for step in range(last):
            x = self.family.advance(state, self.student(state, told), grid, step, again)
            state = State(x, _level(noise, grid[step + 1]))
        return ModelCall(state, told)

    @torch.no_grad()
    def remembered(self, condition: Condition, past: Past, clip: Tensor) -> Past:
        """Return the past with a finished block, cached by one more call."""
        cache, level = past.cache, self.family.context_noise
        view = next_block(cache, clip.shape[2], keep=True)
        state = State(clip, _level(clip, 0.0))
        if level:
            if self.renoise is None:
                raise UserError(
                    "family.context_noise noises the past, which a model sampled with Euler steps "
                    "does not: it needs a student trained with method.sampler: renoise"
                )
            noise = self.renoise(cache.start // self.family.block_frames, CONTEXT)
            state = self.family.noise(clip, _level(clip, level), noise)
        self.student(state, {**condition, "view": view})
        blocks = (*past.blocks, (cache.start, clip))
        cache = cache.extended(cached_frames(view))
        return Past(cache, tuple(block for block in blocks if self._is_seen(cache, block[0])))

    def retold(self, condition: Condition, past: Past) -> Past:
        """Return the past as it looks under another condition, from its visible blocks alone."""
        anew = Past(self.family.cache())
        for start, clip in past.blocks:
            anew = anew._replace(cache=replace(anew.cache, start=start))
            anew = self.remembered(condition, anew, clip)
        return anew

    def _is_seen(self, cache: Cache, start: int) -> bool:
        """Return whether some frame of the block at ``start`` is visible to the next block."""
        if cache.window is None or start < cache.sink:
            return True
        block = self.family.block_frames
        return start + block > cache.start - (cache.window - block - cache.sink)


def _level(like: Tensor, level: float) -> Tensor:
    return torch.full((len(like),), level, device=like.device)


def _after_clean(context: Tensor, state: State) -> State:
    """Return the state of clean frames followed by the noised ones, ``t`` ``[B, 2F]``."""
    levels: Any = state.t if state.t.ndim == 2 else state.t[:, None].expand(-1, state.x.shape[2])
    t = torch.cat([torch.zeros_like(levels), levels], dim=1)
    return State(torch.cat([context, state.x], dim=2), t)

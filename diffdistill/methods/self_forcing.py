"""Self-Forcing: distribution matching on the student's own stream (arXiv:2506.08009).

The student streams a clip, block after block, over a cache of its own past. Teacher and critic
see the whole finished clip in both directions; DMD's difference of their scores is the student's
gradient, through the last call of each block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.methods.dmd import DMD, Goal
from diffdistill.protocols import StreamingFamily
from diffdistill.readouts import clean
from diffdistill.types import Batch, BlockRollout, Condition, Loss, Progress


class Scored(NamedTuple):
    """The part of a stream that teacher and critic see.

    Attributes:
        sample: Latents ``[B, C, F, h, w]``, detached.
        first: Frame of the stream where it begins.
        learned: Frame of the stream from which the student learns.
    """

    sample: Tensor
    first: int
    learned: int


@dataclass(kw_only=True)
class SelfForcing(DMD):
    """Match the distribution of a bidirectional teacher with a student that streams.

    Attributes:
        guidance: Classifier-free guidance of the teacher. 4 is for the form ``standard``: it is
            Self-Forcing's 3.0 in its form ``extra``. With ``guidance_form: extra`` set 3, for
            there 4 is the standard form's 5.
        exits: Whether all blocks of a stream exit at the same random step (``shared``;
            Self-Forcing's default) or each at its own (``per-block``). Without effect where
            ``exit`` is ``last``.
        backward: ``block`` streams without a graph and then repeats each block's last call to
            back-propagate its part, so that one block's graph is alive at a time. ``whole``
            keeps the graph of all blocks. The gradients are the same, because the cached past
            is detached; ``block`` costs one more forward pass of each block. (With dropout
            the repeated call has a mask of its own.)
        rollout_frames: Latent frames of the longest stream; its length is drawn between the
            clip's and this, and its last clip is scored. None streams one clip.
        reencode: Where the scored clip is not the beginning: encode its first frame anew from
            its pixels, as the first frame of a video is encoded (Self-Forcing), and let the
            student learn nothing from its first block. Without effect where
            ``rollout_frames`` is None, since every scored clip is then the beginning.
    """

    streams: ClassVar = True

    family: StreamingFamily
    guidance: float = 4.0
    score_shift: float = 5.0
    exits: Literal["shared", "per-block"] = "shared"
    backward: Literal["block", "whole"] = "block"
    rollout_frames: int | None = None
    reencode: bool = True

    def check_clip(self, num_frames: int) -> None:
        """Refuse clips that the longest stream does not fit (see ``Method.check_clip``)."""
        self._longest(self.family.num_latent_frames(num_frames))
        if self.family.context_noise and self.sampler != "renoise":
            raise UserError("family.context_noise needs method.sampler: renoise")

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield the student's losses when it is its turn, and the critic's when it is its."""
        prompt = self.family.condition(batch)
        train_student = progress.step % self.student_every == 0
        rollout = self._roll_out(batch, prompt, progress, train_student)
        scored = self._scored(rollout, self.family.latent_shape(batch)[1])
        if train_student:
            goal = self._goal(batch, prompt, scored.sample)
            make = self._block_losses if self.backward == "block" else self._whole_loss
            yield from make(rollout, scored, goal)
        if not train_student or self.ratio == "every-step":
            yield self._critic_loss(batch, prompt, scored.sample)

    def _roll_out(
        self, batch: Batch, prompt: Condition, progress: Progress, train_student: bool
    ) -> BlockRollout:
        """Return what the student streams; with a graph where ``whole`` will need it."""
        ids = batch["ids"]
        channels, clip, *size = self.family.latent_shape(batch)
        frames = self._stream_frames(clip, progress.step)
        block = self.family.block_frames

        def renoise(index: int, step: int) -> Tensor:
            return self.draws.normal(f"renoise/{index}/{step}", ids, (channels, block, *size))

        keeps_graph = train_student and self.backward == "whole"
        replays = train_student and self.backward == "block"
        return self.family.rollout(
            self.student,
            prompt,
            self.draws.normal("rollout", ids, (channels, frames, *size)),
            num_steps=self.num_steps,
            exits=self._exits(frames // block, progress.step),
            renoise=renoise if self.sampler == "renoise" else None,
            graph_from=self._learned(frames, clip) // block if keeps_graph else None,
            keep_calls=replays,
        )

    def _stream_frames(self, clip: int, step: int) -> int:
        """Return the length of this step's stream, in whole blocks; the same on all ranks."""
        block = self.family.block_frames
        choices = (self._longest(clip) - clip) // block + 1
        return clip + block * self.draws.integer("frames", step, choices)

    def _longest(self, clip: int) -> int:
        """Return the latent frames of the longest stream.

        Raises:
            UserError: If the longest stream does not fit the clip and the blocks.
        """
        longest = clip if self.rollout_frames is None else self.rollout_frames
        block = self.family.block_frames
        if longest < clip or (longest - clip) % block:
            raise UserError(
                f"method.rollout_frames {longest} must be the clip's {clip} latent frames and a "
                f"multiple of {block} more"
            )
        if longest > clip == block and self.reencode:
            raise UserError(
                "method.reencode leaves a clip of one block nothing to learn: set it to false"
            )
        return longest

    def _exits(self, blocks: int, step: int) -> list[int]:
        """Return the step that each block is scored at; the same on all ranks."""
        if self.exit == "last":
            return [self.num_steps - 1] * blocks
        if self.exits == "shared":
            return [self.draws.integer("exit", step, self.num_steps)] * blocks
        return [self.draws.integer(f"exit/{b}", step, self.num_steps) for b in range(blocks)]

    def _learned(self, frames: int, clip: int) -> int:
        """Return the first frame of the stream that the student learns from."""
        skipped = self.family.block_frames if self.reencode and frames > clip else 0
        return frames - clip + skipped

    def _scored(self, rollout: BlockRollout, clip: int) -> Scored:
        """Return the last clip of the stream, its first frame encoded anew if it is not first."""
        stream = rollout.sample.detach()
        first = stream.shape[2] - clip
        sample = stream[:, :, first:]
        if first and self.reencode:
            still = self.family.reencoded(stream[:, :, : first + 1])
            sample = torch.cat([still, sample[:, :, 1:]], dim=2)
        return Scored(sample, first, self._learned(stream.shape[2], clip))

    def _whole_loss(self, rollout: BlockRollout, scored: Scored, goal: Goal) -> Iterator[Loss]:
        """Yield the student's loss on all frames that it learns from."""
        sample = rollout.sample[:, :, scored.learned :]
        goal = goal.frames(scored.learned - scored.first, scored.sample.shape[2])
        value = self._towards(sample, goal)
        yield Loss("student", value, len(sample), metrics=goal.metrics)

    def _block_losses(self, rollout: BlockRollout, scored: Scored, goal: Goal) -> Iterator[Loss]:
        """Yield the student's loss on each block in turn, from its last call made again.

        Counts are shares of the samples, so that the blocks' mean is the loss of the whole.
        """
        block, frames = self.family.block_frames, rollout.sample.shape[2]
        starts = range(scored.learned, frames, block)
        for start in range(0, frames, block):
            call = rollout.calls.pop(0)  # a block's past may go once it is learned
            if start not in starts:
                continue
            again = clean(self.student, call.state, call.condition)
            part = goal.frames(start - scored.first, start - scored.first + block)
            yield Loss(
                "student",
                self._towards(again, part, share=1.0 / len(starts)),
                len(again) / len(starts),
                more=start != starts[-1],
                metrics=goal.metrics,
            )
            del call, again

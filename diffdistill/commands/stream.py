"""``diffdistill sample --stream``: one video of any length, written as its frames are made."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from diffdistill.clips import ClipWriter, clip_suffix, to_image
from diffdistill.commands.sample import default_output, encoded_prompts
from diffdistill.commands.sessions import models, open_session
from diffdistill.errors import UserError
from diffdistill.grids import resized
from diffdistill.pipelines.switching import switched
from diffdistill.sampling import clip_frames, encode_prompts, inference
from diffdistill.streams import (
    Timing,
    check_length,
    num_blocks,
    stream,
    streaming_family,
    timed,
)


class Streamed(NamedTuple):
    """A video that was streamed.

    Attributes:
        path: The file.
        num_frames: Frames in it.
        timing: How long the model and the decoder took.
    """

    path: Path
    num_frames: int
    timing: Timing

    def __str__(self) -> str:
        """Return the path and the speed."""
        return (
            f"{self.path}: {self.num_frames} frames; the first after {self.timing.first:.3g} s, "
            f"{self.timing.fps:.3g} frames per second (model and decoder)"
        )


def stream_video(
    source: str,
    *,
    prompts: Sequence[str] = (),
    switches: Sequence[tuple[int, str]] = (),
    num_frames: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    size: tuple[int, int] | None = None,
    role: str = "student",
    checkpoint: str = "latest",
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> Streamed:
    """Stream one video of any length, and write each block of frames as it comes.

    Small canvases are enlarged as in a grid.

    Args:
        source: A run's folder, or a config (before any training).
        prompts: What to show; none takes the first of ``sample.prompts``, or else of the data.
        switches: Pixel frame and prompt: told from the block on that holds the frame, which
            is not the first.
        num_frames: Frames; None takes those of a clip.
        steps: Model calls for each block; None takes ``sample.num_steps``.
        seed: Seed of the noise; None takes ``sample.seed``.
        size: ``(H, W)`` in pixels; None takes ``sample.size``, or the data's commonest.
        role: ``student``, ``average`` or ``base``.
        checkpoint: Which checkpoint of a run.
        output: The GIF or MP4; None is ``samples/stream`` in the run's folder, or ``stream``.
        overrides: ``section.key=value`` changes of the config.

    Raises:
        UserError: If the model does not stream, or a frame or prompt does not fit.
    """
    session = open_session(source, checkpoint, overrides)
    family, settings = streaming_family(session, role), session.config.pictures
    model = models(session, [role])[role]
    count = clip_frames(session) if num_frames is None else num_frames
    assert count is not None, "a family that streams makes videos"
    steps = settings.num_steps if steps is None else steps
    _check(prompts, switches, count, steps)
    check_length(session, model, count)
    encoded, size = encoded_prompts(session, prompts[:1], size)
    told, starts = switched(family, switches, encoded.prompts[0])
    encoded = encode_prompts(session, told, size)
    path = output or default_output(source, f"stream{clip_suffix(size)}")
    timing, missing = Timing(), count
    with ClipWriter(path, settings.fps) as writer, inference(session), family.using("vae"):
        made = stream(
            session,
            model,
            encoded,
            num_steps=steps,
            seed=settings.seed if seed is None else seed,
            starts=starts,
        )
        blocks = timed(made, session.device, timing)
        with suppress(KeyboardInterrupt):  # what is there by then is written
            for _ in range(num_blocks(family, count)):
                for frame in resized(next(blocks)[:missing]):
                    writer.add(to_image(frame))
                missing = count - writer.num_frames
    return Streamed(path, writer.num_frames, timing)


def _check(
    prompts: Sequence[str], switches: Sequence[tuple[int, str]], num_frames: int, steps: int
) -> None:
    if len(prompts) > 1:
        raise UserError("--stream makes one video: give one --prompt, and --switch FRAME:PROMPT")
    if min(num_frames, steps) < 1:
        raise UserError("the number of frames and steps must be at least 1")
    for frame, text in switches:
        if not 0 <= frame < num_frames:
            raise UserError(
                f"--switch {frame}:{text}: the video has frames 0 to {num_frames - 1}; ask for "
                "more with --frames"
            )

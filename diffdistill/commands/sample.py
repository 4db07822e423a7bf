"""``diffdistill sample``."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.clips import clip_suffix, is_clip, save_clip
from diffdistill.commands.sessions import models, open_session
from diffdistill.data.dataset import open_dataset
from diffdistill.errors import UserError
from diffdistill.evaluation.groups import chosen_examples, commonest_size
from diffdistill.grids import save_grid, save_image
from diffdistill.sampling import (
    Encoded,
    at_once,
    clip_frames,
    encode_examples,
    encode_prompts,
    generate,
)
from diffdistill.session import Session, flow_family

NUM_PROMPTS = 8
LABELS = {"base": "base\nuntrained", "teacher": "teacher\nprompt only"}


class Drawn(NamedTuple):
    """What one model made.

    Attributes:
        pixels: Images ``[P * N, 3, H, W]`` or videos ``[P * N, T, 3, H, W]``, prompt by prompt.
        num_steps: Sampling steps.
    """

    pixels: Tensor
    num_steps: int


def sample(
    source: str,
    *,
    prompts: Sequence[str] = (),
    steps: int | None = None,
    seed: int | None = None,
    size: tuple[int, int] | None = None,
    num_images: int | None = None,
    compare: Sequence[str] = ("student",),
    checkpoint: str = "latest",
    output: Path | None = None,
    separate: bool = False,
    overrides: Sequence[str] = (),
) -> Path:
    """Draw prompts with one or several models, from the same noise, and return the file's path.

    Rows are prompts; each model has a block of ``num_images`` columns. The teacher is drawn with
    the prompt alone, not with its privileged view. Videos make a grid that is a video.

    Args:
        source: A run's folder, or a config (before any training).
        prompts: What to draw; none takes ``sample.prompts``, or else prompts of the data.
        steps: Sampling steps of all models; None takes ``sample.num_steps``, and
            ``sample.teacher_steps`` for the teacher.
        seed: Seed of the noise; None takes ``sample.seed``.
        size: ``(H, W)`` in pixels; None takes ``sample.size``, or the data's commonest.
        num_images: Images of each prompt; None takes ``sample.num_images``.
        compare: Some of base, student, teacher, average.
        checkpoint: Which checkpoint of a run.
        output: The PNG, or for videos the GIF or MP4; None is ``samples/sample`` in the run's
            folder, or ``sample``, with a suffix that suits.
        separate: Also write each image at its own size, in a folder beside the file.
        overrides: ``section.key=value`` changes of the config.
    """
    session = open_session(source, checkpoint, overrides)
    flow_family(session)  # no texts
    settings = session.config.pictures
    count = settings.num_images if num_images is None else num_images
    if min(count, 1 if steps is None else steps) < 1:
        raise UserError("steps and num_images must be at least 1")
    chosen = models(session, compare)
    encoded, size = encoded_prompts(session, prompts, size)
    frames = clip_frames(session)
    suffix = clip_suffix(size) if frames else ".png"
    path = output or default_output(source, f"sample{suffix}")
    if frames and not is_clip(path):
        raise UserError(f"{path}: these are videos: name a .gif or .mp4 file")
    blocks = {}
    for name, model in chosen.items():
        num_steps, guidance = how_sampled(session, name, steps)
        pixels = generate(
            session,
            model,
            encoded,
            num_steps=num_steps,
            seed=settings.seed if seed is None else seed,
            size=size,
            num_images=count,
            micro_batch=at_once(size, frames),
            guidance=guidance,
        )
        blocks[name] = Drawn(pixels, num_steps)
    _save(blocks, encoded.prompts, count, path, settings.fps)
    if separate:
        suffix = path.suffix if frames else suffix
        _save_separately(blocks, encoded.prompts, path.with_suffix(""), suffix, settings.fps)
    return path


def default_output(source: str, name: str) -> Path:
    """Return the file of that name among the run's samples, or here for a config."""
    run = Path(source)
    return run / "samples" / name if run.is_dir() else Path(name)


def how_sampled(session: Session, name: str, steps: int | None = None) -> tuple[int, float]:
    """Return the sampling steps of the model called ``name``, and its guidance."""
    settings = session.config.pictures
    if name != "teacher":
        return steps or settings.num_steps, 1.0
    return steps or settings.teacher_steps or settings.num_steps, settings.teacher_guidance


def encoded_prompts(
    session: Session, prompts: Sequence[str], size: tuple[int, int] | None
) -> tuple[Encoded, tuple[int, int]]:
    """Return the prompts to draw and their size, taken from the data where nobody gives them."""
    settings = session.config.pictures
    size, prompts = size or settings.size, prompts or settings.prompts
    if prompts and size:
        return encode_prompts(session, prompts, size), size
    dataset = open_dataset(session.config.data)
    size = size or commonest_size(dataset)
    if prompts:
        return encode_prompts(session, prompts, size), size
    examples = chosen_examples(dataset, NUM_PROMPTS)
    distinct = {
        (e.prompt, len(e.references), e.origin if e.references else ""): e for e in examples
    }
    bare = [e._replace(image=None, video=None, size=size) for e in distinct.values()]
    return encode_examples(session, bare), size


def _save(
    blocks: Mapping[str, Drawn], prompts: Sequence[str], num_images: int, path: Path, fps: float
) -> None:
    """Write one row for each prompt, with a block of columns for each model."""
    by_prompt = [b.pixels.unflatten(0, (len(prompts), num_images)) for b in blocks.values()]
    pixels = torch.cat(by_prompt, dim=1).flatten(0, 1)
    captions = []
    for name, drawn in blocks.items():
        steps = "1 step" if drawn.num_steps == 1 else f"{drawn.num_steps} steps"
        captions += [f"{LABELS.get(name, name)}\n{steps}", *[""] * (num_images - 1)]
    save_grid(pixels, path, len(captions), captions, prompts, fps=fps)


def _save_separately(
    blocks: Mapping[str, Drawn], prompts: Sequence[str], folder: Path, suffix: str, fps: float
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in blocks.items():
        num_images = len(drawn.pixels) // len(prompts)
        for index, pixels in enumerate(drawn.pixels):
            prompt, number = divmod(index, num_images)
            words = re.sub(r"\W+", "-", prompts[prompt])[:40].strip("-")
            path = folder / f"{prompt:03d}-{words}-{number:02d}-{name}{suffix}"
            if is_clip(path):
                save_clip(pixels, path, fps)
            else:
                save_image(pixels, path)

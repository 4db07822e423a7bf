"""``diffdistill sample``."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.commands.sessions import models, open_session
from diffdistill.data.dataset import open_dataset
from diffdistill.errors import UserError
from diffdistill.evaluation.few_step import at_once
from diffdistill.evaluation.groups import chosen_examples, commonest_size
from diffdistill.sampling import (
    Encoded,
    encode_examples,
    encode_prompts,
    generate,
    save_grid,
    save_image,
)
from diffdistill.session import Session

NUM_PROMPTS = 8
LABELS = {"base": "base\nuntrained", "teacher": "teacher\nprompt only"}


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
    """Draw prompts with one or several models, from the same noise, and return the PNG's path.

    Rows are prompts; each model has a block of ``num_images`` columns. The teacher is drawn with
    the prompt alone, not with its privileged view.

    Args:
        source: A run's folder, or a config (before any training).
        prompts: What to draw; none takes ``sample.prompts``, or else prompts of the data.
        steps: Sampling steps; None takes ``sample.num_steps``.
        seed: Seed of the noise; None takes ``sample.seed``.
        size: ``(H, W)`` in pixels; None takes ``sample.size``, or the data's commonest.
        num_images: Images of each prompt; None takes ``sample.num_images``.
        compare: Some of base, student, teacher, average.
        checkpoint: Which checkpoint of a run.
        output: The PNG; None is ``samples/sample.png`` in the run's folder, or ``sample.png``.
        separate: Also write each image at its own size, in a folder beside the PNG.
        overrides: ``section.key=value`` changes of the config.
    """
    session = open_session(source, checkpoint, overrides)
    settings = session.config.sample
    steps = settings.num_steps if steps is None else steps
    count = settings.num_images if num_images is None else num_images
    if min(steps, count) < 1:
        raise UserError("steps and num_images must be at least 1")
    chosen = models(session, compare)
    encoded, size = _encoded(session, prompts, size)
    blocks = {
        name: generate(
            session,
            model,
            encoded,
            num_steps=steps,
            seed=settings.seed if seed is None else seed,
            size=size,
            num_images=count,
            micro_batch=at_once(size),
        )
        for name, model in chosen.items()
    }
    run = Path(source)
    path = output or (run / "samples" / "sample.png" if run.is_dir() else Path("sample.png"))
    _save(blocks, encoded.prompts, count, steps, path)
    if separate:
        _save_separately(blocks, encoded.prompts, count, path.with_suffix(""))
    return path


def _encoded(
    session: Session, prompts: Sequence[str], size: tuple[int, int] | None
) -> tuple[Encoded, tuple[int, int]]:
    """Return the prompts to draw and their size, taken from the data where nobody gives them."""
    settings = session.config.sample
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
    bare = [example._replace(image=None, size=size) for example in distinct.values()]
    return encode_examples(session, bare), size


def _save(
    blocks: dict[str, Tensor], prompts: Sequence[str], num_images: int, steps: int, path: Path
) -> None:
    """Write one row for each prompt, with a block of columns for each model."""
    by_prompt = [pixels.unflatten(0, (len(prompts), num_images)) for pixels in blocks.values()]
    pixels = torch.cat(by_prompt, dim=1).flatten(0, 1)
    plural = "step" if steps == 1 else "steps"
    captions = []
    for name in blocks:
        captions += [f"{LABELS.get(name, name)}\n{steps} {plural}", *[""] * (num_images - 1)]
    save_grid(pixels, path, len(captions), captions, prompts)


def _save_separately(
    blocks: dict[str, Tensor], prompts: Sequence[str], num_images: int, folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in blocks.items():
        for index, image in enumerate(pixels):
            prompt, number = divmod(index, num_images)
            words = re.sub(r"\W+", "-", prompts[prompt])[:40].strip("-")
            save_image(image, folder / f"{prompt:03d}-{words}-{number:02d}-{name}.png")

"""``diffdistill preview``: is the teacher, shown the target, any closer to it than the student?"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffdistill.commands.sessions import open_session, render
from diffdistill.data.dataset import open_dataset
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.evaluation.digits import DigitJudge
from diffdistill.evaluation.few_step import EvaluateSettings, parse_settings
from diffdistill.evaluation.groups import chosen_examples, digit_labels
from diffdistill.grids import save_grid
from diffdistill.roles import Role
from diffdistill.sampling import inference
from diffdistill.session import Session, flow_family
from diffdistill.types import Batch, Example

CLEARLY = 0.95
"""The share of the student's error that the teacher's must stay under; the number is ours."""


class Comparison(NamedTuple):
    """One example: what it should be, and what both sides make of it from the same noise.

    Attributes:
        prompt: The caption.
        pixels: Target, student's and teacher's image, ``[3, 3, H, W]`` in [0, 1].
        student: Mean squared difference of the student's pixels to the target's.
        teacher: The same of the teacher's.
    """

    prompt: str
    pixels: Tensor
    student: float
    teacher: float


def preview(
    source: str,
    *,
    num_examples: int = 4,
    seed: int = 0,
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Draw what teacher and student make of the data before training; return a table and verdict.

    Args:
        source: A config (or a run's folder, for its latest checkpoint).
        num_examples: Examples of the data, evenly spaced.
        seed: Seed of the noise, the same for both sides.
        output: The PNG; None is ``preview.png``.
        overrides: ``section.key=value`` changes of the config.

    Raises:
        UserError: If the data has no images or the family no privileged view.
    """
    session = open_session(source, overrides=overrides)
    flow_family(session)  # no texts
    settings = parse_settings(session.config.evaluate)
    examples = chosen_examples(open_dataset(session.config.data), num_examples)
    comparisons = compare(session, examples, seed)
    path = output or Path("preview.png")
    pixels = torch.cat([comparison.pixels for comparison in comparisons])
    captions = ["target", "student\nprompt only", "teacher\nwith the view"]
    save_grid(pixels, path, 3, captions, [comparison.prompt for comparison in comparisons])
    parts = [_table(comparisons), _recognized(comparisons, settings), verdict(comparisons)]
    return "\n".join([part for part in parts if part] + [f"picture: {path}"])


def compare(session: Session, examples: Sequence[Example], seed: int) -> list[Comparison]:
    """Return what both sides make of each example, one at a time."""
    if any(example.image is None for example in examples):
        raise UserError("preview needs data with images: the teacher is shown the target")
    family = flow_family(session)
    with torch.no_grad():
        encoded = family.encode(examples)
    family.release()
    return [
        _compared(session, example, _batch(session, example, tensors, number), seed)
        for number, (example, tensors) in enumerate(zip(examples, encoded, strict=True))
    ]


def _batch(
    session: Session, example: Example, encoded: dict[str, Tensor], number: int
) -> dict[str, object]:
    batch = flow_family(session).collate([encoded])
    ids = torch.tensor([number], device=session.device)
    return {**batch, "ids": ids, "prompts": [example.prompt]}


def _compared(session: Session, example: Example, batch: Batch, seed: int) -> Comparison:
    family, roles = flow_family(session), session.roles.by_name
    student = roles["student"]
    teacher = roles.get("teacher", student)
    exposure = getattr(session.method, "exposure", 1.0) or 1.0
    noise = Draws(seed).normal("sample", batch["ids"], family.latent_shape(batch))
    steps = int(session.config.method.get("num_steps", session.config.pictures.num_steps))

    def drawn(role: Role, shown: float) -> Tensor:
        condition = family.condition(batch, exposure=shown)
        return family.decode(family.sample(role, condition, noise, num_steps=steps)).float().cpu()

    with inference(session):
        images = [drawn(student, 0.0), drawn(teacher, exposure)]
    assert example.image is not None
    target = interpolate(example.image[None].float(), images[0].shape[-2:], mode="bilinear")
    distances = [float((image - target).square().mean()) for image in images]
    return Comparison(example.prompt, torch.cat([target, *images]), *distances)


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Return in a sentence whether the privileged view can teach anything about this data."""
    count = len(comparisons)
    student = sum(c.student for c in comparisons) / count
    teacher = sum(c.teacher for c in comparisons) / count
    closer = sum(c.teacher < c.student for c in comparisons)
    numbers = f"mean squared error {teacher:.4g} against {student:.4g}, closer in {closer}/{count}"
    if teacher < CLEARLY * student:
        return (
            f"The teacher, shown the target, is closer to it than the student ({numbers}): there "
            "is something to learn. Check the picture: the student will also learn whatever the "
            "teacher gets wrong, such as its framing."
        )
    return (
        "WARNING: the teacher, shown the target, is not clearly closer to it than the student "
        f"({numbers}). D-OPSD cannot work with this view: it teaches no more "
        "than the teacher can reproduce. Choose another family.view, model or data, and try again."
    )


def _table(comparisons: Sequence[Comparison]) -> str:
    rows = [
        [_short(c.prompt), *_numbers(c.student), *_numbers(c.teacher), _closer(c)]
        for c in comparisons
    ]
    columns = ["prompt", "student MSE", "PSNR", "teacher MSE", "PSNR", "closer"]
    return render(columns, rows)


def _numbers(error: float) -> tuple[str, str]:
    """Return a mean squared error, and the same in dB against the full range of pixels."""
    return f"{error:.4g}", f"{-10.0 * torch.tensor(error).log10().item():.1f} dB"


def _closer(comparison: Comparison) -> str:
    return "teacher" if comparison.teacher < comparison.student else "student"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _recognized(comparisons: Sequence[Comparison], settings: EvaluateSettings) -> str:
    """Return which share of digits is recognized as prompted, where the data are digits."""
    labels = digit_labels(settings) if "digits" in settings.metrics else {}
    known = [c for c in comparisons if c.prompt in labels]
    if not known:
        return ""
    judge, wanted = DigitJudge(), torch.tensor([labels[c.prompt] for c in known])
    shares = [judge.accuracy(torch.stack([c.pixels[i] for c in known]), wanted) for i in range(3)]
    return "recognized as prompted: target {:.0%}, student {:.0%}, teacher {:.0%}".format(*shares)

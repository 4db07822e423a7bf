"""Quality against the number of sampling steps, over several seeds."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PositiveInt
from scipy import stats
from torch import Tensor

from diffdistill.options import parse
from diffdistill.protocols import Model
from diffdistill.sampling import Encoded, at_once, generate
from diffdistill.session import Session

Metric = Literal["digits", "clip", "dino", "perceptual", "moving-digits"]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


@dataclass(kw_only=True)
class EvaluateSettings:
    """The ``evaluate`` section of a config file, for all suites.

    Attributes:
        metrics: One or several. ``digits`` judges handwritten digits offline: share recognized
            as prompted, and Frechet distance to real scans. ``clip`` is the cosine of image and
            prompt. ``dino`` and ``perceptual`` are distances to the target images of the data.
            ``moving-digits``, the one metric that the suite ``video`` can add to its own, judges
            videos of moving digits offline.
        groups: For ``digits``: the classes that are judged together, by name.
        digit_prompt: For ``digits``: the prompt of a class; {word} becomes its English word, and
            {number} its numeral.
        prompts: For ``clip`` and videos: a .txt or .jsonl file of prompts, or VBench's
            VBench_full_info.json; None takes those of the data.
        max_examples: Examples of the data to take, evenly spaced.
        num_images: Images of each prompt; None makes 32 for ``digits``, 1 video for the suite
            ``video``, 5 for ``vbench``, and 4 for the others.
        num_steps: Each number of sampling steps to measure images at; videos are made with the
            steps of ``sample``.
        num_seeds: Seeds of the noise; the confidence intervals are over them.
        roles: Models to measure: ``base`` (before training) and roles of the method. None takes
            base and student for images, teacher and student for ``video``, the student for
            ``vbench``.
        size: ``(H, W)`` in pixels; None takes ``sample.size`` or the data's commonest.
        micro_batch: Images made at a time; None makes 4 megapixels, and at most 64 images.
        long_factor: For ``video``: drift is measured over streams so many times longer than a
            clip; 1 measures none.
        reward_batch: For ``video``: videos that the rewards judge at a time.
        clip_model: OpenCLIP's name of the architecture in ``clip_path``.
        clip_path: File with the weights of an OpenCLIP model.
        dino_path: Folder of a transformers vision model.
        perceptual_path: File with torchvision's weights of VGG16.
    """

    metrics: Annotated[list[Metric], BeforeValidator(_listed)] = field(default_factory=list)
    groups: dict[str, list[Annotated[int, Field(ge=0, le=9)]]] = field(
        default_factory=lambda: {"all": list(range(10))}
    )
    digit_prompt: str = "a handwritten {word}"
    prompts: str | None = None
    max_examples: PositiveInt = 16
    num_images: PositiveInt | None = None
    num_steps: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4, 8, 32])
    num_seeds: PositiveInt = 3
    roles: list[str] | None = None
    size: tuple[int, int] | None = None
    micro_batch: PositiveInt | None = None
    long_factor: PositiveInt = 5
    reward_batch: PositiveInt = 1
    clip_model: str = "ViT-B-32"
    clip_path: str | None = None
    dino_path: str | None = None
    perceptual_path: str | None = None


@dataclass
class Group:
    """Prompts whose images are measured together.

    Attributes:
        name: Its name in the results.
        encoded: The prompts.
        size: ``(H, W)`` of the images in pixels.
        num_images: Images of each prompt.
        measure: Returns each metric of images ``[P * num_images, 3, H, W]``, prompt by prompt.
    """

    name: str
    encoded: Encoded
    size: tuple[int, int]
    num_images: int
    measure: Callable[[Tensor], Mapping[str, float]]


class Row(NamedTuple):
    """One metric of one model at one number of steps.

    Attributes:
        model: The model's name.
        num_steps: Sampling steps.
        metric: The metric's name.
        group: The group's name.
        mean: Mean over the seeds.
        low: Lower end of the 95 % confidence interval; None with a single seed.
        high: Upper end.
        seeds: The seeds.
        values: The metric for each seed.
    """

    model: str
    num_steps: int
    metric: str
    group: str
    mean: float
    low: float | None
    high: float | None
    seeds: list[int]
    values: list[float]


def parse_settings(values: Mapping[str, Any], origin: str = "evaluate") -> EvaluateSettings:
    """Return the checked ``evaluate`` section.

    Raises:
        UserError: For an unknown key or a value that does not fit.
    """
    settings: EvaluateSettings = parse(EvaluateSettings, values, origin)
    return settings


def confidence_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return mean, low and high: Student's 95 % interval of the mean of ``values``."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return mean, mean - half, mean + half


def few_step(
    session: Session,
    models: Mapping[str, Model],
    groups: Sequence[Group],
    settings: EvaluateSettings,
) -> Iterator[Row]:
    """Yield every metric of every model, for each number of steps; same noise for all."""
    seeds = list(range(settings.num_seeds))
    for (name, model), num_steps, group in product(models.items(), settings.num_steps, groups):
        at_a_time = settings.micro_batch or at_once(group.size)
        measured = [
            _measure(session, model, group, num_steps=num_steps, seed=seed, micro_batch=at_a_time)
            for seed in seeds
        ]
        for metric in measured[0]:
            values = [float(result[metric]) for result in measured]
            interval = confidence_interval(values)
            yield Row(name, num_steps, metric, group.name, *interval, seeds, values)


def _measure(
    session: Session, model: Model, group: Group, *, num_steps: int, seed: int, micro_batch: int
) -> Mapping[str, float]:
    pixels = generate(
        session,
        model,
        group.encoded,
        num_steps=num_steps,
        seed=seed,
        size=group.size,
        num_images=group.num_images,
        micro_batch=micro_batch,
    )
    return group.measure(pixels)

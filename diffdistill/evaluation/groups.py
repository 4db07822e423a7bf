"""What the ``evaluate`` section asks for: prompts, and how their images are measured."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.dataset import ExampleDataset, open_dataset
from diffdistill.errors import UserError
from diffdistill.evaluation.digits import NUM_FEATURES, DigitJudge
from diffdistill.evaluation.few_step import EvaluateSettings, Group, Metric
from diffdistill.evaluation.perceptual import ClipScore, FeatureDistance, PatchDistance, local
from diffdistill.sampling import encode_examples, encode_prompts
from diffdistill.session import Session
from diffdistill.types import Example

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

NUM_DIGITS = 32
NUM_PICTURES = 4

Score = Callable[[Tensor], Tensor]
"""Returns one number for each image."""


def make_groups(session: Session, settings: EvaluateSettings) -> list[Group]:
    """Return the groups that ``settings`` describes, with their prompts encoded.

    Raises:
        UserError: If nothing is asked for, or a model or target image is missing.
    """
    if not settings.metrics:
        raise UserError("evaluate.metrics is empty: name some of digits, clip, dino, perceptual")
    if "moving-digits" in settings.metrics:
        raise UserError("evaluate.metrics moving-digits is of videos: use --suite video")
    size = settings.size or session.config.pictures.size
    if size is None:
        size = commonest_size(open_dataset(session.config.data))
    groups: list[Group] = []
    if "digits" in settings.metrics:
        groups += _digit_groups(session, settings, size)
    if "clip" in settings.metrics and settings.prompts is not None:
        groups.append(_prompt_group(session, settings, settings.prompts, size))
    on_data = {*settings.metrics} - ({"digits", "clip"} if settings.prompts else {"digits"})
    if on_data:
        groups.append(_data_group(session, settings, on_data))
    return groups


def commonest_size(dataset: ExampleDataset) -> tuple[int, int]:
    """Return the ``(H, W)`` that most examples have."""
    return Counter(dataset.buckets).most_common(1)[0][0]


def chosen_examples(dataset: ExampleDataset, count: int) -> list[Example]:
    """Return up to ``count`` evenly spaced examples of the commonest size."""
    size = commonest_size(dataset)
    alike = [index for index, bucket in enumerate(dataset.buckets) if bucket == size]
    count = min(count, len(alike))
    return [dataset[alike[place * len(alike) // count]] for place in range(count)]


def digit_labels(settings: EvaluateSettings) -> dict[str, int]:
    """Return the class that each prompt of a digit asks for."""
    template = settings.digit_prompt
    prompts = [
        template.replace("{word}", word).replace("{number}", str(number))
        for number, word in enumerate(WORDS)
    ]
    if len(set(prompts)) < len(WORDS):
        raise UserError(f"evaluate.digit_prompt {template!r} has no {{word}} and no {{number}}")
    return {prompt: number for number, prompt in enumerate(prompts)}


def _digit_groups(
    session: Session, settings: EvaluateSettings, size: tuple[int, int]
) -> list[Group]:
    judge, prompts = DigitJudge(), list(digit_labels(settings))
    num_images = settings.num_images or NUM_DIGITS
    groups = []
    for name, classes in settings.groups.items():
        if not classes:
            raise UserError(f"evaluate.groups.{name} has no classes")
        if len(classes) * num_images <= NUM_FEATURES:
            raise UserError(
                f"evaluate.groups.{name}: a Frechet distance needs more than {NUM_FEATURES} "
                f"images, not {len(classes)} x {num_images}: raise evaluate.num_images"
            )
        encoded = encode_prompts(session, [prompts[label] for label in classes], size)
        measure = _digit_measure(judge, classes, num_images)
        groups.append(Group(name, encoded, size, num_images, measure))
    return groups


def _digit_measure(
    judge: DigitJudge, classes: Sequence[int], num_images: int
) -> Callable[[Tensor], Mapping[str, float]]:
    labels = torch.tensor(classes).repeat_interleave(num_images)

    def measure(pixels: Tensor) -> Mapping[str, float]:
        return {
            "accuracy": judge.accuracy(pixels, labels),
            "frechet": judge.frechet(pixels, classes),
        }

    return measure


def _prompt_group(
    session: Session, settings: EvaluateSettings, path: str, size: tuple[int, int]
) -> Group:
    prompts = read_prompts(Path(path))
    num_images = settings.num_images or NUM_PICTURES
    encoded = encode_prompts(session, prompts, size)
    measure = _averages({"clip": _clip(session, settings, prompts, num_images)})
    return Group("prompts", encoded, size, num_images, measure)


def _data_group(session: Session, settings: EvaluateSettings, metrics: Set[Metric]) -> Group:
    """Return the group of the data's own prompts, judged by prompt or by target image."""
    dataset = open_dataset(session.config.data)
    examples = chosen_examples(dataset, settings.max_examples)
    num_images = settings.num_images or NUM_PICTURES
    scores: dict[str, Score] = {}
    if "clip" in metrics:
        scores["clip"] = _clip(session, settings, [e.prompt for e in examples], num_images)
    if "dino" in metrics:
        path = local(settings.dino_path, "dino_path", "the folder of a transformers vision model")
        scores["dino"] = _to_targets(PatchDistance.load(path, session.device), examples, num_images)
    if "perceptual" in metrics:
        what = "a file with torchvision's weights of VGG16"
        path = local(settings.perceptual_path, "perceptual_path", what)
        distance = FeatureDistance.load(path, session.device)
        scores["perceptual"] = _to_targets(distance, examples, num_images)
    encoded, size = encode_examples(session, examples), commonest_size(dataset)
    return Group("data", encoded, size, num_images, _averages(scores))


def _averages(scores: Mapping[str, Score]) -> Callable[[Tensor], Mapping[str, float]]:
    return lambda pixels: {name: float(score(pixels).mean()) for name, score in scores.items()}


def _clip(
    session: Session, settings: EvaluateSettings, prompts: Sequence[str], num_images: int
) -> Score:
    what = f"a file with the weights of OpenCLIP's {settings.clip_model}"
    path = local(settings.clip_path, "clip_path", what)
    score = ClipScore.load(settings.clip_model, path, session.device)
    told = [prompt for prompt in prompts for _ in range(num_images)]
    return lambda pixels: score(pixels, told)


def _to_targets(
    distance: Callable[[Tensor, Tensor], Tensor], examples: Sequence[Example], num_images: int
) -> Score:
    images = [example.image for example in examples if example.image is not None]
    if len(images) < len(examples):
        raise UserError("distances to targets need data with images")
    targets = torch.stack(images).repeat_interleave(num_images, dim=0)
    return lambda pixels: distance(pixels, targets)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file (see ``read_named_prompts``), to be told to a model.

    Raises:
        UserError: If there are none.
    """
    return [told for _, told in _prompt_rows(path)]


def read_named_prompts(path: Path) -> dict[str, str]:
    """Return the prompts of a .txt, .jsonl or .json file, each by its name.

    A line of text is a prompt; a row of JSON has it as ``text``. Rows of VBench's lists have
    ``prompt_en``, which is its name too, also where a longer ``text`` is to be told.

    Raises:
        UserError: If there are none.
    """
    return dict(_prompt_rows(path))


def _prompt_rows(path: Path) -> list[tuple[str, str]]:
    """Return name and prompt of each row of a file."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        rows: list[Any] = [{"text": line} for line in lines]
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines]
        elif path.suffix == ".json":
            rows = json.loads(text)
        pairs = [_named_prompt(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error!r}") from error
    if not pairs:
        raise UserError(f"{path} holds no prompts")
    return pairs


def _named_prompt(row: Mapping[str, Any]) -> tuple[str, str]:
    told = row["text"] if "text" in row else row["prompt_en"]
    name = row.get("prompt_en", told)
    return str(name).strip(), str(told).strip()

"""How boundary predictors learn from annotated segments."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffdistill.boundaries import IGNORED, next_labels, style_tokens
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.boundary import classifier, padded, read


class Annotated(NamedTuple):
    """A text and its parts that are style.

    Attributes:
        text: The text.
        spans: Start and end of each part, in characters.
        source: The number of the text that it is a part of.
    """

    text: str
    spans: Sequence[tuple[int, int]]
    source: int = 0


class Lesson(NamedTuple):
    """A segment as a predictor learns it: token ids, the label of each, and of which text it is."""

    tokens: list[int]
    labels: list[int]
    source: int


@dataclass(frozen=True)
class Fit:
    """How a predictor is trained; see ``tessy_settings.FitSettings``."""

    lr: float
    batch_size: int
    epochs: int
    held_out: float
    max_length: int
    seed: int = 0


class Fitted(NamedTuple):
    """What came of it.

    Attributes:
        accuracy: The share of held-out tokens whose label is predicted, after the best epoch.
        majority: That of always predicting what is more frequent.
        segments: How many it learned from.
        epoch: The best one, from 1 on.
    """

    accuracy: float
    majority: float
    segments: int
    epoch: int


def lesson(tokenizer: Any, segment: Annotated, max_length: int) -> Lesson:
    """Return the tokens of a segment, each labeled with the kind of the next."""
    ids, offsets = read(tokenizer, segment.text)
    labels = next_labels(style_tokens(offsets, segment.spans))
    return Lesson(ids[:max_length], labels[:max_length], segment.source)


def split(lessons: Sequence[Lesson], share: float) -> tuple[list[Lesson], list[Lesson]]:
    """Return lessons to learn, and those of other texts, at least a share, to hold out."""
    sizes, held = Counter(row.source for row in lessons), set[int]()
    for row in reversed(lessons):
        if sum(sizes[source] for source in held) >= max(1, round(share * len(lessons))):
            break
        held.add(row.source)
    learned = [row for row in lessons if row.source not in held]
    return learned, [row for row in lessons if row.source in held]


def fit(
    base: Path,
    segments: Sequence[Annotated],
    how: Fit,
    output: Path,
    device: torch.device,
) -> Fitted:
    """Train a predictor, keep its best epoch in a folder, and return how good it is.

    Cross-entropy without class weights, and AdamW, as in TESSY's code; that its rate is constant
    is ours.

    Args:
        base: The folder of a language model.
        segments: What to learn, in random order; those of the last texts are held out.
        how: How.
        output: The folder to write.
        device: Where.

    Raises:
        UserError: If there are too few segments.
    """
    tokenizer = loading.load_tokenizer(base, False)
    lessons = [lesson(tokenizer, segment, how.max_length) for segment in segments]
    lessons = [row for row in lessons if len(row.tokens) > 1]
    learned, held = split(lessons, how.held_out)
    if not learned or not held:
        raise UserError(
            f"{len(lessons)} annotated segments of {len({row.source for row in lessons})} texts "
            "are too few for a boundary predictor: raise tessy.fit.num_texts"
        )
    torch.manual_seed(how.seed)
    network = classifier(base).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=how.lr)
    best, best_epoch, kept = -1.0, 0, {}
    for epoch in range(1, how.epochs + 1):
        network.train()
        for batch in _batches(learned, how, epoch):
            optimizer.zero_grad()
            _error(network, batch).backward()
            optimizer.step()
        accuracy = _accuracy(network.eval(), held, how.batch_size)
        if accuracy > best:
            best, best_epoch = accuracy, epoch
            kept = {name: value.cpu().clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    network.save_pretrained(str(output))
    tokenizer.save_pretrained(str(output))
    labels = [label for row in held for label in row.labels if label != IGNORED]
    share = sum(labels) / len(labels)
    return Fitted(best, max(share, 1.0 - share), len(learned), best_epoch)


def _batches(lessons: Sequence[Lesson], how: Fit, epoch: int) -> Iterator[Sequence[Lesson]]:
    order = torch.randperm(len(lessons), generator=Draws(how.seed).generator("fit", epoch))
    shuffled = [lessons[place] for place in order.tolist()]
    for start in range(0, len(shuffled), how.batch_size):
        yield shuffled[start : start + how.batch_size]


def _error(network: Any, batch: Sequence[Lesson]) -> Tensor:
    """Return the mean cross-entropy of a batch's labels."""
    logits, labels = _judged(network, batch)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def _accuracy(network: Any, lessons: Sequence[Lesson], size: int) -> float:
    right, count = 0, 0
    for start in range(0, len(lessons), size):
        logits, labels = _judged(network, lessons[start : start + size])
        right += int((logits.argmax(-1) == labels).sum())
        count += int((labels != IGNORED).sum())
    return right / count


def _judged(network: Any, batch: Sequence[Lesson]) -> tuple[Tensor, Tensor]:
    """Return logits ``[B, L, 2]`` and labels ``[B, L]``."""
    tokens, seen = padded([row.tokens for row in batch])
    labels, _ = padded([row.labels for row in batch], IGNORED)
    device = network.device
    logits = network(input_ids=tokens.to(device), attention_mask=seen.to(device)).logits
    return logits.float(), labels.to(device)

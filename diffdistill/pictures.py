"""The pictures, or videos, that a run draws of itself while it trains."""

from pathlib import Path

import torch

from diffdistill.clips import clip_suffix
from diffdistill.data.cache import EncodedDataset
from diffdistill.data.dataset import ExampleDataset
from diffdistill.grids import save_grid
from diffdistill.sampling import (
    NUM_ROLLOUTS,
    at_once,
    clip_frames,
    encode_examples,
    encode_prompts,
    generate,
    makes_videos,
    rollout_figure,
)
from diffdistill.session import Session, flow_family
from diffdistill.types import Batch, Example

NUM_PROMPTS = 8


class Painter:
    """Draws a sample grid, and the rollouts of student and teacher, every N steps.

    Of a family that makes videos it draws a grid of videos, and no rollouts. Prompts are encoded
    once, when the painter is made, so that the encoders stay off the device.

    Args:
        session: The built run.
        encoded: Its data, for prompts where the config has none, and for the rollouts.
        output: The run's folder.
        main: Whether this rank writes the files; every rank must draw.
    """

    def __init__(
        self, session: Session, encoded: EncodedDataset, output: Path, *, main: bool
    ) -> None:
        self.session = session
        self.settings = session.config.pictures
        assert isinstance(encoded.dataset, ExampleDataset)
        self.encoded = encoded
        self.dataset = encoded.dataset
        self.folder = output / "samples"
        self.main = main
        if self.settings.every is not None:
            self.size = self.settings.size or self.dataset.buckets[0]
            if self.settings.prompts:
                self.prompts = encode_prompts(session, self.settings.prompts, self.size)
            else:
                self.prompts = encode_examples(session, self._distinct())

    def _distinct(self) -> list[Example]:
        """Return the first examples with different prompts, of the size of the first."""
        dataset = self.dataset
        first = {p: i for i, p in reversed(list(enumerate(dataset.prompts)))}
        alike = [i for i in sorted(first.values()) if dataset.groups[i] == dataset.groups[0]]
        return [dataset[index] for index in alike[:NUM_PROMPTS]]

    def after_step(self, step: int) -> list[tuple[str, Path]]:
        """Return name and file of each picture or video drawn after ``step``."""
        every, total = self.settings.every, self.session.config.train.steps
        if every is None or (step % every and step not in {1, total}):
            return []
        drawn = [("samples", self._samples(step))]
        has_steps = "num_steps" in self.session.config.method
        if self.settings.rollouts and has_steps and not makes_videos(self.session):
            drawn.append(("rollouts", self._rollouts(step)))
        return drawn

    def _samples(self, step: int) -> Path:
        role = "average" if "average" in self.session.roles.by_name else "student"
        frames = clip_frames(self.session)
        pixels = generate(
            self.session,
            self.session.roles[role],
            self.prompts,
            num_steps=self.settings.num_steps,
            seed=self.settings.seed,
            size=self.size,
            num_images=self.settings.num_images,
            micro_batch=at_once(self.size, frames) if frames else 4,
        )
        columns = max(self.settings.num_images, min(len(pixels), NUM_PROMPTS))
        suffix = clip_suffix(self.size) if frames else ".png"
        path = self.folder / f"step-{step:06d}{suffix}"
        if self.main:
            save_grid(pixels, path, columns, fps=self.settings.fps)
        return path

    def _rollouts(self, step: int) -> Path:
        batch = self._first_examples()
        steps = int(self.session.config.method["num_steps"])
        grid = rollout_figure(self.session, batch, steps, self.settings.seed)
        path = self.folder / f"rollout-{step:06d}.png"
        if self.main:
            save_grid(grid.pixels, path, grid.columns, grid.captions)
        return path

    def _first_examples(self) -> Batch:
        """Return a batch of the first examples that share a size."""
        groups = self.dataset.groups
        alike = [i for i, group in enumerate(groups) if group == groups[0]][:NUM_ROLLOUTS]
        batch = flow_family(self.session).collate([self.encoded[i] for i in alike])
        batch["ids"] = torch.tensor(alike, device=self.session.device)
        batch["prompts"] = [self.dataset.prompts[i] for i in alike]
        return batch

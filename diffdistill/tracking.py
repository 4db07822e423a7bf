"""Where metrics go: metrics.jsonl always, TensorBoard and W&B where asked, and the screen."""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from diffdistill.clips import is_clip, still
from diffdistill.config import RunConfig
from diffdistill.errors import MissingExtra


class Sink(Protocol):
    """Something that takes scalars, pictures and texts."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the scalars of one step."""
        ...

    def picture(self, step: int, name: str, path: Path) -> None:
        """Take a PNG, GIF or MP4 file."""
        ...

    def text(self, step: int, name: str, path: Path) -> None:
        """Take a Markdown file."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class JsonLines:
    """Appends one JSON object per step; a resumed run first drops the lines it will redo."""

    def __init__(self, path: Path, start: int) -> None:
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= start]
            path.write_text("".join(f"{line}\n" for line in lines))
        self.file = path.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line and flush it."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        """Pictures are files already."""

    def text(self, step: int, name: str, path: Path) -> None:
        """Texts are files already."""

    def close(self) -> None:
        """Sync the file to the disk and close it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed run may be half written
        return float("inf")


class TensorBoard:
    """Writes TensorBoard events."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Write the picture, or the first frame of the video."""
        from torchvision.transforms.functional import pil_to_tensor

        self.writer.add_image(name, pil_to_tensor(still(path)), step)

    def text(self, step: int, name: str, path: Path) -> None:
        """Write the text."""
        self.writer.add_text(name, path.read_text(), step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WandB:
    """Logs to a Weights & Biases project."""

    def __init__(self, project: str, folder: Path, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("wandb", "tracking.wandb", "wandb") from None
        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=project,
            name=folder.name,
            dir=folder,
            config=config.to_dict(),
            resume="allow",
            id=f"{folder.name}-{sha256(str(folder.absolute()).encode()).hexdigest()[:8]}",
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the scalars."""
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Log the picture or video."""
        kind = self.wandb.Video if is_clip(path) else self.wandb.Image
        self.run.log({name: kind(str(path))}, step=step)

    def text(self, step: int, name: str, path: Path) -> None:
        """Log the text, as it is written."""
        page = f"<pre>{escape(path.read_text())}</pre>"
        self.run.log({name: self.wandb.Html(page)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Tracker:
    """All sinks of a run, and the progress line; silent on every rank but the first."""

    def __init__(self, config: RunConfig, output: Path, start: int, *, main: bool) -> None:
        self.sinks: list[Sink] = []
        self.main = main
        self.console = Console(stderr=True, quiet=not main)
        self.every = config.train.log_every
        self.total = config.train.steps
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (main and self.console.is_terminal),
        )
        self.task = self.bar.add_task("train", total=config.train.steps, completed=start)
        if main:
            self.sinks.append(JsonLines(output / "metrics.jsonl", start))
            if config.tracking.tensorboard:
                self.sinks.append(TensorBoard(output / "tensorboard", start))
            if config.tracking.wandb:
                self.sinks.append(WandB(config.tracking.wandb, output, config))

    def __enter__(self) -> "Tracker":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        for sink in self.sinks:
            sink.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step."""
        for sink in self.sinks:
            sink.scalars(step, values)
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.4g}"
            for name, value in values.items()
            if name.startswith("loss/")
        )
        line = (
            f"{losses}  {1 / max(values['seconds'], 1e-9):.2f} it/s  "
            f"{values['peak_memory_gib']:.2f} GiB"
        )
        self.bar.update(self.task, completed=step, description=line)
        if not self.console.is_terminal and (step % self.every == 0 or step == self.total):
            self.console.print(f"step {step}/{self.total}  {line}", highlight=False)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Log a picture."""
        for sink in self.sinks:
            sink.picture(step, name, path)

    def text(self, step: int, name: str, path: Path) -> None:
        """Log a text."""
        for sink in self.sinks:
            sink.text(step, name, path)

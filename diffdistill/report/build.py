"""Runs read from their folders, and rendered as one self-contained page."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffdistill.errors import UserError
from diffdistill.evaluation.few_step import Row
from diffdistill.evaluation.video import VideoRow
from diffdistill.report.figures import Curve, data_uri, few_step_figure, loss_figure

MOST_GRIDS = 6
MOST_ROLLOUTS = 3
MOST_STREAMS = 3
KINDS = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}
LAST_SHARE = 0.1
HIGHER_IS_BETTER = {"accuracy", "clip"}


class Picture(NamedTuple):
    """A picture or video inside the page."""

    title: str
    uri: str

    @property
    def is_video(self) -> bool:
        """Return whether a browser shows it as a video and not as an image."""
        return self.uri.startswith("data:video/")


@dataclass
class Run:
    """What one run's folder says.

    Attributes:
        name: Its name in the page.
        config: The resolved config, as YAML.
        summary: Facts by name.
        metrics: One mapping for each training step.
        evaluation: The rows of its evaluation of images.
        videos: The rows of its evaluation of videos.
        grids: Samples over training.
        rollouts: Student and teacher at each rollout state.
        streams: Videos that were streamed.
        versions: Versions of packages.
    """

    name: str
    config: str
    summary: dict[str, str]
    metrics: list[dict[str, float]]
    evaluation: list[Row]
    videos: list[VideoRow]
    grids: list[Picture]
    rollouts: list[Picture]
    streams: list[Picture]
    versions: dict[str, str]


class Table(NamedTuple):
    """Numbers with a column for each model.

    Attributes:
        title: What it is about.
        head: What a line stands for.
        columns: The models.
        lines: The name of each line (a number of steps, or a metric) and its cells.
    """

    title: str
    head: str
    columns: list[str]
    lines: list[tuple[str, list[str]]]


def build_report(
    folders: Sequence[Path],
    *,
    title: str = "Distillation report",
    figures: Sequence[tuple[str, Path]] = (),
) -> str:
    """Return the HTML of a page about the runs in ``folders``.

    Args:
        folders: The runs' folders.
        title: The page's title.
        figures: Title and file (PNG, GIF, MP4) of pictures to put first.

    Raises:
        UserError: If a folder holds no run, or a picture is missing.
    """
    if not folders:
        raise UserError("name at least one run's folder")
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    losses, measured = loss_curves(runs), evaluations(runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(
        title=title,
        runs=runs,
        figures=[_picture(name, path) for name, path in figures],
        losses=loss_figure(losses) if losses else None,
        curves=few_step_figure(_few_step_curves(measured)) if measured else None,
        tables=[_table(name, columns) for name, columns in measured.items()],
        video=video_table(runs),
    )


def read_run(folder: Path, name: str) -> Run:
    """Return what is in a run's folder; only the config must be there.

    Raises:
        UserError: If there is no config, or a file is damaged.
    """
    try:
        text = (folder / "config.yaml").read_text()
        config = yaml.safe_load(text)
        metrics = _metrics(folder / "metrics.jsonl")
        rows = [Row(**row) for row in _json(folder / "evaluation.json", [])]
        videos = [VideoRow(**row) for row in _json(folder / "evaluation-video.json", [])]
        versions = _json(folder / "versions.json", {})
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run folder: it has no config.yaml") from None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: cannot read the run: {error}") from error
    samples = folder / "samples"
    return Run(
        name=name,
        config=text,
        summary=_summary(config, metrics),
        metrics=metrics,
        evaluation=rows,
        videos=videos,
        grids=_pictures(samples.glob("step-*"), MOST_GRIDS),
        rollouts=_pictures(samples.glob("rollout-*"), MOST_ROLLOUTS),
        streams=[_picture(path.stem, path) for path in _shown(samples.glob("stream*"))][
            :MOST_STREAMS
        ],
        versions=versions,
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, or their paths where two are called the same."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [str(folder) for folder in folders]


def _metrics(path: Path) -> list[dict[str, float]]:
    """Return the steps of a metrics file; a last line cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    return [json.loads(line) for line in lines]


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def _summary(config: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return what a reader wants to know of a run first."""
    facts = {
        "method": _described(config["method"]),
        "family": _described(config["family"]),
        **{f"role {name}": _role(role) for name, role in config.get("roles", {}).items()},
        "steps": f"{len(metrics)} of {config['train']['steps']}",
    }
    if not metrics:
        return facts
    last = metrics[-math.ceil(LAST_SHARE * len(metrics)) :]
    for name in [key for key in metrics[-1] if key.startswith("loss/")]:
        value = fmean(step[name] for step in last if name in step)
        facts[_loss_title(name)] = f"{value:.4g} over the last {LAST_SHARE:.0%} of steps"
    if "seconds" in metrics[-1]:
        facts["seconds per step"] = f"{fmean(step['seconds'] for step in metrics):.3g}"
    if "peak_memory_gib" in metrics[-1]:
        facts["peak memory"] = f"{max(step['peak_memory_gib'] for step in metrics):.2f} GiB"
    return facts


def _loss_title(name: str) -> str:
    return f"loss of {name.removeprefix('loss/')}"


def _described(section: Mapping[str, Any]) -> str:
    """Return a name and its most telling options."""
    options = ("path", "view", "num_steps", "weight", "guidance")
    told = [f"{key} {section[key]}" for key in options if section.get(key) not in (None, "")]
    return ", ".join([str(section["name"]), *told])


def _role(role: Mapping[str, Any]) -> str:
    parts = [str(role["weights"])]
    if role["weights"] in ("ema", "live"):
        parts[0] += f" of {role['of']}"
    if role["weights"] == "ema":
        parts.append(f"decay {role['decay']}")
    if role.get("adapter") == "lora":
        parts.append(f"{'DoRA' if role.get('dora') else 'LoRA'} of rank {role['rank']}")
    if role.get("adapter") == "shadow":
        parts.append(f"shadow ({role['shadow']['variant']})")
    return ", ".join(parts)


def _pictures(paths: Iterable[Path], most: int) -> list[Picture]:
    """Return up to ``most`` pictures, evenly spaced, with the first and the last."""
    found = _shown(paths)
    if len(found) > most:
        found = [found[index * (len(found) - 1) // (most - 1)] for index in range(most)]
    return [_picture(f"step {int(path.stem.rpartition('-')[2])}", path) for path in found]


def _shown(paths: Iterable[Path]) -> list[Path]:
    """Return the pictures and videos among ``paths``, in order."""
    return sorted(path for path in paths if path.suffix in KINDS)


def _picture(title: str, path: Path) -> Picture:
    try:
        return Picture(title, data_uri(path.read_bytes(), KINDS.get(path.suffix, "image/png")))
    except OSError as error:
        raise UserError(f"cannot read the picture {path}: {error.strerror}") from error


def loss_curves(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """Return the finite losses of all runs, by title."""
    curves: dict[str, list[Curve]] = {}
    for run in runs:
        names = {key: None for step in run.metrics for key in step if key.startswith("loss/")}
        for name in names:
            points = [
                (s["step"], s[name]) for s in run.metrics if math.isfinite(s.get(name, math.nan))
            ]
            if points:
                x, y = ([*values] for values in zip(*points, strict=True))
                curves.setdefault(_loss_title(name), []).append(Curve(run.name, x, y))
    return curves


def evaluations(runs: Sequence[Run]) -> dict[str, dict[str, list[Row]]]:
    """Return the rows of all runs by metric and group, then by model.

    The models of several runs stand side by side; runs that agree on the base share one.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    for run in runs:
        by_metric: dict[str, dict[str, list[Row]]] = {}
        for row in run.evaluation:
            name = f"{row.metric}, {row.group}"
            by_metric.setdefault(name, {}).setdefault(row.model, []).append(row)
        for name, models in by_metric.items():
            columns = found.setdefault(name, {})
            for model, rows in models.items():
                if model != "base":
                    columns[f"{run.name}: {model}" if len(runs) > 1 else model] = rows
                elif columns.setdefault("base", rows) != rows:
                    columns[f"{run.name}: base"] = rows
    return found


def _few_step_curves(measured: Mapping[str, Mapping[str, list[Row]]]) -> dict[str, list[Curve]]:
    return {
        _titled(name): [_curve(label, rows) for label, rows in columns.items()]
        for name, columns in measured.items()
    }


def _curve(label: str, rows: Sequence[Row]) -> Curve:
    ordered = sorted(rows, key=lambda row: row.num_steps)
    low = [row.mean if row.low is None else row.low for row in ordered]
    high = [row.mean if row.high is None else row.high for row in ordered]
    steps = [float(row.num_steps) for row in ordered]
    return Curve(label, steps, [row.mean for row in ordered], low, high)


def _table(name: str, columns: Mapping[str, list[Row]]) -> Table:
    cells = {(label, r.num_steps): _cell(r) for label, rows in columns.items() for r in rows}
    steps = sorted({num_steps for _, num_steps in cells})
    lines = [(str(n), [cells.get((label, n), "") for label in columns]) for n in steps]
    return Table(_titled(name), "steps", list(columns), lines)


def video_table(runs: Sequence[Run]) -> Table | None:
    """Return every metric of the videos of all runs, a line each; None where none was measured."""
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for run in runs:
        for row in run.videos:
            steps = f"{row.num_steps} step{'s' * (row.num_steps > 1)}"
            model = f"{run.name}: {row.model}" if len(runs) > 1 else row.model
            column = f"{model}, {steps}"
            columns[column] = None
            cells.setdefault(row.metric, {})[column] = _cell(row)
    if not cells:
        return None
    lines = [(metric, [found.get(c, "") for c in columns]) for metric, found in cells.items()]
    return Table("Videos", "metric", list(columns), lines)


def _titled(name: str) -> str:
    better = "higher" if name.partition(",")[0] in HIGHER_IS_BETTER else "lower"
    return f"{name} ({better} is better)"


def _cell(row: Row | VideoRow) -> str:
    if row.low is None or row.high is None:
        return f"{row.mean:.4g}"
    return f"{row.mean:.4g} [{row.low:.4g}, {row.high:.4g}]"

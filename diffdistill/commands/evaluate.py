"""``diffdistill evaluate``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffdistill.checkpoints import write_atomic
from diffdistill.commands.evaluate_answers import evaluate_answers
from diffdistill.commands.evaluate_bits import evaluate_bits
from diffdistill.commands.evaluate_text import evaluate_text
from diffdistill.commands.sample import how_sampled
from diffdistill.commands.sessions import kind_of, models, open_session, render
from diffdistill.errors import UserError
from diffdistill.evaluation.few_step import EvaluateSettings, Row, few_step, parse_settings
from diffdistill.evaluation.groups import make_groups, read_named_prompts
from diffdistill.evaluation.vbench import NUM_VIDEOS, Order, write_videos
from diffdistill.evaluation.video import Sampling, VideoRow, chosen_prompts, make_scene, video
from diffdistill.method import Kind
from diffdistill.sampling import makes_videos
from diffdistill.session import Session
from diffdistill.session_checks import KINDS

SUITES: dict[Kind, tuple[str, ...]] = {
    "pictures": ("few-step", "video", "vbench"),
    "texts": ("text", "python", "lm-eval"),
    "answers": ("answers", "bits"),
}


def evaluate(
    source: str,
    *,
    suite: str | None = None,
    checkpoint: str = "latest",
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Measure quality and return a table.

    ``few-step`` measures images against the number of sampling steps, ``video`` the rewards,
    flicker, drift and speed of videos; the rows are written as JSON into ``evaluation.json`` or
    ``evaluation-video.json`` of a run's folder. ``vbench`` writes videos for the official
    harness. Of text models, see ``evaluate_text``, of autoregressive ones ``evaluate_answers``.

    Args:
        source: A run's folder, or a config (before any training).
        suite: ``few-step``, ``video`` or ``vbench``, of texts ``text``, ``python`` or
            ``lm-eval``, of autoregressive models ``answers`` or ``bits``; None is the first.
        checkpoint: Which checkpoint of a run.
        output: The JSON file; None is that of the run, and none for a config. For ``vbench`` the
            folder; None is ``vbench`` in the run's folder, or here.
        overrides: ``section.key=value`` changes of the config, such as evaluate.num_seeds=5.

    Raises:
        UserError: If the section ``evaluate`` does not say what can be measured here.
    """
    kind = kind_of(source, overrides)
    suites = SUITES[kind]
    suite = suites[0] if suite is None else suite
    if suite not in suites:
        raise UserError(f"no suite {suite!r} for {KINDS[kind][1]}; there is {', '.join(suites)}")
    if suite == "bits":
        return evaluate_bits(source, checkpoint, output, overrides)
    if kind == "answers":
        return evaluate_answers(source, checkpoint, output, overrides)
    if kind == "texts":
        return evaluate_text(source, suite, checkpoint, output, overrides)
    session = open_session(source, checkpoint, overrides)
    settings = parse_settings(session.config.evaluate, f"{source}: evaluate")
    if suite == "vbench":
        folder = Path(source) if Path(source).is_dir() else Path()
        return _vbench(session, settings, output or folder / "vbench")
    name = "evaluation.json" if suite == "few-step" else "evaluation-video.json"
    if output is None and Path(source).is_dir():
        output = Path(source) / name
    if suite == "video":
        return _video(session, settings, output)
    return _few_step(session, settings, output)


def _few_step(session: Session, settings: EvaluateSettings, output: Path | None) -> str:
    if makes_videos(session):
        name = session.config.family["name"]
        raise UserError(f"the family {name} makes videos: measure it with --suite video")
    measured = models(session, _roles(settings, ["base", "student"]))
    rows = []
    for row in few_step(session, measured, make_groups(session, settings), settings):
        rows.append(row)
        what = f"{row.model}, {row.num_steps} steps: {row.metric} of {row.group} {cell(row)}"
        print(what, file=sys.stderr, flush=True)
    _write(rows, output)
    return table(rows)


def _video(session: Session, settings: EvaluateSettings, output: Path | None) -> str:
    usual = [name for name in ("teacher", "student") if name in session.roles.by_name]
    measured = models(session, _roles(settings, usual))
    rows = []

    def sampling(name: str) -> Sampling:
        return Sampling(*how_sampled(session, name))

    scene = make_scene(session, settings)
    for row in video(session, measured, sampling, scene, settings.num_seeds):
        rows.append(row)
        print(f"{row.model}: {row.metric} {cell(row)}", file=sys.stderr, flush=True)
    _write(rows, output)
    return video_table(rows)


def _vbench(session: Session, settings: EvaluateSettings, folder: Path) -> str:
    """Write the videos of each model into a folder of its own, and return what was done."""
    if settings.prompts is None:
        raise UserError(
            "set evaluate.prompts to VBench's VBench_full_info.json, or to one of its .txt lists"
        )
    if not makes_videos(session):
        raise UserError(f"the family {session.config.family['name']} makes no videos")
    prompts = read_named_prompts(Path(settings.prompts))
    _, size = chosen_prompts(session, settings)
    num_videos, lines = settings.num_images or NUM_VIDEOS, []
    chosen = models(session, _roles(settings, ["student"]))
    for name, model in chosen.items():
        place = folder / name if len(chosen) > 1 else folder
        order = Order(prompts, size, num_videos, session.config.pictures.seed, place)
        written = 0
        for path in write_videos(session, model, Sampling(*how_sampled(session, name)), order):
            written += 1
            print(path, file=sys.stderr, flush=True)
        kept = len(prompts) * num_videos - written
        lines.append(f"{place}: {written} videos of {name} written, {kept} were there")
    return "\n".join(lines)


def _roles(settings: EvaluateSettings, usual: Sequence[str]) -> Sequence[str]:
    return usual if settings.roles is None else settings.roles


def _write(rows: Sequence[Row] | Sequence[VideoRow], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, json.dumps([row._asdict() for row in rows], indent=1).encode())


def table(rows: Sequence[Row]) -> str:
    """Return rows as text: a line for each metric, group and model; a column for each count."""
    steps = list(dict.fromkeys(row.num_steps for row in rows))
    found = {(row.metric, row.group, row.model, row.num_steps): row for row in rows}
    lines = dict.fromkeys(key[:3] for key in sorted(found, key=lambda key: key[:2]))
    columns = ["metric", "group", "model", *(f"{n} step{'s' * (n > 1)}" for n in steps)]
    return render(columns, [[*key, *(cell(found[*key, n]) for n in steps)] for key in lines])


def video_table(rows: Sequence[VideoRow]) -> str:
    """Return rows as text: a line for each metric, a column for each model."""
    steps = {row.model: row.num_steps for row in rows}
    found = {(row.metric, row.model): cell(row) for row in rows}
    columns = ["metric", *(f"{m}, {n} step{'s' * (n > 1)}" for m, n in steps.items())]
    metrics = dict.fromkeys(row.metric for row in rows)
    return render(columns, [[m, *(found.get((m, n), "") for n in steps)] for m in metrics])


def cell(row: Row | VideoRow) -> str:
    """Return the mean of a row with its confidence interval."""
    if row.low is None or row.high is None:
        return f"{row.mean:.4g}"
    return f"{row.mean:.4g} +- {(row.high - row.low) / 2:.2g}"

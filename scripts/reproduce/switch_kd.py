"""What does a vision-language student learn from its teacher, and by which route (Switch-KD)?

Goes on training the bundled `digits-vlm-student` on 1500 questions about pictures of digits: on the
answers alone; with the KL to the teacher's logits at the same temperature; with DBiLD; and with the
switched route, in which the student's features go through the teacher's language model
(arXiv:2604.14629). All arms share data, order, learning rate and steps, and are measured on
questions about scans that were in no picture of training.

    python scripts/reproduce/switch_kd.py

Writes results.json, figure.png and README.md to samples/switch-kd. Each run is saved when it is
done, and what is there already is not run again.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from collecting import (
    Arm,
    cell,
    collect,
    deviation,
    differences,
    header,
    open_results,
    row,
    save_results,
    values,
    write_page,
)
from matplotlib.figure import Figure

from diffdistill.bundled import bundled
from diffdistill.checkpoints import restore
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.data.questions import read_questions
from diffdistill.data.settings import DataSettings
from diffdistill.draws import Draws
from diffdistill.evaluation.answers import examine
from diffdistill.evaluation.digit_questions import KINDS
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings
from diffdistill.rewards.exact import Exact
from diffdistill.session import Session, build
from diffdistill.text.switch_kd import SwitchKD
from diffdistill.types import Example, Progress

ROOT = Path(__file__).parents[2]
CONFIG = "switch-kd/digits"
CPU = torch.device("cpu")
SQUARED = "method.temperature_factor=squared"
KL = ["method.divergence=forward-kl", SQUARED]
ALIGN, SWITCH = "method.switch_weight=0", "method.align_weight=0"
ARMS = {
    "answers alone": Arm(CONFIG, [ALIGN, SWITCH]),
    "KL": Arm(CONFIG, [*KL, ALIGN]),
    "KL, temperature 1": Arm(CONFIG, [*KL, ALIGN, "method.temperature=1"]),
    "reverse KL": Arm(CONFIG, ["method.divergence=reverse-kl", SQUARED, ALIGN]),
    "DBiLD": Arm(CONFIG, [ALIGN]),
    "DBiLD, temperature 1": Arm(CONFIG, [ALIGN, "method.temperature=1"]),
    "DBiLD, squared": Arm(CONFIG, [ALIGN, SQUARED]),
    "DBiLD + switch": Arm(CONFIG, []),
    "DBiLD + switch, squared": Arm(CONFIG, [SQUARED]),
    "KL + switch": Arm(CONFIG, KL),
}
"""What is added to the answers' cross-entropy; "squared" is by the temperature, as the KL's are."""
SWITCHED = {
    "DBiLD + switch": "DBiLD",
    "DBiLD + switch, squared": "DBiLD, squared",
    "KL + switch": "KL",
}
"""Arms that see for the teacher's language model, and the same without."""
SHOWN = {
    "right": "right",
    **{f"right/{kind}": f"right: {kind}" for kind in KINDS},
    "answers": "loss of answers",
    "align": "DBiLD to the teacher",
    "switch": "DBiLD, switched",
    "seconds": "s a step",
}
DRAWN = ("right", "right/sum", "answers", "align", "switch")
BATCH = 100


def held_out(count: int) -> list[Example]:
    """Return the first questions that are kept from training."""
    path = str(bundled("data", "digit-questions-held-out.parquet"))
    settings = DataSettings(path=path, solution_column="answer")
    return list(islice(read_questions(settings, Path(), []), count))


@torch.no_grad()
def measure(session: Session, role: str, count: int) -> dict[str, float]:
    """Return what a model does with held-out questions: right answers, and its losses there."""
    asked, model = held_out(count), session.roles[role]
    settings, judge = AnswerEvaluateSettings(), Exact(device=CPU)
    out = examine(session, role, model, asked, settings, judge)
    found = {"right": statistics.fmean(answer["score"] for answer in out.answers)}
    for kind in KINDS:
        scores = [a["score"] for a in out.answers if a["question"] == f"{kind}?"]
        if scores:
            found[f"right/{kind}"] = statistics.fmean(scores)
    return found | distances(session, role, asked)


def distances(session: Session, role: str, asked: Sequence[Example]) -> dict[str, float]:
    """Return the three terms of a model as the config has them, means over held-out answers."""
    family: Any = session.family
    models: dict[str, Any] = {
        "student": session.roles[role],
        "teacher": session.roles["teacher"],
    }
    method = SwitchKD(family=family, draws=Draws(0), **models)
    sums, total = dict.fromkeys(("answers", "align", "switch"), 0.0), 0.0
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        batch = family.collate(part, range(start, start + len(part)))
        for loss in method.losses(batch, Progress(0, 1)):
            total += loss.count
            for name in sums:
                sums[name] += loss.count * float(loss.metrics[name])
    return {name: value / total for name, value in sums.items()}


def run(arm: Arm, steps: int, count: int, seed: int) -> dict[str, float]:
    """Train one student and return its measurements."""
    torch.set_num_threads(1)
    here = [
        "tracking.tensorboard=false", f"train.seed={seed}", f"train.steps={steps}",
        f"train.save_every={steps}", f"train.warmup={min(20, steps // 10)}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(load_config(arm.config, [*here, *arm.overrides]), folder)
        found = measure(restore(folder, device=CPU), "student", count)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    seconds = [float(line.partition('"seconds": ')[2].partition(",")[0]) for line in lines]
    return found | {"seconds": statistics.fmean(seconds)}


def draw(results: Mapping[str, Any], output: Path) -> None:
    """Write the figure: a panel for each number, a point for each arm."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels = figure.subplots(1, len(DRAWN), squeeze=False)[0]
    for panel, key in zip(panels, DRAWN, strict=True):
        for place, arm in enumerate(ARMS):
            found = values(results, arm, key)
            panel.errorbar(place, statistics.fmean(found), deviation(found), marker="o", capsize=3)
        for name, style in (("undistilled", ":"), ("teacher", "--")):
            panel.axhline(results[name][key], color="gray", linestyle=style, linewidth=1)
        panel.set_xticks(range(len(ARMS)), list(ARMS), rotation=90, fontsize=7)
        panel.set_title(SHOWN[key], fontsize=9)
    figure.savefig(output / "figure.png", dpi=110)


def page(results: Mapping[str, Any]) -> str:
    """Return the page with all tables; the reading is written by hand in reading.md."""
    seeds = len(results[next(iter(ARMS))])
    titles = list(SHOWN.values())
    before = [
        row(name, [f"{results[name].get(key, float('nan')):.3f}" for key in SHOWN])
        for name in ("undistilled", "teacher")
    ]
    lines = [
        "# A vision-language student and its teacher's language model (Switch-KD)",
        "",
        f"Made by `python scripts/reproduce/switch_kd.py --seeds {seeds} --steps "
        f"{results['steps']}`. All arms go on from `digits-vlm-student` for {results['steps']} "
        "steps of 32 of 1500 questions, with the answers' cross-entropy and what their names say, "
        "weight 1 and temperature 3 where no other is named. "
        f"{results['questions']} questions about scans that are in no "
        f"picture of training; mean and standard deviation over {seeds} training seeds. Right: "
        "the share of greedy answers that are exactly right. Losses are those of the held-out "
        "answers: their cross-entropy, DBiLD of the student from the teacher, and DBiLD of the "
        "teacher with the student's features from the teacher with its own. Seconds depend on what "
        "else ran.",
        "",
        "![all arms](figure.png)",
        "",
        "*Dotted: the student before. Dashed: the teacher.*",
        "",
        *header(titles),
        *before,
        *(row(arm, [cell(values(results, arm, key)) for key in SHOWN]) for arm in ARMS),
    ]
    compared = {
        "Differences from answers alone": dict.fromkeys(list(ARMS)[1:], "answers alone"),
        "What switching adds": SWITCHED,
    }
    for title, pairs in compared.items():
        lines += ["", f"## {title}, with the same seed", "", *header(titles)]
        lines += [
            row(arm, [cell(differences(results, arm, other, key)) for key in SHOWN])
            for arm, other in pairs.items()
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "samples" / "switch-kd")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, 2 steps")
    given = parser.parse_args()
    seeds, steps, count = (1, 2, 24) if given.quick else (given.seeds, given.steps, 600)
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    path = given.output / "results.json"
    results = open_results(path, {"steps": steps, "questions": count})
    if "undistilled" not in results:
        session = build(load_config(CONFIG), CPU)
        for name, role in (("undistilled", "student"), ("teacher", "teacher")):
            results[name] = measure(session, role, count)
        save_results(path, results)
    jobs = {name: partial(run, arm, steps, count) for name, arm in ARMS.items()}
    collect(path, results, jobs, seeds, given.workers, ("right", "answers", "switch"))
    draw(results, given.output)
    write_page(given.output, page(results))


if __name__ == "__main__":
    main()

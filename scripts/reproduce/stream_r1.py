"""Does a reward that weighs distribution matching improve a streaming student, and what in it does?

Trains the bundled causal student of moving digits along the paper's ablation ladder: DMD
(Self-Forcing), Re-DMD (clips weighed by motion), then all three axes, and Stream-R1's parts one
after another. (Without temporal factoring the reference weighs places over the whole clip; here
each frame is weighed alone, so that a rung changes one thing.) All arms share data, noise and
number of updates, and are measured on captions kept from training.

    python scripts/reproduce/stream_r1.py         # about an hour on 2 cores

Writes results.json, figure.png, samples.gif, long.gif and README.md to samples/stream-r1.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

import torch
from collecting import Arm, write_page
from matplotlib.figure import Figure
from torch import Tensor

from diffdistill.checkpoints import restore, write_atomic
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.evaluation.few_step import parse_settings
from diffdistill.evaluation.video import Sampling, make_scene, video
from diffdistill.grids import save_grid
from diffdistill.roles import Role
from diffdistill.sampling import encode_prompts, generate, prompt_batch, with_frames
from diffdistill.session import Session, build
from diffdistill.types import Progress

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "samples" / "data" / "moving-digits-prompts.jsonl"
HELD_OUT = ROOT / "samples" / "data" / "moving-digits-held-out.jsonl"
UNWEIGHED = ["method.space_strength=0", "method.time_strength=0", "method.balance=0"]


ARMS = {
    "dmd": Arm("self-forcing/digits", []),
    "re-dmd": Arm("stream-r1/digits", [*UNWEIGHED, "method.axes=[motion]"]),
    "three axes": Arm("stream-r1/digits", UNWEIGHED),
    "+ spatial": Arm("stream-r1/digits", UNWEIGHED[1:]),
    "+ balanced": Arm("stream-r1/digits", ["method.time_strength=0"]),
    "+ temporal": Arm("stream-r1/digits", []),
}
SHOWN = ("reward/visual", "reward/motion", "reward/text", "frechet", "drift/frechet")
HEADERS = ("visual", "motion", "text", "Frechet", "Frechet drift")
GUIDANCE = 3.0
SMALL = ["data.batch_size=8", "method.student_every=3", "train.lr=2.0e-4"]
"""Fewer clips and more updates than in the bundled configs: three to four minutes a run."""


def measure(session: Session, model: Role, name: str, how: Sampling) -> dict[str, float]:
    """Return everything that ``evaluate --suite video`` measures, from one seed of noise."""
    chosen = {"prompts": str(HELD_OUT), "num_images": 4, "reward_batch": 16}
    settings = parse_settings(session.config.evaluate | chosen)
    rows = video(session, {name: model}, lambda _: how, make_scene(session, settings), 1)
    return {row.metric: row.mean for row in rows}


def run(arm: Arm, seed: int, steps: int, kept: Path | None) -> dict[str, float]:
    """Train one student and return its measurements; its clips are drawn where it is kept."""
    torch.set_num_threads(1)
    quiet = ["sample.every=null", "tracking.tensorboard=false", f"train.seed={seed}", *SMALL]
    config = load_config(arm.config, [*arm.overrides, *quiet, f"train.steps={steps}"])
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder))
        session = restore(Path(folder))
        student = session.roles["student"]
        if kept is not None:
            torch.save(clips(session, student, 4, 1.0), kept)
        return measure(session, student, "student", Sampling(4, 1.0))


def clips(session: Session, model: Role, num_steps: int, guidance: float) -> dict[str, Any]:
    """Return a clip of four held-out captions, and a stream five times as long of two."""
    texts = [json.loads(line)["text"] for line in HELD_OUT.read_text().splitlines()][:4]
    encoded = encode_prompts(session, texts, (16, 16))
    options: dict[str, Any] = {
        "num_steps": num_steps, "seed": 0, "size": (16, 16), "guidance": guidance,
    }  # fmt: skip
    shown = {"clips": generate(session, model, encoded, **options)}
    if model.name != "teacher":
        longer = with_frames(encoded, 5 * encoded.items[0]["latents"].shape[1])
        shown["long"] = generate(session, model, longer, **options)
    return shown


def directions(num_batches: int = 8) -> dict[str, list[float]]:
    """Return the cosine of each arm's gradient with that of DMD, for each of some batches.

    Of the student before training, on the same captions and noise: how far the weights turn the
    update. Adam follows the direction alone.
    """
    found: dict[str, list[Tensor]] = {}
    texts = [json.loads(line)["text"] for line in TRAINED.read_text().splitlines()]
    for name, arm in ARMS.items():
        session = build(load_config(arm.config, [*arm.overrides, *SMALL]))
        encoded = encode_prompts(session, texts, (16, 16))
        found[name] = [
            gradient(session, prompt_batch(session, encoded, [(i, 0) for i in chosen]))
            for chosen in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
            .view(-1, len(texts) // num_batches)
            .tolist()
        ]
    return {
        name: [
            float(torch.cosine_similarity(a, b, dim=0))
            for a, b in zip(g, found["dmd"], strict=True)
        ]
        for name, g in found.items()
    }


def gradient(session: Session, batch: dict[str, Any]) -> Tensor:
    """Return the student's gradient on a batch, all parameters in a row."""
    for loss in session.method.losses(batch, Progress(0, 1)):
        if loss.role == "student":
            (loss.value * loss.count).backward()
    parameters = session.roles["student"].parameters().values()
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return flat


def collect(path: Path, seeds: int, steps: int, workers: int) -> dict[str, Any]:
    """Run what ``path`` does not hold yet, saving after each run."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": steps}
    if results["steps"] != steps:
        raise SystemExit(f"{path} holds runs of {results['steps']} steps: choose another --output")
    shown = path.parent / "clips"
    shown.mkdir(exist_ok=True)
    session = build(load_config("self-forcing/digits"))
    anchors = {"base": (session.roles["student"], Sampling(4, 1.0)),
               "teacher": (session.roles["teacher"], Sampling(32, GUIDANCE))}  # fmt: skip
    for name, (model, how) in anchors.items():
        if name not in results:
            results[name] = measure(session, model, model.name, how)
            torch.save(clips(session, model, *how), shown / f"{name}.pt")
    if "directions" not in results:
        results["directions"] = directions()
        write_atomic(path, json.dumps(results, indent=1).encode())
    missing = [
        (name, seed)
        for seed, name in product(range(seeds), ARMS)
        if str(seed) not in results.setdefault(name, {})
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {}
        for name, seed in missing:
            kept = shown / f"{name}.pt" if seed == 0 else None
            futures[pool.submit(run, ARMS[name], seed, steps, kept)] = (name, seed)
        for future in as_completed(futures):
            name, seed = futures[future]
            results[name][str(seed)] = future.result()
            print(name, seed, {k: future.result().get(k) for k in SHOWN}, flush=True)
            write_atomic(path, json.dumps(results, indent=1).encode())
    return results


def values(results: dict[str, Any], arm: str, key: str) -> list[float]:
    """Return one number of an arm for each seed."""
    return [results[arm][seed][key] for seed in sorted(results[arm], key=int)]


def cell(found: list[float]) -> str:
    """Return mean and standard deviation."""
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.fmean(found):.3f} ± {spread:.3f}"


def draw(results: dict[str, Any], output: Path) -> None:
    """Write the figure and the clips."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(SHOWN))
    for panel, key, title in zip(panels, SHOWN, HEADERS, strict=True):
        for place, arm in enumerate(ARMS):
            found = values(results, arm, key)
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            panel.errorbar(place, statistics.fmean(found), spread, marker="o", capsize=3)
        panel.axhline(results["base"][key], color="gray", linestyle=":", linewidth=1)
        if key in results["teacher"]:
            panel.axhline(results["teacher"][key], color="black", linestyle="--", linewidth=1)
        panel.set_xticks(range(len(ARMS)), list(ARMS), rotation=60, ha="right", fontsize=7)
        panel.set_title(title, fontsize=9)
    figure.savefig(output / "figure.png", dpi=110)
    names = [n for n in ("teacher", "base", *ARMS) if (output / "clips" / f"{n}.pt").exists()]
    found = {n: torch.load(output / "clips" / f"{n}.pt", weights_only=True) for n in names}
    save_grid(torch.cat([found[n]["clips"] for n in names]), output / "samples.gif", 4,
              row_captions=names, fps=8)  # fmt: skip
    longer = [n for n in ("base", "dmd", "+ temporal") if n in names]
    save_grid(torch.cat([found[n]["long"] for n in longer]), output / "long.gif", 4,
              row_captions=longer, fps=8)  # fmt: skip


def readme(results: dict[str, Any]) -> str:
    """Return the page's tables; the reading is written by hand in reading.md."""
    seeds = len(results["dmd"])
    keys = [*SHOWN, "accuracy/all", "flicker/real", "drift/visual", "drift/motion", "drift/text"]
    titles = [*HEADERS, "all right", "flicker", "visual drift", "motion drift", "text drift"]
    lines = [
        "# Stream-R1 on moving digits",
        "",
        f"Made by `python scripts/reproduce/stream_r1.py --seeds {seeds} --steps "
        f"{results['steps']}`: {results['steps']} steps of 8 clips, every third trains the "
        "student. Captions kept from training, 64 streams five times as long as a training clip; "
        "their first 17 frames are the clips, and drift is the last 17 less the first. Rewards are "
        f"z-scores of `digits-video`. Mean and standard deviation over {seeds} training seeds.",
        "",
        "![the ladder](figure.png)",
        "",
        "*Dotted: the student before. Dashed: the bidirectional teacher, 32 steps, guided.*",
        "",
        "![clips of four captions kept from training](samples.gif)",
        "",
        "![streams five times as long](long.gif)",
        "",
        "| | " + " | ".join(titles) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for name in ("teacher", "base"):
        numbers = [f"{results[name][k]:.3f}" if k in results[name] else "-" for k in keys]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    for arm in ARMS:
        cells = [cell(values(results, arm, key)) for key in keys]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += [
        "",
        "The same as differences from DMD with the same seed:",
        "",
        "| | " + " | ".join(titles) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for arm in list(ARMS)[1:]:
        cells = [
            cell(
                [
                    a - b
                    for a, b in zip(values(results, arm, k), values(results, "dmd", k), strict=True)
                ]
            )
            for k in keys
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += [
        "",
        "How far each arm turns the first update, as the cosine of its gradient with DMD's on the "
        "same clips and noise (8 batches of 8 clips):",
        "",
        "| " + " | ".join(ARMS) + " |",
        "|---" * len(ARMS) + "|",
        "| " + " | ".join(cell(results["directions"][arm]) for arm in ARMS) + " |",
    ]
    speeds = [results[n]["frames per second"] for n in ("teacher", "base")]
    lines += [
        "",
        f"Frames per second on this CPU, one thread, one clip at a time: teacher (32 guided steps) "
        f"{speeds[0]:.0f}, streaming student {speeds[1]:.0f}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=225)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "samples" / "stream-r1")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    path = arguments.output / "results.json"
    results = collect(path, arguments.seeds, arguments.steps, arguments.workers)
    draw(results, arguments.output)
    write_page(arguments.output, readme(results))


if __name__ == "__main__":
    main()

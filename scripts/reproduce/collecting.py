"""What scripts share that train arms with several seeds: results kept on disk, and their tables."""

import json
import multiprocessing
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from diffdistill.checkpoints import write_atomic


class Arm(NamedTuple):
    """One way to train: a config, and how it differs."""

    config: str
    overrides: list[str]


def open_results(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``path`` holds, which must be of the same settings; else the settings."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(settings)
    for name, value in settings.items():
        if results[name] != value:
            raise SystemExit(
                f"{path} holds runs of {results[name]} {name}: choose another --output"
            )
    return results


def save_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results."""
    write_atomic(path, json.dumps(results, indent=1).encode())


def collect(
    path: Path,
    results: dict[str, Any],
    jobs: Mapping[str, Callable[[int], dict[str, float]]],
    seeds: int,
    workers: int,
    shown: Collection[str],
) -> None:
    """Run what ``results`` does not hold yet, saving to ``path`` after each run.

    Args:
        path: The file.
        results: By arm, by seed.
        jobs: What runs an arm with a seed; it is sent to another process.
        seeds: How many.
        workers: Processes.
        shown: Numbers to print.
    """
    missing = [
        (name, seed)
        for seed, name in product(range(seeds), jobs)
        if str(seed) not in results.setdefault(name, {})
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(jobs[name], seed): (name, seed) for name, seed in missing}
        for future in as_completed(futures):
            name, seed = futures[future]
            results[name][str(seed)] = future.result()
            print(name, seed, {key: future.result()[key] for key in shown}, flush=True)
            save_results(path, results)


def quiet(steps: int) -> list[str]:
    """Return overrides of a run of so many steps that nobody watches: it is saved at its end."""
    off = ["sample.every=null", "tracking.tensorboard=false"]
    return [*off, f"train.save_every={steps}", f"train.steps={steps}"]


def values(results: Mapping[str, Any], arm: str, key: str) -> list[float]:
    """Return one number of an arm for each seed."""
    return [found[key] for found in results[arm].values()]


def differences(results: Mapping[str, Any], arm: str, other: str, key: str) -> list[float]:
    """Return by how much an arm's number exceeds another's, for each seed that both have."""
    both = [seed for seed in results[arm] if seed in results[other]]
    return [results[arm][seed][key] - results[other][seed][key] for seed in both]


def cell(found: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{statistics.fmean(found):.3f} ± {deviation(found):.3f}"


def deviation(found: Sequence[float]) -> float:
    """Return the standard deviation; of one number, 0."""
    return statistics.stdev(found) if len(found) > 1 else 0.0


def row(name: str, numbers: Sequence[str]) -> str:
    """Return a row of a table."""
    return f"| {name} | {' | '.join(numbers)} |"


def header(titles: Sequence[str]) -> list[str]:
    """Return the first two rows of a table whose first column has no title."""
    return [row("", titles), "|---" * (len(titles) + 1) + "|"]


def write_page(folder: Path, text: str) -> None:
    """Write README.md: the page, and after it reading.md, which is written by hand."""
    reading = folder / "reading.md"
    by_hand = reading.read_text(encoding="utf-8") if reading.exists() else ""
    (folder / "README.md").write_text(text + by_hand, encoding="utf-8")

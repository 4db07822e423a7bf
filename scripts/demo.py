"""``make demo``: tune the bundled few-step model in two ways and show both in one page.

Runs the same commands that a user would type, and prints them.
"""

import subprocess
import sys
import time
from pathlib import Path

from diffdistill.commands.report import report

RUNS = Path("runs/demo")
METHODS = {"sft": "sft/digits", "d-opsd": "d-opsd/digits"}
PROMPTS = [f"a handwritten {word}" for word in ("two", "five", "eight", "nine")]
EVALUATION = ["evaluate.num_steps=[1,2,4]", "evaluate.num_seeds=2"]


def diffdistill(*arguments: str | Path) -> None:
    """Print and run one command."""
    words = [str(argument) for argument in arguments]
    print(f"$ diffdistill {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "diffdistill", *words], check=True)


def main() -> None:
    started = time.perf_counter()
    stamp = RUNS / time.strftime("%Y%m%d-%H%M%S")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    figures = []
    for name, config in METHODS.items():
        run = stamp / name
        diffdistill("train", config, "--output", run)
        diffdistill("evaluate", run, *EVALUATION)
        picture = run / "samples" / "compare.png"
        diffdistill(
            "sample", run, *prompts, "--compare", "base,student", "--num-images", "4",
            "--output", picture,
        )  # fmt: skip
        figures.append((f"{name}: before and after, 4 steps, same noise", picture))
    title = "Two ways to teach a 4-step model eights and nines"
    page = report(
        [stamp / name for name in METHODS],
        output=stamp / "report.html",
        title=title,
        figures=figures,
    )
    print(f"{time.perf_counter() - started:.0f} s; the report is {page.resolve()}")


if __name__ == "__main__":
    main()

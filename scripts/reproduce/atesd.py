"""How much of a solution should a teacher be shown, and does a controller find it (ATESD)?

Trains the bundled `arithmetic-student` by self-distillation whose teacher is shown a share of the
solution: all of it, fixed shares, a random share for each window, and what ATESD's controller
(arXiv:2605.11458; its numbers here are ours) chooses, from a neutral start and from nearly all. The
controller has earned something if it beats the best fixed share and the random one, not only the
full solution. The best fixed share is known only afterwards, from the same problems: a bound that
is too good by chance.

    python scripts/reproduce/atesd.py

Writes results.json, figure.png and README.md to samples/atesd. Each run is saved when it is done,
and what is there already is not run again.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from arithmetic_runs import SHOWN, Study, measured, options, publish
from collecting import Arm, cell, differences, values

CONFIG = "atesd/arithmetic"
FIXED = (0.0, 0.25, 0.5, 0.75)
RIGHT = "box/mean@4"


def fixed(exposure: float) -> Arm:
    """Return the arm whose teacher is always shown the same share."""
    return Arm(CONFIG, ["method.exposure_policy=fixed", f"method.exposure={exposure}"])


ARMS = {
    "full": fixed(1.0),
    **{f"fixed {exposure:g}": fixed(exposure) for exposure in FIXED},
    "random": Arm(CONFIG, ["method.exposure_policy=random"]),
    "ATESD": Arm(CONFIG, []),
    "ATESD, full start": Arm(CONFIG, ["method.start_exposure=full"]),
}
STUDY = Study(
    name="atesd",
    title="Learned exposure (ATESD) on arithmetic",
    about="Self-distillation whose teacher is shown a share of each solution and its answer: full "
    "is OPSD, the others as their names say.",
    arms=ARMS,
    against={"full": ARMS, "random": ARMS},
    shown=SHOWN | {"exposure": "mean exposure"},
)


def best_fixed(results: Mapping[str, Any]) -> str:
    """Return the arm of a fixed share, or of all, with the most right answers."""
    names = ["full", *(f"fixed {exposure:g}" for exposure in FIXED)]
    return max(names, key=lambda name: statistics.fmean(values(results, name, RIGHT)))


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Return the part of the page that compares the controller with the best fixed share."""
    best = best_fixed(results)
    lines = [
        "",
        "## Against the best fixed share",
        "",
        f"Found afterwards: {best}. Right in a box, seed by seed:",
        "",
    ]
    for name in ("ATESD", "ATESD, full start", "random"):
        gap = cell(differences(results, name, best, RIGHT))
        lines.append(f"- {name}: {gap} more")
    return lines


def main() -> None:
    given = options(STUDY, __doc__)
    results = measured(STUDY, given)
    publish(STUDY, results, given.output, verdict(results))


if __name__ == "__main__":
    main()

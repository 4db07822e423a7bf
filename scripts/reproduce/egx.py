"""Do exposure, gate and extrapolation add up (EGX, ours), at like sizes of the update?

Trains the bundled `arithmetic-student` in the 2^3 cells of {full solution, learned exposure} x {no
gate, gate} x {the teacher, 1.15 beyond it, guarded}, the first of which is OPSD, and with four
controls of the whole: fixed and random exposures, an unguarded strength, a gate on the target.
Gates and strengths change the size of gradients, so the weight of each arm's loss is set such that
its mean gradient norm, measured first without training, is OPSD's. AdamW divides that out again
but for the clip at 1; how far the weights moved is in the tables.

    python scripts/reproduce/egx.py

Writes results.json, figure.png and README.md to samples/egx. Each run is saved when it is done, and
what is there already is not run again.
"""

import statistics
import tempfile
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from arithmetic_runs import SHOWN, Amount, Study, logged, measured, options, publish, trained
from collecting import Arm, cell, header, open_results, row, save_results

CONFIG = "egx/arithmetic"
FULL = ["method.exposure_policy=fixed", "method.exposure=1.0"]
UNGATED, TEACHER = ["method.gate_beta=0.0"], ["method.strength=1.0"]
NEUTRAL, WHOLE = "OPSD", "exposure + gate + strength"
PROBED = 32
"""Steps without training that measure gradient norms."""


def factorial() -> dict[str, Arm]:
    """Return the eight cells, named by the axes that are on."""
    axes = (("exposure", FULL), ("gate", UNGATED), ("strength", TEACHER))
    cells = {}
    for on in product((False, True), repeat=len(axes)):
        name = " + ".join(axis for (axis, _), used in zip(axes, on, strict=True) if used)
        off = [
            text
            for (_, neutral), used in zip(axes, on, strict=True)
            if not used
            for text in neutral
        ]
        cells[name or NEUTRAL] = Arm(CONFIG, off)
    return cells


CONTROLS = {
    "whole, fixed 0.5": Arm(CONFIG, ["method.exposure_policy=fixed", "method.exposure=0.5"]),
    "whole, random exposure": Arm(CONFIG, ["method.exposure_policy=random"]),
    "whole, unguarded 1.5": Arm(CONFIG, ["method.guard=none", "method.strength=1.5"]),
    "whole, gate on target": Arm(CONFIG, ["method.gate_on=target"]),
}
ARMS = factorial() | CONTROLS


def study(norms: Mapping[str, float]) -> Study:
    """Return what is compared, each arm weighed so that its gradient norm is OPSD's.

    Args:
        norms: The mean gradient norm of each arm at weight 1.
    """
    weighed = {
        name: Arm(arm.config, [*arm.overrides, f"method.weight={norms[NEUTRAL] / norms[name]}"])
        for name, arm in ARMS.items()
    }
    return Study(
        name="egx",
        title="Exposure, gate and extrapolation (EGX) on arithmetic",
        about="Self-distillation with each of EGX's axes on or off, and controls of the whole. "
        "Weights of the losses are such that mean gradient norms before training are OPSD's.",
        arms=weighed,
        against={NEUTRAL: ARMS, WHOLE: CONTROLS},
        shown=SHOWN
        | {
            "grad_norm": "gradient norm",
            "exposure": "exposure",
            "strength": "strength",
            "gate": "gate",
        },
    )


def norm(arm: Arm, steps: int) -> float:
    """Return an arm's mean gradient norm over some steps that do not train."""
    still = Arm(arm.config, ["train.lr=0.0", *arm.overrides])
    with tempfile.TemporaryDirectory() as folder:
        trained(still, Amount(steps), 0, Path(folder))
        return statistics.fmean(found["grad_norm/student"] for found in logged(Path(folder)))


def effect(results: Mapping[str, Any], axis: str, key: str) -> list[float]:
    """Return an axis's main effect for each seed: the cells that have it less the others."""
    cells = factorial()
    on = [name for name in cells if axis in name.split(" + ")]
    off = [name for name in cells if name not in on]

    def mean(names: Iterable[str], seed: str) -> float:
        return statistics.fmean(results[name][seed][key] for name in names)

    return [mean(on, seed) - mean(off, seed) for seed in results[NEUTRAL]]


def tables(results: Mapping[str, Any], shown: Mapping[str, str]) -> list[str]:
    """Return the parts of the page about main effects and weights."""
    lines = [
        "",
        "## Main effects",
        "",
        "The mean of the four cells that have an axis less that of the four that do not, for each "
        "seed.",
        "",
        *header(list(shown.values())),
    ]
    for axis in ("exposure", "gate", "strength"):
        lines.append(row(axis, [cell(effect(results, axis, key)) for key in shown]))
    lines += ["", "## Gradient norms before training, and weights", ""]
    lines += header(["norm at weight 1", "weight"])
    norms = results["norms"]
    for name, found in norms.items():
        lines.append(row(name, [f"{found:.3f}", f"{norms[NEUTRAL] / found:.3f}"]))
    return lines


def main() -> None:
    unweighed = study(dict.fromkeys(ARMS, 1.0))
    given = options(unweighed, __doc__)
    amount = given.amount
    results = open_results(given.results, {"steps": amount.steps, "questions": amount.questions})
    if "norms" not in results:
        steps = min(PROBED, amount.steps)
        results["norms"] = {name: norm(arm, steps) for name, arm in ARMS.items()}
        save_results(given.results, results)
    compared = study(results["norms"])
    results = measured(compared, given)
    publish(compared, results, given.output, tables(results, SHOWN))


if __name__ == "__main__":
    main()

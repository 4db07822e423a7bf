"""``diffdistill calibrate-lambda``: how far beyond the teacher formats still hold."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from diffdistill.commands.diagnose import account, save, say
from diffdistill.commands.sessions import open_session, render
from diffdistill.errors import UserError
from diffdistill.evaluation.calibration import (
    LOW,
    Contract,
    bounds,
    contract_of,
    extrapolating,
    quantile,
    recommended,
)
from diffdistill.evaluation.subject import first_questions, subject_of
from diffdistill.evaluation.target_sampling import Swept, boundary, sweep
from diffdistill.rollouts import Sampling
from diffdistill.sampling import inference
from diffdistill.text.extrapolating import Extrapolating

MOST_TOKENS = 128
"""Of an answer of the target's, where nothing else is said: each takes whole model calls."""
USUAL_KAPPA = 2.0
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

UNCONFIRMED = (
    "The floors are ours: the bound tau(c) of the Extrapolation Cliff (arXiv:2605.08737) is not "
    "known to us. Measure again during training: the boundary moves."
)
PROXY = (
    "The parse rate of the target itself is a proxy of ours for that of a student that has learned "
    "it; it says nothing of how training gets there."
)


def calibrate(
    source: str,
    *,
    strengths: Sequence[float] = (),
    max_examples: int = 32,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    checkpoint: str = "latest",
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Return what was measured where formats leave no choice, and a strength that is safe by it.

    All numbers go with their settings into ``calibration.json`` of a run's folder.

    Args:
        source: A run's folder, or a config (before any training), of exopd or egx.
        strengths: Strengths at which the target itself writes answers; none writes none.
        max_examples: Questions of the data, its first.
        max_tokens: Tokens of the target's answers; None takes the method's, but ``MOST_TOKENS`` at
            most.
        temperature: Of the target's answers, 0 being greedy; None takes the method's.
        seed: Seed of the answers.
        checkpoint: Which checkpoint of a run.
        output: The JSON file; None is that of the run, and none for a config.
        overrides: ``section.key=value`` changes of the config.

    Raises:
        UserError: If the method has no strength, or there are no questions.
    """
    session = open_session(source, checkpoint, overrides)
    subject = subject_of(session, seed=seed)
    method = extrapolating(subject)
    asked = first_questions(session, max_examples, subject.reward if strengths else None)
    sampling = Sampling(
        min(method.max_tokens, MOST_TOKENS) if max_tokens is None else max_tokens,
        method.temperature if temperature is None else temperature,
    )
    with inference(session):
        contract = contract_of(subject, asked, say)
        swept = sweep(subject, asked, strengths, sampling, say) if strengths else []
    found = {
        **account(session, source, checkpoint, overrides),
        "calibrate": {"max_examples": max_examples, "seed": seed, "sampling": asdict(sampling)},
        "tokens": contract.num_tokens,
        "contract_tokens": len(contract.teacher),
        "quantiles": {name: row for name, *row in _quantiles(contract)},
        "bounds": [bound._asdict() for bound in bounds(contract)],
        "recommended": _recommended(contract, method),
        "sweep": [row._asdict() for row in swept],
    }
    save(found, output, Path(source) / "calibration.json")
    return "\n".join([*_told(contract, method), *_swept(swept)])


def parse_strengths(text: str) -> list[float]:
    """Return the numbers in "1.0,1.25".

    Raises:
        UserError: If they are none, or one is negative.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= value < float("inf") for value in found):
        raise UserError(f"--sweep {text!r}: expected strengths, such as 1.0,1.1,1.25,1.5")
    return found


def _told(contract: Contract, method: Extrapolating) -> list[str]:
    count = len(contract.teacher)
    least = method.contract_probability
    lines = [
        f"{count} of {contract.num_tokens} tokens are contract positions: the teacher gives its "
        f"first at least {least:g}, and the reference has the same first"
    ]
    if not count:
        return [*lines, "So no strength is bounded here by a format."]
    table = [[name, *(f"{value:.4g}" for value in row)] for name, *row in _quantiles(contract)]
    lines.append(render(["quantile", *(f"{share:.0%}" for share in QUANTILES)], table))
    rows = [
        [bound.floor, *(f"{x:.4g}" for x in (bound.low, bound.median)), f"{bound.unsafe:.0%}"]
        for bound in bounds(contract)
    ]
    columns = [
        "least left for other tokens", f"critical strength, {LOW:.0%}", "median", "teacher beyond"
    ]  # fmt: skip
    lines.append(render(columns, rows))
    strength = _recommended(contract, method)
    if strength is None:
        lines.append("At none of them the teacher is surer than the reference: nothing is bounded.")
    else:
        lines.append(
            f"recommended strength for all tokens: {strength:.4g}, {method.guard_margin:.0%} below "
            f"the {LOW:.0%} quantile of kappa {_kappa(method):g}, and at least 1 (the config has "
            f"{method.strength:g} with guard {method.guard}); guard: relative bounds it at "
            "contract positions alone"
        )
    return [*lines, UNCONFIRMED]


def _swept(swept: Sequence[Swept]) -> list[str]:
    if not swept:
        return []
    rows = [
        [f"{row.strength:g}", *(f"{x:.4g}" for x in (row.parse_rate, row.reward, row.ended))]
        for row in swept
    ]
    lines = [render(["strength of the target", "parse rate", "reward", "ended"], rows)]
    if (fallen := boundary(swept)) is not None:
        lines.append(f"The parse rate has fallen at strength {fallen:g}: stay below it.")
    return [*lines, PROXY]


def _quantiles(contract: Contract) -> list[tuple[str, *tuple[float, ...]]]:
    sides = {"p, teacher": contract.teacher, "b, reference": contract.reference}
    return [
        (name, *(quantile(side.exp(), share) for share in QUANTILES))
        for name, side in sides.items()
    ]


def _kappa(method: Extrapolating) -> float:
    return method.guard_size if method.guard == "relative" else USUAL_KAPPA


def _recommended(contract: Contract, method: Extrapolating) -> float | None:
    """Return the recommended strength; None where nothing bounds it."""
    if not (contract.teacher > contract.reference).any():
        return None
    return recommended(contract, _kappa(method), method.guard_margin)

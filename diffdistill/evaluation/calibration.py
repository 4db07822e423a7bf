"""How far beyond the teacher a student may be led, measured where formats leave no choice.

What the Extrapolation Cliff (arXiv:2605.08737) advises: measure p and b on the student's own
prefixes, compute the critical strength, stay below it. Its own bound tau(c) is not known to us; see
``extrapolation``, whose floors are ours.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.subject import Say, Subject
from diffdistill.extrapolation import (
    TailFloor,
    constant_floor,
    contract_positions,
    critical_strength,
    teacher_relative_floor,
)
from diffdistill.supports import TopK, logprobs_at, top_logprobs
from diffdistill.text.extrapolating import Extrapolating
from diffdistill.types import Example

KAPPAS = (1.5, 2.0, 3.0, 4.0)
TAUS = (1e-2, 1e-3, 1e-4)
LOW = 0.05
"""The quantile of the critical strengths that a recommended strength stays below; ours."""


class Contract(NamedTuple):
    """What teacher and reference say where the format leaves no choice.

    Attributes:
        teacher: Log-probability p of the teacher's first token, float64 ``[N]``.
        reference: That of the same token under the reference, b, ``[N]``.
        num_tokens: How many tokens were looked at.
    """

    teacher: Tensor
    reference: Tensor
    num_tokens: int


class Bound(NamedTuple):
    """Critical strengths under one floor, of the positions where p is above b.

    Attributes:
        floor: What the target must leave for other tokens.
        low: Their quantile ``LOW``.
        median: Their median.
        unsafe: The share of positions where even the teacher itself is beyond the floor.
    """

    floor: str
    low: float
    median: float
    unsafe: float


def extrapolating(subject: Subject) -> Extrapolating:
    """Return the method of a subject, which has to have a strength.

    Raises:
        UserError: If it has none.
    """
    if not isinstance(subject.method, Extrapolating):
        raise UserError("calibrate-lambda needs a method with a strength: exopd or egx")
    return subject.method


@torch.no_grad()
def contract_of(subject: Subject, asked: Sequence[Example], say: Say) -> Contract:
    """Return p and b at the contract positions of the student's own answers.

    Args:
        subject: Of a method with a strength.
        asked: The questions.
        say: Is told how far it has come.

    Raises:
        UserError: If the teacher is a server.
    """
    method = extrapolating(subject)
    teacher, reference, num_tokens = [], [], 0
    for start, examples in subject.batches(asked, say):
        attempt = subject.attempt(examples, start)
        theirs = subject.judgment(attempt)
        if isinstance(theirs, TopK):
            raise UserError("calibrate-lambda needs a teacher of its own, not a server")
        base = method.reference(attempt.state, subject.family.condition(attempt.batch))
        mask = attempt.answers.mask
        options: dict[str, Any] = {"mask": mask, "temperature": method.temperature}
        first, other = (top_logprobs(side, 1, **options) for side in (theirs, base))
        known = logprobs_at(base, first.ids, **options)[..., 0]
        sure, same = first.logprobs[..., 0], (first.ids == other.ids)[..., 0]
        chosen = mask & contract_positions(sure, same, p_min=method.contract_probability)
        teacher.append(sure[chosen].cpu().double())
        reference.append(known[chosen].cpu().double())
        num_tokens += int(mask.sum())
    return Contract(torch.cat(teacher), torch.cat(reference), num_tokens)


def bounds(contract: Contract) -> list[Bound]:
    """Return the critical strengths under relative floors (``KAPPAS``) and constant ones."""
    floors: dict[str, TailFloor] = {
        f"(1 - p) / {kappa:g}": teacher_relative_floor(kappa) for kappa in KAPPAS
    }
    floors |= {f"{tau:g}": constant_floor(tau) for tau in TAUS}
    found = []
    for name, floor in floors.items():
        critical = strengths(contract, floor)
        unsafe = float((critical < 1.0).double().mean())
        found.append(Bound(name, quantile(critical, LOW), quantile(critical, 0.5), unsafe))
    return found


def strengths(contract: Contract, floor: TailFloor) -> Tensor:
    """Return the critical strength ``[n]`` at each contract position where p is above b."""
    critical = critical_strength(contract.teacher, contract.reference, floor)
    return critical[contract.teacher > contract.reference]


def recommended(contract: Contract, kappa: float, margin: float) -> float:
    """Return a strength for all tokens: ``1 - margin`` of a low quantile, and at least 1 (ours).

    Args:
        contract: What was measured.
        kappa: Of the relative floor.
        margin: How far below to stay, as a share.
    """
    low = quantile(strengths(contract, teacher_relative_floor(kappa)), LOW)
    return max(1.0, (1.0 - margin) * low)


def quantile(values: Tensor, share: float) -> float:
    """Return a quantile of values ``[n]``, one of them; NaN of none."""
    if not len(values):
        return float("nan")
    return float(values.sort().values[int(share * (len(values) - 1))])

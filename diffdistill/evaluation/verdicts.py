"""Which failure mode some numbers point to.

The modes are those of Many Faces (arXiv:2605.11182, known to us second-hand). All bounds are ours:
the paper gives examples, and no bounds. A verdict is a hint of where to look.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

Measures = Mapping[str, float]

DISTORTED = 0.05
"""Share of answers that the teacher loses by going on with the student's words."""
TURNED = 2.0
"""By how many deviations of chance more answers turn wrong than right."""
MASS_LEFT = 0.7
"""Of the teacher's mass on its most likely tokens, what the student has there."""
MASS_FALLEN = 0.1
"""By how much the student's mass on the support falls in training."""
IRREDUCIBLE = 0.5
"""Share of the reverse KL that no student without the context can lose."""
SPECIFIC = 1.5
"""Ratio of the reverse KLs under another question's solution and under the own one."""
REPEATED = 0.6
"""Share of 3-grams that were there before; Many Faces has .51 at the start, .79 in collapse."""
LONGER = 2.0
"""Ratio of the lengths of answers at the end and at the start of training."""
CUT = 0.2
"""Share of answers that do not end."""
AGREEING = 0.01
"""Nats of KL(student || teacher) for each token."""
FAR = 0.5
"""Share of the teacher's most likely tokens that are among the student's."""


class Verdict(NamedTuple):
    """A failure mode, and the numbers that point to it."""

    mode: str
    because: str


class Rule(NamedTuple):
    """When numbers point to a failure mode.

    Attributes:
        mode: Its name.
        needs: The numbers that it looks at; without one of them it says nothing.
        holds: Whether they point to it.
        because: They as a sentence, for ``str.format``.
    """

    mode: str
    needs: tuple[str, ...]
    holds: Callable[[Measures], bool]
    because: str


PREFIXES = "student prefixes distort the teacher"
BIASED = "biased top-k reverse KL (mass on the support falls)"
AGGREGATED = "aggregation collapse (context is specific to the instance)"
EXPLODED = "repetition/length explosion"
CUT_OFF = "answers are cut"
AGREE = "student and teacher nearly agree (nothing to learn)"
TOO_FAR = "low overlap (teacher too far)"


def _turned(found: Measures) -> bool:
    lost, won = found["right_to_wrong"], found["wrong_to_right"]
    fallen = found["alone_right"] - found["prefixed_right"]
    return fallen >= DISTORTED and lost - won >= TURNED * math.sqrt(lost + won)


def _specific(found: Measures) -> bool:
    low, high = sorted((found["context_kl"], found["shuffled_kl"]))
    return high >= AGREEING and high >= SPECIFIC * low


RULES = (
    Rule(
        PREFIXES,
        ("alone_right", "prefixed_right", "right_to_wrong", "wrong_to_right"),
        _turned,
        "the teacher is right in {alone_right:.0%} alone and in {prefixed_right:.0%} after the "
        "student's words ({right_to_wrong:.0f} turn wrong, {wrong_to_right:.0f} right)",
    ),
    Rule(
        BIASED,
        ("uncorrected", "student_mass", "teacher_mass"),
        lambda x: x["uncorrected"] > 0 and x["student_mass"] <= MASS_LEFT * x["teacher_mass"],
        "correction none, and on the teacher's most likely tokens the student has "
        "{student_mass:.3f} where the teacher has {teacher_mass:.3f}",
    ),
    Rule(
        BIASED,
        ("student_mass_before", "student_mass_after"),
        lambda x: x["student_mass_before"] - x["student_mass_after"] >= MASS_FALLEN,
        "in training the student's mass on the support fell from {student_mass_before:.3f} to "
        "{student_mass_after:.3f}",
    ),
    Rule(
        AGGREGATED,
        ("irreducible_share", "consensus_kl", "consensus_gap"),
        lambda x: x["consensus_kl"] >= AGREEING and x["irreducible_share"] >= IRREDUCIBLE,
        "of {consensus_kl:.3g} nats of reverse KL, {consensus_gap:.3g} ({irreducible_share:.0%}) "
        "are between the teacher's contexts: no student without them can lose that",
    ),
    Rule(
        AGGREGATED,
        ("context_kl", "shuffled_kl"),
        _specific,
        "the reverse KL is {context_kl:.3g} with a question's own solution and {shuffled_kl:.3g} "
        "with another's",
    ),
    Rule(
        EXPLODED,
        ("repetition",),
        lambda x: x["repetition"] >= REPEATED,
        "{repetition:.0%} of the 3-grams were there before",
    ),
    Rule(
        EXPLODED,
        ("answer_tokens_before", "answer_tokens_after"),
        lambda x: x["answer_tokens_after"] >= LONGER * x["answer_tokens_before"],
        "in training answers grew from {answer_tokens_before:.0f} to {answer_tokens_after:.0f} "
        "tokens",
    ),
    Rule(
        CUT_OFF,
        ("ended", "length"),
        lambda x: 1.0 - x["ended"] >= CUT,
        "only {ended:.0%} of the answers end, after {length:.0f} tokens on average",
    ),
    Rule(
        AGREE,
        ("reverse_kl",),
        lambda x: x["reverse_kl"] <= AGREEING,
        "KL(student || teacher) is {reverse_kl:.2g} nats for each token",
    ),
    Rule(
        TOO_FAR,
        ("overlap",),
        lambda x: x["overlap"] <= FAR,
        "of the teacher's most likely tokens {overlap:.0%} are among the student's",
    ),
)


def verdicts(measures: Measures) -> list[Verdict]:
    """Return the failure modes that numbers point to, in the order of ``RULES``."""
    return [
        Verdict(rule.mode, rule.because.format(**measures))
        for rule in RULES
        if all(name in measures for name in rule.needs) and rule.holds(measures)
    ]


def trends(rows: Iterable[Measures]) -> dict[str, float]:
    """Return what logged numbers were in the first and in the last tenth of training.

    Args:
        rows: The numbers of each step, as ``metrics.jsonl`` has them.
    """
    logged = list(rows)
    found = {}
    for name in ("student_mass", "answer_tokens"):
        values = [row[key] for row in logged if (key := f"{name}/student") in row]
        tenth = math.ceil(len(values) / 10)
        if len(values) > 1:
            found[f"{name}_before"] = sum(values[:tenth]) / tenth
            found[f"{name}_after"] = sum(values[-tenth:]) / tenth
    return found

"""Does a target beyond the teacher break a format (the Extrapolation Cliff), and does a guard help?

Trains the bundled `arithmetic-student`, whose JSON is often malformed, on problems with JSON, with
targets 1 to 4 times as far from the student before training as the bundled teacher (ExOPD,
arXiv:2602.12125; the cliff: arXiv:2605.08737, known to us by its abstract). The share of answers
that a strict parser reads shows whether the format breaks; the guard (ours) bounds the strength
where both sides all but know the next token. The target is compared as a whole, and, in arms of its
own, by the sampled token with a clipped weight, as ExOPD's code does.

    python scripts/reproduce/cliff.py

Writes results.json, figure.png and README.md to samples/cliff. Each run is saved when it is done,
and what is there already is not run again.
"""

from arithmetic_runs import SHOWN, Study, measured, options, publish
from collecting import Arm

STRENGTHS = (1.25, 1.5, 2.0, 4.0)
JSON = ["data.path=bundled:arithmetic-json-train.jsonl", "rewards=json-answer"]
SAMPLED = [
    "method.divergence=sampled", "method.baseline=false", "method.importance_clip=5.0",
]  # fmt: skip


def beyond(strength: float, *more: str) -> Arm:
    """Return the arm of a strength."""
    return Arm("exopd/arithmetic", [*JSON, f"method.strength={strength}", *more])


ARMS = {
    "1": beyond(1.0),
    **{f"{s:g}": beyond(s) for s in STRENGTHS},
    **{f"{s:g}, guarded": beyond(s, "method.guard=relative") for s in STRENGTHS},
    **{f"{s:g}, sampled": beyond(s, *SAMPLED) for s in (1.0, 2.0, 4.0)},
}
STUDY = Study(
    name="cliff",
    title="Targets beyond the teacher, and a format, on arithmetic with JSON",
    about="ExOPD on problems with JSON, by strength: unguarded, with the relative guard, and by "
    "the sampled token alone. The mean strength is that after the guard.",
    arms=ARMS,
    against={"1": ARMS, "1, sampled": ["2, sampled", "4, sampled"]},
    judged="json",
    shown=SHOWN | {"strength": "mean strength"},
    drawn=("json/parsed", "json/mean@4", "strength", "entropy", "teacher/reverse-kl"),
)


def main() -> None:
    given = options(STUDY, __doc__)
    publish(STUDY, measured(STUDY, given), given.output)


if __name__ == "__main__":
    main()

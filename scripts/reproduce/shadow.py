"""What does a shadow (ShadowPEFT) learn with as many parameters as a LoRA, or a DoRA?

Tunes the bundled `arithmetic-student` on given solutions that end with JSON, whose format it breaks
in 40 % of its answers: with a shadow of peft's form and of the paper's (arXiv:2604.19254), with
LoRA and with DoRA, at two budgets of parameters, each equal within 7 %, and at three learning
rates each, as the best one differs. All of the weights, trained, are beside them. Shadows are also
measured alone, without the base.

    python scripts/reproduce/shadow.py

Writes results.json, figure.png and README.md to samples/shadow. Each run is saved when it is done,
and what is there already is not run again.
"""

from itertools import product
from pathlib import Path

from arithmetic_runs import CPU, STYLES, Study, World, measured, options, publish
from collecting import Arm

from diffdistill.checkpoints import restore
from diffdistill.commands.sessions import models
from diffdistill.evaluation.answers import examine
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings

CONFIG = "opd/arithmetic"
TASK = [
    "method={name: sft-answers}",
    "roles={}",
    "data.path=bundled:arithmetic-json-train.jsonl",
]
RATES = (1e-3, 3e-3, 1e-2)
SIZES = {
    "small": "intermediate_size: 32, num_layers: 1",
    "large": "intermediate_size: 96, num_layers: 2",
}
BETWEEN = {
    ("peft", "small"): "rank: 4, update_size: 4",
    ("paper", "small"): "rank: 6, update_size: 5",  # on one block less
    ("peft", "large"): "rank: 8, update_size: 8",
    ("paper", "large"): "rank: 10, update_size: 9",
}
RANKS = {("LoRA", "small"): 8, ("LoRA", "large"): 20, ("DoRA", "small"): 7, ("DoRA", "large"): 20}
FORMS = {
    "shadow": "variant: peft, strength: 1.0",
    "paper's shadow": "variant: paper, strength: 1.0",
}


def shadow(form: str, budget: str) -> str:
    """Return the override that gives the student a shadow; without dropout, as a LoRA has none."""
    variant = "paper" if "paper" in form else "peft"
    sizes = f"{SIZES[budget]}, {BETWEEN[variant, budget]}"
    chosen = f"{FORMS[form]}, {sizes}, dropout: 0.0"
    return f"roles.student={{adapter: shadow, shadow: {{{chosen}}}}}"


def lora(kind: str, budget: str) -> str:
    """Return the override that gives the student a LoRA or a DoRA, on all linear layers."""
    rank, dora = RANKS[kind, budget], str(kind == "DoRA").lower()
    return f"roles.student={{adapter: lora, rank: {rank}, alpha: {2 * rank}, dora: {dora}}}"


def arms() -> dict[str, Arm]:
    """Return each kind of adapter with each budget and learning rate, and all weights."""
    found = {}
    for budget, rate in product(SIZES, RATES):
        kinds = {form: shadow(form, budget) for form in FORMS}
        kinds |= {kind: lora(kind, budget) for kind in ("LoRA", "DoRA")}
        for kind, override in kinds.items():
            changes = [*TASK, override, f"train.lr={rate}"]
            found[f"{kind}, {budget}, lr {rate:g}"] = Arm(CONFIG, changes)
    for rate in RATES:
        found[f"all weights, lr {rate:g}"] = Arm(CONFIG, [*TASK, f"train.lr={rate}"])
    return found


def alone(folder: Path, world: World) -> dict[str, float]:
    """Return how many parameters were trained, and how a shadow does without its base."""
    session = restore(folder, device=CPU)
    student = session.roles["student"]
    found = {
        "parameters": sum(p.numel() for p in student.parameters().values()) / 1e3,
        "alone/mean@4": 0.0,
    }
    if student.settings.shadow is not None:
        _, judge = STYLES["json"]
        role = models(session, ["detached"])["detached"]
        out = examine(
            world.own, role.name, role, world.problems["json"], AnswerEvaluateSettings(),
            judge(device=CPU),
        )  # fmt: skip
        found |= {f"alone/{m.metric}": m.value for m in out.averages if m.metric == "mean@4"}
    return found


ARMS = arms()
SHOWN = {
    "parameters": "thousands of parameters",
    "json/mean@4": "right in JSON",
    "json/parsed": "JSON parsed",
    "box/mean@4": "right in a box (not trained)",
    "alone/mean@4": "right in JSON, alone",
    "seconds": "s a step",
}
STUDY = Study(
    name="shadow",
    title="ShadowPEFT against LoRA and DoRA on arithmetic",
    about="The student learns given solutions that end with JSON, by cross-entropy. Adapters of "
    "one budget have equally many parameters within 7 %; shadows have strength 1 and no dropout "
    "here, and are also measured alone (0 for others).",
    arms=ARMS,
    against={
        f"LoRA, {budget}, lr {rate:g}": [
            name for name in ARMS if name.endswith(f", {budget}, lr {rate:g}")
        ]
        for budget, rate in product(SIZES, RATES)
    },
    steps=100,
    shown=SHOWN,
    drawn=("json/mean@4", "json/parsed", "box/mean@4", "alone/mean@4"),
    extra=alone,
)


def main() -> None:
    given = options(STUDY, __doc__)
    publish(STUDY, measured(STUDY, given), given.output)


if __name__ == "__main__":
    main()

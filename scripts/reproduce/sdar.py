"""Does SDAR's gate teach anything beyond GRPO, and what without a slope (beta = 0)?

Trains the bundled `arithmetic-student` by GRPO, and by GRPO with SDAR's gated self-distillation
(arXiv:2605.15155): a policy gradient whose reward is the gate. With a slope of 0 all gates are one
half, and the gradient is zero in expectation: noise, which the paper's code calls GRPO + OPSD. So a
difference between SDAR and beta 0 is what the gate teaches, and one between beta 0 and GRPO is
what that noise costs. The distilled term is also run alone, and with the mean gate subtracted.
Beside them are other ways to join rewards and a self-teacher: RLSD and RLRT, which credit tokens by
it, and SDPO (arXiv:2601.20802), which learns from the student that is shown another right answer.

    python scripts/reproduce/sdar.py

Writes results.json, figure.png and README.md to samples/sdar. Each run is saved when it is done,
and what is there already is not run again.
"""

from arithmetic_runs import SHOWN, Study, measured, options, publish
from collecting import Arm

CONFIG = "sdar/arithmetic"
FLAT, STRONG = "method.gate_beta=0.0", "method.weight=0.1"
CREDITED = "num_answers: 4, max_tokens: 96, clip_high: 0.2, ratio_most: 3.0"
ALONE = ["method.reward_weight=0.0", "method.weight=1.0"]
ARMS = {
    "GRPO": Arm("grpo/arithmetic", ["method.clip_high=0.2", "method.ratio_most=3.0"]),
    "SDAR": Arm(CONFIG, []),
    "beta 0": Arm(CONFIG, [FLAT]),
    "SDAR, weight 0.1": Arm(CONFIG, [STRONG]),
    "beta 0, weight 0.1": Arm(CONFIG, [STRONG, FLAT]),
    "centered, weight 0.1": Arm(CONFIG, [STRONG, "method.gate_scale=centered"]),
    "gate alone": Arm(CONFIG, ALONE),
    "gate alone, beta 0": Arm(CONFIG, [*ALONE, FLAT]),
    "gate alone, centered": Arm(CONFIG, [*ALONE, "method.gate_scale=centered"]),
    "RLSD": Arm(CONFIG, [f"method={{name: rlsd, {CREDITED}}}"]),
    "RLRT": Arm(CONFIG, [f"method={{name: rlsd, form: rlrt, {CREDITED}}}"]),
    "SDPO": Arm(CONFIG, ["method={name: sdpo, num_answers: 4, max_tokens: 96}"]),
}
STUDY = Study(
    name="sdar",
    title="Gated self-distillation (SDAR) on arithmetic",
    about="GRPO with the clips of SDAR's code, and with its distilled term added (weight 0.01 if "
    "not said otherwise), at a slope beta of 5 and of 0; or that term alone. RLSD and RLRT have "
    "the same clips; SDPO takes rewards for nothing but which answer its teacher is shown.",
    arms=ARMS,
    against={
        "GRPO": ARMS,
        "beta 0": ["SDAR"],
        "beta 0, weight 0.1": ["SDAR, weight 0.1", "centered, weight 0.1"],
        "gate alone, beta 0": ["gate alone", "gate alone, centered"],
    },
    questions=400,
    shown=SHOWN | {"grad_norm": "gradient norm"},
)


def main() -> None:
    given = options(STUDY, __doc__)
    publish(STUDY, measured(STUDY, given), given.output)


if __name__ == "__main__":
    main()

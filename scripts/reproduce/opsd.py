"""Does a student learn more from itself, shown the solution, than by SFT or GRPO (OPSD)?

Trains the bundled `arithmetic-student` by OPSD (arXiv:2601.18734), by SFT on the same solutions and
by GRPO, each with 16 answers a step; and by OPSD with the clips of the authors' recipes (entry_clip
0.05 where the model thinks, 1e-6 where it does not) and with ours. By algebra the entry clip turns
the gradient of what it clips around. Whether it does so with a real model is measured too: the
cosine of each arm's first gradients with those of the whole divergence.

    python scripts/reproduce/opsd.py

Writes results.json, figure.png and README.md to samples/opsd. Each run is saved when it is done,
and what is there already is not run again.
"""

import torch
from arithmetic_runs import Study, gradients, measured, options, publish
from collecting import Arm, cell, header, row, save_results

CONFIG = "opsd/arithmetic"
ARMS = {
    "SFT": Arm(CONFIG, ["method={name: sft-answers}"]),
    "GRPO": Arm("grpo/arithmetic", []),
    "GRPO, lr 3e-4": Arm("grpo/arithmetic", ["train.lr=3.0e-4"]),
    "OPSD": Arm(CONFIG, []),
    "entry clip 0.05": Arm(CONFIG, ["method.entry_clip=0.05"]),
    "entry clip 1e-6": Arm(CONFIG, ["method.entry_clip=1.0e-6"]),
    "token clip 0.5": Arm(CONFIG, ["method.token_clip=0.5"]),
    "reverse KL": Arm(CONFIG, ["method.divergence=reverse-kl"]),
}
COMPARED = [arm for arm in ARMS if arm != "SFT" and "GRPO" not in arm]
"""Arms that read the same answers, so that their gradients can be compared."""
STUDY = Study(
    name="opsd",
    title="Self-distillation from the solution (OPSD) on arithmetic",
    about="OPSD and its clips, SFT on the solutions that its teacher is shown, and GRPO (four "
    "answers to each of four questions; at a learning rate of 1e-4, and at the others' 3e-4).",
    arms=ARMS,
    against={"OPSD": ARMS, "SFT": ["GRPO"]},
    questions=400,
)


def directions(num_batches: int = 8) -> dict[str, list[float]]:
    """Return the cosine of each arm's gradient with OPSD's, before training, of some batches."""
    whole = gradients(ARMS["OPSD"], num_batches)
    return {
        name: [
            float(torch.cosine_similarity(one, other, dim=0))
            for one, other in zip(gradients(ARMS[name], num_batches), whole, strict=True)
        ]
        for name in COMPARED
    }


def direction_table(found: dict[str, list[float]]) -> list[str]:
    """Return the part of the page about gradients."""
    return [
        "",
        "## Where the first step leads",
        "",
        "The cosine of each arm's gradient before training with that of OPSD, on the same answers: "
        "mean and standard deviation over 8 batches of 16.",
        "",
        *header(COMPARED),
        row("cosine", [cell(found[name]) for name in COMPARED]),
    ]


def main() -> None:
    given = options(STUDY, __doc__)
    results = measured(STUDY, given)
    if "directions" not in results:
        results["directions"] = directions()
        save_results(given.results, results)
    publish(STUDY, results, given.output, direction_table(results["directions"]))


if __name__ == "__main__":
    main()

"""Which tokens of an answer are worth learning, and what does choosing them save (TIP)?

Trains the bundled `arithmetic-student` on its own answers with the bundled teacher: on all tokens,
and on 50, 20 and 10 % of them by each rule of TIP (arXiv:2604.14084). Each rule takes the highest
scores and, in other arms, draws in proportion to them: the paper compares entropy drawn with
soft-or highest. Uniformly drawn tokens are the control. Also measured is what a loss keeps for its
backward pass, which the paper says selection saves: of a loss by plain autograd, and of ours.

    python scripts/reproduce/tip.py

Writes results.json, figure.png and README.md to samples/tip. Each run is saved when it is done, and
what is there already is not run again.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from arithmetic_runs import Study, measured, options, publish
from collecting import Arm, cell, differences, header, row, save_results
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffdistill.projection import Projection, token_maps

RETENTIONS = (0.5, 0.2, 0.1)
RULES = ("entropy", "divergence", "soft-or", "q3")
CONFIG = "opd/arithmetic"
TILE_ROWS = 16
"""Tokens that are projected at a time where memory is measured."""


def choosing(rule: str, retention: float, *, drawn: bool) -> list[str]:
    """Return the overrides that learn a share of the tokens."""
    return [
        f"method.select={rule}",
        f"method.retention={retention}",
        f"method.select_sampled={str(drawn).lower()}",
    ]


def named(rule: str, retention: float, how: str) -> str:
    """Return the name of an arm."""
    return f"{rule} {retention:.0%}, {how}"


def arms() -> dict[str, Arm]:
    """Return all tokens, and each rule with each share, highest and drawn."""
    found = {"all tokens": Arm(CONFIG, [])}
    for retention in RETENTIONS:
        for rule in RULES:
            for how in ("highest", "drawn"):
                overrides = choosing(rule, retention, drawn=how == "drawn")
                found[named(rule, retention, how)] = Arm(CONFIG, overrides)
        found[named("uniform", retention, "drawn")] = Arm(
            CONFIG, choosing("none", retention, drawn=True)
        )
    return found


ARMS = arms()
STUDY = Study(
    name="tip",
    title="Token selection (TIP) on arithmetic",
    about="OPD with the reverse KL to `arithmetic-teacher`, on a share of each answer's tokens: "
    "the highest by a rule, or drawn in proportion to its score, without reweighting.",
    arms=ARMS,
    against={"all tokens": ARMS},
    steps=100,
    questions=200,
)


def confounded(results: Mapping[str, Any]) -> list[str]:
    """Return the part of the page that tells the highest tokens from drawn ones."""
    lines = ["", "## The highest less the drawn, by the same rule and with the same seed", ""]
    lines += header(list(STUDY.shown.values()))
    for retention, rule in product(RETENTIONS, RULES):
        highest, drawn = (named(rule, retention, how) for how in ("highest", "drawn"))
        gaps = [cell(differences(results, highest, drawn, key)) for key in STUDY.shown]
        lines.append(row(f"{rule} {retention:.0%}", gaps))
    return lines


class Watch(TorchDispatchMode):
    """Knows what all tensors are stored in that come about within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return found


def kept_bytes(loss: Callable[[], Tensor], given: Sequence[Tensor]) -> int:
    """Return the bytes that are kept for the backward pass of a loss, besides what was given."""
    with Watch() as watch:
        value = loss()
    old = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
    kept = [n for ref, n in watch.storages.items() if not ref.expired() and ref not in old]
    del value
    return sum(kept)


def plain_loss(student: Projection, teacher: Projection, chosen: Tensor) -> Tensor:
    """Return the mean reverse KL of the chosen rows by plain autograd on all logits."""
    ours = (student.hidden @ student.weight.T)[chosen].log_softmax(-1)
    theirs = (teacher.hidden @ teacher.weight.T)[chosen].log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1).mean()


def streamed_loss(student: Projection, teacher: Projection, chosen: Tensor) -> Tensor:
    """Return the same by the loss that the methods use."""
    maps = token_maps(student, teacher, ["reverse-kl"], mask=chosen, tile_rows=TILE_ROWS)
    return maps["reverse-kl"].sum() / chosen.sum()


def memory(rows: int = 512, vocabulary: int = 8192, channels: int = 64) -> dict[str, float]:
    """Return what both losses keep, in units of the logits of all rows, by share of tokens.

    Of random models with a large vocabulary: that of the bundled ones is too small to weigh.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student = Projection(
        random(rows, channels).requires_grad_(), random(vocabulary, channels).requires_grad_()
    )
    teacher = Projection(random(rows, channels), random(vocabulary, channels))
    given = [side.hidden for side in (student, teacher)]
    given += [side.weight for side in (student, teacher)]
    found = {}
    for retention in (1.0, *RETENTIONS):
        chosen = torch.arange(rows) < round(retention * rows)
        for name, loss in (("plain", plain_loss), ("streamed", streamed_loss)):
            asked = partial(loss, student, teacher, chosen)
            kept = kept_bytes(asked, given)
            found[f"{name} {retention:.0%}"] = kept / (rows * vocabulary * 4)
    return found


def memory_table(found: dict[str, float]) -> list[str]:
    """Return the part of the page about memory."""
    shares = [f"{retention:.0%}" for retention in (1.0, *RETENTIONS)]
    return [
        "",
        "## What the loss keeps for its backward pass",
        "",
        "In units of the float32 logits of all tokens (random models: 512 tokens, 8192 entries of "
        "the vocabulary, 64 channels), besides hidden states and output heads. Plain: the reverse "
        "KL by autograd on logits, of the chosen tokens. Streamed: the loss of `method.name: opd`, "
        f"which projects again and keeps the last tile of both sides, here of {TILE_ROWS} tokens; "
        "a tile is 128 MiB by default, however many tokens there are.",
        "",
        *header(shares),
        *(
            row(name, [f"{found[f'{name} {share}']:.3f}" for share in shares])
            for name in ("plain", "streamed")
        ),
    ]


def main() -> None:
    given = options(STUDY, __doc__)
    results = measured(STUDY, given)
    if "memory" not in results:
        results["memory"] = memory()
        save_results(given.results, results)
    more = [*confounded(results), *memory_table(results["memory"])]
    publish(STUDY, results, given.output, more)


if __name__ == "__main__":
    main()

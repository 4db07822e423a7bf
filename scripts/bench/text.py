"""Speed and memory of token divergences and of a step of ``opd``, as ratios within one run.

    python scripts/bench/text.py           # V = 151,936, H = 1,024, 2,048 tokens
    python scripts/bench/text.py --full    # the same on a GPU, in bfloat16
    python scripts/bench/text.py --quick   # a small vocabulary and few tokens, to see that it runs
    python scripts/bench/text.py --only step   # one part: divergences, frozen-head, selection, step

Each task is forward and backward: a divergence is trained, and its map, both entropies and the
log-probability of the tokens are returned. Weights are random. Writes samples/bench/text.json,
with what it ran on (text-full.json or text-quick.json); with --only the other parts stay as they
are there. The naive JSD takes 16 GB; fewer --tokens take less.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import opd_step
import torch
from dllm import Allocated
from random_text import VOCABULARY
from timing import paired
from torch import Tensor

from diffdistill.projection import Projection, TokenMap, token_maps

ROOT = Path(__file__).parents[2]
Divergence = Literal["forward-kl", "reverse-kl", "jsd"]
KINDS: tuple[Divergence, ...] = ("forward-kl", "reverse-kl", "jsd")
PARTS = ("divergences", "frozen-head", "selection", "step")


@dataclass
class Case:
    """Hidden states and heads of a student and of a teacher, on one device.

    Attributes:
        student: Its hidden states have gradients, and so has its head unless it is frozen.
        teacher: Has none.
        tokens: The answer's.
    """

    student: Projection
    teacher: Projection
    tokens: Tensor

    @classmethod
    def random(
        cls,
        rows: int,
        words: int,
        width: int,
        device: str,
        dtype: torch.dtype,
        *,
        frozen_head: bool = False,
    ) -> "Case":
        """Return a case whose logits have a standard deviation of about 1."""
        torch.manual_seed(0)
        sides = []
        for trained in (True, False):
            hidden = torch.randn(rows, width, device=device, dtype=dtype)
            weight = torch.randn(words, width, device=device, dtype=dtype).div_(math.sqrt(width))
            head = trained and not frozen_head
            parts = (hidden.requires_grad_(trained), weight.requires_grad_(head))
            sides.append(Projection(*parts))
        return cls(sides[0], sides[1], torch.randint(words, (rows,), device=device))

    def train(self, value: Tensor) -> None:
        """Take the gradients of a scalar, and forget them."""
        value.backward()
        self.student.hidden.grad = self.student.weight.grad = None

    def streamed(self, kind: Divergence, planned: bool, mask: Tensor | None = None) -> None:
        """Train with the maps of this package, whose gradients are planned or not."""
        wanted: tuple[TokenMap, ...] = (kind, "entropy", "teacher-entropy", "logprob")
        plan = {kind: torch.ones_like(self.tokens)} if planned else None
        maps = token_maps(
            self.student,
            self.teacher,
            wanted,
            tokens=self.tokens,
            mask=mask,
            planned=plan,
            trained=kind,
        )
        self.train(maps[kind].mean())

    def selected(self, share: float) -> None:
        """Train the reverse KL of the tokens with the highest Soft-OR score, as TIP does.

        The scores are of all tokens, from the same call (eq. 7 of TIP, arXiv:2604.14084).
        """
        wanted: tuple[TokenMap, ...] = ("reverse-kl", "entropy")
        maps = token_maps(self.student, self.teacher, wanted)
        first, second = (unit(maps[name].detach()) for name in wanted)
        best = (first + second - first * second).topk(int(share * len(first))).indices
        self.train(maps["reverse-kl"][best].mean())

    def naive(self, kind: Divergence) -> list[Tensor]:
        """Train with logits that are all there at once; return the other maps."""
        logprobs = self._logits(self.student).log_softmax(-1)
        with torch.no_grad():
            others = self._logits(self.teacher).log_softmax(-1)
            entropies = [-(x.exp() * x).sum(-1) for x in (logprobs, others)]
        if kind == "forward-kl":
            value = (others.exp() * (others - logprobs)).sum(-1)
        elif kind == "reverse-kl":
            value = (logprobs.exp() * (logprobs - others)).sum(-1)
        else:
            p, q = logprobs.exp(), others.exp()
            middle = (0.5 * p + 0.5 * q).log()
            value = (0.5 * q * (others - middle) + 0.5 * p * (logprobs - middle)).sum(-1)
        own = logprobs.detach().gather(-1, self.tokens[:, None])
        self.train(value.mean())
        return [*entropies, own]

    def trl(self, kind: Divergence) -> None:
        """Train with TRL's chunked kernel, which has the student's entropy only."""
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        beta = {"forward-kl": 0.0, "jsd": 0.5, "reverse-kl": 1.0}[kind]
        sides = [x for side in (self.student, self.teacher) for x in (*side[:2], None)]
        self.train(ChunkedDivergenceFunction.apply(*sides, beta)[0].mean())

    @staticmethod
    def _logits(side: Projection) -> Tensor:
        return (side.hidden @ side.weight.T).float()


def unit(score: Tensor) -> Tensor:
    """Return a score between 0 and 1."""
    return (score - score.min()) / (score.max() - score.min())


def peak(task: Callable[[], object], case: Case) -> int:
    """Return the most bytes that a task allocates besides the gradients it returns."""
    learned = [x for x in case.student[:2] if x.requires_grad]
    gradients = sum(x.numel() * x.element_size() for x in learned)
    if case.tokens.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        return torch.cuda.max_memory_allocated() - before - gradients
    there = [x for side in (case.student, case.teacher) for x in side[:2]]
    with Allocated() as allocated:
        allocated.alive |= {x.untyped_storage()._cdata for x in there}
        task()
    return allocated.peak - gradients


def against_others(kinds: Sequence[Divergence], case: Case, rounds: int) -> dict[str, Any]:
    """Return time and memory of each divergence over those of the naive path and of TRL."""
    found: dict[str, Any] = {}
    for kind in kinds:
        others = {"naive": partial(case.naive, kind), "trl": partial(case.trl, kind)}
        peaks = {name: peak(task, case) for name, task in others.items()}
        found[kind] = {"peak_bytes": dict(peaks)}
        for way in ("planned", "unplanned"):
            own = partial(case.streamed, kind, way == "planned")
            found[kind]["peak_bytes"][way] = own_peak = peak(own, case)
            found[kind][way] = {f"memory_over_{x}": own_peak / peaks[x] for x in others}
            for name, task in others.items():
                names = (f"seconds_beside_{name}", f"seconds_{name}", f"time_over_{name}")
                found[kind][way] |= dict(zip(names, paired(own, task, rounds), strict=True))
    return found


def selection(case: Case, rounds: int) -> dict[str, Any]:
    """Return the time of training a tenth of the tokens over that of training them all.

    Where the scores of the same call choose, nothing can be planned.
    """
    rows = len(case.tokens)
    mask = torch.zeros(rows, dtype=torch.bool, device=case.tokens.device)
    mask[torch.randperm(rows)[: rows // 10]] = True
    planned, unplanned = (partial(case.streamed, "reverse-kl", plan) for plan in (True, False))
    scored = partial(case.selected, 0.1)
    pairs = {
        "given_mask": (partial(planned, mask), planned),
        "given_mask_unplanned": (partial(unplanned, mask), unplanned),
        "tip_scores": (scored, unplanned),
        "tip_scores_over_planned": (scored, planned),
    }
    names = ("seconds", "seconds_of_all", "ratio")
    return {
        name: dict(zip(names, paired(*pair, rounds), strict=True)) for name, pair in pairs.items()
    }


def measured(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return one part's results, with the size of what was measured."""
    if part == "step":
        size = opd_step.QUICK if given.quick else opd_step.FULL if given.full else opd_step.HERE
        with TemporaryDirectory() as folder:
            return opd_step.step_overhead(Path(folder), size, given.rounds)
    shape = (256, 4096, 64) if given.quick else (given.tokens, VOCABULARY, 1024)
    device, dtype = ("cuda", torch.bfloat16) if given.full else ("cpu", torch.float32)
    frozen = part == "frozen-head"  # as under a LoRA
    case = Case.random(*shape, device=device, dtype=dtype, frozen_head=frozen)
    sizes = dict(zip(("tokens", "vocabulary", "width"), shape, strict=True))
    if part == "selection":
        return sizes | selection(case, given.rounds)
    return sizes | against_others(given.kinds, case, given.rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--full", action="store_true", help="on a GPU, in bfloat16")
    parser.add_argument("--tokens", type=int, default=2048, help="rows")
    parser.add_argument("--only", choices=PARTS, help="one part; all of them without")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="divergences")
    parser.add_argument("--rounds", type=int, default=3, help="times each side is run")
    parser.add_argument("--output", type=Path, help="the JSON file")
    given = parser.parse_args(arguments)
    if given.full and not torch.cuda.is_available():
        raise SystemExit("--full needs an accelerator; not run")
    default = "text-quick.json" if given.quick else "text-full.json" if given.full else "text.json"
    path = given.output or ROOT / "samples" / "bench" / default
    results = json.loads(path.read_text()) if given.only and path.is_file() else {}
    for part in [given.only] if given.only else PARTS:
        results[part] = measured(part, given)
    name = torch.cuda.get_device_name() if given.full else "CPU"
    results["ran_on"] = f"{name}, {platform.machine()}, torch {torch.__version__}"
    results["threads"] = torch.get_num_threads()
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""What DBiLD costs for each token at its cap, as a ratio to the plain KL within one run.

    python scripts/bench/dbild.py          # V = 151,936, H = 896, 64 tokens, on the CPU
    python scripts/bench/dbild.py --full   # the same with 4,096 tokens on a GPU, in bfloat16
    python scripts/bench/dbild.py --quick  # a small vocabulary, to see that it runs

Each task is forward and backward from hidden states and heads, by the code that trains. With flat
logits every row has as many leaders as the cap lets it, and so as many pairs. Weights are random.
Writes samples/bench/dbild.json, with what it ran on (dbild-full.json or dbild-quick.json).
"""

import argparse
import json
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_text import VOCABULARY
from text import Case
from timing import paired

from diffdistill.dbild import Leaders, dbild
from diffdistill.projection import token_maps

ROOT = Path(__file__).parents[2]
CAPS = (16, 32, 64)


def plain(case: Case) -> None:
    """Train with the reverse KL over the vocabulary."""
    case.train(token_maps(case.student, case.teacher, ("reverse-kl",))["reverse-kl"].mean())


def ranked(case: Case, leaders: Leaders) -> None:
    """Train with DBiLD."""
    case.train(dbild(case.student, case.teacher, leaders=leaders)["divergence"].mean())


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="on a GPU")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--tokens", type=int, help="rows of a call")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if given.full else ("cpu", torch.float32)
    words, width = (2048, 64) if given.quick else (VOCABULARY, 896)
    tokens = given.tokens or (32 if given.quick else 4096 if given.full else 64)
    rounds = 1 if given.quick else given.rounds
    case = Case.random(tokens, words, width, device, dtype)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if given.full else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": tokens,
        "vocabulary": words,
        "width": width,
        "rounds": rounds,
        "cases": [],
    }
    for cap in CAPS:
        leaders = Leaders(curve=128, fewest_leaders=cap, most_leaders=cap)
        slow, fast, ratio = paired(partial(ranked, case, leaders), partial(plain, case), rounds)
        row = {"leaders": asdict(leaders), "dbild_s": slow, "kl_s": fast, "ratio": ratio}
        found["cases"].append(row)
        print(
            f"{cap} leaders: {ratio:.2f} times the KL ({slow:.3g} s and {fast:.3g} s)", flush=True
        )
    suffix = "-full" if given.full else "-quick" if given.quick else ""
    path = ROOT / "samples" / "bench" / f"dbild{suffix}.json"
    path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

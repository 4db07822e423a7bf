"""TESSY's tokens per second against plain generation, and where the time goes, in one run.

    python scripts/bench/tessy.py           # small random models, on the CPU
    python scripts/bench/tessy.py --full    # shapes of Qwen3-0.6B and 8B on a GPU, in bfloat16
    python scripts/bench/tessy.py --quick   # few tokens, to see that it runs

Both models read bytes. Instead of what its predictor says (it is asked all the same), an author's
text is cut after a given number of characters, so that authors change as often as is said. Without
switching, a text takes the time in which each author alone writes its part of it: what is beyond
that is lost. Writes samples/bench/tessy.json (tessy-full.json or tessy-quick.json).
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from random_text import SIZES
from timing import synchronize
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from diffdistill.boundaries import Author
from diffdistill.draws import Draws
from diffdistill.pipelines.boundary import Boundary
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.writing import Format, LocalWriter
from diffdistill.rollouts import Sampling
from diffdistill.synthesis.cooperation import AUTHORS, Cooperation
from diffdistill.synthesis.drafts import Draft, Plan
from diffdistill.tessy_settings import TessySettings
from diffdistill.types import Example

ROOT = Path(__file__).parents[2]
QUESTION = Example("q", messages=({"role": "user", "content": "Why is that so? " * 8},))


class Clock:
    """Seconds by what they were spent on, and tokens that were written."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.written = 0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(kw_only=True)
class Timed(LocalWriter):
    """A writer whose time is taken."""

    clock: Clock

    def go_on(self, prompts: Any, ids: Any, limits: Any) -> Any:
        """Return what the model writes."""
        with self.clock.of("writing"):
            found = super().go_on(prompts, ids, limits)
        self.clock.written += sum(len(self.tokens(new.text)) for new in found)
        return found


@dataclass(frozen=True)
class Every(Boundary):
    """Asks its network, and cuts after a number of characters.

    Attributes:
        clock: Takes the time.
        length: Of a part.
    """

    clock: Clock = None  # type: ignore[assignment]
    length: int = 8

    def cuts(self, texts: Sequence[str], starts: Sequence[int], style: bool) -> list[int | None]:
        """Return where each text is cut."""
        with self.clock.of("predicting"):
            super().cuts(texts, starts, style)
        pairs = zip(texts, starts, strict=True)
        return [start + self.length if len(t) > start + self.length else None for t, start in pairs]


def writer_of(folder: Path, name: str, device: str, dtype: torch.dtype, clock: Clock) -> Timed:
    """Return a random model to which nothing but letters is likely."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from build_arithmetic_models import build_tokenizer

    words = build_tokenizer()
    words.save_pretrained(str(folder / name))
    config = SIZES[name]
    config.is_causal, config.tie_word_embeddings, config.eos_token_id = True, False, 0
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(str(folder / name))
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for token in range(len(words)):
        if not words.decode([token]).isalpha() or not words.decode([token]).isascii():
            network.lm_head.weight.data[token] = 0.0
    network.lm_head.weight.data[len(words) :] = 0.0
    family = CausalLM(path=str(folder / name), device=torch.device(device))
    return Timed(
        family=family, network=network, read=Questions(family, family), format=Format(),
        sampling=Sampling(1, 0.0), draws=Draws(0), clock=clock,
    )  # fmt: skip


def timed(task: Callable[[], int], clock: Clock) -> tuple[float, dict[str, float], int]:
    """Return tokens per second, seconds by what they were spent on, and tokens written."""
    clock.seconds, clock.written = {}, 0
    synchronize()
    start = time.perf_counter()
    kept = task()
    synchronize()
    seconds = time.perf_counter() - start
    return kept / seconds, {**clock.seconds, "all": seconds}, clock.written


def measured(
    writers: dict[Author, Timed], boundary: Every, settings: TessySettings, rows: int
) -> dict[str, Any]:
    """Return how fast each author is alone, how fast both are together, and what is lost."""

    def written(plan: Plan) -> list[Draft]:
        drafts = (Draft(number, QUESTION, plan) for number in range(rows))
        boundaries: Any = dict.fromkeys(AUTHORS, boundary)
        return list(Cooperation(dict(writers), boundaries, settings).run(drafts))

    def kept(plan: Plan) -> int:
        return sum(len(draft.text) for draft in written(plan))

    kept(Plan(("student",), None))  # a first time, which is not taken
    plain = {a: timed(lambda a=a: kept(Plan((a,), None)), boundary.clock)[0] for a in AUTHORS}
    parts: dict[str, int] = dict.fromkeys(AUTHORS, 0)

    def together() -> int:
        for draft in written(Plan(AUTHORS, None)):
            for author, start, end in draft.spans:
                parts[author] += end - start
        return sum(parts.values())

    rate, seconds, generated = timed(together, boundary.clock)
    total = sum(parts.values())
    unswitched = sum(parts[author] / plain[author] for author in AUTHORS)
    return {
        "tokens_per_second_alone": plain,
        "tokens_per_second": rate,
        "share_of_the_teacher": parts["teacher"] / total,
        "over_the_teacher_alone": rate / plain["teacher"],
        "lost_to_switching": 1.0 - unswitched / seconds["all"],
        "predicting": seconds["predicting"] / seconds["all"],
        "elsewhere": 1.0 - (seconds["predicting"] + seconds["writing"]) / seconds["all"],
        "thrown_away": 1.0 - total / generated,
        "seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--full", action="store_true", help="on a GPU, in bfloat16")
    parser.add_argument("--rows", type=int, default=8, help="samples at a time")
    parser.add_argument("--tokens", type=int, default=256, help="of a sample")
    parser.add_argument("--parts", type=int, nargs="+", default=[4, 8, 16], help="their lengths")
    parser.add_argument("--output", type=Path, help="the JSON file")
    given = parser.parse_args(arguments)
    if given.full and not torch.cuda.is_available():
        raise SystemExit("--full needs an accelerator; not run")
    if given.quick:
        given.rows, given.tokens, given.parts = 2, 24, [8]
    device, dtype = ("cuda", torch.bfloat16) if given.full else ("cpu", torch.float32)
    names = ("student", "dense") if given.full else ("small", "small-teacher")
    clock, results = Clock(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = zip(AUTHORS, names, strict=True)
        writers = {author: writer_of(folder, n, device, dtype, clock) for author, n in pairs}
        SIZES[names[0]].num_labels = 2
        with torch.device(device):
            network = AutoModelForTokenClassification.from_config(SIZES[names[0]], dtype=dtype)
        network.eval()
        for step, length in product((5, 20), given.parts):
            if length >= step:  # never cut
                continue
            boundary = Every(network, writers["student"].family.tokenizer, 200, clock, length)
            settings = TessySettings(
                student_step=step, teacher_step=step, boundary="exact", opens="", closes="",
                ends=[], max_tokens=given.tokens, retries=0, batch_size=given.rows,
            )  # fmt: skip
            found = measured(writers, boundary, settings, given.rows)
            results[f"step {step}, parts of {length}"] = found
    results["shapes"], results["tokens"], results["rows"] = names, given.tokens, given.rows
    where = torch.cuda.get_device_name() if given.full else "CPU"
    results["ran_on"] = f"{where}, {platform.machine()}, torch {torch.__version__}"
    results["threads"] = torch.get_num_threads()
    default = (
        "tessy-quick.json" if given.quick else "tessy-full.json" if given.full else "tessy.json"
    )
    path = given.output or ROOT / "samples" / "bench" / default
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

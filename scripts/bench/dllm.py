"""Speed and memory of text models, as ratios within one run.

    python scripts/bench/dllm.py          # small models, here
    python scripts/bench/dllm.py --full   # 0.6B student, 8B dense and 16B MoE teacher, on a GPU

Weights are random. Writes samples/bench/dllm.json (or dllm-full.json), with what it ran on.
"""

import argparse
import json
import platform
import statistics
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from random_text import BLOCK, SIZES, VOCABULARY, batch_of, random_network, save_config, session_of
from timing import paired, seconds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from diffdistill.chunks import chunk_sums
from diffdistill.distributed import Distributed
from diffdistill.divergences import chunk_probability, reverse_calm
from diffdistill.draws import Draws
from diffdistill.estimates import saved_tensors
from diffdistill.pipelines.answers import AnswerSampler
from diffdistill.pipelines.block_diffusion import Attention
from diffdistill.pipelines.block_sampling import BlockSampler, EncodedAgain, Past, UncachedSampler
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.projection import Projection, at, cross_entropy, token_logprob, token_maps
from diffdistill.session import Session
from diffdistill.trainer import Trainer
from diffdistill.types import Batch

ROOT = Path(__file__).parents[2]


@dataclass
class EncodedEachBlock(EncodedAgain):
    """The clean tokens so far, encoded again at the start of every block.

    dllm also copies the cache in every step, which is left out here.
    """

    def append(self, tokens: Tensor) -> None:
        """Keep clean blocks, and forget what was encoded."""
        super().append(tokens)
        self.cache = DynamicCache()

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits of the next block; the first call encodes all before it."""
        if self.length and self.cache.get_seq_length() == 0:
            length, self.length = self.length, 0
            self._call(self.tokens)
            self.length = length
        return Past.logits(self, tokens)


@dataclass(kw_only=True)
class EachBlockSampler(BlockSampler):
    """Samples as released BD3LM samplers do."""

    def _empty_past(self, pads: Tensor, attention: Attention) -> Past:
        return EncodedEachBlock(self.network, self.block, pads, attention)


def sampler_of(kind: type[BlockSampler], network: nn.Module, tokens: int, steps: int) -> Any:
    """Return a sampler of so many tokens, which nothing ends."""
    return kind(
        network=network, block=BLOCK, mask_id=3, pad_id=2, max_tokens=tokens,
        unmasking=Unmasking(num_steps=steps),
    )  # fmt: skip


def write(sampler: AnswerSampler, device: Any) -> Callable[[], object]:
    """Return a task of writing one answer."""
    ids = torch.zeros(1, dtype=torch.long, device=device)
    return lambda: sampler.sample([list(range(10, 10 + BLOCK))], Draws(0), ids)


def caches(folder: Path, rounds: int) -> dict[str, Any]:
    """Return seconds of an answer by its blocks: incremental cache against encoding again."""
    network = random_network(folder / "small", torch.float32, "sdpa", "cpu")
    found: dict[str, Any] = {}
    for blocks in (4, 16, 64):
        kinds = (EachBlockSampler, BlockSampler)
        again, kept = (sampler_of(kind, network, blocks * BLOCK, 8) for kind in kinds)
        first, second = (s.sample([[9]], Draws(0), torch.zeros(1).long()) for s in (again, kept))
        assert torch.equal(first[0], second[0]), "both write the same"
        times = paired(write(again, "cpu"), write(kept, "cpu"), rounds)
        names = ("seconds_encoded_each_block", "seconds_cached", "ratio")
        found[str(blocks)] = dict(zip(names, times, strict=True))
    return found


def bare(session: Session, batch: Batch) -> Callable[[], None]:
    """Return a task of just the calls of a step: networks, and heads at the hidden tokens."""
    method: Any = session.method
    pair: Any = session.family
    student, text = session.roles["student"], pair.text(batch)
    tide = session.config.method["name"] == "tide"
    if tide:
        answer = pair.text(batch, reader="teacher")
        hidden = method._hide(batch, text, answer)
        mask, level = hidden.mask, hidden.t
        teacher, shared = session.roles["teacher"], method.variant == "shared"
        shown = pair.noised(batch, level, mask if shared else answer.maskable, reader="teacher")
    else:
        noised = method._noised(batch, text, method.interval, "mask")
        mask, level = noised.masked, noised.t.mean(dim=1)
    state = pair.noised(batch, level, mask)

    def task() -> None:
        found = student(state, pair.condition(batch))
        value = cross_entropy(found, text.tokens, mask=mask).sum()
        if tide:
            told = pair.condition(batch, reader="teacher")
            with torch.no_grad():
                theirs = [teacher(shown, told) for _ in range(2 if shared else 1)]
                if not shared:
                    token_logprob(theirs[0], answer.tokens, mask=shown.mask)
            if shared:
                maps = token_maps(at(found, mask), at(theirs[0], mask), ["forward-kl"])
                value = value + maps["forward-kl"].sum()
        value.backward()
        for parameter in student.parameters().values():
            parameter.grad = None

    return task


def overheads(folder: Path, rounds: int, rows: int) -> dict[str, Any]:
    """Return the time of training steps over that of their bare calls."""
    found: dict[str, Any] = {}
    for name, method in {
        "bd3lm": {"name": "bd3lm"},
        "tide_shared": {"name": "tide", "variant": "shared"},
        "tide_cross": {"name": "tide", "variant": "cross"},
    }.items():
        session = session_of(folder, method, full=False)
        batch = batch_of(session, rows)
        trainer = Trainer(session, iter(repeat(batch)), Distributed())
        times = paired(trainer.train_step, bare(session, batch), rounds)
        names = ("seconds_per_step", "bare_calls_seconds", "overhead_ratio")
        found[name] = dict(zip(names, times, strict=True))
    return found


def comp_demo(folder: Path, rounds: int, rows: int) -> dict[str, float]:
    """Return the time of CompDemo's two passes of the teacher, as one doubled batch and apart."""
    tasks = []
    for passes in ("doubled", "two"):
        method = {"name": "tide", "variant": "shared", "passes": passes}
        session = session_of(folder, method, full=False)
        batch = batch_of(session, rows)
        tasks.append(Trainer(session, iter(repeat(batch)), Distributed()).train_step)
    names = ("seconds_doubled", "seconds_two_passes", "doubled_over_two")
    return dict(zip(names, paired(tasks[0], tasks[1], rounds), strict=True))


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within the block, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def chunk_loss(logprobs: Tensor) -> Tensor:
    """Return Reverse CALM on chunks of two tokens against a teacher that is sure of half."""
    chunks = (torch.arange(logprobs.shape[1]) // 2).expand(len(logprobs), -1)
    student = chunk_probability(chunk_sums(logprobs, chunks, logprobs.shape[1] // 2), 2.0)
    return reverse_calm(student, torch.full_like(student, 0.5)).mean()


def chunk_memory() -> dict[str, Any]:
    """Return the memory of chunk losses: streamed, and with a log-softmax ``[B, L, V]``.

    What the graph holds between forward and backward pass, and the most that both allocate. The
    streamed loss works in tiles of 256 MiB, so that its peak stops growing with L; the whole one
    takes less where all logits are smaller than a few tiles.
    """
    found: dict[str, Any] = {"vocabulary": VOCABULARY, "rows": 2, "width": 64}
    weight = nn.Parameter(torch.randn(VOCABULARY, 64) * 0.02)
    for length in (64, 512):
        tokens = torch.randint(VOCABULARY, (2, length))

        def streamed(hidden: Tensor, tokens: Tensor = tokens) -> Tensor:
            return chunk_loss(token_logprob(Projection(hidden, weight), tokens))

        def whole(hidden: Tensor, tokens: Tensor = tokens) -> Tensor:
            logprobs = (hidden @ weight.T).float().log_softmax(-1)
            return chunk_loss(logprobs.gather(-1, tokens[..., None])[..., 0])

        sides: dict[str, dict[str, int]] = {}
        values: list[Tensor] = []
        for name, loss in (("streamed", streamed), ("log_softmax", whole)):
            hidden = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(1))
            hidden.requires_grad_()
            with saved_tensors({weight.untyped_storage().data_ptr()}) as saved:
                value = loss(hidden)
                held = saved.now
                value.backward()
            weight.grad = hidden.grad = None
            with Allocated() as allocated:
                loss(hidden).backward()
            weight.grad = None
            sides[name] = {"held_bytes": held, "peak_bytes": allocated.peak}
            values.append(value.detach())
        torch.testing.assert_close(*values)
        found[str(length)] = sides | {
            f"{kind}_ratio": sides["log_softmax"][f"{kind}_bytes"]
            / sides["streamed"][f"{kind}_bytes"]
            for kind in ("held", "peak")
        }
    return found


# full size


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Measure the most that is allocated on the GPU within the block, in GiB."""
    found: dict[str, float] = {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield found
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


def decoding(folder: Path) -> dict[str, Any]:
    """Return tokens per second and memory of answers of 256 tokens, 32 steps for a block."""
    found: dict[str, Any] = {}
    for name, kinds in (
        ("student", (BlockSampler, EachBlockSampler)),
        ("dense", (BlockSampler,)),
        ("moe", (BlockSampler, UncachedSampler)),
    ):
        network = random_network(folder / name, torch.bfloat16, "sdpa", "cuda")
        for kind in kinds:
            task = write(sampler_of(kind, network, 256, BLOCK), "cuda")
            with peak_memory() as memory:
                task()
                took = statistics.median(seconds(task) for _ in range(3))
            found[f"{name}/{kind.__name__}"] = {"tokens_per_second": 256 / took, **memory}
        del network, task
    own = found["student/BlockSampler"]
    for name in ("dense", "moe"):
        other = found[f"{name}/BlockSampler"]
        found[f"{name}_over_student"] = {
            "speed": own["tokens_per_second"] / other["tokens_per_second"],
            "memory": other["peak_gib"] / own["peak_gib"],
        }
    return found


def training(folder: Path, rows: int) -> dict[str, Any]:
    """Return the student's tokens per second and the memory of training steps."""
    found: dict[str, Any] = {}
    for name, method in {
        "bd3lm": {"name": "bd3lm"},
        "tide_shared_two": {"name": "tide", "variant": "shared"},
        "tide_shared_doubled": {"name": "tide", "variant": "shared", "passes": "doubled"},
        "tide_cross": {"name": "tide", "variant": "cross"},
    }.items():
        with peak_memory() as memory:
            session = session_of(folder, method, full=True)
            batch = batch_of(session, rows)
            trainer = Trainer(session, iter(repeat(batch)), Distributed())
            calls = bare(session, batch)
            took, bare_took, ratio = paired(trainer.train_step, calls, rounds=5)
        found[name] = {
            "tokens_per_second": rows * 512 / took,
            "bare_calls_seconds": bare_took,
            "overhead_ratio": ratio,
            **memory,
        }
        del session, trainer, calls
    return found


def small(folder: Path, rounds: int) -> dict[str, Any]:
    return {
        "sampling_by_blocks": caches(folder, rounds=3),
        "comp_demo": comp_demo(folder, rounds, rows=4),
        "training_step": overheads(folder, rounds, rows=4),
        "chunk_loss_memory": chunk_memory(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="full size, on a GPU")
    parser.add_argument("--rounds", type=int, default=11, help="times each side is run")
    parser.add_argument("--output", type=Path, help="the JSON file")
    given = parser.parse_args(arguments)
    if given.full and not torch.cuda.is_available():
        raise SystemExit("--full needs an accelerator; not run")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in SIZES:
            save_config(folder, name)
        if given.full:
            results = {"decoding": decoding(folder), "training": training(folder, rows=8)}
        else:
            results = small(folder, given.rounds)
    device = torch.cuda.get_device_name() if given.full else "CPU"
    results["ran_on"] = f"{device}, {platform.machine()}, torch {torch.__version__}"
    results["threads"] = torch.get_num_threads()
    name = "dllm-full.json" if given.full else "dllm.json"
    path = given.output or ROOT / "samples" / "bench" / name
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

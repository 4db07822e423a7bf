"""Speed and memory of the streaming student, as ratios within one run.

    python scripts/bench/video.py                     # a small Wan, here
    python scripts/bench/video.py --full 1.3b         # full size, on an accelerator
    python scripts/bench/video.py --full 1.3b --teacher 14b

Weights are random. Writes samples/bench/video.json (or video-NAME.json), with what it ran on.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from timing import paired, seconds
from torch import Tensor

from diffdistill.config import parse_config
from diffdistill.distributed import Distributed
from diffdistill.estimates import nbytes, saved_tensors
from diffdistill.pipelines.streaming import View, block_causal, cached_frames, next_block
from diffdistill.readouts import clean
from diffdistill.rewarding import Reward
from diffdistill.sampling import Encoded, inference
from diffdistill.session import Session, build, flow_family
from diffdistill.streams import Timing, stream, timed
from diffdistill.trainer import Trainer
from diffdistill.types import Batch, Progress, State

ROOT = Path(__file__).parents[2]
SIZES: dict[str, dict[str, Any]] = {
    "small": {"num_attention_heads": 4, "attention_head_dim": 48, "ffn_dim": 768,
              "num_layers": 4, "text_dim": 64},
    "1.3b": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960,
             "num_layers": 30, "text_dim": 4096},
    "14b": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824,
            "num_layers": 40, "text_dim": 4096},
}  # fmt: skip
SMALL_VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
BLOCK = 3
CLIP = 21
STREAM_LENGTHS = (3, 9, 27, 81)


@dataclass(kw_only=True)
class Contrast(Reward):
    """A reward that costs next to nothing, so that what remains is the method's own cost."""

    axes: ClassVar = ("visual", "motion", "text")

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return brightness, change and their product, each ``[B]``."""
        change = (pixels[:, 1:] - pixels[:, :-1]).square().mean(dim=(1, 2, 3, 4))
        bright = pixels.square().mean(dim=(1, 2, 3, 4))
        return {"visual": bright, "motion": change, "text": bright * change}


def make_checkpoint(folder: Path, name: str, dtype: torch.dtype) -> None:
    """Save a randomly initialized transformer, and what the family reads besides."""
    torch.manual_seed(0)
    network = WanTransformer3DModel(**SIZES[name])
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    network.to(dtype).save_pretrained(folder / "transformer", safe_serialization=True)
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    vae = AutoencoderKLWan(**(SMALL_VAE if name == "small" else {}))
    vae.save_pretrained(folder / "vae")


def session_of(
    folder: Path, name: str, method: dict[str, Any], teacher: Path | None = None
) -> Session:
    """Return a session of random weights."""
    roles: dict[str, Any] = {} if teacher is None else {"teacher": {"path": str(teacher)}}
    values = {
        "family": {
            "name": "wan-streaming",
            "path": str(folder),
            "block_frames": BLOCK,
            "window_frames": 9,
            "sink_frames": 3,
        },
        "method": method,
        "roles": roles,
        "data": {"path": "none"},
        "rewards": f"{__file__}:Contrast",
        "train": {
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
            "gradient_checkpointing": name != "small",
        },
    }
    return build(parse_config(values))


def batch_of(session: Session, name: str, frames: int = CLIP) -> Batch:
    """Return one random batch: 480 x 832 at full size, 8 x 8 latents in the small model."""
    height, width = (8, 8) if name == "small" else (60, 104)
    length, dim = (16, 64) if name == "small" else (512, 4096)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 1, length, dim, generator=generator).to(session.device)
    return {
        "ids": torch.arange(1, device=session.device),
        "prompts": ["-"],
        "text": text[0],
        "negative": text[1],
        "latents": torch.zeros(1, 16, frames, height, width, device=session.device),
    }


@torch.no_grad()
def streaming(session: Session, batch: Batch) -> dict[str, dict[str, float]]:
    """Return seconds per block after so many blocks: with the cache, and over the whole prefix."""
    family: Any = session.family
    network = session.roles["student"].network
    condition = family.condition(batch)
    block = batch["latents"][:, :, :BLOCK]
    cached, prefix = {}, {}
    cache = family.cache()

    def ask(x: Tensor, view: View) -> Tensor:
        state = State(x, torch.full((len(x),), 0.5, device=x.device))
        return family.predict(network, state, {**condition, "view": view})

    for count in range(1, max(STREAM_LENGTHS) + 1):
        view = next_block(cache, BLOCK, keep=True)
        ask(block, view)
        cache = cache.extended(cached_frames(view))
        if count not in STREAM_LENGTHS:
            continue
        again = next_block(cache, BLOCK)
        cached[str(count)] = statistics.median(seconds(lambda v=again: ask(block, v))
                                               for _ in range(7))  # fmt: skip
        whole = block.repeat(1, 1, count, 1, 1)
        view = block_causal(count * BLOCK, BLOCK, window=9, sink=3)
        prefix[str(count)] = statistics.median(seconds(lambda x=whole, v=view: ask(x, v))
                                               for _ in range(3))  # fmt: skip
    return {"seconds_per_block_cached": cached, "seconds_per_block_prefix": prefix}


def bare_calls(session: Session, batch: Batch, exit_step: int) -> Callable[[], None]:
    """Return a task of just the model calls of a Self-Forcing step that trains both roles."""
    family: Any = session.family
    roles, condition = session.roles, session.family.condition(batch)
    negative = family.condition(batch, negative=True)
    latents = batch["latents"]
    parts = latents.split(BLOCK, dim=2)

    def state_of(x: Tensor) -> State:
        return State(x, torch.full((len(x),), 0.5, device=x.device))

    def task() -> None:
        cache, views = family.cache(), []
        with torch.no_grad():
            for index, part in enumerate(parts):
                told = {**condition, "view": next_block(cache, BLOCK)}
                views.append(told)
                for _ in range(exit_step + 1):
                    roles["student"](state_of(part), told)
                if index + 1 < len(parts):
                    keep = next_block(cache, BLOCK, keep=True)
                    roles["student"](state_of(part), {**condition, "view": keep})
                    cache = cache.extended(cached_frames(keep))
            roles["critic"](state_of(latents), condition)
            roles["teacher"](state_of(latents), condition)
            roles["teacher"](state_of(latents), negative)
        for part, told in zip(parts, views, strict=True):
            clean(roles["student"], state_of(part), told).square().mean().backward()
        roles["critic"](state_of(latents), condition).square().mean().backward()
        for role in roles.trained():
            for parameter in role.parameters().values():
                parameter.grad = None

    return task


def trainer_of(session: Session, batch: Batch) -> Trainer:
    """Return a trainer that is fed the same batch again and again."""
    return Trainer(session, iter(repeat(batch)), Distributed())


def part_seconds(session: Session, batch: Batch, rounds: int) -> dict[str, float]:
    """Return the median seconds of each kind of call that a step is made of, on a whole clip.

    Of the student one block of its stream without a past, with and without the backward pass.
    """
    family: Any = session.family
    roles = session.roles
    condition, latents = family.condition(batch), batch["latents"]

    def state_of(x: Tensor) -> State:
        return State(x, torch.full((len(x),), 0.5, device=x.device))

    def block() -> Tensor:
        told = {**condition, "view": next_block(family.cache(), BLOCK)}
        return clean(roles["student"], state_of(latents[:, :, :BLOCK]), told)

    def critic() -> Tensor:
        return clean(roles["critic"], state_of(latents), condition)

    def teacher() -> Tensor:
        return clean(roles["teacher"], state_of(latents), condition)

    def learned(call: Callable[[], Tensor]) -> None:
        call().square().mean().backward()
        for role in roles.trained():
            for parameter in role.parameters().values():
                parameter.grad = None

    tasks: dict[str, Callable[[], object]] = {
        "student_block": torch.no_grad()(block),
        "student_block_with_backward": lambda: learned(block),
        "critic": torch.no_grad()(critic),
        "critic_with_backward": lambda: learned(critic),
        "teacher": torch.no_grad()(teacher),
    }
    found = {name: median_seconds(task, rounds) for name, task in tasks.items()}
    with family.using("vae"):
        found["decode"] = median_seconds(lambda: family.decode(latents), rounds)
    return found


def median_seconds(task: Callable[[], object], rounds: int) -> float:
    """Return the median time of a task after one run that is not timed."""
    task()
    return statistics.median(seconds(task) for _ in range(rounds))


def streamed(session: Session, batch: Batch) -> dict[str, float]:
    """Return how fast a stream of a clip's length is made and decoded, after a first one."""
    item = {key: batch[key][0] for key in ("text", "negative", "latents")}
    prompts, blocks = Encoded(["-"], [item]), batch["latents"].shape[2] // BLOCK
    for _ in range(2):
        timing = Timing()
        with inference(session), flow_family(session).using("vae"):
            made = stream(session, session.roles["student"], prompts, num_steps=4, seed=0)
            for _ in islice(timed(made, session.device, timing), blocks):
                pass
    return {"seconds_to_first_frame": timing.first, "frames_per_second": timing.fps}


def peak_bytes(trainer: Trainer, batch: Batch) -> dict[str, int]:
    """Return what the student's losses of a step hold at most, in bytes.

    Saved tensors of the graph, or everything allocated on CUDA; and the cached keys and values.
    """
    session = trainer.session
    if torch.cuda.is_available():
        trainer.train_step()
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step()
        return {"peak": torch.cuda.max_memory_allocated()}
    modules = session.roles.modules()
    addresses = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    losses = iter(session.method.losses(batch, Progress(0, trainer.settings.steps)))
    with saved_tensors(addresses) as saved:
        more = True
        while more:  # the critic's loss, which would follow, sees the whole clip in any case
            loss = next(losses)
            loss.value.backward()
            more = loss.more
            del loss
    weights = nbytes(p for m in modules for p in m.parameters())
    trained = sum(nbytes(iter(r.parameters().values())) for r in session.roles.trained())
    tokens = batch["latents"].shape[2] * batch["latents"].shape[-1] ** 2 // 4
    config = session.roles["student"].network.config  # type: ignore[union-attr]
    width = config.num_attention_heads * config.attention_head_dim
    cache = 2 * 4 * width * tokens * config.num_layers
    return {"graph": saved.peak, "cache": cache, "weights_and_optimizers": weights + 3 * trained}


def memory(folder: Path, name: str) -> dict[str, Any]:
    """Return peaks for clips of 3 to 21 latent frames, with both kinds of backward pass."""
    found: dict[str, Any] = {}
    for backward in ("block", "whole"):
        method = {"name": "self-forcing", "backward": backward, "exit": "last", "num_steps": 1}
        session = session_of(folder, name, {**method, "student_every": 1})
        found[backward] = {
            str(frames): peak_bytes(trainer_of(session, batch), batch)
            for frames in (3, 9, 21)
            for batch in [batch_of(session, name, frames)]
        }
    for backward, peaks in found.copy().items():
        totals = {frames: sum(parts.values()) for frames, parts in peaks.items()}
        found[f"{backward}_ratio_21_over_3"] = totals["21"] / totals["3"]
        if "graph" in peaks["3"]:
            found[f"{backward}_graph_ratio_21_over_3"] = peaks["21"]["graph"] / peaks["3"]["graph"]
    return found


def steps(folder: Path, name: str, teacher: Path | None, rounds: int) -> dict[str, Any]:
    """Return the cost of training steps over their bare calls, its parts, and the reward's.

    The two methods are measured in turn, so that one session is in memory at a time.
    """
    options = {"exit": "last", "num_steps": 4, "student_every": 1}
    session = session_of(folder, name, {"name": "self-forcing", **options}, teacher)
    batch = batch_of(session, name)
    trainer = trainer_of(session, batch)
    step, bare, ratio = paired(trainer.train_step, bare_calls(session, batch, 3), rounds)
    results: dict[str, Any] = {
        "self_forcing_seconds_per_step": step,
        "bare_calls_seconds": bare,
        "overhead_ratio": ratio,
        "seconds_by_part": part_seconds(session, batch, rounds),
        "stream": streamed(session, batch),
        **streaming(session, batch),
        "peak_bytes": peak_bytes(trainer, batch),
    }
    plain = median_seconds(trainer.train_step, rounds)
    del session, trainer
    gc.collect()  # a trainer and its session are a cycle
    rewarded = session_of(folder, name, {"name": "stream-r1", **options}, teacher)
    with_reward = median_seconds(trainer_of(rewarded, batch).train_step, rounds)
    results["stream_r1_seconds_per_step"] = with_reward
    results["stream_r1_over_self_forcing"] = with_reward / plain
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", choices=("1.3b",), help="student and critic at full size")
    parser.add_argument("--teacher", choices=("1.3b", "14b"), default="1.3b")
    arguments = parser.parse_args()
    name = arguments.full or "small"
    if name != "small" and not torch.cuda.is_available():
        raise SystemExit("--full needs an accelerator; not run")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with tempfile.TemporaryDirectory() as temporary:
        folder, teacher = Path(temporary) / "student", None
        make_checkpoint(folder, name, dtype)
        if name != "small" and arguments.teacher == "14b":
            teacher = Path(temporary) / "teacher" / "transformer"
            make_checkpoint(teacher.parent, "14b", dtype)
        results = steps(folder, name, teacher, rounds=9 if name == "small" else 3)
        if name == "small":
            results["memory"] = memory(folder, name)
            results["full"] = "not run"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results["ran_on"] = f"{device}, {platform.machine()}, torch {torch.__version__}"
    results["threads"] = torch.get_num_threads()
    suffix = "" if name == "small" else f"-{name}-teacher-{arguments.teacher}"
    path = ROOT / "samples" / "bench" / f"video{suffix}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""Speed and memory of the image methods, as ratios within one run.

    python scripts/bench/image.py                 # a 41 M parameter klein, here
    python scripts/bench/image.py --full klein-4b # random weights at full size, on an accelerator
    python scripts/bench/image.py --full z-image

Writes samples/bench/image.json (or image-NAME.json), with what it ran on.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    ZImageTransformer2DModel,
)

from diffdistill.adapters import active
from diffdistill.config import parse_config
from diffdistill.distributed import Distributed
from diffdistill.estimates import nbytes, saved_tensors
from diffdistill.roles import Role, layers_of
from diffdistill.session import Session, build
from diffdistill.trainer import Trainer
from diffdistill.types import Batch, State

ROOT = Path(__file__).parents[2]
SMALL = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "joint_attention_dim": 256,
    "axes_dims_rope": (16, 16, 16, 16),
}
FULL = {
    "klein-4b": ("flux2-klein", Flux2Transformer2DModel),
    "z-image": ("z-image", ZImageTransformer2DModel),
}
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}


def make_checkpoint(folder: Path, name: str, dtype: torch.dtype) -> None:
    """Save a randomly initialized transformer, and what a family reads besides."""
    torch.manual_seed(0)
    if name == "z-image":
        network: Any = ZImageTransformer2DModel()
    else:
        sizes = SMALL if name == "small" else KLEIN_4B
        network = Flux2Transformer2DModel(patch_size=1, guidance_embeds=False, **sizes)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    network.to(dtype).save_pretrained(folder / "transformer", safe_serialization=True)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")


def config_of(folder: Path, name: str, method: dict[str, Any], roles: dict[str, Any]) -> Session:
    """Return a session of random weights."""
    on_gpu = torch.cuda.is_available()
    family = "z-image" if name == "z-image" else "flux2-klein"
    view = "vlm" if name == "z-image" else "reference"
    values = {
        "family": {"name": family, "path": str(folder), "view": view},
        "method": method,
        "roles": roles,
        "data": {"path": "none"},
        "train": {
            "precision": "bf16" if on_gpu else "fp32",
            "gradient_checkpointing": name != "small",
        },
    }
    return build(parse_config(values))


def batch_of(session: Session, name: str) -> Batch:
    """Return one random batch: 1024 px at full size, 16 x 16 tokens in the small model."""
    device = session.device
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    batch: dict[str, Any] = {"ids": torch.arange(1, device=device), "prompts": ["-"]}
    if name == "z-image":
        encoded = {
            "text": normal(64, 2560),
            "negative": normal(8, 2560),
            "privileged_text": normal(640, 2560),
            "latents": normal(16, 128, 128).cpu(),
        }
        return session.family.collate([{k: v.cpu() for k, v in encoded.items()}]) | batch
    side, channels, width = (16, 64, 256) if name == "small" else (64, 128, 7680)
    length = 64 if name == "small" else 512
    batch |= {
        "text": normal(1, length, width),
        "negative": normal(1, length, width),
        "privileged_text": normal(1, length, width),
        "latents": normal(1, channels, side, side),
    }
    return batch


LORA = {"student": {"adapter": "lora", "rank": 64}}


def trainer_of(session: Session, batch: Batch) -> Trainer:
    return Trainer(session, _endless(batch), Distributed())


def _endless(batch: Batch) -> Iterator[Batch]:
    yield from repeat(batch)


def seconds(task: Callable[[], object], rounds: int) -> float:
    """Return the median time of ``task``, after one warm-up."""
    task()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        task()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bare_calls(session: Session, batch: Batch, num_steps: int) -> Callable[[], None]:
    """Return a task of just the model calls that a D-OPSD step must make, in its order."""
    family, student, teacher = session.family, session.roles["student"], session.roles["teacher"]
    prompt, shown = family.condition(batch), family.condition(batch, exposure=1.0)
    x = torch.randn(batch["latents"].shape, device=session.device)
    levels = family.grid(num_steps, x.shape[1:]).tolist()[:-1]
    states = [State(x, torch.full((len(x),), level, device=x.device)) for level in levels]
    layers = layers_of(student.network)
    dtype = student.autocast

    def call(role: Role, state: State, condition: Any) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            return family.predict(student.network, state, condition)

    def task() -> None:
        for state in states:
            with active(layers, "student"):
                velocity = call(student, state, prompt)
            with active(layers, "teacher"), torch.no_grad():
                call(teacher, state, shown)
            velocity.float().sum().backward()
        for parameter in student.parameters().values():
            parameter.grad = None

    return task


def peak_bytes(trainer: Trainer) -> int:
    """Return the peak of one step: allocated on CUDA; else weights, optimizer and saved tensors."""
    trainer.train_step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step()
        return torch.cuda.max_memory_allocated()
    modules = trainer.session.roles.modules()
    addresses = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    with saved_tensors(addresses) as saved:
        trainer.train_step()
    weights = nbytes(p for m in modules for p in m.parameters())
    trained = sum(nbytes(iter(r.parameters().values())) for r in trainer.session.roles.trained())
    return saved.peak + weights + 3 * trained  # gradients and two moments


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Return all figures of one model."""
    results: dict[str, Any] = {}
    d_opsd = {"name": "d-opsd", "num_steps": 4}
    session = config_of(folder, name, d_opsd, LORA)
    batch = batch_of(session, name)
    trainer = trainer_of(session, batch)
    rounds = 15 if name == "small" else 5
    bare = bare_calls(session, batch, 4)
    for task in (bare, trainer.train_step):
        task()
    pairs = [(seconds(trainer.train_step, 1), seconds(bare, 1)) for _ in range(rounds)]
    step, calls = (statistics.median(column) for column in zip(*pairs, strict=True))
    results["d_opsd_seconds_per_step"] = step
    results["bare_calls_seconds"] = calls
    results["overhead_ratio"] = statistics.median(a / b for a, b in pairs)
    if name != "small":
        results |= matrix_rate(session)
    del trainer, session
    results["peak_bytes_by_rollout_steps"] = {
        str(k): peak_of(folder, name, {"name": "d-opsd", "num_steps": k}, LORA) for k in (1, 8)
    }
    peaks = results["peak_bytes_by_rollout_steps"]
    results["rollout_memory_ratio"] = peaks["8"] / peaks["1"]
    if name == "small":
        results |= dmd_memory(folder, name)
    return results


def peak_of(folder: Path, name: str, method: dict[str, Any], roles: dict[str, Any]) -> int:
    session = config_of(folder, name, method, roles)
    return peak_bytes(trainer_of(session, batch_of(session, name)))


def dmd_memory(folder: Path, name: str) -> dict[str, Any]:
    """Compare DMD with adapters of one base to SFT of a LoRA, and to three full models."""
    dmd = {"name": "dmd", "num_steps": 4, "student_every": 1}
    lora = {"adapter": "lora", "rank": 64}
    peaks = {
        "sft_lora": peak_of(folder, name, {"name": "sft"}, LORA),
        "dmd_adapters": peak_of(folder, name, dmd, {"student": lora, "critic": lora}),
        "dmd_full": peak_of(folder, name, dmd, {}),
    }
    return {
        "dmd_peak_bytes": peaks,
        "dmd_adapters_over_sft_lora": peaks["dmd_adapters"] / peaks["sft_lora"],
        "dmd_adapters_over_three_models": peaks["dmd_adapters"] / peaks["dmd_full"],
    }


def matrix_rate(session: Session) -> dict[str, float]:
    """Return the measured bf16 matrix rate of the device, in TFLOP/s."""
    a = torch.randn(8192, 8192, device=session.device, dtype=torch.bfloat16)
    took = seconds(lambda: a @ a, 20)
    return {"matrix_tflops": 2 * 8192**3 / took / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", choices=sorted(FULL), help="a full-size model, random weights")
    name = parser.parse_args().full or "small"
    if name != "small" and not torch.cuda.is_available():
        raise SystemExit("--full needs an accelerator; not run")
    with tempfile.TemporaryDirectory() as folder:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        make_checkpoint(Path(folder), name, dtype)
        results = measure(Path(folder), name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results["ran_on"] = f"{device}, {platform.machine()}, torch {torch.__version__}"
    results["threads"] = torch.get_num_threads()
    path = ROOT / "samples" / "bench" / ("image.json" if name == "small" else f"image-{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

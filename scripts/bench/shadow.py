"""Step time and memory of a shadow against a LoRA of as many parameters, as ratios within one run.

    python scripts/bench/shadow.py           # a small base on the CPU
    python scripts/bench/shadow.py --full    # Qwen3-0.6B's shape in bfloat16, on a GPU
    python scripts/bench/shadow.py --quick   # few tokens and rounds, to see that it runs

A step is a forward and a backward pass of the cross-entropy of all tokens. A shadow is timed with
and without what it learns to stand alone (lambda); memory is what autograd keeps for the backward
pass, and on a GPU also the peak. Weights are random. Writes samples/bench/shadow.json
(shadow-full.json or shadow-quick.json), with what it ran on.
"""

import argparse
import gc
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_text import SIZES
from timing import paired
from torch import Tensor
from transformers import Qwen3ForCausalLM

from diffdistill.estimates import nbytes, saved_tensors
from diffdistill.extra_gradients import ExtraGradients
from diffdistill.pipelines.block_diffusion import project
from diffdistill.projection import Prediction, cross_entropy
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Role
from diffdistill.shadow import ShadowSettings
from diffdistill.types import Condition, State

ROOT = Path(__file__).parents[2]
BUDGETS: dict[str, tuple[dict[str, int], int]] = {
    "small": ({"num_heads": 4, "intermediate_size": 64, "rank": 8, "update_size": 8}, 9),
    "student": ({"num_heads": 8, "intermediate_size": 128, "rank": 16, "update_size": 8}, 10),
}
"""Sizes of the shadow, and the rank of a LoRA with about as many parameters, of each base."""


@dataclass
class RandomBase:
    """A family of one random network.

    Attributes:
        size: Its name in ``random_text.SIZES``.
        device: Where it is.
        dtype: Of its weights.
    """

    size: str
    device: str
    dtype: torch.dtype
    adapter_targets = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip

    def network(self, path: str | None = None) -> Any:
        """Return the network."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return Qwen3ForCausalLM(SIZES[self.size]).to(self.dtype)

    def predict(self, network: Any, state: State, condition: Condition) -> Prediction:
        """Return logits about the tokens, which follow the first one of their row."""
        tokens = torch.cat([condition["first"], state.x], 1)[:, :-1]
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return project(network, tokens, torch.ones_like(tokens).bool(), places)

    def features(self, network: Any, state: State, condition: Condition) -> Tensor:
        """Return nothing: no role here has a head."""
        raise AssertionError("no role here has a head")


def student(base: RandomBase, kind: str) -> Role:
    """Return a student with an adapter."""
    sizes, rank = BUDGETS[base.size]
    if kind == "LoRA":
        settings = RoleSettings(adapter="lora", rank=rank, alpha=2.0 * rank)
    else:
        weight = 0.0 if kind == "shadow, lambda 0" else 0.05
        shadow = ShadowSettings(dropout=0.0, auxiliary_weight=weight, **sizes)
        settings = RoleSettings(adapter="shadow", shadow=shadow)
    role = build_roles({"student": settings}, base)["student"]  # type: ignore[arg-type]
    if base.dtype is not torch.float32:
        role.autocast = base.dtype
    return role


def step(role: Role, tokens: Tensor) -> None:
    """Take the gradients of one step, and forget them."""
    first, rest = tokens[:, :1], tokens[:, 1:]
    state = State(rest, torch.zeros(len(rest), device=rest.device))
    loss = cross_entropy(role(state, {"first": first}), rest).mean()
    extras = ExtraGradients()
    if (extra := role.extra()) is not None:
        extras.add(role, extra)
    loss.backward()
    extras.join(role, 1.0)
    for parameter in role.parameters().values():
        parameter.grad = None


def kept(role: Role, tokens: Tensor) -> int:
    """Return the bytes that autograd keeps for the backward pass of a step."""
    weights = {p.untyped_storage().data_ptr() for p in role.network.parameters()}
    with saved_tensors(weights) as saved:
        step(role, tokens)
    return saved.peak


def peak(role: Role, tokens: Tensor) -> int | None:
    """Return the peak of a step on a GPU: this student's weights, and what the step adds."""
    if tokens.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - nbytes(role.network.parameters())
    step(role, tokens)
    return torch.cuda.max_memory_allocated() - others


def measure(base: RandomBase, rows: int, length: int, rounds: int) -> dict[str, Any]:
    """Return sizes, times, memory and ratios."""
    words = SIZES[base.size].vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, words, (rows, length), generator=generator).to(base.device)
    lora = student(base, "LoRA")
    found: dict[str, Any] = {"LoRA": told(lora, tokens)}
    for kind in ("shadow", "shadow, lambda 0"):
        role = student(base, kind)
        ours, theirs, ratio = paired(
            lambda role=role: step(role, tokens), lambda: step(lora, tokens), rounds
        )
        found[kind] = told(role, tokens) | {
            "seconds": ours, "seconds of LoRA": theirs, "time over LoRA": ratio,
        }  # fmt: skip
        for name in ("kept for backward", "peak"):
            if found["LoRA"][name] is not None:
                found[kind][f"{name} over LoRA"] = found[kind][name] / found["LoRA"][name]
    return found


def told(role: Role, tokens: Tensor) -> dict[str, Any]:
    """Return what a student is, and its memory in bytes."""
    return {
        "parameters": sum(p.numel() for p in role.parameters().values()),
        "weights": nbytes(role.network.parameters()),
        "kept for backward": kept(role, tokens),
        "peak": peak(role, tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="Qwen3-0.6B's shape, on a GPU")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    given = parser.parse_args()
    if given.full:
        base, sizes = RandomBase("student", "cuda", torch.bfloat16), (8, 1024, 20)
    else:
        base = RandomBase("small", "cpu", torch.float32)
        sizes = (2, 32, 2) if given.quick else (4, 256, 15)
    device = torch.cuda.get_device_name() if given.full else platform.machine()
    rows, length, rounds = sizes
    results = {
        "machine": {
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "case": {"base": base.size, "rows": rows, "length": length, "rounds": rounds},
        **measure(base, rows, length, rounds),
    }
    suffix = "-full" if given.full else "-quick" if given.quick else ""
    file = ROOT / "samples" / "bench" / f"shadow{suffix}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(file.read_text())


if __name__ == "__main__":
    main()

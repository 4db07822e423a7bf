"""The kernels run in triton's interpreter, and are compiled for a GPU that is not there.

The interpreter is chosen when triton is imported, so it runs in a process of its own, which imports
this file and little else.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.projection import Projection, side_of, token_maps
from diffdistill.recompute import streamed
from diffdistill.tokenwise import Maps, TokenMap

ROOT = Path(__file__).parents[1]
ROWS, WIDTH, WORDS = 5, 3, 40
ALL: tuple[TokenMap, ...] = (
    "logprob",
    "teacher-logprob",
    "raw-teacher-logprob",
    "entropy",
    "teacher-entropy",
    "forward-kl",
    "reverse-kl",
)
OWN: tuple[TokenMap, ...] = ("logprob", "entropy")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sides() -> tuple[Projection, Projection]:
    """Return a student with a soft cap, and a teacher in half precision with impossible tokens."""
    hidden, weight = randn(ROWS, WIDTH, seed=0), 2.0 * randn(WORDS, WIDTH, seed=1)
    student = Projection(hidden.requires_grad_(), weight.requires_grad_(), softcap=5.0)
    bias = torch.zeros(WORDS)
    bias[[3, 5]] = -torch.inf
    teacher = Projection(
        randn(ROWS, WIDTH, seed=2).bfloat16(), randn(WORDS, WIDTH, seed=3).bfloat16()
    )
    return student, teacher._replace(bias=bias)


def check(wanted: tuple[TokenMap, ...], temperature: float, shared: int | None) -> None:
    """Compare the kernels' maps and gradients with torch's."""
    from diffdistill import triton_maps

    triton_maps.BLOCK = 16
    student, teacher = sides()
    tokens = torch.tensor([0, 3, 39, 15, 16])
    others = [] if wanted == OWN else [side_of(teacher, None, shared=shared).constant()]
    leaves = [student.hidden, student.weight]

    def maps(kind: type[Maps]) -> tuple[list[Tensor], list[Tensor]]:
        function = kind(wanted, temperature)
        side = side_of(student, None, shared=shared)
        values = streamed(function, side, others, {"tokens": tokens}, tile_rows=4)
        trained = [x for x in values if x.requires_grad]
        upstream = [randn(ROWS, seed=9 + i) for i in range(len(trained))]
        return [*values], [*torch.autograd.grad(trained, leaves, upstream)]

    found, expected = maps(triton_maps.TritonMaps), maps(Maps)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_kernels_give_the_maps_and_gradients_of_torch() -> None:
    pytest.importorskip("triton")
    code = "from tests.test_triton_maps import *; check(ALL, 1.7, 36); check(OWN, 1.0, None)"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("name", ["values_kernel", "slope_kernel"])
def test_the_kernels_compile_for_a_gpu(name: str, with_teacher: bool) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffdistill import triton_maps

    kernel: Any = getattr(triton_maps, name)
    fixed = {"with_teacher": with_teacher, "least": -1e30, "block": triton_maps.BLOCK}
    kinds = {"tokens": "*i64", "words": "i32", "inverse": "fp32"}
    signature = {x: "constexpr" if x in fixed else kinds.get(x, "*fp32") for x in kernel.arg_names}
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(x),): v for x, v in fixed.items()}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "ptx" in compiled.asm


def test_without_a_gpu_the_maps_are_torch_s() -> None:
    student, teacher = sides()
    found = token_maps(student, teacher, ("reverse-kl",))
    plain = token_maps(student, teacher, ("reverse-kl",), triton=False)
    assert torch.equal(found["reverse-kl"], plain["reverse-kl"])

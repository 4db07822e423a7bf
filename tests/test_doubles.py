"""What is computed in float64, on a device that has none."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffdistill.choices import sampled_tokens
from diffdistill.doubles import doubled
from diffdistill.pipelines.causal_sampling import Choosing
from diffdistill.rollouts import Sampling
from diffdistill.selection import bounds, select_tokens
from tests.conftest import generator, randn

MPS = torch.device("mps")


class OnMps(TorchFunctionMode):
    """Says of tensors that they are on MPS, and refuses float64 to those not moved from there."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cpu") if args[0].dtype == torch.float64 else MPS
        if func is torch.Tensor.to and MPS in args:
            return args[0]
        wants = func is torch.Tensor.double or (func is torch.Tensor.to and torch.float64 in args)
        if wants and not any(args[0] is tensor for tensor in self.moved):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            found = found.clone()
            self.moved.append(found)
        return found


def mask_of() -> Tensor:
    return torch.arange(7) < torch.tensor([[7], [4], [1]])


def numbers() -> Tensor:
    return torch.rand(3, 7, generator=generator(1))


def chosen(sampling: Sampling) -> list[Tensor]:
    choosing = Choosing(sampling, numbers(), start=2, words=9)
    found = choosing(torch.zeros(3, 4, dtype=torch.int64), randn(3, 9, seed=2))
    return [found, *choosing.logprobs]


COMPUTED: dict[str, Callable[[], Iterable[Tensor]]] = {
    "the highest scores": lambda: [select_tokens(randn(3, 7, seed=3), mask_of(), 0.5)],
    "drawn tokens": lambda: [
        select_tokens(randn(3, 7, seed=3).abs(), mask_of(), 0.5, numbers=numbers())
    ],
    "bounds": lambda: bounds(randn(3, 7, seed=4), mask_of(), "rollout", clip_quantile=0.9),
    "an answer": lambda: chosen(Sampling(4, temperature=1.3, top_p=0.8, top_k=5)),
    "sampled tokens": lambda: [sampled_tokens(randn(7, 9, seed=5), numbers()[0])],
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_needs_float64_is_the_same_on_a_device_without_it(name: str) -> None:
    expected = list(COMPUTED[name]())
    with OnMps():
        found = list(COMPUTED[name]())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_values_are_doubled_where_they_are_unless_that_is_mps() -> None:
    values = randn(3, seed=0)
    assert doubled(values).dtype == torch.float64
    assert torch.equal(doubled(values), values.double())
    with OnMps(), pytest.raises(TypeError, match="float64"):
        values.double()

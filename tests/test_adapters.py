import pytest
import torch
from torch import Tensor, nn

from diffdistill.adapters import active, adapter_parameters, add_lora, tuner_layers
from diffdistill.errors import UserError
from tests.conftest import generator, randn


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.to_q(x))


class Network(nn.Module):
    """Two blocks; ``proj`` is a linear layer in one place and a container in another."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Attention(width) for _ in range(2)])
        self.head = nn.ModuleDict({"proj": nn.Linear(width, width)})
        self.proj = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.proj(self.head["proj"](x))


def adapted(network: nn.Module, *names: str, targets: tuple[str, ...] = ("to_q",)) -> nn.Module:
    for name in names:
        add_lora(network, name, rank=2, alpha=6.0, targets=targets)
    return network


def fill(network: nn.Module, name: str, seed: int) -> None:
    rng = generator(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(network, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))


def outputs(network: nn.Module, name: str | None, x: Tensor) -> Tensor:
    with active(tuner_layers(network), name):
        return network(x)


def test_a_fresh_adapter_changes_nothing() -> None:
    network, x = Network(), randn(3, 4, seed=1)
    expected = network(x)
    adapted(network, "student", targets=("to_q", "to_out.0", "head.proj"))
    assert torch.equal(outputs(network, "student", x), expected)


def test_an_adapter_adds_alpha_over_rank_times_b_a() -> None:
    network = nn.Sequential(nn.Linear(4, 3)).double()
    add_lora(network, "student", rank=2, alpha=6.0, targets=["0"])
    network.double()
    fill(network, "student", 2)
    weights = adapter_parameters(network, "student")
    x = randn(5, 4, seed=3, dtype=torch.float64)
    base = outputs(network, None, x)
    update = 3.0 * weights["0.lora_B.weight"] @ weights["0.lora_A.weight"]
    torch.testing.assert_close(outputs(network, "student", x), base + x @ update.T)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("to_q",), {"blocks.0.to_q", "blocks.1.to_q"}),
        (("to_out.0",), {"blocks.0.to_out.0", "blocks.1.to_out.0"}),
        (("1.to_q", "head.proj"), {"blocks.1.to_q", "head.proj"}),
        (("proj",), {"head.proj"}),  # and not the container of this name
    ],
)
def test_targets_are_suffixes_of_whole_names(targets: tuple[str, ...], names: set[str]) -> None:
    network = Network()
    count = add_lora(network, "student", rank=2, alpha=2.0, targets=targets)
    reached = {key.split(".lora_")[0] for key in adapter_parameters(network, "student")}
    assert reached == names
    assert count == len(names)


@pytest.mark.parametrize("target", ["q", "to_k", "to_out"])
def test_a_target_that_matches_no_linear_layer_is_an_error(target: str) -> None:
    with pytest.raises(UserError, match=f"LoRA target '{target}' matches no layer.*to_q"):
        add_lora(Network(), "student", rank=2, alpha=2.0, targets=["to_q", target])


def test_a_second_adapter_reaches_the_same_layers_and_not_those_of_the_first() -> None:
    network = adapted(Network(), "student")
    assert add_lora(network, "teacher", rank=3, alpha=3.0, targets=["to_q"]) == 2
    student, teacher = (adapter_parameters(network, n) for n in ("student", "teacher"))
    assert list(student) == list(teacher)
    assert not {id(p) for p in student.values()} & {id(p) for p in teacher.values()}
    assert teacher["blocks.0.to_q.lora_A.weight"].shape == (3, 4)
    assert student["blocks.0.to_q.lora_A.weight"].shape == (2, 4)


def test_an_adapter_may_be_named_as_a_part_of_the_network() -> None:
    network = adapted(Network(), "blocks", "student")
    parts = [adapter_parameters(network, name) for name in ("blocks", "student")]
    assert parts[0].keys() == parts[1].keys()
    assert {key.rpartition(".lora_")[0] for key in parts[0]} == {"blocks.0.to_q", "blocks.1.to_q"}
    ids = [{id(parameter) for parameter in part.values()} for part in parts]
    assert not ids[0] & ids[1]


def test_a_second_adapter_can_not_target_the_weights_of_the_first() -> None:
    network = adapted(Network(), "student")
    with pytest.raises(UserError, match="matches no layer"):
        add_lora(network, "teacher", rank=2, alpha=2.0, targets=["student"])


def test_the_base_is_frozen_and_adapters_are_float32_on_a_half_precision_base() -> None:
    network = adapted(Network().bfloat16(), "student")
    own = adapter_parameters(network, "student")
    assert {p.dtype for p in own.values()} == {torch.float32}
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert trained == {id(p) for p in own.values()}


def test_the_seed_decides_the_initialization_and_the_global_generator_is_left_alone() -> None:
    def first_weight(seed: int) -> Tensor:
        network = Network()
        add_lora(network, "student", rank=2, alpha=2.0, targets=["to_q"], seed=seed)
        return adapter_parameters(network, "student")["blocks.0.to_q.lora_A.weight"]

    torch.manual_seed(5)
    expected = torch.rand(2)
    network = Network()
    torch.manual_seed(5)
    adapted(network, "student")
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_each_adapter_acts_only_where_it_is_active() -> None:
    network, x = Network(), randn(3, 4, seed=6)
    base = network(x)
    adapted(network, "student", "teacher")
    fill(network, "student", 7)
    student = outputs(network, "student", x)
    assert not torch.allclose(student, base)
    assert torch.equal(outputs(network, "teacher", x), base)
    assert torch.equal(outputs(network, None, x), base)
    assert torch.equal(outputs(network, "student", x), student)


def test_active_puts_back_what_was_active_before_even_after_an_error() -> None:
    network, x = adapted(Network(), "student", "teacher"), randn(3, 4, seed=8)
    fill(network, "student", 9)
    fill(network, "teacher", 10)
    layers = tuner_layers(network)
    expected = {name: outputs(network, name, x) for name in ("student", "teacher")}
    with active(layers, "student"):
        with pytest.raises(RuntimeError, match="shapes"), active(layers, "teacher"):
            network(randn(3, 5, seed=1))
        assert torch.equal(network(x), expected["student"])
        with active(layers, None):
            pass
        assert torch.equal(network(x), expected["student"])


def test_switching_adapters_takes_no_gradient_away() -> None:
    network, x = adapted(Network(), "student", "teacher"), randn(3, 4, seed=11)
    fill(network, "student", 12)
    student, teacher = (adapter_parameters(network, n) for n in ("student", "teacher"))
    for parameter in student.values():
        parameter.requires_grad_()
    for parameter in teacher.values():
        parameter.requires_grad_(False)
    before = {n: p.requires_grad for n, p in network.named_parameters()}
    loss = outputs(network, "student", x).square().mean()
    outputs(network, "teacher", x)
    outputs(network, None, x)
    loss.backward()
    assert {n: p.requires_grad for n, p in network.named_parameters()} == before
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.values())
    assert all(p.grad is None for p in teacher.values())


def test_dropout_drops_the_input_of_the_adapter_and_not_of_the_base() -> None:
    network, x = Network(), randn(64, 4, seed=13)
    base = network(x)
    add_lora(network, "student", rank=2, alpha=2.0, targets=["to_q"], dropout=0.9)
    torch.manual_seed(14)
    assert torch.equal(outputs(network.train(), "student", x), base)
    fill(network, "student", 15)
    one, other = (outputs(network, "student", x) for _ in range(2))
    assert not torch.allclose(one, other)
    network.eval()
    assert torch.equal(outputs(network, "student", x), outputs(network, "student", x))

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.pipelines.toy import Toy
from diffdistill.roles import Role, Roles, enable_checkpointing
from diffdistill.types import Condition, State
from tests.conftest import disturb, gradients, make_roles, make_toy, randn

LORA: dict[str, Any] = {"adapter": "lora", "rank": 2, "alpha": 4.0}
FULL: dict[str, Any] = {"adapter": "none"}
FROZEN: dict[str, Any] = {"weights": "frozen"}
STATE = State(randn(2, 3, 4, 4, seed=0), torch.tensor([0.5, 1.0]))
CONDITION = {"prompt": torch.tensor([0.3, -0.2]), "privilege": torch.tensor([0.5, 0.7])}


def ema(decay: float = 0.9, of: str = "student") -> dict[str, Any]:
    return {"weights": "ema", "of": of, "decay": decay}


def same_network(roles: Roles, one: str, other: str) -> bool:
    return roles[one].network is roles[other].network


def predict(role: Role) -> Tensor:
    with torch.no_grad():
        return role(STATE, CONDITION)


# which roles share networks


def test_adapters_their_averages_and_frozen_roles_share_one_base() -> None:
    roles = make_roles(
        make_toy(), student=LORA, teacher=ema(), critic=LORA, reference=FROZEN,
        twin={"weights": "live"},
    )  # fmt: skip
    assert len(roles.networks()) == 1
    assert roles["reference"].adapter is None
    assert roles["twin"].adapter == "student"
    assert {roles[n].adapter for n in ("student", "teacher", "critic")} == {
        "student", "teacher", "critic",
    }  # fmt: skip


@pytest.mark.parametrize("student_first", [True, False])
def test_a_fully_trained_role_has_a_network_of_its_own_beside_a_frozen_one(
    student_first: bool,
) -> None:
    given = {"student": FULL, "teacher": FROZEN, "critic": FULL}
    if not student_first:
        given = dict(reversed(given.items()))
    roles = make_roles(make_toy(), **given)
    assert len(roles.networks()) == 3
    before = predict(roles["teacher"])
    disturb(roles["student"], seed=1)
    assert torch.equal(predict(roles["teacher"]), before)
    assert torch.equal(predict(roles["critic"]), before)
    assert not torch.allclose(predict(roles["student"]), before)


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_fully_trained_role_beside_an_adapter_has_no_part_of_the_adapter(
    lora_first: bool,
) -> None:
    given = {"student": LORA, "critic": FULL}
    if not lora_first:
        given = dict(reversed(given.items()))
    roles = make_roles(make_toy(), **given)
    assert not same_network(roles, "student", "critic")
    assert set(roles["critic"].parameters()) == {"mix.weight", "factors"}
    assert set(roles["student"].parameters()) == {"mix.lora_A.weight", "mix.lora_B.weight"}
    before = predict(roles["critic"])
    disturb(roles["student"], seed=2)
    assert torch.equal(predict(roles["critic"]), before)


def test_a_lone_fully_trained_role_loads_its_checkpoint_once_and_copies_nothing() -> None:
    family = CountingToy(path="", device=torch.device("cpu"))
    roles = make_roles(family, student=FULL)
    assert family.loaded == [None]
    assert roles["student"].network is family.made[0]


def test_a_path_is_another_checkpoint_and_is_loaded_once() -> None:
    family = CountingToy(path="", device=torch.device("cpu"))
    roles = make_roles(
        family, student=LORA, teacher={"weights": "frozen", "path": "big"},
        judge={"weights": "frozen", "path": "big"}, reference=FROZEN,
    )  # fmt: skip
    assert sorted(family.loaded, key=str) == [None, "big"]
    assert same_network(roles, "teacher", "judge")
    assert same_network(roles, "student", "reference")
    assert not same_network(roles, "student", "teacher")


class CountingToy(Toy):
    """Remembers which checkpoints were loaded."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.loaded: list[str | None] = []
        self.made: list[nn.Module] = []

    def network(self, path: str | None = None) -> nn.Module:
        self.loaded.append(path)
        self.made.append(super().network(path))
        return self.made[-1]


# who is trained


@pytest.mark.parametrize("kind", [LORA, FULL])
@pytest.mark.parametrize("teacher", [ema(), FROZEN, {"weights": "live"}])
def test_a_loss_of_the_student_reaches_the_student_and_nothing_else(
    kind: dict[str, Any], teacher: dict[str, Any]
) -> None:
    roles = make_roles(make_toy(), student=kind, teacher=teacher, critic=kind)
    disturb(roles["student"], seed=3)
    with torch.no_grad():
        target = roles["teacher"](STATE, CONDITION) + 1.0
    value = (roles["student"](STATE, CONDITION) - target).square().mean()
    roles["critic"](STATE, CONDITION)  # another adapter acts before the backward pass
    value.backward()
    own = {id(p) for p in roles["student"].parameters().values()}
    reached = {id(p) for n in roles.networks() for p in n.parameters() if p.grad is not None}
    assert reached == own
    assert gradients(roles["critic"]) == {}
    assert [role.name for role in roles.trained()] == ["student", "critic"]


def test_only_trained_roles_require_gradients() -> None:
    roles = make_roles(make_toy(), student=LORA, teacher=ema(), critic=FULL, reference=FROZEN)
    trained = {id(p) for r in ("student", "critic") for p in roles[r].parameters().values()}
    required = {id(p) for n in roles.networks() for p in n.parameters() if p.requires_grad}
    assert required == trained
    assert roles["reference"].parameters() == {}


def test_a_live_role_is_the_student_and_has_no_parameters_of_its_own() -> None:
    for kind in (LORA, FULL):
        roles = make_roles(make_toy(), student=kind, teacher={"weights": "live"})
        disturb(roles["student"], seed=4)
        assert torch.equal(predict(roles["teacher"]), predict(roles["student"]))
        assert roles["teacher"].parameters() == {}
        assert not roles["teacher"].trained


def test_all_roles_start_as_the_base() -> None:
    roles = make_roles(make_toy(), student=LORA, teacher=ema(), critic=FULL, reference=FROZEN)
    for name in ("student", "teacher", "critic"):
        assert torch.equal(predict(roles[name]), predict(roles["reference"]))


def test_each_role_has_its_own_rank_alpha_and_targets() -> None:
    roles = make_roles(
        make_toy(), student=LORA, critic={"adapter": "lora", "rank": 1, "targets": ["mix"]}
    )
    assert roles["student"].parameters()["mix.lora_A.weight"].shape == (2, 3)
    assert roles["critic"].parameters()["mix.lora_A.weight"].shape == (1, 3)
    assert roles.matched == {"student": 1, "critic": 1}
    with pytest.raises(UserError, match="'attn' matches no layer"):
        make_roles(make_toy(), student={"adapter": "lora", "targets": ["attn"]})


# averages


@pytest.mark.parametrize("kind", [LORA, FULL])
def test_an_average_starts_as_a_copy_and_follows_the_closed_form(kind: dict[str, Any]) -> None:
    roles = make_roles(make_toy(), student=kind, teacher=ema(0.9))
    start = {n: p.clone() for n, p in roles["teacher"].parameters().items()}
    for name, parameter in roles["student"].parameters().items():
        assert torch.equal(start[name], parameter)
    disturb(roles["student"], seed=5)
    for _ in range(3):
        roles.average("student")
    kept = 0.9**3
    for name, parameter in roles["student"].parameters().items():
        expected = kept * start[name] + (1 - kept) * parameter
        torch.testing.assert_close(roles["teacher"].parameters()[name], expected)


def test_an_average_moves_only_with_the_role_it_follows() -> None:
    roles = make_roles(
        make_toy(), student=LORA, critic=LORA, teacher=ema(0.5), slow=ema(0.5, of="critic")
    )
    disturb(roles["student"], seed=6)
    disturb(roles["critic"], seed=7)
    teacher, slow = predict(roles["teacher"]), predict(roles["slow"])
    roles.average("critic")
    assert torch.equal(predict(roles["teacher"]), teacher)
    assert not torch.allclose(predict(roles["slow"]), slow)


@pytest.mark.parametrize(("decay", "same_as"), [(0.0, "student"), (1.0, "reference")])
def test_the_ends_of_the_decay_are_the_student_and_the_start(decay: float, same_as: str) -> None:
    roles = make_roles(make_toy(), student=LORA, teacher=ema(decay), reference=FROZEN)
    disturb(roles["student"], seed=8)
    roles.average("student")
    torch.testing.assert_close(predict(roles["teacher"]), predict(roles[same_as]))


def test_an_average_of_decay_one_is_out_of_reach_of_a_student_that_overflowed() -> None:
    roles = make_roles(make_toy(), student=LORA, teacher=ema(1.0))
    start = {name: p.clone() for name, p in roles["teacher"].parameters().items()}
    with torch.no_grad():
        for parameter in roles["student"].parameters().values():
            parameter.fill_(torch.inf)
    roles.average("student")
    for name, parameter in roles["teacher"].parameters().items():
        assert torch.equal(parameter, start[name])


@pytest.mark.parametrize("weights", ["ema", "live"])
@pytest.mark.parametrize("of", ["nobody", "reference"])
def test_following_a_role_that_is_not_trained_is_an_error(weights: str, of: str) -> None:
    with pytest.raises(UserError, match=rf"roles\.teacher.*{of}.*trained here: student"):
        make_roles(
            make_toy(), student=LORA, reference=FROZEN, teacher={"weights": weights, "of": of}
        )


# calls


def test_a_role_is_called_in_its_autocast_type_and_answers_in_float32() -> None:
    roles = make_roles(make_toy(), student=FULL)
    disturb(roles["student"], seed=9)
    exact = predict(roles["student"])
    roles["student"].autocast = torch.bfloat16
    rounded = predict(roles["student"])
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("sharded", [False, True])
def test_autocast_keeps_no_cast_weights_of_a_sharded_network(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = make_roles(make_toy(), student=FULL)["student"]
    role.autocast = torch.bfloat16
    if sharded:
        monkeypatch.setattr("diffdistill.roles.FSDPModule", type(role.network))
    weight = nn.Parameter(torch.ones(2, 2))
    with role.acting(torch.device("cpu")):
        casts = [(weight @ weight).grad_fn.next_functions[0][0] for _ in range(2)]
        kept = casts[0] is casts[1]
    assert kept is not sharded


def test_a_fully_trained_role_is_float32_whatever_the_checkpoint_is() -> None:
    class HalfToy(Toy):
        def network(self, path: str | None = None) -> nn.Module:
            return super().network(path).bfloat16()

    roles = make_roles(HalfToy(path="", device=torch.device("cpu")), student=FULL, other=FROZEN)
    assert {p.dtype for p in roles["student"].network.parameters()} == {torch.float32}
    assert {p.dtype for p in roles["other"].network.parameters()} == {torch.bfloat16}


def test_the_bare_network_stays_bare_after_a_call() -> None:
    roles = make_roles(make_toy(), student=LORA, reference=FROZEN)
    before = predict(roles["reference"])
    disturb(roles["student"], seed=10)
    predict(roles["student"])
    assert torch.equal(predict(roles["reference"]), before)


# heads


@pytest.mark.parametrize("kind", [LORA, FULL])
def test_a_head_gives_one_logit_per_sample_and_is_trained_with_its_role(
    kind: dict[str, Any],
) -> None:
    roles = make_roles(make_toy(), student=LORA, critic={**kind, "head": True})
    critic = roles["critic"]
    disturb(critic, seed=11)
    logits = critic.discriminate(STATE, CONDITION)
    assert logits.shape == (2,)
    swapped = State(STATE.x.flip(0), STATE.t.flip(0))
    other = {k: v.flip(0) for k, v in CONDITION.items()}
    torch.testing.assert_close(critic.discriminate(swapped, other), logits.flip(0))
    logits.sum().backward()
    reached = gradients(critic)
    assert {n for n in reached if n.startswith("head.")} == {
        f"head.{n}" for n, _ in roles.modules()[-1].named_parameters()
    }
    assert any(not n.startswith("head.") and g.abs().sum() > 0 for n, g in reached.items())
    assert gradients(roles["student"]) == {}


def test_an_average_of_a_role_with_a_head_averages_the_network_alone() -> None:
    roles = make_roles(
        make_toy(), student=LORA, critic={**LORA, "head": True}, slow=ema(0.0, of="critic")
    )
    disturb(roles["critic"], seed=12)
    roles.average("critic")
    torch.testing.assert_close(predict(roles["slow"]), predict(roles["critic"]))
    assert not any(name.startswith("head.") for name in roles["slow"].parameters())


# gradient checkpointing


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.calls = 0

    def forward(self, x: Tensor, scale: float) -> Tensor:
        self.calls += 1
        return x + scale * self.down(torch.tanh(self.up(x)))


class BlockNetwork(nn.Module):
    """Blocks that can be recomputed, in the way of diffusers."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.recompute: Callable[..., Tensor] | None = None

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Tensor] | None = None
    ) -> None:
        self.recompute = gradient_checkpointing_func

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute is not None and torch.is_grad_enabled():
                x = self.recompute(block, x, scale=0.5)
            else:
                x = block(x, scale=0.5)
        return x


class BlockFamily:
    adapter_targets = ("up", "down")

    def network(self, path: str | None = None) -> nn.Module:
        return BlockNetwork()

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        return network(state.x)

    def features(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        return network(state.x)


def student_gradients(
    kind: dict[str, Any], teacher: dict[str, Any], recompute: bool
) -> tuple[dict[str, Tensor], int]:
    """Back-propagate the student's call after the teacher's; also count the block calls."""
    roles = make_roles(BlockFamily(), student=kind, teacher=teacher)
    disturb(roles["student"], seed=13, scale=0.7)
    disturb(roles["teacher"], seed=14, scale=0.7)
    if recompute:
        for network in roles.networks():
            enable_checkpointing(network)
    state = State(randn(5, 4, seed=15), torch.ones(5))
    student = roles["student"](state, {})
    with torch.no_grad():
        teacher_output = roles["teacher"](state, {})
    (student - teacher_output).square().sum().backward()
    assert all(p.grad is None for p in roles["teacher"].parameters().values())
    blocks = [m for m in roles["student"].network.modules() if isinstance(m, Block)]
    return gradients(roles["student"]), sum(block.calls for block in blocks)


@pytest.mark.parametrize("kind", [LORA, FULL])
@pytest.mark.parametrize("teacher", [ema(), FROZEN])
def test_recomputation_uses_the_adapter_of_the_forward_pass(
    kind: dict[str, Any], teacher: dict[str, Any]
) -> None:
    expected, plain_calls = student_gradients(kind, teacher, recompute=False)
    found, calls = student_gradients(kind, teacher, recompute=True)
    assert calls == plain_calls + 3  # each block of the student once more
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)


def test_recomputation_while_another_role_is_in_use_leaves_that_role_active() -> None:
    roles = make_roles(BlockFamily(), student=LORA, teacher=ema())
    disturb(roles["student"], seed=16)
    enable_checkpointing(roles["student"].network)
    state = State(randn(2, 4, seed=17), torch.ones(2))
    before = predict_blocks(roles["teacher"], state)
    roles["student"](state, {}).sum().backward()
    assert torch.equal(predict_blocks(roles["teacher"], state), before)


def predict_blocks(role: Role, state: State) -> Tensor:
    with torch.no_grad():
        return role(state, {})


def test_a_network_that_cannot_recompute_says_so() -> None:
    with pytest.raises(UserError, match="ToyNetwork has no gradient checkpointing"):
        enable_checkpointing(make_toy().network())


def test_an_average_that_starts_late_is_a_copy_until_then() -> None:
    settings = {"student": {}, "average": {"weights": "ema", "decay": 0.9, "start": 2}}
    roles = make_roles(make_toy(), **settings)
    student, average = (roles[name].parameters()["factors"] for name in settings)
    for updates, expected in ((1, 1.0), (2, 2.0), (3, 0.9 * 2.0 + 0.1 * 3.0)):
        with torch.no_grad():
            student.fill_(float(updates))
        roles.average("student", updates)
        torch.testing.assert_close(average, torch.full_like(average, expected))

"""Shadows: what they compute, that they leave the base alone, and what they are alone."""

import gc
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, ShadowConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, Qwen3ForCausalLM

from diffdistill.caches import follower
from diffdistill.checkpoints import restore
from diffdistill.commands.export import export
from diffdistill.commands.sample_answers import sample_answers
from diffdistill.commands.sessions import models
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.distributed import Distributed
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.block_diffusion import project
from diffdistill.pipelines.block_sampling import BlockSampler, UncachedSampler
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.llada2 import LLaDA2
from diffdistill.pipelines.prompts import prompt_condition
from diffdistill.pipelines.vlm import VLM
from diffdistill.pipelines.wedlm import WeDLM
from diffdistill.projection import dense, token_logprob, token_maps
from diffdistill.question_feed import question_batches
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings, check_roles
from diffdistill.roles import Role, enable_checkpointing
from diffdistill.rollouts import Sampling
from diffdistill.session import build, questions
from diffdistill.session_checks import check_shadows
from diffdistill.shadow import ShadowSettings, add_shadow, alone, is_shadow, shadow_of
from diffdistill.trainer import Trainer
from diffdistill.types import State
from tests.answer_run import answer_values, save_answer_world
from tests.conftest import CPU, disturb, generator, gradients
from tests.tiny_text import causal_lm
from tests.toy_run import make_data, toy_values

SHADOW: dict[str, Any] = {"adapter": "shadow", "shadow": {"rank": 3, "dropout": 0.0}}
VARIANTS = ("peft", "paper")
PROMPTS = ([5, 6, 7], [8, 9])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = save_answer_world(tmp_path_factory.mktemp("shadow"))
    values = answer_values(folder, roles={"student": SHADOW}, train={"steps": 2, "lr": 0.05})
    train(parse_config(values), folder / "run")
    return folder


def role_of(world: Path, *, moved: bool = True, **shadow: Any) -> Role:
    """Return a student with a shadow; unless it is fresh, all its weights are moved."""
    settings = RoleSettings(adapter="shadow", shadow=ShadowSettings(**{"dropout": 0.0} | shadow))
    family = CausalLM(path=str(world / "student"), device=CPU)
    role = build_roles({"student": settings}, family)["student"]
    if moved:
        disturb(role, seed=1, scale=0.2)
    return role


def question(role: Role) -> tuple[State, Any]:
    answers = torch.randint(5, 30, (2, 6), generator=generator(3))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    return State(answers, torch.zeros(2), mask), prompt_condition(PROMPTS, role.family)  # type: ignore[arg-type]


# what it computes


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_shadow_changes_nothing(world: Path, variant: Any) -> None:
    role = role_of(world, moved=False, variant=variant)
    asked = question(role)
    base = Role("base", RoleSettings(weights="frozen"), role.family, role.network)
    assert torch.equal(dense(role(*asked)), dense(base(*asked)))
    disturb(role, seed=1)
    assert not torch.allclose(dense(role(*asked)), dense(base(*asked)))


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")
def test_it_equals_pefts_own_shadow() -> None:
    tokens = torch.randint(0, 36, (2, 7), generator=generator(1))
    wrapped = get_peft_model(
        causal_lm(is_causal=True), ShadowConfig(task_type="CAUSAL_LM", r=3, shadow_dropout=0.0)
    )
    network = causal_lm(is_causal=True)
    add_shadow(network, "student", ShadowSettings(rank=3, dropout=0.0))
    theirs = [p for n, p in wrapped.named_parameters() if "shadow_" in n]
    ours = [p for n, p in network.named_parameters() if is_shadow(n)]
    shapes = [p.shape for p in theirs]
    assert shapes == [p.shape for p in ours]
    with torch.no_grad():
        for first, second in zip(theirs, ours, strict=True):
            second.copy_(first.normal_(0.0, 0.2))
    expected = wrapped(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(network(input_ids=tokens, use_cache=False).logits, expected)


def test_the_papers_form_is_its_equations() -> None:
    """Equations 2 to 7, written down once more for two blocks, of which the second injects."""
    network = causal_lm(is_causal=True)
    settings = ShadowSettings(variant="paper", rank=3, update_size=4, strength=0.7, dropout=0.0)
    assert add_shadow(network, "s", settings) == 1
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if is_shadow(name):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator(len(name))))
    tokens = torch.randint(0, 36, (1, 5), generator=generator(2))
    layer, kept = network.model.layers[1], []
    layer.base_layer.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    layer.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    network(input_ids=tokens, use_cache=False)
    carrier, injected = kept
    hidden, state = carrier.hidden, carrier.shadow
    alone_ = network.shadow_backbone["s"](
        inputs_embeds=network.get_input_embeddings()(tokens), use_cache=False
    ).last_hidden_state
    torch.testing.assert_close(state, alone_)
    down, up = layer.shadow_down["s"].weight, layer.shadow_up["s"].weight
    torch.testing.assert_close(injected, hidden + 0.7 * (hidden - state) @ down.T @ up.T)
    out = torch.randn(1, 5, 32, generator=generator(4))
    norm = network.shadow_norm["s"]
    normed = nn.functional.layer_norm(out, (32,), norm.weight, norm.bias)

    def small(part: Any) -> Tensor:
        return nn.functional.silu(normed @ part["s"][0].weight.T) @ part["s"][3].weight.T

    gate = small(layer.shadow_update_gate).sigmoid()
    expected = (1 - gate) * state + gate * small(layer.shadow_update_transform)
    torch.testing.assert_close(layer.shadow_update(out, state, "s"), expected)


@pytest.mark.parametrize(
    ("layers", "published"),
    [(5, 100_979_968), (10, 192_772_608), (16, 302_923_776), (22, 413_074_944), (28, 523_226_112)],
)
def test_parameters_are_those_of_the_five_published_budgets(layers: int, published: int) -> None:
    """``experiment/README_scaling.md`` of the authors, Qwen3-8B; and the formula in our notes."""
    width, blocks, rank, update, wide = 4096, 36, 16, 8, 128
    attention = 4 * width * 8 * 128 + 2 * 128
    block = attention + 3 * width * wide + 2 * width
    formula = (blocks - 1) * (2 * rank + 4 * update) * width + 2 * width + layers * block + width
    assert formula == published
    if layers > 10:
        return  # two networks tell a line
    config = Qwen3Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
        vocab_size=100,
    )
    with torch.device("meta"):
        network = Qwen3ForCausalLM(config)
        settings = ShadowSettings(
            variant="paper", update_size=update, num_layers=layers, num_heads=8,
            intermediate_size=wide,
        )  # fmt: skip
        add_shadow(network, "student", settings)
    assert sum(p.numel() for n, p in network.named_parameters() if is_shadow(n)) == published


# roles of one base


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_moves_the_shadow_and_no_weight_of_the_base(world: Path, variant: Any) -> None:
    role = role_of(world, moved=False, variant=variant)
    before = {n: p.clone() for n, p in role.network.named_parameters()}
    optimizer = torch.optim.Adam(role.parameters().values(), lr=0.1)
    for _ in range(2):
        state, told = question(role)
        loss = -token_logprob(role(state, told), state.x, mask=state.mask).sum()
        extra = role.extra()
        assert extra is not None
        optimizer.zero_grad()
        (loss + extra.value).backward()
        optimizer.step()
    moved = {n for n, p in role.network.named_parameters() if not torch.equal(p, before[n])}
    # what follows the last block is used by nobody; of the paper's, that is all there is of two
    unused = (".1.shadow_update", "shadow_norm")
    assert moved == {n for n in before if is_shadow(n) and not any(u in n for u in unused)}


def test_an_average_the_bare_base_and_a_lora_share_the_base_with_a_shadow(world: Path) -> None:
    family = CausalLM(path=str(world / "student"), device=CPU)
    shadow = ShadowSettings(dropout=0.0)
    settings = {
        "student": RoleSettings(adapter="shadow", shadow=shadow),
        "critic": RoleSettings(adapter="lora", rank=2),
        "average": RoleSettings(weights="ema"),
        "teacher": RoleSettings(weights="frozen"),
    }
    roles = build_roles(settings, family)
    assert len(roles.networks()) == 1
    asked = question(roles["student"])
    bare = dense(roles["teacher"](*asked))
    assert torch.equal(dense(roles["average"](*asked)), bare)
    for name in ("student", "critic"):
        disturb(roles[name], seed=2, scale=0.2)
    found = {name: dense(roles[name](*asked)) for name in settings}
    assert torch.equal(found["teacher"], bare)
    assert torch.equal(found["average"], bare)
    assert not torch.allclose(found["student"], found["critic"])
    roles["average"].settings.decay = 0.0
    roles.average("student")
    torch.testing.assert_close(dense(roles["average"](*asked)), found["student"])
    loss = dense(roles["critic"](*asked)).sum()
    loss.backward()
    assert gradients(roles["critic"])
    assert not gradients(roles["student"])


def test_gradients_are_the_same_when_blocks_are_recomputed(world: Path) -> None:
    found = []
    for recompute in (False, True):
        role = role_of(world)
        if recompute:
            enable_checkpointing(role.network)
        state, told = question(role)
        loss = token_logprob(role(state, told), state.x).sum()
        extra = role.extra()
        assert extra is not None
        (loss + extra.value).backward()
        found.append(gradients(role))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


def test_no_state_is_left_behind_by_a_call_or_by_an_error(world: Path) -> None:
    role = role_of(world)
    tuner = shadow_of(role.network)
    assert tuner is not None
    role(*question(role))
    assert tuner.state is None
    with pytest.raises(ValueError, match="within"), alone(role.network):
        raise ValueError("within")
    assert not tuner.alone
    state, told = question(role)
    first = dense(role(state, told))
    role(state._replace(x=state.x.flip(1)), told)
    assert torch.equal(dense(role(state, told)), first)


# alone


def test_the_auxiliary_loss_is_that_of_the_shadow_alone(world: Path) -> None:
    for auxiliary in ("tokens", "attached"):
        role = role_of(world, auxiliary=auxiliary, auxiliary_weight=0.3)
        state, told = question(role)
        attached = role(state, told)
        kept = role.extra()
        with role.acting(CPU), alone(role.network):
            by_itself = role.family.predict(role.network, state, told)
        mask = state.mask
        assert mask is not None
        if auxiliary == "tokens":
            errors = -token_logprob(by_itself, state.x, mask=mask)
        else:
            errors = token_maps(by_itself, attached, ("forward-kl",), mask=mask)["forward-kl"]
        assert kept is not None
        assert kept.count == mask.sum()
        torch.testing.assert_close(kept.value, 0.3 * errors.sum() / mask.sum())
        assert role.extra() is None


def test_what_is_learned_alone_is_the_same_in_smaller_micro_batches(world: Path) -> None:
    found, told = [], []
    for batch_size, accumulate in ((2, 1), (1, 2)):
        values = answer_values(
            world,
            method={"name": "grpo", "num_answers": 2, "max_tokens": 8, "aggregation": "grpo"},
            roles={"student": {**SHADOW, "shadow": {"dropout": 0.0, "auxiliary_weight": 1.0}}},
            data={"batch_size": batch_size},
            train={
                "accumulate": accumulate,
                "clip": None,
                "gradient_checkpointing": accumulate > 1,
            },
            rewards="tests.answer_run:Length",
        )
        session = build(parse_config(values), CPU)
        disturb(session.roles["student"], seed=1, scale=0.05)
        distributed = Distributed()
        batches = question_batches(session, questions(session), distributed)(0)
        trainer = Trainer(session, batches, distributed)
        trainer.optimizers["student"].zero_grad = lambda **_: None  # type: ignore[assignment, misc]
        metrics = trainer.train_step()
        batches.close()
        parameters = session.roles["student"].parameters()
        found.append({n: p.grad for n, p in parameters.items() if p.grad is not None})
        told.append([metrics[f"{name}/student"] for name in ("loss", "shadow", "answer_tokens")])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert told[0] == pytest.approx(told[1], rel=1e-4, abs=1e-6)


def test_a_shadow_that_learns_to_stand_alone_cannot_be_spread(world: Path) -> None:
    distributed = Distributed()
    distributed.sharded = True
    for weight in (0.05, 0.0):
        shadow = {**SHADOW, "shadow": {"auxiliary_weight": weight}}
        session = build(parse_config(answer_values(world, roles={"student": shadow})), CPU)
        if weight:
            with pytest.raises(UserError, match=r"set roles\.student\.shadow\.auxiliary_weight: 0"):
                Trainer(session, iter(()), distributed)
        else:
            Trainer(session, iter(()), distributed)


def test_without_a_weight_nothing_is_learned_alone(world: Path) -> None:
    role = role_of(world, auxiliary_weight=0.0)
    role(*question(role))
    assert role.extra() is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_detached_export_is_a_plain_model_with_the_shadows_logits(
    world: Path, tmp_path: Path, variant: str
) -> None:
    shadow = {"variant": variant, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    values = answer_values(
        world, roles={"student": {"adapter": "shadow", "shadow": shadow}}, train={"steps": 1}
    )
    train(parse_config(values), tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "alone", layout="detached")
    opened = AutoModelForCausalLM.from_pretrained(str(folder))
    role = restore(tmp_path / "run").roles["student"]
    tokens = torch.randint(0, 36, (2, 7), generator=generator(1))
    role.network.eval()
    with torch.no_grad(), role.acting(CPU), alone(role.network):
        expected = role.network(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(opened.eval()(input_ids=tokens).logits, expected)
    tuner = shadow_of(role.network)
    assert tuner is not None
    theirs = tuner.unload_shadow("student", copy=True).eval()
    theirs.head = role.network.get_output_embeddings()
    torch.testing.assert_close(theirs(input_ids=tokens, use_cache=False).logits, expected)


def test_a_shadow_can_be_asked_with_and_without_its_base(world: Path) -> None:
    rows = sample_answers(
        str(world / "run"),
        prompts=["2+2?"],
        compare=["base", "student", "detached"],
        overrides=["sample.max_tokens=5", "sample.temperature=0"],
    )
    assert [row["model"] for row in rows] == ["base", "student", "detached"]
    assert len({row["answer"] for row in rows}) > 1
    with pytest.raises(UserError, match="no model 'detached'"):
        models(build(parse_config(answer_values(world)), CPU), ["detached"])


# caches


def test_caches_that_go_together_are_freed_at_once() -> None:
    """Without waiting for Python's collector: they are the largest thing in sampling."""
    config = Qwen3Config(num_hidden_layers=1)
    cache = DynamicCache()
    kept = weakref.ref(follower(cache, config))
    states = torch.zeros(1, 1, 3, 2)
    for own in (cache, kept()):
        own.update(states, states, 0)
    assert follower(cache, config) is kept()
    cache.crop(-1)
    assert [own.get_seq_length() for own in (cache, kept())] == [2, 2]
    own, cache = weakref.ref(cache), None  # type: ignore[assignment]
    gc.disable()
    try:
        assert own() is None
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("detached", [False, True])
def test_answers_with_a_cache_are_those_without(world: Path, variant: Any, detached: bool) -> None:
    role = role_of(world, variant=variant)
    role.detached = detached
    told, ids = prompt_condition(PROMPTS, role.family), torch.arange(2)  # type: ignore[arg-type]
    family: Any = role.family
    with torch.no_grad(), role.acting(CPU):
        found = family.sample(
            role.network, told, ids, Sampling(max_tokens=6, temperature=0.0), Draws(0), purpose="x"
        )
    state = State(found.tokens, torch.zeros(2), found.mask)
    with torch.no_grad():
        again = dense(role(state, told))
    kept = found.mask
    assert torch.equal(again.argmax(-1)[kept], found.tokens[kept])


def test_a_shadow_answers_alone_for_a_base_of_lower_precision(world: Path) -> None:
    settings = RoleSettings(adapter="shadow", shadow=ShadowSettings(dropout=0.0))
    family: Any = CausalLM(path=str(world / "student"), device=CPU, dtype="bf16")
    role = build_roles({"student": settings}, family)["student"]
    role.detached = True
    told, ids = prompt_condition(PROMPTS, family), torch.arange(2)
    with torch.no_grad(), role.acting(CPU):
        found = family.sample(
            role.network, told, ids, Sampling(max_tokens=3, temperature=0.0), Draws(0), purpose="x"
        )
    assert found.mask.any(1).all()
    assert next(iter(role.parameters().values())).dtype == torch.float32


def test_blocks_are_sampled_with_a_cache_as_without() -> None:
    network = causal_lm()
    add_shadow(network, "student", ShadowSettings(dropout=0.0, strength=1.0))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if is_shadow(name):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(1)))
    tokens = torch.randint(0, 36, (3, 4), generator=generator(2))
    found = []
    for kind in (BlockSampler, UncachedSampler):
        sampler = kind.__new__(kind)
        sampler.network, sampler.block = network, 4  # type: ignore[attr-defined]
        past = sampler._empty_past(torch.zeros(3, dtype=torch.long), "sdpa")
        past.append(tokens)
        first = past.logits(tokens.flip(1))
        past.keep(torch.tensor([2, 0]))
        past.append(tokens[:2])
        with torch.no_grad():
            found.append((first, past.logits(tokens[1:])))
    for cached, plain in zip(*found, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)


# runs, exports and errors


def test_a_run_resumes_exactly(world: Path, tmp_path: Path) -> None:
    values = answer_values(
        world,
        roles={"student": {"adapter": "shadow"}},  # with dropout
        train={"steps": 2, "save_every": 1, "lr": 0.05, "keep": None, "ema": 0.5},
    )
    config = parse_config(values)
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    train(config, tmp_path / "part", resume="step-000001")
    for name in ("student", "average"):
        first, second = (
            restore(tmp_path / run).roles[name].parameters() for run in ("whole", "part")
        )
        assert all(torch.equal(first[key], second[key]) for key in first)
    metrics = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert '"shadow/student"' in metrics


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")
def test_peft_opens_the_exported_shadow(world: Path, tmp_path: Path) -> None:
    folder = export(world / "run", tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(str(world / "student"))
    opened = PeftModel.from_pretrained(base, str(folder)).eval()
    role = restore(world / "run").roles["student"]
    tokens = torch.randint(0, 36, (2, 7), generator=generator(1))
    role.network.eval()
    with torch.no_grad(), role.acting(CPU):
        expected = dense(project(role.network, tokens, torch.ones_like(tokens).bool(), positions()))
    torch.testing.assert_close(opened(input_ids=tokens, use_cache=False).logits, expected)


def positions() -> Tensor:
    return torch.arange(7)[None].expand(2, -1)


def test_merging_is_refused_before_anything_has_changed(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a shadow cannot be merged"):
        export(world / "run", tmp_path / "merged", layout="model")
    assert not (tmp_path / "merged").exists()
    role = role_of(world)
    asked = question(role)
    before = dense(role(*asked))
    tuner = shadow_of(role.network)
    assert tuner is not None
    with pytest.raises(UserError, match="a shadow cannot be merged"):
        tuner.merge_and_unload()
    assert torch.equal(dense(role(*asked)), before)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"adapter": "shadow", "shadow": {"rnak": 1}}, r"student\.shadow\.rnak: unknown key"),
        ({"shadow": {"rank": 1}}, r"shadow is for adapter: shadow, and it is none"),
        ({"adapter": "shadow", "dora": True}, r"dora is for adapter: lora, and it is shadow"),
        ({"adapter": "shadow", "targets": ["x"]}, r"targets is for adapter: lora"),
        ({"adapter": "shadow", "shadow": {"rank": 0}}, r"rank must be at least 1, not 0"),
        ({"adapter": "shadow", "rank": 16}, r"rank is for adapter: lora: set .*\.shadow\.rank$"),
        ({"adapter": "shadow", "dropout": 0}, r"lora: set .*student\.shadow\.dropout$"),
        ({"adapter": "shadow", "alpha": 8, "shadow": {"rank": 2}}, r"set .*\.shadow\.strength$"),
        ({"adapter": "shadow", "shadow": {"dropout": 1.0}}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(world: Path, student: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(parse_config(answer_values(world, roles={"student": student})), CPU)


def test_a_shadow_has_blocks() -> None:
    with pytest.raises(UserError, match=r"student\.shadow\.num_layers must be at least 1, not 0"):
        check_roles(
            {"student": RoleSettings(adapter="shadow", shadow=ShadowSettings(num_layers=0))}
        )


def test_the_config_of_a_run_with_a_shadow_is_read_again(world: Path) -> None:
    config = parse_config(answer_values(world, roles={"student": {"adapter": "shadow"}}))
    assert parse_config(config.to_dict()) == config


def test_what_cannot_have_a_shadow_says_so(world: Path, tmp_path: Path) -> None:
    values = toy_values(make_data(tmp_path / "data"))
    values["roles"]["student"] = {"adapter": "shadow"}
    with pytest.raises(UserError, match="shadow is for language models"):
        build(parse_config(values), CPU)
    families = (VLM(path="", device=CPU), WeDLM(path="", device=CPU), LLaDA2(path="", device=CPU))
    for family in families:
        config = parse_config(answer_values(world, roles={"student": {"adapter": "shadow"}}))
        with pytest.raises(UserError, match=r"roles\.student\.adapter: shadow is for .*: use lora"):
            check_shadows(config, family)
    live = {"student": {"adapter": "shadow"}, "teacher": {"weights": "live"}}
    with pytest.raises(UserError, match=r"set roles\.student\.shadow\.dropout to 0"):
        build(parse_config(answer_values(world, roles=live)), CPU)
    network = causal_lm()
    add_shadow(network, "a", ShadowSettings())
    with pytest.raises(UserError, match="of one variant"):
        add_shadow(network, "b", ShadowSettings(variant="paper"))
    values = answer_values(
        world, roles={"student": {"adapter": "shadow", "shadow": {"variant": "paper"}}},
        train={"steps": 1},
    )  # fmt: skip
    train(parse_config(values), tmp_path / "paper")
    with pytest.raises(UserError, match="peft reads, and it has no variant: paper"):
        export(tmp_path / "paper", tmp_path / "out")
    with pytest.raises(UserError, match="is a shadow, not to be had as layout lora"):
        export(tmp_path / "paper", tmp_path / "out", layout="lora")


def test_the_papers_first_projection_is_drawn_small() -> None:
    network = causal_lm(hidden_size=256, head_dim=64)
    add_shadow(network, "s", ShadowSettings(variant="paper", rank=64))
    weight = network.model.layers[1].shadow_down["s"].weight
    assert math.isclose(weight.std().item(), 0.02, rel_tol=0.05)

"""CoPD: experts that are rewarded apart and teach each other, and their mean."""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffdistill.checkpoints import Checkpoints, restore
from diffdistill.closeness import closeness_maps
from diffdistill.commands.evaluate_answers import evaluate_answers
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.distributed import Distributed
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.feeding import Feed
from diffdistill.merging import mean_weights
from diffdistill.projection import dense
from diffdistill.question_feed import question_batches, seen_questions
from diffdistill.reward_building import build_answer_reward
from diffdistill.session import build, questions
from diffdistill.text.copd import CoPD, PhaseStarts
from diffdistill.text.grpo import GRPO
from diffdistill.types import Example, Loss, Progress
from tests.answer_run import ROWS, answer_values, save_answer_world, stopped
from tests.conftest import CPU, START, randn
from tests.toy_answers import FirstToken, Network, Questions, question_batch
from tests.toy_run import forked

LORA = {"adapter": "lora", "rank": 2, "alpha": 4}
REWARDED, SHARED = START._replace(step=0), START._replace(step=1)
SKILLS = ("sums", "words")


def make(peers: Mapping[str, Network], **options: Any) -> CoPD:
    """Return experts of which every second step is shared, and that watch nothing."""
    usual = {"num_answers": 4, "rewarded_steps": 1, "shared_steps": 1, "watch_every": None}
    return CoPD(
        family=Questions(),
        draws=Draws(0),
        student=None,
        reward=FirstToken(),  # type: ignore[arg-type]
        peers=peers,
        **usual | options,
    )


def networks(*seeds: int) -> dict[str, Network]:
    names = (*SKILLS, "third")
    return {name: Network(seed).double() for name, seed in zip(names, seeds, strict=False)}


def batch_of(size: int = 3, *, first_id: int = 0, skills: int = 2) -> dict[str, Any]:
    names = (*SKILLS, "third")[:skills]
    parts = {n: question_batch(size, first_id=100 * i + first_id) for i, n in enumerate(names)}
    return {"skills": parts}


def losses_of(method: CoPD, batch: Any, progress: Progress) -> Iterator[Loss]:
    """Yield the losses of a step, before which none was skipped."""
    method.load_state({"updates": progress.step})
    yield from method.losses(batch, progress)


def gradients(method: CoPD, batches: list[Any], step: Any = SHARED) -> dict[str, Tensor]:
    """Return each expert's gradient of the count-weighted mean of its losses."""
    sums: dict[str, float] = dict.fromkeys(method.peers, 0.0)
    for batch in batches:
        for loss in losses_of(method, batch, step):
            (loss.value * loss.count).backward()
            sums[loss.role] += loss.count
    found = {}
    for name, network in method.peers.items():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
        found[name] = torch.cat([g.flatten() for g in grads]) / max(sums[name], 1)
    return found


def alone(network: Network, batch: Any, **options: Any) -> Tensor:
    """Return the gradient of GRPO with the options of the experts."""
    method = GRPO(
        family=Questions(),
        draws=Draws(0),
        student=network,
        reference=network,
        reward=FirstToken(),  # type: ignore[arg-type]
        **{"num_answers": 4, "aggregation": "grpo"} | options,
    )
    [loss] = method.losses(batch, START)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.value, network.parameters())])


# what an expert learns


def test_between_phases_each_expert_is_rewarded_alone() -> None:
    method, batch = make(networks(1, 2)), batch_of()
    found = gradients(method, [batch], REWARDED)
    for name, network in networks(1, 2).items():
        expected = alone(network, batch["skills"][name])
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-14)


def test_experts_that_are_still_the_same_have_nothing_to_teach() -> None:
    batch = batch_of()
    found = gradients(make(networks(1, 1)), [batch])
    for name in SKILLS:
        expected = alone(Network(1).double(), batch["skills"][name])
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-14)


def test_an_answer_to_a_peers_question_is_pulled_to_what_the_peer_would_say() -> None:
    batch = batch_of()
    method = make(networks(1, 2), beta=0.7)
    found = gradients(method, [batch])
    family = method.family
    answers = family.rollouts[1]  # type: ignore[attr-defined] # its own were the first
    ours, theirs = Network(1).double(), Network(2).double()
    rows = family.repeated(batch["skills"]["words"], 4)
    state, told = family.state(answers), family.condition(rows)
    logprobs = [
        F.log_softmax(dense(network(state, told)), -1).gather(-1, answers.tokens[..., None])[..., 0]
        for network in (ours, theirs)
    ]
    gap = (logprobs[1] - logprobs[0]).detach()
    terms = torch.where(answers.mask, -0.7 * gap * logprobs[0], 0.0)
    expected = (terms.sum(1) / answers.mask.sum(1).clamp(min=1)).mean()
    grads = torch.autograd.grad(expected, list(ours.parameters()))
    cross = torch.cat([g.flatten() for g in grads])
    rewarded = alone(ours, batch["skills"]["sums"])
    assert cross.abs().max() > 1e-3
    torch.testing.assert_close(found["sums"], rewarded + cross)


def test_an_experts_loss_reaches_that_expert_alone() -> None:
    peers = networks(1, 2, 3)
    for loss in losses_of(make(peers), batch_of(skills=3), SHARED):
        loss.value.backward()
        for name, network in peers.items():
            reached = any(p.grad is not None and p.grad.any() for p in network.parameters())
            assert reached == (name == loss.role)
            network.zero_grad(set_to_none=True)


def test_micro_batches_take_the_same_step() -> None:
    whole = gradients(make(networks(1, 2)), [batch_of(4)])
    parts = gradients(make(networks(1, 2)), [batch_of(1), batch_of(3, first_id=1)])
    for name in SKILLS:
        torch.testing.assert_close(parts[name], whole[name])


def test_beta_0_asks_no_peer_and_can_be_one_experts_alone() -> None:
    method = make(networks(1, 2), betas={"sums": 0.0})
    losses = {loss.role: loss for loss in losses_of(method, batch_of(), SHARED)}
    assert "gap" not in losses["sums"].metrics
    assert losses["words"].metrics["gap"] != 0
    assert len(method.family.rollouts) == 3  # type: ignore[attr-defined]


# who, and when


def test_a_cycle_is_rewarded_first_and_then_shared() -> None:
    method = make(networks(1, 2), rewarded_steps=3, shared_steps=2)
    assert [method.shares(step) for step in range(10)] == [False] * 3 + [True] * 2 + [False] * 3 + [
        True
    ] * 2
    assert CoPD.rewarded_steps / CoPD.shared_steps == 1.5


def test_a_step_that_was_skipped_moves_neither_phases_nor_copies() -> None:
    method = make(networks(1, 2))
    for step, updated, shares in ((0, False, False), (1, True, False), (2, True, True)):
        told = [loss.metrics for loss in method.losses(batch_of(), Progress(step, 9))]
        assert all(("gap" in metrics) == shares for metrics in told)
        if updated:
            method.observe({})
    assert method.state() == {"updates": 2}


def test_every_expert_is_a_peer_of_the_hub_and_of_no_other() -> None:
    peers = networks(1, 2, 3)
    hub, everyone = make(peers), make(peers, topology="all")
    assert [hub.peers_of(name) for name in peers] == [["words", "third"], ["sums"], ["sums"]]
    assert [len(everyone.peers_of(name)) for name in peers] == [2, 2, 2]


@pytest.mark.parametrize(("rewarded", "shared"), [(3, 2), (0, 2), (1, 1)])
def test_copies_are_renewed_after_the_update_before_each_phase(rewarded: int, shared: int) -> None:
    options = {"rewarded_steps": rewarded, "shared_steps": shared, "snapshot": "phase"}
    method = make(networks(1, 2), **options)
    starts = method.renewals()["sums-before"]
    for step in range(1, 30):  # the copy of step 0 is the model before training
        begins = method.shares(step) and (step - rewarded) % (rewarded + shared) == 0
        assert (step in starts) == begins
    assert make(networks(1, 2)).renewals() == {}
    assert "x" not in PhaseStarts(0, 2)


# closeness


def test_overlap_and_divergences_are_what_brute_force_finds() -> None:
    ours, theirs = randn(2, 3, 7, seed=1).double(), randn(2, 3, 7, seed=2).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = closeness_maps(ours, theirs, 3, mask=mask, temperature=1.3)
    p, q = ((side / 1.3).log_softmax(-1) for side in (ours, theirs))
    for row, place in ((0, 0), (0, 1), (1, 0)):
        first, second = p[row, place], q[row, place]
        tops = [set(side.topk(3).indices.tolist()) for side in (first, second)]
        assert found["overlap"][row, place] == pytest.approx(len(tops[0] & tops[1]) / 3)
        reverse = (first.exp() * (first - second)).sum()
        forward = (second.exp() * (second - first)).sum()
        torch.testing.assert_close(found["reverse_kl"][row, place], reverse)
        torch.testing.assert_close(found["forward_kl"][row, place], forward)
    assert all(value[~mask].abs().max() == 0 for value in found.values())


def test_how_close_peers_are_is_measured_from_time_to_time() -> None:
    for seeds, same in (((1, 1), True), ((1, 2), False)):
        method = make(networks(*seeds), watch_every=2)
        for loss in losses_of(method, batch_of(), REWARDED):
            assert (loss.metrics["symmetric_kl"] < 1e-9) == same
            assert loss.metrics["overlap_at_10"] == 1.0  # there are six words
        for loss in losses_of(method, batch_of(), SHARED):
            assert "symmetric_kl" not in loss.metrics


# the mean


def test_the_mean_of_adapters_is_the_mean_of_their_updates() -> None:
    factors = [
        {"x.lora_A.weight": randn(2, 5, seed=i), "x.lora_B.weight": randn(4, 2, seed=10 + i)}
        for i in range(3)
    ]
    found = mean_weights(factors, adapters=True)
    expected = sum(f["x.lora_B.weight"] @ f["x.lora_A.weight"] for f in factors) / 3
    torch.testing.assert_close(found["x.lora_B.weight"] @ found["x.lora_A.weight"], expected)


# runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_skills(tmp_path_factory.mktemp("copd"))


def save_skills(folder: Path) -> Path:
    """Save a tiny model and the questions of two skills, and return the folder."""
    save_answer_world(folder)
    rows = [{**row, "solution": None} for row in reversed(ROWS)]
    (folder / "words.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def copd_values(world: Path, form: Mapping[str, Any] = LORA, **sections: Any) -> dict[str, Any]:
    skills = {"sums": str(world / "questions.jsonl"), "words": str(world / "words.jsonl")}
    method = {"name": "copd", "num_answers": 2, "max_tokens": 4}
    method |= {"rewarded_steps": 1, "shared_steps": 1} | sections.pop("method", {})
    values = answer_values(world, rewards="tests.answer_run:Length", **sections)
    values["data"] = {"batch_size": 2, "skills": skills} | sections.get("data", {})
    return values | {"method": method, "roles": {name: dict(form) for name in skills}}


def grpo_values(world: Path, file: str, form: Mapping[str, Any]) -> dict[str, Any]:
    method = {"name": "grpo", "num_answers": 2, "max_tokens": 4, "aggregation": "grpo"}
    values = answer_values(world, rewards="tests.answer_run:Length", roles={"student": dict(form)})
    values["data"] = values["data"] | {"path": str(world / file)}
    return values | {"method": method}


def tensors(run: Path, which: str = "latest") -> dict[str, dict[str, Tensor]]:
    return Checkpoints(run).load(which)[0].tensors


@pytest.mark.parametrize("form", [LORA, {}], ids=["adapters of one base", "networks"])
def test_beta_0_is_parallel_grpo_bit_for_bit(
    form: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    train(parse_config(copd_values(world, form, method={"beta": 0.0})), tmp_path / "copd")
    together = tensors(tmp_path / "copd")
    for skill, file in (("sums", "questions.jsonl"), ("words", "words.jsonl")):
        train(parse_config(grpo_values(world, file, form)), tmp_path / skill)
        single = tensors(tmp_path / skill)["role-student"]
        assert single.keys() == together[f"role-{skill}"].keys()
        assert all(torch.equal(together[f"role-{skill}"][name], single[name]) for name in single)
    assert any((together["role-sums"][n] != together["role-words"][n]).any() for n in single)
    if not form:
        for name, value in together["role-student"].items():
            both = [together[f"role-{skill}"][name] for skill in SKILLS]
            torch.testing.assert_close(value, sum(both) / 2)


def test_experts_that_teach_each_other_differ_from_those_that_do_not(
    world: Path, tmp_path: Path
) -> None:
    for name, beta in (("apart", 0.0), ("together", 1.0)):
        train(parse_config(copd_values(world, method={"beta": beta})), tmp_path / name)
    apart, together = (tensors(tmp_path / name)["role-sums"] for name in ("apart", "together"))
    assert any((apart[name] != together[name]).any() for name in apart)
    lines = [json.loads(line) for line in (tmp_path / "together" / "metrics.jsonl").open()]
    assert all(line["sampler_gap/sums"] < 1e-4 for line in lines)
    assert ["gap/sums" in line for line in lines] == [False, True, False, True]
    assert "symmetric_kl/words" in lines[0]
    assert lines[0]["symmetric_kl/words"] == pytest.approx(0.0, abs=1e-6)


def test_experts_are_divided_among_processes_that_have_a_part_each() -> None:
    method, batch = make(networks(0, 1), placement="groups"), batch_of()
    parts = [list(losses_of(method, batch, SHARED._replace(part=i, parts=2))) for i in (0, 1)]
    assert [[loss.role for loss in part] for part in parts] == [["sums"], ["words"]]
    whole = list(losses_of(method, batch, SHARED))
    assert [loss.value.item() for part in parts for loss in part] == [
        loss.value.item() for loss in whole
    ]
    assert CoPD.parts(["a", "b", "c"], {"placement": "groups"}) == 3
    assert CoPD.parts(["a", "b", "c"], {}) == 1


def test_processes_with_parts_of_the_experts_read_the_same_questions(world: Path) -> None:
    session = build(parse_config(copd_values(world, data={"batch_size": 1})), CPU)

    def read(rank: int, ranks: int, parts: int, samples: int = 0) -> list[tuple[str, list[int]]]:
        distributed = Distributed()
        distributed.world, distributed.rank = ranks, rank
        distributed.divide(parts)
        feed = Feed(question_batches(session, questions(session), distributed))
        with closing(feed.after(samples, session, distributed)) as batches:
            found = list(islice(batches, 3))
        return [(str(batch["prompts"]), batch["ids"].tolist()) for batch in found]

    two = [read(rank, 2, 1) for rank in (0, 1)]
    assert two[0] != two[1]
    assert [read(rank, 4, 2) for rank in range(4)] == [two[0], two[0], two[1], two[1]]
    assert [read(rank, 4, 2, samples=2)[:2] for rank in (1, 2)] == [two[0][1:], two[1][1:]]


def test_a_server_of_one_student_is_not_asked_by_groups_of_processes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distributed, "divide", lambda self, parts: setattr(self, "parts", parts))
    values = copd_values(world, method={"placement": "groups"}) | {"engine": "vllm-server"}
    with pytest.raises(UserError, match="set engine: vllm, or placement: shared"):
        train(parse_config(values), tmp_path / "run")


def test_copies_teach_from_the_start_of_a_phase_and_a_run_goes_on_with_them(
    world: Path, tmp_path: Path
) -> None:
    method = {"snapshot": "phase", "shared_steps": 3}
    config = parse_config(copd_values(world, method=method, train={"save_every": 1}))
    assert forked(lambda: train(config, tmp_path / "whole")) == 0
    first, last = tensors(tmp_path / "whole", "step-000002"), tensors(tmp_path / "whole")
    for name, copied in last["role-sums-before"].items():
        assert torch.equal(copied, first["role-sums-before"][name])
    assert any(
        (last["role-sums"][n] != last["role-sums-before"][n]).any() for n in copied_names(last)
    )
    assert forked(lambda: stopped(config, tmp_path / "broken")) == 1
    assert forked(lambda: train(config, tmp_path / "broken", "latest")) == 0
    again = tensors(tmp_path / "broken")
    for file, values in last.items():
        assert all(torch.equal(again[file][name], value) for name, value in values.items())


def copied_names(found: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    return list(found["role-sums-before"])


def test_a_micro_batch_has_the_questions_of_each_skill_that_a_run_of_it_alone_has(
    world: Path,
) -> None:
    session = build(parse_config(copd_values(world, method={"beta": 0.0})), CPU)
    together = question_batches(session, questions(session), Distributed())(1)
    singles = {}
    for skill, file in (("sums", "questions.jsonl"), ("words", "words.jsonl")):
        other = build(parse_config(grpo_values(world, file, LORA)), CPU)
        singles[skill] = question_batches(other, questions(other), Distributed())(1)
    for batch in islice(together, 3):
        assert len(set(batch["ids"].tolist())) == 4
        parts = questions(session).by_skill(batch)
        for skill, single in singles.items():
            expected = next(single)
            assert parts[skill]["prompts"] == expected["prompts"]
            assert torch.equal(parts[skill]["ids"], expected["ids"])
    for stream in (together, *singles.values()):
        stream.close()


def test_one_model_learns_several_skills_from_as_many_questions_of_each(
    world: Path, tmp_path: Path
) -> None:
    values = copd_values(world, train={"steps": 1})
    values |= {"method": {"name": "grpo", "num_answers": 2, "max_tokens": 4}, "roles": {}}
    train(parse_config(values), tmp_path)
    assert tensors(tmp_path).keys() == {"role-student", "optimizer-student"}
    session = build(parse_config(values), CPU)
    seen = [example.origin.partition(":")[0] for example in seen_questions(session, 2)]
    assert seen == [str(world / "questions.jsonl")] * 2 + [str(world / "words.jsonl")] * 2


def test_experts_and_their_mean_are_measured_by_skill_and_the_mean_is_exported(
    world: Path, tmp_path: Path
) -> None:
    from diffdistill.commands.export import export

    train(parse_config(copd_values(world, train={"steps": 1})), tmp_path / "run")
    text = evaluate_answers(
        str(tmp_path / "run"),
        "latest",
        None,
        ["evaluate.roles=[base,student,sums]", "sample.max_tokens=4"],
    )
    assert "mean@1 words" in text
    assert text.startswith(f"{world / 'questions.jsonl'}, {world / 'words.jsonl'}, ")
    assert "mean@1 sums" in text
    export(tmp_path / "run", tmp_path / "model", layout="model")
    session = restore(tmp_path / "run", device=CPU)
    student = session.roles["student"]
    values = copd_values(world)
    values |= grpo_values(world, "words.jsonl", {}) | {"family": dict(values["family"])}
    values["family"]["path"] = str(tmp_path / "model")
    alone_ = build(parse_config(values), CPU).roles["student"]
    family = questions(session)
    batch = family.collate(list(read(session)), range(2))
    answers = family.given(batch)
    state, told = family.state(answers), family.condition(batch)
    with torch.no_grad():
        torch.testing.assert_close(
            dense(student(state, told)), dense(alone_(state, told)), rtol=1e-3, atol=1e-4
        )


def read(session: Any) -> Any:
    from diffdistill.data.questions import read_questions

    found = read_questions(session.config.data, Path(), [])
    return islice((example for example in found if example.solution), 2)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"skills": None, "path": "x"}}, "must name the data of at least two skills"),
        ({"data": {"skills": {"student": "a", "b": "c"}}}, "'student' is the name of another"),
        ({"data": {"skills": {"a.b": "a", "c": "c"}}}, "'a.b' has other characters"),
        ({"method": {"betas": {"sum": 1.0}}}, "there is no skill 'sum'; here: sums, words"),
    ],
)
def test_skills_that_do_not_go_together_are_refused(
    sections: dict[str, Any], message: str, world: Path
) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(copd_values(world, **sections) | {"roles": {}})


def test_a_set_and_skills_are_alternatives_and_all_experts_are_of_one_form(
    world: Path, tmp_path: Path
) -> None:
    values = copd_values(world, data={"path": "x"})
    with pytest.raises(UserError, match=r"data.skills is instead of data.path"):
        train(parse_config(values), tmp_path)
    values = copd_values(world)
    values["roles"]["words"] = {"adapter": "lora", "rank": 3, "alpha": 4}
    with pytest.raises(UserError, match=r"roles.student: a mean is of trained roles with the same"):
        build(parse_config(values), CPU)
    values["roles"] = {"student": {"adapter": "lora", "rank": 8}}
    with pytest.raises(UserError, match=r"roles.student.adapter: .* set adapter of each of them"):
        build(parse_config(values), CPU)


BY_SKILL: list[dict[str, Any]] = [
    {"name": "tests.answer_run:Length", "skill": "words", "scale": 3.0},
    {"name": "boxed", "skill": "sums"},
]


def test_each_skill_may_have_a_reward_of_its_own(world: Path, tmp_path: Path) -> None:
    values = copd_values(world, train={"steps": 1}) | {"rewards": BY_SKILL}
    config = parse_config(values)
    assert parse_config(config.to_dict()).rewards == config.rewards
    for method in ("copd", "grpo"):
        options = {"name": method, "num_answers": 2, "max_tokens": 4}
        changed = values | {"method": options} | ({} if method == "copd" else {"roles": {}})
        train(parse_config(changed), tmp_path / method)
    session = restore(tmp_path / "grpo", device=CPU)
    asked = [Example("?", answer="4", skill=skill) for skill in ("words", "sums", "words")]
    answers, judge = [r"\boxed{4}", r"\boxed{4}", "ab"], build_answer_reward(session.config, CPU)
    assert judge.score(answers, asked).tolist() == [27.0, 1.0, 6.0]
    assert judge.parsed(["a", "a", ""], asked).tolist() == [True, False, False]
    assert judge.parses(["a", ""]).tolist() == [True, False]
    with pytest.raises(UserError, match="of the skills words, sums, and this question is of none"):
        judge.score(["a"], [Example("?")])
    judge.check(Example("?", skill="words"))  # its length needs no answer
    with pytest.raises(UserError, match="there is no answer to verify by"):
        judge.check(Example("?", skill="sums"))


@pytest.mark.parametrize(
    "rewards", [BY_SKILL[:1], [*BY_SKILL, BY_SKILL[0]], [BY_SKILL[0], "boxed"]]
)
def test_there_is_one_reward_for_all_skills_or_one_for_each(rewards: Any, world: Path) -> None:
    with pytest.raises(UserError, match=r"one reward for each of data.skills \(sums, words\)"):
        parse_config(copd_values(world) | {"rewards": rewards})


def test_experts_do_not_judge_with_dropout(world: Path) -> None:
    values = copd_values(world, LORA | {"dropout": 0.1})
    with pytest.raises(UserError, match=r"roles.sums.dropout would make .* method.snapshot: phase"):
        build(parse_config(values), CPU)
    values["method"]["snapshot"] = "phase"
    method = build(parse_config(values), CPU).method
    assert isinstance(method, CoPD)
    assert method.peers["sums-before"].settings.dropout == 0.0


def test_only_methods_that_ask_questions_have_skills(world: Path) -> None:
    for name in ("text-sft", "sft"):
        values = {**copd_values(world), "method": {"name": name}, "roles": {}}
        with pytest.raises(UserError, match=f"data.skills is for .*, not for {name}: set data"):
            parse_config(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewarded_steps": 0, "shared_steps": 0}, "not both 0"),
        ({"scale_rewards": "batch"}, "would mix skills"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"betas": {"sums": -0.5}}, "beta must be at least 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(networks(1, 2), **options)

"""Engines that write the student's answers: the student's own, its weights as they are now."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.commands.train import dry_run, train
from diffdistill.config import load_config, parse_config
from diffdistill.draws import Draws
from diffdistill.errors import MissingExtra, UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.continuous import Continuous
from diffdistill.pipelines.engines import Asked, Engine, Generate, Written, answers_of_rows
from diffdistill.pipelines.prompts import prompt_condition
from diffdistill.pipelines.student_weights import Handover, fingerprint
from diffdistill.pipelines.vllm_engine import Vllm
from diffdistill.pipelines.vllm_server import VllmServer
from diffdistill.projection import dense
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Role
from diffdistill.rollouts import Answers, Sampling
from diffdistill.session import build
from diffdistill.types import State
from tests.answer_run import answer_values, save_answer_world
from tests.conftest import CPU, disturb
from tests.test_distributed import two_ranks
from tests.tiny_server import serving
from tests.tiny_vllm import FakeLLM, WritingServer, fake_modules
from tests.toy_run import losses

PROMPTS = ([65, 69, 90, 91, 67], [72], [40, 41, 42])
IDS = torch.tensor([3, 4, 9])
LORA = {"adapter": "lora", "rank": 2, "alpha": 6.0}
PLAIN = Sampling(max_tokens=6)
SHARP = Sampling(max_tokens=6, temperature=0.7, top_p=0.9, top_k=12)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_world(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def family(world: Path) -> CausalLM:
    return CausalLM(path=str(world / "student"), device=CPU)


@pytest.fixture
def server(family: CausalLM) -> Iterator[WritingServer]:
    served = WritingServer(family.network(), family.tokenizer, processed=True)
    with serving(served):
        yield served


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    for name, module in fake_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    FakeLLM.made.clear()
    return FakeLLM


def student_of(family: CausalLM, adapter: str, *, moved: bool = True) -> Role:
    settings = {"student": RoleSettings(**(LORA if adapter == "lora" else {}))}  # type: ignore[arg-type]
    student = build_roles(settings, family)["student"]
    if moved:
        disturb(student, seed=5, scale=0.05)
    return student


def answered(
    engine: Engine, family: CausalLM, student: Role, sampling: Sampling = PLAIN, rows: Any = None
) -> Answers:
    rows = range(len(PROMPTS)) if rows is None else rows
    told = prompt_condition([PROMPTS[row] for row in rows], family)
    with torch.no_grad(), student.acting(CPU):
        asked = Asked(told, IDS[list(rows)], sampling, Draws(0), "rollout")
        return engine.answers(family, student, asked)


def logprobs_of(student: Role, family: CausalLM, answers: Answers, sampling: Sampling) -> Tensor:
    """Return how likely the student itself is to sample each token, ``[B, A]``."""
    state = State(answers.tokens, torch.zeros(len(answers.tokens)), answers.mask)
    with torch.no_grad():
        logits = dense(student(state, prompt_condition(PROMPTS, family))) / sampling.temperature
    if sampling.top_k:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    ordered, places = logits.softmax(-1).sort(-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered > sampling.top_p
    logits = logits.masked_fill(beyond.gather(-1, places.argsort(-1)), -torch.inf)
    found = logits.log_softmax(-1).gather(-1, answers.tokens[..., None])[..., 0]
    return torch.where(answers.mask, found, 0.0)


def engine_of(name: str, server: WritingServer) -> Engine:
    if name == "vllm-server":
        return VllmServer(url=server.url, backoff=0.01)
    return {"transformers": Generate, "vllm": Vllm}[name]()


NAMES = ("transformers", "vllm", "vllm-server")


# every engine


@pytest.mark.parametrize("sampling", [PLAIN, SHARP], ids=["plain", "sharp"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_students_weights_as_they_are_now(
    name: str,
    adapter: str,
    sampling: Sampling,
    family: CausalLM,
    server: WritingServer,
    vllm: type[FakeLLM],
) -> None:
    engine, student = engine_of(name, server), student_of(family, adapter)
    for seed in (1, 2):  # as after two steps of training
        found = answered(engine, family, student, sampling)
        expected = logprobs_of(student, family, found, sampling)
        assert found.logprobs is not None
        torch.testing.assert_close(found.logprobs, expected, rtol=1e-4, atol=1e-4)
        disturb(student, seed=seed, scale=0.05)
        assert not torch.allclose(logprobs_of(student, family, found, sampling), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_answer_is_that_of_its_number_and_not_of_its_batch(
    name: str, family: CausalLM, server: WritingServer, vllm: type[FakeLLM]
) -> None:
    engine, student = engine_of(name, server), student_of(family, "lora")
    whole, parts = (
        answered(engine, family, student),
        [answered(engine, family, student, rows=[row]) for row in range(3)],
    )
    for row, part in enumerate(parts):
        assert torch.equal(part.tokens[0][part.mask[0]], whole.tokens[row][whole.mask[row]])
        assert part.ended[0] == whole.ended[row]


def test_continuous_batching_writes_what_the_student_finds_likely(family: CausalLM) -> None:
    student = student_of(family, "lora")
    engine = Continuous(memory_share=0.001, batch_tokens=64)
    state, modes = torch.get_rng_state(), [m.training for m in student.network.modules()]
    attention = student.network.config._attn_implementation
    found = answered(engine, family, student, SHARP)
    assert found.logprobs is not None
    torch.testing.assert_close(
        found.logprobs, logprobs_of(student, family, found, SHARP), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(answered(engine, family, student, SHARP).tokens, found.tokens)
    assert torch.equal(torch.get_rng_state(), state)  # dropout is drawn from there
    assert [m.training for m in student.network.modules()] == modes
    assert student.network.config._attn_implementation == attention
    likely = Sampling(max_tokens=6, temperature=0.0)
    one, other = (answered(e, family, student, likely) for e in (engine, Generate()))
    assert torch.equal(one.tokens[one.mask], other.tokens[other.mask])


# what an engine wrote


def test_what_was_written_ends_with_its_first_end_token_and_before_a_token_that_is_none(
    family: CausalLM,
) -> None:
    end, none = family.end_ids[0], family.words
    rows = [
        Written([5, end, 6], [-1.0, -2.0, -3.0]),
        Written([5, 6, none, end], [-1.0, -2.0, -3.0, -4.0]),
        Written([none], [-1.0]),
        Written([5, 6, 7, 8, 9], [-1.0] * 5),
    ]
    found = answers_of_rows(rows, family, Sampling(max_tokens=4))
    assert found.mask.sum(1).tolist() == [2, 2, 0, 4]
    assert found.ended.tolist() == [True, False, False, False]
    assert found.logprobs is not None
    assert found.logprobs[0].tolist() == [-1.0, -2.0, 0.0, 0.0]
    assert (found.tokens[~found.mask] == family.pad_id).all()


def test_any_changed_bit_of_a_students_weights_is_noticed(family: CausalLM) -> None:
    student = student_of(family, "none")
    before = fingerprint(student)
    assert fingerprint(student) == before
    weight = next(iter(student.parameters().values())).detach()
    weight.view(-1).view(torch.int32).numpy()[7] ^= 1  # behind torch's back
    assert fingerprint(student) != before


def test_weights_are_handed_over_once_and_one_folder_is_kept(
    family: CausalLM, tmp_path: Path
) -> None:
    student, handover = student_of(family, "lora"), Handover(str(tmp_path))
    for number in range(3):
        disturb(student, seed=number, scale=0.1)
        assert handover.due(student)
        with handover.written(family, student) as folder:
            assert (folder / "adapter_model.safetensors").is_file()
        assert not handover.due(student)
        assert [path.name for path in tmp_path.iterdir()] == [handover.label]
    disturb(student, seed=9, scale=0.1)
    assert handover.due(student)
    with pytest.raises(KeyError), handover.written(family, student):
        raise KeyError
    assert handover.due(student)  # it did not arrive
    assert [path.name for path in tmp_path.iterdir()] == [handover.label]


@pytest.mark.parametrize(
    ("engine", "adapter"),
    [("vllm", "dora"), ("vllm", "shadow"), ("vllm-server", "dora"), ("continuous", "shadow")],
)
def test_adapters_that_an_engine_cannot_run_are_refused_before_it_is_started(
    engine: str, adapter: str, world: Path
) -> None:
    student = {**LORA, "dora": True} if adapter == "dora" else {"adapter": adapter}
    values = answer_values(world, engine={"name": engine}, roles={"student": student})
    with pytest.raises(UserError, match=f"student: engine {engine} .* not with {adapter}: set eng"):
        build(parse_config(values), CPU)
    build(parse_config(values | {"engine": "transformers"}), CPU)


# vLLM in the process


def test_vllm_sleeps_between_rollouts_and_loads_only_what_changed(
    family: CausalLM, vllm: type[FakeLLM]
) -> None:
    engine, student = Vllm(memory_share=0.2, max_length=99), student_of(family, "none")
    answered(engine, family, student)
    answered(engine, family, student)
    (llm,) = vllm.made
    loaded = ["reload_weights", "reset_prefix_cache"]
    assert llm.calls == [
        "sleep 1", "wake_up", *loaded, "generate", "sleep 1", "wake_up", "generate", "sleep 1",
    ]  # fmt: skip
    expected = {"gpu_memory_utilization": 0.2, "max_model_len": 99, "dtype": "float32"}
    assert llm.options.items() >= expected.items()
    assert llm.options["logprobs_mode"] == "processed_logprobs"


def test_vllm_is_given_an_adapter_as_one(family: CausalLM, vllm: type[FakeLLM]) -> None:
    engine, student = Vllm(sleep=False), student_of(family, "lora")
    answered(engine, family, student)
    (llm,) = vllm.made
    assert llm.calls == ["generate"]
    assert llm.options["max_lora_rank"] == 8


def test_without_vllm_there_is_one_line_that_says_how_to_install_it(world: Path) -> None:
    with pytest.raises(MissingExtra, match=r'pip install "diffdistill\[vllm\]"'):
        dry_run(parse_config(answer_values(world, engine={"name": "vllm"})))


# a server


def test_a_server_is_asked_in_tokens_for_exactly_the_methods_sampling(
    family: CausalLM, server: WritingServer
) -> None:
    answered(VllmServer(url=server.url), family, student_of(family, "none"), SHARP)
    *_, body = server.asked
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 12, "min_p": 0.0, "max_tokens": 6}
    assert body.items() >= (expected | {"repetition_penalty": 1.0, "ignore_eos": True}).items()
    assert body["stop_token_ids"] == family.end_ids
    assert isinstance(body["prompt"][0], int)
    assert body["cache_salt"]


def test_a_server_has_one_adapter_at_a_time_and_one_that_was_lost_is_no_error(
    family: CausalLM, server: WritingServer
) -> None:
    engine, student = VllmServer(url=server.url), student_of(family, "lora")
    answered(engine, family, student)
    disturb(student, seed=1)
    answered(engine, family, student)
    assert len(server.loads) == 2
    assert list(server.adapters) == server.loads[1:]
    server.adapters.clear()  # it was started anew
    disturb(student, seed=2)
    answered(engine, family, student)
    assert len(server.adapters) == 1


def test_several_answers_are_asked_for_at_the_same_time(
    family: CausalLM, server: WritingServer
) -> None:
    student = student_of(family, "none")
    for concurrency in (1, 3):
        server.most, server.delay = 0, 0.05
        answered(VllmServer(url=server.url, concurrency=concurrency), family, student)
        assert server.most == concurrency


def test_a_server_that_fails_for_a_moment_is_asked_again(
    family: CausalLM, server: WritingServer
) -> None:
    engine, student = VllmServer(url=server.url, backoff=0.01), student_of(family, "lora")
    expected = answered(engine, family, student)
    server.replies += [(503, "busy"), (0, ""), (500, "oops")]
    assert torch.equal(answered(engine, family, student).tokens, expected.tokens)
    disturb(student, seed=1)
    server.replies += [(0, "")]  # while weights are handed over
    answered(engine, family, student)


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no development mode": ({"dev": False}, "none", "VLLM_SERVER_DEV_MODE=1"),
    "no adapters": ({"lora": False}, "lora", "--enable-lora and --max-lora-rank"),
    "another model": ({"names": ("a", "b")}, "none", "model is not set; it serves a, b"),
    "raw log-probabilities": ({"processed": False}, "none", "--logprobs-mode processed_logprobs"),
    "texts": ({"texts": True}, "none", "return_tokens_as_token_ids"),
    "silence": ({"delay": 1.0}, "none", "did not answer within 0.2 s"),
    "no number": ({"shift_logprobs": float("nan")}, "none", "nan as a log-probability"),
    "above 0": ({"shift_logprobs": 99.0}, "none", "as a log-probability"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_server_is_said_in_one_line_with_what_to_do(
    name: str, family: CausalLM, server: WritingServer
) -> None:
    wrong, adapter, message = FAULTS[name]
    for key, value in wrong.items():
        setattr(server, key, value)
    engine = VllmServer(
        url=server.url, backoff=0.01, retries=1, timeout=0.2 if "delay" in wrong else 9
    )
    with pytest.raises(UserError, match=message) as caught:
        answered(engine, family, student_of(family, adapter), SHARP)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_is_an_error_before_training(world: Path) -> None:
    engine = {"name": "vllm-server", "url": "http://127.0.0.1:9/v1", "retries": 0}
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1/models cannot be reached"):
        dry_run(parse_config(answer_values(world, engine=engine)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vllm-server", "url": "localhost:8000"}, "url must be the address"),
        ({"name": "vllm-server", "timeout": 0}, "timeout must be above 0"),
        ({"name": "vllm", "memory_share": 1.5}, r"memory_share must be in \(0, 1\)"),
        ({"name": "continuous", "memory_share": 0}, r"memory_share must be in \(0, 1\]"),
        ({"name": "vlm"}, "did you mean 'vllm'"),
        ({"name": "vllm", "memory": 1}, "unknown key"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    options: dict[str, Any], message: str, world: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build(parse_config(answer_values(world, engine=options)))


def test_only_a_method_whose_student_answers_has_an_engine() -> None:
    with pytest.raises(UserError, match="engine: only autoregressive language models"):
        load_config("sft/digits", ["engine=vllm"])


# runs


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_with_a_server_gives_it_the_weights_of_each_step(
    adapter: str, world: Path, tmp_path: Path, server: WritingServer
) -> None:
    values = answer_values(
        world,
        engine={"name": "vllm-server", "url": server.url, "folder": str(tmp_path / "weights")},
        method={"name": "opd", "num_answers": 2, "max_tokens": 6},
        roles={
            "student": LORA if adapter == "lora" else {},
            "teacher": {"path": str(world / "other")},
        },
        train={"steps": 3, "accumulate": 2},
    )
    train(parse_config(values), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3
    assert len(server.loads) == 3  # and not for each micro-batch
    assert len(list((tmp_path / "weights").iterdir())) == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    gaps = [json.loads(line)["sampler_gap/student"] for line in lines]
    assert max(gaps) < 1e-4


@pytest.mark.parametrize("rank", [0, 1])
def test_what_goes_wrong_in_the_rank_that_gives_the_weights_ends_all(
    rank: int, family: CausalLM, server: WritingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[str]] = []

    def broadcast(told: list[str], src: int) -> None:
        sent.append(list(told))
        told[:] = ["", "the server is down"] if rank else told

    def down(*_: Any) -> None:
        raise UserError("the server is down")

    where = "diffdistill.pipelines.vllm_server.dist."
    monkeypatch.setattr(f"{where}is_initialized", lambda: True)
    monkeypatch.setattr(f"{where}get_world_size", lambda: 2)
    monkeypatch.setattr(f"{where}get_rank", lambda: rank)
    monkeypatch.setattr(f"{where}broadcast_object_list", broadcast)
    monkeypatch.setattr(VllmServer, "_given", down)
    engine = VllmServer(url=server.url, backoff=0.01)
    with pytest.raises(UserError, match="the server is down"):
        answered(engine, family, student_of(family, "lora"))
    assert sent == [["", "" if rank else "the server is down"]]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_two_ranks_share_a_server_which_one_of_them_gives_the_weights(
    adapter: str, world: Path, tmp_path: Path, server: WritingServer
) -> None:
    def values(size: int) -> dict[str, Any]:
        return answer_values(
            world,
            engine={"name": "vllm-server", "url": server.url},
            method={"name": "opd", "max_tokens": 6},
            roles={
                "student": LORA if adapter == "lora" else {},
                "teacher": {"path": str(world / "other")},
            },
            data={"batch_size": size},
            train={"steps": 2, "clip": 0.05},
        )

    train(parse_config(values(4)), tmp_path / "one")
    alone, first = losses(tmp_path / "one"), len(server.loads)
    printed = two_ranks("ddp", values(2), tmp_path / "two")
    assert printed.startswith("exit 0"), printed
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=1e-4)
    assert first == len(server.loads) - first == 2


@pytest.mark.slow
def test_weights_that_are_spread_over_processes_are_refused(
    world: Path, tmp_path: Path, server: WritingServer
) -> None:
    engine = {"name": "vllm-server", "url": server.url}
    values = answer_values(world, engine=engine, method={"name": "opsd", "max_tokens": 3})
    printed = two_ranks("fsdp2", values, tmp_path / "run")
    assert "engine vllm-server needs the student's whole weights in each process" in printed


def test_an_engine_is_asked_the_same_whatever_exposure_gate_and_extrapolation_are(
    world: Path, tmp_path: Path, server: WritingServer
) -> None:
    told = []
    for number, options in enumerate(
        (
            {"exposure": 0.0, "strength": 1.0, "gate_beta": 0.0},
            {"exposure": 1.0, "strength": 1.7, "gate_beta": 9.0, "gate_scale": "centered"},
        )
    ):
        server.requests.clear()
        values = answer_values(
            world,
            engine={"name": "vllm-server", "url": server.url, "concurrency": 1},
            method={"name": "egx", "max_tokens": 4, "exposure_policy": "fixed", **options},
            train={"steps": 1},
        )
        train(parse_config(values), tmp_path / str(number))
        told.append([(body["prompt"], body["seed"]) for body in server.asked if "seed" in body])
    assert len(told[0]) == 2
    assert told[0] == told[1]


def test_an_engine_may_be_named_alone() -> None:
    config = load_config("opd/arithmetic", ["engine=continuous"])
    assert config.engine == {"name": "continuous", "memory_share": 0.3, "batch_tokens": None}
    assert load_config("opd/arithmetic").engine == {"name": "transformers"}

"""A teacher behind a server: the same as one at hand, and every way in which a server can fail."""

import json
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.train import dry_run, train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.json_server import JsonServer
from diffdistill.pipelines.prompts import prompt_condition
from diffdistill.pipelines.server import Server
from diffdistill.provenance.files import open_record
from diffdistill.session import Session, build
from diffdistill.supports import TopK, top_logprobs
from diffdistill.types import Example, State
from tests.answer_run import ROWS, answer_values, save_answer_world
from tests.conftest import CPU, START, gradients
from tests.test_distributed import two_ranks
from tests.tiny_server import TinyServer, serving
from tests.toy_run import losses

PROMPTS = ([65, 69, 90, 91, 67], [72], [40, 41, 42], [50, 51])
ANSWERS = ([50, 60, 70, 80], [51, 61, 71, 81], [52, 62, 72, 82], [53, 63, 73, 83])
LENGTHS = (4, 3, 1, 0)
PROTOCOLS = ("vllm", "sglang", "openai")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_world(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def teacher(world: Path) -> CausalLM:
    return CausalLM(path=str(world / "other"), device=CPU)


@pytest.fixture(scope="module")
def network(teacher: CausalLM) -> Any:
    return teacher.network()


@pytest.fixture
def server(teacher: CausalLM, network: Any) -> Iterator[TinyServer]:
    with serving(TinyServer(network, teacher.tokenizer)) as served:
        yield served


def family_of(server: TinyServer, world: Path, **options: Any) -> Server:
    chosen = {"tokenizer_path": str(world / "student"), "backoff": 0.01, "top_k": 5, **options}
    return Server(**{"path": server.url, "device": CPU} | chosen)


def state_of() -> State:
    tokens = torch.tensor(ANSWERS)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return State(tokens, torch.zeros(len(tokens)), mask)


def predicted(family: Server, state: State | None = None) -> TopK:
    told = prompt_condition(PROMPTS, family)
    found = family.predict(family.network(), state or state_of(), told)
    assert isinstance(found, TopK)
    return found


# what is predicted


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_says_of_each_answer_what_its_model_says_at_hand(
    protocol: str, server: TinyServer, world: Path, teacher: CausalLM, network: Any
) -> None:
    found = predicted(family_of(server, world, protocol=protocol))
    state = state_of()
    at_hand = teacher.predict(network, state, prompt_condition(PROMPTS, teacher))
    expected = top_logprobs(at_hand, 5, tokens=state.x, mask=state.mask)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    assert found.tokens is not None
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=1e-5)
    outside = (found.ids != state.x[..., None]).all(-1)[state.mask]
    assert outside.any()  # of the tokens here, some are not among the most likely


def test_only_answers_are_asked_for_and_as_tokens_without_padding(
    server: TinyServer, world: Path
) -> None:
    predicted(family_of(server, world))
    sent = sorted(body["prompt"] for body in server.asked)
    pairs = zip(PROMPTS, ANSWERS, LENGTHS, strict=True)
    assert sent == sorted([*p, *a[:n]] for p, a, n in pairs if n)


def test_without_a_mask_every_token_is_asked_for(server: TinyServer, world: Path) -> None:
    found = predicted(family_of(server, world), state_of()._replace(mask=None))
    assert found.tokens is not None
    assert (found.tokens < 0).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_with_sampling_defaults_of_its_own_is_asked_for_none(
    protocol: str, server: TinyServer, world: Path
) -> None:
    plain = predicted(family_of(server, world, protocol=protocol))
    server.processed, server.defaults = True, {"temperature": 0.5, "top_k": 3}
    found = predicted(family_of(server, world, protocol=protocol))
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one, other)


def test_answers_are_asked_about_at_the_same_time_but_not_too_many(
    server: TinyServer, world: Path
) -> None:
    server.meeting = threading.Barrier(2, timeout=60)
    predicted(family_of(server, world, concurrency=2), state_of()._replace(mask=None))
    assert server.most == 2


def test_tokens_that_are_named_by_their_text_are_found_where_they_are_one(
    server: TinyServer, world: Path
) -> None:
    family = family_of(server, world, protocol="openai")
    assert family.token_id("A") == family.tokenizer.convert_tokens_to_ids("A")
    server.texts = True
    with pytest.raises(UserError, match="'\ufffd' is not that of one token: use protocol vllm"):
        predicted(family)


# methods


def server_of(server: TinyServer, **options: Any) -> dict[str, Any]:
    chosen = {"name": "server", "path": server.url, "backoff": 0.01, **options}
    return {"teacher": {"family": chosen}}


def session_of(world: Path, roles: dict[str, Any], **method: Any) -> Session:
    chosen = {"name": "opd", "max_tokens": 6, "num_answers": 2, **method}
    return build(parse_config(answer_values(world, method=chosen, roles=roles)), CPU)


def step_of(session: Session) -> tuple[float, dict[str, Tensor]]:
    rows = [Example("", messages=tuple(ROWS[0]["messages"])), Example("", messages=QUESTION)]
    [loss] = session.method.losses(session.family.collate(rows, [0, 1]), START)
    loss.value.backward()
    return loss.value.item(), gradients(session.roles["student"])


QUESTION = ({"role": "user", "content": "what is 3+5, and why?"},)

OPTIONS: dict[str, dict[str, Any]] = {
    "reverse": {"support": "teacher", "support_size": 7},
    "hybrid": {"support": "teacher", "correction": "hybrid"},
    "tail": {"support": "teacher", "correction": "tail", "divergence": "forward-kl"},
    "intersection": {"support": "intersection", "correction": "renorm", "divergence": "jsd"},
    "sampled": {"divergence": "sampled", "baseline": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_student_learns_from_a_server_what_it_learns_from_a_teacher_at_hand(
    name: str, server: TinyServer, world: Path
) -> None:
    at_hand = {"teacher": {"family": {"name": "causal-lm", "path": str(world / "other")}}}
    value, slopes = step_of(session_of(world, at_hand, **OPTIONS[name]))
    found, gradient = step_of(session_of(world, server_of(server), **OPTIONS[name]))
    assert found == pytest.approx(value, abs=1e-4)
    assert gradient.keys() == slopes.keys()
    for key, slope in slopes.items():
        torch.testing.assert_close(gradient[key], slope, rtol=1e-4, atol=1e-4)
    assert max(slope.abs().max() for slope in slopes.values()) > 1e-3


def test_a_run_with_a_server_is_the_run_with_its_model_and_keeps_none_of_it(
    server: TinyServer, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = {}
    at_hand = {"teacher": {"family": {"name": "causal-lm", "path": str(world / "other")}}}
    for name, roles in (("server", server_of(server)), ("at-hand", at_hand)):
        method = {"name": "opd", "support": "teacher", "max_tokens": 6}
        values = answer_values(
            world, method=method, roles=roles, train={"steps": 2, "gradient_checkpointing": True}
        )
        train(parse_config(values), tmp_path / name)
        found[name] = losses(tmp_path / name)
    assert found["server"] == pytest.approx(found["at-hand"], rel=1e-4)
    assert not any("teacher" in key for key in Checkpoints(tmp_path / "server").load()[0].tensors)
    line = json.loads((tmp_path / "server/metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line["teacher_mass/student"] <= 1
    assert open_record(tmp_path / "server")["teachers"][0]["id"] == "tiny"
    assert not caplog.records


@pytest.mark.slow
def test_two_ranks_ask_a_server_each_for_its_rows(
    server: TinyServer, world: Path, tmp_path: Path
) -> None:
    method = {"name": "opd", "support": "teacher", "max_tokens": 6}
    runs = {
        size: answer_values(
            world,
            method=method,
            roles=server_of(server),
            data={"batch_size": size},
            train={"steps": 2, "clip": 0.05},
        )
        for size in (2, 4)
    }
    train(parse_config(runs[4]), tmp_path / "one")
    alone = sorted(body["prompt"] for body in server.asked)
    server.requests.clear()
    printed = two_ranks("fsdp2", runs[2], tmp_path / "two")
    assert printed.startswith("exit 0"), printed
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(server.asked) == len(alone) + 1  # that of a check more


def test_a_dry_run_counts_no_parameters_of_a_server(server: TinyServer, world: Path) -> None:
    method = {"name": "opd", "support": "teacher", "max_tokens": 3}
    text = dry_run(parse_config(answer_values(world, method=method, roles=server_of(server))))
    assert "one step: loss/student" in text
    [row] = [line for line in text.splitlines() if "teacher" in line and "frozen" in line]
    assert " 0 " in row


def test_obligations_are_those_of_the_model_that_the_server_has(
    server: TinyServer, world: Path
) -> None:
    server.names = ("meta-llama/Llama-3.3-70B-Instruct",)
    values = answer_values(world, method={"name": "opd", "support": "teacher"})
    values |= {"roles": server_of(server), "provenance": {"policy": "error"}}
    with pytest.raises(UserError, match=r"open obligations: .*llama-3\.3/name; set") as refused:
        dry_run(parse_config(values))
    assert "unnamed" not in str(refused.value)


def test_a_server_that_is_down_is_in_the_way_of_training_alone(
    server: TinyServer, world: Path, tmp_path: Path
) -> None:
    roles = server_of(server, path=down(), retries=0)
    assert session_of(world, roles, support="teacher").roles["teacher"].parameters() == {}
    method = {"name": "opd", "support": "teacher"}
    with pytest.raises(UserError, match=r"cannot be reached: Connection refused \(1 try in"):
        train(parse_config(answer_values(world, method=method, roles=roles)), tmp_path)


@pytest.mark.parametrize(
    ("method", "role", "message"),
    [
        ({"support_size": 30}, {}, "support_size is 30, and roles.teacher.family.top_k is 20"),
        ({"support": "full"}, {}, "support: full needs the teacher's whole prediction"),
        ({"support": "student"}, {}, "support: student needs the teacher's whole prediction"),
        ({"temperature": 1.1}, {}, "temperature is 1.1, and a server gives log-probabilities at 1"),
        (
            {"off_policy": "teacher", "on_policy_share": 0.5},
            {},
            "off_policy: teacher needs a teacher that writes, and a server only judges",
        ),
        ({"select": "soft-or"}, {}, "select: soft-or needs the teacher's whole prediction"),
        ({"name": "exopd", "support": "full"}, {}, "method exopd needs the teacher's whole"),
        ({"name": "tests.answer_run:Follow"}, {}, "Follow needs the teacher's whole prediction"),
        ({}, {"weights": "trained"}, "a server cannot be trained: set weights: frozen"),
        ({}, {"path": "weights"}, "a server has its own weights, not those of weights"),
    ],
)
def test_what_a_server_cannot_do_is_said_before_it_is_asked(
    method: dict[str, Any], role: dict[str, Any], message: str, server: TinyServer, world: Path
) -> None:
    options = {"name": "opd", "support": "teacher"} | method
    if options["name"].startswith("tests"):
        options = {"name": options["name"]}
    roles = server_of(server)
    roles["teacher"] |= role
    with pytest.raises(UserError, match=message) as caught:
        build(parse_config(answer_values(world, method=options, roles=roles)), CPU)
    assert "\n" not in str(caught.value)
    assert not server.requests


def test_a_server_is_no_student(server: TinyServer, world: Path) -> None:
    values = answer_values(world, family={"name": "server", "path": server.url})
    with pytest.raises(UserError, match=r"it needs a family such as .* causal-lm, not server"):
        build(parse_config(values), CPU)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("top_k", 0),
        ("timeout", 0.0),
        ("retries", -1),
        ("backoff", -1.0),
        ("concurrency", 0),
        ("path", "localhost:8000/v1"),
        ("path", "http://me:secret@host/v1"),
        ("path", "http://host:port/v1"),
    ],
)
def test_an_option_that_cannot_be_is_named(
    option: str, value: Any, server: TinyServer, world: Path
) -> None:
    with pytest.raises(UserError, match=f"{option} must be") as caught:
        family_of(server, world, **{option: value})
    assert "secret" not in str(caught.value)


# failures


def down() -> str:
    """Return an address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_a_failure_that_passes_is_asked_again(status: int, server: TinyServer, world: Path) -> None:
    family = family_of(server, world)
    family.check()
    expected = predicted(family)
    server.requests.clear()
    server.replies = [(status, "")] * 2
    for one, other in zip(predicted(family), expected, strict=True):
        assert torch.equal(one, other)
    assert len(server.requests) == 3 + 2


def test_a_failure_that_stays_ends_after_the_last_try(server: TinyServer, world: Path) -> None:
    server.replies = [(503, {"error": {"message": "loading"}})] * 9
    with pytest.raises(UserError, match=r"answered HTTP 503: loading \(3 tries in") as caught:
        family_of(server, world, retries=2).check()
    assert len(server.requests) == 3
    assert server.url in str(caught.value)


def test_a_server_that_is_down_is_named_with_how_to_start_one(
    server: TinyServer, world: Path
) -> None:
    address = down()
    with pytest.raises(UserError, match="cannot be reached: Connection refused") as caught:
        family_of(server, world, path=address, retries=1).check()
    assert address in str(caught.value)
    assert "vllm serve" in str(caught.value)


def test_a_server_that_is_slow_is_given_up(server: TinyServer, world: Path) -> None:
    server.delay = 1.0
    with pytest.raises(UserError, match=r"did not answer within 0.2 s \(2 tries .*raise timeout"):
        family_of(server, world, timeout=0.2, retries=1).check()


@pytest.mark.parametrize(
    ("options", "switches", "message"),
    [
        ({"model": "huge"}, {"names": ["a", "b"]}, "there is no model huge; it serves a, b"),
        ({}, {"names": ["a", "b"]}, "model is not set; it serves a, b"),
        ({}, {"max_logprobs": 3}, "max allowed: 3.* start vLLM with --max-logprobs 5"),
        ({}, {"fewer": 2}, "gave [34] log-probabilities at a token.*--max-logprobs 5.*lower top_k"),
        ({}, {"value": None}, "gave None as a log-probability"),
        ({}, {"value": math.nan}, "gave nan as a log-probability"),
        ({}, {"value": 12.5}, "gave 12.5 as a log-probability: .*--logprobs-mode raw_logprobs"),
        ({}, {"value": 0.0}, "sum to more than 1"),
        ({}, {"shift": 1000}, r"knows a token 1\d{3}, and the tokenizer has .*other vocabulary"),
        ({}, {"echo": "Words of another kind"}, "has another vocabulary"),
        ({}, {"key": "hidden"}, "HTTP 401: Unauthorized: set api_key_variable"),
        ({"api_key_variable": "ABSENT_KEY"}, {}, "ABSENT_KEY, which is not in the environment"),
        ({"protocol": "sglang"}, {"names": []}, "model is not set; it serves none"),
        ({}, {"replies": [(200, "<html>")]}, "did not answer in JSON: is its API at"),
        ({}, {"replies": [(200, {"models": []})]}, "gave no list of models"),
        ({}, {"replies": [(307, "")]}, "answered HTTP 307"),
        ({}, {"replies": [(404, "<html>")]}, "HTTP 404: Not Found: is its API at .*v1"),
        ({}, {"replies": [(400, {"detail": [{"msg": "no", "input": "x"}]})]}, "HTTP 400: no$"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_server_is_one_clear_line(
    options: dict[str, Any], switches: dict[str, Any], message: str, server: TinyServer, world: Path
) -> None:
    for name, value in switches.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=message) as caught:
        family_of(server, world, **options).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("protocol", "answer", "message"),
    [
        ("vllm", {"choices": [{"text": ""}]}, "does not speak protocol vllm"),
        ("vllm", {"choices": []}, "gave no choices"),
        ("vllm", {"choices": [{"prompt_logprobs": [None]}]}, "1 places of a text of"),
        ("sglang", {"text": ""}, "does not speak protocol sglang"),
        ("openai", {"choices": [{"logprobs": None}]}, "does not speak protocol openai"),
    ],
)
def test_an_answer_of_another_kind_is_an_error(
    protocol: str, answer: Any, message: str, server: TinyServer, world: Path
) -> None:
    family = family_of(server, world, protocol=protocol, concurrency=1)
    family.check()
    server.replies = [(200, answer)]
    with pytest.raises(UserError, match=message):
        predicted(family)


def test_other_tokens_than_were_sent_are_an_error(server: TinyServer, world: Path) -> None:
    family = family_of(server, world, concurrency=1)
    family.check()
    row = {str(i): {"logprob": -3.0} for i in range(5)}
    rows = [None, *[row] * (len(PROMPTS[0]) + len(ANSWERS[0]) - 1)]
    server.replies = [(200, {"choices": [{"prompt_logprobs": rows}]})]
    with pytest.raises(UserError, match="log-probabilities of other tokens than it was sent"):
        predicted(family)


def test_neither_key_nor_tokens_are_in_an_error(
    server: TinyServer, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "hidden-key")
    server.key = "hidden-key"
    family = family_of(server, world, api_key_variable="TEACHER_KEY", concurrency=1)
    family.check()
    assert all(h["Authorization"] == "Bearer hidden-key" for _, h, _ in server.requests)
    server.replies = [(400, f"hidden-key may not ask about {[*PROMPTS[0], *ANSWERS[0]]}")]
    with pytest.raises(UserError, match=r"\*\*\* may not ask about \[\.\.\.\]$") as caught:
        predicted(family)
    assert "hidden-key" not in str(caught.value)
    assert "hidden-key" not in repr(caught.value.__cause__)


def test_a_key_that_cannot_be_sent_is_refused_and_none_is_ever_shown(
    server: TinyServer, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "hidden\nkey")
    with pytest.raises(UserError, match="characters that cannot be sent") as caught:
        family_of(server, world, api_key_variable="TEACHER_KEY").check()
    assert "hidden" not in str(caught.value)
    assert "hidden" not in repr(JsonServer(server.url, key="hidden"))


def test_a_failure_leaves_the_questions_that_wait_unasked(server: TinyServer, world: Path) -> None:
    family = family_of(server, world, concurrency=1)
    family.check()
    server.requests.clear()
    server.replies = [(400, "no")]
    with pytest.raises(UserError, match="HTTP 400: no"):
        predicted(family)
    assert len(server.requests) < 3

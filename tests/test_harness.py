"""Text models in lm-evaluation-harness, on tasks in local files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffdistill import cli
from diffdistill.answering import Prompt, decoded, encoded, language_family, spelled, write
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.evaluation.harness import DiffusionLM, cut_at, rolling, run_tasks, weights_digest
from diffdistill.evaluation.likelihood import MonteCarlo, Pair, bound_pairs
from diffdistill.evaluation.text_settings import TextEvaluateSettings
from diffdistill.pipelines.block_sampling import Past
from diffdistill.roles import Role
from diffdistill.sample_settings import TextSampleSettings
from diffdistill.session import Session, build
from tests.conftest import CPU, disturb
from tests.text_run import save_world, text_values

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QUESTIONS = [
    {"question": "first letter", "choices": ["a", "b"], "answer": 0, "text": "x = a"},
    {"question": "second letter", "choices": ["a", "b"], "answer": 1, "text": "y = b + 1"},
    {"question": "print", "choices": ["c", "d"], "answer": 0, "text": "print(c)"},
]
KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "continue": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}:",
        "doc_to_target": "{{choices[answer]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tasks, and their questions in a file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    for name, kind in KINDS.items():
        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "fewshot_split": "test",
            **kind,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def session_of(world: Path, **sections: Any) -> Session:
    return build(parse_config(text_values(world, **sections)), CPU)


def asked(tasks: Path, *names: str, **options: Any) -> TextEvaluateSettings:
    given = {"num_draws": 4, "tasks": [f"local_{n}" for n in names], "task_paths": [str(tasks)]}
    return TextEvaluateSettings(**(given | options))


class Request:
    """What the harness asks with."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def wrapped(role: Role, **options: Any) -> DiffusionLM:
    settings = TextEvaluateSettings(**({"num_draws": 4} | options))
    return DiffusionLM(role, TextSampleSettings(max_tokens=8), settings)


@torch.no_grad()
def next_token(role: Role, context: list[int]) -> torch.Tensor:
    """Return log-probabilities of the token after a context, from a block that is all hidden."""
    family = language_family(role)
    pads = torch.tensor([-len(context) % 4])
    past = Past(role.network, 4, pads, "sdpa")
    past.append(torch.tensor([[family.pad_id] * int(pads) + context]))
    logits = past.logits(torch.full((1, 4), family.mask_id))[0, 0]
    logits[family.mask_id] = -torch.inf
    return logits.log_softmax(-1)


def test_a_choice_of_one_token_has_the_models_own_log_probability(world: Path, tasks: Path) -> None:
    role = session_of(world).roles["student"]
    family = language_family(role)
    results = run_tasks(role, TextSampleSettings(), asked(tasks, "choice"))
    right = 0
    for row, question in zip(results["samples"]["local_choice"], QUESTIONS, strict=True):
        expected = next_token(role, encoded(family, f"{question['question']}:"))
        ids = [encoded(family, choice)[0] for choice in question["choices"]]
        found = [float(value) for value, _ in row["filtered_resps"]]
        torch.testing.assert_close(found, expected[ids].tolist(), rtol=1e-4, atol=1e-4)
        greedy = [bool(flag) for _, flag in row["filtered_resps"]]
        assert greedy == [int(expected.argmax()) == token for token in ids]
        right += max(range(2), key=lambda n: found[n]) == question["answer"]
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(right / 3)
    assert results["likelihood_error"] < 1e-6


def test_a_longer_continuation_has_the_bound_of_its_tokens(world: Path) -> None:
    role = session_of(world).roles["student"]
    family = language_family(role)
    lm = wrapped(role, num_draws=200)
    [(value, _)] = lm.loglikelihood([Request("def add(", "first, second):")])
    whole, context = encoded(family, "def add(first, second):"), encoded(family, "def add(")
    pair = Pair(context, whole[len(context) :], 1)
    chosen = MonteCarlo(num_draws=200, antithetic=True, seed=9, batch_size=1)
    [expected] = bound_pairs(role, [pair], chosen)
    assert len(pair.target) > 3
    assert abs(value + float(expected.value)) < 6 * float(expected.error)
    assert lm.errors[0] == pytest.approx(float(expected.error), rel=0.3)


def test_spaces_before_a_continuation_are_part_of_it(world: Path) -> None:
    role = session_of(world).roles["student"]
    lm = wrapped(role)
    values = lm.loglikelihood([Request("return ", "first"), Request("return", " first")])
    assert values[0][0] == pytest.approx(values[1][0], abs=8.0)
    assert lm._pair("return ", "first")[:2] == lm._pair("return", " first")[:2]


def test_what_is_asked_does_not_depend_on_what_is_asked_besides(world: Path) -> None:
    role = session_of(world).roles["student"]
    requests = [Request("x" * n, "first + second" * (n % 3 + 1)) for n in range(5)]
    together = wrapped(role, batch_size=3).loglikelihood(requests)
    for request, found in zip(requests, together, strict=True):
        [alone] = wrapped(role, batch_size=1).loglikelihood([request])
        assert alone[0] == pytest.approx(found[0], rel=1e-4)
        assert alone[1] == found[1]
    assert wrapped(role, seed=1).loglikelihood(requests) != together


def test_the_greedy_continuation_is_known_as_such(world: Path) -> None:
    role = session_of(world).roles["student"]
    family = language_family(role)
    chosen = TextSampleSettings(max_tokens=8, chat=False)
    checked = 0
    for context in ("def add(", "print", "class", "for", "if", "return"):
        *_, draft = write(role, [Prompt(context)], chosen)
        first = decoded(family, draft.tokens[:2])
        if encoded(family, context + first) != encoded(family, context) + draft.tokens[:2]:
            continue  # random tokens that are others together
        requests = [Request(context, first), Request(context, "first, second")]
        assert [greedy for _, greedy in wrapped(role).loglikelihood(requests)] == [True, False]
        checked += 1
    assert checked > 1


def test_windows_of_a_long_text_have_each_token_once_and_all_the_context_that_fits() -> None:
    for count in (1, 7, 8, 9, 20, 24):
        tokens = list(range(count))
        windows = rolling(tokens, 11, 4)
        assert [token for _, target in windows for token in target] == tokens
        for context, target in windows:
            assert len(context) + -(-len(target) // 4) * 4 <= 8
            assert context == tokens[target[0] - len(context) : target[0]]
    assert rolling(list(range(11)), 8, 4)[-1] == ([4, 5, 6, 7], [8, 9, 10])


def test_a_text_that_fits_is_bounded_as_a_whole_and_a_longer_one_by_its_windows(
    world: Path,
) -> None:
    role = session_of(world).roles["student"]
    family = language_family(role)
    text = "def add(first, second):\n    return first + second\n"
    tokens = encoded(family, text)
    chosen = MonteCarlo(num_draws=150, antithetic=True, seed=5, batch_size=8)
    for length in (256, 12):
        found = wrapped(role, num_draws=150, max_length=length).loglikelihood_rolling(
            [Request(text), Request("x")]
        )
        pairs = [Pair(*parts, 1) for parts in rolling(tokens, length, 4)]
        assert (len(pairs) == 1) == (length == 256)
        estimates = bound_pairs(role, pairs, chosen)
        expected = -sum(float(one.value) for one in estimates)
        error = sum(float(one.error) ** 2 for one in estimates) ** 0.5
        assert abs(found[0] - expected) < 6 * error
        assert found[1] > found[0]


def test_answers_are_those_of_sample_and_are_cut_where_the_task_says(
    world: Path, tasks: Path
) -> None:
    role = session_of(world).roles["student"]
    family = language_family(role)
    results = run_tasks(role, TextSampleSettings(num_steps=2), asked(tasks, "write", batch_size=2))
    prompts = [Prompt(question["question"]) for question in QUESTIONS]
    chosen = TextSampleSettings(num_steps=2, max_tokens=8, chat=False)
    drafts = [draft for draft in write(role, prompts, chosen) if draft.done]
    for row, draft in zip(results["samples"]["local_write"], drafts, strict=True):
        assert row["resps"] == [[cut_at(decoded(family, draft.tokens), ["\n"])]]
    lm = wrapped(role)
    options = {"until": "e", "max_gen_toks": 4}
    answers = lm.generate_until([Request("write", options), Request("write", {}), Request("a", {})])
    assert "e" not in answers[0]
    assert len(encoded(family, answers[0])) <= 8
    assert cut_at("one two", ["o", "w"]) == ""
    assert cut_at("one two", ["two", "e t"]) == "on"
    assert cut_at("one", []) == "one"


def test_repeated_questions_get_answers_of_their_own_at_a_temperature(world: Path) -> None:
    lm = wrapped(session_of(world).roles["student"])
    lm.writing = TextSampleSettings(max_tokens=8, temperature=1.0)
    requests = [Request("write", {})] * 3
    answers = lm.generate_until(requests)
    assert len(set(answers)) == 3
    assert lm.generate_until(requests) == answers


def test_a_prompt_that_is_too_long_loses_its_beginning(world: Path) -> None:
    role = session_of(world).roles["student"]
    family = language_family(role)
    lm = wrapped(role, max_length=16)
    long = "abcdefghij" * 8
    assert lm._told(long, 8) == encoded(family, long)[-8:]
    pair = lm._pair(long, "xyz = 1")
    assert len(pair.context) + len(pair.target) <= 16
    assert pair.context == encoded(family, long)[-len(pair.context) :]
    with pytest.raises(UserError, match="leave no room for a prompt in 16"):
        lm._told(long, 16)
    assert wrapped(role).max_length == 1024


def test_with_chats_a_question_is_put_in_the_template_and_examples_are_turns(
    world: Path, tasks: Path
) -> None:
    role = session_of(world).roles["student"]
    settings = asked(tasks, "write", chat=True, num_fewshot=1, system="be brief", limit=1)
    results = run_tasks(role, TextSampleSettings(), settings)
    [[prompt, _]] = results["samples"]["local_write"][0]["arguments"]
    assert prompt.startswith("<|start|>system\nbe brief<|end|>\n<|start|>user\n")
    assert prompt.count("<|start|>assistant\n") == 2
    assert prompt.endswith("<|start|>assistant\n")
    family = language_family(role)
    alone = spelled(family, Prompt("print"), True)[0]
    chat = wrapped(role).apply_chat_template([{"role": "user", "content": "print"}])
    assert encoded(family, chat) == alone
    one = run_tasks(role, TextSampleSettings(), asked(tasks, "write", limit=1))
    assert one["samples"]["local_write"][0]["arguments"][0][0] == "first letter"


def test_the_digest_is_of_the_weights_that_the_role_acts_with(world: Path) -> None:
    lora = {"student": {"adapter": "lora", "rank": 2}}
    one, two = (session_of(world, roles=lora).roles["student"] for _ in range(2))
    assert weights_digest(one) == weights_digest(two)
    disturb(two, seed=1)
    assert weights_digest(one) != weights_digest(two)


# the command


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["diffdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command_prints_and_saves_all_that_a_number_depends_on(
    world: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(parse_config(text_values(world, sample={"max_tokens": 8})), tmp_path)
    names = ",".join(f"local_{name}" for name in KINDS)
    arguments = (f"evaluate.tasks=[{names}]", f"evaluate.task_paths={tasks}")
    more = ("evaluate.num_draws=2", "evaluate.roles=[base,student]")
    command = ("evaluate", tmp_path, "--suite", "lm-eval", *arguments, *more)
    assert run_cli(monkeypatch, *command) == 0
    told = capsys.readouterr().out
    first = (tmp_path / "evaluation-lm-eval.json").read_text()
    found = json.loads(first)
    base, student = found["models"]["base"], found["models"]["student"]
    assert base["weights_sha256"] != student["weights_sha256"]
    assert student["weights_sha256"][:16] in told
    assert student["evaluate"]["num_draws"] == 2
    assert student["sample"]["schedule"] == "low-confidence"
    assert found["versions"]["lm_eval"] in told
    assert "seed=0" in told
    harness = student["harness"]
    assert set(harness["results"]) == {f"local_{name}" for name in KINDS}
    assert harness["configs"]["local_write"]["generation_kwargs"]["max_gen_toks"] == 8
    assert harness["config"]["fewshot_seed"] == 1234
    assert f"{harness['results']['local_perplexity']['bits_per_byte,none']:.4f}" in told
    samples = (tmp_path / "evaluation-lm-eval-samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 * len(KINDS) * len(QUESTIONS)
    assert run_cli(monkeypatch, *command) == 0
    again = json.loads((tmp_path / "evaluation-lm-eval.json").read_text())
    for name in ("base", "student"):
        results = [one["models"][name]["harness"]["results"] for one in (found, again)]
        assert results[0] == results[1]


def test_tasks_that_are_not_there_are_one_line(world: Path, tasks: Path) -> None:
    role = session_of(world).roles["student"]
    with pytest.raises(UserError, match=r"name what to measure: evaluate\.tasks="):
        run_tasks(role, TextSampleSettings(), TextEvaluateSettings())
    with pytest.raises(UserError, match="there is no folder nowhere"):
        run_tasks(role, TextSampleSettings(), asked(tasks, "write", task_paths=["nowhere"]))
    role.family.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"evaluate\.chat: the tokenizer of .* has no chat"):
        run_tasks(role, TextSampleSettings(), asked(tasks, "write", chat=True))

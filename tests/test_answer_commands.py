"""What is done with autoregressive models besides training: sample, evaluate, export."""

import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from diffdistill import cli
from diffdistill.answering import Draft
from diffdistill.asking import question, questions_of, reply
from diffdistill.checkpoints import restore
from diffdistill.commands import sample_text
from diffdistill.commands.catalog import json_schema
from diffdistill.commands.evaluate import evaluate
from diffdistill.commands.export import export
from diffdistill.commands.preview import preview
from diffdistill.commands.sample_answers import sample_answers
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.evaluation.answers import pass_at
from diffdistill.pipelines.prompts import prompt_tokens
from diffdistill.session import questions
from tests.answer_run import answer_values, save_answer_world

LORA = {"student": {"adapter": "lora", "rank": 2, "alpha": 6}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = save_answer_world(tmp_path_factory.mktemp("answers"))
    for name, roles in (("full", {}), ("lora", LORA)):
        values = answer_values(
            folder,
            roles=roles,
            train={"steps": 1, "lr": 0.05, "ema": 0.5},
            sample={"max_tokens": 6},
            rewards="tests.answer_run:Length",
        )
        train(parse_config(values), folder / name)
    return folder


# sample


def test_answers_of_several_models_are_printed_and_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sample_answers(
        str(world / "lora"),
        prompts=["2+2?", "why?"],
        compare=["base", "student", "teacher"],
        output=tmp_path / "answers.jsonl",
        overrides=["sample.num_answers=2", "sample.temperature=1", "sample.seed=4"],
    )
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert written == json.loads(json.dumps(rows))
    assert len(rows) == 3 * 2 * 2
    assert {row["model"] for row in rows} == {"base", "student", "teacher"}
    base, teacher = ([r for r in rows if r["model"] == name] for name in ("base", "teacher"))
    assert [row["answer"] for row in base] == [row["answer"] for row in teacher]
    assert base[0]["answer"] != base[1]["answer"]
    shown = capsys.readouterr()
    assert shown.out.count("> 2+2?") == 6
    assert "tokens per second" in shown.err


def test_questions_come_from_the_data_where_none_are_given(world: Path) -> None:
    session = restore(world / "full", overrides=["sample.num_prompts=2"])
    assert [e.prompt for e in questions_of(session)] == ["2+2?", "what is 3+5, and why?"]
    rows = sample_answers(str(world / "full"), overrides=["sample.num_prompts=1"])
    assert [row["reference"] for row in rows] == ["2+2 is 1+1+2.\nThat is 4.\n\\boxed{4}"]


def test_an_answer_is_shown_while_it_grows_and_ends_as_it_is(world: Path) -> None:
    session = restore(world / "full")
    role, seen = session.roles["student"], list[Draft]()

    def watch(draft: Draft) -> None:
        seen.append(draft._replace(tokens=list(draft.tokens)))

    asked = [question("2+2?"), question("why is this so?")]
    found = list(reply(session, role, asked, session.config.replies, watch))
    for draft in found:
        grown = [d.tokens for d in seen if (d.prompt, d.number) == (draft.prompt, draft.number)]
        assert grown == [draft.tokens[: n + 1] for n in range(len(draft.tokens))]
    page = sample_text.Page(
        [sample_text.Prompt("2+2?")], ["student"], 1, Console(file=io.StringIO(), width=80)
    )
    page.take("student", questions(session).student, found[0])
    assert page.table().row_count == 1


def command(*words: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["diffdistill", *words])
        with pytest.raises(SystemExit) as done:
            cli.main()
    return done.value.code


def test_the_command_line_samples_and_refuses_what_is_not_for_it(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(world / "full")
    options = ("--top-k", "3", "--temperature", "0.5", "--max-tokens", "4", "--num-answers", "2")
    assert command("sample", run, "--prompt", "2+2?", *options) == 0
    assert capsys.readouterr().out.count("[student]") == 2
    for option, why in (("--plain", "masked diffusion"), ("--frames=3", "images and videos")):
        assert command("sample", run, option) == 2
        assert f"is for {why}" in capsys.readouterr().err
    assert command("sample", run, "--steps", "3") == 2
    assert "--steps is for masked diffusion" in capsys.readouterr().err


def test_commands_for_pictures_refuse_it(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(answer_values(world)))
    with pytest.raises(UserError, match="family causal-lm makes texts, not images or videos"):
        preview(str(file))
    with pytest.raises(
        UserError, match="no suite 'text' for autoregressive language models; there is answers"
    ):
        evaluate(str(file), suite="text")


# evaluate


@pytest.mark.parametrize("count", [1, 4, 5])
def test_pass_at_k_is_the_share_of_choices_of_k_answers_with_a_right_one(count: int) -> None:
    right = torch.rand(6, count, generator=torch.Generator().manual_seed(0)) < 0.4
    for num_tries in range(1, count + 1):
        expected = [
            sum(any(chosen) for chosen in choices) / len(choices)
            for choices in ([*combinations(row, num_tries)] for row in right.tolist())
        ]
        torch.testing.assert_close(pass_at(num_tries, right), torch.tensor(expected))


def test_answers_are_measured_and_kept_beside_the_run(world: Path) -> None:
    run = world / "lora"
    overrides = [
        "sample.num_answers=3", "sample.temperature=1", "evaluate.accepted=8",
        "evaluate.num_tries=[1,2]", "evaluate.roles=[base,student]", "evaluate.max_examples=3",
    ]  # fmt: skip
    text = evaluate(str(run), overrides=overrides)
    found = json.loads((run / "evaluation-answers.json").read_text())
    lines = (run / "evaluation-answers-samples.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 2 * 3 * 3
    rows = {(row["model"], row["metric"]): row for row in found["rows"]}
    own = [row for row in answers if row["model"] == "student"]
    scores = torch.tensor([float(len(row["answer"])) for row in own]).reshape(3, 3)
    assert [row["score"] for row in own] == scores.flatten().tolist()
    mean = rows["student", "mean@3"]
    assert mean["value"] == pytest.approx(scores.mean().item())
    assert mean["error"] == pytest.approx(scores.mean(1).std().item() / 3**0.5)
    for num_tries in (1, 2):
        expected = pass_at(num_tries, scores >= 8).mean().item()
        assert rows["student", f"pass@{num_tries}"]["value"] == pytest.approx(expected)
    for metric in ("tokens", "ended", "parsed", "repetition"):
        expected = sum(row[metric] for row in own) / len(own)
        assert rows["student", metric]["value"] == pytest.approx(expected)
    assert "3 questions; 3 answers each of at most 6 tokens, temperature 1" in text
    assert "pass@2" in text
    assert found["sample"]["num_answers"] == 3
    assert found["rewards"] == [{"name": "tests.answer_run:Length", "scale": 1.0}]


def test_without_a_reward_answers_have_no_score(world: Path, tmp_path: Path) -> None:
    run, output = str(world / "full"), tmp_path / "found.json"
    evaluate(run, output=output, overrides=["rewards=null", "evaluate.roles=student"])
    found = json.loads(output.read_text())
    assert {row["metric"] for row in found["rows"]} == {"tokens", "ended", "repetition"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sample.num_answers=2", "num_answers=2 would all be the same: set sample.temperature"),
        ("evaluate.num_tries=[3]", r"pass@3 needs sample\.num_answers of at least 3, not 1"),
        ("evaluate.num_draws=3", r"evaluate\.num_draws: unknown key"),
        ("rewards=clip", "rewards: clip judges images and videos, and method"),
        ("data.path=nowhere.jsonl", r"data\.path nowhere\.jsonl does not exist"),
    ],
)
def test_what_cannot_be_measured_is_said_before(override: str, message: str, world: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(str(world / "full"), overrides=[override])


def test_the_section_evaluate_is_checked_before_training(world: Path, tmp_path: Path) -> None:
    values = answer_values(world, evaluate={"acepted": 1})
    with pytest.raises(UserError, match=r"evaluate\.acepted: unknown key, did you mean 'accepted'"):
        train(parse_config(values), tmp_path)


# export


@pytest.mark.parametrize("role", ["student", "average"])
@pytest.mark.parametrize("run", ["full", "lora"])
def test_a_folder_for_transformers_answers_as_the_role_does(
    run: str, role: str, world: Path, tmp_path: Path
) -> None:
    folder = export(world / run, tmp_path / "model", layout="model", role=role)
    opened: Any = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert getattr(opened.config, "is_causal", True)
    session = restore(world / run)
    [expected] = reply(session, session.roles[role], [question("2+2?")], session.config.replies)
    family = questions(session).student
    prompt = prompt_tokens(family, [{"role": "user", "content": "2+2?"}])
    chat = [{"role": "user", "content": "2+2?"}]
    assert tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    ) == prompt  # fmt: skip
    config = GenerationConfig(max_new_tokens=6, eos_token_id=family.end_ids, pad_token_id=0)
    found = opened.generate(torch.tensor([prompt]), generation_config=config)
    assert found[0, len(prompt) :].tolist() == expected.tokens


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_lora_for_peft_has_the_logits_of_the_student(world: Path, tmp_path: Path) -> None:
    folder = export(world / "lora", tmp_path / "lora")
    base = AutoModelForCausalLM.from_pretrained(str(world / "student"))
    opened: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    role = restore(world / "lora").roles["student"]
    tokens = torch.arange(20, 30)[None]
    network: Any = role.network
    with torch.no_grad(), role.acting(torch.device("cpu")):
        expected = network(input_ids=tokens).logits
    with torch.no_grad():
        found = opened(input_ids=tokens).logits
        with opened.disable_adapter():
            bare = opened(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bare, expected, atol=1e-4)


# the schema


def test_the_schema_describes_each_kind_of_sample_and_evaluate() -> None:
    properties = json.loads(json_schema())["properties"]
    for section, key in (("sample", "top_k"), ("evaluate", "num_tries")):
        assert sum(key in part["properties"] for part in properties[section]["anyOf"]) == 1
    names = {part["properties"]["name"]["const"] for part in properties["family"]["oneOf"]}
    assert "causal-lm" in names

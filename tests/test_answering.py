"""Answers of text models: what is asked, how they settle, and what the command makes of them."""

import io
import json
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from diffdistill import cli
from diffdistill.answering import Prompt, language_family, prompts_of, spelled, write
from diffdistill.checkpoints import restore
from diffdistill.commands import sample_text as command
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.roles import Role
from diffdistill.sample_settings import TextSampleSettings
from diffdistill.session import Session, build
from diffdistill.transcripts import transcript
from tests.conftest import CPU, disturb
from tests.text_run import save_world, text_values, write_chats
from tests.tiny_text import CODE
from tests.toy_run import losses

FREE = {"temperature": 1.0, "max_tokens": 10}
PROMPTS = [Prompt("write a loop"), Prompt("go"), Prompt("what is the sum of all of these?")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_world(tmp_path_factory.mktemp("world"))


def session_of(world: Path, method: str = "bd3lm", /, **sections: Any) -> Session:
    return build(parse_config(text_values(world, method, **sections)), CPU)


def settings(**changes: Any) -> TextSampleSettings:
    return TextSampleSettings(**(FREE | changes))


def finished(role: Role, prompts: list[Prompt], chosen: TextSampleSettings) -> list[list[int]]:
    return [draft.tokens for draft in write(role, prompts, chosen) if draft.done]


@pytest.mark.parametrize("family", ["bd3lm", "mdlm", "llada2", "wedlm"])
def test_a_draft_settles_token_by_token_into_what_the_sampler_returns(
    family: str, world: Path
) -> None:
    session = session_of(world, family={"name": family})
    role, chosen = session.roles["student"], settings(num_steps=2)
    reader = language_family(role)
    drafts = list(write(role, PROMPTS, chosen))
    for number, prompt in enumerate(PROMPTS):
        own = [draft for draft in drafts if draft.prompt == number]
        assert [draft.done for draft in own] == [False] * (len(own) - 1) + [True]
        for before, after in pairwise(own[:-1]):
            for old, new in zip_longest(before.tokens, after.tokens, fillvalue=reader.mask_id):
                assert old in (reader.mask_id, new)
        assert reader.mask_id in own[0].tokens
        assert own[-1].tokens == own[-2].tokens[: len(own[-1].tokens)]
        sampler = reader.sampler(role.network, max_tokens=10, unmasking=_unmasking(role, chosen))
        context, _ = spelled(reader, prompt, None)
        [expected] = sampler.sample([context], Draws(0), torch.tensor([number * 2**20]))
        assert own[-1].tokens == expected.tolist()


def _unmasking(role: Role, chosen: TextSampleSettings) -> Any:
    from diffdistill.answering import make_sampler

    return make_sampler(role, chosen).unmasking


def test_answers_do_not_depend_on_their_batch_and_differ_by_number_and_seed(world: Path) -> None:
    role = session_of(world).roles["student"]
    whole = finished(role, PROMPTS, settings(num_answers=2, batch_size=6))
    assert whole == finished(role, PROMPTS, settings(num_answers=2, batch_size=1))
    assert whole[::2] == finished(role, PROMPTS, settings())
    assert len({tuple(answer) for answer in whole}) == 6
    assert whole != finished(role, PROMPTS, settings(num_answers=2, batch_size=6, seed=1))


@pytest.mark.parametrize("family", ["bd3lm", "mdlm"])
def test_a_span_is_filled_with_so_many_tokens_between_what_is_given(
    family: str, world: Path
) -> None:
    role = session_of(world, family={"name": family}).roles["student"]
    reader = language_family(role)
    texts = ["def add(<fill:3>):\n    return <fill:5> + second\n", "print(<fill:2>", "go"]
    context, canvas = spelled(reader, Prompt(texts[0]), None)
    assert reader.tokenizer.decode(context) == "def add("
    assert canvas is not None
    assert canvas.count(reader.mask_id) == 8
    answers = finished(role, [Prompt(text) for text in texts], settings())
    kept = [token != reader.mask_id for token in canvas]
    assert len(answers[0]) == len(canvas)
    assert [t for t, k in zip(answers[0], kept, strict=True) if k] == [
        t for t, k in zip(canvas, kept, strict=True) if k
    ]
    assert reader.mask_id not in answers[0]
    assert 1 <= len(answers[1]) <= 2
    assert answers[2] == finished(role, [Prompt("x"), Prompt("x"), Prompt("go")], settings())[2]


def test_a_prompt_is_a_chat_where_there_is_a_template_unless_it_is_plain(world: Path) -> None:
    session = session_of(world, "tide")
    ours, theirs = (language_family(session.roles[name]) for name in ("student", "teacher"))
    text = "what?"
    assert ours.tokenizer.decode(spelled(ours, Prompt(text), None)[0]) == (
        "<|start|>user\nwhat?<|end|>\n<|start|>assistant\n"
    )
    assert theirs.tokenizer.decode(spelled(theirs, Prompt(text), None)[0]).startswith("[user]")
    for family in (ours, theirs):
        assert family.tokenizer.decode(spelled(family, Prompt(text), False)[0]) == text
    ours.tokenizer.chat_template = None
    assert ours.tokenizer.decode(spelled(ours, Prompt(text), None)[0]) == text
    with pytest.raises(UserError, match="has no chat template: set chat_template of its family"):
        spelled(ours, Prompt(text), True)


def test_an_answer_ends_with_the_end_token_or_the_end_of_its_turn(world: Path) -> None:
    family = language_family(session_of(world).roles["student"])
    assert family.tokenizer.convert_ids_to_tokens(family.end_ids) == ["<eos>", "<|end|>"]


def test_roles_that_share_a_network_can_write_in_turn(world: Path) -> None:
    roles = {"student": {"adapter": "lora", "rank": 2}, "teacher": {"path": None, "family": None}}
    session = session_of(world, "tide", method={"variant": "shared"}, roles=roles)
    student, teacher = session.roles["student"], session.roles["teacher"]
    assert student.network is teacher.network
    disturb(student, seed=1, scale=0.5)
    alone = [finished(role, PROMPTS, settings()) for role in (student, teacher)]
    assert alone[0] != alone[1]
    pairs = zip_longest(*(write(role, PROMPTS, settings()) for role in (student, teacher)))
    drafts = [draft for pair in pairs for draft in pair]
    for role, expected in enumerate(alone):
        assert [d.tokens for d in drafts[role::2] if d is not None and d.done] == expected


def test_prompts_come_from_the_config_or_are_the_first_of_the_data(world: Path) -> None:
    given = prompts_of(session_of(world, sample={"prompts": ["a", "b"]}))
    assert given == [Prompt("a"), Prompt("b")]
    session = session_of(world, sample={"num_prompts": 9})
    found = prompts_of(session)
    assert [prompt.text for prompt in found[:3]] == ["write number 0", "yes", "write number 2"]
    assert found[0].reference == CODE[0]
    assert found[1].messages is not None
    assert [message["role"] for message in found[1].messages] == ["user", "assistant", "user"]
    text, whole = found[-1], CODE[0] + CODE[1]
    assert text.messages is None
    assert whole.startswith(text.text + (text.reference or ""))
    assert len(text.text) > 10
    assert text.reference
    assert len(prompts_of(session_of(world))) == 4


# the command


@pytest.fixture(scope="module")
def config(world: Path) -> Path:
    values = text_values(world, "tide", sample={"max_tokens": 8, "num_steps": 2})
    path = world / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["diffdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_models_answer_side_by_side_and_into_a_file(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "answers" / "rows.jsonl"
    arguments = ("--prompt", "go [bold]", "--prompt", "stop", "--compare", "base,student,teacher")
    options = ("--num-answers", "2", "--temperature", "1", "--seed", "3", "--output", output)
    assert run_cli(monkeypatch, "sample", config, *arguments, *options) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["model"], row["prompt"], row["number"]) for row in rows] == [
        (model, prompt, number)
        for model in ("base", "student", "teacher")
        for prompt in ("go [bold]", "stop")
        for number in (0, 1)
    ]
    assert [row["answer"] for row in rows[:4]] == [row["answer"] for row in rows[4:8]]
    assert rows[0]["answer"] != rows[8]["answer"]
    assert all(row["seed"] == 3 and 1 <= row["tokens"] <= 8 for row in rows)
    shown = capsys.readouterr()
    assert "> go [bold]\n[base] " in shown.out
    for row in rows:
        assert row["answer"].translate(command.CONTROLS) in shown.out
    assert "\x1b" not in shown.out
    assert "teacher: " in shown.err
    assert "tokens per second" in shown.err


def test_prompts_of_the_data_are_answered_where_none_is_given(config: Path) -> None:
    rows = command.sample_text(str(config), overrides=["sample.num_prompts=2"])
    assert [row["prompt"] for row in rows] == ["write number 0", "yes"]
    assert rows[0]["reference"] == CODE[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "8x8"), "--size is for images and videos"),
        (("--num-images", "2"), "--num-images is for images and videos"),
        (("--stream",), "--stream is for images and videos"),
        (("--schedule", "best"), "sample.schedule: Input should be 'low-confidence', 'random'"),
        (("--temperature", "-1"), "sample.temperature: Input should be greater than or equal"),
        (("--top-p", "0"), "sample.top_p: Input should be greater than 0"),
        (("sample.size=[8, 8]",), "sample.size: unknown key"),
        (("--compare", "critic"), "no model 'critic'"),
    ],
)
def test_what_makes_no_sense_of_texts_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_cli(monkeypatch, "sample", config, *arguments) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("option", ["--plain", "--temperature=0.5", "--max-tokens=3"])
def test_options_of_texts_are_refused_of_pictures(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "sample", "d-opsd/digits", option) == 2
    assert f"{option.partition('=')[0]} is for texts" in capsys.readouterr().err


def test_on_a_terminal_hidden_tokens_are_dots_until_they_settle(world: Path) -> None:
    session = session_of(world)
    role, chosen = session.roles["student"], settings(num_answers=1, max_tokens=8)
    family = language_family(role)
    console = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={})
    page = command.Page(PROMPTS[:1], ["base", "student"], chosen.num_answers, console)
    dots = []
    with page:
        for draft in write(role, PROMPTS[:1], chosen):
            page.take("student", family, draft)
            drawn = command.drafted(family, draft)
            dots.append(drawn.plain.count(command.HIDDEN))
            assert all(span.style == "dim" for span in drawn.spans)
    assert dots[0] == 7
    assert dots == sorted(dots, reverse=True)
    assert dots[-1] == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "write a loop" in shown
    assert command.shown(family, draft.tokens)[:4].strip() in shown


def test_chats_of_a_file_are_read_no_further_than_needed(world: Path, tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl", 40)
    file.write_text(file.read_text() + "\nnot json")
    session = session_of(world, data={"path": str(file)})
    assert len(prompts_of(session)) == 4


def test_a_run_writes_answers_while_it_trains(world: Path, tmp_path: Path) -> None:
    values = text_values(
        world,
        train={"steps": 4, "lr": 0.05, "ema": 0.5},
        sample={"every": 3, "num_prompts": 2, "max_tokens": 8},
        tracking={"tensorboard": True},
    )
    train(parse_config(values), tmp_path)
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == [f"step-00000{n}.md" for n in (1, 3, 4)]
    pages = [file.read_text() for file in files]
    assert pages[0].startswith("# Step 1\n\n## Prompt\n\n    write number 0\n\n### Data\n\n")
    assert pages[0].count("### Answer") == 2
    answers = [page.partition("\n")[2] for page in pages]
    assert answers[0] != answers[2]
    session = restore(tmp_path)
    role, chosen = session.roles["average"], session.config.answers
    drafts = [d for d in write(role, prompts_of(session), chosen) if d.done]
    expected = transcript(4, prompts_of(session), drafts, language_family(role))
    assert pages[2] == expected
    [events] = (tmp_path / "tensorboard").glob("events*")
    assert b"answers/text_summary" in events.read_bytes()


def test_a_run_trains_the_same_whether_it_writes_answers_or_not(
    world: Path, tmp_path: Path
) -> None:
    for name, sample in (("quiet", {}), ("loud", {"every": 1, "max_tokens": 4, "temperature": 1})):
        train(parse_config(text_values(world, sample=sample)), tmp_path / name)
    assert losses(tmp_path / "quiet") == losses(tmp_path / "loud")

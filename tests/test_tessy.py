"""``diffdistill tessy`` on tiny models of two vocabularies: fitted, written, resumed, learned."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffdistill import cli
from diffdistill.commands import tessy
from diffdistill.commands.train import train
from diffdistill.config import load_config, parse_config
from diffdistill.errors import UserError
from diffdistill.synthesis import samples
from diffdistill.synthesis.building import open_workshop
from diffdistill.synthesis.cooperation import Cooperation
from diffdistill.synthesis.drafts import Draft
from diffdistill.synthesis.fitting import annotated
from tests.answer_run import write_questions
from tests.conftest import CPU
from tests.test_writing import save_ascii
from tests.tiny import tokenizer
from tests.tiny_text import words
from tests.toy_run import losses


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tessy")
    save_ascii(tokenizer(), folder / "student")
    save_ascii(words("teacher"), folder / "teacher")
    write_questions(folder / "questions.jsonl")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values_of(folder)))
    tessy.fit(str(config))
    return folder


def values_of(folder: Path) -> dict[str, Any]:
    return {
        "family": {"name": "causal-lm", "path": str(folder / "student")},
        "method": {"name": "sft-answers"},
        "tessy": {
            "teacher": {"name": "causal-lm", "path": str(folder / "teacher")},
            "questions": str(folder / "questions.jsonl"),
            "predictors": str(folder / "predictors"),
            "student_step": 8,
            "teacher_step": 6,
            "boundary": "extend",
            "ends": ["a", "e", "s", "0"],
            "max_tokens": 80,
            "temperature": 1.0,
            "top_p": 0.9,
            "top_k": 0,
            "retries": 5,
            "batch_size": 8,
            "num_samples": 2,
            "fit": {
                "annotator": "rule",
                "pattern": "[^0-9]",
                "base": str(folder / "student"),
                "num_texts": 4,
                "epochs": 1,
                "batch_size": 4,
                "lr": 1e-3,
                "segments": "both",
            },
        },
        "data": {"path": str(folder / "written.jsonl"), "batch_size": 2},
        "train": {"steps": 2, "lr": 0.01},
        "rewards": [{"name": "tests.answer_run:Length"}],
        "tracking": {"tensorboard": False},
    }


@pytest.fixture
def config(world: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a config whose answers end, because each is cut at twelve tokens."""
    answer = Cooperation._answer

    def short(self: Any, author: Any, drafts: list[Draft]) -> None:
        answer(self, author, drafts)
        for draft in drafts:
            draft.answer, draft.failure = (draft.answer or "")[:12] or "x", None

    monkeypatch.setattr(Cooperation, "_answer", short)
    return str(world / "config.yaml")


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_row(row: dict[str, Any]) -> None:
    content, spans = row["messages"][-1]["content"], row["spans"]
    assert content.startswith("<think>\n")
    assert "</think>\n\n" in content
    ends = [0, *(span["end"] for span in spans)]
    assert [span["start"] for span in spans] == ends[:-1]
    assert ends[-1] == len(content)
    assert spans[0]["author"] == "template"
    assert set(row["revisions"]) == {s["author"] for s in spans} - {"template"}
    assert row["tokens"]["student"] + row["tokens"]["teacher"] > 0


def test_samples_are_written_counted_and_learned(
    config: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "written.jsonl"
    told = tessy.write(config, output=file)
    rows = rows_in(file)
    assert [row["number"] for row in rows] == list(range(8))
    for row in rows:
        check_row(row)
    assert [row["messages"][-2]["content"] for row in rows[:2]] == ["2+2?", "2+2?"]
    assert rows[0]["answer"] == "4"
    assert rows[0]["messages"] != rows[1]["messages"]
    assert {"student", "teacher"} <= {s["author"] for row in rows for s in row["spans"]}
    assert "share of the teacher's tokens" in told
    assert "right" in told
    train(load_config(config, [f"data.path={file}"]), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2


def test_writing_goes_on_where_it_was_stopped_also_within_a_line(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    tessy.write(config, output=whole)

    def stopping(self: Any, waiting: Iterator[Draft]) -> Iterator[Draft]:
        for count, draft in enumerate(run(self, waiting)):
            if count == 3:
                raise KeyboardInterrupt
            yield draft

    run = Cooperation.run
    monkeypatch.setattr(Cooperation, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        tessy.write(config, output=broken)
    monkeypatch.setattr(Cooperation, "run", run)
    assert len(rows_in(broken)) == 3
    broken.write_text(broken.read_text()[:-20])
    seen = []
    monkeypatch.setattr(samples, "row_of", lambda number, *rest: seen.append(number) or row_of(number, *rest))  # fmt: skip # noqa: E501
    tessy.write(config, output=broken)
    assert len(seen) == 6
    assert broken.read_bytes() == whole.read_bytes()


row_of = samples.row_of


def test_other_settings_do_not_go_into_the_same_file(config: str, tmp_path: Path) -> None:
    file = tmp_path / "written.jsonl"
    tessy.write(config, output=file, overrides=["tessy.mode=student-only"])
    with pytest.raises(UserError, match=r"written otherwise \(mode\)"):
        tessy.write(config, output=file, overrides=["tessy.mode=teacher-only"])
    (tmp_path / "mine.jsonl").write_text("{}")
    with pytest.raises(UserError, match="not of tessy write"):
        tessy.write(config, output=tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    ("mode", "authors"),
    [
        ("teacher-only", {"teacher"}),
        ("student-only", {"student"}),
        ("teacher-think", {"teacher", "student"}),
        ("teacher-answer", {"teacher", "student"}),
        ("best-of-n", {"student"}),
    ],
)
def test_baselines_are_by_who_they_are_called_after_and_need_no_predictors(
    mode: str, authors: set[str], config: str, tmp_path: Path
) -> None:
    file = tmp_path / "written.jsonl"
    changes = [f"tessy.mode={mode}", "tessy.predictors=null", "tessy.num_samples=1"]
    changes += ["tessy.num_candidates=2"]
    tessy.write(config, output=file, overrides=changes)
    rows = rows_in(file)
    assert len(rows) == 4
    for row in rows:
        check_row(row)
        assert set(row["revisions"]) <= authors
    assert {author for row in rows for author in row["revisions"]} == authors


def test_every_other_sample_of_a_mix_is_by_the_teacher(config: str, tmp_path: Path) -> None:
    file = tmp_path / "written.jsonl"
    tessy.write(config, output=file, overrides=["tessy.mode=mix", "tessy.num_samples=1"])
    assert [list(row["revisions"]) for row in rows_in(file)] == 2 * [["teacher"], ["student"]]


def test_the_best_of_some_is_what_the_teacher_finds_most_likely(
    config: str, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = []

    def best(drafts: list[Draft], judge: Any) -> Draft:
        found = choose(drafts, judge)
        prompt = [judge.prompt(drafts[0].example, "")]
        texts = [judge.tokens(d.text, closed=True) + judge.tokens(d.answer or "") for d in drafts]
        scores = [judge.mean_logprobs(prompt, [text])[0] for text in texts]
        assert found is drafts[scores.index(max(scores))]
        chosen.append(len(drafts))
        return found

    choose = samples.best
    monkeypatch.setattr(samples, "best", best)
    changes = ["tessy.mode=best-of-n", "tessy.num_candidates=3", "data.max_examples=2"]
    tessy.write(config, output=tmp_path / "written.jsonl", overrides=changes)
    assert chosen == [3, 3, 3, 3]


def test_samples_that_fail_are_told_apart_and_not_tried_for_ever(
    world: Path, tmp_path: Path
) -> None:
    config, file = str(world / "config.yaml"), tmp_path / "written.jsonl"
    with pytest.raises(UserError, match=r"no sample was finished: .*the thinking is too long"):
        tessy.write(config, output=file, overrides=["tessy.max_tokens=3"])
    failed = rows_in(tmp_path / "written-failed.jsonl")
    assert sorted(row["number"] for row in failed) == list(range(8))


def test_a_model_annotates_by_quoting(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = open_workshop(load_config(str(world / "config.yaml")), CPU)
    workshop.settings.fit.annotator = "model"
    from diffdistill.pipelines.writing import Continuation, LocalWriter

    original = LocalWriter.go_on
    asked: list[list[int]] = []

    def go_on(self: Any, prompts: Any, ids: Any, max_tokens: int) -> list[Continuation]:
        if max_tokens != 1024:
            return original(self, prompts, ids, max_tokens)
        asked.extend(prompts)
        text = self.family.decoded(prompts[0])
        quote = json.dumps([text[-3:].strip() or "x"])
        return [Continuation(quote if i == 0 else "no list", True) for i in range(len(prompts))]

    monkeypatch.setattr(LocalWriter, "go_on", go_on)
    lines: list[str] = []
    found = annotated(workshop, lines.append)
    assert any("no list of quotes" in line for line in lines)
    assert all(segments for segments in found.values())
    assert "JSON array" in workshop.writers["teacher"].family.decoded(asked[0])  # type: ignore[attr-defined]


def test_the_commands_are_on_the_command_line(
    config: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "predictors"
    for arguments in (
        ["fit-predictors", config, "tessy.fit.num_texts=2", "--output", str(out)],
        ["write", config, f"tessy.predictors={out}", "--output", str(tmp_path / "written.jsonl")],
    ):
        monkeypatch.setattr("sys.argv", ["diffdistill", "tessy", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "predictor of" in told
    assert "tokens of a sample" in told
    report = json.loads((out / "report.json").read_text())
    assert set(report["predictors"]) == {"student", "teacher"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tessy=null"], "no section tessy"),
        (["tessy.teacher={}"], "tessy.teacher: name the family"),
        (["tessy.predictors=null"], "set tessy.predictors"),
        (["tessy.predictors=nowhere"], "no boundary predictor"),
        (["tessy.questions=null"], "name a file: --output"),
        (["tessy.teacher={name: bd3lm, path: x}"], "does not write token by token"),
    ],
)
def test_what_is_missing_is_said_in_one_line(changes: list[str], message: str, world: Path) -> None:
    with pytest.raises(UserError, match=message):
        tessy.write(str(world / "config.yaml"), overrides=changes)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"steps": 3}, r"tessy.steps: unknown key"),
        ({"mode": "tesy"}, r"tessy.mode"),
        ({"fit": {"pattren": "x"}}, r"tessy.fit.pattren: unknown key, did you mean 'pattern'"),
        ({"teacher": {"name": "causal-lm", "dtpe": "x"}}, r"tessy: teacher.dtpe: unknown key"),
        ({"student_step": 0}, r"tessy.student_step"),
    ],
)
def test_a_section_tessy_is_checked_as_every_other(
    section: dict[str, Any], message: str, world: Path
) -> None:
    values = values_of(world)
    values["tessy"] |= section
    with pytest.raises(UserError, match=message):
        parse_config(values)

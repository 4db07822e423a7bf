"""``diffdistill tessy`` on tiny models of two vocabularies: fitted, written, resumed, learned."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffdistill import cli
from diffdistill.authorship import data_authors
from diffdistill.commands import tessy
from diffdistill.commands.train import train
from diffdistill.config import load_config, parse_config
from diffdistill.data.questions import read_questions
from diffdistill.errors import UserError
from diffdistill.lineage import check_provenance, record_of
from diffdistill.pipelines.writing import Continuation, LocalWriter
from diffdistill.provenance.files import dumped, open_record
from diffdistill.provenance.terms import unmet
from diffdistill.session import build
from diffdistill.synthesis import samples
from diffdistill.synthesis.annotating import given
from diffdistill.synthesis.building import open_workshop
from diffdistill.synthesis.cooperation import Cooperation
from diffdistill.synthesis.drafts import STEPS, TRIES, Draft
from diffdistill.synthesis.fitting import annotated
from diffdistill.synthesis.storing import Store
from tests.answer_run import write_questions
from tests.conftest import CPU
from tests.test_writing import save_ascii
from tests.tiny import tokenizer
from tests.tiny_server import TinyServer, serving
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
            draft.answer, draft.failure = draft.answer[:12] or "x", None
            draft.answered = True

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
    for change, differing in (
        ("tessy.temperature=0.5", "temperature"),
        ("tessy.mode=teacher-only", "mode, models, revisions, tokenizers"),
        ("tessy.skip_questions=1", "questions"),
        ("data.student_prompt='Say: {question}'", "student_prompt"),
        ("data.answer_column=answer", "answer_column"),
    ):
        told = rf"written otherwise \({differing}\).*remove {file}, .*written-about.json$"
        with pytest.raises(UserError, match=told):
            tessy.write(config, output=file, overrides=["tessy.mode=student-only", change])
    for content in ("{}", "not JSON"):
        (tmp_path / "mine.jsonl").write_text(content)
        with pytest.raises(UserError, match="not of tessy"):
            tessy.write(config, output=tmp_path / "mine.jsonl")
        assert (tmp_path / "mine.jsonl").read_text() == content


def test_what_samples_do_not_depend_on_may_change(config: str, world: Path, tmp_path: Path) -> None:
    file, moved = tmp_path / "written.jsonl", tmp_path / "moved"
    plain = ["tessy.mode=teacher-only", "tessy.num_samples=1"]
    tessy.write(config, output=file, overrides=[*plain, "tessy.max_questions=2"])
    assert len(rows_in(file)) == 2
    before = file.read_text()
    shutil.copytree(world / "teacher", moved)
    others = ["tessy.batch_size=3", "tessy.retries=1", f"tessy.teacher.path={moved}"]
    tessy.write(config, output=file, overrides=[*plain, *others])
    assert len(rows_in(file)) == 4
    assert file.read_text().startswith(before)


def test_nothing_is_kept_of_what_did_not_begin(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise UserError("no")

    with monkeypatch.context() as patch:
        patch.setattr(Cooperation, "step", failing)
        with pytest.raises(UserError, match="no"):
            tessy.write(config, output=tmp_path / "written.jsonl")
    assert list(tmp_path.iterdir()) == []
    tessy.write(config, output=tmp_path / "written.jsonl", overrides=["tessy.mode=student-only"])


def test_other_predictors_or_weights_at_the_same_place_are_told(
    config: str, world: Path, tmp_path: Path
) -> None:
    for name in ("predictors", "weights"):
        folder = tmp_path / name
        shutil.copytree(world / ("predictors" if name == "predictors" else "student"), folder)
        changes = ["tessy.num_samples=1"]
        changes.append(
            f"tessy.predictors={folder}" if name == "predictors" else f"roles.student.path={folder}"
        )
        file = tmp_path / f"{name}.jsonl"
        tessy.write(config, output=file, overrides=changes)
        weights = next(folder.rglob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        differing = "predictors" if name == "predictors" else "revisions"
        with pytest.raises(UserError, match=rf"written otherwise \({differing}\)"):
            tessy.write(config, output=file, overrides=changes)


def test_the_student_writes_with_the_weights_of_its_role(
    config: str, world: Path, tmp_path: Path
) -> None:
    network = AutoModelForCausalLM.from_pretrained(world / "student")
    network.lm_head.weight.data = network.lm_head.weight.data.roll(1, 0)
    network.save_pretrained(tmp_path / "other")
    found = []
    for changes in ([], [f"roles.student.path={tmp_path / 'other'}"]):
        file = tmp_path / f"written-{len(found)}.jsonl"
        tessy.write(config, output=file, overrides=["tessy.mode=student-only", *changes])
        found.append(rows_in(file))
    assert found[0][0]["revisions"] != found[1][0]["revisions"]
    assert [r["messages"] for r in found[0]] != [r["messages"] for r in found[1]]


def test_bad_questions_are_told_before_anything_is_written(
    config: str, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*rows_in(world / "questions.jsonl"), {"text": "2+2? " * 4000}, {"nothing": 1}]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "out" / "written.jsonl"
    with pytest.raises(UserError, match=r"data\.max_prompt"):
        tessy.write(config, output=file, overrides=[f"tessy.questions={questions}"])
    assert not file.parent.exists()
    changes = [f"tessy.questions={questions}", "data.on_error=skip", "tessy.mode=student-only"]
    tessy.write(config, output=file, overrides=changes)
    assert len(rows_in(file)) == 8
    assert "left out 1 questions" in caplog.text
    assert "missing question" in caplog.text


def test_rows_are_in_the_columns_that_training_reads(
    config: str, world: Path, tmp_path: Path
) -> None:
    questions, file = tmp_path / "questions.jsonl", tmp_path / "written.jsonl"
    rows = [{"problem": f"{n}+1?", "worked": "so", "right": n + 1} for n in range(3)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    changes = [
        f"tessy.questions={questions}", "data.prompt_column=problem", "data.answer_column=right",
        "data.solution_column=worked", "data.messages_column=chat", f"data.path={file}",
        "tessy.max_questions=2", "tessy.skip_questions=1", "data.batch_size=4",
    ]  # fmt: skip
    told = tessy.write(config, overrides=[*changes, "data.max_answer=14"])
    assert "training would cut 4 of these answers" in told
    written = rows_in(file)
    assert [row["right"] for row in written] == ["2", "2", "3", "3"]
    assert all(row["worked"] == row["chat"][-1]["content"] for row in written)
    checked = load_config(config, changes)
    read = list(read_questions(checked.data, Path(), []))
    assert [example.solution for example in read] == [row["worked"] for row in written]
    train(checked, tmp_path / "run")
    with pytest.raises(UserError, match=r"data.answer_column 'number'"):
        tessy.write(config, overrides=[*changes, "data.answer_column=number"])


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
        closes = judge.format.closes
        texts = [judge.tokens(d.text + closes) + judge.tokens(d.answer) for d in drafts]
        scores = [judge.mean_logprobs(prompt, [text])[0] for text in texts]
        assert found is drafts[scores.index(max(scores))]
        chosen.append(len(drafts))
        return found

    choose = samples.best
    monkeypatch.setattr(samples, "best", best)
    changes = ["tessy.mode=best-of-n", "tessy.num_candidates=3", "tessy.max_questions=2"]
    tessy.write(config, output=tmp_path / "written.jsonl", overrides=changes)
    assert chosen == [3, 3, 3, 3]


def test_samples_that_fail_are_told_apart_and_tried_again_where_more_tries_are_allowed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, file = str(world / "config.yaml"), tmp_path / "written.jsonl"
    changes = ["tessy.max_tokens=3", "tessy.retries=1"]
    with pytest.raises(UserError, match=r"no sample was finished: .*the thinking is too long"):
        tessy.write(config, output=file, overrides=changes)
    failed = rows_in(tmp_path / "written-failed.jsonl")
    assert [row["number"] for row in failed] == list(range(8))
    assert {row["tries"] for row in failed} == {2}
    attempts: list[int] = []

    def seen(self: Any, drafts: list[Draft]) -> None:
        attempts.extend(draft.attempt for draft in drafts)
        step(self, drafts)

    step = Cooperation.step
    monkeypatch.setattr(Cooperation, "step", seen)
    for retries, expected in ((1, set()), (3, {2, 3})):
        with pytest.raises(UserError, match="no sample was finished"):
            tessy.write(config, output=file, overrides=[*changes, f"tessy.retries={retries}"])
        assert set(attempts) == expected
    assert {row["tries"] for row in rows_in(tmp_path / "written-failed.jsonl")} == {4}


@pytest.mark.parametrize("boundary", ["discard", "extend", "exact"])
def test_stopped_writing_goes_on_beside_failed_samples_by_any_rule(
    boundary: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers end by themselves here; two samples have none, and two have none at first."""
    original = LocalWriter.go_on

    def go_on(self: Any, prompts: Any, ids: Any, limits: Any) -> list[Continuation]:
        found = original(self, prompts, ids, [min(limit, 8) for limit in limits])
        rows = zip(found, limits, ids, strict=True)
        return [answered(new, number) if limit > 8 else new for new, limit, number in rows]

    def answered(new: Continuation, draw: int) -> Continuation:
        number, attempt = divmod(draw // STEPS, TRIES)
        silent = number in (1, 4) or (number in (2, 5) and not attempt)
        return Continuation("" if silent else f"x{new.text}", True)

    def stopping(self: Any, waiting: Iterator[Draft]) -> Iterator[Draft]:
        for count, draft in enumerate(run(self, waiting)):
            if count == 4:
                raise KeyboardInterrupt
            yield draft

    monkeypatch.setattr(LocalWriter, "go_on", go_on)
    run, config = Cooperation.run, str(world / "config.yaml")
    whole, broken, raised = (tmp_path / f"{n}.jsonl" for n in ("whole", "broken", "raised"))
    changes = [f"tessy.boundary={boundary}", "tessy.retries=1", "tessy.batch_size=3"]
    tessy.write(config, output=whole, overrides=changes)
    failed = tmp_path / "whole-failed.jsonl"
    assert {1, 4} <= {row["number"] for row in rows_in(failed)}
    assert {row["number"]: row["tries"] for row in rows_in(whole)}.get(2, 2) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Cooperation, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            tessy.write(config, output=broken, overrides=changes)
    tessy.write(config, output=broken, overrides=changes)
    tessy.write(config, output=raised, overrides=[*changes, "tessy.retries=0"])
    tessy.write(config, output=raised, overrides=changes)
    for other in (broken, raised):
        assert other.read_bytes() == whole.read_bytes()
        assert other.with_name(f"{other.stem}-failed.jsonl").read_bytes() == failed.read_bytes()


@pytest.mark.parametrize("mode", ["teacher-think", "tessy"])
def test_a_teacher_behind_a_server_writes_its_part(
    mode: str, config: str, world: Path, tmp_path: Path
) -> None:
    network = AutoModelForCausalLM.from_pretrained(world / "teacher").eval()
    tokens = AutoTokenizer.from_pretrained(world / "teacher")
    local, far = tmp_path / "local.jsonl", tmp_path / "far.jsonl"
    plain = [f"tessy.mode={mode}", "tessy.temperature=0", "tessy.num_samples=1"]
    tessy.write(config, output=local, overrides=plain)
    for address in range(2):  # the same model, at another port
        with serving(TinyServer(network, tokens)) as server:
            teacher = {"name": "server", "path": server.url, "timeout": 50 + address,
                       "tokenizer_path": str(world / "teacher")}  # fmt: skip
            changes = [*plain, f"tessy.teacher={json.dumps(teacher)}", "tessy.retries=0"]
            limit = [] if address else ["tessy.max_questions=2"]
            tessy.write(config, output=far, overrides=[*changes, *limit])
    rows = rows_in(far)
    assert [row["messages"] for row in rows] == [row["messages"] for row in rows_in(local)]
    assert {row["revisions"].get("teacher", "tiny") for row in rows} == {"tiny"}
    assert any("teacher" in row["revisions"] for row in rows)


def test_tokens_are_counted_by_author_in_the_vocabulary_of_the_student(
    config: str, world: Path, tmp_path: Path
) -> None:
    file = tmp_path / "written.jsonl"
    told = tessy.write(config, output=file)
    read = AutoTokenizer.from_pretrained(world / "student")

    def count(text: str) -> int:
        return len(read.encode(text, add_special_tokens=False))

    rows, shares = rows_in(file), {"student": 0, "teacher": 0}
    for row in rows:
        content = row["messages"][-1]["content"]
        assert row["tokens"]["total"] == count(content)
        for author in shares:
            parts = [content[s["start"] : s["end"]] for s in row["spans"] if s["author"] == author]
            assert row["tokens"][author] == sum(map(count, parts))
            shares[author] += row["tokens"][author]
    share = shares["teacher"] / sum(shares.values())
    assert f"{share:.4g}" in told


@pytest.fixture
def quoting(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[int]]]:
    """Let annotators quote the end of every segment but each third; return what they were asked."""
    original = LocalWriter.go_on
    asked: list[tuple[Any, list[int]]] = []

    def go_on(self: Any, prompts: Any, ids: Any, limits: Any) -> list[Continuation]:
        if limits[0] != 1024:
            return original(self, prompts, ids, limits)
        asked.extend((self, prompt) for prompt in prompts)
        quotes = [json.dumps(self.family.decoded(p).split()[-1:]) for p in prompts]
        return [
            Continuation(q if i % 3 else "none", True) for q, i in zip(quotes, ids, strict=True)
        ]

    monkeypatch.setattr(LocalWriter, "go_on", go_on)
    return asked


@pytest.mark.parametrize("other", [False, True])
def test_a_model_annotates_by_quoting_and_does_not_think(
    other: bool, world: Path, tmp_path: Path, quoting: list[tuple[Any, list[int]]]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n{{ enable_thinking }}")
    model = {"name": "causal-lm", "path": str(world / "teacher"), "chat_template": str(template)}
    changes = ["tessy.fit.annotator=model", "data.student_thinking=true",
               "data.student_prompt='Q: {question}'", "data.max_prompt=100"]  # fmt: skip
    changes.append(f"tessy.{'fit.model' if other else 'teacher'}={json.dumps(model)}")
    workshop = open_workshop(load_config(str(world / "config.yaml"), changes), CPU)
    lines: list[str] = []
    found = annotated(workshop, tmp_path, lines.append)
    assert any("replies of the annotator" in line and "%" in line for line in lines)
    for author, segments in found.items():
        rows = rows_in(tmp_path / f"annotated-{author}.jsonl")
        assert len(rows) == len(segments) > 0
        assert given(str(tmp_path / f"annotated-{author}.jsonl"))[author]
    prompts = [writer.family.decoded(prompt) for writer, prompt in quoting]
    assert all(prompt.startswith("Below is a passage") for prompt in prompts)
    assert all(prompt.endswith("False") for prompt in prompts)
    teacher = workshop.writers["teacher"].family
    assert all((writer.family is teacher) is not other for writer, _ in quoting)


def test_an_annotator_that_says_nothing_usable_is_an_error_with_its_share(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = open_workshop(
        load_config(str(world / "config.yaml"), ["tessy.fit.annotator=model"]), CPU
    )
    with pytest.raises(UserError, match=r"of the annotator \(100.0%\) were no JSON array"):
        annotated(workshop, tmp_path, lambda _: None)


def test_given_annotations_are_cut_into_segments_of_each_author(
    world: Path, tmp_path: Path
) -> None:
    file = tmp_path / "spans.jsonl"
    rows = [
        {"text": f"{author} " * 100, "spans": [[0, 7]], "author": author}
        for author in ("student", "teacher")
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    changes = ["tessy.fit.annotator=given", f"tessy.fit.annotations={file}"]
    workshop = open_workshop(load_config(str(world / "config.yaml"), changes), CPU)
    found = annotated(workshop, tmp_path, lambda _: None)
    for number, (author, segments) in enumerate(found.items()):
        assert len(segments) == 41  # places of 60 of 100 words
        assert {segment.source for segment in segments} == {number}
        assert {word for segment in segments for word in segment.text.split()} == {author}
        assert [s.spans for s in segments if s.spans] == [[(0, 7)]]
    workshop.settings.fit.annotations = None
    with pytest.raises(UserError, match="needs a file of spans"):
        annotated(workshop, tmp_path, lambda _: None)


def test_fitting_goes_on_where_it_was_stopped(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quoting: list[tuple[Any, list[int]]],
) -> None:
    config = str(world / "config.yaml")
    changes = ["tessy.fit.annotator=model", "tessy.batch_size=2", "tessy.fit.segment_words=3"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tessy.fit(config, output=whole, overrides=changes)
    asked = len(quoting)

    def stopping(name: str, rows: int) -> Callable[..., None]:
        def add(self: Any, row: dict[str, Any]) -> None:
            if self.path.name == name and len(self.rows) == rows:
                raise KeyboardInterrupt
            original(self, row)

        return add

    original = Store.add
    for name, rows in (("texts-teacher.jsonl", 2), ("annotated-student.jsonl", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "add", stopping(name, rows))
            with pytest.raises(KeyboardInterrupt):
                tessy.fit(config, output=broken, overrides=changes)
    quoting.clear()
    tessy.fit(config, output=broken, overrides=changes)
    assert 0 < len(quoting) < asked
    files = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file()]
    assert Path("texts-student.jsonl") in files
    for file in files:
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    with pytest.raises(UserError, match=r"written otherwise \(temperature\)"):
        tessy.fit(config, output=broken, overrides=[*changes, "tessy.temperature=0.5"])


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
        (
            {"student_step": 9, "context": 8},
            r"tessy.student_step is 9 and tessy.context 8: the fir",
        ),
        ({"teacher_step": 201}, r"tessy.teacher_step is 201 and tessy.context 200"),
    ],
)
def test_a_section_tessy_is_checked_as_every_other(
    section: dict[str, Any], message: str, world: Path
) -> None:
    values = values_of(world)
    values["tessy"] |= section
    with pytest.raises(UserError, match=message):
        parse_config(values)


def test_written_data_names_its_models_to_what_learns_it(
    config: str, world: Path, tmp_path: Path
) -> None:
    file = tmp_path / "written.jsonl"
    for name, license_ in (("student", "apache-2.0"), ("teacher", "llama3.3")):
        (world / name / "README.md").write_text(f"---\nlicense: {license_}\n---\n")
    asked = ["tessy.max_questions=1", "tessy.num_samples=1"]
    tessy.write(config, output=file, overrides=asked)
    record = open_record(tmp_path / "written.provenance.json")
    assert [(m["role"], m["id"]) for m in record["teachers"]] == [("rollouts", "teacher")]
    assert [(m["role"], m["id"]) for m in record["judges"]] == [("boundaries", "student")]
    assert str(world) not in dumped(record)

    values = values_of(world)
    values |= {"tessy": None, "data": {"path": str(file), "batch_size": 1}}
    learned = record_of(build(parse_config(values), CPU))
    routes = [(m["role"], m["id"], m["route"]) for m in learned["teachers"]]
    assert routes == [
        ("rollouts", "student", "copy"),
        ("rollouts", "teacher", "local"),
        ("boundaries", "student", "copy"),
    ]
    assert "llama-3.3/name" in unmet(learned)
    for place in ({"path": str(tmp_path)}, {"source": "json", "files": [str(file)]}):
        other = parse_config(values | {"data": place})
        assert [m["id"] for m in data_authors(other, hashed=False)] == [
            "student", "teacher", "student",
        ]  # fmt: skip
    with pytest.raises(UserError, match=r"open obligations: llama-3\.3/name"):
        check_provenance(build(parse_config(values | {"provenance": {"policy": "error"}}), CPU))
    stated = {"terms": {"rollouts": "mit"}}
    settled = record_of(build(parse_config(values | {"provenance": stated}), CPU), hashed=False)
    assert "llama-3.3/name" not in unmet(settled)

    (tmp_path / "written.provenance.json").unlink()  # as data of before there were records
    bare = record_of(build(parse_config(values), CPU), hashed=False)
    revision = json.loads((tmp_path / "written-about.json").read_text())["revisions"]["teacher"]
    assert f"unknown/{revision}" in unmet(bare)
    section = record_of(build(load_config(config, [f"data.path={file}"]), CPU), hashed=False)
    assert [m["id"] for m in section["teachers"]] == ["teacher", "student"]


def test_the_section_of_a_config_names_teacher_annotator_and_predictors(world: Path) -> None:
    values = values_of(world)
    served = {"name": "server", "path": "http://localhost:1/v1", "model": "meta-llama/Llama-3.3-x"}
    values["tessy"]["teacher"] = served
    values["tessy"]["fit"] |= {"annotator": "model", "model": {**served, "model": "Qwen/Qwen3-x"}}
    values["data"]["path"] = str(world / "questions.jsonl")
    values["provenance"] = {"terms": {"annotator": "mit", "tests.answer_run:Length": "mit"}}
    for mode, named in (
        ("tessy", ["rollouts", "annotator", "boundaries"]),
        ("mix", ["rollouts"]),
        ("student-only", []),
    ):
        values["tessy"]["mode"] = mode
        record = record_of(build(parse_config(values), CPU), hashed=False)
        assert [model["role"] for model in record["teachers"]] == named
        assert ("llama-3.3/name" in unmet(record)) == bool(named)

"""Language models through ``diffdistill train``: all of it, on tiny models saved to disk."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffdistill import cli, question_feed
from diffdistill.checkpoints import Checkpoints, restore
from diffdistill.commands.catalog import json_schema
from diffdistill.commands.evaluate import evaluate
from diffdistill.commands.export import export
from diffdistill.commands.preview import preview
from diffdistill.commands.sample import sample
from diffdistill.commands.train import dry_run, train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.text_rows import TextRows
from diffdistill.projection import dense
from diffdistill.session import build
from diffdistill.trainer import Trainer
from diffdistill.types import Example
from tests.conftest import CPU
from tests.text_run import save_world, text_batch, text_values, write_chats
from tests.toy_run import forked, losses


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def shared(world: Path) -> dict[str, Any]:
    """Return the sections of TIDE-Shared: a dense teacher with the student's tokenizer."""
    return {
        "method": {"variant": "shared", "passes": "doubled"},
        "roles": {"teacher": {"path": str(world / "dense")}},
    }


LORA = {"student": {"adapter": "lora", "rank": 2, "alpha": 4}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "bd3lm": ("bd3lm", {"method": {"search_every": 2, "search_widths": [0.5]}}),
    "bd3lm of a whole row": ("bd3lm", {"family": {"name": "mdlm"}, "train": {"ema": 0.9}}),
    "bd3lm on packed rows": ("bd3lm", {"data": {"packing": True}}),
    "bd3lm on a stream": ("bd3lm", {"data": {"streaming": True, "shuffle_buffer": 3}}),
    "tide across tokenizers": ("tide", {"train": {"ema": 0.9}}),
    "tide of an adapter": ("tide", {"roles": LORA, "train": {"gradient_checkpointing": True}}),
    "tide on packed rows of a stream": (
        "tide", {"data": {"streaming": True, "packing": True, "shuffle_buffer": 2}},
    ),
    "tide with one vocabulary": ("tide", {}),
}  # fmt: skip


def values_of(name: str, world: Path) -> dict[str, Any]:
    method, sections = RUNS[name]
    return text_values(world, method, **(shared(world) if "vocabulary" in name else sections))


def weights(run: Path) -> dict[str, torch.Tensor]:
    snapshot, _, problems = Checkpoints(run).load()
    assert problems == []
    return {f"{f}/{n}": t for f, group in snapshot.tensors.items() for n, t in group.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_and_resumed_is_bit_identical(
    name: str, world: Path, tmp_path: Path
) -> None:
    config = parse_config(values_of(name, world))

    def killed() -> None:
        original = Trainer.train_step

        def train_step(self: Trainer) -> dict[str, float]:
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self)

        Trainer.train_step = train_step  # type: ignore[method-assign]
        train(config, tmp_path / "broken")

    assert forked(lambda: train(config, tmp_path / "whole")) == 0
    assert forked(killed) == -signal.SIGKILL
    assert forked(lambda: train(config, tmp_path / "broken", "latest")) == 0
    found = losses(tmp_path / "broken")
    assert found == losses(tmp_path / "whole")
    assert len(found) == len(set(found.values())) == 4
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert any("role-average" in key for key in expected) == (config.train.ema is not None)


@pytest.mark.parametrize(
    ("method", "options", "data"),
    [
        ("bd3lm", {"stratify": 4}, {}),
        ("bd3lm", {"stratify": 4}, {"streaming": True}),
        ("bd3lm", {"levels": "sequence"}, {"packing": True}),
        ("tide", {"distillation_weight": 20.0}, {}),
        ("tide", {"variant": "calm-tidal", "distillation_weight": 20.0}, {"streaming": True}),
    ],
)
def test_two_micro_batches_of_two_take_the_step_of_one_of_four(
    method: str, options: dict[str, Any], data: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    for name, batch_size, accumulate in (("one", 4, 1), ("two", 2, 2)):
        values = text_values(
            world,
            method,
            data={"batch_size": batch_size} | data,
            method=options,
            train={"accumulate": accumulate, "steps": 3, "lr": 0.001},
        )
        train(parse_config(values), tmp_path / name)
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    first, second = (weights(tmp_path / name) for name in ("one", "two"))
    for key, value in first.items():
        if key.startswith("role-student"):
            torch.testing.assert_close(value, second[key], rtol=1e-3, atol=2e-5)


def test_a_student_learns_its_texts(world: Path, tmp_path: Path) -> None:
    values = text_values(
        world, train={"steps": 60, "lr": 0.01, "save_every": 60}, data={"max_examples": 2}
    )
    train(parse_config(values), tmp_path)
    found = list(losses(tmp_path).values())
    assert sum(found[-10:]) < 0.5 * sum(found[:10])


def test_metrics_of_distillation_are_logged_and_the_teacher_stays(
    world: Path, tmp_path: Path
) -> None:
    train(parse_config(values_of("tide across tokenizers", world)), tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("denoising", "distillation", "mask_rate", "noise_level", "clamp_share"):
        assert f"{name}/student" in line
    assert line["active_chunks/student"] > 0
    assert not any("teacher" in key for key in weights(tmp_path))
    session = restore(tmp_path, "latest", CPU)
    assert isinstance(session.family, TextPair)
    before = build(parse_config(values_of("tide across tokenizers", world)), CPU)
    for name, changed in (("student", True), ("teacher", False)):
        pairs = zip(
            session.roles[name].network.parameters(),
            before.roles[name].network.parameters(),
            strict=True,
        )
        assert any(not torch.equal(a, b) for a, b in pairs) == changed


def test_rows_are_tokenized_once(world: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    values = values_of("tide across tokenizers", world)
    values["data"]["cache"] = str(cache)
    train(parse_config(values), tmp_path / "one")
    files = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(files) == 6
    train(parse_config(values), tmp_path / "two")
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == files
    values["roles"]["teacher"]["family"]["max_length"] = 48
    train(parse_config(values), tmp_path / "three")
    assert len(list(cache.iterdir())) == 12


def test_a_dry_run_counts_parameters_and_leaves_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = dry_run(parse_config(values_of("tide of an adapter", world)))
    assert "adapted layers" in text
    assert "14" in text  # seven linear layers in each of two blocks
    assert "one step: loss/student" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_packed_rows_reads_the_texts_of_its_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def rows(pair: TextRows[Any], example: Example) -> Any:
        read.append(example.origin)
        return reader(pair, example)

    reader = TextRows.rows
    monkeypatch.setattr(TextRows, "rows", rows)
    values = values_of("bd3lm on packed rows", world)
    values["data"]["path"] = str(write_chats(tmp_path / "chats.jsonl", 100))
    dry_run(parse_config(values))
    assert 0 < len(read) < 50


def test_the_command_line_takes_a_config_with_a_teacher_of_another_family(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tide.yaml"
    file.write_text(yaml.safe_dump(text_values(world, "tide")))
    overrides = ["roles.teacher.family.block=8", "train.steps=1"]
    monkeypatch.setattr(
        "sys.argv", ["diffdistill", "train", str(file), *overrides, "--output", str(tmp_path / "r")]
    )
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    saved = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert saved["roles"]["teacher"]["family"]["block"] == 8
    assert saved["roles"]["teacher"]["family"]["attention"] == "sdpa"
    assert parse_config(saved).to_dict() == saved


@pytest.mark.parametrize("name", ["bd3lm of a whole row", "tide of an adapter"])
def test_an_exported_student_predicts_what_it_did_in_its_run(
    name: str, world: Path, tmp_path: Path
) -> None:
    train(parse_config(values_of(name, world)), tmp_path / "run")
    session = restore(tmp_path / "run", "latest", CPU)
    assert isinstance(session.family, TextPair)
    role = "average" if "average" in session.roles.by_name else "student"
    export(tmp_path / "run", tmp_path / "model", role=role, layout="model")
    family = replace(session.family.student, path=str(tmp_path / "model"))
    batch = text_batch(session.family, 2)
    text = session.family.text(batch)
    state = session.family.noised(batch, torch.ones(2), text.maskable)
    condition = session.family.condition(batch)
    with torch.no_grad():
        expected = dense(session.roles[role](state, condition))
        found = dense(family.predict(family.network(), state, condition))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="is not empty: export into a new folder"):
        export(tmp_path / "run", tmp_path / "model")


# errors


def test_the_family_of_a_teacher_is_checked_as_strictly_as_any(world: Path) -> None:
    def changed(**family: Any) -> dict[str, Any]:
        values = text_values(world, "tide")
        values["roles"]["teacher"]["family"] |= family
        return values

    with pytest.raises(UserError, match=r"roles\.teacher: family\.blokc: unknown key, did you"):
        parse_config(changed(blokc=3))
    with pytest.raises(UserError, match=r"unknown family 'mdml', did you mean 'mdlm'\?"):
        parse_config(changed(name="mdml"))
    with pytest.raises(UserError, match=r"roles\.teacher: the section 'family' needs a name"):
        parse_config(text_values(world, "tide", roles={"teacher": {"family": "mdlm"}}))
    with pytest.raises(UserError, match="family mdlm: max_length 10 must be a multiple"):
        build(parse_config(changed(max_length=10)), CPU)


def test_the_schema_describes_the_family_of_a_role() -> None:
    schema = json.loads(json_schema())
    family = schema["properties"]["roles"]["additionalProperties"]["properties"]["family"]
    assert {"$ref": "#/properties/family"} in family["anyOf"]
    families = schema["properties"]["family"]["oneOf"]
    names = {part["properties"]["name"]["const"] for part in families}
    assert {"bd3lm", "mdlm"} <= names


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"name": "sft"}}, "method sft is for images and videos: .*not bd3lm"),
        ({"family": {"name": "toy"}}, "method bd3lm is for texts: .*not toy"),
        ({"family": {"quantize": "nf4"}}, r"family\.quantize: nf4 stores the network rounded"),
        ({"family": {"path": "no/where"}}, "neither a folder nor a hub id|cannot find"),
        ({"data": {"path": "no.jsonl"}}, r"data\.path no\.jsonl does not exist"),
        (
            {"roles": {"student": {"family": {"name": "mdlm"}}}},
            r"roles\.student\.family: only the teacher of a text model may have one",
        ),
        ({"method": {"t_low": 2.0}}, "method bd3lm: low and high must be"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(
    sections: dict[str, Any], message: str, world: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if sections.get("family", {}).get("name") == "toy":
        values = text_values(world) | {"family": {"name": "toy"}}
    else:
        values = text_values(world, **sections)
    with pytest.raises(UserError, match=message) as caught:
        train(parse_config(values), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_shared_vocabulary_is_demanded_before_and_during_training(
    world: Path, tmp_path: Path
) -> None:
    other = text_values(world, "tide", roles={"teacher": {"path": str(world / "moe")}})
    with pytest.raises(UserError, match="has another tokenizer than"):
        train(parse_config(other), tmp_path / "path")
    family = text_values(world, "tide", method={"variant": "shared"})
    with pytest.raises(UserError, match="variant shared needs one vocabulary: the student's token"):
        train(parse_config(family), tmp_path / "family")


def test_answers_that_a_long_prompt_leaves_no_room_for_are_an_error_or_left_out(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_chats(tmp_path / "chats.jsonl")
    long = [{"role": "user", "content": "why? " * 60}, {"role": "assistant", "content": "so"}]
    file.write_text(file.read_text() + "\n" + json.dumps({"messages": long}))
    values = text_values(world, data={"path": str(file)})
    with pytest.raises(UserError, match=r"chats\.jsonl:7: its prompt of \d+ tokens leaves no room"):
        train(parse_config(values), tmp_path / "strict")
    values["data"]["on_error"] = "skip"
    train(parse_config(values), tmp_path / "lenient")
    assert "left out 1 texts" in caplog.text
    assert all(value > 0 for value in losses(tmp_path / "lenient").values())


def test_pictures_of_texts_are_refused(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.yaml"
    file.write_text(yaml.safe_dump(text_values(world)))
    for ask in (preview, sample):
        with pytest.raises(UserError, match="family bd3lm makes texts, not images or videos"):
            ask(str(file))
    with pytest.raises(
        UserError, match="no suite 'few-step' for texts; there is text, python, lm-eval"
    ):
        evaluate(str(file), suite="few-step")


def test_what_is_compiled_is_what_is_called(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__)
    )
    build(parse_config(text_values(world, train={"compile": True})), CPU)
    assert compiled == ["Qwen3Model"]


def test_a_stream_says_from_time_to_time_what_it_leaves_out(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question_feed, "TOLD_EVERY", 6)
    rows = (world / "chats.jsonl").read_text().splitlines()
    long = {
        "messages": [
            {"role": "user", "content": "why? " * 200},
            {"role": "assistant", "content": "x"},
        ]
    }
    (tmp_path / "chats.jsonl").write_text("\n".join([*rows, json.dumps(long)]))
    data = {"path": str(tmp_path / "chats.jsonl"), "on_error": "skip", "streaming": True}
    values = text_values(world, "bd3lm", data=data, train={"steps": 12})
    train(parse_config(values), tmp_path / "run")
    assert caplog.text.count("left out") > 1

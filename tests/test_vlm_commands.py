"""Vision-language runs through the commands: train, sample, evaluate, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffdistill import cli
from diffdistill.asking import question, questions_of, reply
from diffdistill.checkpoints import Checkpoints, restore
from diffdistill.commands.evaluate import evaluate
from diffdistill.commands.export import export
from diffdistill.commands.sample_answers import sample_answers
from diffdistill.commands.train import dry_run, train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.evaluation.contexts import solutions_of
from diffdistill.session import build
from tests.answer_run import answer_values, save_answer_world, stopped
from tests.conftest import CPU
from tests.tiny_vlm import save_seeing_world, seeing_values
from tests.toy_run import forked, losses

LORA = {"student": {"adapter": "lora", "rank": 2, "alpha": 4}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = save_seeing_world(tmp_path_factory.mktemp("seeing"))
    for name, roles in (("full", {}), ("lora", LORA)):
        train(parse_config(seeing_values(folder, roles=roles)), folder / name)
    return folder


def moved(world: Path, run: str) -> set[str]:
    """Return the parts of the student whose weights training has changed."""
    after = Checkpoints(world / run).load()[0].tensors["role-student"]
    if run == "lora":
        names = [n for n, value in after.items() if "lora_B" in n and value.any()]
    else:
        source = AutoModelForImageTextToText.from_pretrained(str(world / "student"))
        before = source.state_dict()
        names = [n for n, value in after.items() if not torch.equal(value, before[n])]
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    return {part for part in parts for name in names if part in name}


def test_training_changes_encoder_projector_and_language_model(world: Path) -> None:
    assert moved(world, "full") == {"vision_tower", "multi_modal_projector", "language_model"}
    assert moved(world, "lora") == {"vision_tower", "language_model"}
    for run in ("full", "lora"):
        line = json.loads((world / run / "metrics.jsonl").read_text().splitlines()[0])
        total = sum(line[f"{name}/student"] for name in ("answers", "align", "switch"))
        assert line["loss/student"] == pytest.approx(total, rel=1e-5)


def test_networks_that_are_compiled_cannot_be_switched(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    values = seeing_values(world, train={"compile": True})
    with pytest.raises(UserError, match=r"set train\.compile: false, or method\.switch_weight: 0"):
        build(parse_config(values), CPU)
    assert not compiled
    values["method"]["switch_weight"] = 0
    build(parse_config(values), CPU)
    assert compiled


def test_a_run_goes_on_exactly(world: Path, tmp_path: Path) -> None:
    config = parse_config(seeing_values(world, train={"steps": 4, "save_every": 2}))
    assert forked(lambda: train(config, tmp_path / "whole")) == 0
    assert forked(lambda: stopped(config, tmp_path / "broken")) == 1
    assert forked(lambda: train(config, tmp_path / "broken", "latest")) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_micro_batches_and_recomputation_take_the_same_steps(world: Path, tmp_path: Path) -> None:
    found = []
    for name, batch_size, train_too in (
        ("one", 4, {}),
        ("two", 2, {"accumulate": 2}),
        ("again", 4, {"gradient_checkpointing": True}),
    ):
        sections = {"data": {"batch_size": batch_size}, "train": {"steps": 2, "lr": 1e-3}}
        sections["train"] |= train_too
        train(parse_config(seeing_values(world, **sections)), tmp_path / name)
        found.append(losses(tmp_path / name))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("method", ["opd", "grpo"])
def test_on_policy_methods_take_pictures_too(method: str, world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": method, "max_tokens": 4, "num_answers": 2}
    values = seeing_values(world, train={"steps": 1})
    values["method"] = options | ({"divergence": "dbild"} if method == "opd" else {})
    values["roles"] = {} if method == "grpo" else values["roles"]
    train(parse_config(values), tmp_path)
    assert all(torch.tensor(list(losses(tmp_path).values())).isfinite())


def test_what_does_not_fit_is_told_by_a_dry_run(world: Path) -> None:
    for teacher, told in (("wide", "needs encoders of one grid and width"), ("foreign", "vocab")):
        family = {"name": "vlm", "path": str(world / teacher)}
        values = seeing_values(world, roles={"teacher": {"family": family}})
        with pytest.raises(UserError, match=told):
            dry_run(parse_config(values))
    with pytest.raises(UserError, match="written by transformers alone"):
        dry_run(parse_config(seeing_values(world, engine={"name": "continuous"})))
    lora = {"adapter": "lora", "rank": 2, "targets": ["language_model.layers.0.self_attn.q_proj"]}
    values = seeing_values(world, roles={"student": lora})
    with pytest.raises(UserError, match="nothing of the student's vision encoder is trained"):
        dry_run(parse_config(values))


def test_one_question_about_two_pictures_is_two(world: Path, tmp_path: Path) -> None:
    rows = [
        {"image": str(world / f"{number}.png"), "text": "sum?", "answer": str(number)}
        for number in (0, 1, 0)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    session = build(parse_config(seeing_values(world, data={"path": str(file)})), CPU)
    asked = questions_of(session)
    assert [example.answer for example in asked] == ["0", "1"]
    assert list(solutions_of(asked).values()) == [["0"], ["1"]]


def test_a_question_on_an_image_is_answered_on_the_command_line(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(world / "full")

    def command(*words: str) -> Any:
        monkeypatch.setattr("sys.argv", ["diffdistill", *words])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code

    ask = ("sample", run, "--prompt", "left?")
    assert command(*ask, "--image", str(world / "0.png"), "--compare", "student,teacher") == 0
    assert capsys.readouterr().out.count("> left?") == 2
    assert command(*ask, "--image", "nowhere.png") == 2
    assert "--image nowhere.png: there is no such file" in capsys.readouterr().err
    assert command("sample", run, "--image", str(world / "0.png")) == 2
    assert "--image is what a --prompt is about" in capsys.readouterr().err
    assert command("sample", "dmd/digits", "--image", "x.png") == 2
    assert "--image is for autoregressive models" in capsys.readouterr().err


def test_answers_are_about_the_image_that_is_given(world: Path) -> None:
    session = restore(world / "full")
    role, settings = session.roles["student"], session.config.replies
    drafts = []
    for name in ("0.png", "1.png"):
        (draft,) = reply(session, role, [question("left?", [world / name])], settings)
        (row,) = sample_answers(str(world / "full"), prompts=["left?"], images=[world / name])
        assert row["tokens"] == len(draft.tokens)
        drafts.append(draft.tokens)
    assert drafts[0] != drafts[1]


def test_accuracy_is_measured_by_exact_answers(world: Path) -> None:
    text = evaluate(str(world / "full"), overrides=["evaluate.roles=[student,teacher]"])
    found = json.loads((world / "full" / "evaluation-answers.json").read_text())
    lines = (world / "full" / "evaluation-answers-samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["model"] == "student"]
    right = [float(row["answer"].strip() == row["reference"]) for row in rows]
    mean = next(r for r in found["rows"] if (r["model"], r["metric"]) == ("student", "mean@1"))
    assert mean["value"] == pytest.approx(sum(right) / 4)
    assert [row["score"] for row in rows] == right
    assert "4 questions" in text


@pytest.mark.parametrize("run", ["full", "lora"])
def test_an_exported_folder_answers_in_transformers_as_the_student_does(
    run: str, world: Path, tmp_path: Path
) -> None:
    folder = export(world / run, tmp_path / "model", layout="model")
    network: Any = AutoModelForImageTextToText.from_pretrained(str(folder)).eval()
    processor = AutoProcessor.from_pretrained(str(folder))
    session = restore(world / run)
    asked = [question("left?", [world / "0.png"])]
    [expected] = reply(session, session.roles["student"], asked, session.config.replies)
    content = [{"type": "image"}, {"type": "text", "text": "left?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    with Image.open(world / "0.png") as image:
        inputs = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
    rows = network.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert rows[0, inputs["input_ids"].shape[1] :].tolist() == expected.tokens


def test_text_models_take_the_method_without_its_switched_term(tmp_path: Path) -> None:
    folder = save_answer_world(tmp_path / "texts")
    values = answer_values(folder, roles={"teacher": {"path": str(folder / "other")}})
    values["method"] = {"name": "switch-kd", "switch_weight": 0.0}
    train(parse_config(values), tmp_path / "run")
    assert all(torch.tensor(list(losses(tmp_path / "run").values())).isfinite())
    values["method"]["switch_weight"] = 1.0
    with pytest.raises(UserError, match="CausalLM has no vision encoder to switch"):
        dry_run(parse_config(values))

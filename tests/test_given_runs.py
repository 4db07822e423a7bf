"""Runs on given texts with two tokenizers, from ``diffdistill train`` to what is made of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from diffdistill.checkpoints import Checkpoints, restore
from diffdistill.commands.evaluate import evaluate
from diffdistill.commands.export import export
from diffdistill.commands.sample_answers import sample_answers
from diffdistill.commands.train import dry_run, train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.session import build
from tests.answer_run import stopped
from tests.conftest import CPU
from tests.given_run import save_given_world
from tests.toy_run import forked, losses

LORA = {"adapter": "lora", "rank": 2, "alpha": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_given_world(tmp_path_factory.mktemp("given"))


def given_values(world: Path, method: str, /, **sections: Any) -> dict[str, Any]:
    """Return the values of a config; ``sections`` are merged into them."""
    other = {"name": "causal-lm", "path": str(world / "teacher"), "max_length": 200}
    values: dict[str, Any] = {
        "family": {"name": "causal-lm", "path": str(world / "student"), "max_length": 160},
        "method": {"name": method},
        "roles": {} if method == "text-sft" else {"teacher": {"family": other}},
        "data": {"path": str(world / "chats.jsonl"), "batch_size": 2, "turns": "last"},
        "train": {"steps": 4, "lr": 0.01, "save_every": 2},
        "tracking": {"tensorboard": False},
        "sample": {"max_tokens": 6},
    }
    for name, given in sections.items():
        values[name] = values.get(name, {}) | given
    return values


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("method", ["bld", "alm", "text-sft", "text-uld", "text-gold"])
def test_a_run_on_chats_and_texts_learns_them(method: str, world: Path, tmp_path: Path) -> None:
    train(parse_config(given_values(world, method, train={"steps": 12})), tmp_path / "run")
    found = list(losses(tmp_path / "run").values())
    assert len(found) == 12
    assert sum(found[-4:]) < sum(found[:4])


@pytest.mark.parametrize("roles", [{}, {"student": LORA}, {"student": {"head_lr": 0.1}}])
def test_a_run_that_was_stopped_goes_on_with_its_heads_to_the_same_weights(
    roles: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    values = given_values(world, "bld", method={"head": "autoregressive", "head_width": 4})
    values["roles"] |= roles
    config = parse_config(values)
    train(config, tmp_path / "whole")
    forked(lambda: stopped(config, tmp_path / "parts"))
    train(config, tmp_path / "parts", resume="latest")
    whole, parts = (Checkpoints(tmp_path / name).load()[0].tensors for name in ("whole", "parts"))
    assert any(name.startswith("head.") for name in whole["role-student"])
    for file, tensors in whole.items():
        assert all(parts[file][name].equal(tensor) for name, tensor in tensors.items())


def test_targets_are_kept_for_other_runs_and_made_anew_for_another_search(
    world: Path, tmp_path: Path
) -> None:
    shared = {"cache": str(tmp_path / "cache")}
    train(parse_config(given_values(world, "bld", data=shared)), tmp_path / "first")
    kept = files(tmp_path / "cache")
    assert kept
    other = given_values(world, "bld", data=shared, method={"kl_weight": 0.5}, train={"lr": 0.02})
    train(parse_config(other), tmp_path / "second")
    assert files(tmp_path / "cache") == kept
    searched = given_values(world, "bld", data=shared, method={"num_beams": 2})
    train(parse_config(searched), tmp_path / "third")
    assert len(files(tmp_path / "cache")) == 2 * len(kept)


def test_a_stream_makes_its_targets_as_it_goes(world: Path, tmp_path: Path) -> None:
    values = given_values(world, "bld", data={"streaming": True, "shuffle_buffer": 2})
    train(parse_config(values), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 4


@torch.no_grad()
def answered(network: Any) -> Tensor:
    logits: Tensor = network(input_ids=torch.arange(90, 110)[None]).logits
    return logits


@pytest.mark.parametrize("roles", [{}, {"student": LORA}])
def test_an_export_has_no_heads_and_the_same_logits_bit_for_bit(
    roles: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    values = given_values(world, "bld")
    values["roles"] |= roles
    train(parse_config(values), tmp_path / "run")
    written = export(tmp_path / "run", tmp_path / "model", layout="model")
    opened = AutoModelForCausalLM.from_pretrained(str(written)).eval()
    assert not any("head.layers" in name for name in opened.state_dict())
    assert opened.state_dict().keys() == AutoModelForCausalLM.from_pretrained(
        str(world / "student")
    ).state_dict().keys()  # fmt: skip
    student = restore(tmp_path / "run").roles["student"]
    with student.acting(CPU):
        before = answered(student.network)
    student.head = None
    with student.acting(CPU):
        assert answered(student.network).equal(before)
    if not roles:
        assert answered(opened).equal(before)
    torch.testing.assert_close(answered(opened), before, atol=1e-4, rtol=1e-4)


def test_student_and_teacher_answer_questions_each_in_its_own_tokens(world: Path) -> None:
    config = world / "bld.yaml"
    config.write_text(json.dumps(given_values(world, "bld")))
    rows = sample_answers(str(config), prompts=["write it"], compare=["student", "teacher"])
    assert {row["model"] for row in rows} == {"student", "teacher"}


def test_bits_per_byte_are_those_of_each_models_own_tokens(world: Path, tmp_path: Path) -> None:
    train(parse_config(given_values(world, "bld", train={"steps": 12})), tmp_path / "run")
    table = evaluate(
        str(tmp_path / "run"), suite="bits", overrides=["evaluate.roles=[base, student, teacher]"]
    )
    rows = json.loads((tmp_path / "run" / "evaluation-bits.json").read_text())
    found = {(row["model"], row["texts"]): row["bits_per_byte"] for row in rows}
    assert len(found) == 6
    assert all(f"{bits:.4g}" in table for bits in found.values())
    assert found["student", "answers"] < found["base", "answers"]
    assert found["base", "answers"] > 3


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("bld", {"data": {"packing": True}}, "data.packing is for masked diffusion"),
    (
        "bld",
        {
            "data": {"streaming": True},
            "roles": {"student": LORA, "teacher": {"family": None}},
        },
        "the teacher is asked about texts while the student trains, and it shares its weights",
    ),
    ("bld", {"family": {"max_length": 1}}, "max_length must be at least 2, not 1"),
    ("bld", {"method": {"threshold": 1}}, r"method bld: threshold must be in \[0, 1\)"),
    ("alm", {"method": {"temperature": 0}}, "method alm: temperature must be above 0"),
    (
        "bld",
        {"roles": {"teacher": {"weights": "ema"}}},
        "roles.teacher: what it says is kept on disk, so weights must be frozen, not ema",
    ),
]


@pytest.mark.parametrize(("method", "sections", "message"), WRONG)
def test_what_cannot_be_trained_is_said_in_one_line(
    method: str, sections: dict[str, Any], message: str, world: Path
) -> None:
    with pytest.raises(UserError, match=message):
        dry_run(parse_config(given_values(world, method, **sections)))


def test_methods_that_compare_tokens_still_refuse_another_vocabulary(world: Path) -> None:
    with pytest.raises(UserError, match=r"another vocabulary .* two tokenizers \(bld, alm"):
        build(parse_config(given_values(world, "opd")), CPU)


def test_a_text_that_cannot_be_used_is_left_out_and_a_batch_without_any_teaches_nothing(
    world: Path, tmp_path: Path
) -> None:
    data = {"on_error": "skip", "batch_size": 1}
    values = given_values(world, "bld", data=data, family={"max_length": 64})
    train(parse_config(values | {"train": {"steps": 8, "save_every": 8}}), tmp_path / "run")
    found = losses(tmp_path / "run").values()
    assert 0.0 in found
    assert max(found) > 1.0


def test_the_session_reads_texts_for_both(world: Path) -> None:
    session = build(parse_config(given_values(world, "bld")), CPU)
    assert isinstance(session.family, CausalPair)
    assert session.family.annotator is session.method
    assert build(parse_config(given_values(world, "alm")), CPU).family.annotator is None  # type: ignore[union-attr]

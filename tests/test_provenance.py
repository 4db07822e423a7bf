"""Where a model comes from is recorded: for runs, checkpoints and exports, over several hops."""

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from diffdistill import cli
from diffdistill.commands.export import export
from diffdistill.commands.provenance import provenance
from diffdistill.commands.train import dry_run, train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.lineage import record_of
from diffdistill.origins import judge_entries
from diffdistill.provenance import bom, hashing
from diffdistill.provenance.card import head, model_card
from diffdistill.provenance.files import dumped, open_record
from diffdistill.provenance.settings import ProvenanceSettings
from diffdistill.provenance.sources import describe_model, describe_source
from diffdistill.provenance.terms import enforce, models_of, obligations, table, terms_of, unmet
from diffdistill.session import build
from tests.answer_run import answer_values, save_answer_world
from tests.conftest import CPU
from tests.toy_run import make_data, toy_values

R1 = "DeepSeek-R1-Distill"
LORA = {"adapter": "lora", "rank": 2, "alpha": 4}


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hops: ``other`` (a Llama) teaches ``student``; the export of that is trained further."""
    torch.set_num_threads(1)
    folder = save_answer_world(tmp_path_factory.mktemp("provenance"))
    for name, license_ in (("student", "apache-2.0"), ("other", "llama3.1")):
        (folder / name / "README.md").write_text(f"---\nlicense: {license_}\n---\nA model.\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        roles = {"student": LORA, "teacher": {"path": str(folder / "other")}}
        values = answer_values(folder, roles=roles, train={"steps": 2, "save_every": 1})
        train(parse_config(values), folder / "first")
        export(folder / "first", folder / "Llama-tiny", layout="model")
        export(folder / "first", folder / "tiny-lora")
        further = answer_values(folder, train={"steps": 1})
        further["family"]["path"] = str(folder / "Llama-tiny")
        train(parse_config(further), folder / "second")
    return folder


def made(world: Path, **sections: Any) -> dict[str, Any]:
    """Return the record of a config that is not trained."""
    values = answer_values(world, **sections)
    return record_of(build(parse_config(values), CPU), created="2026-01-01T00:00:00Z")


def test_runs_checkpoints_and_exports_each_have_a_record_and_a_card(world: Path) -> None:
    steps = {"first": None, "first/checkpoints/step-000001": 1, "first/checkpoints/step-000002": 2}
    steps |= {"Llama-tiny": 2, "tiny-lora": 2}
    for place, step in steps.items():
        assert open_record(world / place)["step"] == step
        assert "distillation" in ModelCard.load(world / place / "README.md").data.tags
    manifest = json.loads((world / "first/checkpoints/step-000001/manifest.json").read_text())
    assert {"provenance.json", "README.md"} <= manifest.keys()


def test_a_record_says_what_the_models_are_by_their_hashes(world: Path) -> None:
    record = open_record(world / "first")
    [teacher] = record["teachers"]
    found = hashing.hashlib.sha256((world / "other/model.safetensors").read_bytes()).hexdigest()
    assert teacher["weights_sha256"] == {"model.safetensors": found}
    assert "tokenizer.json" in record["student"]["tokenizer_sha256"]
    assert (teacher["id"], teacher["route"], teacher["license"]["license"]) == (
        "other", "local", "llama3.1",
    )  # fmt: skip
    assert record["data"][0]["sha256"] == hashing.file_sha256(world / "questions.jsonl")
    assert re.fullmatch("[0-9a-f]{64}", record["method"]["config_sha256"])
    assert record["terms_table"] == {"version": table().version, "compiled": table().compiled}
    assert torch.__version__.startswith(record["environment"]["packages"]["torch"])


def test_a_student_carries_the_past_of_the_folder_it_began_from(world: Path) -> None:
    record = open_record(world / "second")
    hops = {(used.model["id"], used.of, used.hops) for used in models_of(record)}
    assert hops == {
        ("Llama-tiny", "weights", 0),
        ("student", "weights", 1),
        ("other", "outputs", 1),
    }
    assert record["student"]["as_recorded"] is True
    [name] = [o for o in record["obligations"] if o["kind"] == "naming"]
    assert (name["models"], name["hops"], name["status"]) == (["other"], 1, "open")
    tree = provenance(world / "second")
    assert re.search(
        r"student Llama-tiny .*\n.*Llama-tiny: .*Follow, 2 steps\n.*student student", tree
    )


def test_weights_that_changed_after_their_record_are_told(world: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(world / "Llama-tiny", tmp_path / "changed")
    file = changed / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    record = made(world, family={"path": str(changed)})
    assert record["student"]["as_recorded"] is False
    unknown = {o["id"] for o in record["obligations"] if o["kind"] == "unknown"}
    assert "unknown/changed" in unknown  # they may be anybody's
    (tmp_path / "provenance.json").write_text(dumped(record))
    assert "its weights have changed since" in provenance(tmp_path)


def test_an_export_is_judged_by_its_name(world: Path) -> None:
    for name, status in (("Llama-tiny", "met"), ("tiny-lora", "open")):
        [item] = [o for o in open_record(world / name)["obligations"] if o["kind"] == "naming"]
        assert item["status"] == status


def test_only_weights_that_the_run_made_are_exported(world: Path, tmp_path: Path) -> None:
    for role, told in (
        ("teacher", r"has no weights of its own, they are frozen: export student$"),
        ("critic", r"no role 'critic' in .*; here: student$"),
    ):
        with pytest.raises(UserError, match=told):
            export(world / "first", tmp_path / "out", role=role)
        assert not (tmp_path / "out").exists()


def test_teachers_are_in_a_key_of_their_own_and_never_base_models(world: Path) -> None:
    record = open_record(world / "first")
    record["student"] |= {"id": "owner/small", "source": "hub", "revision": "a" * 40}
    record["teachers"][0] |= {"id": "owner/large", "source": "hub", "route": "hub"}
    for adapter, relation in ((True, "adapter"), (False, "finetune")):
        record["result"] |= {"adapter": adapter, "license": "mit"}
        card = ModelCard(model_card(record)).data.to_dict()
        assert (card["base_model"], card["base_model_relation"]) == ("owner/small", relation)
        assert card["license"] == "mit"
        [teacher] = card["teacher_models"]
        assert teacher == {
            "id": "owner/large", "role": "teacher", "route": "hub", "license": "llama3.1",
        }  # fmt: skip


def test_a_card_keeps_its_own_keys_when_the_hubs_library_writes_it_again(world: Path) -> None:
    card = ModelCard.load(world / "tiny-lora" / "README.md")
    again = ModelCard(str(card)).data.to_dict()
    assert again == head(open_record(world / "tiny-lora")).to_dict()
    assert again["library_name"] == "peft"
    assert "base_model" not in again  # a folder of this machine is no model on the hub


ROUTES: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({"student": LORA}, "adapter-off"),
    "full": ({}, "copy"),
    "average": ({"teacher": {"weights": "ema"}}, "ema"),
    "live": ({"teacher": {"weights": "live"}}, "live"),
}


@pytest.mark.parametrize("name", ROUTES)
def test_a_teacher_that_is_the_student_says_by_which_route(world: Path, name: str) -> None:
    roles, route = ROUTES[name]
    record = made(world, roles=roles)
    assert [t["route"] for t in record["teachers"]] == [route]
    assert [used.model["role"] for used in models_of(record)] == ["student"]


def test_a_servers_name_of_a_model_and_a_source_of_data_tell_no_place(world: Path) -> None:
    served = {"name": "server", "path": "http://localhost:1/v1", "model": str(world / "other")}
    method = {"name": "opd", "support": "teacher", "support_size": 4}
    record = made(world, roles={"teacher": {"family": served}}, method=method)
    assert record["teachers"][0]["id"] == "other"
    for source, files in ((str(world), None), ("json", [str(world / "questions.jsonl")])):
        entry = describe_source(source, "train", files, hashed=True)
        assert str(world.parent) not in json.dumps(entry)
        assert re.search("[0-9a-f]{64}", json.dumps(entry))
    assert describe_source("owner/set", "train", None, hashed=True)["id"] == "owner/set"


def test_an_exported_file_and_a_pipelines_transformer_carry_their_past(
    world: Path, tmp_path: Path
) -> None:
    weights = world / "Llama-tiny" / "model.safetensors"
    record = dumped(open_record(world / "Llama-tiny"))
    (tmp_path / "one").mkdir()
    shutil.copy(weights, tmp_path / "one" / "x.safetensors")
    (tmp_path / "one" / "x.provenance.json").write_text(record)
    (tmp_path / "two" / "transformer").mkdir(parents=True)
    shutil.copy(weights, tmp_path / "two" / "transformer" / "w.safetensors")
    (tmp_path / "two" / "provenance.json").write_text(record)
    (tmp_path / "one" / "provenance.json").write_text('{"_type": "of another tool"}')
    assert "upstream" not in describe_model("one", tmp_path / "one", None, hashed=True)
    for place in (tmp_path / "one" / "x.safetensors", tmp_path / "two" / "transformer"):
        entry = describe_model(str(place), place, None, hashed=True)
        assert entry["as_recorded"] is True
        assert entry["upstream"]["result"]["name"] == "Llama-tiny"


def test_experts_and_the_data_of_all_their_skills_are_recorded(world: Path) -> None:
    other = str(world / "other")
    skills = {name: str(world / "questions.jsonl") for name in ("sums", "words")}
    values = answer_values(world, rewards="tests.answer_run:Length")
    values["method"] = {"name": "copd", "num_answers": 2, "snapshot": "phase"}
    values["data"] = {"batch_size": 2, "skills": skills}
    values["roles"] = {name: {**LORA, "path": other} for name in skills}
    record = record_of(build(parse_config(values), CPU))
    routes = {model["role"]: model["route"] for model in record["teachers"]}
    assert routes == {
        "sums": "expert", "words": "expert", "sums-before": "ema", "words-before": "ema",
    }  # fmt: skip
    assert (record["student"]["id"], record["student"]["route"]) == ("other", "init")
    assert [used.model["role"] for used in models_of(record)] == ["student"]
    assert [entry["id"] for entry in record["data"]] == ["questions.jsonl"] * 2


def test_a_server_is_recorded_by_host_and_model_without_its_key_or_address(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    served = {"name": "server", "path": "https://api.openai.com/v1", "model": "some-model"}
    teacher = {"family": {**served, "api_key_variable": "MY_KEY"}}
    method = {"name": "opd", "support": "teacher", "support_size": 4}
    record = made(world, roles={"teacher": teacher}, method=method)
    [entry] = record["teachers"]
    assert entry == {
        "role": "teacher", "route": "server", "id": "some-model", "source": "server",
        "host": "api.openai.com",
    }  # fmt: skip
    assert terms_of(entry) == ["openai-api"]
    assert "openai-api/competing" in {o["id"] for o in record["obligations"]}
    assert "secret" not in dumped(record)


def test_a_run_that_goes_on_with_other_models_and_data_tells_of_the_earlier_ones(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = {"student": LORA, "teacher": {"path": str(world / "other")}}
    for steps, teacher, data in ((1, "other", "a"), (2, "student", "b"), (3, "student", "b")):
        shutil.copy(world / "questions.jsonl", tmp_path / f"{data}.jsonl")
        roles["teacher"] = {"path": str(world / teacher)}
        data_path = {"path": str(tmp_path / f"{data}.jsonl")}
        values = answer_values(world, roles=roles, data=data_path, train={"steps": steps})
        train(parse_config(values), tmp_path / "run", resume="latest")
        record = open_record(tmp_path / "run")
        assert ("earlier" in record) == (steps > 1)
    assert [(e["role"], e["id"]) for e in record["earlier"]] == [
        ("teacher", "other"), ("data", "a.jsonl"),
    ]  # fmt: skip
    assert open_record(tmp_path / "run/checkpoints/step-000003")["earlier"] == record["earlier"]
    assert "llama-3.1/name" in unmet(record)
    told = provenance(tmp_path / "run")
    assert "earlier teacher other (local" in told
    assert "earlier data a.jsonl" in told
    assert "other" in {teacher["id"] for teacher in head(record).to_dict()["teacher_models"]}
    assert "| teacher (earlier) | other |" in model_card(record)
    monkeypatch.setattr(bom, "_check", lambda text: None)  # slow, and of another test
    names = {part["name"] for part in json.loads(bom.bill(record))["components"]}
    assert {"other", "a.jsonl", "b.jsonl"} <= names
    values["provenance"] = {"policy": "error"}
    values["train"]["steps"] = 4
    with pytest.raises(UserError, match=r"open obligations: llama-3\.1/name"):
        train(parse_config(values), tmp_path / "run", resume="latest")

    other_folder = str(tmp_path / "run/checkpoints/step-000001")
    del values["provenance"]
    train(parse_config(values), tmp_path / "moved", resume=other_folder)
    assert ("teacher", "other") in {
        (entry["role"], entry["id"]) for entry in open_record(tmp_path / "moved")["earlier"]
    }


def test_a_record_holds_no_prompt_and_no_place_of_this_machine(world: Path) -> None:
    record = made(world, data={"student_prompt": "PRIVATE {question}"})
    for text in (dumped(record), model_card(record)):
        assert "PRIVATE" not in text
        assert str(world) not in text
        assert "2+2" not in text


def test_the_same_run_gives_the_same_record_card_and_bill(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bom, "_check", lambda text: None)  # slow, and of another test
    first, second = made(world), made(world)
    (tmp_path / "a.json").write_text(dumped(first))
    (tmp_path / "b.json").write_text(dumped(second))
    for form in ("json", "card", "bom", "tree"):
        assert provenance(tmp_path / "a.json", form=form) == provenance(
            tmp_path / "b.json", form=form
        )


# terms


def model(**entry: Any) -> dict[str, Any]:
    return {
        "id": "m",
        "role": "teacher",
        "route": "local",
        "source": "local",
        "license": None,
        **entry,
    }


@pytest.mark.parametrize("text", ["a: [", "- a", "? [a]\n: b", "1: 2", "license: 3"])
def test_a_card_that_cannot_be_read_tells_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\nA model.\n", encoding="utf-8")
    assert describe_model("one", tmp_path, None, hashed=False)["license"] is None


def test_a_folder_of_licenses_is_no_license_file(tmp_path: Path) -> None:
    (tmp_path / "LICENSES").mkdir()
    assert describe_model("one", tmp_path, None, hashed=False)["license"] is None
    (tmp_path / "LICENSE").write_text("Do what you like.", encoding="utf-8")
    found = describe_model("one", tmp_path, None, hashed=False)["license"]
    assert found == {"text_sha256": hashing.file_sha256(tmp_path / "LICENSE")}


@pytest.mark.parametrize(
    ("entry", "terms"),
    [
        ({"license": {"license": "llama3.2"}}, "llama-3.2"),
        ({"license": {"license": "other", "license_name": "qwen-research"}}, "qwen-research"),
        ({"id": "google/gemma-3-4b-it"}, "gemma"),
        ({"id": "google/gemma-4-it"}, "apache-2.0"),
        ({"id": "Qwen/Qwen3-8B", "license": {"license": "gemma"}}, "gemma"),
        ({"terms_stated": "mit", "license": {"license": "gemma"}}, "mit"),
        ({"host": "api.deepseek.com", "id": "deepseek-chat"}, "deepseek-api"),
        ({"host": "api.example.com", "id": "Qwen/Qwen3-8B"}, None),
        ({"host": "10.0.0.7", "id": "Qwen/Qwen3-8B"}, "apache-2.0"),
        ({"host": "localhost", "id": "Qwen/Qwen3-8B"}, "apache-2.0"),
        ({"id": f"deepseek-ai/{R1}-Llama-70B", "license": {"license": "mit"}}, "mit llama-3.3"),
        ({"id": f"deepseek-ai/{R1}-Llama-8B"}, "mit llama-3.1"),
        ({"id": f"{R1}-Qwen-32B", "license": {"license": "mit"}}, "mit apache-2.0"),
        ({"id": f"{R1}-Llama-70B", "host": "localhost"}, "mit llama-3.3"),
        ({"id": f"{R1}-Llama-70B", "host": "api.example.com"}, None),
        ({"id": f"{R1}-Llama-70B", "terms_stated": "mit"}, "mit"),
        ({"license": {"license": "made-up"}}, None),
        ({"license": {"license": "other"}}, None),
    ],
)  # fmt: skip
def test_terms_are_found_by_statement_host_license_or_id(entry: Any, terms: str | None) -> None:
    assert terms_of(model(**entry)) == ([] if terms is None else terms.split())


def test_a_model_that_was_tuned_from_a_llama_asks_for_what_a_llama_does() -> None:
    teacher = model(id=f"deepseek-ai/{R1}-Llama-70B", license={"license": "mit"})
    assert judged(teacher) == {"llama-3.3/name": "open"}


def judged(teacher: dict[str, Any], **settings: Any) -> dict[str, str]:
    apache = model(role="student", license={"license": "cc0-1.0"})
    record = {"student": apache, "teachers": [teacher], "judges": []}
    return {o["id"]: o["status"] for o in obligations(record, ProvenanceSettings(**settings))}


def test_unknown_terms_stay_unknown_until_somebody_says_otherwise() -> None:
    assert judged(model()) == {"unknown/m": "unknown"}
    assert judged(model(), acknowledged=["unknown/m"]) == {"unknown/m": "acknowledged"}
    assert judged(model(terms_stated="cc0-1.0")) == {}


def test_a_notice_that_must_be_kept_is_noted_and_stops_nobody() -> None:
    record = {"student": model(role="student", license={"license": "mit"})}
    record |= {"teachers": [], "judges": []}
    record["obligations"] = obligations(record, ProvenanceSettings(policy="error"))
    assert [(o["id"], o["status"]) for o in record["obligations"]] == [("mit/notice", "noted")]
    assert enforce(record, ProvenanceSettings(policy="error")) is None


def test_a_name_meets_terms_that_ask_for_one_and_nothing_else_does() -> None:
    llama = model(license={"license": "llama3.1"})
    for name, status in (("Llama-x", "met"), ("me/Llama-x", "met"), ("My-Llama", "open")):
        assert judged(llama, name=name) == {"llama-3.1/name": status}
    gemma = judged(model(license={"license": "gemma"}), name="gemma-x")
    assert set(gemma.values()) == {"open"}


def test_every_entry_of_the_table_says_where_it_is_from() -> None:
    from cyclonedx.spdx import is_supported_id

    kinds = {"naming", "notice", "display", "use", "derivative", "competing", "noncommercial"}
    assert table().version >= 1
    for terms in table().entries.values():
        assert terms.url.startswith("https://")
        assert terms.evidence != "copy" or terms.read
        assert terms.spdx is None or is_supported_id(terms.spdx)
        for item in terms.obligations:
            assert item["kind"] in kinds
            assert set(item["of"]) <= {"weights", "outputs"}
            assert ("prefix" in item) == (item["kind"] == "naming")


def test_the_policy_error_refuses_to_train_and_to_export(world: Path, tmp_path: Path) -> None:
    roles = {"student": LORA, "teacher": {"path": str(world / "other")}}
    strict = {"policy": "error"}
    values = answer_values(world, roles=roles, provenance=strict, train={"steps": 1})
    with pytest.raises(UserError, match=r"open obligations: llama-3\.1/name; set provenance"):
        train(parse_config(values), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    values["provenance"] = {**strict, "name": "Llama-mine"}
    train(parse_config(values), tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("Llama-mine", "mine"))
    with pytest.raises(UserError, match="open obligations"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_policy_warn_says_what_is_open(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(parse_config(answer_values(world, roles={"teacher": {"path": str(world / "other")}})))
    assert "open obligations: llama-3.1/name (see" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"techer": "mit"}, r"no role or reward 'techer', did you mean 'teacher'\?"),
        ({"teacher": "lama-3.1"}, r"has no 'lama-3\.1', did you mean 'llama-3\.1'\?"),
    ],
)
def test_stated_terms_must_be_of_a_role_and_in_the_table(
    world: Path, terms: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        made(world, provenance={"terms": terms})


# hashes


def test_a_file_is_read_once_and_again_only_if_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = tmp_path / "a.safetensors", []
    digest = hashing.hashlib.file_digest
    monkeypatch.setattr(hashing.hashlib, "file_digest", lambda *a: read.append(a) or digest(*a))
    file.write_bytes(b"one")
    first = hashing.weights_sha256(tmp_path)
    assert hashing.weights_sha256(tmp_path) == first
    assert len(read) == 1
    file.write_bytes(b"three")
    assert hashing.weights_sha256(tmp_path) != first
    assert len(read) == 2


def test_a_snapshot_of_the_hub_is_named_by_its_commit_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, digest = "c" * 40, "d" * 64
    folder = tmp_path / "models--owner--name" / "snapshots" / commit
    blobs = folder.parents[1] / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / digest).write_bytes(b"weights")
    (folder / "model.safetensors").symlink_to(blobs / digest)
    monkeypatch.setattr(hashing.hashlib, "file_digest", None)
    entry = describe_model("owner/name", folder, "main", hashed=True)
    assert (entry["id"], entry["source"], entry["revision"]) == ("owner/name", "hub", commit)
    assert entry["weights_sha256"] == {"model.safetensors": digest}


def test_a_folder_of_data_is_known_by_its_tables_and_by_what_lies_in_it(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data", 2)
    first = hashing.data_sha256(folder)
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().swapcase())
    second = hashing.data_sha256(folder)
    (folder / "1.png").rename(folder / "2.png")
    assert len({first, second, hashing.data_sha256(folder)}) == 3


# bills and the command


def test_a_bill_is_cyclonedx_without_asking_the_net(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", None)
    bill = json.loads(provenance(world / "second", form="bom"))
    assert (bill["specVersion"], bill["metadata"]["component"]["name"]) == ("1.7", "student")
    names = {part["bom-ref"]: part["name"] for part in bill["components"]}
    on = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    [begun] = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert begun["name"] == "Llama-tiny"
    [reference] = [r for r in on[bill["metadata"]["component"]["bom-ref"]] if r.startswith("model")]
    [past] = on[reference]
    assert {names[r] for r in on[past]} == {"student", "other", "questions.jsonl"}


def test_every_model_of_a_reward_is_recorded_and_its_terms_can_be_stated(world: Path) -> None:
    reward = {
        "name": "video-reward",
        "path": str(world / "other"),
        "base_path": str(world / "student"),
        "tokenizer_path": str(world / "cache"),  # no model
    }
    found = judge_entries(reward, hashed=False)
    assert [(m["id"], m["route"], m["reward"]) for m in found] == [
        ("other", "judge", "video-reward"), ("student", "judge", "video-reward"),
    ]  # fmt: skip
    assert judge_entries({"name": "boxed"}, hashed=False)[0]["route"] == "rule"
    terms = {"terms": {"tests.answer_run:Length": "mit"}}
    rewards = [{"name": "tests.answer_run:Length"}]
    method = {"name": "tests.answer_run:Judged"}
    record = made(world, method=method, rewards=rewards, provenance=terms)
    assert record["judges"][0]["terms_stated"] == "mit"


def test_a_bill_tells_the_role_of_each_judge_of_several(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bom, "_check", lambda text: None)  # slow, and of another test
    record = open_record(world / "first")
    record["judges"] = [model(role="reward", route="judge", id=name) for name in ("a", "b")]
    subject = json.loads(bom.bill(record))["metadata"]["component"]
    told = subject["modelCard"]["properties"]
    refs = [p["value"] for p in told if p["name"] == "diffdistill:reward:judge"]
    assert len(set(refs)) == 2


def test_a_run_of_images_has_a_record_too(tmp_path: Path) -> None:
    values = toy_values(make_data(tmp_path / "data"), steps=2)
    train(parse_config(values), tmp_path / "run")
    record = open_record(tmp_path / "run")
    assert [t["route"] for t in record["teachers"]] == ["ema"]
    assert record["student"]["source"] == "made"
    assert record["obligations"] == []


def test_the_command_shows_the_chain_and_writes_other_forms(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def run(*words: Any) -> str:
        monkeypatch.setattr("sys.argv", ["diffdistill", "provenance", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert ended.value.code == (2 if shown.err else 0)
        return str(shown.out + shown.err)

    assert "teacher other (local" in run(world / "first")
    assert "tiny.cdx.json" in run(
        world / "first", "--format", "bom", "--output", tmp_path / "tiny.cdx.json"
    )
    assert json.loads((tmp_path / "tiny.cdx.json").read_text())["bomFormat"] == "CycloneDX"
    assert "Llama 3.2 Community License" in run("--terms")
    assert "no --format 'bon', did you mean 'bom'?" in run(world / "first", "--format", "bon")
    assert "has no record" in run(tmp_path)
    assert "name a run" in run()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged record"), ("[]", "is no record"), ('{"schema_version": 9}', "of version 9")],
)
def test_a_damaged_record_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_record(tmp_path)

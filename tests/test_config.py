from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffdistill import config, config_files
from diffdistill.config import RunConfig, load_config, parse_config
from diffdistill.config_files import bundled_configs
from diffdistill.errors import UserError
from diffdistill.options import options_model
from diffdistill.role_settings import RoleSettings


def values(**sections: Any) -> dict[str, Any]:
    return {"family": {"name": "toy"}, "method": {"name": "d-opsd"}} | sections


def written(folder: Path, content: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


# defaults


def test_a_short_config_gets_every_option_of_its_method_and_family() -> None:
    checked = parse_config(values(method={"name": "d-opsd", "num_steps": 8}))
    assert checked.method == {
        "name": "d-opsd", "num_steps": 8, "weight": "uniform", "exposure": 1.0,
    }  # fmt: skip
    assert checked.family == {"name": "toy", "path": "", "shift": 1.0}
    assert (checked.train.steps, checked.train.lr, checked.train.clip) == (1000, 1e-4, 1.0)


def test_roles_start_from_the_defaults_of_the_method_and_keep_what_is_not_given() -> None:
    roles = parse_config(values(roles={"teacher": {"decay": 0.5}})).roles
    assert roles == {
        "student": RoleSettings(),
        "teacher": RoleSettings(weights="ema", of="student", decay=0.5),
    }


def test_an_average_of_the_student_is_one_more_role() -> None:
    roles = parse_config(values(train={"ema": 0.99})).roles
    assert roles["average"] == RoleSettings(weights="ema", of="student", decay=0.99)
    assert "average" not in parse_config(values()).roles


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            {"student": {"rank": 32}},
            r"roles.student.rank is for adapter: lora, and it is none: "
            r"set adapter: lora, or leave rank out$",
        ),
        ({"student": {"adapter": "none", "alpha": 8}}, r"student.alpha is for adapter: lora"),
        ({"student": {"dropout": 0.1}}, r"student.dropout is for adapter: lora"),
        ({"student": {"targets": ["mix"]}}, r"student.targets is for adapter: lora"),
        ({"student": {"dora": True}}, r"student.dora is for adapter: lora"),
        (
            {"student": {"decay": 0.5}},
            r"student.decay is for weights: ema, and they are trained: leave decay out$",
        ),
        ({"student": {"start": 3}}, r"student.start is for weights: ema"),
        ({"student": {"of": "teacher"}}, r"student.of is for weights: ema or live"),
        ({"teacher": {"weights": "frozen", "adapter": "lora"}}, r"adapter is for weights: trained"),
        ({"teacher": {"weights": "frozen", "lr": 1e-3}}, r"lr is for weights: trained, .* frozen"),
        ({"teacher": {"weights": "frozen", "decay": 0.5}}, r"decay is for weights: ema"),
        ({"teacher": {"weights": "frozen", "head": True}}, r"head is for weights: trained"),
        ({"teacher": {"weights": "live", "decay": 0.5}}, r"decay is for weights: ema"),
        ({"teacher": {"rank": 8}}, r"teacher.rank is for weights: trained, and they are ema"),
        ({"teacher": {"path": "folder"}}, r"path is for weights: trained or frozen"),
    ],
)
def test_a_setting_of_a_role_that_would_have_no_say_is_refused(roles: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(values(roles=roles))


@pytest.mark.parametrize(
    ("method", "teacher"),
    [
        ("d-opsd", {"weights": "frozen", "adapter": "none", "rank": 64, "lr": None}),
        ("sdpo", {"weights": "frozen"}),
        ("sdpo", {"weights": "live", "decay": 0.95}),
    ],
)
def test_what_a_role_has_by_default_may_be_written_out(method: str, teacher: Any) -> None:
    config = parse_config(values(method={"name": method}, roles={"teacher": teacher}))
    assert config.roles["teacher"].weights == teacher["weights"]
    assert parse_config(config.to_dict()) == config


def test_scientific_notation_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    path = written(tmp_path, "family: {name: toy}\nmethod: {name: sft}\ntrain: {lr: 2e-5}\n")
    assert load_config(path).train.lr == 2e-5


# errors in one line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trian": {}}, r"unknown section 'trian', did you mean 'train'\?"),
        ({"train": {"stepz": 3}}, r"train\.stepz: unknown key, did you mean 'steps'\?"),
        ({"train": {"steps": "many"}}, r"train\.steps: .*integer.*'many'"),
        ({"train": {"steps": 0}}, r"train\.steps: .*greater than 0.*got 0"),
        ({"train": {"steps": 2.5}}, r"train\.steps: .*2\.5"),
        ({"train": {"lr": -1.0}}, r"train\.lr: .*greater than or equal to 0"),
        ({"train": {"lr": float("nan")}}, r"train\.lr: .*finite"),
        ({"train": {"precision": "fp8"}}, r"train\.precision: .*'fp32' or 'bf16'.*'fp8'"),
        ({"train": {"betas": [0.9]}}, r"train\.betas\.1: .*required"),
        ({"train": 5}, r"train: expected keys and values, got 5"),
        ({"train": {1: 2}}, r"train\.1: unknown key"),
        ({"train": {"steps": "x", "lr": "y"}}, r"train\.steps.*\(and 1 more\)"),
        ({"sample": {"prompts": [8]}}, r"sample\.prompts\.0: .*string"),
        ({"data": {"pth": "x"}}, r"data\.pth: unknown key, did you mean 'path'\?"),
        ({"roles": {"studnet": {}}}, r"unknown role 'studnet', did you mean 'student'\?"),
        ({"roles": {"student": {"rnak": 4}}}, r"roles\.student\.rnak: .*did you mean 'rank'\?"),
        ({"roles": {"student": {"weights": "warm"}}}, r"roles\.student\.weights: .*'warm'"),
        ({"roles": {"student": "lora"}}, r"roles\.student: expected keys and values, got 'lora'"),
        ({"roles": "lora"}, r"roles: expected keys and values, got 'lora'"),
        ({"method": "d-opsd"}, r"section 'method' needs a name"),
        ({"method": {"name": "d-opsd", "num_step": 3}}, r"method\.num_step: .*'num_steps'"),
        ({"method": {"name": "d-opsd", "teacher": 3}}, r"method\.teacher: unknown key"),
        ({"method": {"name": "d-opsd", "weight": "t2"}}, r"method\.weight: .*'sigma2'"),
        ({"method": {"name": "dops"}}, r"unknown method 'dops', did you mean 'd-opsd'\?"),
        ({"method": {"name": 3}}, r"section 'method' needs a name"),
        ({"family": {"name": "toy", "device": "cpu"}}, r"family\.device: unknown key"),
        ({"family": {"name": "toy", "path": 3}}, r"family\.path: expected text, got 3"),
        ({"train": False}, r"train: expected keys and values, got False"),
        ({"evaluate": 5}, r"evaluate: expected keys and values, got 5"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_place(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_config(values(**given), "run.yaml")
    assert "\n" not in str(caught.value)


def test_a_config_without_a_family_says_so() -> None:
    with pytest.raises(UserError, match="section 'family' needs a name"):
        parse_config({"method": {"name": "sft"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: {steps: 3", "not valid YAML"), ("- train", "got list"), ("", "got NoneType")],
)
def test_a_file_that_is_not_sections_names_the_file(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=rf"run\.yaml.*{message}") as caught:
        load_config(written(tmp_path, text))
    assert "\n" not in str(caught.value)


# overrides


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("train.steps=7", lambda c: c.train.steps == 7),
        ("--train.steps=7", lambda c: c.train.steps == 7),
        ("train.lr=1e-5", lambda c: c.train.lr == 1e-5),
        ("train.clip=null", lambda c: c.train.clip is None),
        ("train.betas=[0.5, 0.6]", lambda c: c.train.betas == (0.5, 0.6)),
        ("tracking.tensorboard=false", lambda c: c.tracking.tensorboard is False),
        ("method.weight=sigma2", lambda c: c.method["weight"] == "sigma2"),
        ("roles.teacher.decay=0.25", lambda c: c.roles["teacher"].decay == 0.25),
        ("sample.prompts=[a=b, c]", lambda c: c.sample.prompts == ["a=b", "c"]),
        ("data.path=", lambda c: c.data.path is None),
    ],
)
def test_an_override_sets_one_value_in_yaml(tmp_path: Path, override: str, found: Any) -> None:
    path = written(tmp_path, values(data={"path": "folder"}))
    assert not found(load_config(path))
    assert found(load_config(path, [override]))


def test_the_last_override_counts_and_the_rest_of_its_section_stays(tmp_path: Path) -> None:
    path = written(tmp_path, values(train={"steps": 5, "seed": 3}))
    train = load_config(path, ["train.steps=6", "train.steps=7"]).train
    assert (train.steps, train.seed) == (7, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("train.steps.more=3", "'steps' is not a section"),
        ("train.steps=[1", "not valid YAML"),
        ("train.stesp=3", "did you mean 'steps'"),
        ("trian.steps=3", "unknown section 'trian'"),
    ],
)
def test_a_bad_override_is_an_error(tmp_path: Path, override: str, message: str) -> None:
    path = written(tmp_path, values(train={"steps": 5}))
    with pytest.raises(UserError, match=message):
        load_config(path, [override])


# files


def test_the_resolved_config_loads_to_the_same_config(tmp_path: Path) -> None:
    given = values(
        method={"name": "dmd", "guidance": 3.5, "sampler": "euler"},
        roles={"student": {"adapter": "lora", "targets": ["mix"]}, "critic": {"lr": 1e-3}},
        data={"path": "folder", "batch_size": 3},
        train={"ema": 0.99, "betas": [0.0, 0.95], "clip": None},
        sample={"prompts": ["8", "null"], "size": [8, 16]},
        evaluate={"reader": "digits"},
    )
    first = parse_config(given)
    first.save(tmp_path / "resolved.yaml")
    second = load_config(str(tmp_path / "resolved.yaml"))
    assert isinstance(second, RunConfig)
    assert second == first
    assert second != replace(first, evaluate={})
    second.save(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "resolved.yaml").read_text()


def test_bundled_configs_are_found_by_name_and_listed_without_those_of_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("digits/sft", "image/klein", "accelerate/ddp"):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(values(train={"steps": 77})))
    monkeypatch.setattr(config_files, "CONFIGS", tmp_path)
    assert bundled_configs() == ["digits/sft", "image/klein"]
    assert load_config("digits/sft").train.steps == 77
    assert load_config("digits/sft.yaml").train.steps == 77
    with pytest.raises(UserError, match=r"'digits/stf', did you mean 'digits/sft'\?"):
        load_config("digits/stf")


def test_every_bundled_config_is_valid() -> None:
    broken = {}
    for name in bundled_configs():
        try:
            load_config(name)
        except UserError as error:
            broken[name] = str(error)
    assert broken == {}


def test_every_option_of_a_section_has_a_description() -> None:
    for cls in (*config.SECTIONS.values(), RoleSettings):
        fields = options_model(cls).model_fields
        assert [name for name, f in fields.items() if not f.description] == []

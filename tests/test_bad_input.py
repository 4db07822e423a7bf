"""Whatever a user can get wrong is one line that says what and where, and exit code 2."""

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffdistill import cli
from diffdistill.checkpoints import Checkpoints
from tests.toy_run import losses, make_data, toy_values


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Run the command line; return its exit code and what it printed as errors."""
    monkeypatch.setattr("sys.argv", ["diffdistill", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


class Cli:
    """A config file, and the command line on it."""

    def __init__(self, folder: Path, values: dict[str, Any], *patches: Any) -> None:
        self.config = folder / "config.yaml"
        self.output = folder / "run"
        self.patches = patches
        self.config.write_text(yaml.safe_dump(values))

    def train(self, *overrides: str) -> tuple[int, str]:
        arguments = ["train", str(self.config), *overrides, "--output", str(self.output)]
        return run_cli(*self.patches, *arguments)

    def fails(self, *overrides: str) -> str:
        """Train, which must fail with one message, and return it."""
        code, printed = self.train(*overrides)
        assert code == 2, printed
        assert printed.count("error: ") == 1
        assert "Traceback" not in printed
        return printed.partition("error: ")[2]


@pytest.fixture
def toy(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Cli:
    return Cli(tmp_path, toy_values(data), monkeypatch, capsys)


def test_a_good_config_trains(toy: Cli) -> None:
    assert toy.train()[0] == 0
    assert len(losses(toy.output)) == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stesp=3", "train.stesp: unknown key, did you mean 'steps'?"),
        ("trian.steps=3", "unknown section 'trian', did you mean 'train'?"),
        ("method.num_step=3", "method.num_step: unknown key, did you mean 'num_steps'?"),
        ("family.shfit=3", "family.shfit: unknown key, did you mean 'shift'?"),
        ("roles.techer.decay=3", "unknown role 'techer', did you mean 'teacher'?"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.betas=[0.9,1.0]", "train.betas.1: Input should be less than 1"),
        ("train.betas=[-0.1,0.9]", "train.betas.0: Input should be greater than or equal to 0"),
        ("train.steps=0", "train.steps: Input should be greater than 0"),
        ("train.precision=fp8", "train.precision: Input should be 'fp32' or 'bf16'"),
        ("method.name=d-opds", "unknown method 'd-opds', did you mean 'd-opsd'?"),
        ("family.name=flux2-klien", "unknown family 'flux2-klien', did you mean 'flux2-klein'?"),
        ("method.name=nowhere:Class", "cannot load the method 'nowhere:Class'"),
        ("roles.student.adapter=none", "is for adapter: lora, and it is none"),
        ("roles.teacher.of=critic", "which is not a trained role; trained here: student"),
        ("roles.student.targets=[to_q]", "LoRA target 'to_q' matches no layer; suffixes here: mix"),
        ("data.path=nowhere", "nowhere"),
        ("train.optimizer=adamw8bit", "needs the package 'bitsandbytes', not installed here"),
        ("tracking.wandb=mine", "needs the package 'wandb', not installed here"),
        ("train", "override 'train': expected section.key=value"),
    ],
)
def test_a_bad_value_is_one_clear_line(toy: Cli, override: str, expected: str) -> None:
    assert expected in toy.fails(override)


def test_a_config_that_is_not_there_names_the_near_bundled_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run_cli(monkeypatch, capsys, "train", "d-opsd/digts")
    assert code == 2
    assert "no config file 'd-opsd/digts', did you mean 'd-opsd/digits'?" in printed


def test_a_config_that_is_not_yaml_is_named(toy: Cli) -> None:
    toy.config.write_text("train: [")
    assert f"{toy.config}: not valid YAML" in toy.fails()


def test_a_config_that_cannot_be_read_is_named(toy: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)
    assert f"cannot read {toy.config}: Permission denied" in toy.fails()


def test_a_family_without_its_path_says_that_it_is_missing(toy: Cli) -> None:
    values = yaml.safe_load(toy.config.read_text())
    toy.config.write_text(yaml.safe_dump(values | {"family": {"name": "z-image"}}))
    assert "family.path is missing" in toy.fails()


def test_a_schema_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "no" / "such.json"
    code, printed = run_cli(monkeypatch, capsys, "schema", "--output", str(file))
    assert code == 2
    assert f"error: cannot write {file}: No such file or directory" in printed


def test_an_empty_data_set_is_an_error(toy: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in toy.fails(f"data.path={tmp_path / 'empty'}")


def test_a_method_that_needs_images_refuses_prompts_alone(toy: Cli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("0.1\n0.2\n")
    values = yaml.safe_load(toy.config.read_text())
    values |= {"method": {"name": "sft"}, "roles": {}}
    toy.config.write_text(yaml.safe_dump(values))
    line = toy.fails(f"data.path={tmp_path / 'prompts.txt'}", "data.batch_size=1")
    assert "prompts.txt:1: method sft needs an image for every prompt" in line


def test_a_corrupt_image_is_named_or_skipped(toy: Cli, data: Path) -> None:
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:40])
    line = toy.fails()
    assert "3.png" in line
    assert "metadata.jsonl:4" in line
    code, _ = toy.train("data.on_error=skip")
    assert code == 0


def test_a_truncated_checkpoint_falls_back_and_says_so(toy: Cli) -> None:
    toy.train()
    before = losses(toy.output)
    newest = toy.output / "checkpoints" / "step-000008" / "role-student.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    code, _ = toy.train("--resume")
    assert code == 0
    assert losses(toy.output) == before
    assert Checkpoints(toy.output).load()[2] == []


def test_only_damaged_checkpoints_are_an_error_and_nothing_is_lost(toy: Cli) -> None:
    toy.train()
    for manifest in toy.output.glob("checkpoints/step-*/manifest.json"):
        manifest.write_text("{")
    before = losses(toy.output)
    assert "no usable checkpoint" in toy.fails("--resume")
    assert losses(toy.output) == before


def test_a_checkpoint_of_another_model_is_an_error(toy: Cli) -> None:
    toy.train()
    assert "a checkpoint of another model" in toy.fails("roles.student.rank=3", "--resume")


def test_a_folder_that_holds_a_run_is_not_overwritten(toy: Cli) -> None:
    toy.train()
    before = losses(toy.output)
    assert "already holds a run: continue it with --resume" in toy.fails()
    assert losses(toy.output) == before


def test_a_folder_in_use_by_another_run_is_refused(toy: Cli) -> None:
    toy.output.mkdir()
    handle = os.open(toy.output / ".lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert "is in use by another run" in toy.fails()
    finally:
        os.close(handle)
    assert toy.train()[0] == 0


def test_a_folder_that_cannot_be_written_is_refused(toy: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    toy.output = tmp_path / "file" / "run"
    assert "cannot write to" in toy.fails()


def test_a_view_that_the_family_does_not_have_names_those_it_has(toy: Cli) -> None:
    values = yaml.safe_load(toy.config.read_text())
    values["family"] = {"name": "flux2-klein", "path": "bundled:digits-turbo", "view": "vlm"}
    toy.config.write_text(yaml.safe_dump(values))
    assert "family.view: Input should be 'reference', 'last-reference'" in toy.fails()


def test_running_out_of_memory_says_what_to_lower(
    toy: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from diffdistill.trainer import Trainer

    def full(self: Trainer) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "train_step", full)
    assert "lower data.batch_size or data.resolution" in toy.fails()


def test_resume_may_stand_alone_or_name_a_checkpoint() -> None:
    alone = cli._resume_alone
    assert alone(["train", "c", "--resume"]) == ["train", "c", "--resume", "latest"]
    assert alone(["--resume", "--output", "d"]) == ["--resume", "latest", "--output", "d"]
    assert alone(["--resume", "train.steps=3"]) == ["--resume", "latest", "train.steps=3"]
    assert alone(["--resume", "step-000002"]) == ["--resume", "step-000002"]

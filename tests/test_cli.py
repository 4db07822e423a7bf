"""Every command, run on a tiny FLUX.2 klein through the command line."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffdistill import cli
from tests.tiny import save_klein
from tests.toy_run import make_data


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["diffdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    values: dict[str, Any] = {
        "family": {
            "name": "flux2-klein",
            "path": str(save_klein(folder / "model")),
            "text_encoder_layers": [1, 2, 3],
            "max_sequence_length": 64,
        },
        "method": {"name": "d-opsd", "num_steps": 2},
        "roles": {"student": {"adapter": "lora", "rank": 2, "alpha": 4}},
        "data": {"path": str(make_data(folder / "data", 4)), "resolution": 8, "multiple": 4},
        "train": {"steps": 2, "lr": 0.01},
        "sample": {"every": 2, "num_steps": 2},
        "evaluate": {
            "metrics": "digits",
            "groups": {"all": [0, 1]},
            "num_steps": [1, 2],
            "num_seeds": 2,
            "num_images": 16,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    patch = pytest.MonkeyPatch()
    run_cli(patch, "train", config, "--output", config.parent / "run")
    patch.undo()
    return config.parent / "run"


def test_training_writes_pictures_metrics_and_tensorboard_events(run: Path) -> None:
    assert Image.open(run / "samples" / "step-000002.png").width >= 96
    assert Image.open(run / "samples" / "rollout-000002.png").width >= 5 * 96
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert list((run / "tensorboard").glob("events*"))
    assert set(json.loads((run / "versions.json").read_text())) >= {"torch", "diffusers"}


def test_samples_of_several_models_are_drawn(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture = tmp_path / "grid.png"
    arguments = ("--prompt", "0.3", "--compare", "base,teacher,student", "--steps", "1")
    run_cli(monkeypatch, "sample", run, *arguments, "--output", picture, "--separate")
    assert Image.open(picture).width >= 3 * 96
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_preview_judges_the_teacher_before_training(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    run_cli(monkeypatch, "preview", config, "--output", tmp_path / "preview.png")
    assert (tmp_path / "preview.png").is_file()
    assert "teacher" in capsys.readouterr().out


def test_evaluation_measures_each_number_of_steps(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cli(monkeypatch, "evaluate", run)
    rows = json.loads((run / "evaluation.json").read_text())
    found = {(row["model"], row["num_steps"], row["metric"]) for row in rows}
    models, metrics = ("base", "student"), ("accuracy", "frechet")
    assert found == {(m, n, k) for m in models for n in (1, 2) for k in metrics}
    assert all(len(row["values"]) == 2 for row in rows)


def test_the_report_is_one_page(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_cli(monkeypatch, "report", run, "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "d-opsd" in page
    assert "data:image/png;base64" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_lora_and_a_pipeline_are_exported(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_cli(monkeypatch, "export", run, tmp_path / "lora")
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    lora = load_file(file)
    saved = load_file(run / "checkpoints" / "step-000002" / "role-student.safetensors")
    assert len(lora) == len(saved)
    run_cli(monkeypatch, "export", run, tmp_path / "pipeline", "--layout", "pipeline")
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    base = load_file(next((run.parent / "model" / "transformer").glob("*.safetensors")))
    merged = load_file(next((tmp_path / "pipeline" / "transformer").glob("*.safetensors")))
    assert base.keys() == merged.keys()
    assert any(not torch.equal(base[name], merged[name]) for name in base)
    for layout in ("single-file", "comfyui-lora"):
        file = tmp_path / f"{layout}.safetensors"
        run_cli(monkeypatch, "export", run, file, "--layout", layout)
        assert load_file(file)
        beside = json.loads((tmp_path / f"{layout}.provenance.json").read_text())
        assert beside["result"]["weights_sha256"].keys() == {file.name}
        assert (tmp_path / f"{layout}.README.md").is_file()


def test_an_averaged_role_is_exported_at_the_scale_it_was_trained_with(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["roles"]["student"] |= {"rank": 2, "alpha": 8}
    values["train"]["ema"] = 0.5
    values["sample"]["every"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    run_cli(monkeypatch, "train", tmp_path / "config.yaml", "--output", tmp_path / "run")
    run_cli(monkeypatch, "export", tmp_path / "run", tmp_path / "lora", "--role", "average")
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    exported = load_file(file)
    role = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "role-average.safetensors")
    name = next(n for n in role if n.endswith("lora_B.weight") and role[n].abs().sum() > 0)
    module = name.removesuffix("lora_B.weight")
    product = exported[f"transformer.{name}"] @ exported[f"transformer.{module}lora_A.weight"]
    torch.testing.assert_close(product, 8 / 2 * role[name] @ role[f"{module}lora_A.weight"])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("list",), "d-opsd"),
        (("list", "families"), "z-image"),
        (("list", "configs"), "d-opsd/digits"),
        (("doctor",), "torch"),
    ],
)
def test_the_small_commands_answer(
    command: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(monkeypatch, *command)
    assert expected in capsys.readouterr().out


def test_the_schema_describes_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli(monkeypatch, "schema")
    schema = json.loads(capsys.readouterr().out)
    methods = {m["properties"]["name"]["const"]: m for m in schema["properties"]["method"]["oneOf"]}
    assert methods["d-opsd"]["properties"]["num_steps"]["minimum"] == 1
    described = [
        (name, option)
        for kind in ("method", "family")
        for name, entry in (
            (x["properties"]["name"]["const"], x) for x in schema["properties"][kind]["oneOf"]
        )
        for option, value in entry["properties"].items()
        if option not in ("name", "path") and not value.get("description")
    ]
    assert described == []


def test_help_answers_in_half_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "diffdistill", "--help"], check=True, capture_output=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5

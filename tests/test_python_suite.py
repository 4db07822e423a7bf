"""The suite of chats about Python, on models whose answers are known beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffdistill.commands.evaluate import evaluate
from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.evaluation.language import distance, likelihood
from diffdistill.evaluation.likelihood import MonteCarlo
from diffdistill.evaluation.python_source import ASKED, completes
from diffdistill.evaluation.python_suite import Measured, measure_python, read_python
from diffdistill.evaluation.text_settings import TextEvaluateSettings
from diffdistill.session import Session, build
from tests.conftest import CPU
from tests.text_run import save_world, text_values

HEADERS = ["def add(a, b):\n    '''Add.'''", "def one():\n    '''One.'''"]
BODIES = ["    return a + b", "    return 1"]
SETTINGS = TextEvaluateSettings(num_draws=3, batch_size=2)
SHARED: dict[str, Any] = {"method": {"variant": "shared"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = save_world(tmp_path_factory.mktemp("world"))
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": ASKED + header},
                {"role": "assistant", "content": body},
            ]
        }
        for header, body in zip(HEADERS, BODIES, strict=True)
    ]
    rows += [{"text": "x = 1\n"}, {"text": "x = 1\n" * 90}]
    (folder / "python.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def values_of(world: Path, **sections: Any) -> dict[str, Any]:
    data = {"path": str(world / "python.jsonl"), "turns": "last"}
    family = {"max_length": 96}
    return text_values(
        world, "tide", **{"data": data, "family": family, "sample": {"max_tokens": 8}} | sections
    )


def session_of(world: Path, **sections: Any) -> Session:
    return build(parse_config(values_of(world, **sections)), CPU)


def measured(session: Session, *names: str) -> list[Measured]:
    roles = {name: session.roles[name] for name in names}
    shown = read_python(session, roles, None)
    return list(measure_python(session, roles, shown, SETTINGS))


def test_texts_that_are_too_long_for_one_model_are_measured_of_none(world: Path) -> None:
    session = session_of(world)
    shown = read_python(session, session.roles.by_name, None)
    assert [len(shown.chats), len(shown.texts), shown.left_out] == [2, 1, 1]
    short = session_of(world, family={"max_length": 8})
    with pytest.raises(UserError, match="no text of the data is short enough for all models"):
        read_python(short, short.roles.by_name, 2)


def test_a_student_has_the_numbers_of_the_measures_and_a_teacher_no_distance(world: Path) -> None:
    session = session_of(world)
    found = {(row.model, row.metric): row for row in measured(session, "student", "teacher")}
    student, teacher = session.roles["student"], session.roles["teacher"]
    shown = read_python(session, session.roles.by_name, None)
    how = MonteCarlo(num_draws=3, antithetic=True, seed=0, batch_size=2)
    for name, role in (("student", student), ("teacher", teacher)):
        bits = likelihood(role, shown.chats, how)
        row = found[name, "answers, bits per byte"]
        assert (row.value, row.error) == (bits.bits, bits.error)
    key = "chunk KL to the teacher"
    pair: Any = session.family
    expected = distance(pair, student, teacher, shown.chats, Draws(0), by="chunk", batch_size=2)
    assert found["student", key].value == pytest.approx(expected)
    assert expected > 0
    assert ("teacher", key) not in found


def test_a_student_that_is_its_teacher_is_at_no_distance_from_it(world: Path) -> None:
    for path, near in (("student", True), ("dense", False)):
        roles = {"teacher": {"path": str(world / path), "family": None}}
        session = session_of(world, roles=roles, **SHARED)
        rows = {row.metric: row.value for row in measured(session, "student")}
        assert (rows["KL to the teacher"] < 1e-6) == near


def test_a_model_that_knows_the_answers_completes_all_functions(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(world)
    family: Any = session.roles["student"].family
    said = iter([*BODIES, "    return (", "no"])

    class Knows:
        unmasking = None

        def sample(self, prompts: Any, *_: Any, **options: Any) -> list[torch.Tensor]:
            if "canvas" in options:
                return [row.clamp(max=3) for row in options["canvas"]]
            ids = [[*family.tokenizer.encode(next(said)), family.eos_id] for _ in prompts]
            return [torch.tensor(row) for row in ids]

    monkeypatch.setattr(type(family), "sampler", lambda *_, **__: Knows())
    first = {row.metric: row.value for row in measured(session, "student")}
    second = {row.metric: row.value for row in measured(session, "student")}
    assert first["answers that parse"] == 1.0
    assert second["answers that parse"] == 0.0
    assert first["answers that end"] == 1.0
    assert first["spans filled in"] == 0.0
    assert completes(ASKED + HEADERS[0], BODIES[0])


def test_the_command_prints_a_column_for_each_model_and_saves_rows(
    world: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values_of(world, evaluate={"num_draws": 2})))
    told = evaluate(str(path), suite="python", output=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["model"] for row in found["rows"]} == {"base", "student", "teacher"}
    values = [
        [row["value"] for row in found["rows"] if row["model"] == name]
        for name in ("base", "student")
    ]
    assert values[0] == values[1]
    assert found["sample"]["max_tokens"] == 8
    assert "2 chats, 1 texts, 1 too long" in told
    assert "chunk KL to the teacher" in told
    assert "spans filled in" in told

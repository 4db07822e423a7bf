"""The bundled language models do what their configs and cards say."""

from pathlib import Path

import pytest

from diffdistill.bundled import bundled
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.data.settings import DataSettings
from diffdistill.data.texts import open_texts
from diffdistill.draws import Draws
from diffdistill.evaluation.bits import bits_per_byte
from diffdistill.evaluation.language import fitting, hidden_likelihood, likelihood
from diffdistill.evaluation.likelihood import MonteCarlo
from diffdistill.pipelines.text_rows import Reading
from diffdistill.sampling import inference
from diffdistill.session import build, text_pair

NAMES = ("python-ar", "python-ar-teacher", "python-bd3lm", "python-dense", "python-moe")
CONFIGS = ("bd3lm/python", "tide-shared/python", "tide-cross/python")
GIVEN = ("bld/python", "alm/python", "text-sft/python")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_bundled_language_models_take_at_most_25_megabytes() -> None:
    assert sum(size_of(bundled("models", name)) for name in NAMES) <= 25e6


@pytest.mark.parametrize("name", [*CONFIGS, *GIVEN])
def test_every_python_config_trains(name: str, tmp_path: Path) -> None:
    quick = ["train.steps=1", "data.batch_size=2", "data.max_examples=4", "train.warmup=0"]
    quiet = ["tracking.tensorboard=false", "sample.every=null"]
    train(load_config(name, [*quick, *quiet]), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("loss/student") == 1


@pytest.mark.parametrize("name", CONFIGS[1:])
def test_a_teacher_knows_more_of_what_is_hidden_than_the_student(name: str) -> None:
    session = build(load_config(name))
    pair = text_pair(session)
    data = open_texts(DataSettings(path=str(bundled("data", "python-held-out.jsonl"))))
    chats = [data[i] for i in range(len(data)) if data[i].messages is not None][:40]
    chats = fitting(chats, [pair.student, pair.teacher])[:16]
    student, teacher = (
        hidden_likelihood(pair, session.roles[reader], chats, Draws(0), reader=reader)
        for reader in ("student", "teacher")
    )
    assert teacher < student


def test_the_autoregressive_teacher_needs_fewer_bits_for_a_byte_than_its_student() -> None:
    session = build(load_config("bld/python"))
    data = open_texts(DataSettings(path=str(bundled("data", "python-held-out.jsonl"))))
    shown = [data[i] for i in range(48)]
    with inference(session):
        ours, theirs = (
            bits_per_byte(name, session.roles[name], shown, Reading())
            for name in ("student", "teacher")
        )
    for student, teacher in zip(ours, theirs, strict=True):
        assert teacher.bits_per_byte < student.bits_per_byte - 0.05
        assert teacher.num_tokens != student.num_tokens


def test_the_student_knows_python() -> None:
    session = build(load_config("bd3lm/python"))
    family = text_pair(session).student
    data = open_texts(DataSettings(path=str(bundled("data", "python-held-out.jsonl"))))
    shown = fitting([data[i] for i in range(24)], [family])
    how = MonteCarlo(num_draws=2, antithetic=True, seed=0, batch_size=16)
    found = likelihood(session.roles["student"], shown, how)
    assert found.bits < 2.5  # a uniform guess of its tokens takes about 4 bits per byte

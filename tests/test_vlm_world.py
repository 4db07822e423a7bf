"""The offline world of vision-language models: its questions, its models and their builder."""

import importlib
import io
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.asking import reply
from diffdistill.bundled import bundled
from diffdistill.checkpoints import restore
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.data.questions import read_questions
from diffdistill.data.settings import DataSettings
from diffdistill.evaluation.digit_questions import KINDS, SCAN, digit_questions, scans
from diffdistill.rewards.exact import Exact
from diffdistill.session import build
from diffdistill.types import Example
from tests.conftest import CPU
from tests.toy_run import losses

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    folders = [str(SCRIPTS), str(SCRIPTS / "reproduce")]
    sys.path[:0] = folders  # scripts import each other by name
    names = ("build_vlm_models", "switch_kd")
    yield {name: importlib.import_module(name) for name in names}
    for folder in folders:
        sys.path.remove(folder)
    for name in (*names, "model_building", "collecting"):
        sys.modules.pop(name, None)


def held_out(count: int) -> list[Example]:
    path = str(bundled("data", "digit-questions-held-out.parquet"))
    return list(islice(read_questions(DataSettings(path=path), Path(), []), count))


def test_answers_follow_from_the_digits_and_every_kind_is_asked() -> None:
    found = list(islice(digit_questions(0), 300))
    assert {question.kind for question in found} == set(KINDS)
    for question in found:
        digits = question.digits
        expected = {
            "all": " ".join(str(digit) for digit in digits),
            "left": digits[0],
            "right": digits[-1],
            "largest": sorted(digits)[-1],
            "smallest": sorted(digits)[0],
            "sum": sum(digits),
        }
        assert question.answer == str(expected[question.kind])
        assert 2 <= len(digits) <= 3


@pytest.mark.parametrize("held", [False, True])
def test_a_picture_holds_its_digits_from_left_to_right_without_overlap(held: bool) -> None:
    known = scans(held)
    for question in islice(digit_questions(3, held_out=held), 40):
        picture, left = question.picture, 0
        for digit in question.digits:
            places = [
                (x, y)
                for x in range(left, 24 - SCAN + 1, 4)
                for y in range(0, 24 - SCAN + 1, 4)
                if any((picture[y : y + SCAN, x : x + SCAN] == scan).all() for scan in known[digit])
            ]
            assert places
            left = min(places)[0] + SCAN


def test_scans_that_are_held_out_are_in_no_picture_of_training() -> None:
    kept, other = (
        {scan.tobytes() for group in scans(held) for scan in group} for held in (True, False)
    )
    assert not kept & other
    assert 7 < len(other) / len(kept) < 9


def test_the_bundled_questions_are_those_that_the_generator_makes() -> None:
    for example, question in zip(held_out(20), digit_questions(1, held_out=True), strict=False):
        assert (example.prompt, example.answer) == (question.question, question.answer)
        shown = np.asarray(example.pictures[0].image().convert("L"))
        assert np.array_equal(shown, question.picture)


def test_the_builder_reads_pictures_and_questions_as_the_processor_does(
    scripts: dict[str, ModuleType],
) -> None:
    builder = scripts["build_vlm_models"]
    processor, question = builder.build_processor(), next(digit_questions(0))
    content = [{"type": "image"}, {"type": "text", "text": question.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    image = Image.open(io.BytesIO(question.row()["image"]["bytes"])).convert("RGB")
    made = processor(text=[text], images=[image], return_tensors="pt")
    prompt = builder.prompt_of(question.question, processor.tokenizer)
    assert made["input_ids"][0].tolist() == prompt
    assert prompt.count(processor.image_token_id) == builder.PLACES
    torch.testing.assert_close(made["pixel_values"], builder.pixels_of([question]))


def test_the_builder_learns_answers_alone(scripts: dict[str, ModuleType]) -> None:
    builder = scripts["build_vlm_models"]
    tokenizer = builder.build_tokenizer()
    seen: list[dict[str, Any]] = []

    def network(**inputs: Any) -> Any:
        seen.append(inputs)
        return type("Output", (), {"loss": torch.zeros(())})

    next(builder.losses(network, tokenizer, builder.RECIPES["student"]))
    tokens, labels = seen[0]["input_ids"], seen[0]["labels"]
    questions = list(islice(digit_questions(100), len(tokens)))
    for row, question in enumerate(questions):
        learned = tokens[row][labels[row] != -100].tolist()
        assert tokenizer.decode(learned) == f"{question.answer}<|end|>"


def test_the_bundled_teacher_sees_more_than_the_student() -> None:
    session = build(load_config("switch-kd/digits"), CPU)
    asked, judge, right = held_out(90), Exact(device=CPU), {}
    for name in ("student", "teacher"):
        role: Any = session.roles[name]
        drafts = list(reply(session, role, asked, session.config.replies))
        texts = [role.family.decoded(draft.tokens) for draft in drafts]
        right[name] = judge.score(texts, asked).mean().item()
    assert 0.25 < right["student"] < 0.65
    assert right["teacher"] > 0.75


def test_the_bundled_config_trains_and_every_term_falls(tmp_path: Path) -> None:
    few = ["train.steps=12", "train.warmup=2", "data.batch_size=8", "data.max_examples=16"]
    train(load_config("switch-kd/digits", [*few, "tracking.tensorboard=false"]), tmp_path)
    found = list(losses(tmp_path).values())
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    assert restore(tmp_path).roles["student"].trained


def test_every_arm_differs_and_shares_the_data_and_the_rate(scripts: dict[str, ModuleType]) -> None:
    arms = {k: load_config(a.config, a.overrides) for k, a in scripts["switch_kd"].ARMS.items()}
    assert len({str(sorted(c.method.items())) for c in arms.values()}) == len(arms)
    assert len({(c.train.lr, c.data.path, c.data.batch_size) for c in arms.values()}) == 1
    terms = {
        name: (c.method["align_weight"], c.method["switch_weight"]) for name, c in arms.items()
    }
    assert terms["answers alone"] == (0, 0)
    assert terms["KL"] == terms["DBiLD"] == (1, 0)
    assert terms["DBiLD + switch"] == (1, 1)


@pytest.mark.parametrize(
    ("answer", "score", "parses"),
    [("12", 1.0, True), (" 12\n", 1.0, True), ("12.", 0.0, True), ("", 0.0, False)],
)
def test_an_exact_answer_is_the_right_one_and_nothing_else(
    answer: str, score: float, parses: bool
) -> None:
    judge, example = Exact(device=CPU), Example("sum?", answer="12")
    assert judge.score([answer], [example]).item() == score
    assert judge.parses([answer]).item() is parses

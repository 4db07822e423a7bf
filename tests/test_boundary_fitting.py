"""Boundary predictors learn where numbers begin and end, and say so in any text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification

from diffdistill.boundaries import IGNORED
from diffdistill.errors import UserError
from diffdistill.pipelines.boundary import Boundary, padded, read
from diffdistill.pipelines.boundary_fitting import (
    Annotated,
    Fit,
    Fitted,
    Lesson,
    fit,
    lesson,
    split,
)
from diffdistill.synthesis.annotating import by_rule, given, read_quotes, segments_of
from tests.conftest import CPU
from tests.tiny import tokenizer
from tests.tiny_text import causal_lm

RULE = "[^0-9]+"
HOW = Fit(lr=1e-2, batch_size=8, epochs=4, held_out=0.1, max_length=64)


def texts(count: int) -> list[Annotated]:
    rng = random.Random(0)
    return [
        Annotated(" ".join(f"so {rng.randrange(100):02d}" for _ in range(5)), (), source)
        for source in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    words = tokenizer()
    sizes = {"vocab_size": len(words), "hidden_size": 16, "initializer_range": 0.02}
    causal_lm(**sizes, is_causal=True, eos_token_id=2).save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fitted]:
    folder = tmp_path_factory.mktemp("fitted") / "student"
    return folder, fit(base, by_rule(RULE, texts(160)), HOW, folder, CPU)


def test_a_predictor_learns_a_rule(fitted: tuple[Path, Fitted]) -> None:
    _, found = fitted
    assert found.accuracy > 0.97 > found.majority + 0.2
    assert found.segments == 144
    assert 1 <= found.epoch <= HOW.epochs


def test_the_best_epoch_is_what_is_saved(fitted: tuple[Path, Fitted], base: Path) -> None:
    folder, found = fitted
    network = AutoModelForTokenClassification.from_pretrained(folder).eval()
    lessons = [lesson(tokenizer(), s, 64) for s in by_rule(RULE, texts(160))][144:]
    tokens, seen = padded([row.tokens for row in lessons])
    labels, _ = padded([row.labels for row in lessons], IGNORED)
    with torch.no_grad():
        said = network(input_ids=tokens, attention_mask=seen).logits.argmax(-1)
    right = (said == labels).sum() / (labels != IGNORED).sum()
    assert right.item() == pytest.approx(found.accuracy)


def test_a_text_is_cut_before_the_other_kind_in_any_batch(fitted: tuple[Path, Fitted]) -> None:
    boundary = Boundary.load(fitted[0], 200, CPU)
    asked = ["so 12 so 34", "so 12 so 34", "", "so 77"]
    together = boundary.cuts(asked, [0, 4, 0, 5], style=True)
    assert together == [3, 9, None, None]
    assert boundary.cuts(asked[:2], [3, 3], style=False) == [5, 5]
    alone = [boundary.cuts([t], [s], style=True)[0] for t, s in zip(asked, (0, 4, 0, 5), strict=True)]  # fmt: skip # noqa: E501
    assert alone == together


def test_a_predictor_sees_the_last_tokens_alone(fitted: tuple[Path, Fitted]) -> None:
    boundary = Boundary.load(fitted[0], 12, CPU)
    past = "so 12 so 34 "
    for before in (past, "x" * 5000 + past):
        text = f"{before}so 5"
        assert boundary.cuts([text], [len(before)], style=True) == [len(before) + 3]


def test_where_there_is_no_predictor_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fit-predictors"):
        Boundary.load(tmp_path / "student", 200, CPU)


def test_too_few_segments_are_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 annotated segments of 1 texts are too few"):
        fit(base, by_rule(RULE, texts(1)), HOW, tmp_path / "x", CPU)
    with pytest.raises(UserError, match="3 annotated segments of 1 texts are too few"):
        fit(base, 3 * by_rule(RULE, texts(1)), HOW, tmp_path / "x", CPU)


def test_what_is_held_out_is_of_other_texts_than_what_is_learned() -> None:
    sources = [0, 1, 2, 1, 3, 4, 4, 2, 0, 3]
    lessons = [Lesson([n], [0], source) for n, source in enumerate(sources)]
    for share, held in ((0.01, {3}), (0.2, {3}), (0.3, {0, 3}), (0.5, {0, 2, 3})):
        found = split(lessons, share)
        assert {row.source for row in found[1]} == held
        assert {row.source for row in found[0]} == set(sources) - held
        assert sorted(row.tokens[0] for part in found for row in part) == list(range(10))


def test_padding_has_no_part_in_a_prediction_nor_in_the_loss(base: Path) -> None:
    network = AutoModelForTokenClassification.from_pretrained(base, num_labels=2).eval()
    rows = [read(tokenizer(), text)[0] for text in ("so 12", "so 12 and 3456")]
    tokens, seen = padded(rows)
    with torch.no_grad():
        both = network(input_ids=tokens, attention_mask=seen).logits
        first = network(input_ids=torch.tensor(rows[:1])).logits
    torch.testing.assert_close(both[0, : len(rows[0])], first[0], rtol=1e-4, atol=1e-5)
    labels, _ = padded([[1] * len(row) for row in rows], IGNORED)
    mean = F.cross_entropy(both.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    parts = torch.cat([both[i, : len(row)] for i, row in enumerate(rows)])
    torch.testing.assert_close(mean, F.cross_entropy(parts, torch.ones(len(parts)).long()))


def test_segments_are_windows_of_whole_words_with_their_spans() -> None:
    text = " ".join(f"w{n:02d}" for n in range(50))
    whole = Annotated(text, [(0, 3), (text.index("w20"), text.index("w25"))])
    found = segments_of(whole, 10, 7, random.Random(0))
    assert len({part.text for part in found}) == 7
    for part in found:
        assert len(part.text.split()) == 10
        assert part.text in text
        for start, end in part.spans:
            quoted = part.text[start:end].split()
            assert set(quoted) <= {"w00", "w20", "w21", "w22", "w23", "w24"}
        inside = {word for a, b in part.spans for word in part.text[a:b].split()}
        known = {"w00", "w20", "w21", "w22", "w23", "w24"}
        assert inside == known & set(part.text.split())
    assert segments_of(Annotated("just three words", ()), 10, 7, random.Random(0)) == [
        Annotated("just three words", [])
    ]
    assert segments_of(Annotated("  ", ()), 10, 7, random.Random(0)) == []
    unspaced = Annotated("\u6240\u4ee5" * 20, [(0, 1)], 5)
    for part in segments_of(unspaced, 10, 7, random.Random(0)):
        assert len(part.text) == 10
        assert part.source == 5


def test_a_rule_that_is_none_is_an_error() -> None:
    assert by_rule(RULE, [Annotated("so 1", ())]) == [Annotated("so 1", [(0, 3)])]
    with pytest.raises(UserError, match="needs a regular expression"):
        by_rule("", [])
    with pytest.raises(UserError, match=r"tessy.fit.pattern '\['"):
        by_rule("[", [])


def test_quotes_are_read_from_a_reply_with_words_around_them() -> None:
    assert read_quotes('Here: ["so", "hm, well"] fine') == ["so", "hm, well"]
    assert read_quotes("[]") == []
    for reply in ("none", '{"a": [1]}', "[1, 2]", '["cut off', "[" * 100_000 + "]"):
        assert read_quotes(reply) is None


def test_given_annotations_are_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl"
    rows: list[Any] = [
        {"text": "so 1", "spans": [[0, 3]], "author": "student"},
        {"text": "2 and", "spans": [[1, 5]], "author": "teacher"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert given(str(file)) == {
        "student": [Annotated("so 1", [(0, 3)], 0)],
        "teacher": [Annotated("2 and", [(1, 5)], 1)],
    }
    for bad in ({"spans": [[0, 9]]}, {"author": "template"}, {"text": 3}, {"spans": "0-3"}):
        file.write_text(json.dumps(rows[0] | bad))
        with pytest.raises(UserError, match="malformed annotation"):
            given(str(file))
    file.write_text("")
    with pytest.raises(UserError, match="no annotated text"):
        given(str(file))

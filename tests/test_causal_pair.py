"""Given texts as two autoregressive models read them: rows, predictions, and the bytes of both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from diffdistill.adapters import add_lora
from diffdistill.byte_beam import Search
from diffdistill.errors import UserError
from diffdistill.pipelines.byte_targets import spell, stretches
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.projection import dense
from diffdistill.spellings import ALPHABET, END, Spellings
from diffdistill.types import Example
from tests.conftest import CPU
from tests.given_run import (
    collated,
    examples,
    given_batch,
    make_causal_pair,
    make_given_roles,
    save_given_world,
    skipping,
)
from tests.test_byte_spans import byte_level, metaspace
from tests.text_run import chat
from tests.tiny_text import CODE, causal_lm

EXACT = Search(num_beams=8, threshold=1e-4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_given_world(tmp_path_factory.mktemp("given"))


@torch.no_grad()
@pytest.mark.parametrize("reader", ["student", "teacher"])
def test_each_token_is_predicted_from_the_text_before_it_in_the_readers_own_tokens(
    reader: Any, world: Path
) -> None:
    pair = make_causal_pair(world)
    roles, batch = make_given_roles(pair), given_batch(pair)
    text = pair.text(batch, reader=reader)
    found = dense(
        roles[reader](pair.state(batch, reader=reader), pair.condition(batch, reader=reader))
    )
    for row in range(4):
        tokens = batch[f"{reader}/tokens"][row]
        length = 1 + int(text.maskable[row].nonzero()[-1])
        expected: Any = roles[reader].network(input_ids=tokens[None, : length + 1])
        words = found.shape[-1]
        torch.testing.assert_close(
            found[row, :length], expected.logits[0, :length, :words], atol=1e-4, rtol=1e-4
        )
        assert text.tokens[row, :length].tolist() == tokens[1 : length + 1].tolist()


def test_a_text_ends_with_a_learned_end_token_and_its_first_token_is_given(world: Path) -> None:
    pair = make_causal_pair(world)
    (text, talk) = (pair.rows(example) for example in examples(2))
    for reader, family in (("student", pair.student), ("teacher", pair.teacher)):
        row = text[reader]  # type: ignore[index]
        assert row.tokens[-1] == family.eos_id
        assert row.maskable == [False, *[True] * (len(row.tokens) - 1)]
        assert row.chunks[0] == -1
    row = talk["student"]
    assert row.tokens[-1] == pair.student.turn_ends[0]
    learned = [t for t, kept in zip(row.tokens, row.maskable, strict=True) if kept]
    assert pair.student.decoded(learned) == CODE[1]


def test_a_tokenizer_with_a_start_token_puts_it_before_a_text_and_not_before_a_chat(
    world: Path,
) -> None:
    pair = make_causal_pair(world)
    pair.student.tokenizer.bos_token = "<mask>"
    text, talk = (pair.rows(example)["student"] for example in examples(2))
    assert text.tokens[0] == pair.student.tokenizer.bos_token_id
    assert text.maskable[:2] == [False, True]
    assert text.tokens[1] != text.tokens[0] != talk.tokens[0]


def test_a_text_is_cut_to_the_length_that_either_side_reads(world: Path) -> None:
    pair = make_causal_pair(world)
    pair.student.max_length = 12
    rows = pair.rows(Example("", text=CODE[2]))
    assert len(rows["student"].tokens) == 12
    chunks = set(rows["student"].chunks) - {-1}
    assert chunks
    assert chunks == {c for c in rows["teacher"].chunks if c <= max(chunks)} - {-1}
    long_prompt = chat("x", question=CODE[0] * 3)
    with pytest.raises(UserError, match="leaves no room for an answer in the student's max_length"):
        pair.rows(long_prompt)
    assert skipping(pair).encode([long_prompt])[0]["student/tokens"].numel() == 0


def with_tokenizer(folder: Path, core: Any) -> CausalLM:
    """Save a model with a tokenizer of one's own; return its family."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    causal_lm(vocab_size=len(tokenizer), is_causal=True).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return CausalLM(path=str(folder), device=CPU, max_length=200)


def test_a_byte_level_and_a_sentencepiece_tokenizer_spell_the_same_bytes(tmp_path: Path) -> None:
    first = with_tokenizer(tmp_path / "bytes", byte_level())
    second = with_tokenizer(tmp_path / "pieces", metaspace())
    text = "la fille na\u00efve, \u00fcber alles\n\u6f22\u5b57 \U0001f642"
    for pair in (CausalPair(first, second), CausalPair(second, first)):
        (encoded,) = pair.encode([Example("", text=text)])
        sides = [
            spell(pair._columns(encoded, reader, spelled), spelled)
            for reader in ("student", "teacher")
            for spelled in [pair._spellings(reader)]  # type: ignore[arg-type]
        ]
        ours, theirs = (side.values for side in sides)
        assert ours == theirs
        *data, end = ours.values()
        assert text.encode().endswith(bytes(data))
        assert len(data) > len(text.encode()) - 8  # without what is given
        assert end == END


def test_marks_spell_nothing_and_a_chunk_with_one_is_left_out() -> None:
    spelled = Spellings([b"a", b"bc", None, None, b"d"], ends=[2])
    columns = [0, 1, 3, 4, 2, 2], [True] * 6, [0, 1, 2, 2, -1, -1]
    found = spell(columns, spelled)
    assert found.keys == [[(0, 0)], [(1, 0), (1, 1)], [], [], [], []]
    found = spell(([0, 1, 2], [True] * 3, [0, 1, -1]), spelled)
    assert list(found.values.values()) == [*b"abc", END]
    assert spell(([0, 2], [True, False], [0, -1]), spelled).values == {(0, 0): ord("a")}
    (stretch,) = stretches([[], [(0, 0)], [(1, 0), (1, 1)], [(1, -1)]])
    assert (stretch.start, stretch.stop) == (1, 3)
    assert stretch.keys == [(0, 0), (1, 0), (1, 1), (1, -1)]


def test_the_teachers_bytes_are_those_of_its_own_tokens_and_the_ends_are_asked_for(
    world: Path,
) -> None:
    pair = make_causal_pair(world)
    teacher = make_given_roles(pair)["teacher"]
    encoded = pair.encode(examples(4))
    found = pair.byte_targets(teacher, encoded, EXACT, ALPHABET)
    ends = [bool(target["bytes/observed"][-1] == END) for target in found]
    assert ends == [
        True,
        False,
        True,
        False,
    ]  # the teacher's template strips what ends an answer, so that its end is elsewhere
    for target, text in zip(found, encoded, strict=True):
        assert target["bytes/known"].float().mean() > 0.9
        known = target["bytes/logprobs"][target["bytes/known"]].float().exp().sum(-1)
        torch.testing.assert_close(known, torch.ones_like(known), atol=0.02, rtol=0)
        first, count = target["bytes/first"], target["bytes/size"]
        vocabulary = pair.spellings()
        for place, token in enumerate(text["student/tokens"].tolist()):
            if first[place] >= 0 and count[place] > 0 and vocabulary[token] is not None:
                spelled = target["bytes/observed"][first[place] : first[place] + count[place]]
                assert bytes(spelled.tolist()) == vocabulary[token]


def test_one_tokenizer_for_both_asks_for_the_same_bytes(world: Path) -> None:
    alone, two = make_causal_pair(world, None), make_causal_pair(world, "same")
    teacher = make_given_roles(two)["teacher"]
    (first,) = alone.byte_targets(teacher, alone.encode(examples(1)), EXACT, 16)
    (second,) = two.byte_targets(teacher, two.encode(examples(1)), EXACT, 16)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_texts_that_are_read_together_are_predicted_as_alone(world: Path) -> None:
    pair = make_causal_pair(world)
    teacher = make_given_roles(pair)["teacher"]
    encoded = pair.encode(examples(4))
    together = pair.byte_targets(teacher, encoded, Search(), 16)
    for found, text in zip(together, encoded, strict=True):
        (alone,) = pair.byte_targets(teacher, [text], Search(), 16)
        probable = found["bytes/logprobs"] > -6
        torch.testing.assert_close(
            alone["bytes/logprobs"][probable], found["bytes/logprobs"][probable],
            atol=0.02, rtol=0.01,
        )  # fmt: skip


def test_what_is_kept_is_named_by_the_teachers_weights_and_its_reader(world: Path) -> None:
    pair = make_causal_pair(world)
    teacher = make_given_roles(pair)["teacher"]
    before = pair.weights(teacher)
    assert pair.weights(teacher) == before
    add_lora(teacher.network, "another", rank=2, alpha=4.0, targets=["q_proj"], seed=0)
    assert pair.weights(teacher) == before
    pair.teacher.max_length = 95
    assert pair.weights(teacher) != before
    pair.teacher.max_length = 96
    with torch.no_grad():
        next(teacher.network.parameters()).view(-1)[7] += 1e-3
    assert pair.weights(teacher) != before


def test_batches_are_filled_up_where_nothing_counts(world: Path) -> None:
    pair = make_causal_pair(world)
    teacher = make_given_roles(pair)["teacher"]
    encoded = pair.encode(examples(2))
    texts = [{**t, **m} for t, m in zip(encoded, pair.byte_targets(teacher, encoded, Search(), 5))]  # noqa: B905
    batch = pair.collate(texts)
    found = pair.bytes(batch)
    for row, text in enumerate(texts):
        length, width = len(text["student/tokens"]), len(text["bytes/observed"])
        assert found.first[row, : length - 1].equal(text["bytes/first"][1:])
        assert (found.first[row, length - 1 :] == -1).all()
        assert not found.known[row, width:].any()
        assert found.ids[row, :width].equal(text["bytes/ids"].long())
    assert collated(pair, examples(2))["student/tokens"].shape == batch["student/tokens"].shape

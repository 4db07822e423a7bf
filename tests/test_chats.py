from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from diffdistill.alignment import Spelling
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.methods.tide import Tide
from diffdistill.pipelines.byte_spans import Speller
from diffdistill.pipelines.chats import (
    Row,
    chat_row,
    chat_rows,
    content_spans,
    cut_pair,
    pack,
    pack_pairs,
    read_chat,
    template_text,
    text_row,
    text_rows,
)
from diffdistill.types import Progress
from tests.test_byte_spans import TEXTS, byte_level, metaspace
from tests.test_method_tide import Network, Texts

CHATML = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[user] {{ m.content | trim }} [/user]"
    "{% else %}{{ m.content | trim }}<eos>{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "compute the total"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "  return the \U0001f642 na\u00efve\n"},
]
ANSWERS = (1, 3, 5)


def fast(core: Tokenizer, template: str, *marks: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        mask_token="<mask>",
        chat_template=template,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return tokenizer


@pytest.fixture(scope="module")
def student() -> Speller:
    return Speller(fast(byte_level(), CHATML, "<|start|>", "<|end|>"))


@pytest.fixture(scope="module")
def teacher() -> Speller:
    return Speller(fast(byte_level(use_regex=False, size=350), BRACKETS))


@pytest.fixture(scope="module")
def spaced() -> Speller:
    return Speller(fast(metaspace(), BRACKETS))


def spelled(spelling: Spelling, chosen: list[bool]) -> bytes:
    pairs = zip(spelling.spans, chosen, strict=True)
    return b"".join(spelling.text[slice(*span)] for span, kept in pairs if kept)


def bytes_of_chunks(spelling: Spelling, row: Row) -> list[bytes]:
    count = max(row.chunks) + 1
    return [spelled(spelling, [c == chunk for c in row.chunks]) for chunk in range(count)]


def test_the_tokens_of_a_chat_are_those_of_the_template_itself(
    student: Speller, teacher: Speller
) -> None:
    for speller in (student, teacher):
        row = chat_row(read_chat(speller, CHAT))
        tokens = speller.tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
        assert row.tokens == tokens
        assert isinstance(tokens[0], int)  # and no key of a dictionary


def test_each_content_is_found_in_its_own_turn(student: Speller, teacher: Speller) -> None:
    for speller in (student, teacher):
        text = template_text(speller.tokenizer, CHAT)
        spans = content_spans(speller.tokenizer, CHAT, text)
        strip = speller is teacher
        said = [m["content"].strip() if strip else m["content"] for m in CHAT]
        assert [text[a:b] for a, b in spans] == said
        assert spans == sorted(spans)
        assert len(set(spans)) == len(spans)
        start, stop = spans[4]  # the word "user" of a message, not of its marker
        assert text[:start].endswith("user\n" if speller is student else "[user] ")
        assert text[stop:].startswith("<|end|>" if speller is student else " [/user]")


def test_contents_are_searched_in_order_where_the_markers_depend_on_them(teacher: Speller) -> None:
    template = (
        "{% for m in messages %}{{ 'long' if m.content | length > 8 else 'short' }}:"
        "{{ m.content }};{% endfor %}"
    )
    tokenizer = fast(byte_level(), template)
    chat = [{"role": "user", "content": c} for c in ("yes", "yes", "short", "also longer")]
    text = template_text(tokenizer, chat)
    spans = content_spans(tokenizer, chat, text)
    assert [text[a:b] for a, b in spans[:2]] == ["yes", "yes"]
    assert spans[0][1] <= spans[1][0]
    assert [text[a:b] for a, b in spans[3:]] == ["also longer"]


def test_the_answers_and_their_ends_are_maskable_and_no_prompt_is(student: Speller) -> None:
    chat = read_chat(student, CHAT)
    row = chat_row(chat)
    answers = "yes<|end|>yes<|end|>  return the \U0001f642 na\u00efve\n<|end|>"
    assert spelled(chat.spelling, row.maskable) == answers.encode()
    bare = chat_row(chat, end_of_turn=False)
    assert spelled(chat.spelling, bare.maskable) == answers.replace("<|end|>", "").encode()
    last = chat_row(chat, turns="last")
    assert spelled(chat.spelling, last.maskable) == answers.split("<|end|>", 2)[2].encode()


def test_an_answer_without_an_end_marker_has_none(spaced: Speller) -> None:
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}<eos>"
    speller = Speller(fast(byte_level(), template))
    chat = read_chat(speller, [CHAT[1], CHAT[0]])
    assert spelled(chat.spelling, chat_row(chat).maskable) == b"yes"


@pytest.mark.parametrize("other", ["teacher", "spaced"])
def test_two_templates_and_tokenizers_share_the_chunks_of_the_answers(
    student: Speller, other: str, request: pytest.FixtureRequest
) -> None:
    judge: Speller = request.getfixturevalue(other)
    both = read_chat(student, CHAT), read_chat(judge, CHAT)
    ours, theirs = chat_rows(*both)
    sides = [chat.spelling for chat in both]
    chunks = [bytes_of_chunks(*pair) for pair in zip(sides, (ours, theirs), strict=True)]
    assert chunks[0] == chunks[1]
    assert all(chunks[0])
    text = b"".join(chunks[0]).decode()
    assert text.startswith("yesyes")
    # The student's " return" reaches out of what the other template leaves of the answer.
    assert CHAT[5]["content"].strip().endswith(text.removeprefix("yesyes"))
    assert text.endswith(" \U0001f642 na\u00efve")
    for row in (ours, theirs):
        assert all(m for m, c in zip(row.maskable, row.chunks, strict=True) if c >= 0)
    assert [max(row.chunks) + 1 for row in (ours, theirs)] == [len(chunks[0])] * 2


def test_the_turns_of_repeated_answers_are_paired_in_order(
    student: Speller, teacher: Speller
) -> None:
    sides = read_chat(student, CHAT), read_chat(teacher, CHAT)
    ours, theirs = chat_rows(*sides)
    for row, side in zip((ours, theirs), sides, strict=True):
        first = [side.spelling.spans[i][0] for i, c in enumerate(row.chunks) if c >= 0]
        assert first == sorted(first)
        for index in (1, 3):  # each "yes" has the chunks of its own turn
            start, stop = side.contents[index]
            inside = [
                c
                for c, span in zip(row.chunks, side.spelling.spans, strict=True)
                if start <= span[0] < stop
            ]
            assert all(c >= 0 for c in inside)
    pairs = [
        {
            row.chunks[i]
            for i, s in enumerate(side.spelling.spans)
            if s[0] in range(*side.contents[3])
        }
        for row, side in zip((ours, theirs), sides, strict=True)
    ]
    assert pairs[0] == pairs[1]


def test_the_same_tokenizer_and_template_pair_every_answer_token(student: Speller) -> None:
    chat = read_chat(student, CHAT)
    ours, theirs = chat_rows(chat, chat, end_of_turn=False)
    assert ours == theirs
    aligned = [c for c in ours.chunks if c >= 0]
    assert aligned == list(range(sum(ours.maskable)))


def test_the_last_turn_alone_is_aligned_if_asked(student: Speller, teacher: Speller) -> None:
    ours, _ = chat_rows(read_chat(student, CHAT), read_chat(teacher, CHAT), turns="last")
    chunks = bytes_of_chunks(read_chat(student, CHAT).spelling, ours)
    assert CHAT[5]["content"].strip().encode().endswith(b"".join(chunks))
    assert b"".join(chunks).endswith(b" na\xc3\xafve")


def test_a_content_that_the_template_drops_is_refused_by_number() -> None:
    template = (
        "{% for m in messages %}{% if not loop.first %}{{ m.content }};{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"message 1 of 6 is not in the chat .*'compute the total'"):
        read_chat(Speller(fast(byte_level(), template)), CHAT)


def test_what_a_template_refuses_is_one_line() -> None:
    template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(
        UserError, match=r"refused a chat of roles .*roles must alternate"
    ) as caught:
        template_text(fast(byte_level(), template), CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("message", [{"role": "user", "content": ["a"]}, {"content": "a"}])
def test_messages_other_than_strings_are_refused(student: Speller, message: Any) -> None:
    text = template_text(student.tokenizer, CHAT[:1])
    with pytest.raises(UserError, match="message 1: role and content must be strings"):
        content_spans(student.tokenizer, [message], text)


def test_a_plain_text_is_all_maskable_and_aligned(student: Speller, spaced: Speller) -> None:
    row = text_row(student, TEXTS[0])
    assert all(row.maskable)
    assert set(row.chunks) == {-1}
    ours, theirs = text_rows(student, spaced, TEXTS[0])
    assert ours.tokens == row.tokens
    assert min(ours.chunks) == min(theirs.chunks) == 0
    chunks = [bytes_of_chunks(s(TEXTS[0]), r) for s, r in ((student, ours), (spaced, theirs))]
    assert chunks[0] == chunks[1]
    assert b"".join(chunks[0]) == TEXTS[0].encode()


def document(first: int, size: int, chunks: list[int] | None = None) -> Row:
    tokens = list(range(first, first + size))
    return Row(tokens, [token % 2 == 0 for token in tokens], chunks or [-1] * size, [0] * size)


def test_packed_rows_are_the_documents_one_after_the_other() -> None:
    rows = list(pack([document(0, 6), document(10, 5), document(20, 3)], 4, pad=99))
    assert [row.tokens for row in rows] == [
        [0, 1, 2, 3],
        [4, 5, 10, 11],
        [12, 13, 14, 20],
        [21, 22, 99, 99],
    ]
    assert [row.documents for row in rows] == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 0, 1],
        [0, 0, -1, -1],
    ]
    assert rows[3].maskable == [False, True, False, False]
    assert all(set(row.chunks) == {-1} for row in rows)


def test_packing_keeps_every_token_and_whether_it_counts() -> None:
    documents = [document(100 * n, n % 7) for n in range(30)]
    rows = list(pack(documents, 8, pad=-1))
    flat = [pair for r in rows for pair in zip(r.tokens, r.maskable, strict=True)]
    kept = [pair for pair in flat if pair[0] != -1]
    assert kept == [pair for d in documents for pair in zip(d.tokens, d.maskable, strict=True)]
    assert {len(row.tokens) for row in rows} == {8}


def test_pairs_are_packed_whole_and_their_chunks_counted_on() -> None:
    pairs = [
        (document(0, 3, [0, 0, 1]), document(50, 2, [0, 1])),
        (document(10, 2, [-1, 0]), document(60, 2, [0, 0])),
        (document(20, 2, [0, 1]), document(70, 3, [0, 1, 1])),
    ]
    rows = list(pack_pairs(pairs, (6, 5), pads=(98, 99)))
    assert [row.tokens for row in rows[0]] == [[0, 1, 2, 10, 11, 98], [50, 51, 60, 61, 99]]
    assert rows[0][0].chunks == [0, 0, 1, -1, 2, -1]
    assert rows[0][1].chunks == [0, 1, 2, 2, -1]
    assert rows[0][0].documents == [0, 0, 0, 1, 1, -1]
    assert rows[1][1] == Row(
        [70, 71, 72, 99, 99],
        [True, False, True, False, False],
        [0, 1, 1, -1, -1],
        [0, 0, 0, -1, -1],
    )


def test_a_pair_that_is_cut_loses_the_chunks_that_lost_a_token_on_either_side() -> None:
    pair = document(0, 5, [0, 1, 1, 2, 3]), document(50, 5, [0, 1, 2, 3, 3])
    ours, theirs = cut_pair(pair, (4, 4))
    assert ours.chunks == [0, 1, 1, 2]
    assert theirs.chunks == [0, 1, 2, -1]
    ours, theirs = cut_pair(pair, (2, 5))
    assert ours.chunks == [0, -1]
    assert theirs.chunks == [0, -1, -1, -1, -1]
    ((packed, _),) = pack_pairs([pair], (2, 5), pads=(9, 9))
    assert packed.chunks == [0, -1]


def test_chats_of_two_tokenizers_are_what_tide_learns_from(
    student: Speller, teacher: Speller
) -> None:
    pairs = [
        chat_rows(read_chat(student, chat), read_chat(teacher, chat))
        for chat in (CHAT, CHAT[:2], CHAT[4:])
    ]
    batch: dict[str, Any] = {"ids": torch.arange(3), "bias": torch.zeros(3, 1)}
    for side, name in enumerate(("student", "teacher")):
        for field, filler in (("tokens", 1), ("maskable", 0), ("chunks", -1)):
            rows = [torch.tensor(getattr(pair[side], field)) for pair in pairs]
            batch[f"{name}/{field}"] = pad_sequence(rows, True, filler)
    size = len(student.tokenizer)
    network, judge = Network(size, 1, 0.1), Network(len(teacher.tokenizer), 2, 0.1)
    method = Tide(family=Texts(), draws=Draws(0), student=network, teacher=judge, exposure=0.5)
    (loss,) = method.losses(batch, Progress(0, 10))
    loss.value.backward()
    assert loss.count == sum(sum(pair[0].maskable) for pair in pairs)
    assert float(loss.metrics["active_chunks"]) > 0
    assert network.own.grad is not None
    assert network.own.grad.isfinite().all()
    assert judge.own.grad is None

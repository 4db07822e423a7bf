"""Reading chats and texts, at once or as a stream."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from diffdistill.data.problems import Problem
from diffdistill.data.settings import DataSettings
from diffdistill.data.streaming import endless_texts, groups, shuffled
from diffdistill.data.texts import TextDataset, open_texts, read_texts
from diffdistill.errors import UserError
from diffdistill.types import Example
from tests.conftest import generator

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


def write(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def read(path: Path, **options: Any) -> TextDataset:
    return open_texts(DataSettings(path=str(path), **options))


def texts(dataset: TextDataset) -> list[str | None]:
    return [dataset[index].text for index in range(len(dataset))]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chats_and_texts_are_read_from_each_kind_of_file(suffix: str, tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "text": None}, {"messages": None, "text": " a text\n"}]
    found = read(write(tmp_path / f"data{suffix}", rows))
    assert len(found) == 2
    chat, text = found[0], found[1]
    assert [dict(message) for message in chat.messages or ()] == CHAT
    assert chat.prompt == "two?"
    assert (text.text, text.messages) == (" a text\n", None)
    assert text.origin == f"{tmp_path / f'data{suffix}'}:2"
    assert found.key(0) != found.key(1)


def test_documents_and_files_of_a_folder_are_read_in_the_order_of_their_names(
    tmp_path: Path,
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("def f():\n    pass\n")
    (tmp_path / "c.md").write_text("# title")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "c.provenance.json").write_text("[]")
    (tmp_path / "other.csv").write_text("no")
    write(tmp_path / "a.jsonl", [{"text": "first"}, {"text": "second"}])
    found = read(tmp_path)
    assert texts(found) == ["first", "second", "# title", "def f():\n    pass\n"]
    assert found[3].origin == str(tmp_path / "sub" / "b.py")
    assert texts(read(tmp_path / "c.md")) == ["# title"]


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"chat": CHAT, "body": "x"}, {"body": "y"}])
    found = read(file, messages_column="chat", prompt_column="body")
    assert found[0].messages is not None
    assert found[1].text == "y"


def test_each_turn_can_be_an_example_that_ends_with_its_answer(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"messages": [*CHAT, {"role": "user", "content": "?"}]}])
    lengths = {
        turns: [len(e.messages or ()) for e in (read(file, turns=turns)[i] for i in range(n))]
        for turns, n in (("all", 1), ("last", 1), ("each", 2))
    }
    assert lengths == {"all": [5], "last": [5], "each": [3, 5]}


def test_sources_are_read_through_datasets_at_once_or_as_a_stream(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:3]}])
    options: dict[str, Any] = {"source": "json", "files": [str(file)]}
    found = open_texts(DataSettings(**options))
    assert [len(found[i].messages or ()) for i in range(2)] == [5, 2]
    assert found[1].origin == "json:2"
    stream = read_texts(DataSettings(**options, streaming=True), Path(), [])
    assert [e.messages for e in stream] == [found[0].messages, found[1].messages]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"other": 1}, r"a\.jsonl:2: missing text: there is neither 'messages' nor 'text' in"),
        ({"text": "  "}, r"a\.jsonl:2: empty text: 'text' is empty"),
        ({"text": 5}, r"malformed text: 'text' is not text: 5"),
        ("{", r"a\.jsonl:2: malformed line"),
        ({"messages": "hello"}, "malformed chat: not a list of messages"),
        ({"messages": []}, "malformed chat: not a list of messages"),
        ({"messages": [{"role": "user"}]}, "malformed chat: message 1 has no role and content"),
        ({"messages": [*CHAT, "x"]}, "malformed chat: message 6 has no role and content"),
        ({"messages": CHAT[:2]}, "no answer: the chat has no message of the assistant"),
        (
            {"messages": [*CHAT[:2], {"role": "assistant", "content": " "}]},
            "empty answer: message 3 of the chat is empty",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place_or_the_row_skipped(
    row: Any, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "fine"}, row, {"text": "too"}])
    with pytest.raises(UserError, match=message):
        read(file)
    assert texts(read(file, on_error="skip")) == ["fine", "too"]
    assert "skipped 1 bad examples" in caplog.text
    settings = DataSettings(path=str(file), streaming=True)
    with pytest.raises(UserError, match=message):
        list(islice(endless_texts(settings, 0), 3))
    settings.on_error = "skip"
    stream = [text.text for text in islice(endless_texts(settings, 0), 6)]
    assert sorted(map(str, stream)) == ["fine"] * 3 + ["too"] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 no", r"cannot read .*a\.parquet"),
        ("a.json", b"{", r"cannot read .*a\.json"),
        ("a.json", b"{}", r"cannot read .*a\.json: not a list of objects"),
        ("a.txt", b"\xff\xfe\xfa", r"cannot read .*a\.txt"),
        ("a.csv", b"text", r"must be a folder or one of \.json"),
        ("a.jsonl", b"", "there is no usable example"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
    with pytest.raises(UserError, match=message):
        next(endless_texts(DataSettings(path=str(tmp_path / name)), 0))


def test_a_parquet_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"text": "x" * 100}] * 50)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        read(file)


def test_paths_and_options_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no files of texts"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"set one of data\.path and data\.source"):
        open_texts(DataSettings())
    with pytest.raises(UserError, match="prompt_dropout is for images"):
        read(tmp_path, prompt_dropout=0.1)
    with pytest.raises(UserError, match="shuffle_buffer must be at least 1"):
        read(tmp_path, shuffle_buffer=0)
    with pytest.raises(UserError, match=r"cannot load data\.source"):
        open_texts(DataSettings(source="json", files=[str(tmp_path / "nothing.jsonl")]))


def test_only_the_first_examples_are_read_where_so_many_are_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": str(n)} for n in range(9)] + ["{"])
    assert texts(read(file, max_examples=4)) == ["0", "1", "2", "3"]
    assert texts(read(file, skip_examples=2, max_examples=2)) == ["2", "3"]
    settings = DataSettings(path=str(file), max_examples=2)
    stream = [text.text for text in islice(endless_texts(settings, 0), 8)]
    assert set(stream) == {"0", "1"}


# streams


def test_a_stream_reads_no_further_than_its_buffer(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": str(n)} for n in range(100)]
    file = write(tmp_path / "a.jsonl", [*rows, "{"])
    problems: list[Problem] = []
    settings = DataSettings(path=str(file))
    stream = shuffled(read_texts(settings, Path(), problems), 5, generator(0))
    early = [int(str(text.text)) for text in islice(stream, 20)]
    assert max(early) < 26
    assert not problems
    assert len(list(stream)) == 80
    assert len(problems) == 1


def numbered(folder: Path, count: int = 7, **options: Any) -> DataSettings:
    rows = [{"text": str(n)} for n in range(count)]
    return DataSettings(path=str(write(folder / "a.jsonl", rows)), shuffle_buffer=4, **options)


def stream_of(settings: DataSettings, count: int, seed: int = 0) -> list[str | None]:
    return [text.text for text in islice(endless_texts(settings, seed), count)]


def test_every_epoch_of_a_stream_holds_all_texts_in_an_order_of_its_own(tmp_path: Path) -> None:
    settings = numbered(tmp_path)
    found = stream_of(settings, 21)
    epochs = [found[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(map(str, epoch)) == list("0123456") for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream_of(settings, 21) == found
    assert stream_of(settings, 21, seed=1) != found
    settings.shuffle_buffer = 1
    assert stream_of(settings, 9) == list("012345601")


def test_a_buffer_of_everything_shuffles_evenly() -> None:
    rng = generator(1)
    places = torch.zeros(4, 4)
    for _ in range(2000):
        for place, item in enumerate(shuffled(range(4), 4, rng)):
            places[item, place] += 1
    assert ((places / 2000 - 0.25).abs() < 0.04).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_groups_of_one_stream_and_a_resumed_one_goes_on(world: int) -> None:
    everything = list(groups(iter(range(60)), 5))
    assert [group.ids for group in everything] == [tuple(range(n, n + 5)) for n in range(0, 60, 5)]
    assert all(group.ids == group.items for group in everything)
    for start in (0, 2):
        parts = [
            list(groups(iter(range(60)), 5, rank=rank, world=world, start=start))
            for rank in range(world)
        ]
        merged = sorted(group for part in parts for group in part)
        assert merged == everything[start * world :]
        assert {len(part) for part in parts} == {12 // world - start}


def test_an_example_keeps_nothing_of_images() -> None:
    assert Example("", text="x").without_target() == Example("", text="x")

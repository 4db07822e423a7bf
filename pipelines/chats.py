"""Chats and plain texts as rows of tokens, for one tokenizer or for a student's and a teacher's.

Each side writes a chat with its own template; only what the messages say is common to both. So a
message is looked up in either text, and the tokens of the two are paired inside it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from diffdistill.alignment import Span, Spelling, align, inside
from diffdistill.errors import UserError
from diffdistill.pipelines.byte_spans import Speller

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A chat: each message has a ``role`` and a ``content``, both strings."""

Turns = Literal["all", "last"]


class Row(NamedTuple):
    """One text as tokens.

    Attributes:
        tokens: The token ids.
        maskable: Whether each token may be hidden and counts: an answer, and no prompt.
        chunks: The chunk of each token, -1 where it has none.
        documents: The number of the document that each token belongs to, -1 for padding.
    """

    tokens: list[int]
    maskable: list[bool]
    chunks: list[int]
    documents: list[int]

    def part(self, start: int, stop: int) -> "Row":
        """Return some of its tokens."""
        return Row(
            self.tokens[start:stop],
            self.maskable[start:stop],
            self.chunks[start:stop],
            self.documents[start:stop],
        )


class Chat(NamedTuple):
    """A chat as one side writes it.

    Attributes:
        messages: What it is made of.
        spelling: The whole text.
        contents: The bytes of what each message says, in order.
    """

    messages: Messages
    spelling: Spelling
    contents: tuple[Span, ...]


def template_text(tokenizer: Any, messages: Messages) -> str:
    """Return a chat in the tokenizer's template.

    As text and not as tokens, because only a text says which bytes each token spells; and since
    transformers 5 ``apply_chat_template`` returns a dictionary of tokens unless it is given
    ``return_dict=False``. The tokens are the same.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise UserError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} refused a chat of "
            f"roles {[m.get('role') for m in messages]}: {' '.join(str(error).split())}"
        ) from None
    return str(text)


def content_spans(tokenizer: Any, messages: Messages, text: str) -> list[Span]:
    """Return where each message's content stands in ``text``, in characters.

    The search moves on: each content is looked for after the one before and its markers, so that
    equal messages ("yes", "yes") and words of the template ("user") are told apart. A template
    may strip a content.

    Raises:
        UserError: If a content is not there, or is no string.
    """
    contents = [_content(message, number) for number, message in enumerate(messages)]
    markers = _markers(tokenizer, messages)
    spans: list[Span] = []
    position = 0
    for number, content in enumerate(contents):
        if markers is not None and text.startswith(markers[number], position):
            position += len(markers[number])
        start, wanted = _find(text, content, position)
        if start < 0:
            raise UserError(
                f"message {number + 1} of {len(contents)} is not in the chat as its template "
                f"writes it: {content[:40]!r} is not in {text[position : position + 80]!r}"
            )
        position = start + len(wanted)
        spans.append((start, position))
    return spans


def read_chat(speller: Speller, messages: Messages) -> Chat:
    """Return a chat as the tokenizer of ``speller`` writes and splits it."""
    text = template_text(speller.tokenizer, messages)
    spans = content_spans(speller.tokenizer, messages, text)
    contents = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
    return Chat(messages, speller(text), tuple(contents))


def merges_answer(chat: Chat, *, turns: Turns = "all") -> bool:
    """Return whether a token spells the end of a prompt and the start of a learned answer.

    Such a token is no part of the answer in training, and is not there in sampling, where the
    prompt ends before the answer.
    """
    spans = [chat.contents[index] for index in _answers(chat.messages, turns)]
    starts = [start for start, stop in spans if start < stop]
    return any(a < start < b for start in starts for a, b in chat.spelling.spans)


def chat_row(chat: Chat, *, turns: Turns = "all", end_of_turn: bool = True) -> Row:
    """Return a chat as tokens; the assistant's are maskable.

    Args:
        chat: The chat (see ``read_chat``).
        turns: Whether ``all`` answers are learned or the ``last`` alone.
        end_of_turn: Whether the marker that ends an answer is learned too; without it a model
            does not learn to stop. Markers are never aligned.
    """
    answers = _answers(chat.messages, turns)
    size = len(chat.spelling.tokens)
    return _row(chat, answers, [-1] * size, end_of_turn)


def chat_rows(
    student: Chat, teacher: Chat, *, turns: Turns = "all", end_of_turn: bool = True
) -> tuple[Row, Row]:
    """Return a chat as either side reads it as tokens, with common chunks in the answers.

    Where one template strips a content and the other does not, only the stripped is common.
    """
    sides = student, teacher
    answers = _answers(student.messages, turns)
    where = []
    for index in answers:
        content = student.messages[index]["content"]
        first, second = (side.contents[index] for side in sides)
        if first[1] - first[0] != second[1] - second[0]:
            first, second = (_stripped(content, span) for span in (first, second))
        where.append((first, second))
    chunks = align(sides[0].spelling, sides[1].spelling, where)
    ours, theirs = (
        _row(side, answers, ids, end_of_turn) for side, ids in zip(sides, chunks, strict=True)
    )
    return ours, theirs


def text_row(speller: Speller, text: str) -> Row:
    """Return a plain text as tokens, all of them maskable but special ones."""
    spelling = speller(text)
    return _plain(spelling, [-1] * len(spelling.tokens))


def text_rows(student: Speller, teacher: Speller, text: str) -> tuple[Row, Row]:
    """Return a plain text as the student's and the teacher's tokens, with common chunks."""
    sides = student(text), teacher(text)
    ours, theirs = (_plain(side, ids) for side, ids in zip(sides, align(*sides), strict=True))
    return ours, theirs


def cut_pair(pair: tuple[Row, Row], lengths: tuple[int, int]) -> tuple[Row, Row]:
    """Return both rows cut to ``lengths``, without the chunks that lost a token on either side."""
    lost = {
        chunk
        for row, length in zip(pair, lengths, strict=True)
        for chunk in row.chunks[length:]
        if chunk >= 0
    }
    ours, theirs = (
        row._replace(chunks=[-1 if c in lost else c for c in row.chunks]).part(0, length)
        for row, length in zip(pair, lengths, strict=True)
    )
    return ours, theirs


def split_pair(pair: tuple[Row, Row], lengths: tuple[int, int]) -> Iterator[tuple[Row, Row]]:
    """Yield parts of a text that is too long for ``lengths``, cut where both sides have a chunk.

    Parts are as long as both sides allow. Where no chunk ends in time, the rest is left as it is
    (see ``cut_pair``).
    """
    ours, theirs = pair
    lasts = [{c: i + 1 for i, c in enumerate(row.chunks) if c >= 0} for row in pair]
    ends = [(lasts[0][chunk], lasts[1][chunk]) for chunk in lasts[0]]
    start = (0, 0)
    while any(len(row.tokens) - at > n for row, at, n in zip(pair, start, lengths, strict=True)):
        fitting = [
            stop
            for stop in ends
            if all(0 < b - a <= n for a, b, n in zip(start, stop, lengths, strict=True))
        ]
        if not fitting:
            break
        stop = max(fitting)
        yield _numbered(ours.part(start[0], stop[0])), _numbered(theirs.part(start[1], stop[1]))
        start = stop
    yield (
        _numbered(ours.part(start[0], len(ours.tokens))),
        _numbered(theirs.part(start[1], len(theirs.tokens))),
    )


def pack(rows: Iterable[Row], length: int, *, pad: int) -> Iterator[Row]:
    """Yield rows of exactly ``length`` tokens, filled with one document after the other.

    A document that does not fit goes on in the next row; the last row is padded. Chunks are
    dropped (see ``pack_pairs``).

    Args:
        rows: The documents.
        length: Tokens in a row.
        pad: The token that fills the last row.
    """
    pending = Row([], [], [], [])
    for number, row in enumerate(rows):
        size = len(row.tokens)
        pending = joined(pending, row._replace(chunks=[-1] * size, documents=[number] * size))
        while len(pending.tokens) >= length:
            yield _renumbered(pending.part(0, length))
            pending = pending.part(length, len(pending.tokens))
    if pending.tokens:
        yield _renumbered(_padded(pending, length, pad))


def pack_pairs(
    pairs: Iterable[tuple[Row, Row]], lengths: tuple[int, int], *, pads: tuple[int, int]
) -> Iterator[tuple[Row, Row]]:
    """Yield pairs of rows of exactly ``lengths`` tokens, that hold the same documents.

    No document is split: one that does not fit on both sides starts the next row, and is cut there
    if it is too long for it. Chunks are counted on.

    Args:
        pairs: The documents, as the student and the teacher read them.
        lengths: Tokens in a row of the student and of the teacher.
        pads: The tokens that fill their rows.
    """
    pending = [Row([], [], [], []) for _ in lengths]
    document = chunk = 0
    for pair in pairs:
        cut = cut_pair(pair, lengths)
        sizes = [len(a.tokens) + len(b.tokens) for a, b in zip(pending, cut, strict=True)]
        if document and any(n > length for n, length in zip(sizes, lengths, strict=True)):
            yield _padded(pending[0], lengths[0], pads[0]), _padded(pending[1], lengths[1], pads[1])
            pending = [Row([], [], [], []) for _ in lengths]
            document = chunk = 0
        for side, row in enumerate(cut):
            moved = row._replace(
                chunks=[c if c < 0 else c + chunk for c in row.chunks],
                documents=[document] * len(row.tokens),
            )
            pending[side] = joined(pending[side], moved)
        chunk += max((c for row in pair for c in row.chunks), default=-1) + 1
        document += 1
    if document:
        yield _padded(pending[0], lengths[0], pads[0]), _padded(pending[1], lengths[1], pads[1])


def _content(message: Mapping[str, Any], number: int) -> str:
    content = message.get("content")
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise UserError(
            f"message {number + 1}: role and content must be strings, got "
            f"{message.get('role')!r} and {type(content).__name__}"
        )
    return content


def _find(text: str, content: str, position: int) -> tuple[int, str]:
    """Return where a content stands from ``position`` on (-1: nowhere), and as what."""
    spellings = content, content.strip()
    for wanted in spellings:
        if text.startswith(wanted, position):
            return position, wanted
    found = [(text.find(wanted, position), wanted) for wanted in spellings]
    return min((f for f in found if f[0] >= 0), default=(-1, content))


def _markers(tokenizer: Any, messages: Messages) -> list[str] | None:
    """Return what a template writes before each content, None if that depends on the contents."""
    signs = [f"\ue000{number}\ue001" for number in range(len(messages))]
    signed = [{**m, "content": s} for m, s in zip(messages, signs, strict=True)]
    try:
        rest = template_text(tokenizer, signed)
    except UserError:
        return None
    markers = []
    for sign in signs:
        before, found, rest = rest.partition(sign)
        if not found:
            return None
        markers.append(before)
    return markers


def _answers(messages: Messages, turns: Turns) -> list[int]:
    answers = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
    return answers if turns == "all" else answers[-1:]


def _stripped(content: str, span: Span) -> Span:
    """Return the part of a span that a stripped content takes."""
    core = content.strip().encode()
    if span[1] - span[0] == len(core):
        return span
    lead = len(content.encode()) - len(content.lstrip().encode())
    return span[0] + lead, span[0] + lead + len(core)


def _row(chat: Chat, answers: Sequence[int], chunks: list[int], end_of_turn: bool) -> Row:
    spelling = chat.spelling
    size = len(spelling.tokens)
    maskable = [False] * size
    for index in answers:
        start, stop = inside(spelling, chat.contents[index])
        maskable[start:stop] = [not special for special in spelling.special[start:stop]]
        if end_of_turn:
            after = [
                i for i, span in enumerate(spelling.spans) if span[0] >= chat.contents[index][1]
            ]
            limit = chat.contents[index + 1][0] if index + 1 < len(chat.contents) else None
            for place in after:
                if limit is not None and spelling.spans[place][1] > limit:
                    break
                if spelling.special[place]:
                    maskable[after[0] : place + 1] = [True] * (place + 1 - after[0])
                    break
    return Row(list(spelling.tokens), maskable, chunks, [0] * size)


def _plain(spelling: Spelling, chunks: list[int]) -> Row:
    maskable = [not special for special in spelling.special]
    return Row(list(spelling.tokens), maskable, chunks, [0] * len(maskable))


def joined(first: Row, second: Row) -> Row:
    """Return the tokens of one row and then of the other."""
    return Row(
        first.tokens + second.tokens,
        first.maskable + second.maskable,
        first.chunks + second.chunks,
        first.documents + second.documents,
    )


def _padded(row: Row, length: int, pad: int) -> Row:
    more = length - len(row.tokens)
    assert more >= 0
    filler = Row([pad] * more, [False] * more, [-1] * more, [-1] * more)
    return joined(row, filler)


def _numbered(row: Row) -> Row:
    """Return a row whose chunks are counted from 0."""
    first = min((chunk for chunk in row.chunks if chunk >= 0), default=0)
    return row._replace(chunks=[chunk if chunk < 0 else chunk - first for chunk in row.chunks])


def _renumbered(row: Row) -> Row:
    """Return a row whose documents are counted from 0."""
    first = row.documents[0]
    return row._replace(documents=[d if d < 0 else d - first for d in row.documents])

"""Texts as a student and a teacher read them: rows and batches, whatever the models are."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from diffdistill.errors import UserError
from diffdistill.pipelines.byte_spans import Speller
from diffdistill.pipelines.chats import (
    Chat,
    Messages,
    Row,
    Turns,
    chat_row,
    chat_rows,
    cut_pair,
    joined,
    merges_answer,
    pack,
    pack_pairs,
    read_chat,
    split_pair,
    text_row,
    text_rows,
)
from diffdistill.pipelines.token_family import located
from diffdistill.texts import Reader, Text
from diffdistill.types import Batch, Example

log = logging.getLogger(__name__)


class RowReader(Protocol):
    """What is needed here of a family that reads texts."""

    path: str
    device: torch.device
    max_length: int

    @property
    def multiple(self) -> int:
        """What the length of a batch is a multiple of."""
        ...

    @property
    def speller(self) -> Speller:
        """The tokenizer, and which bytes its tokens spell."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of transformers."""
        ...

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text."""
        ...

    @property
    def pad_id(self) -> int:
        """Id of the token that fills rows."""
        ...

    def lay_out(self, row: Row) -> Row:
        """Return a text as the network reads it; empty where there is nothing to learn."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of all that alters how texts are read."""
        ...


F = TypeVar("F", bound=RowReader)

FILLERS = {"tokens": 0, "maskable": False, "chunks": -1, "documents": -1}


@dataclass(frozen=True)
class Reading:
    """How examples become rows.

    Attributes:
        turns: Whether ``all`` answers of a chat are learned, or the ``last`` alone.
        packing: Whether rows are filled with one text after the other.
        truncate: Whether a text that is too long is cut; else it cannot be used.
        skip: Whether a text that cannot be used is left out; else it is an error.
    """

    turns: Turns = "all"
    packing: bool = False
    truncate: bool = True
    skip: bool = False


@dataclass
class TextRows(Generic[F]):
    """The student's family, and the teacher's, which may be the same, and what they read.

    Where they are two, both tokenize each text, and it is cut into chunks that both spell. Where
    they are one, each token is a chunk of its own.

    Attributes:
        student: Reads for the student.
        teacher: Reads for the teacher.
        reading: How examples become rows.
        skipped: What was wrong with the texts that were left out.
        merged: How many chats have a token of both a prompt and an answer of the student's.
    """

    student: F
    teacher: F
    reading: Reading = field(default_factory=Reading)
    skipped: list[str] = field(default_factory=list)
    merged: int = 0

    @property
    def device(self) -> torch.device:
        """Where batches live."""
        return self.student.device

    @property
    def readers(self) -> dict[Reader, F]:
        """The families that read differently, by reader."""
        if self.teacher is self.student:
            return {"student": self.student}
        return {"student": self.student, "teacher": self.teacher}

    def spellings(self, *, reader: Reader = "student") -> Sequence[bytes | None]:
        """Return what each token id of the reader spells, None of special tokens."""
        return self._family(reader).speller.vocabulary()

    def text(self, batch: Batch, *, reader: Reader = "student") -> Text:
        """Return the texts of ``batch`` as the reader has them."""
        key = self._key(reader)
        tokens, maskable, chunks = (batch[f"{key}/{name}"] for name in Text._fields)
        if len(self.readers) == 1:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            chunks = torch.where(maskable, places, -1)
        return Text(tokens, maskable, chunks)

    def _family(self, reader: Reader) -> F:
        return self.student if reader == "student" else self.teacher

    def _key(self, reader: Reader) -> Reader:
        return reader if reader in self.readers else "student"

    def encode(
        self, examples: Sequence[Example], *, privileged: bool = True
    ) -> list[dict[str, Tensor]]:
        """Return each text as rows of tokens, ``reader/tokens`` and so on (see ``chats.Row``).

        A text that cannot be used is an error, or has no tokens (see ``Reading``).

        Raises:
            UserError: If a text cannot be read or used.
        """
        return [self.tensors(self.rows(example)) for example in examples]

    def rows(self, example: Example) -> dict[Reader, Row]:
        """Return a text as each reader's tokens; laid out and cut, if it is not to be packed.

        Raises:
            UserError: If it cannot be read or used, and is not to be left out.
        """
        try:
            with located(example.origin):
                rows = self._spelled(example)
                return rows if self.reading.packing else self._fitted(rows)
        except UserError as error:
            if not self.reading.skip:
                raise
            self.skipped.append(str(error))
            return {reader: Row([], [], [], []) for reader in self.readers}

    def _spelled(self, example: Example) -> dict[Reader, Row]:
        families = list(self.readers.values())
        if example.messages is not None:
            for family in families:
                if family.tokenizer.chat_template is None:
                    raise UserError(
                        f"the tokenizer of {family.path} has no chat template, and this is a chat: "
                        "set chat_template of its family, or give plain text"
                    )
        elif example.text is None:
            raise UserError("neither a chat nor a text")
        found: Sequence[Row] = self._one(example) if len(families) == 1 else self._both(example)
        if not any(found[0].maskable):
            raise UserError("there is no answer in it to learn")
        return dict(zip(self.readers, found, strict=True))

    def _one(self, example: Example) -> list[Row]:
        if example.messages is None:
            return [text_row(self.student.speller, example.text or "")]
        return [chat_row(self._chat(example.messages), turns=self.reading.turns)]

    def _both(self, example: Example) -> tuple[Row, Row]:
        theirs = self.teacher.speller
        if example.messages is None:
            return text_rows(self.student.speller, theirs, example.text or "")
        ours, judged = self._chat(example.messages), read_chat(theirs, example.messages)
        return chat_rows(ours, judged, turns=self.reading.turns)

    def _chat(self, messages: Messages) -> Chat:
        """Return a chat as the student reads it, and count it if a prompt runs into an answer."""
        chat = read_chat(self.student.speller, messages)
        self.merged += merges_answer(chat, turns=self.reading.turns)
        return chat

    def _fitted(self, rows: Mapping[Reader, Row]) -> dict[Reader, Row]:
        """Return rows laid out, and cut to the readers' lengths."""
        laid = {reader: self._family(reader).lay_out(row) for reader, row in rows.items()}
        limits = {reader: self._family(reader).max_length for reader in laid}
        for reader, row in laid.items():
            if len(row.tokens) > limits[reader] and not self.reading.truncate:
                raise UserError(
                    f"{len(row.tokens)} tokens, and the {reader}'s max_length is {limits[reader]}"
                )
        ends = next(iter(laid)), next(reversed(laid))  # one reader twice, or both
        ours, theirs = cut_pair((laid[ends[0]], laid[ends[1]]), (limits[ends[0]], limits[ends[1]]))
        cut = dict(zip(ends, (ours, theirs), strict=True))
        for reader, row in cut.items():
            if not any(row.maskable):
                raise UserError(
                    f"its prompt of {laid[reader].maskable.index(True)} tokens leaves no room for "
                    f"an answer in the {reader}'s max_length {limits[reader]}"
                )
        return cut

    def packed(self, rows: Iterable[Mapping[Reader, Row]]) -> Iterator[dict[Reader, Row]]:
        """Yield full rows of one text after the other, each followed by an end token.

        With one reader a text goes on in the next row; with two, so that both have the same in a
        row, it does where both have a boundary.
        """
        ended = ({r: self._ended(r, row) for r, row in texts.items()} for texts in rows)
        if len(self.readers) == 1:
            family = self.student
            alone = (texts["student"] for texts in ended)
            for row in pack(alone, family.max_length, pad=family.pad_id):
                yield {"student": row}
            return
        limits = self.student.max_length, self.teacher.max_length
        pads = self.student.pad_id, self.teacher.pad_id
        pairs = ((texts["student"], texts["teacher"]) for texts in ended)
        parts = (part for pair in pairs for part in split_pair(pair, limits))
        for ours, theirs in pack_pairs(parts, limits, pads=pads):
            yield {"student": ours, "teacher": theirs}

    def _ended(self, reader: Reader, row: Row) -> Row:
        """Return a row with an end token, if it has none and is not empty."""
        family = self._family(reader)
        if not row.tokens or row.tokens[-1] in family.tokenizer.all_special_ids:
            return row
        return joined(row, Row([family.eos_id], [True], [-1], row.documents[-1:]))

    def tensors(self, rows: Mapping[Reader, Row]) -> dict[str, Tensor]:
        """Return what ``collate`` takes: the columns of each reader's row."""
        return {
            f"{reader}/{name}": torch.tensor(
                getattr(row, name), dtype=torch.bool if name == "maskable" else torch.int64
            )
            for reader, row in rows.items()
            for name in FILLERS
        }

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return a batch on the device, its rows filled up to the same whole blocks."""
        batch = {}
        for reader, family in self.readers.items():
            for name, filler in (FILLERS | {"tokens": family.pad_id}).items():
                rows = [item[f"{reader}/{name}"] for item in encoded]
                together = pad_sequence(rows, batch_first=True, padding_value=float(filler))
                blocks = max(math.ceil(together.shape[1] / family.multiple), 1)
                more = blocks * family.multiple - together.shape[1]
                batch[f"{reader}/{name}"] = pad(together, (0, more), value=filler).to(self.device)
        return batch

    def release(self) -> None:
        """Say how many texts were left out, and how many prompts run into an answer."""
        if self.skipped:
            log.warning(
                "left out %d texts that cannot be used, such as %s",
                len(self.skipped),
                self.skipped[0],
            )
            self.skipped.clear()
        if self.merged:
            log.warning(
                "in %d chats a token of %s spells the end of a prompt and the start of an answer, "
                "which sampling never sees: give answers that begin with no space or line break, "
                "or set chat_template of the family to one with a special token before answers",
                self.merged,
                self.student.path,
            )
            self.merged = 0

    def fingerprint(self) -> str:
        """Return a hash of both readers, and of how examples become rows."""
        content = [family.fingerprint() for family in self.readers.values()]
        return hashlib.sha256(json.dumps([*content, repr(self.reading)]).encode()).hexdigest()[:16]

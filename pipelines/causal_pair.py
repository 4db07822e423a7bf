"""Texts as an autoregressive student and its teacher read them, each in its own tokens."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from diffdistill.adapters import is_adapter_key
from diffdistill.byte_beam import Search
from diffdistill.pipelines.byte_targets import (
    Columns,
    byte_columns,
    search_bytes,
    spell,
    stretches,
    target_columns,
)
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.chats import Row
from diffdistill.pipelines.questions import Asking
from diffdistill.pipelines.text_rows import TextRows
from diffdistill.rollouts import Actor
from diffdistill.spellings import Spellings
from diffdistill.texts import Bytes, Reader, Text
from diffdistill.types import Batch, Condition, Example, State

PREFIX = "bytes/"


class Annotator(Protocol):
    """What adds to encoded texts (see ``Method.annotate``)."""

    def annotation(self) -> str:
        """Return what identifies what is added."""
        ...

    def annotate(self, texts: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        """Return what is added to each text."""
        ...


@dataclass
class CausalPair(TextRows[CausalLM]):
    """The student's family, and the teacher's, which may be the same: a ``texts.GivenFamily``.

    It is a ``texts.TextFamily`` too, of which all is hidden: each token is predicted from those
    before it, and what a model sees does not depend on the mask.

    Attributes:
        asking: How questions are put, where answers are sampled.
        annotator: Adds to what is encoded; None adds nothing.
    """

    asking: Asking = field(default_factory=Asking)
    annotator: Annotator | None = None
    _tries: dict[Reader, Spellings] = field(default_factory=dict, repr=False)

    # what methods ask

    def text(self, batch: Batch, *, reader: Reader = "student") -> Text:
        """Return the texts of ``batch`` without their first token, which is given."""
        return Text(*(part[:, 1:] for part in super().text(batch, reader=reader)))

    def state(self, batch: Batch, *, reader: Reader = "student") -> State:
        """Return where the reader's model is asked: at each token of ``text``."""
        text = self.text(batch, reader=reader)
        clean = torch.zeros(len(text.tokens), device=text.tokens.device)
        return State(text.tokens, clean, text.maskable)

    def noised(self, batch: Batch, t: Tensor, mask: Tensor, *, reader: Reader = "student") -> State:
        """Return ``state``, with the noise level and mask that a method gives."""
        return State(self.text(batch, reader=reader).tokens, t, mask)

    def condition(self, batch: Batch, *, reader: Reader = "student", copies: int = 1) -> Condition:
        """Return the first token of each text (see ``prompts.prompt_condition``)."""
        first = batch[f"{self._key(reader)}/tokens"][:, :1].repeat(copies, 1)
        return {"prompt": first, "pads": first.new_zeros(len(first))}

    def bytes(self, batch: Batch) -> Bytes:
        """Return the bytes of the student's tokens, and what ``byte_targets`` found of them."""
        columns = {name: batch[PREFIX + name] for name in Bytes._fields}
        whole = {name: columns[name].long() for name in ("observed", "ids")}
        late = {name: columns[name][:, 1:] for name in ("first", "size")}
        return Bytes(**columns | whole | late)

    @torch.no_grad()
    def byte_targets(
        self, teacher: Actor, texts: Sequence[Mapping[str, Tensor]], search: Search, kept: int
    ) -> list[dict[str, Tensor]]:
        """Return what a teacher says of the bytes of encoded texts (see ``texts.GivenFamily``)."""
        ours, theirs = self._spellings("student"), self._spellings("teacher")
        students, asked = [], []
        for text in texts:
            student = spell(self._columns(text, "student", ours), ours)
            columns = self._columns(text, "teacher", theirs)
            keys = [
                [key for key in token if key in student.values]
                for token in spell(columns, theirs).keys
            ]
            students.append(student)
            asked.append((columns[0], list(stretches(keys))))
        with teacher.acting(self.device):
            found = search_bytes(self.teacher, teacher.network, asked, theirs, search)
        return [
            byte_columns(student) | target_columns(student, probabilities, kept)
            for student, probabilities in zip(students, found, strict=True)
        ]

    def weights(self, teacher: Actor) -> str:
        """Return a hash of a model's weights and of how it reads.

        Adapters of others on the same network are not its own, and change no name of its weights.
        """
        digest = hashlib.sha256(self.teacher.fingerprint().encode())
        own = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in teacher.network.state_dict().items()
            if not is_adapter_key(name)
        }
        for name, tensor in sorted(own.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def _spellings(self, reader: Reader) -> Spellings:
        key = self._key(reader)
        if key not in self._tries:
            family = self._family(key)
            self._tries[key] = Spellings(family.speller.vocabulary(), family.end_ids)
        return self._tries[key]

    def _columns(self, text: Mapping[str, Tensor], reader: Reader, spelled: Spellings) -> Columns:
        """Return the columns of a reader's row; of one reader, a chunk for each learned token."""
        key = self._key(reader)
        tokens, learned, chunks = (text[f"{key}/{name}"].tolist() for name in Text._fields)
        if len(self.readers) == 1:
            chunks = [
                place if kept and spelled.pieces[tokens[place]] else -1
                for place, kept in enumerate(learned)
            ]
        return tokens, learned, chunks

    # what the data asks

    def _fitted(self, rows: Mapping[Reader, Row]) -> dict[Reader, Row]:
        """Return rows laid out and cut, without the chunk of a token that nothing predicts."""
        fitted = super()._fitted(rows)
        lost = {row.chunks[0] for row in fitted.values()} - {-1}
        return {
            reader: row._replace(chunks=[-1 if c in lost else c for c in row.chunks])
            for reader, row in fitted.items()
        }

    def encode(
        self, examples: Sequence[Example], *, privileged: bool = True
    ) -> list[dict[str, Tensor]]:
        """Return each text as rows of tokens, and what the annotator adds."""
        encoded = super().encode(examples, privileged=privileged)
        if self.annotator is None:
            return encoded
        added = self.annotator.annotate(encoded)
        return [{**text, **more} for text, more in zip(encoded, added, strict=True)]

    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return a batch on the device, its rows filled up to the same length."""
        batch = super().collate(encoded)
        width = batch["student/tokens"].shape[1]
        for name in (name for name in encoded[0] if name.startswith(PREFIX)):
            filler = -1.0 if name == PREFIX + "first" else 0.0
            rows = [text[name] for text in encoded]
            filled = pad_sequence(rows, batch_first=True, padding_value=filler)
            if name.removeprefix(PREFIX) in ("first", "size"):  # of each token
                filled = pad(filled, (0, width - filled.shape[1]), value=filler)
            batch[name] = filled.to(self.device)
        return batch

    def fingerprint(self) -> str:
        """Return a hash of both readers, of how examples become rows, and of what is added."""
        added = "" if self.annotator is None else self.annotator.annotation()
        return hashlib.sha256(f"{super().fingerprint()}{added}".encode()).hexdigest()[:16]

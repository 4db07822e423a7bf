"""What all families of language models share: a tokenizer, with its template and its end tokens."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.byte_spans import Speller
from diffdistill.pipelines.chats import chat_row, read_chat
from diffdistill.pipelines.model_family import ModelFamily


@dataclass(kw_only=True)
class TokenFamily(ModelFamily):
    """A family of language models; nothing is loaded before it is used.

    Attributes:
        path: Hub id or local folder with the network and its tokenizer.
        device: Where everything runs.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let network and tokenizer run code from the checkpoint.
        chat_template: A file with the template (Jinja) of chats; None is the tokenizer's own.
    """

    path: str
    device: torch.device
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None

    @property
    def folder(self) -> Path:
        """The local folder of the checkpoint."""
        return self._locate(self.path, self.revision)

    def _locate(self, path: str, revision: str | None) -> Path:
        return loading.locate(path, "", revision, code=self.trust_remote_code)

    @cached_property
    def speller(self) -> Speller:
        """The tokenizer, and which bytes its tokens spell."""
        tokenizer = loading.load_tokenizer(self.folder, self.trust_remote_code)
        if self.chat_template is not None:
            with loading.explained(f"read chat_template {self.chat_template}"):
                tokenizer.chat_template = Path(self.chat_template).expanduser().read_text()
        return Speller(tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of transformers."""
        return self.speller.tokenizer

    @cached_property
    def words(self) -> int:
        """One more than the largest id of a token."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text.

        Raises:
            UserError: If there is none.
        """
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{self.path}: the tokenizer has no end token (eos_token)")
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def turn_ends(self) -> list[int]:
        """Ids of the special tokens that the template ends an assistant's turn with."""
        if self.tokenizer.chat_template is None:
            return []
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        row = chat_row(read_chat(self.speller, turn), turns="last")
        learned = [t for t, kept in zip(row.tokens, row.maskable, strict=True) if kept]
        return [t for t in learned if t in self.tokenizer.all_special_ids]

    @property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer: the end token, and the end of a chat's turn."""
        return list(dict.fromkeys([self.eos_id, *self.turn_ends]))

    @property
    def pad_id(self) -> int:
        """Id of the token that fills rows; nobody sees it."""
        pad: int | None = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def save_reader(self, folder: Path) -> None:
        """Write the tokenizer, with its template, beside exported weights."""
        self.tokenizer.save_pretrained(str(folder))

    def hashed(self, *options: Any) -> str:
        """Return a hash of the tokenizer and its template, and of options."""
        content = json.dumps([*options, self.tokenizer.chat_template])
        digest = hashlib.sha256(content.encode())
        for file in sorted(self.folder.glob("*token*")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    def decoded(self, tokens: Sequence[int]) -> str:
        """Return a text without its special tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Say where a text came from in what is wrong with it within the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}" if origin else str(error)) from error

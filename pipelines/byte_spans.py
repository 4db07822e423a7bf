"""The bytes that each token of a text spells, for any tokenizer of the tokenizers library.

Offsets do not tell: they count characters, and the tokens of one character share them. So each
token's own string is turned back into bytes, by the rules of its kind, and compared with the text.
A tokenizer that changes the text (a normalizer, a space in front) is therefore always noticed.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal

from diffdistill.alignment import Spelling
from diffdistill.errors import UserError

Kind = Literal["byte-level", "metaspace", "characters"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each of the 256 characters with which GPT-2 writes bytes.

    Bytes that print stand for themselves, the others for characters from 256 on.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    shown = {chr(byte): byte for byte in printed}
    return shown | {chr(256 + index): byte for index, byte in enumerate(others)}


class Speller:
    """Splits texts into tokens and says which bytes each token spells.

    Attributes:
        tokenizer: The tokenizer that was given.
        kind: How its tokens are written: in GPT-2's ``byte-level`` alphabet, with
            SentencePiece's ``metaspace``, or in plain ``characters``.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of transformers or of tokenizers.

        Raises:
            UserError: If the tokenizer is not made of the tokenizers library.
        """
        self.tokenizer = tokenizer
        core = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(core, "get_added_tokens_decoder"):
            raise UserError(
                f"{type(tokenizer).__name__} does not say which bytes its tokens spell; load a "
                "fast tokenizer (one with a tokenizer.json)"
            )
        self._core = core
        self._added = core.get_added_tokens_decoder()
        rules = [_rules(part) for part in (core.pre_tokenizer, core.decoder, core.normalizer)]
        kinds = {str(rule["type"]) for part in rules for rule in part}
        spaces = [r["replacement"] for part in rules for r in part if r["type"] == "Metaspace"]
        writes_space = any(r["type"] == "Replace" and r["content"] == " " for r in rules[1])
        self.kind: Kind = "characters"
        if "ByteLevel" in kinds:
            self.kind = "byte-level"
        elif spaces or writes_space:
            self.kind = "metaspace"
        self._space = spaces[0] if spaces else "\u2581"
        self._byte_tokens = "ByteFallback" in kinds or getattr(core.model, "byte_fallback", False)
        self._alphabet = byte_alphabet()
        self._unknown = getattr(core.model, "unk_token", None) or self._unknown_of_unigram()
        self._prefix = getattr(core.model, "continuing_subword_prefix", None) or ""

    def __call__(self, text: str) -> Spelling:
        """Return the tokens of a text, without any that the tokenizer would put around it.

        Raises:
            UserError: If the tokens do not spell the text.
        """
        with self._untruncated():
            encoding = self._core.encode(text, add_special_tokens=False)
        data = text.encode()
        offsets = [0, *accumulate(len(character.encode()) for character in text)]
        spans, position = [], 0
        for token, piece, (start, stop) in zip(
            encoding.ids, encoding.tokens, encoding.offsets, strict=True
        ):
            source = data[offsets[start] : offsets[stop]]
            spelled = self._spelled(token, piece)
            if token in self._added or spelled is None:
                spelled = source
            end = position + len(spelled)
            if data[position:end] != spelled:
                raise self._refusal(text, position, spelled.decode(errors="replace"))
            spans.append((position, end))
            position = end
        if position != len(data):
            raise self._refusal(text, position, "")
        special = tuple(
            token in self._added and self._added[token].special for token in encoding.ids
        )
        return Spelling(data, tuple(encoding.ids), tuple(spans), special)

    def vocabulary(self) -> list[bytes | None]:
        """Return what each id up to the largest spells, None for special, unknown and unused ones.

        Words that were added to a vocabulary without being special (runs of spaces, in many) are
        text as any, unless they take spaces around them along.
        """
        pieces = [
            self._core.id_to_token(i) for i in range(1 + max(self._core.get_vocab().values()))
        ]
        return [
            None if piece is None else self._added_word(token) or self._spelled(token, piece)
            for token, piece in enumerate(pieces)
        ]

    def added_text(self, token: int) -> str:
        """Return the text of an added token, without any spaces that it takes along."""
        text: str = self._added[token].content
        return text.replace(self._space, " ") if self.kind == "metaspace" else text

    def _added_word(self, token: int) -> bytes | None:
        """Return the bytes of an added token, None where it is special or no fixed text."""
        added = self._added.get(token)
        if added is None or added.special or added.lstrip or added.rstrip:
            return None
        return None if added.content == self._unknown else self.added_text(token).encode()

    def _spelled(self, token: int, piece: str) -> bytes | None:
        """Return the bytes of a token that its string alone tells, None where it does not."""
        if token in self._added or piece == self._unknown:
            return None
        if self.kind == "byte-level":
            if all(character in self._alphabet for character in piece):
                return bytes(self._alphabet[character] for character in piece)
            return None
        if self.kind == "metaspace":
            found = BYTE_TOKEN.fullmatch(piece) if self._byte_tokens else None
            if found:
                return bytes([int(found[1], 16)])
            return piece.replace(self._space, " ").encode()
        return piece.removeprefix(self._prefix).encode()

    def _unknown_of_unigram(self) -> str | None:
        """Return the unknown token of a Unigram model, which names it by its id alone."""
        unknown = getattr(self._core.model, "unk_id", None)
        return None if unknown is None else self._core.id_to_token(unknown)

    def _refusal(self, text: str, position: int, spelled: str) -> UserError:
        character = len(text.encode()[:position].decode(errors="ignore"))
        rest = text[character : character + 12]
        reason = ""
        normalizer = self._core.normalizer
        if normalizer is not None and normalizer.normalize_str(text) != text:
            reason = f"; its normalizer ({type(normalizer).__name__}) rewrites the text"
        if character == 0 and spelled.startswith(" ") and not rest.startswith(" "):
            reason = (
                "; it puts a space in front: take a copy of the checkpoint whose tokenizer.json "
                'does not (add_prefix_space=False; of Metaspace prepend_scheme="never")'
            )
        return UserError(
            f"the tokenizer does not keep the text: from character {character} on it spells "
            f"{spelled!r} where the text has {rest!r}{reason}"
        )

    @contextmanager
    def _untruncated(self) -> Iterator[None]:
        """Switch off truncation and padding, which transformers leaves on after its own calls."""
        core = self._core
        truncation, padding = core.truncation, core.padding
        core.no_truncation()
        core.no_padding()
        yield
        if truncation is not None:
            core.enable_truncation(**truncation)
        if padding is not None:
            core.enable_padding(**padding)


def _rules(part: Any) -> list[dict[str, Any]]:
    """Return the settings of a component and of its members, each with its type."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    for name in ("pretokenizers", "decoders", "normalizers"):
        if name in state:
            return list(state[name])
    return [state]

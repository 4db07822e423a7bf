"""What the families of language models share: tokenizer, template, layout, and the network.

A family reads texts with its own tokenizer and predicts every hidden token of a row from one call.
Subclasses differ in the call alone.
"""

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from diffdistill.errors import UserError
from diffdistill.pipelines import loading, remote_code
from diffdistill.pipelines.answers import AnswerSampler
from diffdistill.pipelines.block_diffusion import SPARSE_TILE, Attention
from diffdistill.pipelines.byte_spans import Speller
from diffdistill.pipelines.chats import Row, chat_row, read_chat
from diffdistill.pipelines.loading import DtypeName
from diffdistill.pipelines.model_family import ModelFamily
from diffdistill.projection import Projection, without
from diffdistill.texts import Format
from diffdistill.types import Condition, State


@dataclass(kw_only=True)
class LanguageFamily(ModelFamily):
    """A family of masked-diffusion language models on networks of transformers.

    Nothing is loaded before it is used.

    Attributes:
        path: Hub id or local folder with the network and its tokenizer.
        device: Where everything runs.
        dtype: Type of all weights; ``auto`` is bf16 on CUDA and fp32 elsewhere.
        quantize: Storage of a frozen network: ``nf4`` or ``int8`` (bitsandbytes).
        attention: ``sdpa`` everywhere; ``flex_attention`` skips what a block mask hides, on a GPU,
            with rows of multiples of 64 tokens; ``eager`` to look into it.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let network and tokenizer run code from the checkpoint.
        max_length: Tokens of the longest row, a multiple of ``block``.
        block: Tokens that are denoised together. An answer begins with a block, and is followed
            by end tokens, which are learned, up to the end of its last one.
        mask_token: Spelling of the mask token; None is the tokenizer's own, or what the network's
            config names.
        chat_template: A file with the template (Jinja) of chats; None is the tokenizer's own.
    """

    path: str
    device: torch.device
    dtype: DtypeName = "auto"
    quantize: Literal["none", "nf4", "int8"] = "none"
    attention: Attention = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    max_length: int = 512
    block: int = 32
    mask_token: str | None = None
    chat_template: str | None = None

    adapter_targets: ClassVar[tuple[str, ...]] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check the lengths; start with nothing loaded.

        Raises:
            UserError: If no row of whole blocks has the length.
        """
        if self.block < 1 or self.max_length < 1 or self.max_length % self.block:
            raise UserError(
                f"max_length {self.max_length} must be a multiple of the block of {self.block} "
                "tokens"
            )
        if self.attention == "flex_attention" and 2 * self.max_length % SPARSE_TILE:
            raise UserError(
                f"attention flex_attention needs a max_length that is a multiple of "
                f"{SPARSE_TILE // 2}, not {self.max_length}"
            )
        self.weights_dtype = loading.resolve_dtype(self.dtype, self.device)

    @abstractmethod
    def call(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return logits ``[B, L, V]`` about ``state.x``; ``condition`` is that of ``condition``."""

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return what ``call`` does, with an impossible mask token (SUBS, section 3 of BD3LM)."""
        found = without(self.call(network, state, condition), [self.mask_id])
        assert isinstance(found, Projection)
        return found

    def condition(self, clean: Tensor, padding: Tensor) -> Condition:
        """Return what a network is told besides the state.

        That is ``clean`` and ``padding``, and in ``pads`` ``[B]`` how much of it is on the left.

        Args:
            clean: The text without masks, ``[B, L]``.
            padding: bool ``[B, L]``: what is no text, on the left and on the right.
        """
        return {"clean": clean, "padding": padding, "pads": padding.long().cumprod(1).sum(1)}

    @abstractmethod
    def sampler(self, network: nn.Module, **options: Any) -> AnswerSampler:
        """Return what samples answers; ``options`` are those of ``AnswerSampler``."""

    def _of_the_tokenizer(self) -> dict[str, Any]:
        """Return the options of a sampler that the tokenizer gives."""
        return {"mask_id": self.mask_id, "pad_id": self.pad_id, "eos_ids": self.end_ids}

    @property
    def span(self) -> int | None:
        """How many tokens share a noise level in the bound on the likelihood; None is a row.

        That is a block where later ones are not seen.
        """
        return self.block

    # the network

    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded network, of this family's checkpoint or of ``path``.

        Raises:
            UserError: If there is none, or it is another kind of model, or has another tokenizer.
        """
        folder = self._locate(path, None) if path else self.folder
        if path is not None:
            self._check_tokenizer(folder)
        network = self._load(folder)
        rows = network.get_input_embeddings().num_embeddings
        if self.mask_id >= rows:
            raise UserError(
                f"{folder}: the mask token has id {self.mask_id}, and the network {rows} embeddings"
            )
        return loading.place(network, self.device, self.weights_dtype, self.quantize)

    def _load(self, folder: Path) -> Any:
        """Return the network in a folder."""
        remote_code.check_trusted(folder, self.trust_remote_code)
        kinds = loading.read_config(folder).get("architectures") or ["none"]
        if not self.trust_remote_code and not any(k.endswith("ForCausalLM") for k in kinds):
            raise UserError(
                f"{folder}: needs a causal language model (...ForCausalLM), found "
                f"{', '.join(kinds)}"
            )
        options = self._load_options() | {"trust_remote_code": self.trust_remote_code}
        with remote_code.explained(folder):
            return loading.load_frozen(AutoModelForCausalLM, folder, options)

    def _load_options(self) -> dict[str, Any]:
        """Return how transformers is to load the network."""
        options: dict[str, Any] = {
            "dtype": self.weights_dtype,
            "attn_implementation": self.attention,
        }
        stored = loading.bitsandbytes_config(self.quantize, self.weights_dtype, "transformers")
        return options if stored is None else options | {"quantization_config": stored}

    def _check_tokenizer(self, folder: Path) -> None:
        """Refuse weights that go with other tokens."""
        if not (folder / "tokenizer.json").is_file():
            return
        other = loading.load_tokenizer(folder, self.trust_remote_code)
        if other.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"{folder} has another tokenizer than {self.path}: give that role a family of its "
                "own, roles.NAME.family: {name: ..., path: ...}"
            )

    # the tokenizer

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
    def mask_id(self) -> int:
        """Id of the mask token.

        Raises:
            UserError: If there is none.
        """
        words = self.tokenizer
        spelled = words.mask_token if self.mask_token is None else self.mask_token
        known = words.get_added_vocab()
        stated = loading.read_config(self.folder).get("mask_token_id")
        if spelled is None and stated is not None:
            return int(stated)
        if spelled is None:
            raise UserError(
                f"{self.path}: the tokenizer has no mask token: set mask_token to one of its "
                "special tokens, or convert the model to block diffusion, which adds one"
            )
        if spelled not in known:
            raise UserError(
                f"{self.path}: mask_token {spelled!r} is no special token of the tokenizer; it "
                f"has {', '.join(sorted(known))}"
            )
        return int(known[spelled])

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
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer: the end token, and the end of a chat's turn."""
        if self.tokenizer.chat_template is None:
            return [self.eos_id]
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        row = chat_row(read_chat(self.speller, turn), turns="last")
        learned = [t for t, kept in zip(row.tokens, row.maskable, strict=True) if kept]
        ends = [t for t in learned if t in self.tokenizer.all_special_ids]
        return list(dict.fromkeys([self.eos_id, *ends]))

    @property
    def pad_id(self) -> int:
        """Id of the token that fills rows; nobody sees it."""
        pad: int | None = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    @property
    def format(self) -> Format:
        """How texts are laid out."""
        return Format(self.mask_id, self.block, self.max_length)

    @property
    def unit(self) -> int:
        """What a row's prompt, and the row, are filled up to a multiple of."""
        return self.block

    @property
    def multiple(self) -> int:
        """What the length of a batch is a multiple of."""
        if self.attention != "flex_attention":
            return self.block
        return math.lcm(self.block, SPARSE_TILE // 2)

    def lay_out(self, row: Row) -> Row:
        """Return a text as the network reads it; empty where there is nothing to learn.

        Padding in front lets the first answer begin with a block, as in sampling. What comes
        after the last answer (a line break of the template) is dropped: left visible, it would
        tell where the answer ends.
        """
        if not any(row.maskable):
            return row.part(0, 0)
        first = row.maskable.index(True)
        stop = len(row.maskable) - row.maskable[::-1].index(True)
        left = -first % self.unit
        kept = row.part(0, stop)
        ended = kept.tokens[-1] in self.tokenizer.all_special_ids
        missing = -(left + stop + (not ended)) % self.unit + (not ended)
        return Row(
            [self.pad_id] * left + kept.tokens + [self.eos_id] * missing,
            [False] * left + kept.maskable + [True] * missing,
            [-1] * left + kept.chunks + [-1] * missing,
            [-1] * left + kept.documents + [kept.documents[-1]] * missing,
        )

    def fingerprint(self) -> str:
        """Return a hash of the tokenizer and of the options that alter how texts are read."""
        options = [type(self).__name__, self.max_length, self.block, self.mask_token]
        content = json.dumps([*options, self.tokenizer.chat_template])
        digest = hashlib.sha256(content.encode())
        for file in sorted(self.folder.glob("*token*")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Say where a text came from in what is wrong with it within the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}" if origin else str(error)) from error

"""The family ``server``: a teacher that another process serves, such as vLLM or SGLang."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from diffdistill.errors import UserError
from diffdistill.pipelines.completions import Completions, Protocol
from diffdistill.pipelines.prompts import bare_prompts
from diffdistill.pipelines.reaching import Reaching, is_address, model_at
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.rollouts import Sampling
from diffdistill.supports import TopK
from diffdistill.types import Condition, State

PROBE = "The quick brown fox: 12 + 30 = 42, isn't it?"


@dataclass(kw_only=True)
class Server(Reaching, TokenFamily):
    """A teacher behind an HTTP server, which tells its most likely tokens; ``path`` is its address.

    Tokens are sent, never texts, so that nothing is tokenized twice.

    Attributes:
        path: Where the server's API begins, such as http://localhost:8000/v1.
        model: Name of the model there; null is the only one.
        tokenizer_path: Folder or hub id with its tokenizer; null is the student's.
        protocol: What it understands: ``vllm`` (``prompt_logprobs``), ``sglang`` (its own
            ``/generate``), or ``openai`` (``echo`` with ``logprobs``).
        top_k: Most likely tokens to ask for; at least ``method.support_size``.
    """

    model: str | None = None
    tokenizer_path: str | None = None
    protocol: Protocol = "vllm"
    top_k: int = 20

    adapter_targets: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the address and the options.

        Raises:
            UserError: If one cannot be.
        """
        if self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}")
        self.check_patience()
        self.path = self.path.rstrip("/")
        if not is_address(self.path):
            raise UserError(
                "path must be the address of the server's API, such as http://localhost:8000/v1, "
                "without a key"
            )

    @property
    def folder(self) -> Path:
        """The local folder of the tokenizer."""
        if self.tokenizer_path is None:
            raise UserError("family server: set tokenizer_path, a folder with the tokenizer")
        return self._locate(self.tokenizer_path, self.revision)

    def reading_as(self, family: TokenFamily) -> "Server":
        """Return the family with the tokenizer of another, where it has none of its own."""
        if self.tokenizer_path is not None:
            return self
        return replace(
            self,
            tokenizer_path=family.path,
            revision=family.revision,
            trust_remote_code=family.trust_remote_code,
            chat_template=self.chat_template or family.chat_template,
        )

    def network(self, path: str | None = None) -> nn.Module:
        """Return a network without weights.

        Raises:
            UserError: If there is a ``path``.
        """
        if path is not None:
            raise UserError(f"a server has its own weights, not those of {path}: leave path out")
        return nn.Module()

    def check(self) -> None:
        """Ask the server about a short text, as training will.

        Raises:
            UserError: If it cannot be reached, has another model or another tokenizer, or does not
                give what is asked for.
        """
        tokens = self.tokenizer.encode(PROBE, add_special_tokens=False)
        read = self._completions.echoed(tokens)
        if not read.strip().startswith(self.tokenizer.decode(tokens).strip()):
            raise UserError(
                f"the server {self.path} reads other words in tokens than the tokenizer in "
                f"{self.tokenizer_path} writes: {self._completions.model} has another vocabulary"
            )
        self._completions.scored(tokens[:1], tokens[1:])

    def predict(  # type: ignore[override] # a server knows its most likely tokens alone
        self, network: nn.Module, state: State, condition: Condition
    ) -> TopK:
        """Return the teacher's most likely tokens ``[B, A, K]`` at each token of the answers.

        Those after the last token that counts are 0, and are not asked for.

        Args:
            network: Of ``network``.
            state: The answers.
            condition: Of ``prompts.prompt_condition``.
        """
        pairs = list(zip(bare_prompts(condition), _answers(state), strict=True))
        ask = self._completions.scored
        rows = self.asked(lambda pair: ask(*pair), pairs)
        ids = torch.zeros(*state.x.shape, self.top_k, dtype=torch.int64)
        logprobs, own = torch.zeros(ids.shape), torch.zeros(state.x.shape)
        for index, row in enumerate(rows):
            length = len(row.tokens)
            ids[index, :length] = torch.tensor(row.ids, dtype=torch.int64).view(-1, self.top_k)
            logprobs[index, :length] = torch.tensor(row.logprobs).view(-1, self.top_k)
            own[index, :length] = torch.tensor(row.tokens)
        return TopK(*(found.to(state.x.device) for found in (ids, logprobs, own)))

    def written(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, *, special: bool = False
    ) -> tuple[str, bool]:
        """Return what the server writes after a prompt: ``Completions.written``."""
        return self._completions.written(prompt, sampling, seed, special=special)

    @property
    def served(self) -> str:
        """Name of the model there.

        Raises:
            UserError: If the server cannot be reached, or has no such model.
        """
        return self._completions.model

    def token_id(self, text: str) -> int:
        """Return the id of the one token that is spelled so.

        Raises:
            UserError: If there is none, or more than one.
        """
        found = self._ids.get(text)
        if found is None:
            raise UserError(
                f"the server {self.path} names tokens by their text, and {text!r} is not that of "
                "one token: use protocol vllm or sglang"
            )
        return found

    @cached_property
    def _ids(self) -> dict[str, int | None]:
        """The id of each token by its text; None where two have the same."""
        ids: dict[str, int | None] = {}
        for token in range(self.words):
            text = self.tokenizer.decode([token])
            ids[text] = None if text in ids else token
        return ids

    @cached_property
    def _completions(self) -> Completions:
        server = self.reached(self.path)
        model = model_at(server, self.model)
        return Completions(
            server, model, self.protocol, self.top_k, self.words, named=self.token_id
        )


def _answers(state: State) -> list[list[int]]:
    """Return the tokens of each answer, up to the last that counts."""
    rows: list[list[int]] = state.x.tolist()
    if state.mask is None:
        return rows
    masks = state.mask.tolist()
    ends = [max((i + 1 for i, kept in enumerate(mask) if kept), default=0) for mask in masks]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]

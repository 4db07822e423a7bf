"""The family ``server``: a teacher that another process serves, such as vLLM or SGLang."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import torch
from torch import nn

from diffdistill.errors import UserError
from diffdistill.pipelines.completions import Completions, Protocol, Scored, served_models
from diffdistill.pipelines.json_server import JsonServer
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.rollouts import Sampling
from diffdistill.supports import TopK
from diffdistill.types import Condition, State

PROBE = "The quick brown fox: 12 + 30 = 42, isn't it?"


@dataclass(kw_only=True)
class Server(TokenFamily):
    """A teacher behind an HTTP server, which tells its most likely tokens; ``path`` is its address.

    Tokens are sent, never texts, so that nothing is tokenized twice.

    Attributes:
        path: Where the server's API begins, such as http://localhost:8000/v1.
        model: Name of the model there; null is the only one.
        tokenizer_path: Folder or hub id with its tokenizer; null is the student's.
        protocol: What it understands: ``vllm`` (``prompt_logprobs``), ``sglang`` (its own
            ``/generate``), or ``openai`` (``echo`` with ``logprobs``).
        top_k: Most likely tokens to ask for; at least ``method.support_size``.
        timeout: Seconds that it may be silent.
        retries: Further tries after a failure that may be over at the next one.
        backoff: Seconds before the first of them; each further wait is twice as long, up to 30.
        concurrency: Answers that it is asked about at the same time, by each process.
        api_key_variable: Name of the environment variable with its key; null sends none.
    """

    model: str | None = None
    tokenizer_path: str | None = None
    protocol: Protocol = "vllm"
    top_k: int = 20
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0
    concurrency: int = 8
    api_key_variable: str | None = None

    adapter_targets: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the address and the options.

        Raises:
            UserError: If one cannot be.
        """
        for name, fine, bounds in (
            ("top_k", self.top_k >= 1, "at least 1"),
            ("timeout", self.timeout > 0, "above 0"),
            ("retries", self.retries >= 0, "at least 0"),
            ("backoff", self.backoff >= 0, "at least 0"),
            ("concurrency", self.concurrency >= 1, "at least 1"),
        ):
            if not fine:
                raise UserError(f"{name} must be {bounds}, not {getattr(self, name)}")
        self.path = self.path.rstrip("/")
        if not _is_address(self.path):
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
        padded = zip(condition["prompt"].tolist(), condition["pads"].tolist(), strict=True)
        prompts = [tokens[pads:] for tokens, pads in padded]
        rows = self._scored(prompts, _answers(state))
        ids = torch.zeros(*state.x.shape, self.top_k, dtype=torch.int64)
        logprobs, own = torch.zeros(ids.shape), torch.zeros(state.x.shape)
        for index, row in enumerate(rows):
            length = len(row.tokens)
            ids[index, :length] = torch.tensor(row.ids, dtype=torch.int64).view(-1, self.top_k)
            logprobs[index, :length] = torch.tensor(row.logprobs).view(-1, self.top_k)
            own[index, :length] = torch.tensor(row.tokens)
        return TopK(*(found.to(state.x.device) for found in (ids, logprobs, own)))

    def written(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> tuple[str, bool]:
        """Return what the server writes after a prompt, and whether it ended it."""
        return self._completions.written(prompt, sampling, seed)

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
        server = JsonServer(self.path, self.timeout, self.retries, self.backoff, self._key())
        models = served_models(server)
        if self.model not in models and (self.model is not None or len(models) != 1):
            named = "model is not set" if self.model is None else f"there is no model {self.model}"
            raise UserError(
                f"the server {self.path}: {named}; it serves {', '.join(models) or 'none'}"
            )
        model = models[0] if self.model is None else self.model
        return Completions(
            server, model, self.protocol, self.top_k, self.words, named=self.token_id
        )

    def _key(self) -> str | None:
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            why = (
                "no key: it has characters that cannot be sent" if key else "not in the environment"
            )
            raise UserError(
                f"the server {self.path}: api_key_variable names {self.api_key_variable}, which is "
                f"{why}"
            )
        return key

    def _scored(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[Scored]:
        """Return what the server says of each answer, some at a time."""
        ask = self._completions.scored
        with ThreadPoolExecutor(self.concurrency) as pool:
            pairs = zip(prompts, answers, strict=True)
            asked = [pool.submit(ask, prompt, answer) for prompt, answer in pairs]
            try:
                return [question.result() for question in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _is_address(path: str) -> bool:
    """Return whether a path is a web address, and without a name or a key in it."""
    try:
        parts = urlsplit(path)
        _ = parts.port  # refuses what is no number
    except ValueError:
        return False
    known = parts.scheme in ("http", "https") and bool(parts.hostname)
    return known and not any((parts.username, parts.password, parts.query, parts.fragment))


def _answers(state: State) -> list[list[int]]:
    """Return the tokens of each answer, up to the last that counts."""
    rows: list[list[int]] = state.x.tolist()
    if state.mask is None:
        return rows
    masks = state.mask.tolist()
    ends = [max((i + 1 for i, kept in enumerate(mask) if kept), default=0) for mask in masks]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]

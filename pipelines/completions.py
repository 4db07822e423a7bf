"""What a completions server finds likely in a given text, in the protocols of such servers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from diffdistill.errors import UserError
from diffdistill.pipelines.json_server import JsonServer, Refused
from diffdistill.rollouts import Sampling

Protocol = Literal["vllm", "sglang", "openai"]

Judged: TypeAlias = tuple[Mapping[int, Any], Any]
"""The log-probabilities of some tokens at a place by id, and that of the token that is there."""

PLAIN: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling that changes no log-probability.

A server may have other defaults (vLLM takes those of the model's generation_config.json), and may
apply them to what it returns (vLLM's ``--logprobs-mode processed_logprobs``).
"""
ROUNDING = 1e-2


class Scored(NamedTuple):
    """What a server says of an answer of A tokens.

    Attributes:
        ids: The most likely tokens at each place, ``[A][K]``, the most likely first.
        logprobs: Their log-probabilities, ``[A][K]``.
        tokens: The log-probability of each token of the answer, ``[A]``.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    tokens: list[float]


def served_models(server: JsonServer) -> list[str]:
    """Return the names of a server's models.

    Raises:
        UserError: If it does not tell.
    """
    told = server.get("/models")
    try:
        return [str(model["id"]) for model in told["data"]]
    except (KeyError, TypeError):
        raise UserError(
            f"the server {server.url}/models gave no list of models: is its API at {server.url}?"
        ) from None


@dataclass(frozen=True)
class Completions:
    """A model behind a server.

    Attributes:
        server: Is asked.
        model: Its name there.
        protocol: ``vllm`` asks for ``prompt_logprobs``; ``sglang`` uses SGLang's own ``/generate``;
            ``openai`` asks for an echo with ``logprobs``.
        top_k: How many most likely tokens.
        words: One more than the largest id of a token.
        named: Returns the id of a token that ``openai`` names by its text.
    """

    server: JsonServer
    model: str
    protocol: Protocol
    top_k: int
    words: int
    named: Callable[[str], int]

    def echoed(self, tokens: Sequence[int]) -> str:
        """Return the text that begins with what the server reads in tokens.

        Raises:
            UserError: If it does not echo.
        """
        text = self._choice({"echo": True}, tokens).get("text")
        if not isinstance(text, str):
            raise self._otherwise("no text")
        return text

    def scored(self, prompt: Sequence[int], answer: Sequence[int]) -> Scored:
        """Return what the server finds likely at each token of an answer.

        Args:
            prompt: What comes before, at least one token.
            answer: May have no tokens, and is then not sent.

        Raises:
            UserError: If the server cannot, or gives something else.
        """
        assert prompt, "the first token of a text has no log-probability"
        if not answer:
            return Scored([], [], [])
        ask = {"vllm": self._vllm, "sglang": self._sglang, "openai": self._openai}[self.protocol]
        try:
            judged = ask([*prompt, *answer], len(answer))
        except Refused as error:
            if "logprob" in str(error).lower():
                raise UserError(f"{error}: {self._more()}") from None
            raise
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._otherwise(f"{type(error).__name__} in its answer") from None
        found = Scored([], [], [])
        for token, (row, logprob) in zip(answer, judged, strict=True):
            best = self._best(row, token)
            found.ids.append([token_id for token_id, _ in best])
            found.logprobs.append([value for _, value in best])
            found.tokens.append(self._checked(logprob))
        return found

    def continued(
        self, prompt: Sequence[int], asked: Mapping[str, Any]
    ) -> tuple[list[int], list[float]]:
        """Return the tokens that the server goes on with, and the log-probability of each.

        Args:
            prompt: At least one token.
            asked: How they are sampled, in the words of the protocol ``openai``.

        Raises:
            UserError: If the server cannot, or gives something else.
        """
        as_ids = {"logprobs": 1, "return_tokens_as_token_ids": True}
        try:
            told = self._choice({**asked, **as_ids}, prompt)["logprobs"]
            tokens = [self._id(name) for name in told["tokens"]]
            logprobs = [self._checked(value) for value in told["token_logprobs"]]
            pairs = list(zip(tokens, logprobs, strict=True))
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._otherwise(f"{type(error).__name__} in its answer") from None
        return [token for token, _ in pairs], [value for _, value in pairs]

    def written(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, *, special: bool = False
    ) -> tuple[str, bool]:
        """Return what the server writes after a prompt, and whether it ended it.

        Args:
            prompt: At least one token.
            sampling: How it is sampled.
            seed: Of the random numbers.
            special: Whether special tokens are part of the text; the token that ends it is not.

        Raises:
            UserError: If it does not say, or leaves special tokens out in any case.
        """
        if special and self.protocol == "openai":
            raise UserError(
                f"the server {self.server.url} leaves special tokens out of its texts: take "
                "protocol vllm or sglang, or markers in tessy.ends that are none"
            )
        body = {
            "model": self.model,
            "prompt": list(prompt),
            **PLAIN,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "seed": seed,
            **({"skip_special_tokens": False} if special else {}),
        }
        choice = self._first(self.server.post("/completions", body))
        text, reason = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise self._otherwise("no text, or no reason why it ends")
        return text, reason == "stop"

    # protocols

    def _vllm(self, tokens: Sequence[int], count: int) -> list[Judged]:
        choice = self._choice({"prompt_logprobs": self.top_k}, tokens)
        judged: list[Judged] = []
        rows = self._last(choice["prompt_logprobs"], count, len(tokens))
        for token, row in zip(tokens[-count:], rows, strict=True):
            found = {int(name): entry["logprob"] for name, entry in row.items()}
            if token not in found:
                raise self._otherwise("the log-probabilities of other tokens than it was sent")
            judged.append((found, found[token]))
        return judged

    def _sglang(self, tokens: Sequence[int], count: int) -> list[Judged]:
        body = {
            "input_ids": list(tokens),
            "sampling_params": {"max_new_tokens": 1, **PLAIN},
            "return_logprob": True,
            "logprob_start_len": len(tokens) - count - 1,
            "top_logprobs_num": self.top_k,
        }
        root = replace(self.server, url=self.server.url.removesuffix("/v1"))
        told = root.post("/generate", body)["meta_info"]
        own, rows = (
            self._last(told[f"input_{name}_logprobs"], count, count + 1)
            for name in ("token", "top")
        )
        found = ({entry[1]: entry[0] for entry in row} for row in rows)
        return [(row, entry[0]) for row, entry in zip(found, own, strict=True)]

    def _openai(self, tokens: Sequence[int], count: int) -> list[Judged]:
        asked = {"echo": True, "logprobs": self.top_k, "return_tokens_as_token_ids": True}
        told = self._choice(asked, tokens)["logprobs"]
        own, rows = (
            self._last(told[name][: len(tokens)], count, len(tokens))
            for name in ("token_logprobs", "top_logprobs")
        )
        found = ({self._id(name): value for name, value in row.items()} for row in rows)
        return list(zip(found, own, strict=True))

    def _choice(self, asked: Mapping[str, Any], tokens: Sequence[int]) -> Mapping[str, Any]:
        """Return the completion of tokens; one is written, as some servers refuse to write none."""
        body = {"model": self.model, "prompt": list(tokens), "max_tokens": 1, **PLAIN, **asked}
        return self._first(self.server.post("/completions", body))

    def _first(self, told: Any) -> Mapping[str, Any]:
        try:
            choice: Mapping[str, Any] = told["choices"][0]
        except (LookupError, TypeError):
            raise self._otherwise("no choices") from None
        return choice

    def _id(self, name: str) -> int:
        kind, colon, number = name.partition("token_id:")
        return int(number) if colon and not kind else self.named(name)

    # what may be wrong

    def _last(self, rows: Sequence[Any], count: int, length: int) -> Sequence[Any]:
        if len(rows) != length:
            raise self._otherwise(f"{len(rows)} places of a text of {length}")
        return rows[-count:]

    def _best(self, row: Mapping[int, Any], token: int) -> list[tuple[int, float]]:
        """Return the most likely tokens; where some are as likely, the answer's own last."""
        if len(row) < self.top_k:
            raise UserError(
                f"the server {self.server.url} gave {len(row)} log-probabilities at a token: "
                f"{self._more()}"
            )
        values = {token_id: self._checked(value) for token_id, value in row.items()}
        best = sorted(values.items(), key=lambda item: (-item[1], item[0] == token))[: self.top_k]
        if strange := [token_id for token_id in values if not 0 <= token_id < self.words]:
            raise UserError(
                f"the server {self.server.url} knows a token {strange[0]}, and the tokenizer has "
                f"{self.words}: {self.model} has another vocabulary"
            )
        if math.fsum(math.exp(value) for _, value in best) > 1 + ROUNDING:
            raise self._no_logprobs("probabilities that sum to more than 1")
        return best

    def _checked(self, value: Any) -> float:
        if not isinstance(value, int | float) or not math.isfinite(value) or value > ROUNDING:
            raise self._no_logprobs(f"{value} as a log-probability")
        return float(value)

    def _no_logprobs(self, what: str) -> UserError:
        return UserError(
            f"the server {self.server.url} gave {what}: see its log; vLLM has to be started with "
            "--logprobs-mode raw_logprobs, its default"
        )

    def _otherwise(self, what: str) -> UserError:
        return UserError(
            f"the server {self.server.url} gave {what}: it does not speak protocol "
            f"{self.protocol}; there are vllm, sglang and openai"
        )

    def _more(self) -> str:
        return (
            f"top_k is {self.top_k}, so start vLLM with --max-logprobs {self.top_k} or more, or "
            "lower top_k (and method.support_size)"
        )

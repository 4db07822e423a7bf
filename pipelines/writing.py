"""Models that go on with a text that another may have written: text in, text out.

Nothing but text is exchanged, so that the writers of a text may have different vocabularies. Each
reads all of it anew, in its own template and tokens.
"""

from abc import ABC, abstractmethod
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffdistill.doubles import doubled
from diffdistill.draws import Draws
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.prompts import prompt_condition
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.server import Server
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.projection import token_logprob
from diffdistill.rollouts import Sampling
from diffdistill.types import Example, State


class Format(NamedTuple):
    """How a model's answers are laid out.

    Attributes:
        opens: Comes before the thinking.
        closes: Comes between thinking and final answer.
        ends: Markers of the end of the thinking; those that are special tokens are kept in texts.
    """

    opens: str = ""
    closes: str = ""
    ends: tuple[str, ...] = ()


class Continuation(NamedTuple):
    """What a model wrote.

    Attributes:
        text: The text, without a character of which only a part was written.
        ended: Whether the model ended it; else it was cut at the given length.
    """

    text: str
    ended: bool


@dataclass(kw_only=True)
class Writer(ABC):
    """A model that writes parts of answers.

    Attributes:
        family: Its tokenizer and template.
        read: Puts the questions to it.
        format: How its answers are laid out.
        sampling: How it samples; the length is said each time.
        draws: Random numbers.
    """

    family: TokenFamily
    read: Questions
    format: Format
    sampling: Sampling
    draws: Draws
    _asked: dict[str, list[int]] = field(default_factory=dict)

    def prompt(self, example: Example, text: str, *, answer: str | None = None) -> list[int]:
        """Return the tokens of a question and of a thinking so far.

        Args:
            example: The question.
            text: What has been thought.
            answer: What there is of the final answer; None while there is more to think.

        Raises:
            UserError: If the question cannot be asked.
        """
        key = str(example.messages)
        if key not in self._asked:
            self._asked[key] = self.read.prompt(example)
        closed = "" if answer is None else self.format.closes + answer
        return self._asked[key] + self.tokens(self.format.opens + text + closed)

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text that is no whole answer."""
        found: list[int] = self.family.tokenizer.encode(text, add_special_tokens=False)
        return found

    def forget(self, example: Example) -> None:
        """Forget a question that was asked."""
        self._asked.pop(str(example.messages), None)

    @abstractmethod
    def go_on(
        self, prompts: Sequence[Sequence[int]], ids: Sequence[int], limits: Sequence[int]
    ) -> list[Continuation]:
        """Return what the model writes after each prompt.

        Args:
            prompts: Of ``prompt``.
            ids: A number for each, which with the seed says what is sampled.
            limits: How many tokens each may have.
        """

    @abstractmethod
    def mean_logprobs(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> list[float]:
        """Return how likely the tokens of texts are after prompts, a mean over each text."""


@dataclass(kw_only=True)
class LocalWriter(Writer):
    """A model of transformers, in this process.

    Attributes:
        family: The family ``causal-lm``.
        network: The model.
        path: Its weights, if not the family's own.
    """

    family: CausalLM
    network: nn.Module
    path: str | None = None

    def go_on(
        self, prompts: Sequence[Sequence[int]], ids: Sequence[int], limits: Sequence[int]
    ) -> list[Continuation]:
        """Return what the model writes after each prompt, whatever else is in the batch."""
        with torch.no_grad():
            found = self.family.sample(
                self.network,
                prompt_condition(prompts, self.family),
                torch.tensor(ids, device=self.family.device),
                replace(self.sampling, max_tokens=max(limits)),
                self.draws,
                purpose="write",
            )
        rows = zip(found.tokens, found.mask, found.ended.tolist(), limits, strict=True)
        return [
            Continuation(
                self.spelled(tokens[mask][:limit].tolist()), ended and int(mask.sum()) <= limit
            )
            for tokens, mask, ended, limit in rows
        ]

    @torch.no_grad()
    def mean_logprobs(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> list[float]:
        """Return how likely the tokens of texts are after prompts, a mean over each text."""
        state, told = _asked(prompts, texts, self.family)
        found = self.family.predict(self.network, state, told)
        return _means(token_logprob(found, state.x, mask=state.mask), state)

    def spelled(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, as it is after any text before it.

        A character that is not whole at the end is left out.
        """
        data = b"".join(self._pieces[token] for token in tokens)
        return getincrementaldecoder("utf-8")(errors="replace").decode(data)

    @cached_property
    def _pieces(self) -> list[bytes]:
        """What each token spells; of special tokens, nothing, but for markers."""
        speller = self.family.speller
        pieces = [piece or b"" for piece in speller.vocabulary()]
        for token, added in self.family.tokenizer.added_tokens_decoder.items():
            if added.content in self.format.ends:
                pieces[token] = added.content.encode()
            elif not added.special and not pieces[token]:
                pieces[token] = speller.added_text(token).encode()
        return pieces


@dataclass(kw_only=True)
class ServedWriter(Writer):
    """A model behind a server.

    Attributes:
        family: The family ``server``.
    """

    family: Server

    def go_on(
        self, prompts: Sequence[Sequence[int]], ids: Sequence[int], limits: Sequence[int]
    ) -> list[Continuation]:
        """Return what the server writes; whether a seed determines it is the server's affair."""
        samplings = (replace(self.sampling, max_tokens=limit) for limit in limits)
        seeds = (self.draws.integer("write", number, 2**31) for number in ids)
        questions = list(zip(prompts, samplings, seeds, strict=True))
        return self.family.asked(lambda question: self._written(*question), questions)

    def _written(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Continuation:
        markers, others = self._special
        text, ended = self.family.written(prompt, sampling, seed, special=bool(markers))
        for token in others if markers else ():
            text = text.replace(token, "")
        return Continuation(text, ended)

    @cached_property
    def _special(self) -> tuple[list[str], list[str]]:
        """The special tokens that are markers, and the others: servers leave out both or none."""
        added = self.family.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        ends = self.format.ends
        return [t for t in special if t in ends], [t for t in special if t not in ends]

    def mean_logprobs(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> list[float]:
        """Return how likely the tokens of texts are after prompts, a mean over each text."""
        state, told = _asked(prompts, texts, self.family)
        found = self.family.predict(nn.Module(), state, told).tokens
        assert found is not None, "a server says how likely the answer's tokens are"
        return _means(found, state)


def _asked(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], family: TokenFamily
) -> tuple[State, Any]:
    """Return where a model is asked about texts, and under which condition."""
    width = max(map(len, texts))
    rows = [[*text, *[family.pad_id] * (width - len(text))] for text in texts]
    tokens = torch.tensor(rows, device=family.device)
    lengths = torch.tensor([len(text) for text in texts], device=family.device)
    mask = torch.arange(width, device=family.device) < lengths[:, None]
    times = torch.zeros(len(texts), device=family.device)
    return State(tokens, times, mask), prompt_condition(prompts, family)


def _means(logprobs: Tensor, state: State) -> list[float]:
    """Return the mean over the tokens of each row."""
    assert state.mask is not None
    kept = doubled(logprobs.masked_fill(~state.mask, 0.0))
    means: list[float] = (kept.sum(1) / doubled(state.mask.sum(1).clamp(min=1))).tolist()
    return means

"""Questions, and networks of a few numbers that answer them token by token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.exposures import reveal
from diffdistill.projection import Projection, dense
from diffdistill.rollouts import Answers, Sampling
from diffdistill.texts import Reader
from diffdistill.types import Batch, Condition, Example, State
from tests.conftest import generator

WORDS, END, LENGTH = 6, 0, 5
SOLUTION = "first\nsecond\nthird\n\\boxed{4}"


class Network(nn.Module):
    """Predicts each token from the one before it and from what it is told."""

    def __init__(self, seed: int = 1, *, scale: float = 1.0, words: int = WORDS) -> None:
        super().__init__()
        rng = generator(seed)
        self.own, self.head = (
            nn.Parameter(scale * torch.randn(words, 4, generator=rng)) for _ in range(2)
        )
        self.start = nn.Parameter(scale * torch.randn(4, generator=rng))
        self.mix = nn.Parameter(scale * torch.randn(4, 4, generator=rng))
        self.calls: list[Condition] = []

    @property
    def network(self) -> "Network":
        return self

    @contextmanager
    def acting(self, device: torch.device) -> Iterator[None]:
        yield

    def forward(self, state: State, condition: Condition) -> Any:
        self.calls.append(condition)
        before = torch.cat([self.start.expand(len(state.x), 1, -1), self.own[state.x[:, :-1]]], 1)
        told = torch.tanh(condition["told"].to(self.mix.dtype) @ self.mix)
        return Projection(before + told[:, None], self.head)


@dataclass
class Questions:
    """Questions of four numbers; a solution is one more number that a teacher may be told."""

    rollouts: list[Answers] = field(default_factory=list)

    def repeated(self, batch: Batch, num_answers: int) -> Batch:
        ids = batch["ids"][:, None] * num_answers + torch.arange(num_answers)
        question = batch["question"].repeat_interleave(num_answers, 0)
        examples = [e for e in batch["examples"] for _ in range(num_answers)]
        return {**batch, "ids": ids.flatten(), "question": question, "examples": examples}

    @torch.no_grad()
    def rollout(
        self,
        actor: Any,
        batch: Batch,
        sampling: Sampling,
        draws: Draws,
        *,
        purpose: str,
        reader: Reader = "student",
    ) -> Answers:
        length = min(sampling.max_tokens, LENGTH)
        tokens = torch.zeros(len(batch["ids"]), length, dtype=torch.int64)
        logprobs = torch.zeros(tokens.shape, dtype=torch.float64)
        numbers = draws.uniform(purpose, batch["ids"], (length,))
        for place in range(length):
            told = self.condition(batch, reader=reader)
            logits = dense(actor(State(tokens, torch.zeros(len(tokens))), told))
            found = (logits[:, place] / sampling.temperature).double().log_softmax(-1)
            picked = (found.exp().cumsum(-1) < numbers[:, place, None]).sum(-1).clamp(max=WORDS - 1)
            tokens[:, place] = picked
            logprobs[:, place] = found.gather(1, picked[:, None])[:, 0]
        self.rollouts.append(answers_of(tokens, logprobs))
        return self.rollouts[-1]

    def given(self, batch: Batch) -> Answers:
        rows = [[int(c) for c in (e.answer or "")] + [END] for e in batch["examples"]]
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return answers_of(tokens, None)

    def state(self, answers: Answers) -> State:
        return State(answers.tokens, torch.zeros(len(answers.tokens)), answers.mask)

    def condition(
        self, batch: Batch, *, reader: Reader = "student", exposure: float | None = None
    ) -> Condition:
        told = batch["question"].clone()
        if exposure is not None:
            shown = [reveal(e.solution or "", exposure, e.answer) for e in batch["examples"]]
            told[:, -1] += torch.tensor([len(text) / 10 for text in shown])
        return {"told": told, "reader": reader, "exposure": exposure}

    def with_solutions(self, batch: Batch, solutions: Sequence[str | None]) -> Batch:
        pairs = zip(batch["examples"], solutions, strict=True)
        return {**batch, "examples": [e._replace(solution=s) for e, s in pairs]}

    def examples(self, batch: Batch) -> Sequence[Example]:
        found: Sequence[Example] = batch["examples"]
        return found

    def by_skill(self, batch: Batch) -> dict[str, Batch]:
        found: dict[str, Batch] = batch["skills"]
        return found

    def spelled(self, answers: Answers) -> list[str]:
        rows = zip(answers.tokens, answers.mask, strict=True)
        return ["".join(map(str, tokens[mask].tolist())) for tokens, mask in rows]


def answers_of(tokens: Tensor, logprobs: Tensor | None) -> Answers:
    """Return answers that end with their first end token."""
    ends = tokens == END
    mask = (ends.cumsum(1) - ends.long()) == 0
    kept = None if logprobs is None else logprobs.masked_fill(~mask, 0.0)
    return Answers(tokens, mask, kept, ends.any(1))


class FirstToken:
    """Rewards answers whose first token is the number of the question; any but "end" parses."""

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        pairs = zip(answers, examples, strict=True)
        return torch.tensor([float(a[:1] == (e.answer or "")[:1]) for a, e in pairs])

    def check(self, example: Example) -> None:
        pass

    def parsed(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        return torch.tensor([a[:1] != str(END) for a in answers])


def question_batch(size: int = 3, *, first_id: int = 0) -> dict[str, Any]:
    """Return questions, each the same whatever batch it is in."""
    numbers = range(first_id, first_id + size)
    question = [torch.randn(4, generator=generator(50 + n)) for n in numbers]
    examples = [
        Example(f"question {n}", solution=SOLUTION, answer=str(1 + n % (WORDS - 1)))
        for n in numbers
    ]
    return {
        "ids": torch.tensor(numbers),
        "question": torch.stack(question),
        "examples": examples,
        "prompts": [""] * size,
    }

"""Language models measured: each number against models whose score is known beforehand."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.evaluation.language import (
    answering,
    content_bytes,
    distance,
    fitting,
    hidden_likelihood,
    infilling,
    likelihood,
    make_gap,
)
from diffdistill.evaluation.likelihood import MonteCarlo
from diffdistill.pipelines.bd3lm import BD3LM
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.unmasking import Unmasking
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Role
from diffdistill.texts import Reader
from diffdistill.types import Condition, Example, State
from tests.text_run import chat, make_pair, save_world
from tests.tiny_text import CODE

TEXTS = [chat(CODE[0]), chat(CODE[1], "count"), Example("", text=CODE[2]), chat("yes", "no?")]
CHATS = [chat(text.strip(), f"question {number}") for number, text in enumerate(CODE)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def constant(family: LanguageFamily, logits: Tensor) -> Role:
    """Return a model that predicts the same everywhere."""

    class Constant(Role):
        def __call__(self, state: State, condition: Condition) -> Tensor:
            return logits.expand(*state.x.shape, -1)

    return Constant("student", RoleSettings(), family, nn.Linear(1, 1))


def uniform_model(family: LanguageFamily) -> Role:
    logits = torch.zeros(len(family.tokenizer))
    logits[family.mask_id] = -torch.inf
    return constant(family, logits)


def model_of_bytes(family: LanguageFamily) -> tuple[Role, float]:
    """A model under which every byte costs as many nats, whatever token it is in; and how many."""
    sizes = torch.tensor([len(s or b"") for s in family.speller.vocabulary()], dtype=torch.float64)
    low, high = 0.0, 50.0
    for _ in range(80):  # the rate at which probabilities sum to 1
        rate = (low + high) / 2
        total = (-rate * sizes[sizes > 0]).exp().sum()
        low, high = (rate, high) if total > 1 else (low, rate)
    logits = (-rate * sizes).masked_fill(sizes == 0, -torch.inf)
    return constant(family, logits.float()), rate


@pytest.mark.parametrize("cross", [False, True])
def test_the_bound_of_a_uniform_model_is_the_number_of_tokens(cross: bool, world: Path) -> None:
    family = make_pair(world).teacher if cross else make_pair(world).student
    pair = TextPair(family, family)
    how = MonteCarlo(num_draws=3, antithetic=False, seed=0, batch_size=3)
    found = likelihood(uniform_model(family), TEXTS, how)
    tokens = sum(sum(pair.rows(text)["student"].maskable) for text in TEXTS)
    size = len((CODE[0] + CODE[1] + CODE[2] + "yes").encode())
    assert found.num_bytes == size
    assert found.bits == pytest.approx(tokens * math.log2(len(family.tokenizer) - 1) / size)
    assert found.error == pytest.approx(0.0, abs=1e-6)


def test_bytes_of_a_chat_are_those_of_its_answers() -> None:
    assert content_bytes(chat("na\u00efve", "a question")) == 6
    assert content_bytes(Example("", text="na\u00efve")) == 6


@pytest.mark.parametrize("reader", ["student", "teacher"])
def test_a_model_that_pays_by_the_byte_costs_as_much_in_any_tokenizer(
    reader: Reader, world: Path
) -> None:
    pair = make_pair(world)
    model, rate = model_of_bytes(pair.student if reader == "student" else pair.teacher)
    found = hidden_likelihood(pair, model, TEXTS, Draws(1), reader=reader)
    assert found == pytest.approx(rate / math.log(2), rel=1e-5)


def test_texts_that_a_reader_cannot_read_as_a_whole_do_not_fit(world: Path) -> None:
    pair = make_pair(world)
    long = chat("x = 1\n" * 40)
    assert fitting([*TEXTS, long], [pair.student, pair.teacher]) == TEXTS


def test_the_distance_by_token_is_the_kl_of_the_predictions(world: Path) -> None:
    pair = make_pair(world, cross=False)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(len(pair.student.tokenizer), generator=generator) for _ in "ab")
    for logits in (ours, theirs):
        logits[pair.student.mask_id] = -torch.inf
    first, second = constant(pair.student, ours), constant(pair.student, theirs)
    found = distance(pair, first, second, TEXTS, Draws(0), by="token", batch_size=3)
    kept = torch.arange(len(ours)) != pair.student.mask_id
    expected = nn.functional.kl_div(
        ours[kept].log_softmax(0), theirs[kept].log_softmax(0), log_target=True, reduction="sum"
    )
    assert found == pytest.approx(expected.item(), rel=1e-4)
    same = distance(pair, first, first, TEXTS, Draws(0), by="token")
    assert same == pytest.approx(0.0, abs=1e-6)


def test_the_distance_by_chunk_is_none_between_models_that_pay_alike(world: Path) -> None:
    pair = make_pair(world)
    (ours, _), (theirs, other) = model_of_bytes(pair.student), model_of_bytes(pair.teacher)
    same = distance(pair, ours, theirs, TEXTS, Draws(0), by="chunk")
    sizes = torch.tensor([len(s or b"") for s in pair.student.speller.vocabulary()])
    logits = (-other * sizes).masked_fill(sizes == 0, -torch.inf).float()
    alike = constant(pair.student, logits)
    far = distance(pair, uniform_model(pair.student), theirs, TEXTS, Draws(0), by="chunk")
    near = distance(pair, alike, theirs, TEXTS, Draws(0), by="chunk")
    assert 0.0 <= same < 0.01
    assert 0.0 <= near < 0.01
    assert far > same


def spelled(family: LanguageFamily, tokens: Sequence[int]) -> bytes:
    table = family.speller.vocabulary()
    return b"".join(table[token] or b"" for token in tokens)


def test_a_gap_is_of_the_same_bytes_for_both_readers(world: Path) -> None:
    pair, size = make_pair(world), 5
    for number, example in enumerate(CHATS):
        assert example.messages is not None
        shared = set(range(1000))
        for family in (pair.student, pair.teacher):
            gap = make_gap(family, example, size, Draws(3), number)
            assert len(gap.hidden) == len(gap.answer)
            assert len(gap.answer) % family.block == 0
            places = [place for place, gone in enumerate(gap.hidden) if gone]
            first, last = places[0], places[-1]
            assert places == list(range(first, last + 1))
            assert len(spelled(family, gap.answer[first + 1 : last])) < size
            start, stop = (len(spelled(family, gap.answer[:n])) for n in (first, last + 1))
            shared &= set(range(start, stop))
        assert len(shared) >= size


class Knows:
    """A sampler that has the answers, and may get the last hidden token of one wrong."""

    def __init__(self, family: LanguageFamily, wrong: int | None = None) -> None:
        self.mask_id, self.wrong = family.mask_id, wrong
        self.asked = list[tuple[list[int], list[int]]]()
        self.known = {
            tuple(gap.prompt): gap
            for gap in (make_gap(family, e, 5, Draws(3), n) for n, e in enumerate(CHATS))
        }

    def sample(
        self, prompts: Sequence[Sequence[int]], draws: Draws, ids: Tensor, *, canvas: Tensor
    ) -> list[Tensor]:
        answers = []
        for number, prompt, row in zip(ids.tolist(), prompts, canvas, strict=True):
            gap = self.known[tuple(prompt)]
            assert ((row == self.mask_id) == torch.tensor(gap.hidden)).all()
            answer = torch.tensor(gap.answer)
            assert (answer == row)[row != self.mask_id].all()
            if number == self.wrong:
                answer[int(torch.tensor(gap.hidden).nonzero()[-1])] += 1
            answers.append(answer)
        return answers


def test_infilling_counts_spans_and_tokens_that_are_right(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = make_pair(world).student
    role = uniform_model(family)
    monkeypatch.setattr(BD3LM, "sampler", lambda self, network: Knows(family))
    right = infilling(role, CHATS, Draws(3), size=5, batch_size=2)
    assert right == (1.0, 1.0, len(CHATS))
    sampler = Knows(family, wrong=2)
    monkeypatch.setattr(BD3LM, "sampler", lambda self, network: sampler)
    found = infilling(role, CHATS, Draws(3), size=5, batch_size=2)
    hidden = sum(sum(gap.hidden) for gap in sampler.known.values())
    assert found == (1 - 1 / len(CHATS), pytest.approx(1 - 1 / hidden), len(CHATS))


def test_answers_are_accepted_and_ended_or_not(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = make_pair(world).student
    said = ["    return 1", "    return (", "    pass"]

    def sample(prompts: Sequence[Sequence[int]], draws: Draws, ids: Tensor) -> list[Tensor]:
        shown = [family.tokenizer.decode(prompt) for prompt in prompts]
        assert all(f"question {n}" in text for n, text in zip(ids.tolist(), shown, strict=True))
        assert all(text.endswith("assistant\n") for text in shown)
        ends = [[family.eos_id] if number != 2 else [] for number in ids.tolist()]
        return [
            torch.tensor([*family.tokenizer(said[number])["input_ids"], *end])
            for number, end in zip(ids.tolist(), ends, strict=True)
        ]

    def sampler(self: BD3LM, network: nn.Module, **options: Any) -> Any:
        assert options == {"unmasking": how, "max_tokens": 96}
        return SimpleNamespace(sample=sample)

    how = Unmasking(num_steps=3)
    monkeypatch.setattr(BD3LM, "sampler", sampler)
    found = answering(
        uniform_model(family),
        CHATS[:3],
        Draws(0),
        lambda question, answer: question.startswith("question") and "(" not in answer,
        unmasking=how,
        batch_size=2,
    )
    assert found[:2] == (2 / 3, 2 / 3)
    assert found.texts == said
    expected = sum(len(text.strip().encode()) for text in CODE[:3])
    assert found.length == sum(len(text) for text in said) / expected

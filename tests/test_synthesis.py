"""Algorithm 1 of TESSY with writers that say what they are told to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from diffdistill.boundaries import Author, word_cut
from diffdistill.draws import Draws
from diffdistill.pipelines.writing import Continuation, Format, Writer
from diffdistill.rollouts import Sampling
from diffdistill.synthesis.cooperation import Cooperation
from diffdistill.synthesis.drafts import PLANS, Draft, Plan, written
from diffdistill.tessy_settings import Mode, TessySettings
from diffdistill.types import Example

TARGET = "so 12 and then 34 hence 5 done </think>"
QUESTION = Example("q", messages=({"role": "user", "content": "q"},))
FORMAT = Format("<think>\n", "</think>\n\n", ("</think>",))


@dataclass(kw_only=True)
class Scribe(Writer):
    """Writes a target text, some characters at a time, and notes when; tokens are characters."""

    name: str
    says: Callable[[str], str] = lambda text: TARGET[len(text) :]
    answers: str = "five"
    log: list[tuple[str, str]] = field(default_factory=list)
    draws_seen: list[int] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def prompt(self, example: Example, text: str, *, answer: str | None = None) -> list[int]:
        self.asked.add(example.prompt)
        return self.tokens(text) + ([] if answer is None else [-1, *self.tokens(answer)])

    def tokens(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def forget(self, example: Example) -> None:
        self.asked.discard(example.prompt)

    def go_on(
        self, prompts: Sequence[Sequence[int]], ids: Sequence[int], limits: Sequence[int]
    ) -> list[Continuation]:
        self.draws_seen += ids
        self.limits += limits
        found = []
        for prompt, limit in zip(prompts, limits, strict=True):
            text, closed, answer = "".join(chr(t) if t >= 0 else "\0" for t in prompt).partition(
                "\0"
            )
            rest = self.answers[len(answer) :] if closed else self.says(text)
            self.log.append((self.name, rest[:limit]))
            found.append(Continuation(rest[:limit], len(rest) < limit))
        return found

    def mean_logprobs(self, prompts: Any, texts: Any) -> list[float]:
        return [-float(len(text)) for text in texts]


class Digits:
    """Cuts style before the first digit, and capability after the last of some."""

    def cuts(self, texts: Sequence[str], starts: Sequence[int], style: bool) -> list[int | None]:
        found: list[int | None] = []
        for text, start in zip(texts, starts, strict=True):
            places = (i for i in range(start + 1, len(text)) if text[i].isdigit() == style)
            found.append(next(places, None))
        return found


class Never:
    def cuts(self, texts: Sequence[str], starts: Sequence[int], style: bool) -> list[int | None]:
        return [None for _ in texts]


class Always:
    def cuts(self, texts: Sequence[str], starts: Sequence[int], style: bool) -> list[int | None]:
        pairs = zip(texts, starts, strict=True)
        return [start + 1 if len(text) > start + 1 else None for text, start in pairs]


def scribes(**options: Any) -> dict[Author, Scribe]:
    parts: Any = {"family": None, "read": None, "format": FORMAT}
    parts |= {"sampling": Sampling(1), "draws": Draws(0)}
    log: list[tuple[str, str]] = []
    names: tuple[Author, ...] = ("student", "teacher")
    return {n: Scribe(name=n, log=log, **parts, **options.get(n, {})) for n in names}


def run(
    writers: dict[Author, Scribe], predictor: Any, plan: Plan, count: int = 1, **options: Any
) -> list[Draft]:
    settings = TessySettings(
        **{"student_step": 6, "teacher_step": 6, "boundary": "exact", "retries": 0} | options
    )
    boundaries = dict.fromkeys(writers, predictor)
    drafts = (Draft(number, QUESTION, plan) for number in range(count))
    return list(Cooperation(writers, boundaries, settings).run(drafts))


TESSY = PLANS["tessy"][0]


def test_the_teacher_writes_the_numbers_and_the_student_the_rest() -> None:
    (draft,) = run(scribes(), Digits(), TESSY)
    parts = [(span.author, draft.text[span.start : span.end]) for span in draft.spans]
    assert parts == [
        ("student", "so "),
        ("teacher", "12"),
        ("student", " and then "),
        ("teacher", "34"),
        ("student", " hence "),
        ("teacher", "5"),
        ("student", " done "),
    ]
    assert draft.answer == "five"


def test_authors_change_exactly_where_a_text_was_cut() -> None:
    writers = scribes()
    (draft,) = run(writers, Digits(), TESSY)
    log, text = writers["student"].log, ""
    for (name, said), (following, _) in pairwise(log[:-1]):
        cut = Digits().cuts([text + said], [len(text)], name == "student")[0]
        kept = said if cut is None else said[: cut - len(text)]
        text += kept
        assert (following != name) == (kept != said)
    assert text.removesuffix("</thin") == draft.text
    assert log[0][0] == log[-1][0] == "student"


def test_nothing_is_cut_where_the_predictors_see_no_boundary() -> None:
    writers = scribes()
    (draft,) = run(writers, Never(), TESSY)
    assert {name for name, _ in writers["student"].log} == {"student"}
    assert draft.text == TARGET.removesuffix("</think>")


@pytest.mark.parametrize("boundary", ["exact", "discard", "extend"])
def test_there_is_progress_if_every_token_is_said_to_be_the_others(boundary: str) -> None:
    writers = scribes()
    (draft,) = run(writers, Always(), TESSY, boundary=boundary)
    assert draft.failure is None
    assert draft.text == TARGET.removesuffix("</think>")
    assert {span.author for span in draft.spans} == {"student", "teacher"}


@pytest.mark.parametrize("mode", PLANS)
def test_the_parts_together_are_all_of_the_answer_and_the_student_answers(mode: Mode) -> None:
    for plan in PLANS[mode]:
        (draft,) = run(scribes(), Digits(), plan)
        found = written(draft, "<think>\n", "</think>\n\n")
        assert found.content == f"<think>\n{TARGET}\n\nfive".replace("</think>\n", "</think>\n", 1)
        assert [span.start for span in found.spans] == [0, *(s.end for s in found.spans[:-1])]
        assert found.spans[-1].end == len(found.content)
        assert found.spans[-1].author == plan.answerer
        thinkers = {span.author for span in found.spans[1:-1]} - {"template"}
        assert thinkers == set(plan.thinkers)


def test_who_writes_what_is_as_the_modes_are_called() -> None:
    def plan(thinkers: str, answerer: Any) -> Plan:
        found: Any = tuple(thinkers.split())
        return Plan(found, answerer)

    assert PLANS["teacher-only"] == (plan("teacher", "teacher"),)
    assert PLANS["teacher-think"] == (plan("teacher", "student"),)
    assert PLANS["teacher-answer"] == (plan("student", "teacher"),)
    assert PLANS["student-only"] == PLANS["best-of-n"] == (plan("student", "student"),)
    assert PLANS["mix"] == PLANS["teacher-only"] + PLANS["student-only"]
    assert PLANS["tessy"] == (plan("student teacher", "student"),)
    assert PLANS["tessy-teacher-answer"] == (plan("student teacher", "teacher"),)


def test_a_marker_in_two_halves_by_two_authors_ends_the_thinking() -> None:
    class Once:
        def cuts(self, texts: Any, starts: Any, style: bool) -> list[int | None]:
            return [len("yes </th") if start == 0 else None for start in starts]

    def says(text: str) -> str:
        return "yes </think> more"[len(text) :]

    parties = scribes(student={"says": says}, teacher={"says": says})
    (draft,) = run(parties, Once(), TESSY, student_step=20, teacher_step=20)
    assert draft.text == "yes "
    assert [tuple(span) for span in draft.spans] == [("student", 0, 4)]


def test_a_boundary_before_the_marker_puts_the_marker_off() -> None:
    def says(text: str) -> str:
        return "so 1 </think>"[len(text) :]

    parties = scribes(student={"says": says}, teacher={"says": says})
    (draft,) = run(parties, Digits(), TESSY, student_step=20, teacher_step=20)
    assert [span.author for span in draft.spans] == ["student", "teacher", "student"]


def test_a_model_that_ends_ends_the_thinking_unless_it_was_cut() -> None:
    parties = scribes(student={"says": lambda text: "so 1"[len(text) :]},
                      teacher={"says": lambda text: "1"})  # fmt: skip
    (draft,) = run(parties, Digits(), TESSY, student_step=20, teacher_step=20)
    assert draft.text == "so 1"
    assert [span.author for span in draft.spans] == ["student", "teacher"]


def test_a_sample_that_repeats_itself_is_too_long_or_says_nothing_fails() -> None:
    loop = scribes(student={"says": lambda text: "wait a moment " * 50})
    assert run(loop, Never(), TESSY, student_step=42, check_every=3)[0].failure == (
        "the thinking repeats itself"
    )
    endless = scribes(student={"says": lambda text: str(len(text)) * 9})
    (draft,) = run(endless, Never(), TESSY, max_tokens=50)
    assert draft.failure == "the thinking is too long"
    silent = scribes(student={"says": lambda text: ""})
    silent["student"].go_on = lambda p, i, n: [Continuation("", False)]  # type: ignore[method-assign]
    assert run(silent, Never(), TESSY)[0].failure == "nothing was written"
    mute = scribes(student={"answers": " "})
    assert run(mute, Never(), TESSY)[0].failure == "there is no answer"
    halting = scribes()
    halting["student"].go_on = lambda p, i, n: [  # type: ignore[method-assign]
        Continuation("", -1 not in p[0])
    ]
    assert run(halting, Never(), TESSY)[0].failure == "nothing was written"
    chatty = scribes(student={"answers": "x" * 90})
    assert run(chatty, Never(), TESSY, max_tokens=60)[0].failure == "the answer is too long"


def test_a_sample_that_failed_is_tried_again_with_other_numbers_as_often_as_allowed() -> None:
    parties = scribes(student={"answers": ""})
    drafts = run(parties, Never(), TESSY, 3, retries=2, batch_size=2)
    assert [draft.attempt for draft in drafts] == [2, 2, 2]
    drawn = parties["student"].draws_seen
    assert len(set(drawn)) == len(drawn)
    assert len(drawn) == 3 * 3 * (-(-len(TARGET) // 6) + 1)


def test_a_sample_is_drawn_alike_whatever_is_written_beside_it() -> None:
    seen = []
    for size in (1, 4):
        parties = scribes()
        drafts = run(parties, Digits(), TESSY, 4, batch_size=size)
        assert sorted(draft.number for draft in drafts) == [0, 1, 2, 3]
        seen.append(sorted(parties["student"].draws_seen + parties["teacher"].draws_seen))
    assert seen[0] == seen[1]


def test_a_row_gets_its_own_room_whatever_is_in_its_batch() -> None:
    def drafts(texts: Sequence[str]) -> list[Draft]:
        rows = [Draft(n, QUESTION, TESSY, text=text) for n, text in enumerate(texts)]
        for row in rows:
            row.thinking = False
        return rows

    for answer, failure in (("x" * 29, None), ("x" * 30, "the answer is too long")):
        for others in ([], ["a", "b" * 39]):
            parties = scribes(student={"answers": answer})
            settings = TessySettings(max_tokens=40, retries=0, chunk=16)
            boundaries: Any = dict.fromkeys(parties, Never())
            rows = drafts(["c" * 10, *others])
            found = list(Cooperation(parties, boundaries, settings).run(iter(rows)))
            (own,) = (draft for draft in found if draft.number == 0)
            assert own.failure == failure
            assert own.answer == answer
            assert max(parties["student"].limits) <= 16
    assert {d.text[0]: d.failure for d in found}["b"] == "the answer is too long"


@pytest.mark.parametrize("mode", ["teacher-only", "teacher-think", "tessy"])
def test_an_author_who_goes_on_alone_is_asked_for_a_bounded_part_at_a_time(mode: Mode) -> None:
    found = []
    for chunk in (7, 2048):
        parties = scribes(student={"answers": "x" * 20}, teacher={"answers": "x" * 20})
        (draft,) = run(parties, Digits(), PLANS[mode][0], chunk=chunk)
        found.append((draft.text, draft.answer, draft.spans))
        limits = parties["student"].limits + parties["teacher"].limits
        assert max(limits) == chunk
    assert found[0] == found[1]


@pytest.mark.parametrize("boundary", ["discard", "extend"])
def test_authors_change_also_where_the_word_that_is_cut_is_the_last_of_the_text(
    boundary: str,
) -> None:
    class Within:
        """Sees a boundary in the middle of each word."""

        def cuts(self, texts: Any, starts: Any, style: bool) -> list[int | None]:
            pairs = zip(texts, starts, strict=True)
            return [start + 2 if text[start:].isalpha() else None for text, start in pairs]

    def says(text: str) -> str:
        return ["first", "second", "3...</think>"][text.count("first") + text.count("second")]

    parties = scribes(student={"says": says}, teacher={"says": says})
    (draft,) = run(parties, Within(), TESSY, boundary=boundary, student_step=20, teacher_step=20)
    assert [tuple(span) for span in draft.spans] == [
        ("student", 0, 5),
        ("teacher", 5, 11),
        ("student", 11, 15),
    ]


def test_questions_are_forgotten_once_their_sample_is_written() -> None:
    parties = scribes()
    questions = [Example(f"q{n}", messages=QUESTION.messages) for n in range(3)]
    drafts = (Draft(number, example, TESSY) for number, example in enumerate(questions))
    boundaries: Any = dict.fromkeys(parties, Digits())
    settings = TessySettings(batch_size=1, student_step=6, boundary="exact")
    for draft in Cooperation(parties, boundaries, settings).run(drafts):
        for writer in parties.values():
            assert not writer.asked, draft.number


def test_the_room_of_a_batch_is_filled_as_samples_are_done() -> None:
    widths: list[int] = []

    class Counting(Cooperation):
        def step(self, drafts: Sequence[Draft]) -> None:
            widths.append(len(drafts))
            super().step(drafts)

    def waiting() -> Iterator[Draft]:
        for number in range(5):
            yield Draft(number, QUESTION, TESSY)

    settings = TessySettings(batch_size=2, student_step=6, boundary="exact")
    list(Counting(scribes(), dict.fromkeys(("student", "teacher"), Never()), settings).run(waiting()))  # type: ignore[arg-type] # fmt: skip # noqa: E501
    assert set(widths[:-8]) == {2}


def test_discarding_gives_the_other_author_the_whole_word() -> None:
    text = "so x12 is"
    cut = Digits().cuts([text], [0], style=True)[0]
    assert cut == 4
    assert text[: word_cut(text, cut, "discard")] == "so"

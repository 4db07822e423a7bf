"""Does what a teacher is shown teach anything that holds without it?

A student that does not see the teacher's context can at best learn what the teachers of all
contexts agree on (Many Faces, arXiv:2605.11182, known to us second-hand). Two numbers say how much
that is: how far several contexts of one question are from agreeing, and what a solution of another
question does to the divergence. Both measures are ours, after the paper's theory.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffdistill.data.questions import question_key
from diffdistill.evaluation.means import Means
from diffdistill.evaluation.position_maps import consensus_gap, reverse_kl
from diffdistill.evaluation.subject import Subject
from diffdistill.projection import Prediction
from diffdistill.supports import TopK
from diffdistill.text.answering import Attempt
from diffdistill.types import Example

MOST_CONTEXTS = 4
"""Of one question: each is one more call of the teacher."""


class Contexts:
    """Asks the teacher again, shown something else.

    Attributes:
        others: Of each question, itself with the solution and answer of another; None where there
            is none that differs and fits into the prompt.
    """

    def __init__(self, subject: Subject, asked: Sequence[Example], means: Means) -> None:
        self.subject, self.asked, self.means = subject, asked, means
        self.shows = subject.teacher is not None and subject.exposure is not None
        self.others = shuffled(subject, asked) if self.shows else [None] * len(asked)
        self.solutions = solutions_of(asked) if self.shows else {}
        self.measured = {"shuffled": 0, "consensus": 0}

    def shuffled(self, attempt: Attempt, own: Tensor, start: int) -> None:
        """Compare the student with a teacher that is shown the solution of another question.

        Args:
            attempt: The student's answers.
            own: KL(student || teacher) under each question's own solution, ``[B, A]``.
            start: The number of the first question.
        """
        examples = self.subject.family.examples(attempt.batch)
        numbers = [start + row // self.subject.num_answers for row in range(len(examples))]
        others = [self.others[number] for number in numbers]
        present = torch.tensor([other is not None for other in others], device=own.device)
        if not present.any():
            return
        shown = [other or own for other, own in zip(others, examples, strict=True)]
        mask = attempt.answers.mask & present[:, None]
        theirs = self.subject.judgment(attempt, self.subject.shown(attempt, shown))
        found = self._reverse_kl(attempt, theirs, mask)
        self.means.add("context_kl", own[mask])
        self.means.add("shuffled_kl", found[mask])
        self.measured["shuffled"] += 1

    def consensus(
        self, attempt: Attempt, texts: Sequence[str], right: Sequence[bool] | None, start: int
    ) -> None:
        """Measure how far teachers under several contexts of one question are from agreeing.

        Contexts are the question's solutions, where several rows ask the same, and the student's
        own right answers, up to half of them; the other answers are measured.

        Args:
            attempt: The student's answers.
            texts: Their texts.
            right: Which are right, if that is known.
            start: The number of the first question.
        """
        if not (self.shows or self.subject.shows_siblings):
            return
        count = self.subject.num_answers
        for place in range(0, len(texts), count):
            group = range(place, place + count)
            answers = [texts[row] for row in group if right is not None and right[row]]
            example = self.asked[start + place // count]
            known = self.solutions.get(question_key(example), [])
            shown = dict.fromkeys([*known, *list(dict.fromkeys(answers))[: count // 2]])
            contexts = [
                text for text in shown if self.subject.fits(example._replace(solution=text))
            ]
            rows = [row for row in group if texts[row] not in contexts]
            if len(contexts) > 1 and rows:
                chosen = torch.tensor(rows, device=attempt.answers.mask.device)
                self._agreement(self.subject.rows(attempt, chosen), contexts[:MOST_CONTEXTS])

    def _agreement(self, attempt: Attempt, contexts: Sequence[str]) -> None:
        family, mask = self.subject.family, attempt.answers.mask
        found: list[Prediction] = []
        for text in contexts:
            batch = family.with_solutions(attempt.batch, [text] * len(mask))
            theirs = self.subject.judgment(attempt, batch)
            assert not isinstance(theirs, TopK), "the first judgment was whole"
            found.append(theirs)
            self.means.add("consensus_kl", self._reverse_kl(attempt, theirs, mask)[mask])
        gap = consensus_gap(found, mask, temperature=self.subject.method.temperature)
        self.means.add("consensus_gap", gap.expand(len(found), *gap.shape)[:, mask])
        self.measured["consensus"] += 1

    def _reverse_kl(self, attempt: Attempt, theirs: Prediction | TopK, mask: Tensor) -> Tensor:
        temperature = self.subject.method.temperature
        return reverse_kl(attempt.prediction, theirs, mask, temperature=temperature)

    def found(self) -> dict[str, float]:
        """Return what follows from the means: the share of the loss that no student can lose."""
        means = self.means.found()
        found = {"consensus_questions": float(self.measured["consensus"])}
        if means.get("consensus_kl", 0.0) > 0:
            found["irreducible_share"] = means["consensus_gap"] / means["consensus_kl"]
        return found if self.measured["consensus"] else {}

    def notes(self) -> list[str]:
        """Return why something was not measured."""
        if self.subject.teacher is None:
            return []
        if not self.shows and not self.subject.shows_siblings:
            return ["the teacher is shown no context: there is none to shuffle or to compare"]
        notes = []
        if self.shows and not self.measured["shuffled"]:
            notes.append("no two questions have solutions that can be exchanged")
        if not self.measured["consensus"]:
            notes.append(
                "no consensus gap: no question has two contexts, that is two solutions, or right "
                "answers of the student's (--num-answers asks for more), or the teacher is a server"
            )
        return notes


def shuffled(subject: Subject, asked: Sequence[Example]) -> list[Example | None]:
    """Return each question with the solution and answer of the next that has another solution."""
    found: list[Example | None] = []
    for number, example in enumerate(asked):
        following = [*asked[number + 1 :], *asked[:number]]
        swapped = (
            example._replace(solution=other.solution, answer=other.answer)
            for other in following
            if other.solution is not None and other.solution != example.solution
        )
        found.append(next((other for other in swapped if subject.fits(other)), None))
    return found


def solutions_of(asked: Sequence[Example]) -> Mapping[str, list[str]]:
    """Return the different solutions of each question, which several rows may ask."""
    found: dict[str, dict[str, None]] = {}
    for example in asked:
        if example.solution is not None:
            found.setdefault(question_key(example), {})[example.solution] = None
    return {question: list(solutions) for question, solutions in found.items()}

"""What happens at the tokens of a student's answers, before or after training.

The numbers are those that "The Many Faces of On-Policy Distillation" (arXiv:2605.11182, known to us
second-hand) and its code watch; docs/diagnose.md says what each points to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.evaluation.contexts import Contexts
from diffdistill.evaluation.means import Means
from diffdistill.evaluation.position_maps import reverse_kl, token_ranks
from diffdistill.evaluation.prefix_probe import prefix_probe
from diffdistill.evaluation.subject import Say, Subject
from diffdistill.projection import Prediction, TokenMap, token_maps, vocabulary
from diffdistill.repetition import repetition
from diffdistill.supports import TopK, truncated_divergence
from diffdistill.text.answering import Attempt
from diffdistill.text.comparing import Comparing
from diffdistill.text.sdpo import NOTHING, siblings
from diffdistill.types import Example

TOP = 20
"""Tokens of a support where the method has none of its own; K in Many Faces."""


class Diagnosis(NamedTuple):
    """What was measured.

    Attributes:
        measures: Numbers by name; what could not be measured is not there.
        notes: Why not.
    """

    measures: dict[str, float]
    notes: list[str]


def diagnose(subject: Subject, asked: Sequence[Example], say: Say) -> Diagnosis:
    """Return what is found at the student's answers to some questions; nothing is trained.

    Args:
        subject: Who is asked.
        asked: The questions.
        say: Is told how far it has come.
    """
    looking = _Looking(subject, asked)
    for start, examples in subject.batches(asked, say):
        looking.take(subject.attempt(examples, start), start)
    return looking.found(say)


def support_size(subject: Subject) -> int:
    """Return k of the support that is watched: the method's own, or else ``TOP``."""
    method = subject.method
    if isinstance(method, Comparing) and method.support != "full":
        return method.support_size
    return TOP


class _Looking:
    """Adds up what is found, batch by batch."""

    def __init__(self, subject: Subject, asked: Sequence[Example]) -> None:
        self.subject, self.asked = subject, asked
        self.means, self._top = Means(), TOP
        self.notes: dict[str, None] = {}
        self.ranks: list[Tensor] = []
        self.drafts: list[list[int]] = []
        self.contexts = Contexts(subject, asked, self.means)

    def take(self, attempt: Attempt, start: int) -> None:
        """Measure one batch of answers, the first of which is to question ``start``."""
        rewards, texts = self._about_answers(attempt)
        maps = {"entropy": self._entropy(attempt)}
        self._add(maps, attempt.answers.mask)
        if self.subject.teacher is None:
            self._note("no role is called teacher, so that there is nothing to compare with")
            return
        judged, taught = self._shown(attempt, rewards, texts)
        mask = attempt.answers.mask & taught[:, None]
        theirs = self.subject.judgment(judged)
        maps = self._compared(attempt, theirs, mask)
        self._add(maps, mask)
        self.ranks.append(token_ranks(theirs, attempt.answers.tokens, mask)[mask].cpu())
        self.contexts.shuffled(attempt, maps["reverse_kl"], start)
        if not isinstance(theirs, TopK):
            right = None if rewards is None else (rewards >= self.subject.right).tolist()
            self.contexts.consensus(attempt, texts, right, start)

    def found(self, say: Say) -> Diagnosis:
        """Return everything that was found."""
        measures = {"questions": float(len(self.asked))} | self.means.found()
        if self.ranks and len(ranks := torch.cat(self.ranks)):
            measures["rank"] = float(ranks.float().median())
            measures["outside_top"] = float((ranks > self._top).float().mean())
        measures |= self.contexts.found()
        probe, why = prefix_probe(self.subject, self.asked, self.drafts, say)
        notes = [*self.notes, *self.contexts.notes(), *([why] if why else [])]
        return Diagnosis(measures | probe, notes)

    def _about_answers(self, attempt: Attempt) -> tuple[Tensor | None, list[str]]:
        """Measure answers without a teacher; return their rewards and texts."""
        subject, answers = self.subject, attempt.answers
        texts = subject.family.spelled(answers)
        self.means.add("length", answers.mask.sum(1))
        self.means.add("ended", answers.ended)
        self.means.add("repetition", repetition(answers.tokens, answers.mask))
        kept = answers.mask.sum(1) - answers.ended.int()
        self.drafts += [
            answers.tokens[row, : int(kept[row])].tolist()
            for row in range(0, len(texts), subject.num_answers)
        ]
        if subject.reward is None:
            self._note("no reward: with one in the config (rewards: boxed), answers are verified")
            return None, texts
        examples = subject.family.examples(attempt.batch)
        rewards = subject.reward.score(texts, examples)
        self.means.add("reward", rewards)
        self.means.add("parse_rate", subject.reward.parsed(texts, examples))
        return rewards, texts

    def _entropy(self, attempt: Attempt) -> Tensor:
        mask, temperature = attempt.answers.mask, self.subject.method.temperature
        found = token_maps(
            attempt.prediction, None, ["entropy"], mask=mask, temperature=temperature
        )
        return found["entropy"]

    def _shown(
        self, attempt: Attempt, rewards: Tensor | None, texts: Sequence[str]
    ) -> tuple[Attempt, Tensor]:
        """Return the attempt with what the teacher is shown, and which rows are taught."""
        everyone = torch.ones_like(attempt.answers.ended)
        if not self.subject.shows_siblings:
            return attempt, everyone
        assert rewards is not None, "sdpo has a reward"
        found = siblings(texts, rewards >= self.subject.right, self.subject.num_answers)
        taught = torch.tensor([text is not None for text in found], device=everyone.device)
        self.means.add("taught", taught)
        if not taught.all():
            self._note("where no other answer was right, the teacher is not asked")
        shown = [text or NOTHING for text in found]
        batch = self.subject.family.with_solutions(attempt.batch, shown)
        return attempt._replace(batch=batch), taught

    def _compared(
        self, attempt: Attempt, theirs: Prediction | TopK, mask: Tensor
    ) -> dict[str, Tensor]:
        """Return maps ``[B, A]`` of student against teacher."""
        temperature = self.subject.method.temperature
        most = theirs.ids.shape[-1] if isinstance(theirs, TopK) else vocabulary(theirs)
        self._top = min(support_size(self.subject), most)
        maps = truncated_divergence(
            attempt.prediction,
            theirs,
            divergence="forward-kl",
            support="teacher",
            k=self._top,
            correction="tail",
            mask=mask,
            temperature=temperature,
        )
        tail = maps.pop("divergence")
        if isinstance(theirs, TopK):
            self._note("the teacher is a server: divergences are lower bounds, by its first tokens")
            reverse = reverse_kl(attempt.prediction, theirs, mask, temperature=temperature)
            return maps | {"forward_kl": tail, "reverse_kl": reverse}
        wanted: list[TokenMap] = ["teacher-entropy", "forward-kl", "reverse-kl"]
        found = token_maps(attempt.prediction, theirs, wanted, mask=mask, temperature=temperature)
        return maps | {name.replace("-", "_"): value for name, value in found.items()}

    def _add(self, maps: dict[str, Tensor], mask: Tensor) -> None:
        for name, value in maps.items():
            self.means.add(name, value[mask])

    def _note(self, text: str) -> None:
        self.notes[text] = None

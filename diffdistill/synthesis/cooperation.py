"""Algorithm 1 of TESSY (arXiv:2604.14164): style by the student, capability by the teacher.

An author writes some tokens. Its boundary predictor cuts them where the other kind is to come, and
then the other author goes on; where it cuts nothing, the same one does. When one of them ends the
thinking, the student writes the final answer. Where only one author thinks, nothing is cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from diffdistill.boundaries import Author, first_end, repeats, word_cut
from diffdistill.pipelines.boundary import Boundary
from diffdistill.pipelines.writing import Continuation, Writer
from diffdistill.synthesis.drafts import Draft
from diffdistill.tessy_settings import TessySettings

AUTHORS: tuple[Author, ...] = ("student", "teacher")


class Cut(NamedTuple):
    """What is kept of a new text.

    Attributes:
        place: How many of its characters.
        changes: Whether the other author is to go on, also where all is kept.
    """

    place: int
    changes: bool


@dataclass
class Cooperation:
    """Writes samples, many at a time.

    Attributes:
        writers: The models.
        boundaries: Their predictors; of no use where only one author thinks.
        settings: How they write.
    """

    writers: Mapping[Author, Writer]
    boundaries: Mapping[Author, Boundary]
    settings: TessySettings

    def run(self, waiting: Iterator[Draft]) -> Iterator[Draft]:
        """Yield drafts as they are done, a failed one only after its last try."""
        active: list[Draft] = []
        while True:
            active += islice(waiting, self.settings.batch_size - len(active))
            if not active:
                return
            self.step(active)
            going = []
            for draft in active:
                if not draft.done:
                    going.append(draft)
                elif draft.failure is not None and draft.attempt < self.settings.retries:
                    going.append(draft.again())
                else:
                    for writer in self.writers.values():
                        writer.forget(draft.example)
                    yield draft
            active = going

    def step(self, drafts: Sequence[Draft]) -> None:
        """Let each draft's next author write once, those of one author together."""
        thinking = {a: [d for d in drafts if d.thinking and d.turn == a] for a in AUTHORS}
        closed = [draft for draft in drafts if not draft.thinking]
        answering = {a: [d for d in closed if d.plan.answerer == a] for a in AUTHORS}
        for author in AUTHORS:
            if thinking[author]:
                self._think(author, thinking[author])
            if answering[author]:
                self._answer(author, answering[author])

    def _think(self, author: Author, drafts: Sequence[Draft]) -> None:
        settings, writer = self.settings, self.writers[author]
        prompts = [writer.prompt(draft.example, draft.text) for draft in drafts]
        length = settings.chunk
        if drafts[0].cooperative:
            length = settings.student_step if author == "student" else settings.teacher_step
        limits = [max(1, min(length, self._room(author, draft))) for draft in drafts]
        found = writer.go_on(prompts, [draft.draw for draft in drafts], limits)
        cuts = self._cuts(author, drafts, found)
        for draft, new, cut in zip(drafts, found, cuts, strict=True):
            self._accept(author, draft, new, cut)
            self._check(author, draft)

    def _room(self, author: Author, draft: Draft) -> int:
        """Return how many tokens an author may still write."""
        written = self.writers[author].tokens(draft.text + draft.answer)
        return self.settings.max_tokens - len(written)

    def _cuts(
        self, author: Author, drafts: Sequence[Draft], found: Sequence[Continuation]
    ) -> list[Cut]:
        """Return what is kept of each new text."""
        if not drafts[0].cooperative:
            return [Cut(len(new.text), changes=False) for new in found]
        starts = [len(draft.text) for draft in drafts]
        texts = [draft.text + new.text for draft, new in zip(drafts, found, strict=True)]
        places = self.boundaries[author].cuts(texts, starts, author == "student")
        return [
            Cut(len(new.text), changes=False)
            if place is None
            else Cut(word_cut(new.text, place - start, self.settings.boundary), changes=True)
            for new, place, start in zip(found, places, starts, strict=True)
        ]

    def _accept(self, author: Author, draft: Draft, new: Continuation, cut: Cut) -> None:
        before = len(draft.text)
        draft.write(author, new.text[: cut.place])
        draft.steps += 1
        end = first_end(draft.text, self.settings.ends, before)
        if end is not None:
            draft.end(end)
        elif cut.changes:
            draft.change()
        elif new.ended:
            draft.end(len(draft.text))
        elif not new.text:
            draft.failure = "nothing was written"

    def _check(self, author: Author, draft: Draft) -> None:
        """Let a draft fail that is too long or repeats itself."""
        settings = self.settings
        often = not draft.cooperative or draft.steps % settings.check_every == 0
        if self._room(author, draft) < 1:
            draft.failure = "the thinking is too long"
        elif often or not draft.thinking:
            again = repeats(
                draft.text,
                characters=settings.check_characters,
                words=settings.check_words,
                times=settings.check_times,
            )
            draft.failure = "the thinking repeats itself" if again else draft.failure

    def _answer(self, author: Author, drafts: Sequence[Draft]) -> None:
        """Let an author go on with final answers, each with the tokens that are left to it."""
        writer, rooms = self.writers[author], [self._room(author, draft) for draft in drafts]
        asked = [pair for pair in zip(drafts, rooms, strict=True) if pair[1] > 0]
        prompts = [writer.prompt(d.example, d.text, answer=d.answer) for d, _ in asked]
        limits = [min(self.settings.chunk, room) for _, room in asked]
        found = writer.go_on(prompts, [draft.draw for draft, _ in asked], limits) if asked else []
        for (draft, _), new in zip(asked, found, strict=True):
            draft.steps += 1
            draft.answer, draft.answered = draft.answer + new.text, new.ended
            if new.ended and not draft.answer.strip():
                draft.failure = "there is no answer"
            elif not new.ended and not new.text:
                draft.failure = "nothing was written"
        for draft, room in zip(drafts, rooms, strict=True):
            if room < 1:
                draft.failure = "the answer is too long"

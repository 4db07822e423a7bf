"""Algorithm 1 of TESSY (arXiv:2604.14164): style by the student, capability by the teacher.

An author writes some tokens. Its boundary predictor cuts them where the other kind is to come, and
then the other author goes on; where it cuts nothing, the same one does. When one of them ends the
thinking, the student writes the final answer. Where only one author thinks, nothing is cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from diffdistill.boundaries import Author, first_end, repeats, word_cut
from diffdistill.pipelines.boundary import Boundary
from diffdistill.pipelines.writing import Continuation, Writer
from diffdistill.synthesis.drafts import Draft
from diffdistill.tessy_settings import TessySettings

AUTHORS: tuple[Author, ...] = ("student", "teacher")


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
        length = settings.max_tokens
        if drafts[0].cooperative:
            length = settings.student_step if author == "student" else settings.teacher_step
        found = writer.go_on(prompts, [draft.draw for draft in drafts], length)
        places = self._places(author, drafts, found)
        for draft, new, place in zip(drafts, found, places, strict=True):
            self._accept(author, draft, new, place)
            self._check(author, draft)

    def _places(
        self, author: Author, drafts: Sequence[Draft], found: Sequence[Continuation]
    ) -> list[int]:
        """Return how many characters of each new text are kept."""
        if not drafts[0].cooperative:
            return [len(new.text) for new in found]
        starts = [len(draft.text) for draft in drafts]
        texts = [draft.text + new.text for draft, new in zip(drafts, found, strict=True)]
        cuts = self.boundaries[author].cuts(texts, starts, author == "student")
        return [
            len(new.text)
            if cut is None
            else word_cut(new.text, cut - start, self.settings.boundary)
            for new, cut, start in zip(found, cuts, starts, strict=True)
        ]

    def _accept(self, author: Author, draft: Draft, new: Continuation, place: int) -> None:
        before, truncated = len(draft.text), place < len(new.text)
        draft.write(author, new.text[:place])
        draft.steps += 1
        end = first_end(draft.text, self.settings.ends, before)
        if end is not None:
            draft.end(end)
        elif truncated:
            draft.change()
        elif new.ended:
            draft.end(len(draft.text))
        elif not new.text:
            draft.failure = "nothing was written"

    def _check(self, author: Author, draft: Draft) -> None:
        """Let a draft fail that is too long or repeats itself."""
        settings = self.settings
        if len(self.writers[author].tokens(draft.text)) >= settings.max_tokens:
            draft.failure = "the thinking is too long"
        elif draft.steps % settings.check_every == 0 or not draft.thinking:
            again = repeats(
                draft.text,
                characters=settings.check_characters,
                words=settings.check_words,
                times=settings.check_times,
            )
            draft.failure = "the thinking repeats itself" if again else draft.failure

    def _answer(self, author: Author, drafts: Sequence[Draft]) -> None:
        """Let an author write final answers with the tokens that are left."""
        writer = self.writers[author]
        prompts = [writer.prompt(draft.example, draft.text, closed=True) for draft in drafts]
        left = [self.settings.max_tokens - len(writer.tokens(draft.text)) for draft in drafts]
        found = writer.go_on(prompts, [draft.draw for draft in drafts], max(1, *left))
        for draft, new, room in zip(drafts, found, left, strict=True):
            draft.steps += 1
            draft.answer = new.text
            if not new.ended or len(writer.tokens(new.text)) > room:
                draft.failure = "the answer is too long"
            elif not new.text.strip():
                draft.failure = "there is no answer"

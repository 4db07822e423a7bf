"""The samples of a config: which are to be written, and what is kept of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.pipelines.writing import Writer
from diffdistill.synthesis.building import Workshop
from diffdistill.synthesis.dependence import COLUMNS, revisions
from diffdistill.synthesis.drafts import PLANS, Draft, Plan, Written, span_rows, written
from diffdistill.synthesis.storing import Store
from diffdistill.types import Example

OWN = ("number", "mode", "tries", "steps", "tokens", "spans", "revisions")
"""The columns of what is known of a sample."""


def check_columns(data: DataSettings) -> None:
    """Check that the columns of ``data`` can be written.

    Raises:
        UserError: If one is what ``tessy write`` calls a column of its own.
    """
    for name in COLUMNS:
        if getattr(data, name) in OWN:
            raise UserError(
                f"data.{name} {getattr(data, name)!r} is what tessy write calls a column of its "
                "own: give it another name"
            )


def write_samples(
    workshop: Workshop, questions: Sequence[Example], store: Store, say: Callable[[int], None]
) -> None:
    """Write all samples that a store does not have.

    Args:
        workshop: What writes.
        questions: Of ``workshop.questions``.
        store: Where they go.
        say: Told how many are settled.
    """
    known, count = revisions(workshop, workshop.authors), candidates_of(workshop)
    waiting = _waiting(workshop, questions, store, count)
    groups: dict[int, list[Draft]] = {}
    for draft in workshop.cooperation().run(waiting):
        number = draft.number // count
        group = groups.setdefault(number, [])
        group.append(draft)
        if len(group) == count:
            _settle(workshop, store, number, groups.pop(number), known)
            say(len(store.rows) + len(store.failed))
    store.finish()


def candidates_of(workshop: Workshop) -> int:
    """Return how many drafts are written of each sample."""
    settings = workshop.settings
    return settings.num_candidates if settings.mode == "best-of-n" else 1


def _waiting(
    workshop: Workshop, questions: Sequence[Example], store: Store, count: int
) -> Iterator[Draft]:
    settings = workshop.settings
    plans: Sequence[Plan] = PLANS[settings.mode]
    for place, example in enumerate(questions):
        for number in range(place * settings.num_samples, (place + 1) * settings.num_samples):
            if not store.settled(number, settings.retries):
                plan, tries = plans[number % len(plans)], store.tries(number)
                for candidate in range(number * count, (number + 1) * count):
                    yield Draft(candidate, example, plan, attempt=tries)


def _settle(
    workshop: Workshop,
    store: Store,
    number: int,
    drafts: Sequence[Draft],
    revisions: Mapping[str, str],
) -> None:
    """Keep the best of a sample's drafts, or that all failed."""
    fine = sorted((d for d in drafts if d.failure is None), key=lambda draft: draft.number)
    if not fine:
        why = drafts[0].failure
        assert why is not None, "a failed draft says why"
        store.fail(number, why, drafts[0].attempt + 1)
        return
    chosen = fine[0] if len(fine) == 1 else best(fine, workshop.writers["teacher"])
    store.add(row_of(number, chosen, workshop, revisions))


def best(drafts: Sequence[Draft], judge: Writer) -> Draft:
    """Return the draft that a model finds most likely, by the mean over its tokens.

    How the paper's teacher chooses is unconfirmed, and this is ours.
    """
    prompts = [judge.prompt(draft.example, "") for draft in drafts]
    texts = [judge.tokens(d.text + judge.format.closes) + judge.tokens(d.answer) for d in drafts]
    scores = judge.mean_logprobs(prompts, texts)
    judge.forget(drafts[0].example)
    return max(zip(scores, drafts, strict=True), key=lambda pair: pair[0])[1]


def row_of(
    number: int, draft: Draft, workshop: Workshop, revisions: Mapping[str, str]
) -> dict[str, Any]:
    """Return a sample as a chat, with its authors and what else is known of it.

    It has the columns that ``data`` names, as training reads it. Tokens are counted in the
    student's vocabulary.
    """
    student = workshop.writers["student"]
    found = written(draft, student.format.opens, student.format.closes)
    example: Example = draft.example
    assert example.messages is not None, "a question is a chat"
    data = workshop.config.data
    solution = {} if data.solution_column is None else {data.solution_column: found.content}
    answer = {} if example.answer is None else {data.answer_column or "answer": example.answer}
    return {
        data.messages_column: [*example.messages, {"role": "assistant", "content": found.content}],
        **solution,
        **answer,
        "number": number,
        "mode": workshop.settings.mode,
        "tries": draft.attempt + 1,
        "steps": draft.steps,
        "tokens": _tokens(found, student),
        "spans": span_rows(found.spans),
        "revisions": {author: revisions[author] for author in sorted(_authors(found))},
    }


def _authors(found: Written) -> set[str]:
    return {span.author for span in found.spans if span.author != "template"}


def _tokens(found: Written, student: Writer) -> dict[str, int]:
    counts = {"total": len(student.tokens(found.content)), "student": 0, "teacher": 0}
    for author, start, end in found.spans:
        if author in counts:
            counts[author] += len(student.tokens(found.content[start:end]))
    return counts

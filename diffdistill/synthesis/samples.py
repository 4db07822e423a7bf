"""The samples of a config: which are to be written, and what is kept of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from diffdistill.pipelines.writing import Writer
from diffdistill.synthesis.building import Workshop
from diffdistill.synthesis.drafts import PLANS, Draft, Plan, Written, span_rows, written
from diffdistill.synthesis.storing import Store
from diffdistill.types import Example

UNIMPORTANT = ("batch_size", "predictors", "fit", "retries")
"""Settings that a sample does not depend on, or that are looked at otherwise."""


def write_samples(workshop: Workshop, store: Store, say: Callable[[int], None]) -> None:
    """Write all samples that a store does not have.

    Args:
        workshop: What writes.
        store: Where they go.
        say: Told how many are settled.
    """
    revisions = workshop.revisions()
    count = candidates_of(workshop)
    waiting = _waiting(workshop, store, count)
    groups: dict[int, list[Draft]] = {}
    for draft in workshop.cooperation().run(waiting):
        number = draft.number // count
        group = groups.setdefault(number, [])
        group.append(draft)
        if len(group) == count:
            _settle(workshop, store, number, groups.pop(number), revisions)
            say(len(store.rows) + len(store.failed))
    store.finish()


def about(workshop: Workshop) -> dict[str, Any]:
    """Return what the samples depend on besides their questions, as JSON values."""
    settings, data = workshop.settings, workshop.config.data
    kept = {key: value for key, value in asdict(settings).items() if key not in UNIMPORTANT}
    asked = ("student_prompt", "student_thinking", "teacher_thinking", "source", "max_examples")
    kept |= {key: getattr(data, key) for key in asked}
    return kept | {"family": workshop.config.family, "revisions": workshop.revisions()}


def candidates_of(workshop: Workshop) -> int:
    """Return how many drafts are written of each sample."""
    settings = workshop.settings
    return settings.num_candidates if settings.mode == "best-of-n" else 1


def _waiting(workshop: Workshop, store: Store, count: int) -> Iterator[Draft]:
    settings = workshop.settings
    plans: Sequence[Plan] = PLANS[settings.mode]
    for place, example in enumerate(workshop.questions()):
        for number in range(place * settings.num_samples, (place + 1) * settings.num_samples):
            if not store.has(number):
                plan = plans[number % len(plans)]
                for candidate in range(count):
                    yield Draft(number * count + candidate, example, plan)


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
        store.fail(number, why)
        return
    chosen = fine[0] if len(fine) == 1 else best(fine, workshop.writers["teacher"])
    store.add(row_of(number, chosen, workshop, revisions))


def best(drafts: Sequence[Draft], judge: Writer) -> Draft:
    """Return the draft that a model finds most likely, by the mean over its tokens.

    The paper's teacher gives scores in words; how it is asked is unconfirmed, and this is ours.
    """
    prompts = [judge.prompt(draft.example, "") for draft in drafts]
    texts = [judge.tokens(d.text, closed=True) + judge.tokens(d.answer or "") for d in drafts]
    scores = judge.mean_logprobs(prompts, texts)
    return max(zip(scores, drafts, strict=True), key=lambda pair: pair[0])[1]


def row_of(
    number: int, draft: Draft, workshop: Workshop, revisions: Mapping[str, str]
) -> dict[str, Any]:
    """Return a sample as a chat, with its authors and what else is known of it.

    Tokens are counted in the student's vocabulary.
    """
    student = workshop.writers["student"]
    found = written(draft, student.format.opens, student.format.closes)
    example: Example = draft.example
    assert example.messages is not None, "a question is a chat"
    answer = {} if example.answer is None else {"answer": example.answer}
    return {
        "messages": [*example.messages, {"role": "assistant", "content": found.content}],
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

"""Does a teacher that goes on with the student's answers still find the right ones?

The probe of appendix A.22 of Many Faces (arXiv:2605.11182, known to us second-hand): the teacher
answers alone, and goes on with student answers that were cut at a random place. There Qwen3-14B
fell from 62% to 46% on GPQA-Diamond when it went on with Qwen3-1.7B.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.evaluation.subject import Say, Subject
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.prompts import prompt_condition
from diffdistill.rollouts import Sampling
from diffdistill.types import Example


class Graded(NamedTuple):
    """Which answers are right, and which keep to the format; bool ``[N]``."""

    right: Tensor
    parses: Tensor


def prefix_probe(
    subject: Subject, asked: Sequence[Example], drafts: Sequence[Sequence[int]], say: Say
) -> tuple[dict[str, float], str]:
    """Return how the teacher does alone and after the student's words, or why that is not known.

    It takes its most likely tokens, sees what it sees in training, and has ``max_tokens`` for
    both parts together.

    Args:
        subject: Who is asked.
        asked: The questions.
        drafts: An answer of the student's to each, without an end token.
        say: Is told how far it has come.
    """
    if subject.teacher is None or subject.reward is None:
        return {}, "no prefix probe: it needs a teacher, and a reward in the config"
    if not isinstance(subject.teacher.family, CausalLM):
        return {}, "no prefix probe: the teacher judges answers alone, and cannot write"
    if any(example.pictures for example in asked):
        return {}, "no prefix probe: it goes on with texts, and these questions have pictures"
    prefixes = cut(drafts, subject.draws)
    alone = _graded(subject, asked, [[]] * len(asked), say)
    prefixed = _graded(subject, asked, prefixes, say)
    return compared(alone, prefixed), ""


def cut(drafts: Sequence[Sequence[int]], draws: Draws) -> list[list[int]]:
    """Return each answer up to a place that is uniform among its tokens."""
    shares = draws.uniform("cut", torch.arange(len(drafts))).tolist()
    pairs = zip(drafts, shares, strict=True)
    return [list(draft[: int(share * len(draft))]) for draft, share in pairs]


def compared(alone: Graded, prefixed: Graded) -> dict[str, float]:
    """Return shares of answers, and counts of those that turned."""
    return {
        "alone_right": float(alone.right.float().mean()),
        "prefixed_right": float(prefixed.right.float().mean()),
        "alone_parses": float(alone.parses.float().mean()),
        "prefixed_parses": float(prefixed.parses.float().mean()),
        "right_to_wrong": float((alone.right & ~prefixed.right).sum()),
        "wrong_to_right": float((~alone.right & prefixed.right).sum()),
    }


def _graded(
    subject: Subject, asked: Sequence[Example], prefixes: Sequence[Sequence[int]], say: Say
) -> Graded:
    assert subject.reward is not None
    found = []
    for start, examples in subject.batches(asked, say):
        texts = written(subject, examples, prefixes[start : start + len(examples)], start)
        right = subject.reward.score(texts, examples) >= subject.right
        found.append((right.cpu(), subject.reward.parsed(texts, examples).cpu()))
    return Graded(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def written(
    subject: Subject, asked: Sequence[Example], prefixes: Sequence[Sequence[int]], start: int
) -> list[str]:
    """Return the teacher's answers, each of which begins with a prefix.

    Args:
        subject: Who is asked.
        asked: The questions.
        prefixes: Token ids that each answer begins with.
        start: The number of the first question.
    """
    role = subject.teacher
    assert role is not None
    assert isinstance(role.family, CausalLM)
    pairs = list(zip(asked, prefixes, strict=True))
    prompts = [
        [*subject.family.prompt(example, reader="teacher", exposure=subject.exposure), *prefix]
        for example, prefix in pairs
    ]
    ids = torch.arange(start, start + len(asked), device=role.family.device)
    limit = subject.method.max_tokens
    sampling = Sampling(limit, temperature=0.0)
    told = prompt_condition(prompts, role.family)
    with role.acting(role.family.device):
        found = role.family.sample(
            role.network, told, ids, sampling, subject.draws, purpose="prefix"
        )
    rows = zip(prefixes, found.tokens, found.mask, strict=True)
    return [
        subject.family.student.decoded([*prefix, *tokens[mask].tolist()][:limit])
        for prefix, tokens, mask in rows
    ]

"""What a pipeline says of a stage, and the gates before and after it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import NonNegativeInt, PositiveInt


@dataclass(kw_only=True)
class StageSettings:
    """One run of a pipeline.

    Attributes:
        config: What is run: a file, or a bundled name. None has ``change`` say everything.
        change: Sections of a config, merged into that one. ``stage:NAME`` is the model that
            another stage has trained.
        least_gain: Gate C1, after the stage: by how much the share of right answers must have
            risen. None does not ask.
        most_kl: Gate C2, before the stage: the most nats of KL(student || teacher) for each token
            of the student's answers. None does not ask.
        least_overlap: Gate C2: the least share of the teacher's most likely tokens that are among
            the student's. None does not ask.
    """

    config: str | None = None
    change: dict[str, Any] = field(default_factory=dict)
    least_gain: float | None = None
    most_kl: float | None = None
    least_overlap: float | None = None


@dataclass(kw_only=True)
class MeasureSettings:
    """How gates and models are measured.

    Attributes:
        path: Questions with answers that no stage learns from. None takes those of the stage.
        skills: Instead of ``path``, those of several skills by name, one of each after the other.
        num_questions: How many, the first.
        num_answers: Answers to each, sampled at temperature 1, whose mean reward is the score.
        seed: Seed of the answers.
        top_k: Most likely tokens of both sides whose overlap gate C2 asks for.
    """

    path: str | None = None
    skills: dict[str, str] | None = None
    num_questions: PositiveInt = 64
    num_answers: PositiveInt = 4
    seed: NonNegativeInt = 0
    top_k: PositiveInt = 20


@dataclass(frozen=True)
class Gate:
    """A condition of a stage.

    Attributes:
        name: C1 or C2, as the paper calls them (Sparse-to-Dense, arXiv:2605.12483).
        what: What is asked.
        value: What was measured; None before it is.
        holds: Whether it holds; None before it is measured.
    """

    name: str
    what: str
    value: float | None = None
    holds: bool | None = None

    def told(self) -> str:
        """Return it as text."""
        if self.value is None:
            return f"{self.name} not measured: {self.what}"
        verdict = "holds" if self.holds else "fails"
        return f"{self.name} {verdict}: {self.what} ({self.value:.4g})"


def gates(settings: StageSettings, found: Mapping[str, Any] | None = None) -> list[Gate]:
    """Return the gates of a stage.

    C1 asks whether a model that is to teach is shaped by its reward, C2 whether it is close enough
    to its student. The paper's bounds are unknown to us.

    Args:
        settings: The stage.
        found: What was measured: ``score`` (before and after the stage) and ``closeness``.
    """
    found = found or {}
    score, close = found.get("score", {}), found.get("closeness", {})
    gain = score["after"] - score["before"] if "before" in score else None
    asked = (
        ("C1", "gain", settings.least_gain, gain, 1),
        ("C2", "KL", settings.most_kl, close.get("reverse_kl"), -1),
        ("C2", "overlap", settings.least_overlap, close.get("overlap"), 1),
    )
    return [
        Gate(
            name,
            f"{what} {'>=' if sign > 0 else '<='} {bound:g}",
            value,
            None if value is None else sign * value >= sign * bound,
        )
        for name, what, bound, value, sign in asked
        if bound is not None
    ]

"""What methods share that learn some tokens of an answer and not others."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.projection import Prediction, TokenMap, token_maps
from diffdistill.selection import Rule, Scope, select_tokens, token_scores
from diffdistill.supports import TopK
from diffdistill.text.answering import Answering, Attempt
from diffdistill.types import Batch, Progress


@dataclass(kw_only=True)
class Selecting(Answering):
    """Chooses tokens by what student and teacher make of them (TIP, arXiv:2604.14084).

    Attributes:
        teacher: Judges each token of the answers.
        select: Which tokens are learned: ``none`` of the rules is all; by ``entropy`` of the
            student; by ``divergence``, KL(student || teacher); by either (``soft-or``, TIP's); or
            by ``q3``, where the student is sure and wrong.
        retention: Share of each answer's tokens to learn; at least one.
        select_scope: Over what the scores are normalized: each ``rollout``; the ``micro-batch``;
            or, ``global``, the optimizer step (the paper says batch), which asks student and
            teacher twice where a step has several micro-batches.
        select_sampled: Draw tokens in proportion to their scores instead of taking the highest
            (TIP's entropy sampling); with ``none``, each with the same chance.
        entropy_quantile: Entropies above this quantile are cut down to it before they are
            normalized (paper); null cuts none.
        divergence_quantile: The same of divergences. The paper cuts none, so that one outlier
            flattens all others.
    """

    roles: ClassVar = {"student": {"weights": "trained"}, "teacher": {"weights": "frozen"}}

    teacher: Any
    select: Rule = "none"
    retention: float = 0.5
    select_scope: Scope = "micro-batch"
    select_sampled: bool = False
    entropy_quantile: float | None = 0.98
    divergence_quantile: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention must be in (0, 1], not {self.retention}")

    def shown(self, progress: Progress) -> float | None:
        """Return what the teacher is shown of solutions (see ``rollouts.AnswerFamily``)."""
        return None

    @torch.no_grad()
    def judge(self, attempt: Attempt, progress: Progress) -> Prediction | TopK:
        """Return what the teacher predicts of the answers, without a graph."""
        exposure = self.shown(progress)
        condition = self.family.condition(attempt.batch, reader="teacher", exposure=exposure)
        found: Prediction | TopK = self.teacher(attempt.state, condition)
        return found

    @property
    def pools_scores(self) -> bool:
        """Whether tokens are compared with those of the whole optimizer step."""
        return self.select_scope == "global" and self.select in ("entropy", "soft-or", "q3")

    def pools(self) -> bool:
        """Return whether something is compared with the whole optimizer step."""
        return self.pools_scores or super().pools()

    @torch.no_grad()
    def survey(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return entropy and divergence of each token of a batch, if they are pooled."""
        values = super().survey(batch, progress)
        if not self.pools_scores:
            return values
        attempt = self.read(*self.surveyed(batch))
        maps = self._maps(attempt, self.judge(attempt, progress))
        mask = attempt.answers.mask
        return values | {name: maps[name][mask] for name in ("entropy", "reverse-kl")}

    def chosen(self, attempt: Attempt, theirs: Prediction | TopK, progress: Progress) -> Tensor:
        """Return which tokens are learned, bool ``[B, A]``."""
        mask = attempt.answers.mask
        if self.retention == 1 or (self.select == "none" and not self.select_sampled):
            return mask
        numbers = None
        if self.select_sampled:
            numbers = self.draws.uniform("select", attempt.batch["ids"], mask.shape[1:])
        return select_tokens(
            self._scores(attempt, theirs, progress), mask, self.retention, numbers=numbers
        )

    @torch.no_grad()
    def _scores(self, attempt: Attempt, theirs: Prediction | TopK, progress: Progress) -> Tensor:
        """Return how much each token matters, ``[B, A]``."""
        mask = attempt.answers.mask
        if self.select == "none":
            return mask.float()
        maps = self._maps(attempt, theirs)
        if self.select == "entropy" and self.select_sampled:
            return maps["entropy"]  # the paper draws in proportion to what is not clipped
        return token_scores(
            self.select,
            maps["entropy"],
            maps["reverse-kl"],
            maps["forward-kl"],
            mask,
            scope="global" if "entropy" in progress.pools else self._own_scope,
            pool_entropy=progress.pools.get("entropy"),
            pool_divergence=progress.pools.get("reverse-kl"),
            clip_quantile=self.entropy_quantile,
            divergence_clip_quantile=self.divergence_quantile,
        )

    @property
    def _own_scope(self) -> Scope:
        """The scope where nothing is pooled: a step of one micro-batch is its own pool."""
        return "micro-batch" if self.select_scope == "global" else self.select_scope

    def _maps(self, attempt: Attempt, theirs: Prediction | TopK) -> dict[str, Tensor]:
        """Return the maps ``[B, A]`` that scores are made of."""
        if isinstance(theirs, TopK):
            raise UserError(
                f"method.select: {self.select} needs the teacher's whole prediction, and a server "
                "gives its most likely tokens: set method.select: none"
            )
        wanted: list[TokenMap] = ["entropy", "reverse-kl", "forward-kl"]
        mask, temperature = attempt.answers.mask, self.temperature
        return token_maps(attempt.prediction, theirs, wanted, mask=mask, temperature=temperature)

"""What methods share that learn some tokens of an answer and not others."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.noising import uniform
from diffdistill.projection import Prediction, TokenMap, token_maps
from diffdistill.selection import Rule, select_tokens, token_scores
from diffdistill.supports import TopK
from diffdistill.text.answering import Answering, Attempt


@dataclass(kw_only=True)
class Selecting(Answering):
    """Chooses tokens by what student and teacher make of them (TIP, arXiv:2604.14084).

    Attributes:
        select: Which tokens are learned: ``none`` of the rules is all; by ``entropy`` of the
            student; by ``divergence``, KL(student || teacher); by either (``soft-or``, TIP's); or
            by ``q3``, where the student is sure and wrong.
        retention: Share of each answer's tokens to learn; at least one.
        select_scope: Over what the scores are normalized: each ``rollout``, or the
            ``micro-batch`` (the paper says batch).
        select_sampled: Draw tokens in proportion to their scores instead of taking the highest
            (TIP's entropy sampling); with ``none``, each with the same chance.
        entropy_quantile: Entropies above this quantile are cut down to it before they are
            normalized (paper); null cuts none.
        divergence_quantile: The same of divergences. The paper cuts none, so that one outlier
            flattens all others.
    """

    select: Rule = "none"
    retention: float = 0.5
    select_scope: Literal["rollout", "micro-batch"] = "micro-batch"
    select_sampled: bool = False
    entropy_quantile: float | None = 0.98
    divergence_quantile: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention must be in (0, 1], not {self.retention}")

    def chosen(self, attempt: Attempt, theirs: Prediction | TopK) -> Tensor:
        """Return which tokens are learned, bool ``[B, A]``."""
        mask = attempt.answers.mask
        if self.retention == 1 or (self.select == "none" and not self.select_sampled):
            return mask
        numbers = None
        if self.select_sampled:
            numbers = uniform(self.draws, "select", attempt.batch["ids"], mask.shape[1:])
        return select_tokens(self._scores(attempt, theirs), mask, self.retention, numbers=numbers)

    @torch.no_grad()
    def _scores(self, attempt: Attempt, theirs: Prediction | TopK) -> Tensor:
        """Return how much each token matters, ``[B, A]``."""
        mask = attempt.answers.mask
        if self.select == "none":
            return mask.float()
        if isinstance(theirs, TopK):
            raise UserError(
                f"method.select: {self.select} needs the teacher's whole prediction, and a server "
                "gives its most likely tokens: set method.select: none"
            )
        wanted: list[TokenMap] = ["entropy", "reverse-kl", "forward-kl"]
        maps = token_maps(
            attempt.prediction, theirs, wanted, mask=mask, temperature=self.temperature
        )
        if self.select == "entropy" and self.select_sampled:
            return maps["entropy"]  # the paper draws in proportion to what is not clipped
        return token_scores(
            self.select,
            maps["entropy"],
            maps["reverse-kl"],
            maps["forward-kl"],
            mask,
            scope=self.select_scope,
            clip_quantile=self.entropy_quantile,
            divergence_clip_quantile=self.divergence_quantile,
        )

"""What methods share that learn from a reward of whole answers (GRPO and its variants)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.policy import (
    Mean,
    Ratio,
    Scale,
    aggregate,
    cispo_map,
    clipped_policy_map,
    group_advantages,
)
from diffdistill.text.answering import Answering, Attempt
from diffdistill.verifying import AnswerReward


@dataclass(kw_only=True)
class Rewarded(Answering):
    """Rewards answers against others to the same question.

    Attributes:
        reward: Verifies answers.
        num_answers: Answers to each question; each is compared with the others.
        scale_rewards: What advantages are divided by: the deviation of the ``group`` (GRPO,
            arXiv:2402.03300), of the ``batch`` (a micro-batch of one rank), or ``none`` (Dr. GRPO,
            arXiv:2503.20783).
        aggregation: ``grpo`` is a mean over answers of the mean over their tokens, ``dr-grpo``
            divides by ``max_tokens`` instead, ``dapo`` is a mean over all tokens of the step
            (arXiv:2503.14476).
        clip_low: The ratio of student to sampler is not followed below 1 minus this.
        clip_high: Nor above 1 plus this; 0.28 in DAPO.
        ratio: The ratio of each ``token``, or of the whole ``sequence`` (GSPO).
        surrogate: ``clip`` is PPO's; ``cispo`` weighs by the ratio up to ``ratio_most``, and never
            silences a token.
        ratio_most: Largest ratio: of ``cispo`` (5 in ScaleRL), and of ``clip`` where the advantage
            is negative (dual-clip PPO, 3 in SDAR); null bounds none.
        drop_cut: Answers that were cut at ``max_tokens`` teach nothing (DAPO).
    """

    reward: AnswerReward
    num_answers: int = 8
    scale_rewards: Scale = "group"
    aggregation: Mean = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    ratio: Ratio = "token"
    surrogate: Literal["clip", "cispo"] = "clip"
    ratio_most: float | None = None
    drop_cut: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.compares and self.num_answers < 2:
            raise ValueError("num_answers must be at least 2: answers are compared with each other")
        if self.surrogate == "cispo" and self.ratio_most is None:
            raise ValueError("surrogate cispo needs ratio_most, such as 5")

    @property
    def compares(self) -> bool:
        """Whether answers to a question are compared by their rewards."""
        return True

    @torch.no_grad()
    def rewards(self, attempt: Attempt) -> Tensor:
        """Return the reward of each answer, ``[B]``."""
        texts = self.family.spelled(attempt.answers)
        return self.reward.score(texts, self.family.examples(attempt.batch))

    def advantages(self, rewards: Tensor) -> Tensor:
        """Return how much better each answer is than the others to its question, ``[B]``."""
        return group_advantages(rewards, self.num_answers, self.scale_rewards)

    def rewarded_tokens(self, attempt: Attempt) -> Tensor:
        """Return the tokens that learn from rewards, bool ``[B, A]``."""
        answers = attempt.answers
        return answers.mask & answers.ended[:, None] if self.drop_cut else answers.mask

    def policy(self, attempt: Attempt, advantages: Tensor, logprob: Tensor) -> tuple[Tensor, int]:
        """Return the policy-gradient loss of a micro-batch, and what it is the mean of.

        Args:
            attempt: The answers.
            advantages: Of each answer ``[B]``, or of each token ``[B, A]``.
            logprob: The student's log-probability of each token ``[B, A]``, with its graph.
        """
        answers, mask = attempt.answers, self.rewarded_tokens(attempt)
        assert answers.logprobs is not None, "rewards are for answers of the student's own"
        error = self._surrogate(logprob, answers.logprobs, advantages, mask)
        return aggregate(error, mask, self.aggregation, max_tokens=self.max_tokens)

    def _surrogate(self, logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        if self.surrogate == "cispo":
            assert self.ratio_most is not None
            return cispo_map(logprob, old, advantages, self.ratio_most, ratio=self.ratio, mask=mask)
        return clipped_policy_map(
            logprob,
            old,
            advantages,
            self.clip_low,
            self.clip_high,
            ratio=self.ratio,
            mask=mask,
            dual_clip=self.ratio_most,
        )

    def told(self, attempt: Attempt, rewards: Tensor) -> dict[str, Tensor]:
        """Return what to log.

        ``flat_groups`` is the share of questions that teach nothing, ``parse_rate`` that of answers
        in the format that is asked for: where it falls, a format collapses (see docs/diagnose.md).
        """
        groups = rewards.view(-1, self.num_answers)
        answers = attempt.answers
        return {
            "reward": rewards.mean(),
            "parse_rate": self.reward.parses(self.family.spelled(answers)).float().mean(),
            "flat_groups": (groups.amax(1) == groups.amin(1)).float().mean(),
            "answer_tokens": answers.mask.sum(dim=1).float().mean(),
            "ended": answers.ended.float().mean(),
        }

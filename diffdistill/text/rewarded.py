"""What methods share that learn from a reward of whole answers (GRPO and its variants)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.policy import (
    Importance,
    Mean,
    Ratio,
    Scale,
    aggregate,
    cispo_map,
    clipped_policy_map,
    group_advantages,
    sampler_weights,
)
from diffdistill.rollouts import Answers
from diffdistill.text.answering import Answering, Attempt
from diffdistill.types import Batch, Example, Progress
from diffdistill.verifying import AnswerReward


@dataclass(kw_only=True)
class Rewarded(Answering):
    """Rewards answers against others to the same question.

    Attributes:
        reward: Verifies answers.
        num_answers: Answers to each question; each is compared with the others.
        scale_rewards: What advantages are divided by: the deviation of the ``group`` (GRPO,
            arXiv:2402.03300), of the ``batch`` (all answers of the optimizer step, which are then
            written before any is learned), or ``none`` (Dr. GRPO, arXiv:2503.20783).
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
        importance: What is done about log-probabilities of the sampler that are not the student's,
            as those of an inference engine: ``ratio`` takes the sampler as the older student, so
            that the clip bounds it (ours); the others weigh tokens by the ratio of student to
            sampler, of the token or of its whole answer, up to ``importance_most`` (truncate) or
            not at all where it is larger (mask). TRL's default is ``sequence-mask``.
        importance_most: Largest such weight; 3 in TRL.
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
    importance: Importance = "ratio"
    importance_most: float = 3.0
    drop_cut: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.compares and self.num_answers < 2:
            raise ValueError("num_answers must be at least 2: answers are compared with each other")
        if self.surrogate == "cispo" and self.ratio_most is None:
            raise ValueError("surrogate cispo needs ratio_most, such as 5")
        if self.importance_most <= 0:
            raise ValueError(f"importance_most must be above 0, not {self.importance_most}")

    @property
    def compares(self) -> bool:
        """Whether answers to a question are compared by their rewards."""
        return True

    def check_question(self, example: Example) -> None:
        """Refuse a question whose answers cannot be verified, if they will be.

        Raises:
            UserError: If it has no answer.
        """
        super().check_question(example)
        if self.compares:
            self.reward.check(example)

    @torch.no_grad()
    def rewards(self, attempt: Attempt) -> Tensor:
        """Return the reward of each answer, ``[B]``."""
        return self._scored(attempt.batch, attempt.answers)

    def _scored(self, rows: Batch, answers: Answers) -> Tensor:
        return self.reward.score(self.family.spelled(answers), self.family.examples(rows))

    @property
    def pools_rewards(self) -> bool:
        """Whether rewards are measured by those of the whole optimizer step."""
        return self.scale_rewards == "batch" and self.compares

    def pools(self) -> bool:
        """Return whether something is compared with the whole optimizer step."""
        return self.pools_rewards or super().pools()

    @torch.no_grad()
    def survey(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the reward of each answer to a batch, if they are pooled."""
        values = super().survey(batch, progress)
        if self.pools_rewards:
            values["reward"] = self._scored(*self.surveyed(batch))
        return values

    def advantages(self, rewards: Tensor, progress: Progress) -> Tensor:
        """Return how much better each answer is than the others to its question, ``[B]``."""
        pool = progress.pools.get("reward")
        return group_advantages(rewards, self.num_answers, self.scale_rewards, pool=pool)

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
        if self.importance == "ratio":
            error = self._surrogate(logprob, answers.logprobs, advantages, mask)
        else:
            error = self._surrogate(logprob, logprob.detach(), advantages, mask)
            error = error * sampler_weights(
                logprob, answers.logprobs, mask, self.importance, self.importance_most
            )
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
        answers, examples = attempt.answers, self.family.examples(attempt.batch)
        parsed = self.reward.parsed(self.family.spelled(answers), examples)
        return {
            "reward": rewards.mean(),
            "parse_rate": parsed.float().mean(),
            "flat_groups": (groups.amax(1) == groups.amin(1)).float().mean(),
            "answer_tokens": answers.mask.sum(dim=1).float().mean(),
            "ended": answers.ended.float().mean(),
        }

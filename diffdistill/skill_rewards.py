"""Rewards of several skills as one: each judges the answers to the questions of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.types import Example
from diffdistill.verifying import AnswerReward


@dataclass(kw_only=True)
class SkillRewards(AnswerReward):
    """A reward for each of ``data.skills``.

    Attributes:
        rewards: By skill.
    """

    rewards: Mapping[str, AnswerReward]

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        """Return how good each answer is by the reward of its question's skill, float32 ``[B]``.

        Raises:
            UserError: If a question is of no skill that has one, or has no answer to verify by.
        """
        scores = torch.zeros(len(answers), device=self.device)
        for skill, rows in self._rows(examples).items():
            theirs = [answers[row] for row in rows], [examples[row] for row in rows]
            scores[rows] = self.rewards[skill].score(*theirs)
        return scores

    def check(self, example: Example) -> None:
        """Refuse an example that the reward of its skill could not judge.

        Raises:
            UserError: If it is of no skill that has one, or has no answer to verify by.
        """
        for skill in self._rows([example]):
            self.rewards[skill].check(example)

    def parses(self, answers: Sequence[str]) -> Tensor:
        """Return whether each answer keeps to the format of any skill, bool ``[B]``."""
        return torch.stack([reward.parses(answers) for reward in self.rewards.values()]).any(0)

    def parsed(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        """Return whether each answer keeps to the format of its question's skill, bool ``[B]``."""
        found = torch.zeros(len(answers), dtype=torch.bool, device=self.device)
        for skill, rows in self._rows(examples).items():
            found[rows] = self.rewards[skill].parses([answers[row] for row in rows])
        return found

    def _rows(self, examples: Sequence[Example]) -> dict[str, list[int]]:
        """Return the numbers of the questions of each skill."""
        rows: dict[str, list[int]] = {}
        for number, example in enumerate(examples):
            skill = example.skill
            if skill is None or skill not in self.rewards:
                raise UserError(
                    f"{example.origin}: rewards are of the skills {', '.join(self.rewards)}, and "
                    f"this question is of {skill or 'none'}: set one reward for all"
                )
            rows.setdefault(skill, []).append(number)
        return rows

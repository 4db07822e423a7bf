"""The rewards of a config, built."""

from typing import Any

import torch

from diffdistill import catalog
from diffdistill.config import RunConfig
from diffdistill.errors import UserError
from diffdistill.panel import Deferred, Panel
from diffdistill.protocols import Reward
from diffdistill.skill_rewards import SkillRewards
from diffdistill.verifying import AnswerReward


def build_reward(config: RunConfig, device: torch.device) -> Reward:
    """Return the judge of pictures of ``config``'s ``rewards``; several are one with all axes.

    Their weights are loaded when they are first asked; ``load_rewards`` loads them at once.

    Raises:
        UserError: If there is none.
    """
    rewards = [Deferred(kind, options) for kind, options in _rewards(config, device)]
    return rewards[0] if len(rewards) == 1 else Panel(rewards)


def build_answer_reward(config: RunConfig, device: torch.device) -> AnswerReward:
    """Return the judge of answers of ``config``'s ``rewards``; those of skills are one.

    Raises:
        UserError: If there is none, or more than one without a skill.
    """
    found = _rewards(config, device)
    skills = [settings.get("skill") for settings in config.rewards]
    if all(skills):
        made = {str(s): kind(**options) for s, (kind, options) in zip(skills, found, strict=True)}
        return SkillRewards(device=device, rewards=made)
    (kind, options), *others = found
    if others:
        raise UserError(
            f"rewards: method {config.method['name']} takes one, and here are {1 + len(others)}"
        )
    reward: AnswerReward = kind(**options)
    return reward


def _rewards(config: RunConfig, device: torch.device) -> list[tuple[type, dict[str, Any]]]:
    """Return class and options of each reward.

    Raises:
        UserError: If there is none, or one judges another kind of samples than the method makes.
    """
    name = config.method["name"]
    if not config.rewards:
        known = catalog.listing(catalog.names("reward"))
        raise UserError(f"method {name} needs rewards: one of {known}")
    of_answers = catalog.load("method", name).kind() == "answers"
    rewards = []
    for settings in config.rewards:
        options = {k: v for k, v in settings.items() if k not in ("name", "skill")}
        cls = catalog.load("reward", settings["name"])
        if issubclass(cls, AnswerReward) != of_answers:
            judged, made = ("images and videos", "answers")[:: 1 if of_answers else -1]
            raise UserError(
                f"rewards: {settings['name']} judges {judged}, and method {name} makes {made}"
            )
        rewards.append((cls, {"device": device, **options}))
    return rewards


def load_rewards(reward: Any) -> None:
    """Load the weights of what ``build_reward`` returned; one of answers has none.

    Raises:
        UserError: If they are missing or do not fit.
    """
    if isinstance(reward, AnswerReward):
        return
    for member in getattr(reward, "members", [reward]):
        _ = member.loaded

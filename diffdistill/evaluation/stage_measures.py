"""What is measured around the stages of a pipeline: scores, and how close a teacher is."""

from dataclasses import replace
from pathlib import Path

import torch

from diffdistill.checkpoints import restore
from diffdistill.closeness import closeness_maps
from diffdistill.config import RunConfig
from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.evaluation.answers import examine
from diffdistill.evaluation.means import Means
from diffdistill.evaluation.subject import first_questions, subject_of
from diffdistill.evaluation.text_settings import AnswerEvaluateSettings
from diffdistill.reward_building import build_answer_reward
from diffdistill.roles import Role
from diffdistill.sampling import base_role, inference
from diffdistill.session import Session, build
from diffdistill.stage_gates import MeasureSettings
from diffdistill.supports import TopK


def scores(run: Path, measure: MeasureSettings, *, before: bool) -> dict[str, float]:
    """Return the mean reward of a run's student, ``after``, and if wanted ``before`` training.

    Args:
        run: Its folder.
        measure: How it is measured.
        before: Whether to measure the student before training too.

    Raises:
        UserError: If the config has no reward.
    """
    session = restore(run)
    session.config = _measured(session.config, measure)
    roles = {"after": session.roles["student"]}
    if before:
        roles["before"] = base_role(session)
    with inference(session):
        return {name: _score(session, name, role, measure) for name, role in roles.items()}


def _score(session: Session, name: str, role: Role, measure: MeasureSettings) -> float:
    reward = build_answer_reward(session.config, session.device)
    asked = first_questions(session, measure.num_questions, reward)
    found = examine(session, name, role, asked, AnswerEvaluateSettings(), reward)
    metric = f"mean@{measure.num_answers}"
    return next(mean.value for mean in found.averages if mean.metric == metric)


@torch.no_grad()
def closeness(config: RunConfig, measure: MeasureSettings) -> dict[str, float]:
    """Return overlap and divergences of a student and its teacher before a run, by name.

    They are means over the tokens of the student's answers, one to each question, sampled as the
    method does.

    Args:
        config: The run.
        measure: How it is measured.

    Raises:
        UserError: If there is no teacher whose whole prediction can be asked.
    """
    session = build(_measured(config, measure))
    subject, means = subject_of(session, num_answers=1, seed=measure.seed), Means()
    name = config.method["name"]
    if subject.teacher is None:
        raise UserError(f"gate C2 asks how close a teacher is, and method {name} has none")
    with inference(session):
        asked = first_questions(session, measure.num_questions)
        for start, examples in subject.batches(asked, lambda _: None):
            attempt = subject.attempt(examples, start)
            theirs = subject.judgment(attempt)
            if isinstance(theirs, TopK):
                raise UserError("gate C2 needs the teacher's whole prediction, not a server's")
            mask = attempt.answers.mask
            temperature = subject.method.temperature
            maps = closeness_maps(
                attempt.prediction, theirs, measure.top_k, mask=mask, temperature=temperature
            )
            for key, value in maps.items():
                means.add(key, value[mask])
    return means.found()


def _measured(config: RunConfig, measure: MeasureSettings) -> RunConfig:
    """Return a config with the questions and the sampling of a measurement."""
    data: DataSettings = config.data
    if measure.path is not None or measure.skills is not None:
        data = replace(data, path=measure.path, skills=measure.skills, source=None)
        data = replace(data, max_examples=None, skip_examples=0)
    sample = replace(
        config.replies,
        num_answers=measure.num_answers,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        seed=measure.seed,
        max_tokens=config.method.get("max_tokens", config.replies.max_tokens),
    )
    return replace(config, data=data, sample=sample)

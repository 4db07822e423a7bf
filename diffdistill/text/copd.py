"""CoPD: co-evolving policy distillation (arXiv:2604.27083), as far as notes on it tell.

Several experts begin as one model. Each is rewarded for its own skill, as in GRPO. From time to
time each also answers the questions of another's skill, and that other says, token by token, what
it would rather have read. In the end their weights are averaged.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.closeness import closeness_maps
from diffdistill.divergences import masked_mean
from diffdistill.estimators import log_ratio
from diffdistill.method import CountsUpdates
from diffdistill.policy import Mean
from diffdistill.projection import Prediction, token_logprob, token_maps
from diffdistill.text.answering import Attempt, sampler_gap
from diffdistill.text.grpo import GRPO
from diffdistill.text.rewarded import Rewarded
from diffdistill.types import Batch, Loss, Progress

NAME = re.compile(r"[\w-]+")
BEFORE = "-before"
"""Ends the name of the copy of an expert that teaches through a whole phase."""


@dataclass(frozen=True)
class PhaseStarts:
    """The numbers of updates after which the experts begin to teach each other."""

    rewarded: int
    cycle: int

    def __contains__(self, updates: object) -> bool:
        """Return whether a phase begins after so many updates."""
        return isinstance(updates, int) and updates % self.cycle == self.rewarded


@dataclass(kw_only=True)
class CoPD(CountsUpdates, Rewarded):
    """Train an expert for each skill, who teach each other while they learn.

    Attributes:
        student: The mean of all experts' weights: what is sampled, measured and exported.
        peers: The experts, a role for each of ``data.skills`` (and copies of them, see
            ``snapshot``).
        rewarded_steps: Steps of a cycle in which each expert learns from its rewards alone; 1.5
            times ``shared_steps`` in the paper.
        shared_steps: Steps in which it learns from them and from its peers.
        beta: Of what peers say, the factor of log(peer / expert) as the advantage of each token;
            0 is parallel GRPO, which asks no peer. The paper's is unknown.
        betas: The same of single experts, by name: who learns from peers, and how much.
        topology: Who is whose peer. ``hub``: the first expert is everyone's, and everyone is its;
            ``all``: everyone is. Of two experts it is the same.
        snapshot: Which weights teach: those at the start of the ``step``, or of the ``phase``,
            which needs a copy of each expert. In either case all experts' are of the same moment.
        watch_every: Steps between measurements of how close peers are to an expert, at its own
            answers (Overlap@10 and the symmetric KL); null measures nothing.
        placement: Which of several processes train an expert: all of them, in turn (``shared``),
            or a group of its own (``groups``). Each has all experts' weights, which peers need.
    """

    roles: ClassVar = {"student": {"weights": "mean"}}

    peers: Mapping[str, Any]
    aggregation: Mean = "grpo"
    rewarded_steps: int = 30
    shared_steps: int = 20
    beta: float = 1.0
    betas: dict[str, float] = field(default_factory=dict)
    topology: Literal["hub", "all"] = "hub"
    snapshot: Literal["step", "phase"] = "step"
    watch_every: int | None = 10
    placement: Literal["shared", "groups"] = "shared"

    @classmethod
    def experts(
        cls, skills: Sequence[str], options: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Return the settings of an expert for each skill, and of its copies."""
        if len(skills) < 2:
            raise ValueError("data.skills must name the data of at least two skills")
        for name in skills:
            if name in ("student", "average", "base") or name.endswith(BEFORE):
                raise ValueError(f"data.skills: {name!r} is the name of another model")
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"data.skills: {name!r} has other characters than a-z, 0-9, _ and -"
                )
        for name in options.get("betas", {}):
            if name not in skills:
                raise ValueError(f"betas: there is no skill {name!r}; here: {', '.join(skills)}")
        found: dict[str, dict[str, Any]] = {name: {"weights": "trained"} for name in skills}
        if options.get("snapshot") == "phase":
            copied = {"weights": "ema", "decay": 1.0}
            found |= {f"{name}{BEFORE}": {**copied, "of": name} for name in skills}
        return found

    @classmethod
    def parts(cls, skills: Sequence[str], options: Mapping[str, Any]) -> int:
        """Return the number of experts, if each has a group of processes."""
        return len(skills) if options.get("placement") == "groups" else 1

    def __post_init__(self) -> None:
        """Check the options, and make each expert's own GRPO."""
        super().__post_init__()
        if min(self.rewarded_steps, self.shared_steps) < 0 or self.cycle == 0:
            raise ValueError("rewarded_steps and shared_steps must be at least 0, and not both 0")
        if self.scale_rewards == "batch":
            raise ValueError("scale_rewards: batch would mix skills: take group or none")
        if min([self.beta, *self.betas.values()]) < 0:
            raise ValueError("beta must be at least 0: below, peers teach the opposite")
        if self.snapshot == "step":
            self._check_dropout()
        shared = {item.name: getattr(self, item.name) for item in fields(Rewarded)}
        self._experts = {
            name: GRPO(**shared | {"student": expert, "reference": expert})
            for name, expert in (self.peers or {}).items()
            if not name.endswith(BEFORE)
        }

    def _check_dropout(self) -> None:
        """Refuse experts that would judge with the dropout that they learn with."""
        for name, expert in (self.peers or {}).items():
            settings = getattr(expert, "settings", None)
            if settings is not None and settings.dropout > 0:
                raise ValueError(
                    f"roles.{name}.dropout would make what it says to its peers noisy: set it to "
                    "0, or method.snapshot: phase"
                )

    @property
    def cycle(self) -> int:
        """Steps of a cycle."""
        return self.rewarded_steps + self.shared_steps

    def shares(self, updates: int) -> bool:
        """Return whether experts learn from each other in the step after so many updates.

        A step that was skipped is none, so that phases and the copies that teach stay together.
        """
        return updates % self.cycle >= self.rewarded_steps

    def renewals(self) -> Mapping[str, Container[int]]:
        """Return when the copies that teach are renewed: before each phase."""
        if self.snapshot == "step":
            return {}
        starts = PhaseStarts(self.rewarded_steps % self.cycle, self.cycle)
        return {f"{name}{BEFORE}": starts for name in self._experts}

    def peers_of(self, name: str) -> list[str]:
        """Return the names of the experts that an expert learns from."""
        hub, *spokes = self._experts
        if self.topology == "all":
            return [other for other in self._experts if other != name]
        return spokes if name == hub else [hub]

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss for each expert: of its answers to its own questions, and to peers'."""
        questions = self.family.by_skill(batch)
        for index, name in enumerate(self._experts):
            if index % progress.parts == progress.part:
                yield self._loss(name, questions, progress)

    def _loss(self, name: str, questions: Mapping[str, Batch], progress: Progress) -> Loss:
        """Return an expert's loss, whose mean is that of its own answers."""
        expert = self._experts[name]
        attempt = expert.attempt(questions[name], progress)
        rewards = expert.rewards(attempt)
        mask, tokens = expert.rewarded_tokens(attempt), attempt.answers.tokens
        logprob = token_logprob(attempt.prediction, tokens, mask=mask, temperature=self.temperature)
        value, count = expert.policy(attempt, expert.advantages(rewards, progress), logprob)
        told: dict[str, Tensor] = expert.told(attempt, rewards)
        told |= sampler_gap(attempt.answers, logprob, mask)
        if self.watch_every and progress.step % self.watch_every == 0:
            told |= self._watched(name, attempt)
        beta = self.betas.get(name, self.beta)
        if beta and self.shares(self.updates):
            others = self.peers_of(name)
            taught = [self._taught(name, other, questions[other]) for other in others]
            value = value + beta * torch.stack([loss for loss, _ in taught]).mean()
            told["gap"] = torch.stack([gap for _, gap in taught]).mean()
        return Loss(name, value, count, metrics=told)

    def _taught(self, name: str, other: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of an expert's answers to a peer's questions, and the mean log-ratio.

        Eq. 8 of the paper: the advantage of a token is log(peer / expert), a constant.
        """
        expert = self._experts[name]
        rows = self.family.repeated(batch, self.num_answers)
        answers = self.family.rollout(
            expert.student, rows, self.sampling, self.draws, purpose=f"for {other}"
        )
        attempt = expert.read(rows, answers)
        mask = expert.rewarded_tokens(attempt)
        maps = token_maps(
            attempt.prediction,
            self._judged(other, attempt),
            ["logprob", "teacher-logprob"],
            tokens=answers.tokens,
            mask=mask,
            temperature=self.temperature,
        )
        gap = log_ratio(maps["logprob"], maps["teacher-logprob"])
        value, _ = expert.policy(attempt, gap, maps["logprob"])
        return value, masked_mean(gap, mask)

    @torch.no_grad()
    def _judged(self, other: str, attempt: Attempt) -> Prediction:
        """Return what a peer predicts of an expert's answers."""
        peer = self.peers[other if self.snapshot == "step" else f"{other}{BEFORE}"]
        found: Prediction = peer(attempt.state, self.family.condition(attempt.batch))
        return found

    @torch.no_grad()
    def _watched(self, name: str, attempt: Attempt) -> dict[str, Tensor]:
        """Return how close peers are at an expert's own answers; the KL is the mean of both."""
        told = []
        mask = attempt.answers.mask
        for other in self.peers_of(name):
            theirs = self.peers[other](attempt.state, self.family.condition(attempt.batch))
            maps = closeness_maps(
                attempt.prediction, theirs, 10, mask=mask, temperature=self.temperature
            )
            symmetric = (maps["reverse_kl"] + maps["forward_kl"]) / 2
            told.append(torch.stack([masked_mean(m, mask) for m in (maps["overlap"], symmetric)]))
        overlap, symmetric = torch.stack(told).mean(0)
        return {"overlap_at_10": overlap, "symmetric_kl": symmetric}

"""SDTT: fewer sampling steps for a masked-diffusion language model (arXiv:2410.21035).

Self-distillation through time. From a text with some of it hidden, the teacher takes a few steps of
its own sampling; the student learns to predict at once what the teacher predicted of each token in
the step that settled it. In rounds: the student becomes the teacher, and the step twice as long.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from diffdistill.choices import sampled_tokens
from diffdistill.divergences import logprob_mse, masked_mean, total_variation
from diffdistill.draws import Draws
from diffdistill.method import CountsUpdates, Method
from diffdistill.noising import MaskNoise, mask_rate
from diffdistill.projection import (
    Prediction,
    TokenMap,
    at,
    prediction_rows,
    token_maps,
    with_rows,
)
from diffdistill.texts import TextFamily, TextModel
from diffdistill.tiling import in_tiles
from diffdistill.types import Batch, Condition, Loss, Progress, State

OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tvd": total_variation,
    "mse": logprob_mse,
}


class Target(NamedTuple):
    """What the teacher made of the hidden tokens.

    Attributes:
        prediction: Its prediction ``[B, L, V]`` of each, from the step that settled it, or of
            the last step.
        settled: bool ``[B, L]``: what it settled before its last step.
    """

    prediction: Prediction
    settled: Tensor


@dataclass(kw_only=True)
class SDTT(CountsUpdates, Method):
    """Match several sampling steps of the teacher with one of the student.

    The student's first weights should be the first teacher's. In round r, from 0, a teacher's step
    is ``teacher_steps ** r / num_steps`` long; the last round is the one after which the student
    needs ``last_steps``. Set ``train.steps`` to ``round_updates`` for each round.

    Attributes:
        family: The family of text models.
        draws: The random numbers of the run.
        student: The model to train.
        teacher: What it is compared with; from the second round on what the student was at the
            end of the round before.
        divergence: Of the predictions of each hidden token: ``reverse-kl`` is
            KL(student || teacher) (the reference's default, ``kl-bwd``, there written
            ``kl_div(target, preds)``); ``forward-kl`` is KL(teacher || student) (``kl-fwd``);
            ``tvd`` is half the L1 distance of probabilities (the reference's is of
            log-probabilities); ``mse`` the mean squared error of log-probabilities (reference).
        num_steps: Sampling steps of the first teacher from t = 1 on; 1024 in the reference.
        teacher_steps: Steps of the teacher that one of the student is to do.
        round_updates: Updates of the student in a round; 10000 in the reference. Null is one
            round, in which the teacher stays (and may be ``frozen``).
        last_steps: Sampling steps of the student after the last round; 8 in the reference.
        t_low: Smallest noise level, and where sampling ends (reference).
        stratify: Samples over whose noise levels these are spread evenly, usually those of an
            optimizer step; 0 draws each alone.
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "teacher": {"weights": "ema", "decay": 1.0},  # never moves but by ``renewals``
    }
    texts: ClassVar = True

    family: TextFamily
    draws: Draws
    student: TextModel
    teacher: TextModel
    divergence: Literal["reverse-kl", "forward-kl", "tvd", "mse"] = "reverse-kl"
    num_steps: int = 1024
    teacher_steps: int = 2
    round_updates: int | None = 10000
    last_steps: int = 8
    t_low: float = 1e-3
    stratify: int = 0

    def __post_init__(self) -> None:
        """Check the options; start at the first round."""
        for name, fine, bounds in (
            ("teacher_steps", self.teacher_steps >= 2, "at least 2"),
            ("round_updates", self.round_updates is None or self.round_updates >= 1, "at least 1"),
            ("last_steps", self.last_steps >= 1, "at least 1"),
            ("t_low", 0 < self.t_low < 1, "in (0, 1)"),
            ("stratify", self.stratify >= 0, "at least 0"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {bounds}, not {getattr(self, name)}")
        if self.num_steps < self.teacher_steps * self.last_steps:
            raise ValueError(
                f"num_steps must be at least teacher_steps * last_steps = "
                f"{self.teacher_steps * self.last_steps}, not {self.num_steps}"
            )

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        if self.round_updates is None:
            return 1
        ratio = self.num_steps / self.last_steps
        return math.floor(math.log(ratio, self.teacher_steps) + 1e-9)

    @property
    def round(self) -> int:
        """The number of the round at hand, from 0."""
        if self.round_updates is None:
            return 0
        return min(self.updates // self.round_updates, self.rounds - 1)

    @property
    def step(self) -> float:
        """How far a step of the teacher goes in t."""
        return (1.0 - self.t_low) / self.num_steps * self.teacher_steps**self.round

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield the divergence, a mean over all hidden tokens."""
        text, format_ = self.family.text(batch), self.family.format()
        noise = MaskNoise(mask_id=format_.mask_id, low=self.t_low, stratify=self.stratify)
        noised = noise(text.tokens, text.maskable, self.draws, batch["ids"])
        state = self.family.noised(batch, noised.t[:, 0], noised.masked)
        condition = self.family.condition(batch)
        target = self._target(state, condition, noised.masked, batch["ids"])
        prediction = self.student(state, condition)
        error = self._error(at(prediction, noised.masked), at(target.prediction, noised.masked))
        count = len(error)
        metrics: dict[str, Tensor | float] = {
            "noise_level": noised.t.mean(),
            "mask_rate": mask_rate(noised.masked, text.maskable),
            "settled": target.settled.sum() / max(count, 1),
            "round": float(self.round),
        }
        value = masked_mean(error, torch.ones_like(error, dtype=torch.bool))
        yield Loss("student", value, max(count, 1), metrics=metrics)

    @torch.no_grad()
    def _target(self, state: State, condition: Condition, hidden: Tensor, ids: Tensor) -> Target:
        """Return what the teacher predicts on its way.

        A hidden token at t is settled in a step to s with probability ``(t - s) / t``.
        """
        x, left = state.x, hidden
        rows: Tensor | None = None
        for number in range(self.teacher_steps):
            t = (state.t - number * self.step).clamp(min=self.t_low)
            found = self.teacher(State(x, t, left), condition)
            newest = prediction_rows(found)
            rows = newest if rows is None else torch.where(left[..., None], newest, rows)
            if number + 1 == self.teacher_steps:
                break  # what is left has this step's prediction, settled by it or not
            numbers = self.draws.uniform(f"settle/{number}", ids, x.shape[1:])
            settled = left & (numbers < (self.step / t)[:, None])
            numbers = self.draws.uniform(f"token/{number}", ids, x.shape[1:])
            tokens = sampled_tokens(at(found, settled), numbers[settled])
            x, left = x.masked_scatter(settled, tokens), left & ~settled
        assert rows is not None
        return Target(with_rows(found, rows), hidden & ~left)

    def _error(self, ours: Prediction, theirs: Prediction) -> Tensor:
        """Return the divergence ``[K]`` of predictions ``[K, V]``."""
        if self.divergence in OTHERS:
            return in_tiles(OTHERS[self.divergence], ours, theirs)
        kind = cast("TokenMap", self.divergence)
        return token_maps(ours, theirs, [kind])[kind]

    def renewals(self) -> Mapping[str, Container[int]]:
        """Return when the student becomes the teacher: at the end of each round but the last."""
        if self.round_updates is None:
            return {}
        return {
            "teacher": range(
                self.round_updates, self.round_updates * self.rounds, self.round_updates
            )
        }

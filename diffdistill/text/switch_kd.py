"""Switch-KD: vision-language distillation through the teacher's language model (arXiv:2604.14629).

The answers are those of the data. Student and teacher are compared at each of their tokens; and the
features of the student's vision encoder are put through the teacher's projector and language model,
which are frozen, so that the student learns to see what its teacher could answer by.

    z_T = L_T(P_T(V_T(x)))    z_S = L_S(P_S(V_S(x)))    z_switch = L_T(P_T(V_S(x)))
    L = answer_weight CE + align_weight D(z_S, z_T) + switch_weight D(z_switch, z_T)    (eq. 1, 4-6)

The routes are those of the authors' figure; that nothing of the teacher is trained follows from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.divergences import masked_mean
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.projection import Prediction, cross_entropy, token_maps
from diffdistill.rollouts import Solutions
from diffdistill.sights import SeeingFamily, SeeingModel
from diffdistill.text.ranking import Ranking
from diffdistill.types import Batch, Condition, Loss, Progress


@dataclass(kw_only=True)
class SwitchKD(Ranking):
    """Learn given answers, a teacher's logits, and to see for the teacher's language model.

    Attributes:
        family: The family of models that answer, with pictures or without.
        draws: The random numbers of the run; none are drawn.
        student: The model to train.
        teacher: The frozen model, of the same vocabulary. To switch, its vision encoder must give
            features of the same shape as the student's.
        divergence: Of both terms: ``dbild`` (paper), or the KL over the vocabulary: ``forward-kl``
            is KL(teacher || student), ``reverse-kl`` KL(student || teacher).
        temperature: Logits of both sides of a divergence are divided by it; 3 in the paper, by a
            second-hand source. The cross-entropy is at 1.
        temperature_factor: ``squared`` multiplies both divergences by the square of the
            temperature, as Hinton et al. do (arXiv:1503.02531); whether the paper does is
            unconfirmed.
        answer_weight: Weight of the answers' cross-entropy.
        align_weight: Weight of the divergence of the student from the teacher; lambda_1, 1 in the
            paper (second-hand). 0 leaves it out.
        switch_weight: Weight of the switched term; lambda_2, 1 in the paper (second-hand). 0 leaves
            it out, and then questions need no pictures.
    """

    roles: ClassVar = {"student": {"weights": "trained"}, "teacher": {"weights": "frozen"}}
    answers: ClassVar = True

    family: SeeingFamily
    draws: Draws
    student: SeeingModel
    teacher: SeeingModel
    divergence: Literal["dbild", "forward-kl", "reverse-kl"] = "dbild"
    temperature: float = 3.0
    temperature_factor: Literal["none", "squared"] = "none"
    answer_weight: float = 1.0
    align_weight: float = 1.0
    switch_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.check_ranked(self.divergence)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        weights = self.answer_weight, self.align_weight, self.switch_weight
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                "answer_weight, align_weight and switch_weight must be at least 0, and one of them "
                "above it"
            )

    def solutions(self) -> Solutions:
        """Return that the data's answers are learned."""
        return "learned"

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: a mean over the tokens of the answers of the optimizer step."""
        answers = self.family.given(batch)
        state, mask = self.family.state(answers), answers.mask
        told = self.family.condition(batch)
        asked = self.family.condition(batch, reader="teacher")
        if self.switch_weight:
            told, asked, switched = self._switched(told, asked)
        prediction = self.student(state, told)
        error = cross_entropy(prediction, answers.tokens, mask=mask)
        total, metrics = self.answer_weight * error, {"answers": masked_mean(error.detach(), mask)}
        if self.align_weight or self.switch_weight:
            with torch.no_grad():
                theirs = self.teacher(state, asked)
        if self.align_weight:
            maps = self._compared(prediction, theirs, mask)
            total = total + self.align_weight * maps["divergence"]
            metrics |= _told("align", maps, mask)
        if self.switch_weight:
            maps = self._compared(self.teacher(state, switched), theirs, mask)
            total = total + self.switch_weight * maps["divergence"]
            metrics |= _told("switch", maps, mask)
        count = max(int(mask.sum()), 1)
        yield Loss("student", masked_mean(total, mask), count, metrics=metrics)

    def _switched(
        self, told: Condition, asked: Condition
    ) -> tuple[Condition, Condition, Condition]:
        """Return the student's condition, the teacher's, and that of the switched route.

        Each encoder is asked once.

        Raises:
            UserError: If the encoders do not fit, or nothing of the student's is trained.
        """
        ours = self.student.look(told)
        with torch.no_grad():
            theirs = self.teacher.look(asked)
        if torch.is_grad_enabled() and not ours.features.requires_grad:
            raise UserError(
                "nothing of the student's vision encoder is trained, so the switched term teaches "
                "nothing: let roles.student.targets name layers of it, or set "
                "method.switch_weight: 0"
            )
        through = self.family.seeing(asked, ours.through(theirs))
        return self.family.seeing(told, ours), self.family.seeing(asked, theirs), through

    def _compared(
        self, student: Prediction, teacher: Prediction, mask: Tensor
    ) -> dict[str, Tensor]:
        """Return the map ``divergence`` ``[B, A]``, and of DBiLD others."""
        if self.divergence == "dbild":
            maps = self.ranked(student, teacher, mask, self.temperature)
        else:
            found = token_maps(
                student, teacher, (self.divergence,), mask=mask, temperature=self.temperature
            )
            maps = {"divergence": found[self.divergence]}
        if self.temperature_factor == "squared":
            maps["divergence"] = self.temperature**2 * maps["divergence"]
        return maps


def _told(term: str, maps: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Return what to log of the maps of one term."""
    means = {name: masked_mean(value.detach(), mask) for name, value in maps.items()}
    own = {f"{term}/{name}": value for name, value in means.items() if name != "divergence"}
    return {term: means["divergence"]} | own

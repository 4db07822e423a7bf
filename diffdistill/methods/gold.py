"""GOLD: ULD where tokens have no counterpart, and a divergence where they have one.

TRL's General Online Logit Distillation (``trl.experimental.gold``, the hybrid loss), on texts of
the data and for masked diffusion: chunks of the same bytes, tokens matched by the bytes they spell.
A baseline of ``tide``.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from diffdistill.methods.uld import ULD, Pairs
from diffdistill.vocabularies import gold, matched_ids


@dataclass(kw_only=True)
class GOLD(ULD):
    """Denoise, and match a teacher with other tokens: token by token where both have one.

    Attributes:
        pairs: As in ``uld``; by ``chunk`` unless set.
        beta: The teacher's share in the mixture of the generalized Jensen-Shannon divergence of
            matched tokens; 0 is KL(teacher || student), 1 the reverse. 0.5 in TRL.
        matched_weight: Weight of that divergence; that of the sorted rest is ``1 - it``. Null
            takes the share of the teacher's tokens that are matched (TRL).
    """

    pairs: Pairs = "chunk"
    beta: float = 0.5
    matched_weight: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name in ("beta", "matched_weight"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], not {value}")

    @cached_property
    def _matched(self) -> tuple[Tensor, Tensor]:
        """The ids of the tokens that both vocabularies have, the student's and the teacher's."""
        return matched_ids(self.family.spellings(), self.family.spellings(reader="teacher"))

    def _distance(self, ours: Tensor, theirs: Tensor, later: Tensor, others: Tensor) -> Tensor:
        student, teacher = self._distributions(ours, theirs, later, others)
        return gold(student, teacher, self._matched, beta=self.beta, share=self.matched_weight)

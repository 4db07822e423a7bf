"""What methods share that can compare how two sides rank their most likely tokens (DBiLD)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffdistill.dbild import Leaders, dbild
from diffdistill.method import Method
from diffdistill.projection import Prediction


@dataclass(kw_only=True)
class Ranking(Method):
    """Options of DBiLD (Switch-KD, arXiv:2604.14629); not a method by itself.

    Attributes:
        curve: Of ``dbild``: on the curve of so many most likely tokens' logits it is looked for how
            many of them lead (ours: the paper's range is unconfirmed).
        fewest_leaders: Of ``dbild``: at least so many tokens lead, 3 or more.
        most_leaders: Of ``dbild``: at most so many; k of them are k (k - 1) / 2 pairs (ours).
        pair_divergence: Of ``dbild``: ``reverse-kl`` is KL(student || teacher) over the pairs
            (paper); ``forward-kl`` is BiLD's.
    """

    curve: int = 128
    fewest_leaders: int = 3
    most_leaders: int = 32
    pair_divergence: Literal["reverse-kl", "forward-kl"] = "reverse-kl"

    def __post_init__(self) -> None:
        """Check the options."""
        self._leaders()

    def check_ranked(self, divergence: str) -> None:
        """Refuse options of DBiLD beside another divergence, where they would have no say.

        Raises:
            ValueError: If one is not as by default.
        """
        for name in ("curve", "fewest_leaders", "most_leaders", "pair_divergence"):
            usual = getattr(Ranking, name)
            if divergence != "dbild" and getattr(self, name) != usual:
                raise ValueError(
                    f"{name} is for divergence: dbild, not {divergence}: leave it {usual}"
                )

    def ranked(
        self, student: Prediction, teacher: Prediction, mask: Tensor, temperature: float
    ) -> dict[str, Tensor]:
        """Return the maps of ``dbild.dbild`` at the tokens that a mask ``[B, A]`` chooses."""
        return dbild(
            student,
            teacher,
            leaders=self._leaders(),
            divergence=self.pair_divergence,
            temperature=temperature,
            mask=mask,
        )

    def _leaders(self) -> Leaders:
        return Leaders(self.curve, self.fewest_leaders, self.most_leaders)

"""How close two models are at the tokens of an answer."""

import torch
from torch import Tensor

from diffdistill.projection import Prediction, token_maps, vocabulary
from diffdistill.supports import truncated_divergence


@torch.no_grad()
def closeness_maps(
    student: Prediction,
    teacher: Prediction,
    k: int,
    *,
    mask: Tensor,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return the maps ``[B, A]`` overlap, reverse_kl and forward_kl, 0 outside of the mask.

    ``overlap`` is the share of the teacher's k most likely tokens that are among the student's
    (CoPD, arXiv:2604.27083: k is 10), ``reverse_kl`` is KL(student || teacher).

    Args:
        student: One side.
        teacher: The other.
        k: Most likely tokens; at most those there are.
        mask: The tokens, bool ``[B, A]``.
        temperature: Logits of both sides are divided by it.
    """
    on_top = truncated_divergence(
        student,
        teacher,
        divergence="forward-kl",
        support="teacher",
        k=min(k, vocabulary(teacher)),
        correction="tail",
        mask=mask,
        temperature=temperature,
    )
    maps = token_maps(
        student, teacher, ["reverse-kl", "forward-kl"], mask=mask, temperature=temperature
    )
    return {
        "overlap": on_top["overlap"],
        "reverse_kl": maps["reverse-kl"],
        "forward_kl": maps["forward-kl"],
    }

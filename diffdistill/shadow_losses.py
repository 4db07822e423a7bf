"""What a shadow learns so that it can stand alone (ShadowPEFT, equations 8 and 9)."""

import torch
from torch import Tensor

from diffdistill.projection import Prediction, token_logprob, token_maps
from diffdistill.shadow import ShadowSettings
from diffdistill.types import Condition, State


def auxiliary_loss(
    settings: ShadowSettings,
    by_itself: Prediction,
    attached: Prediction,
    state: State,
    condition: Condition,
) -> tuple[Tensor, int]:
    """Return the weighted auxiliary loss, a scalar: a sum over the tokens that count; and how many.

    Of masked diffusion, the tokens are those of the clean text.

    Args:
        settings: Which loss, and its weight.
        by_itself: What the shadow predicts alone, from its first state.
        attached: What it predicts with its base; a constant here.
        state: Where both were asked.
        condition: What they were told.
    """
    mask = state.mask if state.mask is not None else torch.ones_like(state.x, dtype=torch.bool)
    if settings.auxiliary == "tokens":
        tokens = condition.get("clean", state.x)
        errors = -token_logprob(by_itself, tokens, mask=mask)
    else:
        maps = token_maps(by_itself, attached, ("forward-kl",), mask=mask)
        errors = maps["forward-kl"]
    return settings.auxiliary_weight * errors.sum(), int(mask.sum())

"""How much an answer repeats itself, the first sign of a collapse."""

import torch
from torch import Tensor


@torch.no_grad()
def repeated_ngrams(tokens: Tensor, mask: Tensor, size: int = 3) -> Tensor:
    """Return where the last ``size`` tokens were seen before in the answer, bool ``[B, A]``.

    The measure of "The Many Faces of On-Policy Distillation" (arXiv:2605.11182), from its code:
    a token counts if the n-gram that ends with it has ended earlier; the two may overlap.

    Args:
        tokens: Token ids ``[B, A]``.
        mask: bool ``[B, A]``: the tokens of the answers. No n-gram reaches across a hole.
        size: Tokens of an n-gram.
    """
    found = torch.zeros_like(mask)
    ends = _ngram_ends(mask, size)
    rows, places = ends.nonzero(as_tuple=True)
    ngrams = [tokens[rows, places - back] for back in range(size)]
    kinds = torch.stack([rows, *ngrams], 1).unique(dim=0, return_inverse=True)[1]
    first = torch.full_like(kinds, tokens.shape[1]).scatter_reduce(0, kinds, places, "amin")
    found[rows, places] = places > first[kinds]
    return found


@torch.no_grad()
def repetition(tokens: Tensor, mask: Tensor, size: int = 3) -> Tensor:
    """Return the share of repeated n-grams among those of each answer, ``[B]``; 0 if it has none.

    What the paper's figures are shares of is unconfirmed; that it is n-grams is ours.
    """
    repeated = repeated_ngrams(tokens, mask, size).sum(1)
    return repeated / _ngram_ends(mask, size).sum(1).clamp(min=1)


def _ngram_ends(mask: Tensor, size: int) -> Tensor:
    """Return the tokens that ``size - 1`` tokens come right before, bool ``[B, A]``."""
    ends = mask.clone()
    for back in range(1, size):
        ends[:, back:] &= mask[:, :-back]
        ends[:, :back] = False
    return ends

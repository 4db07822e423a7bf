"""Chunks of tokens as tensors: masks and log-likelihoods, by chunk and by token.

A chunk is a run of tokens that spells the same bytes as a run of the other side's; ``chunks``
holds its number for each token, ``[B, L]``, -1 for none. N is the number of chunks of the batch.
"""

import torch
from torch import Tensor


def num_chunks(*sides: Tensor) -> int:
    """Return N: one more than the largest number in the chunks ``[B, L]`` of all sides."""
    return max(int(chunks.max()) + 1 if chunks.numel() else 0 for chunks in sides)


def chunk_sums(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Return the sum ``[B, N]`` over each chunk of ``values`` ``[B, L]``, float32.

    Of token log-likelihoods it is the chunk's: eq. 8 of TIDE (arXiv:2604.26951).
    """
    total = values.new_zeros((len(values), count + 1), dtype=torch.float32)
    index = torch.where(chunks < 0, count, chunks)
    return total.scatter_add(1, index, values.float())[:, :count]


def touched(mask: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Return the chunks, bool ``[B, N]``, with a token in ``mask`` ``[B, L]``."""
    return chunk_sums(mask.float(), chunks, count) > 0


def tokens_of(chosen: Tensor, chunks: Tensor) -> Tensor:
    """Return the tokens, bool ``[B, L]``, of the chunks ``chosen`` ``[B, N]``."""
    padded = torch.nn.functional.pad(chosen, (0, 1))  # what -1 leads to
    return padded.gather(1, torch.where(chunks < 0, chosen.shape[1], chunks))


def sizes(chunks: Tensor, count: int) -> Tensor:
    """Return the number of tokens in each chunk, float32 ``[B, N]``."""
    return chunk_sums(torch.ones_like(chunks), chunks, count)


def select_whole(allowed: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Return the chunks, bool ``[B, N]``, with tokens and none outside ``allowed`` ``[B, L]``."""
    return (sizes(chunks, count) > 0) & ~touched(~allowed, chunks, count)


def first_tokens(chunks: Tensor, count: int) -> Tensor:
    """Return the index, int64 ``[B, N]``, of the first token of each chunk; 0 where it has none."""
    length = chunks.shape[1]
    index = torch.where(chunks < 0, count, chunks)
    places = torch.arange(length, device=chunks.device).expand_as(chunks)
    first = places.new_full((len(chunks), count + 1), length)
    first = first.scatter_reduce(1, index, places, "amin")[:, :count]
    return torch.where(first == length, 0, first)

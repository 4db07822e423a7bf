"""Where in a clip a reward is sensitive, as weights of a loss map with mean one.

The rules are those of Stream-R1's published code (arXiv:2605.03849); the paper's text was not
available to us. Saliency is ``[B, F, H, W]``, not negative; every sample is treated alone.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

TimeMap = Literal["exact", "interpolate"]

FLAT = 1e-6
"""A range below this share of the largest value is no range. The reference code's 1e-8 is absolute,
and takes the small gradients of a mean over many pixels for none."""


def on_latents(
    saliency: Tensor, shape: tuple[int, int, int], *, num_frames: int, time_map: TimeMap
) -> Tensor:
    """Return saliency ``[B, F, h, w]`` on the latents' grid, of ``[B, T', H', W']``.

    Args:
        saliency: On the reward's own cells; a cell covers ``num_frames // T'`` frames.
        shape: ``(F, h, w)`` of the latents.
        num_frames: Pixel frames ``T`` of the clip.
        time_map: ``exact`` follows the video autoencoder: frame 0 is latent 0, and each later
            latent is the mean of its group of frames. ``interpolate`` is the reference code's
            trilinear resizing, which is off by up to one latent frame.
    """
    frames, height, width = shape
    if time_map == "interpolate":
        return interpolate(saliency[:, None], shape, mode="trilinear", align_corners=False)[:, 0]
    cells = saliency.shape[1]
    frame = torch.arange(num_frames, device=saliency.device)
    each = saliency[:, (frame // max(num_frames // cells, 1)).clamp(max=cells - 1)]
    if frames > 1:
        groups = each[:, 1:].unflatten(1, (frames - 1, -1)).mean(dim=2)
        each = torch.cat([each[:, :1], groups], dim=1)
    return interpolate(each, (height, width), mode="bilinear", antialias=True)


def stretched(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return ``values`` with their range over ``dims`` brought to [0, 1]; 1 where it is flat."""
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    span = high - low
    flat = span <= FLAT * high
    return torch.where(flat, 1.0, (values - low) / torch.where(flat, 1.0, span))


def over_time(saliency: Tensor, *, strength: float, floor: float) -> Tensor:
    """Return one weight per frame, ``[B, F, 1, 1]``, of mean one.

    ``clamp((1 - s) + s u, min=floor)`` with u the frame means, stretched to [0, 1].
    """
    frames = stretched(saliency.mean(dim=(2, 3), keepdim=True), (1,))
    weight = ((1.0 - strength) + strength * frames).clamp(min=floor)
    return weight / weight.mean(dim=1, keepdim=True)


def over_space(saliency: Tensor, *, strength: float, floor: float) -> Tensor:
    """Return weights ``[B, F, H, W]`` whose mean over each frame is one."""
    places = stretched(saliency, (2, 3))
    weight = ((1.0 - strength) + strength * places).clamp(min=floor)
    return weight / weight.mean(dim=(2, 3), keepdim=True)


def factored(
    saliency: Tensor,
    *,
    time_strength: float,
    space_strength: float,
    time_floor: float,
    space_floor: float,
) -> Tensor:
    """Return the product of the weights over time and over space, ``[B, F, H, W]``, mean one."""
    weight = over_time(saliency, strength=time_strength, floor=time_floor) * over_space(
        saliency, strength=space_strength, floor=space_floor
    )
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


def joint(saliency: Tensor, *, strength: float, floor: float) -> Tensor:
    """Return weights ``[B, F, H, W]`` of mean one from the range over the whole clip.

    The reference code's form without temporal factoring (its floor is 0.5 there).
    """
    places = stretched(saliency, (1, 2, 3))
    weight = ((1.0 - strength) + strength * places).clamp(min=floor)
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)

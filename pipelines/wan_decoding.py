"""Wan's video decoder, block after block, with the memory that its causal convolutions need."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor


class StreamingDecoder:
    """Decodes consecutive latents to the pixels that decoding all of them at once would give.

    diffusers' ``decode`` walks over the latent frames with a list of remembered features, which
    it forgets at the end; here it is kept between calls. There is no tiling.

    Args:
        vae: An ``AutoencoderKLWan``.
        mean: Mean of its latents, ``[1, C, 1, 1, 1]``.
        std: Their standard deviation.
    """

    def __init__(self, vae: Any, mean: Tensor, std: Tensor) -> None:
        self.vae = vae
        self.mean = mean
        self.std = std
        self.begun = False
        vae.clear_cache()
        self.remembered = [None] * len(vae._feat_map)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Return pixels ``[B, T, 3, H, W]`` in [0, 1] of the next latents ``[B, C, F, h, w]``."""
        vae = self.vae
        x = vae.post_quant_conv((latents * self.std + self.mean).to(vae.dtype))
        parts = []
        for frame in x.split(1, dim=2):
            first = {} if self.begun else {"first_chunk": True}
            part = vae.decoder(frame, feat_cache=self.remembered, feat_idx=[0], **first)
            parts.append(part)
            self.begun = True
        pixels = torch.cat(parts, dim=2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return (pixels.float().movedim(2, 1) * 0.5 + 0.5).clamp(0.0, 1.0)

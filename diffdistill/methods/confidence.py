"""Confidence-aware training: a masked-diffusion language model that dares to settle many tokens.

Denoising, and an entropy penalty on the tokens that are predicted right already: those become
certain, so that a sampler with a confidence threshold settles more of them in each step. The loss
of diffusers' training example of LLaDA2 and of d3LLM (arXiv:2601.07568). There is no teacher.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.choices import best_tokens
from diffdistill.divergences import masked_mean
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.noising import MaskNoise, mask_rate
from diffdistill.projection import Prediction, at, cross_entropy, token_maps
from diffdistill.texts import Text, TextFamily, TextModel
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class Confidence(Method):
    """Denoise, and lower the entropy of predictions that are right.

    Hidden tokens count alike, without the ``1 / t`` of the likelihood bound.

    Attributes:
        family: The family of text models.
        draws: The random numbers of the run.
        student: The model to train.
        confidence_weight: Weight of the entropy; ``lambda_conf`` of diffusers, 2 in its example
            and in d3LLM. 0 is denoising alone.
        temperature: Divides the logits in the entropy alone; 0.5 in diffusers' example and in
            d3LLM.
        normalizer: The entropy is a mean over the tokens that are ``right`` in the micro-batch at
            hand (diffusers), or its sum over them is divided by all ``hidden`` tokens (ours: the
            same in any micro-batch).
        complementary: Show the text a second time, with the other half hidden: every maskable
            token is learned once (diffusers' ``add_noise``, d3LLM). They add the two means;
            here all tokens count alike.
        levels: Whether each ``block`` has a noise level of its own (diffusers) or the whole
            ``sequence`` one.
        t_low: Smallest noise level.
        t_high: Largest noise level; d3LLM raises its from 0 to 0.8 while it trains, which is not
            done here.
    """

    roles: ClassVar = {"student": {"weights": "trained"}}
    texts: ClassVar = True

    family: TextFamily
    draws: Draws
    student: TextModel
    confidence_weight: float = 2.0
    temperature: float = 0.5
    normalizer: Literal["right", "hidden"] = "right"
    complementary: bool = False
    levels: Literal["block", "sequence"] = "block"
    t_low: float = 1e-3
    t_high: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0.0 < self.t_low <= self.t_high <= 1.0:
            raise ValueError("t_low and t_high must be 0 < t_low <= t_high <= 1")

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield the loss of each view of the text, a mean over its hidden tokens."""
        text, format_ = self.family.text(batch), self.family.format()
        noise = MaskNoise(
            mask_id=format_.mask_id,
            block=format_.block if self.levels == "block" else None,
            low=self.t_low,
            high=self.t_high,
            length=format_.length,
        )
        noised = noise(text.tokens, text.maskable, self.draws, batch["ids"])
        t = noised.t.mean(dim=1)
        if not self.complementary:
            yield self._loss(batch, text, noised.masked, t)
            return
        yield self._loss(batch, text, noised.masked, t, more=True)
        yield self._loss(batch, text, text.maskable & ~noised.masked, 1.0 - t)

    def _loss(
        self, batch: Batch, text: Text, mask: Tensor, t: Tensor, *, more: bool = False
    ) -> Loss:
        """Return the loss of one view, of which ``mask`` is hidden."""
        state = self.family.noised(batch, t, mask)
        prediction = at(self.student(state, self.family.condition(batch)), mask)
        tokens = text.tokens[mask]
        errors = cross_entropy(prediction, tokens)
        denoising = masked_mean(errors, torch.ones_like(errors, dtype=torch.bool))
        right = best_tokens(prediction) == tokens
        entropy = self._entropy(prediction, right)
        metrics = {
            "denoising": denoising.detach(),
            "entropy": entropy.detach(),
            "right": right.sum() / max(len(right), 1),
            "noise_level": t.mean(),
            "mask_rate": mask_rate(mask, text.maskable),
        }
        value = denoising + self.confidence_weight * entropy
        return Loss("student", value, max(len(errors), 1), more=more, metrics=metrics)

    def _entropy(self, prediction: Prediction, right: Tensor) -> Tensor:
        """Return the entropy of the right predictions ``[K, V]``, a scalar."""
        maps = token_maps(prediction, None, ["entropy"], mask=right, temperature=self.temperature)
        if self.normalizer == "right":
            return masked_mean(maps["entropy"], right)
        return maps["entropy"].sum() / max(len(right), 1)

"""BD3LM: training a masked-diffusion language model by its likelihood bound (arXiv:2503.09573).

The student sees a text with some of it hidden, in blocks or throughout, and predicts what is
hidden. There is no teacher: it is how students are pre-trained and tuned before distillation, and
the denoising term of ``tide`` with the refinements that its code leaves out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.divergences import masked_mean
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.noising import (
    MaskNoise,
    NelboWeight,
    NoisedTokens,
    mask_rate,
    nelbo_weight,
    per_token,
    span_sums,
)
from diffdistill.projection import cross_entropy
from diffdistill.texts import Text, TextFamily, TextModel
from diffdistill.types import Batch, Loss, Progress

Interval = tuple[float, float]

BOUND: Interval = (1e-3, 1.0)
"""The noise levels over which the weighted loss is the bound that papers report."""


@dataclass(kw_only=True)
class BD3LM(Method):
    """Denoise, weighted so that the loss bounds the negative log-likelihood.

    With the defaults it is the NELBO of each token in nats (``denoising``). Of a ``mdlm`` student
    it is MDLM's and LLaDA's objective.

    Attributes:
        family: The family of text models.
        draws: The random numbers of the run.
        student: The model to train.
        levels: Whether each ``block`` has a noise level of its own (BD3LM, bd3lms) or the whole
            ``sequence`` one (MDLM, LLaDA, and dllm also for block diffusion).
        stratify: Samples over whose levels these are spread evenly (antithetic sampling), usually
            those of an optimizer step; 1 spreads them over the blocks of a sample, 0 draws each
            alone.
        t_low: Lower end of the noise levels; 1e-3 in bd3lms and dllm.
        t_high: Upper end. A narrower interval than (1e-3, 1) has gradients of less variance and is
            no bound any more (section 4 of the paper).
        resample: Hide a block again where the share of hidden tokens came out outside of the
            interval (``training.resample`` of bd3lms).
        weight: ``nelbo`` weighs a hidden token with ``1 / t``; ``uniform`` with 1, which bd3lms
            takes where the interval starts above 0.5.
        search_every: Steps between searches for the interval with the least variance of the loss,
            on the batches of that step (bd3lms searches at each validation). Null keeps ``t_low``
            and ``t_high``.
        search_widths: The widths of the intervals that are tried (bd3lms).
        search_stride: Distance between their lower ends (bd3lms).
    """

    roles: ClassVar = {"student": {"weights": "trained"}}
    texts: ClassVar = True

    family: TextFamily
    draws: Draws
    student: TextModel
    levels: Literal["block", "sequence"] = "block"
    stratify: int = 1
    t_low: float = BOUND[0]
    t_high: float = BOUND[1]
    resample: bool = False
    weight: NelboWeight = "nelbo"
    search_every: int | None = None
    search_widths: list[float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9])
    search_stride: float = 0.05

    def __post_init__(self) -> None:
        """Check the options; start with the interval that they give."""
        self._noise((self.t_low, self.t_high))
        if self.stratify < 0:
            raise ValueError(f"stratify must be at least 0, not {self.stratify}")
        if self.search_stride <= 0 or not all(0 < width < 1 for width in self.search_widths):
            raise ValueError("search_stride must be above 0, and search_widths in (0, 1)")
        self.interval: Interval = (self.t_low, self.t_high)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield the denoising loss, a mean over all maskable tokens."""
        text = self.family.text(batch)
        noised = self._noised(batch, text, self.interval, "mask")
        weighted = self._errors(batch, text, noised)
        value = masked_mean(weighted, text.maskable)
        metrics: dict[str, Tensor | float] = {
            "denoising": value.detach(),
            "noise_level": noised.t.mean(),
            "mask_rate": mask_rate(noised.masked, text.maskable),
        }
        if self.interval == BOUND and self.weight == "nelbo" and not self.resample:
            metrics["nll_bound"] = value.detach()
        if self.search_every is not None:
            metrics |= {"t_low": self.interval[0], "t_high": self.interval[1]}
            if progress.step % self.search_every == 0:
                metrics |= self._moments(batch, text)
        yield Loss("student", value, max(int(text.maskable.sum()), 1), metrics=metrics)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take the interval of least variance, after a step that searched."""
        variances = {}
        for interval in self._candidates():
            name = _label(interval)
            first, second = (metrics.get(f"{name}{part}/student") for part in ("", "^2"))
            if first is not None and second is not None:
                variances[interval] = second - first**2
        if variances:
            self.interval = min(variances, key=variances.__getitem__)

    def state(self) -> dict[str, Any]:
        """Return the interval."""
        return {"interval": list(self.interval)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the interval."""
        low, high = state["interval"]
        self.interval = (low, high)

    def _noise(self, interval: Interval) -> MaskNoise:
        format_ = self.family.format()
        return MaskNoise(
            mask_id=format_.mask_id,
            block=self._span(),
            low=interval[0],
            high=interval[1],
            stratify=self.stratify,
            resample=self.resample,
            length=format_.length,
        )

    def _span(self) -> int | None:
        """Return how many tokens share a noise level; None is the whole sequence."""
        return self.family.format().block if self.levels == "block" else None

    def _noised(self, batch: Batch, text: Text, interval: Interval, purpose: str) -> NoisedTokens:
        noise = self._noise(interval)
        return noise(text.tokens, text.maskable, self.draws, batch["ids"], purpose=purpose)

    def _errors(self, batch: Batch, text: Text, noised: NoisedTokens) -> Tensor:
        """Return the weighted cross-entropy of each hidden token, ``[B, L]``; 0 elsewhere."""
        state = self.family.noised(batch, noised.t.mean(dim=1), noised.masked)
        prediction = self.student(state, self.family.condition(batch))
        errors = cross_entropy(prediction, text.tokens, mask=noised.masked)
        weight = nelbo_weight(noised.t, self.weight)
        return errors * per_token(weight, text.tokens.shape[1], self._span())

    @torch.no_grad()
    def _moments(self, batch: Batch, text: Text) -> dict[str, Tensor | float]:
        """Return mean and mean square, over spans, of the loss at each candidate interval."""
        counts = span_sums(text.maskable, self._span())
        found: dict[str, Tensor | float] = {}
        for interval in self._candidates():
            noised = self._noised(batch, text, interval, f"search/{_label(interval)}")
            sums = span_sums(self._errors(batch, text, noised), self._span())
            means = sums / counts.clamp(min=1)
            found[_label(interval)] = masked_mean(means, mask=counts > 0)
            found[f"{_label(interval)}^2"] = masked_mean(means.square(), mask=counts > 0)
        return found

    def _candidates(self) -> list[Interval]:
        """Return the intervals to try: all widths at all places, and the whole."""
        found = [BOUND]
        for width in self.search_widths:
            places = int((1.0 - width) / self.search_stride + 1e-6) + 1
            lows = [number * self.search_stride for number in range(places)]
            found += [(max(round(low, 4), BOUND[0]), round(low + width, 4)) for low in lows]
        return found


def _label(interval: Interval) -> str:
    return f"search/{interval[0]:g}-{interval[1]:g}"

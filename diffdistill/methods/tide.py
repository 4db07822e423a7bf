"""TIDE: distilling a diffusion language model from another architecture (arXiv:2604.26951).

The student sees a text with some of it hidden. The teacher, which may have another tokenizer, sees
the same places hidden; or, with CompDemo, each half of them in turn while it is shown the other.
They are compared on the chunks of text that both spell: on the likelihood of each chunk, or, where
they share a vocabulary, on the prediction of each token. The denoising loss is always added.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from diffdistill.chunks import (
    chunk_sums,
    first_tokens,
    sizes,
    tokens_of,
)
from diffdistill.divergences import (
    calm,
    chunk_clamped,
    chunk_probability,
    masked_mean,
    reverse_binary_kl,
    reverse_calm,
    tidal_probability,
)
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.hiding import (
    Hidden,
    chunk_counts,
    chunk_share,
    denoising,
    described,
    hide,
    usable_chunks,
)
from diffdistill.method import Method
from diffdistill.projection import (
    Prediction,
    at,
    prediction_rows,
    token_logprob,
    token_maps,
    vocabulary,
    with_rows,
    without,
)
from diffdistill.schedules import TidalGrowth, tidal_rate
from diffdistill.texts import Text, TextFamily, TextModel
from diffdistill.types import Batch, Loss, Progress
from diffdistill.views import complementary, merged
from diffdistill.weights import NoiseWeight, noise_weight

ChunkLoss = Literal["calm", "reverse-calm", "reverse-binary-kl"]
TokenLoss = Literal["forward-kl", "reverse-kl"]
Tidal = Literal["none", "both", "training", "noise"]

CHUNK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "calm": calm,
    "reverse-calm": reverse_calm,
    "reverse-binary-kl": reverse_binary_kl,
}


class Preset(NamedTuple):
    """What a variant of the paper sets where no option is given."""

    divergence: ChunkLoss | TokenLoss
    tidal: Tidal
    exposure: float
    weight: NoiseWeight


PRESETS = {
    "cross": Preset("reverse-calm", "none", 0.0, "uniform"),
    "shared": Preset("forward-kl", "both", 0.5, "midrange"),
    "calm-tidal": Preset("calm", "both", 0.5, "uniform"),
}


@dataclass(kw_only=True)
class Tide(Method):
    """Denoise, and match a teacher of another architecture on what is hidden.

    Options say where their values come from: the paper, its code, or neither (unconfirmed).
    ``divergence``, ``tidal``, ``exposure`` and ``weight`` follow the variant where they are null:
    set them for the ablations. Plain distillation is ``shared`` with tidal none and exposure 0,
    forward CALM is ``cross`` with divergence calm.

    Attributes:
        family: The family of text models.
        draws: The random numbers of the run.
        student: The model to train.
        teacher: The frozen model; it reads its own tokens.
        variant: ``cross`` is TIDE-Cross: Reverse CALM on chunks, any two tokenizers. ``shared`` is
            TIDE-Shared: TIDAL and CompDemo over forward KL, for one vocabulary. ``calm-tidal`` is
            TIDE-Shared for two tokenizers: TIDAL and CompDemo over forward CALM. (Paper.)
        divergence: On chunks ``calm``, ``reverse-calm`` (as published: linear in the student's
            probability) or ``reverse-binary-kl`` (the divergence that the paper says it is; ours);
            on tokens ``forward-kl`` or ``reverse-kl`` (paper).
        tidal: Axes along which the target moves from student to teacher: ``both``, ``training``
            or ``noise`` alone (the paper's ablations), or ``none``: the target is the teacher. The
            paper advises against it with reverse-calm.
        exposure: CompDemo's rho, the share of the hidden chunks that the teacher's first pass is
            shown; 0.5 in the paper. 0 or 1 is one pass that is shown none.
        passes: ``two`` calls of the teacher, one after the other (code), or one call on a
            ``doubled`` batch (ours; the same numbers, more memory).
        weight: Factor of the distillation error by noise level: ``midrange`` for tokens (paper),
            ``uniform`` for chunks (code).
        temperature: Of token predictions, 2 in the paper; of chunk likelihoods, unconfirmed: the
            paper gives none, its code 2, its launch script 5, ALM's own code 100.
        distillation_weight: Weight of the distillation term; 1 in the code, the paper gives none.
        rate_start: TIDAL's rate at the start of training (paper).
        rate_end: TIDAL's rate at the end, and that of ``noise`` throughout (paper).
        rate_growth: How the rate rises in between: ``cosine`` (paper) or ``linear`` (code).
        t_low: Smallest noise level (code). One level for each sequence, uniform from here to 1.
        shared_vocabulary: With variant ``shared``, how many ids from 0 on are the same token on
            both sides: 151646 for Qwen3 and WeDLM (code). Null takes the smaller vocabulary.
    """

    roles: ClassVar = {"student": {"weights": "trained"}, "teacher": {"weights": "frozen"}}
    texts: ClassVar = True

    family: TextFamily
    draws: Draws
    student: TextModel
    teacher: TextModel
    variant: Literal["cross", "shared", "calm-tidal"] = "cross"
    divergence: ChunkLoss | TokenLoss | None = None
    tidal: Tidal | None = None
    exposure: float | None = None
    passes: Literal["two", "doubled"] = "two"
    weight: NoiseWeight | None = None
    temperature: float = 2.0
    distillation_weight: float = 1.0
    rate_start: float = 0.1
    rate_end: float = 0.9
    rate_growth: TidalGrowth = "cosine"
    t_low: float = 1e-3
    shared_vocabulary: int | None = None

    def __post_init__(self) -> None:
        """Fill in what the variant sets, and check that the divergence suits it."""
        given = {name: getattr(self, name) for name in Preset._fields}
        chosen = {name: value for name, value in given.items() if value is not None}
        self._chosen = PRESETS[self.variant]._replace(**chosen)
        known = get_args(TokenLoss) if self.variant == "shared" else tuple(CHUNK_LOSSES)
        if self._chosen.divergence not in known:
            raise ValueError(
                f"variant {self.variant} has no divergence {self._chosen.divergence}; "
                f"it has {', '.join(known)}"
            )
        for name, fine, bounds in (
            ("exposure", 0 <= self._chosen.exposure <= 1, "in [0, 1]"),
            ("temperature", self.temperature > 0, "above 0"),
            ("t_low", 0 < self.t_low < 1, "in (0, 1)"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {bounds}, not {getattr(self, name)}")

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: denoising, and distillation on the hidden chunks.

        Denoising is a mean over all maskable tokens, distillation over the active chunks, both of
        the optimizer step.
        """
        text = self.family.text(batch)
        answer = self.family.text(batch, reader="teacher")
        hidden = self._hide(batch, text, answer)
        state = self.family.noised(batch, hidden.t, hidden.mask)
        prediction = self.student(state, self.family.condition(batch))
        logprobs = token_logprob(prediction, text.tokens, mask=hidden.mask)  # [B, L]
        denoised = denoising(logprobs, text, hidden.t)
        ours = self._read(prediction, logprobs, text, hidden.active)
        theirs = self._judge(batch, answer, hidden)
        rows = hidden.active.nonzero()[:, 0]  # the sample of each active chunk
        error = self._error(ours, theirs, hidden.t[rows], progress)  # [K]
        distillation = masked_mean(
            error,
            torch.ones_like(error, dtype=torch.bool),
            noise_weight(hidden.t, self._chosen.weight)[rows],
        )
        distillation = distillation * chunk_share(chunk_counts(text, hidden), progress.counts)
        count = int(text.maskable.sum())
        metrics = described(text, hidden, denoising=denoised, distillation=distillation)
        if self.variant != "shared":
            clamped = chunk_clamped(prediction_rows(ours), self.temperature)
            metrics["clamp_share"] = clamped.sum() / max(len(clamped), 1)
        value = denoised + self.distillation_weight * distillation
        yield Loss("student", value, max(count, 1), metrics=metrics)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the active chunks and the maskable tokens of a batch."""
        text = self.family.text(batch)
        answer = self.family.text(batch, reader="teacher")
        return chunk_counts(text, self._hide(batch, text, answer))

    def _hide(self, batch: Batch, text: Text, answer: Text) -> Hidden:
        """Return what is hidden; of one vocabulary the chunks are pairs of single tokens."""
        usable = usable_chunks(text, answer)
        if self.variant == "shared":
            for side in (text, answer):
                usable &= sizes(side.chunks, usable.shape[1]) == 1
            self._check_shared(text, answer, usable)
        return hide(self.draws, batch["ids"], text, usable, t_low=self.t_low)

    def _judge(self, batch: Batch, answer: Text, hidden: Hidden) -> Prediction:
        """Return what the teacher makes of each active chunk, as ``_read`` does."""
        active, exposure = hidden.active, self._chosen.exposure
        with torch.no_grad():
            if exposure in {0.0, 1.0}:
                return self._pass(batch, answer, hidden, [active])[0]
            numbers = self.draws.uniform("reveal", batch["ids"], active.shape[1:])
            halves = complementary(active, numbers, exposure)
            if self.passes == "doubled":
                first, second = self._pass(batch, answer, hidden, halves)
            else:
                first, second = (self._pass(batch, answer, hidden, [half])[0] for half in halves)
            rows = prediction_rows(first), prediction_rows(second)
            return with_rows(first, merged(*rows, halves[1][active]))

    def _pass(
        self, batch: Batch, answer: Text, hidden: Hidden, parts: Sequence[Tensor]
    ) -> list[Prediction]:
        """Return the teacher's reading of all active chunks while it is shown all but a part."""
        masks = [tokens_of(part, answer.chunks) for part in parts]
        t = hidden.t.repeat(len(parts))
        state = self.family.noised(batch, t, torch.cat(masks), reader="teacher")
        condition = self.family.condition(batch, reader="teacher", copies=len(parts))
        found = self.teacher(state, condition)
        readings = []
        for rows, mask in zip(prediction_rows(found).chunk(len(parts)), masks, strict=True):
            prediction = with_rows(found, rows)
            logprobs = torch.zeros(())  # not asked for
            if self.variant != "shared":
                logprobs = token_logprob(prediction, answer.tokens, mask=mask)
            readings.append(self._read(prediction, logprobs, answer, hidden.active))
        return readings

    def _read(
        self, prediction: Prediction, logprobs: Tensor, text: Text, active: Tensor
    ) -> Prediction:
        """Return the log-likelihood ``[K]`` of each active chunk, or its token's prediction."""
        count = active.shape[1]
        if self.variant != "shared":
            return chunk_sums(logprobs, text.chunks, count)[active]
        rows = active.nonzero()[:, 0]
        single = at(prediction, (rows, first_tokens(text.chunks, count)[active]))  # [K, V]
        readers = self.family.format(), self.family.format(reader="teacher")
        masks = {reader.mask_id for reader in readers}  # impossible to one side, so to both
        return without(single, [mask for mask in masks if mask < vocabulary(single)])

    def _error(self, ours: Prediction, theirs: Prediction, t: Tensor, progress: Progress) -> Tensor:
        """Return the map ``[K]`` of how far the student is from its target."""
        rate = None
        if self._chosen.tidal != "none":
            rate = tidal_rate(
                progress.fraction,
                t,
                start=self.rate_start,
                end=self.rate_end,
                axes=self._chosen.tidal,
                growth=self.rate_growth,
            )
        divergence = self._chosen.divergence
        if self.variant == "shared":
            kind = cast("TokenLoss", divergence)
            size = self.shared_vocabulary or min(vocabulary(ours), vocabulary(theirs))
            maps = token_maps(
                ours, theirs, [kind], temperature=self.temperature, share=rate, shared=size
            )
            return self.temperature**2 * maps[kind]
        student, teacher = (
            chunk_probability(prediction_rows(x), self.temperature) for x in (ours, theirs)
        )
        target = teacher if rate is None else tidal_probability(student, teacher, rate)
        return CHUNK_LOSSES[divergence](student, target)

    def _check_shared(self, text: Text, answer: Text, usable: Tensor) -> None:
        """Refuse pairs of tokens with two ids."""
        count = usable.shape[1]
        ours, theirs = (
            side.tokens.gather(1, first_tokens(side.chunks, count))[usable]
            for side in (text, answer)
        )
        if (differing := (ours != theirs).nonzero()).numel():
            first = int(differing[0])
            raise UserError(
                f"variant shared needs one vocabulary: the student's token {int(ours[first])} is "
                f"the teacher's {int(theirs[first])}; use variant cross or calm-tidal"
            )

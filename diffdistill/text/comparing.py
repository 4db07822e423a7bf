"""What on-policy distillation of language models shares: a teacher reads what a student answers.

Both models are asked for their prediction of every token of the student's answers, each under its
own condition, and the predictions are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.estimators import log_ratio, policy_gradient_map
from diffdistill.policy import discounted, informed_weights
from diffdistill.projection import Prediction, TokenMap, token_maps
from diffdistill.supports import Correction, Support, TopK, truncated_divergence
from diffdistill.text.answering import Attempt, mean_loss
from diffdistill.text.ranking import Ranking
from diffdistill.text.selecting import Selecting
from diffdistill.types import Loss, Progress

Divergence = Literal["forward-kl", "reverse-kl", "jsd", "sampled", "dbild"]
LOGGED: tuple[TokenMap, ...] = ("entropy", "teacher-entropy")
"""Maps that tell how training goes, from the pass that the divergence takes."""


@dataclass(kw_only=True)
class Comparing(Selecting, Ranking):
    """Compares student and teacher at the tokens of the student's answers.

    Attributes:
        divergence: ``forward-kl`` is KL(teacher || student), ``reverse-kl`` KL(student ||
            teacher), ``jsd`` the generalized Jensen-Shannon divergence (GKD, arXiv:2306.13649).
            ``sampled`` takes log(teacher / student) of the sampled token as a reward (Thinking
            Machines): the reverse KL's gradient in expectation, from one token. ``dbild`` compares
            how far apart the most likely tokens' logits are (Switch-KD, arXiv:2604.14629).
        baseline: Of ``sampled``: subtract the reward that the student expects at each token, which
            is minus the reverse KL (ours; the same expectation, less noise). A server's teacher
            has none.
        importance_clip: Of ``sampled``, and of the sampled part of ``hybrid``: weigh each token by
            the ratio of student to sampler, but by no more than this (5 in G-OPD's code); null
            does not weigh.
        beta: Of ``jsd``: 0.5 is symmetric; above 0 and below 1, where it is 0 and not a KL.
        discount: Of ``sampled``: add to each token's reward those of later ones, times this to the
            power of their distance (0 in Thinking Machines; 0.99 in beta-OPSD).
        informed: Of ``sampled``: weigh early disagreements more, by up to 1 plus this (IW-OPD,
            arXiv:2606.22600, where it is 0.5).
        support: Which tokens of the vocabulary are compared: ``full`` is all; ``teacher`` or
            ``student`` the most likely of one side, ``intersection`` those of both.
        support_size: How many of a side's, where the support is not full.
        correction: What stands for the rest of the vocabulary: ``generalized`` adds the masses
            that are missing (its gradient is SG-TopK's), ``renorm`` makes each side sum to 1,
            ``tail`` compares the rest as one token, ``hybrid`` adds the sampled token's part
            (ours; unbiased for the full reverse KL), ``none`` is biased.
        allow_biased: Let ``correction: none`` be used with the reverse KL, which drives the
            student's mass out of the support (arXiv:2605.11182).
        entry_clip: Largest value of each vocabulary entry of the divergence, as OPSD's code has
            it. It does not bound the divergence: a clipped entry is pushed the other way.
        token_clip: Largest divergence of a token; a larger one is scaled down to it, which keeps
            its direction (ours).
    """

    divergence: Divergence = "reverse-kl"
    baseline: bool = True
    importance_clip: float | None = None
    discount: float = 0.0
    informed: float = 0.0
    beta: float = 0.5
    support: Support | Literal["full"] = "full"
    support_size: int = 20
    correction: Correction = "tail"
    allow_biased: bool = False
    entry_clip: float | None = None
    token_clip: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        Ranking.__post_init__(self)
        self.check_ranked(self.divergence)
        for name, fine, bounds in (
            ("beta", 0 <= self.beta <= 1, "in [0, 1]"),
            ("support_size", self.support_size >= 1, "at least 1"),
            ("token_clip", self.token_clip is None or self.token_clip > 0, "above 0"),
            ("entry_clip", self.entry_clip is None or self.entry_clip > 0, "above 0"),
            ("discount", 0 <= self.discount <= 1, "in [0, 1]"),
            ("informed", self.informed >= 0, "at least 0"),
            ("importance_clip", (self.importance_clip or 1.0) > 0, "above 0"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {bounds}, not {getattr(self, name)}")
        if self.divergence == "jsd" and self.beta in (0, 1):
            raise ValueError(
                f"beta {self.beta:g} makes divergence jsd 0 everywhere: set divergence: "
                f"{'reverse-kl' if self.beta else 'forward-kl'}, or a beta between 0 and 1"
            )
        if self.hybrid and self.divergence != "reverse-kl":
            raise ValueError(
                f"correction hybrid is for divergence: reverse-kl, not {self.divergence}: set "
                "correction to generalized or tail"
            )
        entries = self.support == "full" and self.divergence in ("forward-kl", "jsd")
        if self.entry_clip is not None and not entries:
            raise ValueError("entry_clip needs support full, and divergence forward-kl or jsd")
        if self.divergence == "sampled":
            if self.support != "full" or self.token_clip is not None:
                raise ValueError(
                    "divergence sampled is a reward of one token: leave support full and "
                    "token_clip null"
                )
        elif self.discount or self.informed:
            raise ValueError(
                f"discount and informed are for divergence: sampled, not {self.divergence}"
            )
        elif self.importance_clip is not None and not self.hybrid:
            raise ValueError(
                "importance_clip is of sampled tokens: for divergence sampled, or correction hybrid"
            )
        if self.divergence == "dbild" and self.support != "full":
            raise ValueError("divergence dbild finds its own tokens: leave support full")
        uncorrected = self.support != "full" and self.correction == "none"
        if uncorrected and self.divergence == "reverse-kl" and not self.allow_biased:
            raise ValueError(
                "correction none with reverse-kl drives the student's mass out of the support: "
                "take another correction, or set allow_biased: true"
            )

    @property
    def hybrid(self) -> bool:
        """Whether the divergence is of a support, with a part of the sampled token's."""
        return self.support != "full" and self.correction == "hybrid"

    def distilled(self, attempt: Attempt, progress: Progress) -> Loss:
        """Return the mean divergence from the teacher over the chosen tokens of the step."""
        theirs = self.judge(attempt, progress)
        chosen = self.chosen(attempt, theirs, progress)
        maps = self.compared(attempt, theirs, chosen)
        return mean_loss(attempt, maps.pop("divergence"), chosen, maps)

    def compared(
        self,
        attempt: Attempt,
        theirs: Prediction | TopK,
        chosen: Tensor,
        more: Sequence[TokenMap] = (),
        *,
        uniform: bool = True,
        reference: Prediction | None = None,
        strength: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the map ``divergence`` with its graph and, detached, other maps; ``[B, A]``.

        Args:
            attempt: The student's answers and predictions.
            theirs: The teacher's predictions.
            chosen: The tokens to compare, bool ``[B, A]``.
            more: Maps to return besides those that are logged (see ``projection.token_maps``).
            uniform: Whether the loss will be a mean of the map over the chosen tokens; gradients
                are then made in the pass that makes the map.
            reference: With ``strength``, what the target leads away from.
            strength: How far the target lies from the reference to the teacher, ``[B, A]``.
        """
        if self.support != "full":
            maps = self._truncated(attempt, theirs, chosen, self.support)
        elif self.divergence == "sampled":
            maps = self._sampled(attempt, theirs, chosen, more, reference, strength)
        elif isinstance(theirs, TopK):
            raise UserError(
                "the teacher is a server, which gives its most likely tokens only: set "
                "method.support: teacher, or method.divergence: sampled"
            )
        elif self.divergence == "dbild":
            maps = self.ranked(attempt.prediction, theirs, chosen, self.temperature)
            if more:
                maps |= self.token_maps(attempt, theirs, chosen, more)
        else:
            wanted: list[TokenMap] = [self.divergence, *more]
            maps = self.token_maps(
                attempt,
                theirs,
                chosen,
                wanted,
                reference,
                strength,
                trained=self.divergence,
                uniform=uniform and self.token_clip is None,
            )
            maps["divergence"] = maps.pop(self.divergence)
        error = self._clipped(maps.pop("divergence"))
        return {name: value.detach() for name, value in maps.items()} | {"divergence": error}

    def token_maps(
        self,
        attempt: Attempt,
        theirs: Prediction | None,
        chosen: Tensor,
        wanted: Sequence[TokenMap],
        reference: Prediction | None = None,
        strength: Tensor | None = None,
        *,
        trained: TokenMap | None = None,
        uniform: bool = False,
    ) -> dict[str, Tensor]:
        """Return maps ``[B, A]`` with their graphs, under the method's options.

        Args:
            attempt: The student's answers and predictions.
            theirs: The teacher's predictions, if a map is about them.
            chosen: The tokens to compute, bool ``[B, A]``.
            wanted: The maps; those that are logged come with them.
            reference: See ``compared``.
            strength: See ``compared``.
            trained: The only map that will get gradients, if it is one.
            uniform: Whether the loss is its mean over the chosen tokens.
        """
        logged = list(LOGGED if theirs is not None else LOGGED[:1])
        if attempt.answers.logprobs is not None:
            logged.append("logprob")  # to tell it from the sampler's
        return token_maps(
            attempt.prediction,
            theirs,
            list(dict.fromkeys([*wanted, *logged])),
            tokens=attempt.answers.tokens,
            mask=chosen,
            temperature=self.temperature,
            beta=self.beta,
            entry_clip=self.entry_clip,
            reference=reference,
            strength=strength,
            planned={trained: chosen.float()} if trained is not None and uniform else None,
            trained=trained,
        )

    def _sampled(
        self,
        attempt: Attempt,
        theirs: Prediction | TopK,
        chosen: Tensor,
        more: Sequence[TokenMap],
        reference: Prediction | None,
        strength: Tensor | None,
    ) -> dict[str, Tensor]:
        if isinstance(theirs, TopK):
            assert theirs.tokens is not None, "a server says how likely the sampled token is"
            maps = self.token_maps(attempt, None, chosen, ["logprob"], trained="logprob")
            maps["teacher-logprob"] = theirs.tokens
        else:
            wanted: list[TokenMap] = ["logprob", "teacher-logprob", *more]
            if self.baseline:
                wanted.append("reverse-kl")
            maps = self.token_maps(
                attempt, theirs, chosen, wanted, reference, strength, trained="logprob"
            )
        reward = self._reward(attempt, maps, chosen)
        return maps | {"divergence": policy_gradient_map(maps["logprob"], reward)}

    @torch.no_grad()
    def _reward(self, attempt: Attempt, maps: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Return the reward of each sampled token, ``[B, A]``."""
        logprob, sampler = maps["logprob"], attempt.answers.logprobs
        assert sampler is not None, "divergence sampled is for answers of the student's own"
        reward = log_ratio(logprob, maps["teacher-logprob"], maps.get("reverse-kl"))
        if self.discount:
            reward = discounted(reward, chosen, self.discount)
        if self.informed:
            reward = reward * informed_weights(
                log_ratio(logprob, maps["teacher-logprob"]), chosen, self.informed
            )
        if self.importance_clip is not None:
            reward = reward * (logprob - sampler).exp().clamp_max(self.importance_clip)
        return reward

    def _truncated(
        self, attempt: Attempt, theirs: Prediction | TopK, chosen: Tensor, support: Support
    ) -> dict[str, Tensor]:
        assert self.divergence != "sampled"
        assert self.divergence != "dbild"
        return truncated_divergence(
            attempt.prediction,
            theirs,
            divergence=self.divergence,
            support=support,
            k=self.support_size,
            correction=self.correction,
            tokens=attempt.answers.tokens,
            mask=chosen,
            temperature=self.temperature,
            beta=self.beta,
            allow_biased=self.allow_biased,
            sampler=attempt.answers.logprobs,
            importance_clip=self.importance_clip,
        )

    def _clipped(self, error: Tensor) -> Tensor:
        if self.token_clip is None:
            return error
        size = error.detach().abs().clamp_min(torch.finfo(error.dtype).tiny)
        return error * (self.token_clip / size).clamp_max(1.0)

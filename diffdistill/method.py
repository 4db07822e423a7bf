"""A distillation method: which losses a batch gives rise to."""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from diffdistill.rollouts import Solutions
from diffdistill.types import Batch, Example, Loss, Progress

Kind: TypeAlias = Literal["pictures", "texts", "answers"]
"""What a run is of: images and videos, masked-diffusion or autoregressive language models."""


class Method(ABC):
    """A recipe for turning a batch into losses.

    A subclass is a keyword-only dataclass. Fields without a default are its parts (``family``,
    ``draws``, and the roles); fields with a default are its hyper-parameters, and a config
    file may set those and nothing else.

    Attributes:
        roles: The settings of each role where a config file says nothing (see ``roles``).
        streams: Whether the student streams, and the family must be able to.
        texts: Whether it is for language models, and ``family`` a ``texts.TextFamily``.
        answers: Whether these are autoregressive, and ``family`` a ``rollouts.AnswerFamily``.
        reward_optional: Whether its ``reward`` may be None, where a config has no ``rewards``.
        given: With ``answers``: whether the data's own texts are learned, which a teacher may read
            in other tokens; ``family`` is then a ``rollouts.GivenFamily``.
    """

    roles: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    streams: ClassVar[bool] = False
    texts: ClassVar[bool] = False
    answers: ClassVar[bool] = False
    reward_optional: ClassVar[bool] = False
    given: ClassVar[bool] = False

    @classmethod
    def kind(cls) -> Kind:
        """Return what a run of it is of."""
        if cls.answers:
            return "answers"
        return "texts" if cls.texts else "pictures"

    @classmethod
    def experts(
        cls, skills: Sequence[str], options: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Return the settings of the roles that there are besides ``roles``, by name.

        A method that has any gets them as its part ``peers``.

        Args:
            skills: The names in ``data.skills``.
            options: The method's options.

        Raises:
            ValueError: If there are too few skills, or a name is taken.
        """
        return {}

    @classmethod
    def parts(cls, skills: Sequence[str], options: Mapping[str, Any]) -> int:
        """Return among how many processes the losses of a batch are divided, where there are many.

        ``losses`` then yields those of ``Progress.part``; each role must be trained by one part,
        and the method must not count or survey batches.

        Args:
            skills: The names in ``data.skills``.
            options: The method's options.
        """
        return 1

    @abstractmethod
    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield each loss in turn. The trainer back-propagates one before asking for the next."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return numbers of a batch whose sum over the optimizer step ``losses`` must know.

        For a mean over other things than a loss counts. They must not depend on a model. Without
        any, micro-batches are read one after the other.
        """
        return {}

    def pools(self) -> bool:
        """Return whether ``losses`` must know what ``survey`` returns of all micro-batches.

        In a step of one micro-batch it is not told, and takes what is at hand.
        """
        return False

    def survey(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return values ``[n]`` of a batch that are pooled over the optimizer step, by name.

        Asked of every micro-batch before any is trained on, if ``pools`` says so. A method may
        keep what it needs again.
        """
        return {}

    def heads(self, widths: Mapping[str, int]) -> Mapping[str, nn.Module]:
        """Return modules that are trained with a role and belong to no export, by role.

        They are the role's ``head``.

        Args:
            widths: Of the hidden states of each role.
        """
        return {}

    def annotation(self) -> str:
        """Return what identifies what ``annotate`` adds; empty where that is nothing."""
        return ""

    def annotate(self, texts: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        """Return what is kept on disk beside each encoded text: what frozen models say of it.

        Of methods with ``given``. Asked once for each text, before training.
        """
        return [{} for _ in texts]

    def needs_images(self) -> bool:
        """Return whether every example must have an image."""
        return False

    def solutions(self) -> Solutions:
        """Return what becomes of reference solutions; unless unused, every question must have one.

        Of methods with ``answers``. A solution that is shown must fit into the teacher's prompt.
        """
        return "unused"

    def check_question(self, example: Example) -> None:  # noqa: B027 - most need no more
        """Refuse a question that lacks what training needs besides its prompt and solution.

        Of methods with ``answers``. Asked of every question before training.

        Raises:
            UserError: If it cannot be used.
        """

    def check_clip(self, num_frames: int) -> None:  # noqa: B027 - most take any
        """Refuse clips of so many pixel frames, and of such a family, before they are encoded.

        Raises:
            UserError: If they do not fit the method's options.
        """

    def observe(self, metrics: Mapping[str, float]) -> None:  # noqa: B027 - most adapt nothing
        """Learn what a step came to: the means over all its micro-batches and ranks.

        Called after each step that was finite, the same on all ranks. Names are those of
        ``Loss.metrics``, followed by a slash and the role.
        """

    def renewals(self) -> Mapping[str, Container[int]]:
        """Return after which updates a role becomes a copy of the role that it follows.

        By the name of the role, which must be an average (``weights: ema``). It is in the
        checkpoint as any average is.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep besides weights, as JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most keep no state
        """Take back what ``state`` returned."""


class CountsUpdates:
    """Counts the updates of a method whose course depends on them; a skipped step is none.

    Stands before ``Method`` among the bases.

    Attributes:
        updates: How many there were.
    """

    updates = 0

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Count an update."""
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """Return the number of updates."""
        return {"updates": self.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.updates = int(state["updates"])

"""Questions about pictures, as a vision-language student and its teacher read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffdistill.errors import UserError
from diffdistill.pipelines.engines import Generate
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.token_family import located
from diffdistill.pipelines.vlm import VLM
from diffdistill.sights import Sight
from diffdistill.texts import Reader
from diffdistill.types import Batch, Condition, Example


@dataclass
class PictureQuestions(Questions):
    """The student's family and the teacher's, which both read pictures: a ``SeeingFamily``.

    Each side has its own processor: its own size of pictures, and number of tokens for each.
    """

    def __post_init__(self) -> None:
        """Check that both read pictures, that the engine does, and that tokens are the same.

        Raises:
            UserError: If they do not.
        """
        if not isinstance(self.teacher, VLM):
            raise UserError(
                f"the teacher {self.teacher.path} is of a family that reads no pictures: take vlm"
            )
        if not isinstance(self.engine, Generate):
            raise UserError(
                "engine: answers about pictures are written by transformers alone: leave it out"
            )
        super().__post_init__()

    def condition(
        self, batch: Batch, *, reader: Reader = "student", exposure: float | None = None
    ) -> Condition:
        """Return what a model is told before the answer: see ``VLM.read``.

        Raises:
            UserError: If there is no solution to show, a prompt is too long, or a picture cannot be
                read.
        """
        return self._read(self.examples(batch), reader, exposure)

    def prompt(
        self, example: Example, *, reader: Reader = "student", exposure: float | None = None
    ) -> list[int]:
        """Return the token ids of a question as a reader is asked it, those of pictures included.

        Raises:
            UserError: If it is too long, has no solution to show, or cannot be read.
        """
        tokens: list[int] = self._read([example], reader, exposure)["prompt"][0].tolist()
        return tokens

    def seeing(self, condition: Condition, sight: Sight) -> Condition:
        """Return a condition under which no encoder is asked: the projector gets ``sight``."""
        return {**condition, "sight": sight}

    def _read(
        self, examples: Sequence[Example], reader: Reader, exposure: float | None
    ) -> dict[str, Any]:
        family = self.family(reader)
        assert isinstance(family, VLM)
        texts, pictures = [], []
        for example in examples:
            with located(example.origin):
                messages = self._messages(example, reader, exposure)
                count, thinking = len(example.pictures), self.thinking(reader)
                texts.append(family.rendered(messages, count, thinking=thinking))
                pictures.append([picture.image() for picture in example.pictures])
        with located(examples[0].origin if len(examples) == 1 else ""):
            told = family.read(texts, pictures)
        lengths = told["prompt"].shape[1] - told["pads"]
        for example, length in zip(examples, lengths.tolist(), strict=True):
            with located(example.origin):
                self._check_length(length, reader, exposure)
        return told

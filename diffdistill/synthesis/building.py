"""The writers and predictors that a config's section ``tessy`` describes, and its questions."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from diffdistill.boundaries import Author
from diffdistill.config import RunConfig
from diffdistill.data.problems import Problem, settle
from diffdistill.data.questions import read_questions
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.family_building import asking_of, build_family, resolve_model
from diffdistill.pipelines.boundary import Boundary
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.questions import Asking, Questions
from diffdistill.pipelines.server import Server
from diffdistill.pipelines.writing import Format, LocalWriter, ServedWriter, Writer
from diffdistill.rollouts import Sampling
from diffdistill.synthesis.cooperation import AUTHORS, Cooperation
from diffdistill.synthesis.drafts import PLANS
from diffdistill.tessy_settings import TessySettings
from diffdistill.types import Example


@dataclass
class Workshop:
    """What writes samples.

    Attributes:
        config: The config.
        settings: Its section ``tessy``.
        writers: The student and the teacher.
        device: Where they are.
    """

    config: RunConfig
    settings: TessySettings
    writers: dict[Author, Writer]
    device: torch.device

    def cooperation(self) -> Cooperation:
        """Return what writes samples, with the predictors that the mode needs.

        Raises:
            UserError: If they are missing.
        """
        boundaries = {
            author: Boundary.load(folder, self.settings.context, self.device)
            for author, folder in self.predictor_folders().items()
        }
        return Cooperation(self.writers, boundaries, self.settings)

    def predictor_folders(self) -> dict[Author, Path]:
        """Return where the predictors are that the mode needs.

        Raises:
            UserError: If it is not said.
        """
        settings = self.settings
        if all(len(plan.thinkers) == 1 for plan in PLANS[settings.mode]):
            return {}
        if settings.predictors is None:
            raise UserError(
                f"tessy.mode {settings.mode} needs boundary predictors: set tessy.predictors "
                "to the folder that diffdistill tessy fit-predictors made"
            )
        return {author: Path(settings.predictors).expanduser() / author for author in AUTHORS}

    @property
    def authors(self) -> list[Author]:
        """Who has a say in samples of the mode: who writes, and who chooses one of some."""
        plans = PLANS[self.settings.mode]
        found = {author for plan in plans for author in (*plan.thinkers, plan.answerer)}
        chooses = self.settings.mode == "best-of-n"
        return [a for a in AUTHORS if a in found or (chooses and a == "teacher")]

    def questions(self, count: int | None = None) -> list[Example]:
        """Return the questions that both models can be asked, and say which were left out.

        Args:
            count: How many at most; None is all.

        Raises:
            UserError: If they cannot be read, or there is none.
        """
        settings, problems = self.settings, list[Problem]()
        data = replace(
            self.config.data,
            skip_examples=settings.skip_questions,
            max_examples=settings.max_questions,
        )
        if settings.questions is not None:
            data = replace(data, path=settings.questions, source=None)
        readers = [writer.read for writer in self.writers.values()]
        found = read_questions(data, Path(), problems)
        usable = (e for e in found if all(reader.usable(e) for reader in readers))
        examples = list(islice(usable, count))
        for reader in readers:
            reader.release()
        settle(problems, data.on_error)
        if not examples:
            raise UserError(f"there is no usable question in {data.path or data.source}")
        return examples


def open_workshop(config: RunConfig, device: torch.device) -> Workshop:
    """Return what writes the samples of a config; both models are loaded, and never trained.

    Raises:
        UserError: If the config has no section ``tessy``, or a model cannot write.
    """
    settings = config.tessy
    if settings is None:
        raise UserError("the config has no section tessy: it says who writes, and how")
    if not settings.teacher:
        raise UserError("tessy.teacher: name the family of the teacher: {name: ..., path: ...}")
    asking, own = asking_of(config.data), config.roles["student"].path
    path = None if own is None else resolve_model(own)
    student = writer_of(config.family, asking, settings, device, path=path)
    thinking = config.data.teacher_thinking
    if thinking is not None:
        asking = replace(asking, student_thinking=thinking)
    layout = {"opens": settings.teacher_opens, "closes": settings.teacher_closes}
    teacher = writer_of(settings.teacher, asking, settings, device, layout=layout)
    return Workshop(config, settings, {"student": student, "teacher": teacher}, device)


def writer_of(
    family: dict[str, Any],
    asking: Asking,
    settings: TessySettings,
    device: torch.device,
    *,
    path: str | None = None,
    layout: dict[str, str | None] | None = None,
) -> Writer:
    """Return a model that writes.

    Args:
        family: Its family, with all options.
        asking: How questions are put to it.
        settings: How it samples, and how answers are laid out.
        device: Where it is.
        path: Its weights, if not the family's own.
        layout: What differs in its layout.

    Raises:
        UserError: If it is of a family that cannot write.
    """
    built: Any = build_family(family, device)
    given = {name: text for name, text in (layout or {}).items() if text is not None}
    marks: dict[str, Any] = {"opens": settings.opens, "closes": settings.closes, **given}
    parts: dict[str, Any] = {
        "format": Format(**marks, ends=tuple(settings.ends)),
        "sampling": Sampling(1, settings.temperature, settings.top_p, settings.top_k),
        "draws": Draws(settings.seed),
    }
    if isinstance(built, CausalLM):
        network = built.network(path).eval()
        read = Questions(built, built, asking)
        return LocalWriter(family=built, network=network, path=path, read=read, **parts)
    if isinstance(built, Server):
        reads: Any = built  # of which only the tokenizer is asked
        return ServedWriter(family=built, read=Questions(reads, built, asking), **parts)
    raise UserError(
        f"family {family['name']} does not write token by token: take causal-lm or server"
    )

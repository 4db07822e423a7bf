"""The writers and predictors that a config's section ``tessy`` describes, and its questions."""

from collections.abc import Iterator
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
from diffdistill.pipelines.loading import identity
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
        settings, boundaries = self.settings, dict[Author, Boundary]()
        if any(len(plan.thinkers) > 1 for plan in PLANS[settings.mode]):
            if settings.predictors is None:
                raise UserError(
                    f"tessy.mode {settings.mode} needs boundary predictors: set tessy.predictors "
                    "to the folder that diffdistill tessy fit-predictors made"
                )
            for author in AUTHORS:
                folder = Path(settings.predictors).expanduser() / author
                boundaries[author] = Boundary.load(folder, settings.context, self.device)
        return Cooperation(self.writers, boundaries, settings)

    def questions(self, count: int | None = None) -> Iterator[Example]:
        """Yield the questions that both models can be asked.

        Args:
            count: How many at most; None is all.

        Raises:
            UserError: If they cannot be read, or there is none.
        """
        data, problems = self.config.data, list[Problem]()
        if self.settings.questions is not None:
            data = replace(data, path=self.settings.questions, source=None)
        readers = [writer.read for writer in self.writers.values()]
        found = read_questions(data, Path(), problems)
        usable = (e for e in found if all(reader.usable(e) for reader in readers))
        empty = True
        for example in islice(usable, count):
            empty = False
            yield example
        settle(problems, data.on_error)
        if empty:
            raise UserError(f"there is no usable question in {data.path or data.source}")

    def revisions(self) -> dict[str, str]:
        """Return a hash of what each model was read from; of a server, its model's name."""
        found = dict[str, str]()
        for author, writer in self.writers.items():
            family = writer.family
            if isinstance(family, Server):
                found[author] = f"{family.path} {family.model or ''}".strip()
            else:
                found[author] = identity(family.folder)
        return found


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
        return LocalWriter(family=built, network=network, read=read, **parts)
    if isinstance(built, Server):
        reads: Any = built  # of which only the tokenizer is asked
        return ServedWriter(family=built, read=Questions(reads, built, asking), **parts)
    raise UserError(
        f"family {family['name']} does not write token by token: take causal-lm or server"
    )

"""The families of a config, and what reads its data with them."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from diffdistill import catalog
from diffdistill.bundled import bundled
from diffdistill.config import RunConfig
from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.pipelines.engines import Engine
from diffdistill.pipelines.flow import FlowFamily
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.model_family import ModelFamily
from diffdistill.pipelines.picture_questions import PictureQuestions
from diffdistill.pipelines.questions import Asking, Questions
from diffdistill.pipelines.server import Server
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.text_rows import Reading
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.pipelines.vlm import VLM
from diffdistill.session_checks import check_served

Read: TypeAlias = FlowFamily | TextPair | CausalPair | Questions
"""What reads a run's data, and is the family that its method knows."""


def build_family(settings: Mapping[str, Any], device: torch.device) -> ModelFamily:
    """Return the family of a config's ``family`` section; no weights are loaded yet."""
    options = {k: v for k, v in settings.items() if k not in ("name", "path")}
    family = catalog.load("family", settings["name"])
    try:
        built: ModelFamily = family(path=resolve_model(settings["path"]), device=device, **options)
    except UserError as error:
        raise UserError(f"family {settings['name']}: {error}") from error
    return built


def resolve_model(path: str) -> str:
    """Return the folder of a ``bundled:name`` model; any other path or hub id as it is."""
    kind, colon, name = path.partition(":")
    return str(bundled("models", name)) if kind == "bundled" and colon else path


def other_families(
    config: RunConfig, family: ModelFamily, device: torch.device
) -> dict[str, TokenFamily]:
    """Return the family of each role that is not of the run's.

    Raises:
        UserError: If it is not the teacher of a text model, or of another kind than the student.
    """
    others = {}
    for name, role in config.roles.items():
        if role.family is None:
            continue
        other = build_family(role.family, device)
        if name != "teacher" or not isinstance(family, TokenFamily):
            raise UserError(f"roles.{name}.family: only the teacher of a text model may have one")
        masked = isinstance(family, LanguageFamily)
        if not isinstance(other, TokenFamily) or isinstance(other, LanguageFamily) != masked:
            kind = "a masked-diffusion" if masked else "an autoregressive"
            raise UserError(
                f"roles.teacher.family: {role.family['name']} cannot teach "
                f"{config.family['name']}: it must be {kind} model too"
            )
        if role.weights in ("ema", "live"):
            raise UserError(
                f"roles.teacher: its weights are {role.weights} of {role.of!r}, so it is of the "
                "family of that role: leave roles.teacher.family out, or set weights: frozen"
            )
        if isinstance(other, Server):
            check_served(config, role, other)
            other = other.reading_as(family)
        others[name] = other
    return others


def build_engine(config: RunConfig) -> Engine:
    """Return what writes the student's answers; nothing is loaded or asked yet."""
    options = {k: v for k, v in config.engine.items() if k != "name"}
    try:
        engine: Engine = catalog.load("engine", config.engine["name"])(**options)
    except UserError as error:
        raise UserError(f"engine {config.engine['name']}: {error}") from error
    return engine


def read_by(config: RunConfig, family: ModelFamily, others: Mapping[str, TokenFamily]) -> Read:
    """Return what reads the data: the family, or of language models both families.

    Raises:
        UserError: If they cannot read it together.
    """
    data = config.data
    reading = Reading(
        turns="all" if data.turns == "all" else "last",
        packing=data.packing,
        truncate=data.truncate,
        skip=data.on_error == "skip",
    )
    teacher = others.get("teacher", family)
    if isinstance(family, CausalLM):
        return _read_by_causal(config, family, teacher, reading)
    if isinstance(family, LanguageFamily):
        assert isinstance(teacher, LanguageFamily)
        return TextPair(family, teacher, reading)
    assert isinstance(family, FlowFamily)
    return family


def _read_by_causal(
    config: RunConfig, family: CausalLM, teacher: ModelFamily, reading: Reading
) -> Questions | CausalPair:
    """Return what reads questions to answer, or texts that are given.

    Raises:
        UserError: If the families cannot read them together.
    """
    name, asking = config.method["name"], asking_of(config.data)
    if not catalog.load("method", name).given:
        kind = PictureQuestions if isinstance(family, VLM) else Questions
        assert isinstance(teacher, TokenFamily)
        return kind(family, teacher, asking, build_engine(config))
    if isinstance(family, VLM):
        raise UserError(f"method {name} learns texts, without pictures: take causal-lm")
    if not isinstance(teacher, CausalLM):
        raise UserError(f"method {name} needs a teacher of family causal-lm")
    return CausalPair(family, teacher, reading, asking=asking)


def asking_of(data: DataSettings) -> Asking:
    """Return how questions are put, as the section ``data`` says."""
    return Asking(
        student_prompt=data.student_prompt,
        teacher_prompt=data.teacher_prompt,
        student_thinking=data.student_thinking,
        teacher_thinking=data.teacher_thinking,
        max_prompt=data.max_prompt,
        max_answer=data.max_answer,
        skip=data.on_error == "skip",
    )

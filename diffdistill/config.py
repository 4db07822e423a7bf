"""Config files: strict YAML, dotted overrides, and one-line errors.

Each section is checked against a plain dataclass: the keyword fields with a default of a
family or method class, and the settings classes below. An unknown key is an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from diffdistill import catalog
from diffdistill.config_files import read_values
from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.method import Kind
from diffdistill.options import parse, parse_options, section_of
from diffdistill.provenance.settings import ProvenanceSettings
from diffdistill.role_settings import RoleSettings, check_used
from diffdistill.sample_settings import AnswerSampleSettings, SampleSettings, TextSampleSettings
from diffdistill.schedules import LearningRateSchedule
from diffdistill.shadow import ShadowSettings
from diffdistill.tessy_settings import FitSettings, TessySettings

Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moment: at 1 it would never move."""


@dataclass(kw_only=True)
class TrainSettings:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        lr: Learning rate of every role that has none of its own.
        optimizer: ``adamw`` is torch's; the 8-bit ones are bitsandbytes'.
        betas: Decay rates of the optimizer's moments.
        eps: Added to the optimizer's denominator.
        weight_decay: Decoupled weight decay.
        schedule: Course of the learning rate after the warm-up.
        warmup: Steps over which the learning rate rises.
        clip: Largest gradient norm of each role; None never clips.
        precision: Type of matrix multiplications; trained weights are float32 in any case.
        seed: Seed of everything random.
        accumulate: Micro-batches of each optimizer step.
        save_every: Steps between checkpoints; the last step is always saved.
        keep: Number of newest checkpoints to keep; None keeps all.
        log_every: Steps between lines on the screen (every step goes to metrics.jsonl).
        gradient_checkpointing: Recompute blocks in the backward pass to save memory.
        compile: Compile the networks with torch.compile.
        ema: Decay of an average of the student, kept as the role ``average``; None keeps none.
        ema_start: Updates of the student during which that average is a copy of it.
        max_bad_steps: Consecutive steps with a NaN or infinite loss or gradient before the run
            stops; such steps are skipped.
    """

    steps: PositiveInt = 1000
    lr: NonNegativeFloat = 1e-4
    optimizer: Literal["adamw", "adamw8bit", "paged-adamw8bit"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    schedule: LearningRateSchedule = "constant"
    warmup: NonNegativeInt = 0
    clip: PositiveFloat | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    accumulate: PositiveInt = 1
    save_every: PositiveInt = 500
    keep: PositiveInt | None = 3
    log_every: PositiveInt = 10
    gradient_checkpointing: bool = False
    compile: bool = False
    ema: float | None = None
    ema_start: NonNegativeInt = 0
    max_bad_steps: PositiveInt = 10


@dataclass(kw_only=True)
class TrackingSettings:
    """Where metrics go besides ``metrics.jsonl``.

    Attributes:
        tensorboard: Write TensorBoard events.
        wandb: Name of a Weights & Biases project; None logs nothing there.
    """

    tensorboard: bool = True
    wandb: str | None = None


@dataclass(kw_only=True)
class RunConfig:
    """A complete, checked run.

    ``family``, ``method``, ``engine`` and each of ``rewards`` hold a name and all options; only
    autoregressive models have an ``engine``. A reward may have a ``skill`` too, of ``data.skills``.
    """

    family: dict[str, Any]
    method: dict[str, Any]
    roles: dict[str, RoleSettings]
    data: DataSettings
    train: TrainSettings
    sample: SampleSettings | TextSampleSettings | AnswerSampleSettings
    tracking: TrackingSettings
    evaluate: dict[str, Any] = field(default_factory=dict)
    rewards: list[dict[str, Any]] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)
    provenance: ProvenanceSettings = field(default_factory=ProvenanceSettings)
    tessy: TessySettings | None = None

    @property
    def pictures(self) -> SampleSettings:
        """The section ``sample`` of a run of images or videos."""
        assert isinstance(self.sample, SampleSettings), "a run of texts draws no pictures"
        return self.sample

    @property
    def answers(self) -> TextSampleSettings:
        """The section ``sample`` of a run of texts."""
        assert isinstance(self.sample, TextSampleSettings), "a run of pictures gives no answers"
        return self.sample

    @property
    def replies(self) -> AnswerSampleSettings:
        """The section ``sample`` of a run of autoregressive models."""
        assert isinstance(self.sample, AnswerSampleSettings), "not of an autoregressive model"
        return self.sample

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain values that YAML and JSON can hold."""
        return _plain(asdict(self))

    def save(self, path: Path) -> None:
        """Write the resolved config as YAML."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


SAMPLES: dict[Kind, type] = {
    "pictures": SampleSettings,
    "texts": TextSampleSettings,
    "answers": AnswerSampleSettings,
}
"""The section ``sample`` of each kind of run."""

SECTIONS: dict[str, type] = {
    "data": DataSettings,
    "train": TrainSettings,
    "sample": SampleSettings,
    "tracking": TrackingSettings,
    "provenance": ProvenanceSettings,
}


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the checked config in the file ``name``, or the bundled one of that name.

    Args:
        name: A path to a YAML file, or a bundled name such as ``d-opsd/digits``.
        overrides: ``section.key=value`` strings, the value in YAML.

    Raises:
        UserError: For anything wrong in the file or an override.
    """
    path, values = read_values(name, overrides)
    if "stages" in values:
        raise UserError(f"{path} is a pipeline of several runs: diffdistill pipeline {name}")
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], origin: str = "config") -> RunConfig:
    """Return the checked config of nested plain values."""
    known = {f.name: None for f in fields(RunConfig)}
    values = section_of(values, origin)
    for key in values:
        if key not in known:
            hint = catalog.near(key, known)
            raise UserError(f"{origin}: unknown section {key!r}{hint}; {catalog.listing(known)}")
    method = _named(values, "method", origin)
    family = _named(values, "family", origin)
    cls = catalog.load("method", method["name"])
    settings = SECTIONS | {"sample": SAMPLES[cls.kind()]}
    sections = {key: parse(of, values.get(key), f"{origin}: {key}") for key, of in settings.items()}
    given_roles = section_of(values.get("roles"), f"{origin}: roles")
    skills = list(sections["data"].skills or {})
    if skills and (cls.kind() != "answers" or cls.given):
        raise UserError(
            f"{origin}: data.skills is for methods that ask questions, not for {method['name']}: "
            "set data.path"
        )
    roles = _roles(_known_roles(cls, method, skills, origin), given_roles, origin)
    if sections["train"].ema is not None:
        train = sections["train"]
        average = {"weights": "ema", "decay": train.ema, "start": train.ema_start}
        roles["average"] = parse(RoleSettings, average, f"{origin}: train.ema")
    elif "average" in given_roles:
        raise UserError(f"{origin}: roles.average: set train.ema, which keeps that role")
    evaluate = section_of(values.get("evaluate"), f"{origin}: evaluate")
    sections["tessy"] = _tessy(values.get("tessy"), f"{origin}: tessy")
    rewards = _rewards(values.get("rewards"), skills, origin)
    engine = _engine(values.get("engine"), cls.kind(), origin)
    return RunConfig(
        family=family,
        method=method,
        roles=roles,
        evaluate=evaluate,
        rewards=rewards,
        engine=engine,
        **sections,
    )


def _engine(given: Any, kind: Kind, origin: str) -> dict[str, Any]:
    """Return name and all options of what writes the student's answers; a name, or a section."""
    if kind != "answers":
        if given:
            raise UserError(f"{origin}: engine: only autoregressive language models have one")
        return {}
    given = given or "transformers"
    return _named(
        {"engine": {"name": given} if isinstance(given, str) else given}, "engine", origin
    )


def _tessy(given: Any, origin: str) -> TessySettings | None:
    """Return the checked section ``tessy``; None where there is none."""
    if given is None:
        return None
    values = section_of(given, origin)
    fit = section_of(values.get("fit"), f"{origin}.fit")
    for part, name in ((values, "teacher"), (fit, "model")):
        if part.get(name):
            part[name] = _named(part, "family", origin, name)
    values["fit"] = parse(FitSettings, fit, f"{origin}.fit")
    settings: TessySettings = parse(TessySettings, values, origin)
    return settings


def _rewards(given: Any, skills: Sequence[str], origin: str) -> list[dict[str, Any]]:
    """Return name and all options of each reward: a name, a section with a name, or a list.

    One of a skill has ``skill`` besides; then each skill has one.
    """
    items = given if isinstance(given, list) else [] if given is None else [given]
    named, of = [], []
    for item in items:
        section = {"name": item} if isinstance(item, str) else item
        own = {}
        if isinstance(section, Mapping) and section.get("skill") is not None:
            own = {"skill": section["skill"]}
            of.append(section["skill"])
        if isinstance(section, Mapping):
            section = {key: value for key, value in section.items() if key != "skill"}
        named.append(_named({"rewards": section}, "reward", origin, "rewards") | own)
    if of and (sorted(map(str, of)) != sorted(skills) or len(of) != len(named)):
        raise UserError(
            f"{origin}: rewards: either none has a skill, or there is one reward for each of "
            f"data.skills ({', '.join(skills) or 'there are none'})"
        )
    return named


def _known_roles(
    method: Any, named: Mapping[str, Any], skills: Sequence[str], origin: str
) -> dict[str, Mapping[str, Any]]:
    """Return the roles of a method by name, where a config says nothing of them."""
    options = {key: value for key, value in named.items() if key != "name"}
    try:
        return dict(method.roles) | method.experts(skills, options)
    except ValueError as error:
        raise UserError(f"{origin}: method {named['name']}: {error}") from error


def _roles(
    known: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any], origin: str
) -> dict[str, RoleSettings]:
    for name in given:
        if name not in known and name != "average":
            hint = catalog.near(name, known)
            raise UserError(f"{origin}: unknown role {name!r}{hint}; {catalog.listing(known)}")
    roles = {}
    for name, default in known.items():
        where = f"{origin}: roles.{name}"
        values = {**default, **section_of(given.get(name), where)}
        if values.get("family") is not None:
            values["family"] = _named(values, "family", where)
        if values.get("adapter") == "shadow":
            _check_of_lora(values, where)
        if values.get("adapter") == "shadow" or values.get("shadow") is not None:
            values["shadow"] = parse(ShadowSettings, values.get("shadow"), f"{where}.shadow")
        roles[name] = parse(RoleSettings, values, where)
        check_used(roles[name], parse(RoleSettings, default, where), where)
    return roles


OF_LORA = {"rank": "rank", "alpha": "strength", "dropout": "dropout"}
"""Options of a LoRA, and what a shadow has instead."""


def _check_of_lora(values: Mapping[str, Any], where: str) -> None:
    """Refuse options of a LoRA beside a shadow, which would have no say.

    The file of a run names all options, and there those of a LoRA are as by default.
    """
    given = [name for name in OF_LORA if name in values]
    changed = [name for name in given if values[name] != getattr(RoleSettings, name)]
    if changed or len(given) not in (0, len(OF_LORA)):
        name = (changed or given)[0]
        raise UserError(f"{where}.{name} is for adapter: lora: set {where}.shadow.{OF_LORA[name]}")


def _named(
    values: Mapping[str, Any], kind: str, origin: str, section: str | None = None
) -> dict[str, Any]:
    """Return name and all options of the section of a family, method or reward."""
    section = section or kind
    given = values.get(section)
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UserError(f"{origin}: the section {section!r} needs a name")
    cls = catalog.load(kind, given["name"])
    fixed = {"name": given["name"]}
    if kind == "family":
        fixed["path"] = given.get("path") or ""
        if not isinstance(fixed["path"], str):
            raise UserError(f"{origin}: family.path: expected text, got {fixed['path']!r}")
    options = {k: v for k, v in given.items() if k not in fixed}
    checked = parse_options(cls, options, f"{origin}: {section}")
    return fixed | checked


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value

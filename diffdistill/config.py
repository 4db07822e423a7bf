"""Config files: strict YAML, dotted overrides, and one-line errors.

Each section is checked against a plain dataclass: the keyword fields with a default of a
family or method class, and the settings classes below. An unknown key is an error.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
)

from diffdistill import catalog
from diffdistill.data.settings import DataSettings
from diffdistill.errors import UserError
from diffdistill.method import Kind
from diffdistill.provenance.settings import ProvenanceSettings
from diffdistill.role_settings import RoleSettings
from diffdistill.sample_settings import AnswerSampleSettings, SampleSettings, TextSampleSettings
from diffdistill.schedules import LearningRateSchedule
from diffdistill.shadow import ShadowSettings
from diffdistill.tessy_settings import FitSettings, TessySettings

CONFIGS = Path(__file__).parent / "configs"


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
    betas: tuple[float, float] = (0.9, 0.999)
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


def read_values(name: str, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Return the file of a config and what it says, with overrides; nothing is checked.

    Raises:
        UserError: If there is none, or it or an override cannot be read.
    """
    path = find_config(name)
    values = _read(path)
    for override in overrides:
        apply_override(values, override)
    return path, values


def find_config(name: str) -> Path:
    """Return the file of a config given by path or by bundled name."""
    candidates = (Path(name), CONFIGS / f"{name}.yaml", CONFIGS / name)
    for path in candidates:
        if path.is_file():
            return path
    known = dict.fromkeys([*bundled_configs(), *bundled_pipelines()])
    raise UserError(
        f"no config file {name!r}{catalog.near(name, known)}; bundled: {catalog.listing(known)}"
    )


def bundled_configs() -> list[str]:
    """Return the names of the configs of runs that ship with the package."""
    return [name for name, staged in _bundled() if not staged]


def bundled_pipelines() -> list[str]:
    """Return the names of the pipelines that ship with the package (see ``stages``)."""
    return [name for name, staged in _bundled() if staged]


def _bundled() -> Iterator[tuple[str, bool]]:
    """Yield each bundled config, and whether it is a pipeline."""
    for file in sorted(CONFIGS.rglob("*.yaml")):
        path = file.relative_to(CONFIGS).with_suffix("")
        if path.parts[0] != "accelerate":
            yield path.as_posix(), bool(re.search("^stages:", file.read_text(), re.MULTILINE))


def parse_config(values: Mapping[str, Any], origin: str = "config") -> RunConfig:
    """Return the checked config of nested plain values."""
    known = {f.name: None for f in fields(RunConfig)}
    values = _section(values, origin)
    for key in values:
        if key not in known:
            hint = catalog.near(key, known)
            raise UserError(f"{origin}: unknown section {key!r}{hint}; {catalog.listing(known)}")
    method = _named(values, "method", origin)
    family = _named(values, "family", origin)
    cls = catalog.load("method", method["name"])
    settings = SECTIONS | {"sample": SAMPLES[cls.kind()]}
    sections = {key: parse(of, values.get(key), f"{origin}: {key}") for key, of in settings.items()}
    given_roles = _section(values.get("roles"), f"{origin}: roles")
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
    evaluate = _section(values.get("evaluate"), f"{origin}: evaluate")
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
    values = _section(given, origin)
    fit = _section(values.get("fit"), f"{origin}.fit")
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
        values = {**default, **_section(given.get(name), where)}
        if values.get("family") is not None:
            values["family"] = _named(values, "family", where)
        if values.get("adapter") == "shadow" or values.get("shadow") is not None:
            values["shadow"] = parse(ShadowSettings, values.get("shadow"), f"{where}.shadow")
        roles[name] = parse(RoleSettings, values, where)
    return roles


def _section(value: Any, where: str) -> dict[str, Any]:
    """Return the keys and values of one section; nothing given is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected keys and values, got {value!r}")
    return {str(key): item for key, item in value.items()}


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


def options_model(cls: type) -> type[BaseModel]:
    """Return a strict pydantic model of the fields with a default of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    notes = attribute_notes(cls)
    definitions: dict[str, Any] = {}
    default: dict[str, Any]
    for item in fields(cls):
        if item.default is not MISSING:
            default = {"default": item.default}
        elif item.default_factory is not MISSING:
            default = {"default_factory": item.default_factory}
        else:
            continue
        smallest = _smallest(item.name, hints[item.name])
        info = Field(description=notes.get(item.name), ge=smallest, **default)
        definitions[item.name] = (hints[item.name], info)
    return create_model(
        cls.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **definitions
    )


def _smallest(name: str, hint: Any) -> int | None:
    """Return 1 for a whole number that is a count or a period by its name."""
    named = name.startswith("num_") or name.endswith("_every")
    return 1 if named and hint in (int, int | None) else None


def attribute_notes(cls: type) -> dict[str, str]:
    """Return the description of each field from the "Attributes:" parts of the docstrings."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, part = cleandoc(base.__doc__ or "").partition("Attributes:\n")
        pairs = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", part, flags=re.MULTILINE)
        notes |= {name: " ".join(text.split()) for name, text in pairs}
    return notes


def parse_options(cls: type, values: Any, where: str) -> dict[str, Any]:
    """Return all options of ``cls`` as a dictionary, checked, with defaults filled in."""
    values = _section(values, where)
    model = options_model(cls)
    try:
        return dict(model(**values))
    except ValidationError as error:
        raise UserError(_explain(error, where, model)) from None


def parse(cls: type, values: Any, where: str) -> Any:
    """Return an instance of the settings class ``cls`` from checked values."""
    return cls(**parse_options(cls, values, where))


def _explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """Return the first problem of a validation error in one line."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-"))
    if problem["type"] == "extra_forbidden":
        known = model.model_fields
        return f"{where}.{key}: unknown key{catalog.near(key, known)}; {catalog.listing(known)}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}.{key}: {problem['msg']}, got {problem['input']!r}{more}"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected sections of keys and values, got {type(values).__name__}"
        )
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what an override ``section.key=value`` says.

    Raises:
        UserError: If it cannot be read, or a section is none.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected section.key=value")
    *parents, key = dotted.removeprefix("--").split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {parent!r} is not a section")
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: not valid YAML: {error}") from None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value

"""Pipelines: several runs, some of which go on from the models that others have trained.

A pipeline is a YAML file with ``stages``. Each is a run with a config of its own; where that says
``stage:NAME`` instead of the path of a model, it takes the student of another stage, which must be
done first. Arms are stages with all that they need, so that arms share what they have in common.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from diffdistill import catalog
from diffdistill.config import RunConfig, parse_config
from diffdistill.config_files import apply_override, read_values
from diffdistill.errors import UserError
from diffdistill.options import parse
from diffdistill.stage_gates import MeasureSettings, StageSettings
from diffdistill.text.answering import Answering

REFERENCE = "stage:"
OnFailedGate = Literal["report", "stop"]


@dataclass(frozen=True)
class Stage:
    """A run, and which others must be done before.

    Attributes:
        name: Of the stage and of its folder.
        settings: What the pipeline says of it.
        values: Its config, with references to other stages in it.
        needs: Those stages.
    """

    name: str
    settings: StageSettings
    values: Mapping[str, Any]
    needs: tuple[str, ...]

    def run_config(self, output: Path) -> RunConfig:
        """Return the config of the run, with the models of other stages in the folder ``output``.

        Raises:
            UserError: If something in it is wrong.
        """

        def located(text: str) -> str:
            return str(model_folder(output, text.removeprefix(REFERENCE)))

        return parse_config(_replaced(self.values, located), f"stage {self.name}")


@dataclass(frozen=True)
class Pipeline:
    """Stages, each after those that it needs.

    Attributes:
        stages: By name.
        arms: The last stage of each arm; the first one is what the pipeline is for.
        measure: How gates and models are measured.
        on_failed_gate: Whether a gate that does not hold is told, or ends the pipeline.
    """

    stages: Mapping[str, Stage]
    arms: Mapping[str, str]
    measure: MeasureSettings
    on_failed_gate: OnFailedGate

    def of_arm(self, arm: str) -> list[Stage]:
        """Return the stages of an arm, in their order."""
        wanted = {self.arms[arm]}
        for stage in reversed(list(self.stages.values())):
            if stage.name in wanted:
                wanted.update(stage.needs)
        return [stage for name, stage in self.stages.items() if name in wanted]

    def chosen(self, arms: Sequence[str]) -> list[str]:
        """Return the arms that are asked for: none is the first, ``all`` is all.

        Raises:
            UserError: If there is no such arm.
        """
        if "all" in arms:
            return list(self.arms)
        for arm in arms:
            if arm not in self.arms:
                raise UserError(
                    f"no arm {arm!r}{catalog.near(arm, self.arms)}; here: all, "
                    f"{', '.join(self.arms)}"
                )
        return list(dict.fromkeys(arms)) or list(self.arms)[:1]


def model_folder(output: Path, stage: str) -> Path:
    """Return where the model that a stage has trained is."""
    return output.absolute() / stage / "model"


def load_pipeline(name: str, overrides: Sequence[str] = ()) -> Pipeline:
    """Return the checked pipeline in the file ``name``, or the bundled one of that name.

    Args:
        name: A path to a YAML file, or a bundled name such as ``sparse-to-dense/arithmetic``.
        overrides: ``section.key=value`` of a run's sections is for all stages; anything else is of
            the pipeline's own file, such as ``stages.NAME.change.train.steps=10``.

    Raises:
        UserError: For anything wrong in the file, in an override or in a config of a stage.
    """
    sections = {item.name for item in fields(RunConfig)}
    everywhere = [o for o in overrides if o.removeprefix("--").partition(".")[0] in sections]
    path, values = read_values(name, [o for o in overrides if o not in everywhere])
    _check_keys(values, str(path))
    given = _mapping(values.get("stages"), f"{path}: stages")
    if not given:
        raise UserError(f"{path}: a pipeline has stages")
    settings = {
        key: parse(StageSettings, value, f"{path}: stages.{key}") for key, value in given.items()
    }
    stages = {key: _stage(key, item, everywhere) for key, item in settings.items()}
    ordered = _ordered(stages, str(path))
    arms = _mapping(values.get("arms"), f"{path}: arms") or {key: key for key in ordered}
    for arm, last in arms.items():
        if not isinstance(last, str):
            raise UserError(f"{path}: arms.{arm}: expected the name of its last stage, got {last}")
        if last not in ordered:
            hint = catalog.near(last, ordered)
            raise UserError(f"{path}: arms.{arm}: there is no stage {last!r}{hint}")
    on_failed = values.get("on_failed_gate", "report")
    if on_failed not in get_args(OnFailedGate):
        raise UserError(f"{path}: on_failed_gate: expected report or stop, got {on_failed!r}")
    measure = parse(MeasureSettings, values.get("measure"), f"{path}: measure")
    return Pipeline(ordered, arms, measure, on_failed)


def _check_keys(values: Mapping[str, Any], origin: str) -> None:
    known = dict.fromkeys(item.name for item in fields(Pipeline))
    for key in values:
        if key not in known:
            hint = catalog.near(key, known)
            raise UserError(f"{origin}: unknown key {key!r}{hint}; {catalog.listing(known)}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected names and values, got {value!r}")
    return {str(key): item for key, item in value.items()}


def _stage(name: str, settings: StageSettings, overrides: Sequence[str]) -> Stage:
    """Return a stage, whose config is checked as far as it can be before others are done."""
    base = {} if settings.config is None else read_values(settings.config)[1]
    values = merged(base, settings.change)
    for override in overrides:
        apply_override(values, override)
    checked = parse_config(values, f"stage {name}")
    if catalog.load("method", checked.method["name"]).kind() == "pictures":
        raise UserError(f"stage {name}: a pipeline is of language models")
    _check_whole(name, checked)
    if settings.least_gain is not None and not checked.rewards:
        raise UserError(f"stage {name}: least_gain needs rewards to measure by")
    if settings.most_kl is not None or settings.least_overlap is not None:
        _check_close(name, checked)
    return Stage(name, settings, values, tuple(dict.fromkeys(_references(values))))


def _check_whole(name: str, config: RunConfig) -> None:
    """Refuse a student that cannot be exported as the whole model that a stage leaves to others."""
    student = config.roles["student"]
    if student.adapter == "shadow":
        raise UserError(
            f"stage {name}: roles.student.adapter: a shadow cannot be merged into the model that a "
            "stage leaves to others: take lora"
        )
    stored = (student.family or config.family).get("quantize", "none")
    if stored != "none":
        raise UserError(
            f"stage {name}: family.quantize: {stored} stores the student rounded, and no adapter "
            "can be merged into it for the model that a stage leaves to others: take none"
        )


def _check_close(name: str, config: RunConfig) -> None:
    """Refuse to ask how close a teacher is that is not there, or does not tell all it predicts."""
    method, teacher = config.method["name"], config.roles.get("teacher")
    where = f"stage {name}: most_kl and least_overlap"
    if teacher is None:
        raise UserError(f"{where}: {method} has no teacher")
    if not issubclass(catalog.load("method", method), Answering):
        raise UserError(f"{where} are measured at a student's answers, and {method} writes none")
    if (teacher.family or {}).get("name") == "server":
        raise UserError(f"{where} need the teacher's whole prediction, not a server's")


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values in which what ``change`` says replaces what ``base`` does."""
    found = {key: deepcopy(value) for key, value in base.items()}
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else deepcopy(value)
    return found


def _references(values: Any) -> Iterator[str]:
    """Yield the stages that values refer to."""
    if isinstance(values, str) and values.startswith(REFERENCE):
        yield values.removeprefix(REFERENCE)
    inner = values.values() if isinstance(values, Mapping) else values
    if isinstance(values, Mapping | list):
        for value in inner:
            yield from _references(value)


def _replaced(values: Any, located: Any) -> Any:
    """Return values with ``located(reference)`` in the place of each reference."""
    if isinstance(values, str) and values.startswith(REFERENCE):
        return located(values)
    if isinstance(values, Mapping):
        return {key: _replaced(value, located) for key, value in values.items()}
    if isinstance(values, list):
        return [_replaced(value, located) for value in values]
    return values


def _ordered(stages: Mapping[str, Stage], origin: str) -> dict[str, Stage]:
    """Return the stages, each after those that it needs.

    Raises:
        UserError: If one needs itself, or one that is not there.
    """
    found: dict[str, Stage] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise UserError(f"{origin}: stages need each other: {' -> '.join([*path, name])}")
        if name not in stages:
            hint = catalog.near(name, stages)
            raise UserError(f"{origin}: stages.{path[-1]}: there is no stage {name!r}{hint}")
        for other in stages[name].needs:
            visit(other, (*path, name))
        found[name] = stages[name]

    for name in stages:
        visit(name, ())
    return found

"""What several commands share: a session to look at, its models by name, and tables."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffdistill import catalog
from diffdistill.checkpoints import restore
from diffdistill.config import load_config
from diffdistill.errors import UserError
from diffdistill.method import Kind
from diffdistill.roles import Role
from diffdistill.sampling import base_role
from diffdistill.session import Session, build

OVERRIDABLE = (
    "data", "sample", "evaluate", "rewards", "family.sink_decay", "family.sink_frames",
    "family.window_frames", "family.positions",
)  # fmt: skip
"""What does not alter the weights of a run: sections, and how a student sees its past."""


def open_session(source: str, checkpoint: str = "latest", overrides: Sequence[str] = ()) -> Session:
    """Return the session of a run's folder with a checkpoint's weights, or of a config untrained.

    Args:
        source: A run's folder, a YAML file, or the name of a bundled config.
        checkpoint: Which checkpoint of a run.
        overrides: ``section.key=value``; of a run, those of ``OVERRIDABLE`` only.

    Raises:
        UserError: If there is no such run, config or checkpoint.
    """
    if not Path(source).is_dir():
        if checkpoint != "latest":
            raise UserError(f"{source} is a config, which has no checkpoint {checkpoint!r}")
        return build(load_config(source, overrides))
    for override in overrides:
        key, _, _ = override.removeprefix("--").partition("=")
        if not {key, key.partition(".")[0]} & set(OVERRIDABLE):
            raise UserError(
                f"override {override!r}: of a run, only {', '.join(OVERRIDABLE)} can be changed"
            )
    return restore(Path(source), checkpoint, overrides=overrides)


def kind_of(source: str, overrides: Sequence[str] = ()) -> Kind:
    """Return what a run's folder, or a config, is of; nothing is loaded.

    Raises:
        UserError: If there is no such config, or it is wrong.
    """
    run = Path(source)
    if run.is_dir():
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} is not a run folder: it has no config.yaml")
        config = load_config(str(run / "config.yaml"))
    else:
        config = load_config(source, overrides)
    kind: Kind = catalog.load("method", config.method["name"]).kind()
    return kind


def models(session: Session, names: Sequence[str]) -> dict[str, Role]:
    """Return models by name: ``base``, the roles of the method, or ``detached``.

    The last is the student's shadow without its base, where it has one.

    Raises:
        UserError: If there is no such role, or none is named.
    """
    student = session.roles["student"]
    made = {"base": lambda: base_role(session)}
    if student.settings.shadow is not None:
        made["detached"] = lambda: replace(student, name="detached", detached=True)
    known = {**made, **dict.fromkeys(session.roles.by_name)}
    for name in names:
        if name not in known:
            hint = catalog.near(name, known)
            raise UserError(f"no model {name!r}{hint}; here: {catalog.listing(known)}")
    if not names:
        raise UserError(f"name at least one model; here: {catalog.listing(known)}")
    return {name: made[name]() if name in made else session.roles[name] for name in names}


def render(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console = Console(width=110, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()

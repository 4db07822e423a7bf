"""The command line. Commands import what they need when they run, so that help is fast."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffdistill.errors import UserError

app = typer.Typer(
    help="Distil diffusion models and language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigName = Annotated[str, typer.Argument(help="A YAML file, or a bundled name: d-opsd/digits.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, such as train.steps=100.")
]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.")]


@app.command()
def train(
    config: ConfigName,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder; runs/CONFIG where not given.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Continue: the latest checkpoint, or a name or path.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build, take one step, report, leave nothing.")
    ] = False,
) -> None:
    """Train a config."""
    from diffdistill.commands import train as command
    from diffdistill.config import load_config

    checked = load_config(config, overrides or [])
    if dry_run:
        typer.echo(command.dry_run(checked))
        return
    name = config.removesuffix(".yaml").replace("/", "-").strip(".-")
    try:
        command.train(checked, output or Path("runs") / name, resume)
    except command.Interrupted as interrupted:
        typer.echo(str(interrupted), err=True)
        raise typer.Exit(interrupted.exit_code) from None


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="methods, families, rewards or configs; all if left out.")
    ] = None,
) -> None:
    """List what a config can name."""
    from diffdistill.commands.catalog import listing

    typer.echo(listing(kind))


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="A file; the screen if left out.")] = None,
) -> None:
    """Write the JSON schema of config files, for editors."""
    from diffdistill.commands.catalog import json_schema

    text = json_schema()
    if output is None:
        typer.echo(text)
    else:
        output.write_text(text)


@app.command()
def doctor() -> None:
    """Report versions, devices and optional packages."""
    from diffdistill.commands.doctor import diagnose

    typer.echo(diagnose())


def _resume_alone(arguments: list[str]) -> list[str]:
    """Let ``--resume`` stand without a value, meaning the latest checkpoint."""
    completed = []
    for index, argument in enumerate(arguments):
        completed.append(argument)
        if argument == "--resume":
            following = arguments[index + 1] if index + 1 < len(arguments) else "--"
            if following.startswith("-") or "=" in following:
                completed.append("latest")
    return completed


def main() -> None:
    """Run the command line; errors of the user are one line, and exit with 2."""
    try:
        app(args=_resume_alone(sys.argv[1:]), prog_name="diffdistill")
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            _fail(
                "out of memory on the accelerator: lower data.batch_size or data.resolution, set "
                "train.gradient_checkpointing=true, or family.quantize; "
                f"{str(error).splitlines()[0]}"
            )
        raise


def _fail(message: Any) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()

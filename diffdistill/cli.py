"""The command line. Commands import what they need when they run, so that help is fast."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from diffdistill.errors import UserError

app = typer.Typer(
    help="Distil diffusion models of images, videos and text, and autoregressive language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

tessy = typer.Typer(
    help="Let a student and a teacher write data together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(tessy, name="tessy")

ConfigName = Annotated[str, typer.Argument(help="A YAML file, or a bundled name: d-opsd/digits.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, such as train.steps=100.")
]
Source = Annotated[str, typer.Argument(help="A run's folder, or a config (before training).")]
Checkpoint = Annotated[str, typer.Option(help="Which checkpoint of a run.")]
Output = Annotated[Path | None, typer.Option(help="The file to write.")]


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
        bool,
        typer.Option("--dry-run", help="Build, take one step, report, leave nothing."),
    ] = False,
) -> None:
    """Train a config."""
    from diffdistill.commands import train as command
    from diffdistill.config import load_config

    checked = load_config(config, overrides or [])
    if dry_run:
        typer.echo(command.dry_run(checked))
        return
    with _stopping():
        command.train(checked, output or Path("runs") / _run_name(config), resume)


@app.command()
def sample(
    source: Source,
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw, or to ask; repeatable.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture that each --prompt is about; repeatable.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; of texts, those of each block.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.")] = None,
    compare: Annotated[
        str, typer.Option(help="Models side by side: base,teacher,student,average.")
    ] = "student",
    checkpoint: Checkpoint = "latest",
    output: Output = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels.")] = None,
    num_images: Annotated[int | None, typer.Option(help="Images of each prompt.")] = None,
    separate: Annotated[bool, typer.Option(help="Also write each image as a file.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="One video of any length, written as it is made.")
    ] = False,
    frames: Annotated[int | None, typer.Option(help="Frames of a video.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of a video file.")] = None,
    switch: Annotated[
        list[str] | None,
        typer.Option(help="FRAME:PROMPT, another prompt from there on (--stream); repeatable."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Of texts: go on with the prompt, not a chat.")
    ] = False,
    num_answers: Annotated[int | None, typer.Option(help="Answers to each prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="What settles at a step: low-confidence, random, threshold, first-hitting."
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least confidence under --schedule threshold.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, 1 the model.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only tokens of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only so many tokens; 0 is all.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance of texts; 1 is none.")] = None,
) -> None:
    """Draw or answer prompts with one or several models, from the same noise; or stream a video."""
    from diffdistill.commands.sessions import kind_of

    models = [name for name in compare.split(",") if name]
    changes = list(overrides or [])
    options: dict[str, Any] = {"prompts": prompt or [], "checkpoint": checkpoint, "output": output}
    words: dict[str, Any] = {
        "num_answers": num_answers,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    masked: dict[str, Any] = {
        "plain": plain,
        "schedule": schedule,
        "threshold": threshold,
        "guidance": guidance,
    }
    pictures: dict[str, Any] = {
        "size": size,
        "num_images": num_images,
        "separate": separate,
        "stream": stream,
        "frames": frames,
        "fps": fps,
        "switch": switch,
    }
    kind = kind_of(source, changes)
    if kind == "answers":
        from diffdistill.commands.sample_answers import sample_answers

        _refuse(pictures, f"for images and videos, and {source} is of texts")
        _refuse(masked | {"steps": steps}, f"for masked diffusion, and {source} is autoregressive")
        given = words | {"seed": seed, "top_k": top_k}
        changes += [f"sample.{k}={v}" for k, v in given.items() if v is not None]
        sample_answers(source, compare=models, overrides=changes, images=image or [], **options)
        return
    own = {"top_k": top_k, "image": image or None}
    _refuse(own, f"for autoregressive models, and {source} is of none")
    if kind == "texts":
        from diffdistill.commands.sample_text import sample_text

        _refuse(pictures, f"for images and videos, and {source} is of texts")
        given = words | masked | {"num_steps": steps, "seed": seed, "plain": None}
        changes += [f"sample.{k}={v}" for k, v in given.items() if v is not None]
        changes += ["sample.chat=false"] if plain else []
        sample_text(source, compare=models, overrides=changes, **options)
        return
    _refuse(words | masked, f"for texts, and {source} is of images or videos")
    changes += [] if fps is None else [f"sample.fps={fps}"]
    options |= {"steps": steps, "seed": seed, "size": None if size is None else _size(size)}
    if stream:
        from diffdistill.commands.stream import stream_video

        if len(models) != 1 or separate or num_images not in (None, 1):
            raise UserError("--stream makes one video: with one model, one image, not --separate")
        switches = [_switch(text) for text in switch or []]
        options |= {"role": models[0], "num_frames": frames, "switches": switches}
        typer.echo(stream_video(source, overrides=changes, **options))
        return
    from diffdistill.commands.sample import sample as command

    if switch:
        raise UserError("--switch changes the prompt of a stream: add --stream")
    changes += [] if frames is None else [f"sample.num_frames={frames}"]
    options |= {"compare": models, "num_images": num_images, "separate": separate}
    typer.echo(command(source, overrides=changes, **options))


@app.command()
def preview(
    source: Source,
    overrides: Overrides = None,
    num_examples: Annotated[int, typer.Option(help="Examples of the data.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    output: Output = None,
) -> None:
    """Draw what the teacher makes of your data, before any training."""
    from diffdistill.commands.preview import preview as command

    text = command(
        source, num_examples=num_examples, seed=seed, output=output, overrides=overrides or []
    )
    typer.echo(text)


@app.command()
def evaluate(
    source: Source,
    overrides: Overrides = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="few-step (images), video, or vbench (files for its harness); of texts: text "
            "(likelihood of the data), python, or lm-eval; of autoregressive models: answers, or "
            "bits (per byte of the data)."
        ),
    ] = None,
    checkpoint: Checkpoint = "latest",
    output: Annotated[
        Path | None, typer.Option(help="The JSON file; for vbench the folder of the videos.")
    ] = None,
) -> None:
    """Measure quality: of images against the number of steps, of videos, or of texts."""
    from diffdistill.commands.evaluate import evaluate as command

    text = command(
        source, suite=suite, checkpoint=checkpoint, output=output, overrides=overrides or []
    )
    typer.echo(text)


@app.command()
def diagnose(
    source: Source,
    overrides: Overrides = None,
    max_examples: Annotated[int, typer.Option(min=1, help="Questions of the data.")] = 32,
    num_answers: Annotated[
        int | None, typer.Option(min=1, help="Answers to each; the method's where not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 0,
    checkpoint: Checkpoint = "latest",
    output: Output = None,
) -> None:
    """Measure a student and its teacher at the student's answers: what goes wrong, and why."""
    from diffdistill.commands.diagnose import diagnose as command

    text = command(
        source,
        max_examples=max_examples,
        num_answers=num_answers,
        seed=seed,
        checkpoint=checkpoint,
        output=output,
        overrides=overrides or [],
    )
    typer.echo(text)


@app.command("calibrate-lambda")
def calibrate_lambda(
    source: Source,
    overrides: Overrides = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Strengths at which the target itself writes: 1.0,1.1,1.25,1.5."),
    ] = None,
    max_examples: Annotated[int, typer.Option(min=1, help="Questions of the data.")] = 32,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer of the target's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of the target's answers; 0 is greedy.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 0,
    checkpoint: Checkpoint = "latest",
    output: Output = None,
) -> None:
    """Measure how far beyond its teacher a student may be led before formats break."""
    from diffdistill.commands.calibrate import calibrate, parse_strengths

    text = calibrate(
        source,
        strengths=[] if sweep is None else parse_strengths(sweep),
        max_examples=max_examples,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        checkpoint=checkpoint,
        output=output,
        overrides=overrides or [],
    )
    typer.echo(text)


@app.command()
def pipeline(
    config: Annotated[str, typer.Argument(help="A YAML file with stages, or a bundled name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="train.seed=1 for all stages, or stages.NAME.change.train.steps=9."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The pipeline's folder; runs/CONFIG where not given.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Which arm, or all; repeatable; else the first.")
    ] = None,
    launch: Annotated[
        str | None, typer.Option(help="How to start each run, such as 'accelerate launch'.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the stages and what is done; run nothing.")
    ] = False,
) -> None:
    """Run runs that go on from each other's models; those that are done are not run again."""
    from diffdistill.commands import pipeline as command

    folder = output or Path("runs") / _run_name(config)
    options: dict[str, Any] = {"output": folder, "overrides": overrides or [], "arms": arm or []}
    if dry_run:
        typer.echo(command.dry_run(config, **options))
        return
    with _stopping():
        typer.echo(command.pipeline(config, launch=launch, **options))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One or several runs' folders.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Distillation report",
) -> None:
    """Write one self-contained HTML page about runs."""
    from diffdistill.commands.report import report as command

    typer.echo(command(runs, output=output, title=title))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    output: Annotated[Path, typer.Argument(help="A folder, or a .safetensors file.")],
    layout: Annotated[
        str,
        typer.Option(
            help="lora, pipeline, single-file, comfyui-lora; of texts: lora, model, shadow, "
            "detached; auto: the adapter, or all of it."
        ),
    ] = "auto",
    role: Annotated[str, typer.Option(help="Whose weights: student, average.")] = "student",
    checkpoint: Checkpoint = "latest",
) -> None:
    """Export trained weights for diffusers, ComfyUI, transformers or peft."""
    from diffdistill.commands.export import export as command

    typer.echo(command(run, output, layout=layout, role=role, checkpoint=checkpoint))


@app.command()
def provenance(
    run: Annotated[
        Path | None, typer.Argument(help="A run, a checkpoint, an export, or a provenance.json.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="tree, json, card, or bom (CycloneDX 1.7).")
    ] = "tree",
    output: Output = None,
    terms: Annotated[
        bool, typer.Option("--terms", help="Show the table of terms that obligations are from.")
    ] = False,
) -> None:
    """Tell where a model comes from: its chain, what it is bound to, a bill of materials."""
    from diffdistill.commands.provenance import provenance as command
    from diffdistill.provenance.chain import terms_table

    if terms or run is None:
        _refuse({"output": output}, "for the record of a run: name one")
        if not terms:
            raise UserError("name a run, a checkpoint or an export, or ask for --terms")
        typer.echo(terms_table())
        return
    typer.echo(command(run, form=format_, output=output))


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="An autoregressive LM: a folder, or a hub id.")],
    output: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    to: Annotated[
        str, typer.Option(help="The family: bd3lm (block diffusion), mdlm (whole rows).")
    ] = "bd3lm",
    mask_token: Annotated[
        str | None, typer.Option(help="Spelling of the mask token, where there is none.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: bf16, fp16, fp32.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Make an autoregressive language model one of diffusion, to be trained as such."""
    from diffdistill.commands.convert import convert as command

    text = command(model, output, to=to, mask_token=mask_token, dtype=dtype, revision=revision)
    typer.echo(text)


@tessy.command("fit-predictors")
def fit_predictors(
    config: ConfigName,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder; tessy.predictors where not given.")
    ] = None,
) -> None:
    """Learn where style and capability meet in what student and teacher think."""
    from diffdistill.commands.tessy import fit

    typer.echo(fit(config, output=output, overrides=overrides or []))


@tessy.command("write")
def write(
    config: ConfigName,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="The JSON lines file; data.path where not given.")
    ] = None,
) -> None:
    """Write answers to train on; what is there already is kept, and not written again."""
    from diffdistill.commands.tessy import write as command

    typer.echo(command(config, output=output, overrides=overrides or []))


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="methods, families, rewards, configs or pipelines; all if left out."),
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
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error


@app.command()
def doctor() -> None:
    """Report versions, devices and optional packages."""
    from diffdistill.commands.doctor import diagnose

    typer.echo(diagnose())


def _run_name(config: str) -> str:
    """Return what the folder of a config's run is called."""
    return config.removesuffix(".yaml").replace("/", "-").strip(".-")


@contextmanager
def _stopping() -> Iterator[None]:
    """Say that a run within the block was stopped, and exit as a signal does."""
    from diffdistill.commands.train import Interrupted

    try:
        yield
    except Interrupted as interrupted:
        typer.echo(str(interrupted), err=True)
        raise typer.Exit(interrupted.exit_code) from None


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise a ``UserError`` if one of the options was given."""
    for name, value in options.items():
        if value not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} is {why}")


def _size(text: str) -> tuple[int, int]:
    """Return ``(H, W)`` of "HxW"."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise UserError(f"--size {text!r}: expected HEIGHTxWIDTH, such as 1024x768")
    return int(height), int(width)


def _switch(text: str) -> tuple[int, str]:
    """Return frame and prompt of "FRAME:PROMPT"."""
    frame, colon, prompt = text.partition(":")
    if not (frame.strip().isdigit() and colon and prompt.strip()):
        raise UserError(f"--switch {text!r}: expected FRAME:PROMPT, such as 60:a dog runs")
    return int(frame), prompt.strip()


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

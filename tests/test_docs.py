"""What the docs say can be typed, named and followed."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from diffdistill.cli import _resume_alone, app
from diffdistill.config import load_config
from diffdistill.config_files import bundled_configs, bundled_pipelines
from diffdistill.stages import load_pipeline

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("samples/*/*.md")])


def commands(page: Path) -> list[list[str]]:
    """Return the words of each diffdistill command in a page's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if "diffdistill" in line]
    return [words[words.index("diffdistill") + 1 :] for words in found if "diffdistill" in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_the_docs_parses_and_its_config_is_valid(page: Path) -> None:
    group = typer.main.get_command(app)
    for words in commands(page):
        command, arguments = group.commands[words[0]], words[1:]  # type: ignore[attr-defined]
        if hasattr(command, "commands"):  # a group, such as tessy
            command, arguments = command.commands[arguments[0]], arguments[1:]
        context = command.make_context(words[0], _resume_alone(arguments))
        config = context.params.get("config") or context.params.get("source")
        if config in bundled_configs():
            load_config(config, context.params.get("overrides") or [])
        elif config in bundled_pipelines():
            load_pipeline(config, context.params["overrides"] or []).chosen(
                context.params["arm"] or []
            )
        else:
            assert config is None or config == "CONFIG" or config.startswith("runs/"), config


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_the_docs_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", bundled_configs())
def test_every_bundled_config_is_valid(name: str) -> None:
    assert load_config(name).method["name"]


@pytest.mark.parametrize("name", bundled_pipelines())
def test_every_bundled_pipeline_is_valid(name: str) -> None:
    assert load_pipeline(name).stages

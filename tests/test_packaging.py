import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_packages_of_the_wheel_are_the_folders_of_the_tree() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "diffdistill").rglob("__init__.py")
    }
    data_only = {"diffdistill.configs", "diffdistill.samples"}
    moved = {f"diffdistill.{name}" for name in ("pipelines", "rewards")}
    assert set(tool["packages"]) == folders | data_only | moved
    for package, folder in tool["package-dir"].items():
        assert (ROOT / folder).is_dir(), package


def test_the_links_inside_the_package_point_to_the_real_folders() -> None:
    for name in ("pipelines", "rewards", "configs", "samples"):
        assert (ROOT / "diffdistill" / name).resolve() == ROOT / name


def test_importing_the_package_and_its_command_line_loads_nothing_heavy() -> None:
    program = (
        "import sys, diffdistill, diffdistill.cli; "
        "print(sorted({'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"

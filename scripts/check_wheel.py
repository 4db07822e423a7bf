"""Build the wheel, install it into a fresh environment and import every catalog entry from it.

The dependencies come from the environment this runs in, through its path alone, so that its
editable install of diffdistill stays out of the way.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECK = """
import diffdistill
from diffdistill import catalog
from diffdistill.bundled import bundled
from diffdistill.config import load_config
from diffdistill.config_files import bundled_configs

assert "site-packages" in diffdistill.__file__, diffdistill.__file__
count = 0
for kind in catalog.TABLES:
    for name in catalog.names(kind):
        loaded = catalog.load(kind, name)
        assert loaded.__module__.startswith("diffdistill."), loaded
        count += 1
for name in bundled_configs():
    load_config(name)
for name in ("digits-base", "digits-turbo"):
    assert (bundled("models", name) / "model_index.json").is_file(), name
assert (bundled("data", "digits-8-9") / "metadata.jsonl").is_file()
print(f"the wheel has {count} catalog entries, {len(bundled_configs())} configs and its models")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", work / "dist", ROOT],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        venv.create(work / "fresh", with_pip=True)
        python = work / "fresh" / "bin" / "python"
        (wheel,) = (work / "dist").glob("*.whl")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-c", CHECK], check=True, cwd=work)


if __name__ == "__main__":
    main()

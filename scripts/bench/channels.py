"""What distillation through other channels costs: BLD, DBiLD, TESSY and shadows, one by one.

    python scripts/bench/channels.py            # on the CPU
    python scripts/bench/channels.py --full     # shapes of real models, on a GPU
    python scripts/bench/channels.py --quick    # to see that they run

Each is a script of its own beside this one, whose ratios are within its one run, and writes its own
file in samples/bench.
"""

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("bld", "dbild", "tessy", "shadow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="on a GPU")
    size.add_argument("--quick", action="store_true", help="smoke runs")
    given = parser.parse_args()
    options = [f"--{name}" for name, asked in vars(given).items() if asked]
    for name in NAMES:
        script = Path(__file__).with_name(f"{name}.py")
        subprocess.run([sys.executable, str(script), *options], check=True)


if __name__ == "__main__":
    main()

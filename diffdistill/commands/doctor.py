"""``diffdistill doctor``."""

import platform
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from diffdistill.runs import versions

OPTIONAL = {
    "bitsandbytes": "family.quantize nf4 and int8, 8-bit optimizers",
    "xformers": "family.attention xformers",
    "flash_attn": "family.attention flash",
    "wandb": "tracking.wandb",
    "lm_eval": "evaluate --suite lm-eval",
    "cyclonedx": "provenance --format bom",
}


def diagnose() -> str:
    """Return versions, devices and optional packages as text."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package} {number}" for package, number in versions().items()]
    lines += _devices()
    for package, use in OPTIONAL.items():
        state = "installed" if find_spec(package) else "not installed"
        lines.append(f"{package}: {state} ({use})")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    lines.append(f"disk: {free:.0f} GiB free here")
    return "\n".join(lines)


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return [f"no CUDA device; {torch.get_num_threads()} CPU threads"]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found.append(f"cuda:{index} {properties.name}, {memory:.0f} GiB, {bf16}")
    return found

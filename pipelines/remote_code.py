"""Code that a checkpoint ships: not run unless the user says so, and its failures explained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffdistill.errors import UserError
from diffdistill.pipelines import loading


def shipped(config: Mapping[str, Any]) -> list[str]:
    """Return the files (or "repository--file") of a config's own code that transformers lacks."""
    if config.get("model_type") in CONFIG_MAPPING:
        return []
    classes = (config.get("auto_map") or {}).values()
    return sorted({f"{name.rpartition('.')[0]}.py" for name in classes})


def check_trusted(folder: Path, trusted: bool) -> None:
    """Refuse a model that is code of its own, unless it is trusted.

    Raises:
        UserError: If it is not.
    """
    files = shipped(loading.read_config(folder))
    if files and not trusted:
        raise UserError(
            f"{folder}: this model runs code of its own ({', '.join(files)}), which is not part of "
            "transformers: read it, then set trust_remote_code: true of the family"
        )


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what a checkpoint's own code raises within the block into one ``UserError``.

    Such code is written for one version of transformers, and breaks with others in any way.
    """
    files = shipped(loading.read_config(folder))
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not files:
            raise
        detail = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: its own code ({', '.join(files)}) does not run with transformers "
            f"{transformers.__version__}: {type(error).__name__}: {detail}"
        ) from error

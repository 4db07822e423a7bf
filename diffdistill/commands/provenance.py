"""``diffdistill provenance``: where a model comes from, in several forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffdistill import catalog
from diffdistill.checkpoints import write_atomic
from diffdistill.errors import UserError
from diffdistill.provenance.bom import bill
from diffdistill.provenance.card import model_card
from diffdistill.provenance.chain import chain
from diffdistill.provenance.files import dumped, open_record

FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tree": chain,
    "json": dumped,
    "card": model_card,
    "bom": bill,
}


def provenance(source: Path, *, form: str = "tree", output: Path | None = None) -> str:
    """Return the record of a run, checkpoint or export as text, or where that was written.

    Args:
        source: A folder with a ``provenance.json``, such a file, or an exported file.
        form: One of ``FORMS``.
        output: A file to write; None returns the text.

    Raises:
        UserError: If there is no record or no such form.
    """
    if form not in FORMS:
        raise UserError(
            f"no --format {form!r}{catalog.near(form, FORMS)}; {catalog.listing(FORMS)}"
        )
    text = FORMS[form](open_record(source)).rstrip()
    if output is None:
        return text
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, f"{text}\n".encode())
    return str(output)

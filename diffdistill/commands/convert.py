"""``diffdistill convert``: autoregressive language models made into those of diffusion."""

from pathlib import Path
from typing import Any

from diffdistill import catalog
from diffdistill.checkpoints import write_atomic
from diffdistill.errors import UserError
from diffdistill.family_building import resolve_model
from diffdistill.lineage import converted_record, papers
from diffdistill.pipelines import conversion, loading

CONVERSIONS: dict[str, Any] = {
    "bd3lm": conversion.to_block_diffusion,
    "mdlm": conversion.to_masked_diffusion,
}
SETTINGS = {
    "bd3lm": "{{name: bd3lm, path: {path}}}",
    "mdlm": "{{name: mdlm, path: {path}, shift: true}} (shift: as Dream, it goes on predicting the "
    "next token)",
}


def convert(
    model: str,
    output: Path,
    *,
    to: str = "bd3lm",
    mask_token: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> str:
    """Convert a model, and return what was done.

    Where it comes from is written beside it: ``provenance.json`` and a model card.

    Args:
        model: A folder, or a hub id.
        output: A folder that is not there yet, or is empty.
        to: The family that is to call it: ``bd3lm`` or ``mdlm``.
        mask_token: Spelling of the mask token, where the tokenizer has none.
        dtype: Type of the weights; None keeps it.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: If the model cannot be converted, or the output cannot be written.
    """
    if to not in CONVERSIONS:
        known = catalog.listing(CONVERSIONS)
        raise UserError(f"--to {to!r}{catalog.near(to, CONVERSIONS)}: expected {known}")
    if dtype is not None and dtype not in loading.DTYPES:
        raise UserError(f"--dtype {dtype!r}: expected {catalog.listing(loading.DTYPES)}")
    spelled = mask_token or conversion.MASK_TOKEN
    options = {"mask_token": spelled, "dtype": dtype, "revision": revision}
    CONVERSIONS[to](resolve_model(model), output, **options)
    told = {"to": to, "mask_token": mask_token, "dtype": dtype}
    for name, content in papers(converted_record(model, output, told, revision)).items():
        write_atomic(output / name, content)
    return _said(model, output, to)


def _said(model: str, output: Path, to: str) -> str:
    config = loading.read_config(output)
    tokenizer = loading.load_tokenizer(output, trust_remote_code=False)
    lines = [
        f"{model}, as {config['architectures'][0]}, made one of diffusion: {output}",
        f"mask token {tokenizer.mask_token} (id {config['mask_token_id']}); "
        f"{config['vocab_size']} embeddings; is_causal: false; weights as they were",
        f"train it first, family: {SETTINGS[to].format(path=output)}",
    ]
    if tokenizer.chat_template is None:
        lines.append("there is no chat template: for chats, set chat_template of the family")
    return "\n".join(lines)

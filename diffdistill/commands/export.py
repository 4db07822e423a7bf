"""``diffdistill export``: trained weights for other programs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdistill import catalog
from diffdistill.checkpoints import restored, role_tensors
from diffdistill.errors import UserError
from diffdistill.lineage import at_step, exported, papers, record_of
from diffdistill.pipelines.exporting import (
    export_comfy_lora,
    export_lora,
    export_pipeline,
    export_single_file,
)
from diffdistill.pipelines.exporting_text import (
    export_adapter,
    export_detached,
    export_language_model,
)
from diffdistill.pipelines.latent import LatentFamily
from diffdistill.pipelines.network_family import NetworkFamily
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.text_rows import TextRows
from diffdistill.pipelines.wan_pipeline import write_settings
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.provenance.files import CARD, RECORD, beside_file, read_record
from diffdistill.provenance.hashing import weights_sha256
from diffdistill.provenance.terms import enforce
from diffdistill.roles import Role
from diffdistill.session import Session

TEXT_LAYOUTS = ("auto", "lora", "model", "shadow", "detached")
LAYOUTS = (*TEXT_LAYOUTS, "pipeline", "single-file", "comfyui-lora")


def export(
    run: Path,
    output: Path,
    *,
    layout: str = "auto",
    role: str = "student",
    checkpoint: str = "latest",
) -> Path:
    """Export a role of a run and return what was written.

    Where it comes from is written beside it: ``provenance.json`` and a model card.

    Args:
        run: The run's folder.
        output: A file for ``single-file`` and ``comfyui-lora``, a folder for the others.
        layout: ``lora`` is what diffusers' ``load_lora_weights`` reads; ``pipeline`` a complete
            diffusers folder; ``single-file`` the transformer in the original key layout, which
            ComfyUI reads; ``comfyui-lora`` a LoRA in that layout; ``auto`` is ``lora`` for an
            adapter and ``pipeline`` for a fully trained network. Of text models, ``lora`` is
            what peft reads, and ``model`` (``auto`` for a fully trained network) a complete
            folder for transformers; ``shadow`` is a shadow as peft reads it, and ``detached`` one
            without its base, as a model of its own.
        role: ``student``, or ``average`` where ``train.ema`` kept one; not one whose weights are
            frozen, or live ones of another.
        checkpoint: Which checkpoint of the run.

    Raises:
        UserError: If the role or layout is not to be had, or obligations are open and the config's
            ``provenance.policy`` is ``error``.
    """
    if layout not in LAYOUTS:
        known = dict.fromkeys(LAYOUTS)
        raise UserError(f"no layout {layout!r}{catalog.near(layout, known)}; {', '.join(LAYOUTS)}")
    session, folder = restored(run, checkpoint)
    chosen = _chosen(session, role, run)
    own = layout == "auto" and chosen.adapter is not None
    adapter = own or layout.endswith(("lora", "shadow"))
    record = read_record(folder) or at_step(record_of(session), _step(folder))
    told = _told(record, session, output, adapter=adapter, weights={})
    if open_obligations := enforce(told, session.config.provenance):
        print(open_obligations, file=sys.stderr)
    written = _exported(session, chosen, output, layout)
    weights = weights_sha256(output if output.is_dir() else written)
    _document(_told(record, session, output, adapter=adapter, weights=weights), output)
    return written


def _chosen(session: Session, name: str, run: Path) -> Role:
    """Return the role of that name, whose weights are a result of the run.

    Raises:
        UserError: If there is none, or its weights are another model's.
    """
    roles = session.roles.by_name
    own = {n: role for n, role in roles.items() if role.settings.weights not in ("frozen", "live")}
    if name in own:
        return own[name]
    if name not in roles:
        raise UserError(f"no role {name!r} in {run}; here: {catalog.listing(own)}")
    raise UserError(
        f"role {name!r} of {run} has no weights of its own, they are {roles[name].settings.weights}"
        f": export {catalog.listing(own)}"
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _told(
    record: Mapping[str, Any],
    session: Session,
    output: Path,
    *,
    adapter: bool,
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """Return the record of an export that is to be, or is, in ``output``."""
    name = output.stem if output.suffix == ".safetensors" else output.name
    library = record["result"]["library"]
    library = "peft" if adapter and library == "transformers" else library
    return exported(record, session, name, adapter=adapter, library=library, weights=weights)


def _document(record: Mapping[str, Any], output: Path) -> None:
    """Write record and card into the folder of an export, or beside its file."""
    inside = (output / RECORD, output / CARD)
    places = dict(
        zip((RECORD, CARD), inside if output.is_dir() else beside_file(output), strict=True)
    )
    for name, content in papers(record).items():
        places[name].write_bytes(content)


def _exported(session: Session, role: Role, output: Path, layout: str) -> Path:
    """Write a role's weights; return what was written."""
    family = session.family
    name = session.config.family["name"]
    if isinstance(family, TextRows | Questions):
        if layout not in TEXT_LAYOUTS:
            raise UserError(f"layout {layout!r} is for images and videos, not for {name}; here: "
                            f"{', '.join(TEXT_LAYOUTS)}")  # fmt: skip
        return _write_text(role, output, layout)
    if not isinstance(family, LatentFamily):
        raise UserError(f"the family {name} has nothing to export to")
    if layout in TEXT_LAYOUTS[2:]:
        raise UserError(f"layout {layout!r} is for text models, not for {name}")
    written = _write(family, role, output, layout)
    if isinstance(family, WanStreaming):
        _say_how_it_streams(session, family, role, written)
    return written


def _say_how_it_streams(session: Session, family: WanStreaming, role: Role, written: Path) -> None:
    method = session.config.method
    write_settings(
        written if written.is_dir() else written.parent,
        family,
        base=role.settings.path or family.path,
        num_steps=int(method.get("num_steps", session.config.pictures.num_steps)),
        sampler=method.get("sampler", "euler"),
        size=session.config.data.size or session.config.pictures.size,
    )


def _write_text(role: Role, output: Path, layout: str) -> Path:
    family = role.family
    assert isinstance(family, NetworkFamily), f"{role.name} is no language model"
    kind = "lora" if role.settings.shadow is None else "shadow"
    if layout == "auto":
        layout = "model" if role.adapter is None else kind
    if layout == "model":
        return export_language_model(family, role.network, output, adapter=role.adapter)
    weights = _own_adapter(role, "model")
    if layout not in (kind, "detached") or (layout == "detached" and kind != "shadow"):
        raise UserError(f"the adapter of {role.name} is a {kind}, not to be had as layout {layout}")
    if layout == "detached":
        assert role.adapter is not None, "_own_adapter refuses others"
        return export_detached(family, role.network, output, adapter=role.adapter)
    return export_adapter(family, weights, output, role.settings)


def _own_adapter(role: Role, instead: str) -> dict[str, Tensor]:
    """Return the factors of a role's adapter.

    Raises:
        UserError: If it has none.
    """
    if role.adapter is None:
        raise UserError(f"{role.name} was trained fully: export it as {instead}")
    return {n: t for n, t in role_tensors(role).items() if not n.startswith("head.")}


def _write(family: LatentFamily, role: Role, output: Path, layout: str) -> Path:
    if layout == "auto":
        layout = "pipeline" if role.adapter is None else "lora"
    if layout in ("lora", "comfyui-lora"):
        weights, source = _own_adapter(role, "pipeline or single-file"), role.settings
        if source.dora:
            raise UserError(
                "a DoRA has no such layout: export it merged, as pipeline or single-file"
            )
        write = export_lora if layout == "lora" else export_comfy_lora
        return write(family, weights, output, rank=source.rank, alpha=source.alpha)
    write_network = export_pipeline if layout == "pipeline" else export_single_file
    return write_network(family, role.network, output, adapter=role.adapter)

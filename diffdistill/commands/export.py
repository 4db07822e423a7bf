"""``diffdistill export``: trained weights for other programs."""

from pathlib import Path

from torch import Tensor

from diffdistill import catalog
from diffdistill.checkpoints import restore, role_tensors
from diffdistill.errors import UserError
from diffdistill.pipelines.exporting import (
    export_comfy_lora,
    export_lora,
    export_pipeline,
    export_single_file,
)
from diffdistill.pipelines.exporting_text import export_language_lora, export_language_model
from diffdistill.pipelines.latent import LatentFamily
from diffdistill.pipelines.network_family import NetworkFamily
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.text_rows import TextRows
from diffdistill.pipelines.wan_pipeline import write_settings
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.roles import Role
from diffdistill.session import Session

LAYOUTS = ("auto", "lora", "pipeline", "single-file", "comfyui-lora", "model")
TEXT_LAYOUTS = ("auto", "lora", "model")


def export(
    run: Path,
    output: Path,
    *,
    layout: str = "auto",
    role: str = "student",
    checkpoint: str = "latest",
) -> Path:
    """Export a role of a run and return what was written.

    Args:
        run: The run's folder.
        output: A file for ``single-file`` and ``comfyui-lora``, a folder for the others.
        layout: ``lora`` is what diffusers' ``load_lora_weights`` reads; ``pipeline`` a complete
            diffusers folder; ``single-file`` the transformer in the original key layout, which
            ComfyUI reads; ``comfyui-lora`` a LoRA in that layout; ``auto`` is ``lora`` for an
            adapter and ``pipeline`` for a fully trained network. Of text models, ``lora`` is
            what peft reads, and ``model`` (``auto`` for a fully trained network) a complete
            folder for transformers.
        role: ``student``, or ``average`` where ``train.ema`` kept one.
        checkpoint: Which checkpoint of the run.

    Raises:
        UserError: If the role or layout is not to be had.
    """
    if layout not in LAYOUTS:
        known = dict.fromkeys(LAYOUTS)
        raise UserError(f"no layout {layout!r}{catalog.near(layout, known)}; {', '.join(LAYOUTS)}")
    session = restore(run, checkpoint)
    known_roles = session.roles.by_name
    if role not in known_roles:
        raise UserError(f"no role {role!r} in {run}; here: {catalog.listing(known_roles)}")
    family = session.family
    name = session.config.family["name"]
    if isinstance(family, TextRows | Questions):
        if layout not in TEXT_LAYOUTS:
            raise UserError(f"layout {layout!r} is for images and videos, not for {name}; here: "
                            f"{', '.join(TEXT_LAYOUTS)}")  # fmt: skip
        return _write_text(known_roles[role], output, layout)
    if not isinstance(family, LatentFamily):
        raise UserError(f"the family {name} has nothing to export to")
    if layout == "model":
        raise UserError(f"layout 'model' is for text models, not for {name}")
    written = _write(family, known_roles[role], output, layout)
    if isinstance(family, WanStreaming):
        _say_how_it_streams(session, family, known_roles[role], written)
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
    if layout == "auto":
        layout = "model" if role.adapter is None else "lora"
    if layout == "lora":
        weights, source = _own_adapter(role, "model"), role.settings
        return export_language_lora(family, weights, output, rank=source.rank, alpha=source.alpha)
    return export_language_model(family, role.network, output, adapter=role.adapter)


def _own_adapter(role: Role, instead: str) -> dict[str, Tensor]:
    """Return the factors of a role's adapter.

    Raises:
        UserError: If it has none.
    """
    if role.adapter is None:
        raise UserError(f"{role.name} was trained fully: export it as {instead}")
    if role.settings.weights not in ("trained", "ema"):
        raise UserError(f"{role.name} has no weights of its own: {role.settings.weights}")
    return {n: t for n, t in role_tensors(role).items() if not n.startswith("head.")}


def _write(family: LatentFamily, role: Role, output: Path, layout: str) -> Path:
    if layout == "auto":
        layout = "pipeline" if role.adapter is None else "lora"
    if layout in ("lora", "comfyui-lora"):
        weights, source = _own_adapter(role, "pipeline or single-file"), role.settings
        write = export_lora if layout == "lora" else export_comfy_lora
        return write(family, weights, output, rank=source.rank, alpha=source.alpha)
    write_network = export_pipeline if layout == "pipeline" else export_single_file
    return write_network(family, role.network, output, adapter=role.adapter)

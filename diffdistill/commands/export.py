"""``diffdistill export``: trained weights for other programs."""

from pathlib import Path

from diffdistill import catalog
from diffdistill.checkpoints import restore, role_tensors
from diffdistill.errors import UserError
from diffdistill.pipelines.exporting import (
    export_comfy_lora,
    export_lora,
    export_model,
    export_pipeline,
    export_single_file,
)
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.latent import LatentFamily
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.wan_pipeline import write_settings
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.roles import Role
from diffdistill.session import Session

LAYOUTS = ("auto", "lora", "pipeline", "single-file", "comfyui-lora", "model")


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
        output: A folder for ``lora``, ``pipeline`` and ``model``, a file for the others.
        layout: ``lora`` is what diffusers' ``load_lora_weights`` reads; ``pipeline`` a complete
            diffusers folder; ``single-file`` the transformer in the original key layout, which
            ComfyUI reads; ``comfyui-lora`` a LoRA in that layout; ``auto`` is ``lora`` for an
            adapter and ``pipeline`` for a fully trained network. ``model``, for transformers, is
            the one layout of a language model, an adapter merged in.
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
    if isinstance(family, TextPair):
        chosen = known_roles[role]
        _check_layout(layout, ("auto", "model"))
        assert isinstance(chosen.family, LanguageFamily)
        return export_model(chosen.family, chosen.network, output, adapter=chosen.adapter)
    _check_layout(layout, tuple(name for name in LAYOUTS if name != "model"))
    if not isinstance(family, LatentFamily):
        raise UserError(f"the family {session.config.family['name']} has nothing to export to")
    written = _write(family, known_roles[role], output, layout)
    if isinstance(family, WanStreaming):
        _say_how_it_streams(session, family, written)
    return written


def _check_layout(layout: str, fitting: tuple[str, ...]) -> None:
    if layout not in fitting:
        raise UserError(f"this family is not exported as {layout}, but as {', '.join(fitting)}")


def _say_how_it_streams(session: Session, family: WanStreaming, written: Path) -> None:
    method = session.config.method
    write_settings(
        written if written.is_dir() else written.parent,
        family,
        num_steps=int(method.get("num_steps", session.config.sample.num_steps)),
        sampler=method.get("sampler", "euler"),
    )


def _write(family: LatentFamily, role: Role, output: Path, layout: str) -> Path:
    if layout == "auto":
        layout = "pipeline" if role.adapter is None else "lora"
    if layout in ("lora", "comfyui-lora"):
        if role.adapter is None:
            raise UserError(f"{role.name} was trained fully: export it as pipeline or single-file")
        source = role.settings
        if source.weights not in ("trained", "ema"):
            raise UserError(f"{role.name} has no weights of its own: {source.weights}")
        weights = {n: t for n, t in role_tensors(role).items() if not n.startswith("head.")}
        write = export_lora if layout == "lora" else export_comfy_lora
        return write(family, weights, output, rank=source.rank, alpha=source.alpha)
    write_network = export_pipeline if layout == "pipeline" else export_single_file
    return write_network(family, role.network, output, adapter=role.adapter)

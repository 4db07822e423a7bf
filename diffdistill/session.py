"""Everything that a config describes, built: family, roles and method."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from diffdistill import catalog
from diffdistill.bundled import bundled
from diffdistill.config import RunConfig
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.method import Method
from diffdistill.panel import Deferred, Panel
from diffdistill.pipelines.flow import FlowFamily
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.model_family import ModelFamily
from diffdistill.pipelines.text_pair import Reading, TextPair
from diffdistill.protocols import Reward
from diffdistill.roles import Roles, RoleSettings, build_roles, enable_checkpointing

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass
class Session:
    """The built parts of one config.

    Attributes:
        config: The checked config.
        family: The model family, with its encoders; of language models, the student's and the
            teacher's.
        roles: The models.
        method: The method, wired to them.
        draws: The random numbers of the run.
        device: Where everything runs.
    """

    config: RunConfig
    family: FlowFamily | TextPair
    roles: Roles
    method: Method
    draws: Draws
    device: torch.device


def default_device() -> torch.device:
    """Return this process's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def build_family(settings: Mapping[str, Any], device: torch.device) -> ModelFamily:
    """Return the family of a config's ``family`` section; no weights are loaded yet."""
    options = {k: v for k, v in settings.items() if k not in ("name", "path")}
    family = catalog.load("family", settings["name"])
    try:
        built: ModelFamily = family(path=resolve_model(settings["path"]), device=device, **options)
    except UserError as error:
        raise UserError(f"family {settings['name']}: {error}") from error
    return built


def flow_family(session: Session) -> FlowFamily:
    """Return the family of a session, which has to be of images or videos.

    Raises:
        UserError: If it is of texts.
    """
    if isinstance(session.family, FlowFamily):
        return session.family
    raise UserError(f"family {session.config.family['name']} makes texts, not images or videos")


def text_pair(session: Session) -> TextPair:
    """Return the readers of a session, which has to be of texts.

    Raises:
        UserError: If it is of images or videos.
    """
    if isinstance(session.family, TextPair):
        return session.family
    raise UserError(f"family {session.config.family['name']} makes images or videos, not texts")


def resolve_model(path: str) -> str:
    """Return the folder of a ``bundled:name`` model; any other path or hub id as it is."""
    kind, colon, name = path.partition(":")
    return str(bundled("models", name)) if kind == "bundled" and colon else path


def build(config: RunConfig, device: torch.device | None = None) -> Session:
    """Return the session of ``config``: loads the networks and wires the method.

    Raises:
        UserError: If a checkpoint, target or role does not fit.
    """
    device = device or default_device()
    family = build_family(config.family, device)
    others = _other_families(config, family, device)
    _check_quantized(config)
    draws = Draws(config.train.seed)
    roles = build_roles(_resolved(config.roles), family, others=others, seed=config.train.seed)
    for role in roles.by_name.values():
        role.autocast = DTYPES[config.train.precision]
    if config.train.gradient_checkpointing:
        for network in roles.networks():
            enable_checkpointing(network)
    if config.train.compile:
        _check_compilable(family, roles)
        for network in roles.networks():  # of language models, what is called
            getattr(network, "base_model", network).compile()
    read = _read_by(config, family, others)
    method = _wire(config, read, roles, draws)
    return Session(config, read, roles, method, draws, device)


def _check_compilable(family: ModelFamily, roles: Roles) -> None:
    """Refuse to compile what torch cannot, or would compile anew for every block."""
    if any(role.head is not None for role in roles.by_name.values()):
        raise UserError("train.compile cannot be combined with a role's head: true")
    if getattr(family, "positions", None) == "absolute":
        raise UserError(
            "train.compile would compile each block of a stream anew, as its positions are new: "
            "set family.positions: relative, or train.compile: false"
        )


def _other_families(
    config: RunConfig, family: ModelFamily, device: torch.device
) -> dict[str, LanguageFamily]:
    """Return the family of each role that is not of the run's.

    Raises:
        UserError: If it is not the teacher of a text model.
    """
    others = {}
    for name, role in config.roles.items():
        if role.family is None:
            continue
        other = build_family(role.family, device)
        fits = isinstance(family, LanguageFamily) and isinstance(other, LanguageFamily)
        if name != "teacher" or not fits:
            raise UserError(f"roles.{name}.family: only the teacher of a text model may have one")
        assert isinstance(other, LanguageFamily)
        others[name] = other
    return others


def _read_by(
    config: RunConfig, family: ModelFamily, others: Mapping[str, LanguageFamily]
) -> FlowFamily | TextPair:
    """Return what reads the data: the family, or of texts both families."""
    if isinstance(family, LanguageFamily):
        data = config.data
        reading = Reading(
            turns="all" if data.turns == "all" else "last",
            packing=data.packing,
            truncate=data.truncate,
            skip=data.on_error == "skip",
        )
        return TextPair(family, others.get("teacher", family), reading)
    assert isinstance(family, FlowFamily)
    return family


def _check_quantized(config: RunConfig) -> None:
    """Refuse to train weights that are stored rounded."""
    for name, role in config.roles.items():
        stored = (role.family or config.family).get("quantize", "none")
        if stored != "none" and role.weights == "trained" and role.adapter == "none":
            raise UserError(
                f"family.quantize: {stored} stores the network rounded, so roles.{name} cannot "
                "train all of it: set roles."
                f"{name}.adapter: lora, or family.quantize: none"
            )


def _resolved(settings: Mapping[str, RoleSettings]) -> dict[str, RoleSettings]:
    """Return the settings with bundled paths resolved."""
    resolved = {}
    for name, chosen in settings.items():
        path = None if chosen.path is None else resolve_model(chosen.path)
        resolved[name] = RoleSettings(**{**vars(chosen), "path": path})
    return resolved


def build_reward(config: RunConfig, device: torch.device) -> Reward:
    """Return the judge of ``config``'s ``rewards``; several are one with all their axes.

    Their weights are loaded when they are first asked; ``load_rewards`` loads them at once.

    Raises:
        UserError: If there is none.
    """
    if not config.rewards:
        known = catalog.listing(catalog.names("reward"))
        raise UserError(f"method {config.method['name']} needs rewards: one of {known}")
    rewards = []
    for settings in config.rewards:
        options = {k: v for k, v in settings.items() if k != "name"}
        kind = catalog.load("reward", settings["name"])
        rewards.append(Deferred(kind, {"device": device, **options}))
    return rewards[0] if len(rewards) == 1 else Panel(rewards)


def load_rewards(reward: Any) -> None:
    """Load the weights of what ``build_reward`` returned.

    Raises:
        UserError: If they are missing or do not fit.
    """
    for member in getattr(reward, "members", [reward]):
        _ = member.loaded


def _wire(config: RunConfig, family: FlowFamily | TextPair, roles: Roles, draws: Draws) -> Method:
    cls = catalog.load("method", config.method["name"])
    options = {k: v for k, v in config.method.items() if k != "name"}
    if cls.texts != isinstance(family, TextPair):
        kind = "texts: it needs a family" if cls.texts else "images and videos: it needs a family"
        other = "bd3lm" if cls.texts else "flux2-klein"
        raise UserError(
            f"method {config.method['name']} is for {kind} such as family.name: {other}, not "
            f"{config.family['name']}"
        )
    if cls.streams != hasattr(family, "rollout"):
        able = "streams: it needs a family that does" if cls.streams else "does not stream"
        other = "wan-streaming" if cls.streams else "wan"
        raise UserError(
            f"method {config.method['name']} {able}, such as family.name: {other}, not "
            f"{config.family['name']}"
        )
    played: dict[str, Any] = {name: roles[name] for name in cls.roles}
    if "reward" in {item.name for item in fields(cls)}:
        played["reward"] = build_reward(config, family.device)
    try:
        return cls(family=family, draws=draws, **played, **options)
    except ValueError as error:
        raise UserError(f"method {config.method['name']}: {error}") from error

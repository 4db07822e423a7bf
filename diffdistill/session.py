"""Everything that a config describes, built: family, roles and method."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from diffdistill import catalog
from diffdistill.config import RunConfig
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.family_building import Read, build_family, other_families, read_by, resolve_model
from diffdistill.method import Method
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.pipelines.flow import FlowFamily
from diffdistill.pipelines.questions import Questions, context_length
from diffdistill.pipelines.server import Server
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.reward_building import build_answer_reward, build_reward
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Roles, enable_checkpointing
from diffdistill.session_checks import (
    check_compilable,
    check_engine,
    check_frozen,
    check_heads,
    check_kind,
    check_quantized,
    check_shadows,
    check_support,
)

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass
class Session:
    """The built parts of one config.

    Attributes:
        config: The checked config.
        family: The model family, with its encoders; of language models, the student's and the
            teacher's, which read texts or questions.
        roles: The models.
        method: The method, wired to them.
        draws: The random numbers of the run.
        device: Where everything runs.
    """

    config: RunConfig
    family: Read
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
        UserError: If it is of images or videos, or of an autoregressive model.
    """
    if isinstance(session.family, TextPair):
        return session.family
    name = session.config.family["name"]
    if isinstance(session.family, Questions | CausalPair):
        raise UserError(f"family {name} is autoregressive, and this is for masked diffusion")
    raise UserError(f"family {name} makes images or videos, not texts")


def questions(session: Session) -> Questions:
    """Return the readers of questions of a session of an autoregressive model."""
    read = session.family
    if isinstance(read, CausalPair):
        return Questions(read.student, read.teacher, read.asking, compared=False)
    assert isinstance(read, Questions), "commands ask for the kind of a run before"
    return read


def build(config: RunConfig, device: torch.device | None = None) -> Session:
    """Return the session of ``config``: loads the networks and wires the method.

    Raises:
        UserError: If a checkpoint, target or role does not fit.
    """
    device = device or default_device()
    family = build_family(config.family, device)
    check_kind(config, family)
    others = other_families(config, family, device)
    check_quantized(config)
    check_shadows(config, family)
    check_engine(config)
    check_support(config, family)
    read = read_by(config, family, others)
    draws = Draws(config.train.seed)
    roles = build_roles(_resolved(config.roles), family, others=others, seed=config.train.seed)
    for role in roles.by_name.values():
        role.autocast = DTYPES[config.train.precision]
    if config.train.gradient_checkpointing:
        for network in roles.networks():
            enable_checkpointing(network)
    if config.train.compile:
        check_compilable(config, family, roles)
        for network in roles.networks():  # of language models, what is called
            getattr(network, "base_model", network).compile()
    if isinstance(read, Questions):
        networks = {name: role.network for name, role in roles.by_name.items()}
        read.context_lengths = {name: context_length(net) for name, net in networks.items()}
    method = _wire(config, read, roles, draws)
    add_heads(method, roles, config.train.seed)
    check_heads(roles)
    if isinstance(read, CausalPair) and type(method).annotate is not Method.annotate:
        check_frozen(config)
        read.annotator = method
    return Session(config, read, roles, method, draws, device)


def check_servers(session: Session) -> None:
    """Ask the servers of a session about a short text, as training will; others need no check.

    Raises:
        UserError: If one cannot do what it will be asked.
    """
    if isinstance(session.family, Questions):
        session.family.engine.check()
    for role in session.roles.by_name.values():
        if isinstance(role.family, Server):
            role.family.check()


def add_heads(method: Method, roles: Roles, seed: int) -> None:
    """Give roles the heads that the method wants."""
    if type(method).heads is Method.heads:
        return
    embeddings = {name: _embeddings(role.network) for name, role in roles.by_name.items()}
    widths = {name: weight.shape[-1] for name, weight in embeddings.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, head in method.heads(widths).items():
            roles[name].head = head.to(embeddings[name].device)


def _embeddings(network: Any) -> torch.Tensor:
    """Return the weight of a language model's output head, ``[V, H]``."""
    weight: torch.Tensor = network.get_output_embeddings().weight
    return weight


def _resolved(settings: Mapping[str, RoleSettings]) -> dict[str, RoleSettings]:
    """Return the settings with bundled paths resolved."""
    resolved = {}
    for name, chosen in settings.items():
        path = None if chosen.path is None else resolve_model(chosen.path)
        resolved[name] = RoleSettings(**{**vars(chosen), "path": path})
    return resolved


def _wire(config: RunConfig, family: Read, roles: Roles, draws: Draws) -> Method:
    cls = catalog.load("method", config.method["name"])
    options = {k: v for k, v in config.method.items() if k != "name"}
    if isinstance(family, FlowFamily) and cls.streams != hasattr(family, "rollout"):
        able = "streams: it needs a family that does" if cls.streams else "does not stream"
        other = "wan-streaming" if cls.streams else "wan"
        raise UserError(
            f"method {config.method['name']} {able}, such as family.name: {other}, not "
            f"{config.family['name']}"
        )
    played: dict[str, Any] = {name: roles[name] for name in cls.roles}
    if experts := cls.experts(list(config.data.skills or {}), options):
        played["peers"] = {name: roles[name] for name in experts}
    if "reward" in {item.name for item in fields(cls)}:
        build_judge = build_answer_reward if cls.kind() == "answers" else build_reward
        needed = bool(config.rewards) or not cls.reward_optional
        played["reward"] = build_judge(config, family.device) if needed else None
    try:
        return cls(family=family, draws=draws, **played, **options)
    except ValueError as error:
        raise UserError(f"method {config.method['name']}: {error}") from error

"""Everything that a config describes, built: family, roles and method."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch

from diffdistill import catalog
from diffdistill.bundled import bundled
from diffdistill.config import RunConfig
from diffdistill.data.settings import DataSettings
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.method import Kind, Method
from diffdistill.panel import Deferred, Panel
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.pipelines.engines import Engine
from diffdistill.pipelines.flow import FlowFamily
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.model_family import ModelFamily
from diffdistill.pipelines.network_family import NetworkFamily
from diffdistill.pipelines.picture_questions import PictureQuestions
from diffdistill.pipelines.questions import Asking, Questions
from diffdistill.pipelines.server import Server
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.text_rows import Reading
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.pipelines.vlm import VLM
from diffdistill.protocols import Reward
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Roles, enable_checkpointing
from diffdistill.skill_rewards import SkillRewards
from diffdistill.text.comparing import Comparing
from diffdistill.text.exposed import Exposed
from diffdistill.text.extrapolating import Extrapolating
from diffdistill.verifying import AnswerReward

DTYPES = {"fp32": None, "bf16": torch.bfloat16}

KINDS: dict[Kind, tuple[type, str, str]] = {
    "pictures": (FlowFamily, "images and videos", "flux2-klein"),
    "texts": (LanguageFamily, "texts", "bd3lm"),
    "answers": (CausalLM, "autoregressive language models", "causal-lm"),
}
"""Of each kind of run: the class of its family, what it is of, and such a family's name."""

Read: TypeAlias = FlowFamily | TextPair | CausalPair | Questions
"""What reads a run's data, and is the family that its method knows."""


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
    _check_kind(config, family)
    others = _other_families(config, family, device)
    _check_quantized(config)
    _check_shadows(config, family)
    _check_engine(config)
    read = _read_by(config, family, others)
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
    method = _wire(config, read, roles, draws)
    add_heads(method, roles, config.train.seed)
    if isinstance(read, CausalPair) and type(method).annotate is not Method.annotate:
        _check_frozen(config)
        read.annotator = method
    return Session(config, read, roles, method, draws, device)


def _check_kind(config: RunConfig, family: ModelFamily) -> None:
    """Refuse a family that is not of the kind of the method."""
    name = config.method["name"]
    cls, what, other = KINDS[catalog.load("method", name).kind()]
    if not isinstance(family, cls):
        raise UserError(
            f"method {name} is for {what}: it needs a family such as family.name: {other}, not "
            f"{config.family['name']}"
        )


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
) -> dict[str, TokenFamily]:
    """Return the family of each role that is not of the run's.

    Raises:
        UserError: If it is not the teacher of a text model, or of another kind than the student.
    """
    others = {}
    for name, role in config.roles.items():
        if role.family is None:
            continue
        other = build_family(role.family, device)
        if name != "teacher" or not isinstance(family, TokenFamily):
            raise UserError(f"roles.{name}.family: only the teacher of a text model may have one")
        masked = isinstance(family, LanguageFamily)
        if not isinstance(other, TokenFamily) or isinstance(other, LanguageFamily) != masked:
            kind = "a masked-diffusion" if masked else "an autoregressive"
            raise UserError(
                f"roles.teacher.family: {role.family['name']} cannot teach "
                f"{config.family['name']}: it must be {kind} model too"
            )
        if role.weights in ("ema", "live"):
            raise UserError(
                f"roles.teacher: its weights are {role.weights} of {role.of!r}, so it is of the "
                "family of that role: leave roles.teacher.family out, or set weights: frozen"
            )
        if isinstance(other, Server):
            _check_served(config, role, other)
            other = other.reading_as(family)
        others[name] = other
    return others


def _check_served(config: RunConfig, role: RoleSettings, server: Server) -> None:
    """Refuse a server as the teacher of a method that asks for more than its most likely tokens."""
    method, name = config.method, config.method["name"]
    cls = catalog.load("method", name)
    if role.weights != "frozen":
        raise UserError("roles.teacher: a server cannot be trained: set weights: frozen")
    if not issubclass(cls, Comparing) or issubclass(cls, Exposed | Extrapolating):
        raise UserError(
            f"method {name} needs the teacher's whole prediction, and a server gives its most "
            "likely tokens: take opd or opsd, or a teacher of the family causal-lm"
        )
    if method["temperature"] != 1:
        raise UserError(
            f"method.temperature is {method['temperature']}, and a server gives log-probabilities "
            "at 1, a few of which do not tell those at another: set method.temperature: 1"
        )
    if method["select"] != "none" and method["retention"] < 1:
        raise UserError(
            f"method.select: {method['select']} needs the teacher's whole prediction, and a server "
            "gives its most likely tokens: set it to none"
        )
    if method["divergence"] == "sampled":
        return
    if method["support"] not in ("teacher", "intersection"):
        raise UserError(
            f"method.support: {method['support']} needs the teacher's whole prediction, and a "
            "server gives its most likely tokens: set method.support: teacher or intersection, or "
            "method.divergence: sampled"
        )
    if method["support_size"] > server.top_k:
        raise UserError(
            f"method.support_size is {method['support_size']}, and roles.teacher.family.top_k is "
            f"{server.top_k}: raise top_k (vLLM gives as many as its --max-logprobs, by default "
            "20), or lower support_size"
        )


def build_engine(config: RunConfig) -> Engine:
    """Return what writes the student's answers; nothing is loaded or asked yet."""
    options = {k: v for k, v in config.engine.items() if k != "name"}
    try:
        engine: Engine = catalog.load("engine", config.engine["name"])(**options)
    except UserError as error:
        raise UserError(f"engine {config.engine['name']}: {error}") from error
    return engine


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


def _read_by(config: RunConfig, family: ModelFamily, others: Mapping[str, TokenFamily]) -> Read:
    """Return what reads the data: the family, or of language models both families.

    Raises:
        UserError: If they cannot read it together.
    """
    data = config.data
    reading = Reading(
        turns="all" if data.turns == "all" else "last",
        packing=data.packing,
        truncate=data.truncate,
        skip=data.on_error == "skip",
    )
    teacher = others.get("teacher", family)
    if isinstance(family, CausalLM):
        return _read_by_causal(config, family, teacher, reading)
    if isinstance(family, LanguageFamily):
        assert isinstance(teacher, LanguageFamily)
        return TextPair(family, teacher, reading)
    assert isinstance(family, FlowFamily)
    return family


def _read_by_causal(
    config: RunConfig, family: CausalLM, teacher: ModelFamily, reading: Reading
) -> Questions | CausalPair:
    """Return what reads questions to answer, or texts that are given.

    Raises:
        UserError: If the families cannot read them together.
    """
    name, asking = config.method["name"], asking_of(config.data)
    if not catalog.load("method", name).given:
        kind = PictureQuestions if isinstance(family, VLM) else Questions
        assert isinstance(teacher, TokenFamily)
        return kind(family, teacher, asking, build_engine(config))
    if isinstance(family, VLM):
        raise UserError(f"method {name} learns texts, without pictures: take causal-lm")
    if not isinstance(teacher, CausalLM):
        raise UserError(f"method {name} needs a teacher of family causal-lm")
    return CausalPair(family, teacher, reading, asking=asking)


def asking_of(data: DataSettings) -> Asking:
    """Return how questions are put, as the section ``data`` says."""
    return Asking(
        student_prompt=data.student_prompt,
        teacher_prompt=data.teacher_prompt,
        student_thinking=data.student_thinking,
        teacher_thinking=data.teacher_thinking,
        max_prompt=data.max_prompt,
        max_answer=data.max_answer,
        skip=data.on_error == "skip",
    )


def _check_frozen(config: RunConfig) -> None:
    """Refuse a teacher that changes while what it said is kept."""
    weights = config.roles["teacher"].weights
    if weights != "frozen":
        raise UserError(
            f"roles.teacher: what it says is kept on disk, so weights must be frozen, not {weights}"
        )


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


def _check_shadows(config: RunConfig, family: ModelFamily) -> None:
    """Refuse a shadow of anything but a causal LM of transformers, and where it is not one role."""
    for name, role in config.roles.items():
        if role.adapter == "shadow" and not isinstance(family, NetworkFamily):
            raise UserError(
                f"roles.{name}.adapter: shadow is for language models on networks of transformers "
                f"(causal-lm, bd3lm, mdlm), not for {config.family['name']}: use lora"
            )


def _check_engine(config: RunConfig) -> None:
    """Refuse an engine that cannot write with the adapter of a role that is trained."""
    if not config.engine:
        return
    name = config.engine["name"]
    able = catalog.load("engine", name).adapters
    for role, chosen in config.roles.items():
        kind = "dora" if chosen.dora else chosen.adapter
        if chosen.weights == "trained" and kind not in ("none", *able):
            raise UserError(
                f"roles.{role}: engine {name} writes with whole networks and {' or '.join(able)}, "
                f"not with {kind}: set engine: transformers"
            )


def _resolved(settings: Mapping[str, RoleSettings]) -> dict[str, RoleSettings]:
    """Return the settings with bundled paths resolved."""
    resolved = {}
    for name, chosen in settings.items():
        path = None if chosen.path is None else resolve_model(chosen.path)
        resolved[name] = RoleSettings(**{**vars(chosen), "path": path})
    return resolved


def build_reward(config: RunConfig, device: torch.device) -> Reward:
    """Return the judge of pictures of ``config``'s ``rewards``; several are one with all axes.

    Their weights are loaded when they are first asked; ``load_rewards`` loads them at once.

    Raises:
        UserError: If there is none.
    """
    rewards = [Deferred(kind, options) for kind, options in _rewards(config, device)]
    return rewards[0] if len(rewards) == 1 else Panel(rewards)


def build_answer_reward(config: RunConfig, device: torch.device) -> AnswerReward:
    """Return the judge of answers of ``config``'s ``rewards``; those of skills are one.

    Raises:
        UserError: If there is none, or more than one without a skill.
    """
    found = _rewards(config, device)
    skills = [settings.get("skill") for settings in config.rewards]
    if all(skills):
        made = {str(s): kind(**options) for s, (kind, options) in zip(skills, found, strict=True)}
        return SkillRewards(device=device, rewards=made)
    (kind, options), *others = found
    if others:
        raise UserError(
            f"rewards: method {config.method['name']} takes one, and here are {1 + len(others)}"
        )
    reward: AnswerReward = kind(**options)
    return reward


def _rewards(config: RunConfig, device: torch.device) -> list[tuple[type, dict[str, Any]]]:
    """Return class and options of each reward.

    Raises:
        UserError: If there is none, or one judges another kind of samples than the method makes.
    """
    name = config.method["name"]
    if not config.rewards:
        known = catalog.listing(catalog.names("reward"))
        raise UserError(f"method {name} needs rewards: one of {known}")
    of_answers = catalog.load("method", name).kind() == "answers"
    rewards = []
    for settings in config.rewards:
        options = {k: v for k, v in settings.items() if k not in ("name", "skill")}
        cls = catalog.load("reward", settings["name"])
        if issubclass(cls, AnswerReward) != of_answers:
            judged, made = ("images and videos", "answers")[:: 1 if of_answers else -1]
            raise UserError(
                f"rewards: {settings['name']} judges {judged}, and method {name} makes {made}"
            )
        rewards.append((cls, {"device": device, **options}))
    return rewards


def load_rewards(reward: Any) -> None:
    """Load the weights of what ``build_reward`` returned; one of answers has none.

    Raises:
        UserError: If they are missing or do not fit.
    """
    if isinstance(reward, AnswerReward):
        return
    for member in getattr(reward, "members", [reward]):
        _ = member.loaded


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

"""What a config asks for that does not go together, refused before anything is loaded or run."""

from diffdistill import catalog
from diffdistill.config import RunConfig
from diffdistill.errors import UserError
from diffdistill.method import Kind
from diffdistill.pipelines.bd3lm import BD3LM
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.flow import FlowFamily
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.mdlm import MDLM
from diffdistill.pipelines.model_family import ModelFamily
from diffdistill.pipelines.server import Server
from diffdistill.pipelines.vlm import VLM
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Roles
from diffdistill.text.comparing import Comparing
from diffdistill.text.exposed import Exposed
from diffdistill.text.extrapolating import Extrapolating
from diffdistill.text.switch_kd import SwitchKD

KINDS: dict[Kind, tuple[type, str, str]] = {
    "pictures": (FlowFamily, "images and videos", "flux2-klein"),
    "texts": (LanguageFamily, "texts", "bd3lm"),
    "answers": (CausalLM, "autoregressive language models", "causal-lm"),
}
"""Of each kind of run: the class of its family, what it is of, and such a family's name."""

SHADOWED = (CausalLM, BD3LM, MDLM)
"""Families with networks that a shadow can be beside; of the first, not those that see pictures."""


def check_kind(config: RunConfig, family: ModelFamily) -> None:
    """Refuse a family that is not of the kind of the method."""
    name = config.method["name"]
    cls, what, other = KINDS[catalog.load("method", name).kind()]
    if not isinstance(family, cls):
        raise UserError(
            f"method {name} is for {what}: it needs a family such as family.name: {other}, not "
            f"{config.family['name']}"
        )


def check_compilable(config: RunConfig, family: ModelFamily, roles: Roles) -> None:
    """Refuse to compile what torch cannot, or would compile anew for every block."""
    cls = catalog.load("method", config.method["name"])
    if issubclass(cls, SwitchKD) and config.method["switch_weight"]:
        raise UserError(
            "train.compile leaves out the hooks by which the switched term reaches the parts of a "
            "network: set train.compile: false, or method.switch_weight: 0"
        )
    if any(role.head is not None for role in roles.by_name.values()):
        raise UserError("train.compile cannot be combined with a role's head: true")
    if getattr(family, "positions", None) == "absolute":
        raise UserError(
            "train.compile would compile each block of a stream anew, as its positions are new: "
            "set family.positions: relative, or train.compile: false"
        )


def check_heads(roles: Roles) -> None:
    """Refuse a learning rate of a head that is not there."""
    for name, role in roles.by_name.items():
        if role.settings.head_lr is not None and role.head is None:
            raise UserError(
                f"roles.{name}.head_lr is for a role with a head, and {name} has none: leave it out"
            )


def check_served(config: RunConfig, role: RoleSettings, server: Server) -> None:
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
    if method.get("off_policy") == "teacher" and method["on_policy_share"] < 1:
        raise UserError(
            "method.off_policy: teacher needs a teacher that writes, and a server only judges: set "
            "it to data, or on_policy_share to 1, or take a teacher of the family causal-lm"
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


def check_support(config: RunConfig, family: ModelFamily) -> None:
    """Refuse a support of more tokens than the vocabulary has."""
    size = config.method.get("support_size", 0)
    if not isinstance(family, CausalLM) or config.method.get("support", "full") == "full":
        return
    if size > family.words:
        raise UserError(
            f"method.support_size is {size}, and {family.path} has {family.words} tokens: lower "
            "it, or set method.support: full"
        )


def check_frozen(config: RunConfig) -> None:
    """Refuse a teacher that changes while what it said is kept."""
    weights = config.roles["teacher"].weights
    if weights != "frozen":
        raise UserError(
            f"roles.teacher: what it says is kept on disk, so weights must be frozen, not {weights}"
        )


def check_quantized(config: RunConfig) -> None:
    """Refuse to train weights that are stored rounded."""
    for name, role in config.roles.items():
        stored = (role.family or config.family).get("quantize", "none")
        if stored != "none" and role.weights == "trained" and role.adapter == "none":
            raise UserError(
                f"family.quantize: {stored} stores the network rounded, so roles.{name} cannot "
                "train all of it: set roles."
                f"{name}.adapter: lora, or family.quantize: none"
            )


def check_shadows(config: RunConfig, family: ModelFamily) -> None:
    """Refuse a shadow of a network that none was tried on."""
    able = isinstance(family, SHADOWED) and not isinstance(family, VLM)
    for name, role in config.roles.items():
        if role.adapter == "shadow" and not able:
            raise UserError(
                f"roles.{name}.adapter: shadow is for language models of the families causal-lm, "
                f"bd3lm and mdlm, not for {config.family['name']}: use lora"
            )


def check_engine(config: RunConfig) -> None:
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

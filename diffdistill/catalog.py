"""Every name a config file may use, and where its class lives.

The values are strings, so that looking one name up imports one module, and so that this
module can name the pipelines and rewards without importing them.
"""

import difflib
import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from diffdistill.errors import UserError

METHODS = {
    "alm": "diffdistill.text.alm:ALM",
    "atesd": "diffdistill.text.atesd:ATESD",
    "bd3lm": "diffdistill.methods.bd3lm:BD3LM",
    "bld": "diffdistill.text.bld:BLD",
    "causal-init": "diffdistill.methods.causal_init:CausalInit",
    "confidence": "diffdistill.methods.confidence:Confidence",
    "copd": "diffdistill.text.copd:CoPD",
    "d-opsd": "diffdistill.methods.d_opsd:DOPSD",
    "dmd": "diffdistill.methods.dmd:DMD",
    "egx": "diffdistill.text.egx:EGX",
    "exopd": "diffdistill.text.exopd:ExOPD",
    "gold": "diffdistill.methods.gold:GOLD",
    "grpo": "diffdistill.text.grpo:GRPO",
    "off-policy": "diffdistill.methods.off_policy:OffPolicy",
    "opd": "diffdistill.text.opd:OPD",
    "opsd": "diffdistill.text.opsd:OPSD",
    "rlsd": "diffdistill.text.rlsd:RLSD",
    "sdar": "diffdistill.text.sdar:SDAR",
    "sdpo": "diffdistill.text.sdpo:SDPO",
    "sdtt": "diffdistill.methods.sdtt:SDTT",
    "self-forcing": "diffdistill.methods.self_forcing:SelfForcing",
    "sft": "diffdistill.methods.sft:SFT",
    "sft-answers": "diffdistill.text.sft_answers:AnswerSFT",
    "stream-r1": "diffdistill.methods.stream_r1:StreamR1",
    "switch-kd": "diffdistill.text.switch_kd:SwitchKD",
    "text-gold": "diffdistill.methods.text_uld:TextGOLD",
    "text-sft": "diffdistill.text.sft:SFT",
    "text-uld": "diffdistill.methods.text_uld:TextULD",
    "tide": "diffdistill.methods.tide:Tide",
    "uld": "diffdistill.methods.uld:ULD",
}

FAMILIES = {
    "bd3lm": "diffdistill.pipelines.bd3lm:BD3LM",
    "causal-lm": "diffdistill.pipelines.causal_lm:CausalLM",
    "flux2-klein": "diffdistill.pipelines.flux2_klein:Flux2Klein",
    "llada2": "diffdistill.pipelines.llada2:LLaDA2",
    "mdlm": "diffdistill.pipelines.mdlm:MDLM",
    "server": "diffdistill.pipelines.server:Server",
    "toy": "diffdistill.pipelines.toy:Toy",
    "vlm": "diffdistill.pipelines.vlm:VLM",
    "wan": "diffdistill.pipelines.wan:Wan",
    "wan-streaming": "diffdistill.pipelines.wan_streaming:WanStreaming",
    "wedlm": "diffdistill.pipelines.wedlm:WeDLM",
    "z-image": "diffdistill.pipelines.z_image:ZImage",
}

REWARDS = {
    "aesthetic": "diffdistill.rewards.aesthetic:Aesthetic",
    "boxed": "diffdistill.rewards.boxed:Boxed",
    "clip": "diffdistill.rewards.clip:Clip",
    "digits-video": "diffdistill.rewards.digits_video:DigitsVideo",
    "exact": "diffdistill.rewards.exact:Exact",
    "hps-v2": "diffdistill.rewards.hps_v2:HPSv2",
    "json-answer": "diffdistill.rewards.json_answer:JsonAnswer",
    "pickscore": "diffdistill.rewards.pickscore:PickScore",
    "video-reward": "diffdistill.rewards.video_reward:VideoReward",
}

ENGINES = {
    "continuous": "diffdistill.pipelines.continuous:Continuous",
    "transformers": "diffdistill.pipelines.engines:Generate",
    "vllm": "diffdistill.pipelines.vllm_engine:Vllm",
    "vllm-server": "diffdistill.pipelines.vllm_server:VllmServer",
}

TABLES = {"method": METHODS, "family": FAMILIES, "reward": REWARDS, "engine": ENGINES}


def names(kind: str) -> dict[str, str]:
    """Return name and address of every ``method``, ``family``, ``reward`` or ``engine``.

    Other packages add names through the entry points ``diffdistill.methods``,
    ``diffdistill.families``, ``diffdistill.rewards`` and ``diffdistill.engines``; they cannot
    replace one of ours.
    """
    group = "families" if kind == "family" else f"{kind}s"
    found = entry_points(group=f"diffdistill.{group}")
    return {point.name: point.value for point in found} | TABLES[kind]


def load(kind: str, name: str) -> Any:
    """Return the class called ``name``, or at ``name`` if it is "module:Class".

    A reward may also be in a file of the user's: "my_reward.py:MyReward".

    Raises:
        UserError: If there is no such name, module, file or class.
    """
    own = TABLES[kind]
    table = own if name in own else names(kind)  # the others are looked for on disk
    module, _, attribute = table.get(name, name).rpartition(":")
    if not module or not attribute:
        raise UserError(f"unknown {kind} {name!r}{near(name, table)}; known: {listing(table)}")
    if kind == "reward" and name not in table and module.endswith(".py"):
        return _reward_of_file(Path(module).expanduser(), attribute)
    try:
        return getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"cannot load the {kind} {name!r}: {error}") from error


def _reward_of_file(file: Path, attribute: str) -> Any:
    """Return a reward class of a user's file, which is run because the user named it.

    Raises:
        UserError: If there is no such file or class, or the class is no ``Reward``.
    """
    from diffdistill.rewarding import Reward
    from diffdistill.verifying import AnswerReward

    if not file.is_file():
        raise UserError(f"reward {file}:{attribute}: there is no file {file.absolute()}")
    name = f"diffdistill_reward_{sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"reward {file}:{attribute}: cannot run {file}: {what}") from error
    found = getattr(sys.modules[name], attribute, None)
    if found is None:
        kinds = {k: v for k, v in vars(sys.modules[name]).items() if isinstance(v, type)}
        classes = listing({k: v for k, v in kinds.items() if v.__module__ == name})
        raise UserError(
            f"reward {file}:{attribute}: there is no {attribute} in it; its classes: "
            f"{classes or 'none'}"
        )
    if not isinstance(found, type) or not issubclass(found, Reward | AnswerReward):
        raise UserError(
            f"reward {file}:{attribute}: {attribute} must be a subclass of "
            "diffdistill.rewarding.Reward, or of diffdistill.verifying.AnswerReward"
        )
    if missing := sorted(found.__abstractmethods__):
        raise UserError(f"reward {file}:{attribute}: it must define {', '.join(missing)}")
    if issubclass(found, Reward) and not getattr(found, "axes", ()):
        raise UserError(f"reward {file}:{attribute}: it must name its axes: axes = ('quality',)")
    return found


def near(name: str, known: Mapping[str, Any]) -> str:
    """Return ", did you mean ...?" if a known name resembles ``name``, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def listing(known: Mapping[str, Any]) -> str:
    """Return the known names, sorted, in one line."""
    return ", ".join(sorted(known))

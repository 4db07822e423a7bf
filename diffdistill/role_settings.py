"""What a config says about a role: where its weights come from, and which of them are trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffdistill.errors import UserError
from diffdistill.shadow import ShadowSettings


@dataclass(kw_only=True)
class RoleSettings:
    """Where the weights of a role come from.

    Attributes:
        weights: ``trained`` has its own optimizer; ``ema`` averages the role named in ``of``;
            ``frozen`` never changes; ``live`` is the role named in ``of`` itself, without
            gradient; ``mean`` is the average of the weights of all trained roles.
        of: The role that ``ema`` and ``live`` follow.
        path: A transformer folder to load instead of the family's own.
        adapter: ``lora`` trains an adapter of the frozen base, ``shadow`` a small network beside it
            (of language models), ``none`` the whole network.
        rank: Rank of the adapter.
        alpha: The adapter's update is scaled with ``alpha / rank``.
        dropout: Dropout of the adapter's input.
        targets: Suffixes of module names to adapt; None takes the family's list. Rank, alpha,
            dropout, targets and dora are those of ``lora``.
        dora: Whether the adapter is a DoRA, which also trains the length of each row of a weight.
        shadow: The settings of ``shadow``; None takes its defaults.
        decay: Decay of the ``ema`` for each update of the role it follows.
        start: Updates of that role during which the ``ema`` is a copy of it.
        lr: Learning rate, where it differs from ``train.lr``.
        head: Add a classifier head on the features, for adversarial terms.
        head_lr: Learning rate of the role's head, this one or those of a method, where it differs
            from that of the rest (ours).
        family: Of a text model: the family (name, path and options) that a teacher of another
            kind than the student is of, with its own tokenizer. None is the run's ``family``.
    """

    weights: Literal["trained", "ema", "frozen", "live", "mean"] = "trained"
    of: str = "student"
    path: str | None = None
    adapter: Literal["lora", "shadow", "none"] = "none"
    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    targets: list[str] | None = None
    dora: bool = False
    shadow: ShadowSettings | None = None
    decay: float = 0.9999
    start: int = 0
    lr: float | None = None
    head: bool = False
    head_lr: float | None = None
    family: dict[str, Any] | None = None


LORA_OPTIONS = ("rank", "alpha", "dropout", "targets", "dora")
"""What has a say for ``adapter: lora`` alone."""

OF_WEIGHTS = {
    "path": ("trained", "frozen"),
    **dict.fromkeys(("adapter", "shadow", "lr", "head", "head_lr", *LORA_OPTIONS), ("trained",)),
    "of": ("ema", "live"),
    "decay": ("ema",),
    "start": ("ema",),
}
"""The weights for which an option has a say."""

OF_FORM = ("path", "adapter", *LORA_OPTIONS, "shadow", "head", "head_lr", "lr")
"""What a mean has from the roles that it is of."""


def check_used(chosen: RoleSettings, default: RoleSettings, where: str) -> None:
    """Refuse settings that would have no say, such as the rank of a network trained whole.

    The file of a run names all options, so what is as in ``RoleSettings`` or in ``default`` passes.

    Args:
        chosen: The settings of a role.
        default: Those that its method gives it.
        where: The section of the role, for the message.

    Raises:
        UserError: If there is such a setting.
    """
    for option, kinds in OF_WEIGHTS.items():
        if getattr(chosen, option) in (getattr(RoleSettings(), option), getattr(default, option)):
            continue
        if chosen.weights == "mean" and option in OF_FORM:
            continue  # ``_check_mean`` says more of it
        if chosen.weights not in kinds:
            raise UserError(
                f"{where}.{option} is for weights: {' or '.join(kinds)}, and they are "
                f"{chosen.weights}: leave {option} out"
            )
        if option in LORA_OPTIONS and chosen.adapter != "lora":
            raise UserError(
                f"{where}.{option} is for adapter: lora, and it is {chosen.adapter}: "
                f"set adapter: lora, or leave {option} out"
            )


def check_roles(settings: Mapping[str, RoleSettings]) -> None:
    """Refuse settings of roles that do not go together.

    Raises:
        UserError: If they do not.
    """
    for name, chosen in settings.items():
        for option, fine, range_ in (
            ("rank", chosen.rank >= 1, "at least 1"),
            ("dropout", 0 <= chosen.dropout < 1, "in [0, 1)"),
            ("decay", 0 <= chosen.decay <= 1, "in [0, 1]"),
            ("start", chosen.start >= 0, "at least 0"),
            ("lr", chosen.lr is None or chosen.lr >= 0, "at least 0"),
            ("head_lr", chosen.head_lr is None or chosen.head_lr >= 0, "at least 0"),
        ):
            if not fine:
                given = getattr(chosen, option)
                raise UserError(f"roles.{name}.{option} must be {range_}, not {given}")
        if chosen.dora and chosen.adapter != "lora":
            raise UserError(f"roles.{name}.dora is for adapter: lora, and it is {chosen.adapter}")
        _check_shadow(name, chosen)
        if chosen.weights == "mean":
            _check_mean(name, settings)
        if chosen.weights not in ("ema", "live"):
            continue
        followed = settings.get(chosen.of)
        if followed is None or followed.weights != "trained":
            trained = [n for n, s in settings.items() if s.weights == "trained"]
            raise UserError(
                f"roles.{name}: weights {chosen.weights!r} of {chosen.of!r}, which is not a "
                f"trained role; trained here: {', '.join(trained) or 'none'}"
            )
        of = "" if followed.shadow is None else "shadow."
        dropout = followed.dropout if followed.shadow is None else followed.shadow.dropout
        if chosen.weights == "live" and dropout > 0:
            raise UserError(
                f"roles.{name}: a live role shares the dropout of {chosen.of!r}, so its judgment "
                f"would be noisy; set roles.{chosen.of}.{of}dropout to 0"
            )


def _check_shadow(name: str, chosen: RoleSettings) -> None:
    shadow = chosen.shadow
    if shadow is None:
        return
    if chosen.adapter != "shadow":
        raise UserError(f"roles.{name}.shadow is for adapter: shadow, and it is {chosen.adapter}")
    if chosen.targets is not None:
        raise UserError(f"roles.{name}.targets is for adapter: lora; a shadow is beside all blocks")
    for option, fine, range_ in (
        ("rank", shadow.rank is None or shadow.rank >= 1, "at least 1"),
        ("update_size", shadow.update_size is None or shadow.update_size >= 1, "at least 1"),
        ("num_layers", shadow.num_layers >= 1, "at least 1"),
        ("num_heads", shadow.num_heads is None or shadow.num_heads >= 1, "at least 1"),
        ("dropout", 0 <= shadow.dropout < 1, "in [0, 1)"),
        ("auxiliary_weight", shadow.auxiliary_weight >= 0, "at least 0"),
    ):
        if not fine:
            given = getattr(shadow, option)
            raise UserError(f"roles.{name}.shadow.{option} must be {range_}, not {given}")


def _check_mean(name: str, settings: Mapping[str, RoleSettings]) -> None:
    """Refuse the mean of networks that have not the same weights, and a form of its own."""
    mean = settings[name]
    own = [option for option in OF_FORM if not _usual(mean, option)]
    if own:
        raise UserError(
            f"roles.{name}.{own[0]}: {name} is the mean of the trained roles and has their form: "
            f"set {own[0]} of each of them"
        )
    trained = {n: s for n, s in settings.items() if s.weights == "trained"}
    forms = {(s.path, s.adapter, s.rank, s.alpha, str(s.targets)) for s in trained.values()}
    if len(forms) != 1 or any(s.head or s.dora or s.shadow for s in trained.values()):
        raise UserError(
            f"roles.{name}: a mean is of trained roles with the same path, adapter, rank, alpha "
            "and targets, and without heads, DoRA or shadows; trained here: "
            f"{', '.join(trained) or 'none'}"
        )


def _usual(chosen: RoleSettings, option: str) -> bool:
    return bool(getattr(chosen, option) == getattr(RoleSettings(), option))

"""The parts that models play: which weights, and which of them are trained.

A role is a network, an adapter of it (or none) and the family that knows how to call it.
Methods see only the call; whether roles share one base is decided here, from the config.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffdistill.adapters import active, adapter_parameters, add_lora, tuner_layers
from diffdistill.errors import UserError
from diffdistill.merging import mean_weights
from diffdistill.projection import Prediction
from diffdistill.shadow import ShadowSettings, add_shadow, alone, forget
from diffdistill.shadow_losses import auxiliary_loss
from diffdistill.sights import Sight
from diffdistill.types import Condition, State


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
    family: dict[str, Any] | None = None


class Caller(Protocol):
    """What a role needs of its family."""

    adapter_targets: ClassVar[tuple[str, ...]]

    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded network, of the family's checkpoint or of another."""
        ...

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Prediction:
        """Return the canonical prediction of ``network``."""
        ...

    def look(self, network: nn.Module, condition: Condition) -> Sight:
        """Return what the vision encoder of ``network`` makes of the pictures of ``condition``."""
        ...

    def features(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return features ``[B, N, D]`` of the state's tokens from the middle of ``network``."""
        ...


class Head(nn.Module):
    """A logit per sample from token features: normalize, mix, average. The form is ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``[B]`` of features ``[B, N, D]``."""
        return self.layers(features).mean(dim=(1, 2))


@dataclass(frozen=True)
class Extra:
    """What a role learns besides its losses.

    Attributes:
        value: A scalar mean with a graph.
        count: How many things it is the mean of.
    """

    value: Tensor
    count: int


@dataclass(eq=False)
class Role:
    """One model of a method: callable as ``role(state, condition)``.

    Attributes:
        name: Its name in the config.
        settings: Where its weights come from.
        family: Calls the network.
        network: May be shared with other roles.
        adapter: The adapter that is active in its calls; None for the bare network.
        head: Is trained with the role, and belongs to no export.
        autocast: Matrix multiplications run in this type; None for the weights' own.
        detached: Whether its shadow acts alone, without the base.
    """

    name: str
    settings: RoleSettings
    family: Caller
    network: nn.Module
    adapter: str | None = None
    head: nn.Module | None = None
    autocast: torch.dtype | None = None
    detached: bool = False
    _extra: list[tuple[Tensor, int]] = field(default_factory=list)

    def __call__(self, state: State, condition: Condition) -> Any:
        """Return the prediction at ``state``: a tensor in float32, anything else as it is."""
        with self.acting(state.x.device):
            found = self.family.predict(self.network, state, condition)
            if self.trained and self.settings.shadow is not None:
                self._learn_alone(found, state, condition)
            return found.float() if isinstance(found, Tensor) else found

    def look(self, condition: Condition) -> Sight:
        """Return what this role's vision encoder makes of the pictures of ``condition``."""
        with self.acting(next(self.network.parameters()).device):
            return self.family.look(self.network, condition)

    def _learn_alone(self, found: Any, state: State, condition: Condition) -> None:
        """Keep what the shadow alone has to learn at a call with a gradient; drop its state."""
        assert self.settings.shadow is not None
        if torch.is_grad_enabled() and self.settings.shadow.auxiliary_weight:
            with alone(self.network, again=True):
                by_itself = self.family.predict(self.network, state, condition)
            settings = self.settings.shadow
            self._extra.append(auxiliary_loss(settings, by_itself, found, state, condition))
        forget(self.network)

    def extra(self) -> Extra | None:
        """Return what the calls since it was last asked teach besides; None where nothing."""
        kept, self._extra = self._extra, []
        if not kept:
            return None
        count = max(sum(number for _, number in kept), 1)
        return Extra(torch.stack([total for total, _ in kept]).sum() / count, count)

    def discriminate(self, state: State, condition: Condition) -> Tensor:
        """Return one logit per sample, ``[B]``, from the head on this role's features."""
        assert self.head is not None, f"role {self.name} has no head"
        with self.acting(state.x.device):
            features = self.family.features(self.network, state, condition)
            return self.head(features.float()).float()

    @property
    def trained(self) -> bool:
        """Return whether the role has an optimizer of its own."""
        return self.settings.weights == "trained"

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are this role's alone, by name.

        Roles with the same kind of weights have the same names, so that one can be copied to,
        or averaged into, another.
        """
        if self.settings.weights == "live":
            return {}
        if self.adapter is not None:
            own = adapter_parameters(self.network, self.adapter)
        elif self.settings.weights == "frozen":
            own = {}
        else:
            own = dict(self.network.named_parameters())
        if self.head is not None:
            own |= {f"head.{name}": p for name, p in self.head.named_parameters()}
        return own

    @contextmanager
    def acting(self, device: torch.device) -> Iterator[None]:
        """Let calls of the network within the block be this role's."""
        layers = layers_of(self.network)
        learns = torch.is_grad_enabled() and self.settings.weights != "live"
        with (
            active(layers, self.adapter),
            alone(self.network) if self.detached else nullcontext(),
            torch.set_grad_enabled(learns),
            torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            yield


def layers_of(network: nn.Module) -> list[Any]:
    """Return the adapter layers of ``network``, found once."""
    layers = network.__dict__.get("_diffdistill_layers")
    if layers is None:
        layers = tuner_layers(network)
        network.__dict__["_diffdistill_layers"] = layers
    return layers


def enable_checkpointing(network: nn.Module) -> None:
    """Recompute the blocks of ``network`` in the backward pass, under the adapter of the forward.

    Another role may be active on the same base by the time of the backward pass, so the
    adapter is remembered and put back for the recomputation.

    Raises:
        UserError: If the network cannot recompute its blocks.
    """
    described: Any = network
    of_diffusers = hasattr(network, "enable_gradient_checkpointing")
    if not of_diffusers and not getattr(network, "supports_gradient_checkpointing", False):
        raise UserError(f"{type(network).__name__} has no gradient checkpointing")

    def run(block: Any, *args: Any, **kwargs: Any) -> Any:
        layers = layers_of(network)
        name = layers[0]._active_adapter[0] if layers and layers[0]._active_adapter else None

        def block_as_called(*args: Any, **kwargs: Any) -> Any:
            with active(layers, name):
                return block(*args, **kwargs)

        return checkpoint(block_as_called, *args, use_reentrant=False, **kwargs)

    if of_diffusers:
        described.enable_gradient_checkpointing(gradient_checkpointing_func=run)
        return
    described._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)
    for module in network.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # transformers asks the layer; what is in it stays as it was


@dataclass
class Roles:
    """All roles of a run, by name, and the networks behind them."""

    by_name: dict[str, Role] = field(default_factory=dict)
    matched: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Role:
        return self.by_name[name]

    def trained(self) -> list[Role]:
        """Return the roles that have an optimizer."""
        return [role for role in self.by_name.values() if role.trained]

    def networks(self) -> list[nn.Module]:
        """Return the distinct networks; that of a server has no weights, and is left out."""
        networks = {id(r.network): r.network for r in self.by_name.values()}.values()
        return [network for network in networks if any(True for _ in network.parameters())]

    def modules(self) -> list[nn.Module]:
        """Return the distinct networks and the heads."""
        heads = [role.head for role in self.by_name.values() if role.head is not None]
        return self.networks() + heads

    @torch.no_grad()
    def average(self, updated: str, updates: int = 1) -> None:
        """Move every average of the role ``updated`` towards it, after so many of its updates."""
        for role in self.by_name.values():
            if role.settings.weights == "mean":
                set_mean(role, self.trained())
            if role.settings.weights == "ema" and role.settings.of == updated:
                share = 1.0 if updates <= role.settings.start else 1.0 - role.settings.decay
                if share == 0.0:
                    continue  # decay 1: it is renewed or stays (see ``Method.renewals``)
                source = self[updated].parameters()
                for name, parameter in role.parameters().items():
                    parameter.lerp_(source[name].to(parameter.dtype), share)


def build_roles(
    settings: Mapping[str, RoleSettings],
    family: Caller,
    *,
    others: Mapping[str, Caller] | None = None,
    seed: int = 0,
) -> Roles:
    """Return the roles, sharing one base network wherever their settings allow it.

    Adapter roles and frozen roles without a ``path`` share the base; a fully trained role gets
    a network of its own.

    Args:
        settings: Where the weights of each role come from.
        family: The run's family.
        others: The families of the roles that have one of their own.
        seed: Of the adapters' initialization.

    Raises:
        UserError: If a role follows one that is not there or not trained.
    """
    _check(settings)
    roles = Roles()
    others = others or {}
    shared = {name: chosen for name, chosen in settings.items() if name not in others}
    networks = {name: _Networks(own, {name: settings[name]}) for name, own in others.items()}
    networks |= dict.fromkeys(shared, _Networks(family, shared))
    ordered = sorted(settings.items(), key=lambda item: _turn(item[1], settings))
    for name, chosen in ordered:
        if chosen.weights == "live":
            source = roles[chosen.of]
            roles.by_name[name] = Role(name, chosen, source.family, source.network, source.adapter)
        elif chosen.weights == "ema":
            roles.by_name[name] = _averaged(name, chosen, roles[chosen.of])
        elif chosen.weights == "mean":
            roles.by_name[name] = _merged(name, chosen, roles.trained())
        else:
            roles.by_name[name] = _loaded(name, chosen, networks[name], roles, seed)
    roles.by_name = {name: roles[name] for name in settings}
    for role in roles.by_name.values():
        for parameter in role.parameters().values():
            parameter.requires_grad_(role.trained)
    return roles


def _turn(chosen: RoleSettings, settings: Mapping[str, RoleSettings]) -> int:
    """Return when a role is built.

    Bases are copied before adapters are put into them, LoRA is put in before a shadow is put around
    its blocks, what follows a role comes after it, and what is a mean after all.
    """
    if chosen.weights == "mean":
        return 1 + max(_turn(s, settings) for s in settings.values() if s.weights == "trained")
    if chosen.weights in ("ema", "live"):
        return 1 + _turn(settings[chosen.of], settings)
    adapter = chosen.adapter if chosen.weights == "trained" else "none"
    return {"none": 0, "lora": 1, "shadow": 3}[adapter]


class _Networks:
    """Loads each checkpoint once, and hands out copies to roles that change theirs."""

    def __init__(self, family: Caller, settings: Mapping[str, RoleSettings]) -> None:
        self.family = family
        self.loaded: dict[str | None, nn.Module] = {}
        self.kept = {s.path for s in settings.values() if _keeps_base(s)}

    def shared(self, path: str | None) -> nn.Module:
        if path not in self.loaded:
            self.loaded[path] = self.family.network(path).requires_grad_(False)
        return self.loaded[path]

    def own(self, path: str | None) -> nn.Module:
        network = self.shared(path)
        if path in self.kept:
            return copy.deepcopy(network)
        self.kept.add(path)
        return network


def _keeps_base(settings: RoleSettings) -> bool:
    return settings.weights == "frozen" or (
        settings.weights == "trained" and settings.adapter != "none"
    )


def _loaded(name: str, chosen: RoleSettings, networks: _Networks, roles: Roles, seed: int) -> Role:
    family = networks.family
    if chosen.weights == "frozen":
        return Role(name, chosen, family, networks.shared(chosen.path))
    head = _new_head(networks.shared(chosen.path), seed) if chosen.head else None
    if chosen.adapter == "none":
        network = networks.own(chosen.path).float()
        return Role(name, chosen, family, network, head=head)
    network = networks.shared(chosen.path)
    roles.matched[name] = _add_adapter(network, name, chosen, family, seed)
    return Role(name, chosen, family, network, adapter=name, head=head)


def _averaged(name: str, chosen: RoleSettings, source: Role) -> Role:
    form, family = source.settings, source.family
    chosen = replace(
        chosen,
        path=form.path,
        adapter=form.adapter,
        rank=form.rank,
        alpha=form.alpha,
        targets=form.targets,
        dora=form.dora,
        shadow=None if form.shadow is None else replace(form.shadow, dropout=0.0),
    )
    if source.adapter is None:
        network = copy.deepcopy(source.network)
        return Role(name, chosen, family, network)
    _add_adapter(source.network, name, chosen, family, seed=0)
    role = Role(name, chosen, family, source.network, adapter=name)
    copy_parameters(source, role)
    return role


def _merged(name: str, chosen: RoleSettings, sources: list[Role]) -> Role:
    """Return the mean of roles; of adapters it is one adapter that has all their ranks."""
    first = sources[0]
    ours = first.settings
    form = replace(ours, weights="mean", lr=None)
    if first.adapter is not None:
        count = len(sources)
        form = replace(form, rank=count * ours.rank, alpha=count * ours.alpha)
        _add_adapter(first.network, name, form, first.family, seed=0)
        role = Role(name, form, first.family, first.network, adapter=name)
    else:
        role = Role(name, form, first.family, copy.deepcopy(first.network))
    set_mean(role, sources)
    return role


@torch.no_grad()
def set_mean(target: Role, sources: list[Role]) -> None:
    """Set the weights of ``target`` to the mean of those of ``sources``."""
    parts = [source.parameters() for source in sources]
    found = mean_weights(parts, adapters=target.adapter is not None)
    for name, parameter in target.parameters().items():
        parameter.copy_(found[name])


def _add_adapter(
    network: nn.Module, name: str, chosen: RoleSettings, family: Caller, seed: int
) -> int:
    network.__dict__.pop("_diffdistill_layers", None)
    if chosen.shadow is not None:
        return add_shadow(network, name, chosen.shadow, seed=seed)
    targets = chosen.targets if chosen.targets is not None else family.adapter_targets
    return add_lora(
        network,
        name,
        rank=chosen.rank,
        alpha=chosen.alpha,
        dropout=chosen.dropout,
        dora=chosen.dora,
        targets=targets,
        seed=seed,
    )


def _new_head(network: nn.Module, seed: int) -> Head:
    described: Any = network
    width = getattr(network, "inner_dim", None) or described.config.dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(int(width))
    return head.to(next(network.parameters()).device)


@torch.no_grad()
def copy_parameters(source: Role, target: Role) -> None:
    """Set the weights of ``target`` to those of ``source``."""
    values = source.parameters()
    for name, parameter in target.parameters().items():
        parameter.copy_(values[name])


def _check(settings: Mapping[str, RoleSettings]) -> None:
    for name, chosen in settings.items():
        for option, fine, range_ in (
            ("rank", chosen.rank >= 1, "at least 1"),
            ("dropout", 0 <= chosen.dropout < 1, "in [0, 1)"),
            ("decay", 0 <= chosen.decay <= 1, "in [0, 1]"),
            ("start", chosen.start >= 0, "at least 0"),
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
        ("num_heads", shadow.num_heads is None or shadow.num_heads >= 1, "at least 1"),
        ("dropout", 0 <= shadow.dropout < 1, "in [0, 1)"),
        ("auxiliary_weight", shadow.auxiliary_weight >= 0, "at least 0"),
    ):
        if not fine:
            given = getattr(shadow, option)
            raise UserError(f"roles.{name}.shadow.{option} must be {range_}, not {given}")


def _check_mean(name: str, settings: Mapping[str, RoleSettings]) -> None:
    """Refuse the mean of networks that have not the same weights."""
    trained = {n: s for n, s in settings.items() if s.weights == "trained"}
    forms = {(s.path, s.adapter, s.rank, s.alpha, str(s.targets)) for s in trained.values()}
    if len(forms) != 1 or any(s.head or s.dora or s.shadow for s in trained.values()):
        raise UserError(
            f"roles.{name}: a mean is of trained roles with the same path, adapter, rank, alpha "
            "and targets, and without heads, DoRA or shadows; trained here: "
            f"{', '.join(trained) or 'none'}"
        )

"""Roles, built from a config: which of them share one base is decided here."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffdistill.adapters import add_lora
from diffdistill.role_settings import RoleSettings, check_roles
from diffdistill.roles import Caller, Head, Role, Roles, set_mean
from diffdistill.shadow import add_shadow


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
    check_roles(settings)
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

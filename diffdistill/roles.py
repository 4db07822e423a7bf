"""The parts that models play: a network, an adapter of it or none, and who knows how to call it.

Methods see only the call.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from diffdistill.adapters import active, adapter_parameters, tuner_layers
from diffdistill.errors import UserError
from diffdistill.merging import mean_weights
from diffdistill.projection import Prediction
from diffdistill.role_settings import RoleSettings
from diffdistill.shadow import alone, forget
from diffdistill.shadow_losses import auxiliary_loss
from diffdistill.sights import Sight
from diffdistill.types import Condition, State


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
        """Let calls of the network within the block be this role's.

        Autocast keeps the weights that it has cast until the block ends, which of a sharded network
        would be the whole of it.
        """
        layers = layers_of(self.network)
        learns = torch.is_grad_enabled() and self.settings.weights != "live"
        with (
            active(layers, self.adapter),
            alone(self.network) if self.detached else nullcontext(),
            torch.set_grad_enabled(learns),
            torch.autocast(
                device.type,
                dtype=self.autocast,
                enabled=self.autocast is not None,
                cache_enabled=not isinstance(self.network, FSDPModule),
            ),
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


@torch.no_grad()
def set_mean(target: Role, sources: list[Role]) -> None:
    """Set the weights of ``target`` to the mean of those of ``sources``."""
    parts = [source.parameters() for source in sources]
    found = mean_weights(parts, adapters=target.adapter is not None)
    for name, parameter in target.parameters().items():
        parameter.copy_(found[name])

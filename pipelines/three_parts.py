"""The parts of a vision-language model: encoder, projector, and the language model after them.

Parts are modules that the network's own code calls: what it does between them (which layer's
features, without the class token, in which order) stays its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffdistill.errors import UserError
from diffdistill.sights import Sight


class Parts(NamedTuple):
    """The modules that pictures go through before a language model reads them."""

    encoder: nn.Module
    projector: nn.Module


class _Reached(Exception):  # noqa: N818 - ends a call that has gone far enough
    """Carries what the projector was called with."""

    def __init__(self, features: Tensor) -> None:
        super().__init__("the projector")
        self.features = features


def parts_of(network: nn.Module, encoder: str, projector: str) -> Parts:
    """Return the parts of a network by the ends of their names.

    Raises:
        UserError: If there is none of a name, or several, or they are sharded.
    """
    if isinstance(network, FSDPModule):
        raise UserError("the parts of a sharded network cannot be called: train copies of it (ddp)")
    return Parts(_module(network, "encoder", encoder), _module(network, "projector", projector))


def _module(network: nn.Module, option: str, name: str) -> nn.Module:
    found = [m for path, m in network.named_modules() if f".{path}".endswith(f".{name}")]
    if len(found) != 1:
        children = dict(network.base_model.named_children())  # type: ignore[union-attr]
        raise UserError(
            f"{type(network).__name__} has {len(found)} modules called {name!r}: name one in "
            f"family.{option}; it consists of {', '.join(children)}"
        )
    return found[0]


def encoded(parts: Parts, call: Callable[[], object]) -> Sight:
    """Return what a call of the network gives its projector; the call ends there.

    Raises:
        UserError: If the projector is not called.
    """
    outputs: list[Any] = []

    def reached(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        raise _Reached(_first(args, options))

    hooks = [
        parts.encoder.register_forward_hook(lambda _module, _args, output: outputs.append(output)),
        parts.projector.register_forward_pre_hook(reached, with_kwargs=True),
    ]
    try:
        call()
    except _Reached as end:
        return Sight(end.features, outputs[-1])
    finally:
        for hook in hooks:
            hook.remove()
    raise UserError("there is no picture in this batch, and the switched term needs one")


@contextmanager
def fed(parts: Parts, sight: Sight) -> Iterator[None]:
    """Let the projector read given features within the block; the encoder does no work."""

    def give(
        _module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (sight.features, *args[1:]), options
        name = next(iter(options))
        return args, options | {name: sight.features}

    encoder: Any = parts.encoder
    hook = parts.projector.register_forward_pre_hook(give, with_kwargs=True)
    usual = encoder.__dict__.get("forward")
    encoder.forward = lambda *_args, **_options: sight.output
    try:
        yield
    finally:
        hook.remove()
        del encoder.forward
        if usual is not None:
            encoder.forward = usual


def _first(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    features: Tensor = args[0] if args else next(iter(options.values()))
    return features

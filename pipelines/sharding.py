"""The hidden states of causal LMs, whole or sharded by FSDP2."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def last_hidden(network: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the last hidden states ``[B, L, H]`` of a causal LM of transformers.

    Where FSDP2 has sharded it, only a call of the whole network gathers embeddings and head. Its
    logits, of one token, are then dropped; the hidden states are what it returns to FSDP2's hooks,
    so that the backward pass reduces the gradients of all that led to them. The head stays gathered
    until ``Distributed.reshard``.
    """
    if not isinstance(network, FSDPModule):
        return network.base_model(**inputs).last_hidden_state
    sharded: Any = network
    kept: list[Tensor] = []
    of_body = sharded.base_model.register_forward_hook(
        lambda _module, _inputs, output: kept.append(output.last_hidden_state)
    )
    of_whole = sharded.register_forward_hook(lambda *_: kept.pop(), prepend=True)
    try:
        hidden: Tensor = sharded(**inputs, logits_to_keep=1)
    finally:
        of_body.remove()
        of_whole.remove()
    sharded.unshard()
    return hidden

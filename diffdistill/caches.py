"""Caches of keys and values of transformers: their argument's name, and two that go together."""

import inspect
import weakref
from typing import Any

from torch import nn
from transformers import DynamicCache

FOLLOWED = ("crop", "batch_select_indices", "batch_repeat_interleave", "reorder_cache", "reset")


def cache_argument(body: nn.Module) -> str:
    """Return the name of a body's argument with the cache, which transformers 5.24 changed."""
    names = inspect.signature(body.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def follower(cache: Any, config: Any) -> Any:
    """Return the cache of a shadow beside ``cache``: what is done to one is done to the other.

    Args:
        cache: Of the base.
        config: Of the shadow's network.
    """
    kept = cache.__dict__.get("_diffdistill_shadow")
    if kept is None:
        kept = cache.__dict__["_diffdistill_shadow"] = DynamicCache(config=config)
        for name in FOLLOWED:
            setattr(cache, name, _both(name, cache, kept))
    return kept


def _both(name: str, cache: Any, kept: Any) -> Any:
    """Return the method of that name of both; held weakly, so that caches are freed at once."""
    method, own = getattr(type(cache), name), weakref.ref(cache)

    def call(*args: Any, **kwargs: Any) -> Any:
        getattr(kept, name)(*args, **kwargs)
        return method(own(), *args, **kwargs)

    return call

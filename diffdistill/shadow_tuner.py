"""The tuner of shadows: peft's, with caches that go together, and the authors' form of it."""

import inspect
from typing import Any

from peft import ShadowConfig, ShadowModel
from peft.tuners.shadow.layers import ShadowLayer
from torch import Tensor, nn
from transformers import DynamicCache

from diffdistill.caches import cache_argument, follower
from diffdistill.errors import UserError

NOT_MERGED = (
    "a shadow cannot be merged into its base, because what it adds depends on the input: export it "
    "as layout shadow, or alone as layout detached"
)


class Shadow(ShadowModel):
    """The shadows of one body, one of which is active in a call, or none.

    Attributes:
        alone: Whether the body returns s0, and its own blocks are not asked.
        again: Whether s0 is that of the last call, instead of a new one.
        state: s0 of the last call with a gradient, ``[B, L, H]``.
    """

    alone: bool = False
    again: bool = False

    @property
    def _active_adapter(self) -> Any:
        """The active adapter, under the name that adapter layers have for it."""
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, value: Any) -> None:
        self.active_adapter = value

    @property
    def state(self) -> Tensor | None:
        """s0 of the last call with a gradient."""
        return self._seed_shadow_state

    def _seed_shadow_pre_hook(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Make s0 of a call's inputs, and keep a cache of its own beside the base's.

        In place of peft's hook, which knows the cache by a name that transformers 5.24 changed:
        with it, peft 0.21.2 generates other tokens with a cache than without.
        """
        if self.again:
            return args, kwargs
        self._seed_shadow_state = None
        if not self._shadow_path_active():
            return args, kwargs
        inputs = (
            dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        )
        if inputs.get("use_cache") is None:
            inputs["use_cache"] = bool(module.config.use_cache)
        name = cache_argument(module)
        if inputs["use_cache"] and inputs.get(name) is None:
            inputs[name] = DynamicCache(config=module.config)
        self._seed_shadow_state = self._first_state(module, inputs, name)
        return (), inputs

    def _first_state(self, body: Any, inputs: dict[str, Any], cache: str) -> Tensor:
        adapter = self.active_adapters[0]
        backbone = self.shadow_backbone[adapter]
        embeddings = inputs.get("inputs_embeds")
        if embeddings is None:
            embeddings = body.get_input_embeddings()(inputs["input_ids"])
        kept = inputs.get(cache) if inputs["use_cache"] else None
        if kept is not None and not self.alone:
            kept = follower(kept, backbone.config)
        passed = {k: inputs[k] for k in ("attention_mask", "position_ids") if k in inputs}
        weights = next(backbone.parameters())
        found = backbone(
            inputs_embeds=embeddings.to(weights.dtype),
            use_cache=inputs["use_cache"],
            **{cache: kept},
            **passed,
        )
        state: Tensor = found.last_hidden_state
        return state

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> Any:
        """Refuse to merge, before anything is changed.

        peft removes its hooks first and then raises: the network goes on as the bare base, and
        nothing says so.
        """
        if merge:
            raise UserError(NOT_MERGED)
        return super()._unload_and_optionally_merge(merge=merge, **options)


class PaperLayer(ShadowLayer):
    """A block with a shadow in the authors' form (their code at 9e76546)."""

    def update_layer(self, adapter_name: str, config: ShadowConfig) -> None:
        """Create the weights of an adapter."""
        super().update_layer(adapter_name, config)
        width, hidden = self.hidden_size, config.update_hidden_size
        down = self.shadow_down[adapter_name].weight
        nn.init.normal_(down, std=0.02)
        for parts in (self.shadow_update_transform, self.shadow_update_gate):
            parts[adapter_name] = nn.Sequential(
                nn.Linear(width, hidden, bias=False),
                nn.SiLU(),
                nn.Dropout(config.shadow_dropout),
                nn.Linear(hidden, width, bias=False),
            ).to(down)

    def shadow_inject(self, hidden_states: Tensor, shadow_states: Tensor, name: str) -> Tensor:
        """Return the block's input ``[B, L, H]``, the difference injected (equations 2 to 4)."""
        down = self.shadow_down[name]
        delta = (hidden_states - shadow_states).to(down.weight.dtype)
        delta = self.shadow_up[name](self.shadow_dropout[name](down(delta)))
        return hidden_states + (self.shadow_alpha[name] * delta).to(hidden_states.dtype)

    def shadow_update(self, hidden_states: Tensor, shadow_states: Tensor, name: str) -> Tensor:
        """Return the next state ``[B, L, H]`` (equations 5 to 7), from the normalized output."""
        norm: nn.LayerNorm = self.norms[name]
        return super().shadow_update(norm(hidden_states.to(norm.weight.dtype)), shadow_states, name)


class PaperShadow(Shadow):
    """The same in the authors' form, with one layer norm for all blocks."""

    tuner_layer_cls = PaperLayer

    def _pre_injection_hook(self, model: Any, config: ShadowConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        if not hasattr(self, "shadow_norm"):
            self.shadow_norm = nn.ModuleDict()
        self.shadow_norm[adapter_name] = nn.LayerNorm(self._base_hidden_size())

    def _create_new_module(self, config: ShadowConfig, name: str, target: nn.Module) -> PaperLayer:
        layer = PaperLayer(target, name, config=config, hidden_size=self._base_hidden_size())
        layer.__dict__["norms"] = self.shadow_norm  # not a child: every block has the same
        return layer

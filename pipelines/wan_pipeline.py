"""Streaming inference from an exported student, without a config or a run.

```python
pipe = StreamingPipeline.from_pretrained("my-student")
for frames in pipe.stream("a cat on a beach"):
    show(frames)
```
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.switching import block_of, switched
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.types import Condition, Example, State

SETTINGS = "streaming.json"
"""Beside an exported student: how it streams, and with how many steps."""

STREAMED = (
    "shift", "block_frames", "window_frames", "sink_frames", "sink_decay", "positions",
    "context_noise", "max_sequence_length", "negative_prompt",
)  # fmt: skip
"""The family's options that a student is trained for."""

Sampler = Literal["renoise", "euler"]


def write_settings(
    folder: Path,
    family: WanStreaming,
    *,
    base: str,
    num_steps: int,
    sampler: Sampler,
    size: tuple[int, int] | None,
) -> None:
    """Write how a student of ``family``, begun from ``base``, streams beside its weights."""
    values = {name: getattr(family, name) for name in STREAMED}
    values |= {"base": base, "num_steps": num_steps, "sampler": sampler, "size": size}
    (folder / SETTINGS).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


class StreamingPipeline:
    """A causal Wan student that makes videos of any length, block after block.

    Args:
        family: Its options and encoders.
        network: The student.
        num_steps: Model calls for each block.
        sampler: ``renoise`` or ``euler``, as it was trained.
        size: ``(H, W)`` in pixels that it was trained at; None where its videos had several.
    """

    def __init__(
        self,
        family: WanStreaming,
        network: nn.Module,
        *,
        num_steps: int,
        sampler: Sampler,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.family = family
        self.network = network.requires_grad_(False).eval()
        self.num_steps = num_steps
        self.sampler = sampler
        self.size = size

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        lora: str | Path | None = None,
        base: str | Path | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Self:
        """Return the pipeline of a folder that ``diffdistill export`` wrote.

        Args:
            path: The exported pipeline; with ``lora``, the model whose encoders and VAE it was
                trained with (``family.path``).
            lora: The exported LoRA.
            base: The transformer that the LoRA is put on; None is where the one is that it was
                trained on, as the export says.
            device: Where it runs.
            options: Other options of the family ``wan-streaming``, such as ``dtype="bf16"``.

        Raises:
            UserError: If a folder is missing, or does not say how its student streams.
        """
        settings = _read_settings(Path(lora or path))
        own = ("base", "num_steps", "sampler", "size")
        trained_on, steps, sampler, size = (settings.pop(name) for name in own)
        family = WanStreaming(
            path=str(path), device=torch.device(device), **{**settings, **options}
        )
        if lora is None:
            network = family.network()
        else:
            network = _adapted(family, Path(lora), base or trained_on)
        size = None if size is None else tuple(size)
        return cls(family, network, num_steps=steps, sampler=sampler, size=size)

    def __call__(self, prompt: str, *, num_frames: int, **options: Any) -> Tensor:
        """Return ``num_frames`` frames ``[T, 3, H, W]`` in [0, 1] (see ``stream``)."""
        blocks = block_of(self.family, num_frames - 1) + 1
        parts = list(islice(self.stream(prompt, **options), blocks))
        return torch.cat(parts)[:num_frames]

    def stream(
        self,
        prompt: str,
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        switches: Mapping[int, str] | None = None,
    ) -> Iterator[Tensor]:
        """Yield frames ``[T, 3, H, W]`` in [0, 1], a block at a time, without end.

        Args:
            prompt: What to show.
            size: ``(H, W)`` in pixels; None is the size that it was trained at.
            seed: Seed of the noise.
            switches: Another prompt from the block on that holds a pixel frame.

        Raises:
            UserError: If nobody says the size, or a block would be told two prompts.
        """
        size = size or self.size
        if size is None:
            raise UserError("this student was trained at several sizes: give size=(H, W)")
        told, starts = switched(self.family, list((switches or {}).items()), prompt)
        conditions = [self._condition(text, size) for text in told]
        shape = self._block_shape(size)
        ids, draws = torch.zeros(1, dtype=torch.long, device=self.family.device), Draws(seed)

        def condition(block: int) -> Condition:
            return conditions[max((i for start, i in starts.items() if start <= block), default=0)]

        def noise(block: int) -> Tensor:
            return draws.normal(f"stream/{block}", ids, shape)

        def renoise(block: int, step: int) -> Tensor:
            return draws.normal(f"renoise/{block}/{step}", ids, shape)

        latents = self.family.stream(
            self._predict,
            condition,
            noise,
            num_steps=self.num_steps,
            renoise=renoise if self.sampler == "renoise" else None,
        )
        for frames in self.family.watch(latents):
            yield frames[0]

    def _predict(self, state: State, condition: Condition) -> Tensor:
        return self.family.predict(self.network, state, condition).float()

    def _condition(self, prompt: str, size: tuple[int, int]) -> Condition:
        frames = self.family.num_pixel_frames(self.family.block_frames)
        example = Example(prompt=prompt, size=size, num_frames=frames, origin="prompt")
        return self.family.condition(self.family.collate(self.family.encode([example])))

    def _block_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        frames = self.family.num_pixel_frames(self.family.block_frames)
        example = Example(prompt="", size=size, num_frames=frames, origin="size")
        return tuple(self.family.target_latents(example).shape)


def _adapted(family: WanStreaming, lora: Path, base: str | Path | None) -> nn.Module:
    """Return the transformer ``base`` with a LoRA on it.

    Raises:
        UserError: If there is no such base, or the LoRA does not fit it.
    """
    if base is None:
        raise UserError(f"{lora / SETTINGS} does not say what the LoRA was trained on: give base=")
    try:
        network: Any = family.network(None if str(base) == family.path else str(base))
    except UserError as error:
        raise UserError(f"the base of {lora}: {error}; if it is elsewhere, give base=") from error
    with loading.explained(f"load the LoRA in {lora}"):
        network.load_lora_adapter(
            str(lora),
            prefix="transformer",
            weight_name="pytorch_lora_weights.safetensors",
            use_safetensors=True,
        )
    return network


def _read_settings(folder: Path) -> dict[str, Any]:
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{folder}: no {SETTINGS}, which says how a student streams: give a folder that "
            "`diffdistill export` wrote for the family wan-streaming"
        )
    values = loading.read_config(folder, SETTINGS)
    known = {item.name for item in fields(WanStreaming)} | {"base", "num_steps", "sampler", "size"}
    if unknown := sorted(set(values) - known):
        raise UserError(f"{folder / SETTINGS}: unknown key {unknown[0]!r}")
    return {"base": None, "size": None, **values}

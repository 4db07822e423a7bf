"""Pixels from models: samples of prompts, and the rollouts of a batch.

Image ``j`` of prompt ``i`` starts from the same noise for every model and number of steps. A
family that streams gets its noise block by block, so that a longer video begins as a shorter one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.protocols import Model
from diffdistill.readouts import clean_of, guided
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Role
from diffdistill.session import Session, flow_family
from diffdistill.types import Batch, Condition, Example, State

IMAGES_PER_PROMPT = 2**20
"""Keeps the ids of two prompts' images apart, whatever their number."""

PIXELS_AT_ONCE = 4 * 1024 * 1024
MOST_AT_ONCE = 64
NUM_ROLLOUTS = 4


class Encoded(NamedTuple):
    """What a family's encoders say of some prompts, one item for each.

    Attributes:
        prompts: The prompts.
        items: Their encodings, for images (or videos) of one size.
        apart: Whether images of different prompts must not share a batch, because their
            references may differ in size.
    """

    prompts: list[str]
    items: Sequence[Mapping[str, Tensor]]
    apart: bool = False


@dataclass(frozen=True)
class Guided:
    """A model led away from the negative prompt (see ``readouts.guided``, standard form).

    Attributes:
        model: The model, which sees the whole clip.
        negative: What it is led away from.
        scale: The guidance; 1 is none.
        name: The name of the model.
    """

    model: Model
    negative: Condition
    scale: float
    name: str

    def __call__(self, state: State, condition: Condition) -> Tensor:
        """Return the guided prediction at ``state``."""
        positive = self.model(state, condition)
        return guided(positive, self.model(state, self.negative), self.scale, "standard")


class Grid(NamedTuple):
    """Images in rows, ready for ``save_grid``.

    Attributes:
        pixels: ``[N, 3, H, W]`` in [0, 1], row by row.
        columns: Images in a row.
        captions: One for each column.
    """

    pixels: Tensor
    columns: int
    captions: list[str]


@contextmanager
def inference(session: Session) -> Iterator[None]:
    """Turn dropout and gradients off within the block."""
    modules = [m for network in session.roles.networks() for m in network.modules()]
    before = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def base_role(session: Session) -> Role:
    """Return the student's model as it was before training."""
    student = session.roles["student"]
    settings = RoleSettings(weights="frozen", path=student.settings.path)
    network = student.network
    if student.adapter is None:
        network = student.family.network(settings.path).requires_grad_(False).eval()
    return Role("base", settings, student.family, network, autocast=student.autocast)


def makes_videos(session: Session) -> bool:
    """Return whether the family makes videos."""
    return hasattr(session.family, "num_latent_frames")


def clip_frames(session: Session) -> int | None:
    """Return the frames of a video to sample; None for images.

    Raises:
        UserError: If nobody says how many, or the family cannot make so many.
    """
    if not makes_videos(session):
        return None
    config = session.config
    asked = {
        "sample.num_frames (--frames)": config.pictures.num_frames,
        "data.num_frames": config.data.num_frames,
    }
    for where, found in asked.items():
        if found is not None:
            try:
                flow_family(session).check_clip(found)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            return found
    name = config.family["name"]
    raise UserError(f"the family {name} makes videos: set sample.num_frames or data.num_frames")


def encode_prompts(session: Session, prompts: Sequence[str], size: tuple[int, int]) -> Encoded:
    """Return prompts, encoded for images or videos of ``size`` ``(H, W)`` in pixels."""
    examples = [Example(prompt=p, size=size, origin=f"prompt {p!r}") for p in prompts]
    return encode_examples(session, examples)


def encode_examples(session: Session, examples: Sequence[Example]) -> Encoded:
    """Return what a student may see of examples of one size: all but the target, encoded.

    Videos have the frames of ``clip_frames``, whatever those of their targets.
    """
    frames = clip_frames(session)
    shown = [example.without_target()._replace(num_frames=frames) for example in examples]
    with torch.no_grad():
        items = flow_family(session).encode(shown, privileged=False)
    session.family.release()
    apart = any(example.references for example in examples)
    return Encoded([example.prompt for example in examples], items, apart)


def with_frames(encoded: Encoded, num_frames: int) -> Encoded:
    """Return prompts encoded for videos, made for others of so many latent frames."""
    items = []
    for item in encoded.items:
        channels, _, *size = item["latents"].shape
        empty = torch.zeros(1).expand(channels, num_frames, *size)
        items.append({**item, "latents": empty})
    return encoded._replace(items=items)


def prompt_batch(
    session: Session, encoded: Encoded, chosen: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return the batch of ``chosen`` images, each given as (index of its prompt, its number)."""
    batch = flow_family(session).collate([encoded.items[prompt] for prompt, _ in chosen])
    ids = [prompt * IMAGES_PER_PROMPT + number for prompt, number in chosen]
    batch["ids"] = torch.tensor(ids, device=session.device)
    batch["prompts"] = [encoded.prompts[prompt] for prompt, _ in chosen]
    return batch


def generate(
    session: Session,
    model: Model,
    prompts: Sequence[str] | Encoded,
    *,
    num_steps: int,
    seed: int,
    size: tuple[int, int],
    num_images: int = 1,
    micro_batch: int = 4,
    guidance: float = 1.0,
    chosen: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Return pixels ``[P * num_images, 3, H, W]`` on the CPU, prompt by prompt.

    Videos are ``[P * num_images, T, 3, H, W]``.

    Args:
        session: Gives the family.
        model: Any of its roles; told the prompt alone.
        prompts: ``P`` prompts, or what ``encode_prompts`` returned for them.
        num_steps: Model calls for each image (or block of a stream).
        seed: Seed of the noise.
        size: ``(H, W)`` in pixels.
        num_images: Images of each prompt.
        micro_batch: Images made at a time.
        guidance: 1 is none; not for a model that streams.
        chosen: Makes only these, each given as (index of the prompt, number of the image).
    """
    if not isinstance(prompts, Encoded):
        prompts = encode_prompts(session, prompts, size)
    if chosen is None:
        chosen = list(product(range(len(prompts.prompts)), range(num_images)))
    draws = Draws(seed)
    latents = []
    with inference(session):
        for part in _micro_batches(prompts, chosen, micro_batch):
            batch = prompt_batch(session, prompts, part)
            latents.append(
                flow_family(session).sample(
                    _guided(session, model, batch, guidance),
                    flow_family(session).condition(batch),
                    _noise(session, batch, draws),
                    num_steps=num_steps,
                    renoise=_renoise(session, model, batch, draws),
                )
            )
        pixels = [flow_family(session).decode(part).float().cpu() for part in latents]
    session.family.release()
    return torch.cat(pixels)


def at_once(size: tuple[int, int], num_frames: int | None = None) -> int:
    """Return how many images or videos to make at a time where nobody says."""
    pixels = size[0] * size[1] * (num_frames or 1)
    return max(1, min(MOST_AT_ONCE, PIXELS_AT_ONCE // pixels))


def _micro_batches(
    encoded: Encoded, chosen: Sequence[tuple[int, int]], micro_batch: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield (index of the prompt, number) of the images to make together."""
    groups = [list(chosen)]
    if encoded.apart:
        groups = [list(images) for _, images in groupby(chosen, lambda image: image[0])]
    for images in groups:
        for start in range(0, len(images), micro_batch):
            yield images[start : start + micro_batch]


def _guided(session: Session, model: Model, batch: Batch, guidance: float) -> Model:
    if guidance == 1.0:
        return model
    negative = flow_family(session).condition(batch, negative=True)
    return Guided(model, negative, guidance, getattr(model, "name", ""))


def _noise(session: Session, batch: Batch, draws: Draws) -> Tensor:
    """Return the initial noise of a batch."""
    shape = flow_family(session).latent_shape(batch)
    if not hasattr(session.family, "block_frames"):
        return draws.normal("sample", batch["ids"], shape)
    return _by_block(session, batch, lambda block: f"stream/{block}", draws)


def _renoise(
    session: Session, model: Model, batch: Batch, draws: Draws
) -> Callable[[int], Tensor] | None:
    """Return the fresh noise of a student that was trained to sample with it, else None."""
    if not renoises(session, model):
        return None
    if hasattr(session.family, "block_frames"):
        # A stream asks for the noise of the whole clip again for each of its blocks.
        return cache(
            lambda step: _by_block(session, batch, lambda block: f"renoise/{block}/{step}", draws)
        )
    shape = flow_family(session).latent_shape(batch)
    return lambda index: draws.normal(f"renoise/{index}", batch["ids"], shape)


def renoises(session: Session, model: Model) -> bool:
    """Return whether ``model`` is a student that was trained to sample with fresh noise."""
    distilled = getattr(model, "name", None) in ("student", "average")
    return distilled and session.config.method.get("sampler") == "renoise"


def _by_block(
    session: Session, batch: Batch, purpose: Callable[[int], str], draws: Draws
) -> Tensor:
    """Return noise ``[B, C, F, h, w]`` of a clip, drawn for each block of a stream."""
    channels, frames, *size = flow_family(session).latent_shape(batch)
    block: int = getattr(session.family, "block_frames")  # noqa: B009 - of streaming families
    parts = [
        draws.normal(purpose(index), batch["ids"], (channels, block, *size))
        for index in range(-(-frames // block))
    ]
    return torch.cat(parts, dim=2)[:, :, :frames]


def rollout_figure(session: Session, batch: Batch, num_steps: int, seed: int) -> Grid:
    """Return each example's target, then both sides' clean predictions at each rollout state.

    A row is one of the first examples of the batch. The teacher is shown what the method shows
    it; a method without a teacher has the student's predictions only, and data of prompts only
    has no target.
    """
    with inference(session):
        latents, captions = _predictions(session, batch, num_steps, seed)
        if batch["latents"].any():
            latents.insert(0, flow_family(session).clean(batch))
            captions.insert(0, "target")
        shown = torch.stack([column[:NUM_ROLLOUTS] for column in latents], dim=1)
        pixels = torch.cat([flow_family(session).decode(row).float().cpu() for row in shown])
    session.family.release()
    return Grid(pixels, len(captions), captions)


def _predictions(
    session: Session, batch: Batch, num_steps: int, seed: int
) -> tuple[list[Tensor], list[str]]:
    """Return clean latents ``[B, C, H, W]`` and a caption for each state and side."""
    family, roles = flow_family(session), session.roles.by_name
    shown = family.condition(batch, exposure=getattr(session.method, "exposure", 0.0))
    noise = Draws(seed).normal("rollout", batch["ids"], family.latent_shape(batch))
    walk = family.walk(roles["student"], family.condition(batch), noise, num_steps=num_steps)
    latents, captions = [], []
    for state, velocity in walk:
        level = f"t = {state.t[0].item():.2f}"
        latents.append(clean_of(state, velocity))
        captions.append(f"student\n{level}")
        if "teacher" in roles:
            latents.append(clean_of(state, roles["teacher"](state, shown)))
            captions.append(f"teacher\n{level}")
    return latents, captions

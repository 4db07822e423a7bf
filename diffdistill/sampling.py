"""Pictures from models: samples of prompts, rollouts of a batch, and grids of both.

Image ``j`` of prompt ``i`` starts from the same noise for every model and number of steps.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from diffdistill.checkpoints import write_atomic
from diffdistill.draws import Draws
from diffdistill.protocols import Model
from diffdistill.readouts import clean_of
from diffdistill.roles import Role, RoleSettings
from diffdistill.session import Session
from diffdistill.types import Batch, Example

IMAGES_PER_PROMPT = 2**20
"""Keeps the ids of two prompts' images apart, whatever their number."""

NUM_ROLLOUTS = 4
MIN_TILE = 96
MIN_WIDTH = 320
MAX_WIDTH = 4096
GAP = 4
FONT_SIZE = 13
LINE = 17


class Encoded(NamedTuple):
    """What a family's encoders say of some prompts, one item for each.

    Attributes:
        prompts: The prompts.
        items: Their encodings, for images of one size.
        apart: Whether images of different prompts must not share a batch, because their
            references may differ in size.
    """

    prompts: list[str]
    items: Sequence[Mapping[str, Tensor]]
    apart: bool = False


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
        network = session.family.network(settings.path).requires_grad_(False).eval()
    return Role("base", settings, session.family, network, autocast=student.autocast)


def encode_prompts(session: Session, prompts: Sequence[str], size: tuple[int, int]) -> Encoded:
    """Return prompts, encoded for images of ``size`` ``(H, W)`` in pixels."""
    return encode_examples(session, [Example(prompt=prompt, size=size) for prompt in prompts])


def encode_examples(session: Session, examples: Sequence[Example]) -> Encoded:
    """Return what a student may see of examples of one size: all but the target, encoded."""
    shown = [
        e if e.image is None else e._replace(image=None, size=_size(e.image)) for e in examples
    ]
    with torch.no_grad():
        items = session.family.encode(shown, privileged=False)
    session.family.release()
    apart = any(example.references for example in examples)
    return Encoded([example.prompt for example in examples], items, apart)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def prompt_batch(
    session: Session, encoded: Encoded, chosen: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return the batch of ``chosen`` images, each given as (index of its prompt, its number)."""
    batch = session.family.collate([encoded.items[prompt] for prompt, _ in chosen])
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
) -> Tensor:
    """Return pixels ``[P * num_images, 3, H, W]`` on the CPU, prompt by prompt.

    Args:
        session: Gives the family.
        model: Any of its roles; told the prompt alone.
        prompts: ``P`` prompts, or what ``encode_prompts`` returned for them.
        num_steps: Model calls for each image.
        seed: Seed of the noise.
        size: ``(H, W)`` in pixels.
        num_images: Images of each prompt.
        micro_batch: Images made at a time.
    """
    if not isinstance(prompts, Encoded):
        prompts = encode_prompts(session, prompts, size)
    draws = Draws(seed)
    latents = []
    with inference(session):
        for chosen in _micro_batches(prompts, num_images, micro_batch):
            batch = prompt_batch(session, prompts, chosen)
            noise = draws.normal("sample", batch["ids"], session.family.latent_shape(batch))
            condition = session.family.condition(batch)
            latents.append(
                session.family.sample(
                    model,
                    condition,
                    noise,
                    num_steps=num_steps,
                    renoise=_renoise(session, model, batch, draws),
                )
            )
        pixels = [session.family.decode(part).float().cpu() for part in latents]
    session.family.release()
    return torch.cat(pixels)


def _micro_batches(
    encoded: Encoded, num_images: int, micro_batch: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield (index of the prompt, number) of the images to make together."""
    prompts = range(len(encoded.prompts))
    for together in [[prompt] for prompt in prompts] if encoded.apart else [prompts]:
        images = list(product(together, range(num_images)))
        for start in range(0, len(images), micro_batch):
            yield images[start : start + micro_batch]


def _renoise(
    session: Session, model: Model, batch: Batch, draws: Draws
) -> Callable[[int], Tensor] | None:
    """Return the fresh noise of a student that was trained to sample with it, else None."""
    distilled = getattr(model, "name", None) in ("student", "average")
    if not distilled or session.config.method.get("sampler") != "renoise":
        return None
    shape = session.family.latent_shape(batch)
    return lambda index: draws.normal(f"renoise/{index}", batch["ids"], shape)


def rollout_figure(session: Session, batch: Batch, num_steps: int, seed: int) -> Grid:
    """Return each example's target, then both sides' clean predictions at each rollout state.

    A row is one of the first examples of the batch. The teacher is shown what the method shows
    it; a method without a teacher has the student's predictions only, and data of prompts only
    has no target.
    """
    with inference(session):
        latents, captions = _predictions(session, batch, num_steps, seed)
        if batch["latents"].any():
            latents.insert(0, session.family.clean(batch))
            captions.insert(0, "target")
        shown = torch.stack([column[:NUM_ROLLOUTS] for column in latents], dim=1)
        pixels = torch.cat([session.family.decode(row).float().cpu() for row in shown])
    session.family.release()
    return Grid(pixels, len(captions), captions)


def _predictions(
    session: Session, batch: Batch, num_steps: int, seed: int
) -> tuple[list[Tensor], list[str]]:
    """Return clean latents ``[B, C, H, W]`` and a caption for each state and side."""
    family, roles = session.family, session.roles.by_name
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


def save_grid(
    pixels: Tensor,
    path: Path,
    columns: int,
    captions: Sequence[str] | None = None,
    row_captions: Sequence[str] | None = None,
) -> None:
    """Write a PNG of images ``[N, 3, H, W]`` in [0, 1], ``columns`` in a row, atomically.

    Small images are enlarged to at least 96 pixels without smoothing; large ones are reduced
    where the grid would be wider than 4096.

    Args:
        pixels: The images, row by row.
        path: The file; its folder is made.
        columns: Images in a row.
        captions: Text over each column; may have several lines.
        row_captions: One line over each row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    draw_grid(pixels, columns, captions, row_captions).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def save_image(pixels: Tensor, path: Path) -> None:
    """Write one image ``[3, H, W]`` in [0, 1] as PNG, at its own size, atomically."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def to_image(pixels: Tensor) -> Image.Image:
    """Return a PIL image of pixels ``[3, H, W]`` in [0, 1]."""
    values = pixels.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.movedim(0, -1).cpu().numpy())


def draw_grid(
    pixels: Tensor,
    columns: int,
    captions: Sequence[str] | None = None,
    row_captions: Sequence[str] | None = None,
) -> Image.Image:
    """Return the picture that ``save_grid`` writes."""
    tiles = _resized(pixels, columns)
    height, width = tiles.shape[-2:]
    header = LINE * max((len(c.splitlines()) for c in captions or ()), default=0)
    label = LINE if row_captions else 0
    rows = -(-len(tiles) // columns)
    total = (columns * (width + GAP) + GAP, header + rows * (label + height + GAP) + GAP)
    total = (max(total[0], MIN_WIDTH if row_captions else 0), total[1])
    sheet = Image.new("RGB", total, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for column, caption in enumerate(captions or ()):
        draw.multiline_text((GAP + column * (width + GAP), 1), caption, "black", font, spacing=2)
    for row in range(rows):
        top = GAP + header + row * (label + height + GAP)
        if row_captions:
            draw.text((GAP, top), _fitted(row_captions[row], total[0], font), "black", font)
        for column, tile in enumerate(tiles[row * columns : (row + 1) * columns]):
            sheet.paste(to_image(tile), (GAP + column * (width + GAP), top + label))
    return sheet


def _resized(pixels: Tensor, columns: int) -> Tensor:
    height, width = pixels.shape[-2:]
    if max(height, width) < MIN_TILE:
        factor = -(-MIN_TILE // max(height, width))
        return interpolate(pixels, scale_factor=factor, mode="nearest")
    widest = max(1, (MAX_WIDTH - GAP) // columns - GAP)
    if width <= widest:
        return pixels
    smaller = (max(1, height * widest // width), widest)
    return interpolate(pixels, size=smaller, mode="bilinear", antialias=True)


def _fitted(text: str, width: int, font: Any) -> str:
    """Return ``text`` in one line, cut where it would be wider than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width - 2 * GAP:
        return text
    while text and font.getlength(f"{text}...") > width - 2 * GAP:
        text = text[:-1]
    return f"{text}..."

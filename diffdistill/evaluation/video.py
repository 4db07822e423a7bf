"""Videos measured: rewards, flicker, drift over long streams, and speed, over several seeds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.data.dataset import open_dataset
from diffdistill.errors import UserError
from diffdistill.evaluation.few_step import EvaluateSettings, confidence_interval
from diffdistill.evaluation.groups import chosen_examples, commonest_size, read_prompts
from diffdistill.evaluation.moving_digits import NUM_FEATURES, SIZE, MovingDigitsJudge, unrest
from diffdistill.protocols import Reward
from diffdistill.reward_building import build_reward
from diffdistill.rewards.digits_video import parse_caption
from diffdistill.roles import Role
from diffdistill.sampling import (
    Encoded,
    at_once,
    clip_frames,
    encode_prompts,
    generate,
    inference,
    with_frames,
)
from diffdistill.session import Session
from diffdistill.streams import Timing, now, num_blocks, stream, streaming_family, streams, timed


class Sampling(NamedTuple):
    """How a model is sampled.

    Attributes:
        num_steps: Model calls for a clip, or for each block of a stream.
        guidance: 1 is none.
    """

    num_steps: int
    guidance: float


class VideoRow(NamedTuple):
    """One metric of one model.

    Attributes:
        model: The model's name.
        num_steps: Sampling steps.
        metric: The metric's name.
        mean: Mean over the seeds.
        low: Lower end of the 95 % confidence interval; None with a single seed.
        high: Upper end.
        seeds: The seeds.
        values: The metric for each seed.
    """

    model: str
    num_steps: int
    metric: str
    mean: float
    low: float | None
    high: float | None
    seeds: list[int]
    values: list[float]


@dataclass
class Scene:
    """What all models are asked to make, and who judges it.

    Attributes:
        encoded: The prompts, for clips.
        size: ``(H, W)`` in pixels.
        num_frames: Frames of a clip.
        num_videos: Videos of each prompt.
        at_a_time: Videos to make at a time; None makes 4 megapixels.
        long_factor: How many times longer than a clip the streams are that may drift.
        reward: Judges clips; None judges none.
        reward_batch: Videos that it judges at a time.
        digits: Judges moving digits; None judges none.
    """

    encoded: Encoded
    size: tuple[int, int]
    num_frames: int
    num_videos: int
    at_a_time: int | None
    long_factor: int
    reward: Reward | None
    reward_batch: int
    digits: MovingDigitsJudge | None

    def chosen(self) -> list[tuple[int, int]]:
        """Return (index of the prompt, number) of all videos."""
        return list(product(range(len(self.encoded.prompts)), range(self.num_videos)))


def make_scene(session: Session, settings: EvaluateSettings) -> Scene:
    """Return the scene that ``settings`` describes, with its prompts encoded.

    Raises:
        UserError: If the family makes images, or a metric is not one of videos.
    """
    num_frames = clip_frames(session)
    if num_frames is None:
        name = session.config.family["name"]
        raise UserError(f"the family {name} makes images: measure it with --suite few-step")
    foreign = [metric for metric in settings.metrics if metric != "moving-digits"]
    if foreign:
        raise UserError(
            f"evaluate.metrics {foreign[0]!r} is one of images; of videos there is moving-digits, "
            "and what the config's rewards measure"
        )
    prompts, size = chosen_prompts(session, settings)
    scene = Scene(
        encoded=encode_prompts(session, prompts, size),
        size=size,
        num_frames=num_frames,
        num_videos=settings.num_images or 1,
        at_a_time=settings.micro_batch,
        long_factor=settings.long_factor,
        reward=_reward(session),
        reward_batch=settings.reward_batch,
        digits=MovingDigitsJudge() if settings.metrics else None,
    )
    if settings.metrics:
        _check_digits(scene)
    return scene


def chosen_prompts(
    session: Session, settings: EvaluateSettings
) -> tuple[list[str], tuple[int, int]]:
    """Return the prompts to evaluate, and the size ``(H, W)`` of what to make of them."""
    size = settings.size or session.config.pictures.size
    if settings.prompts is not None and size is not None:
        return read_prompts(Path(settings.prompts)), size
    dataset = open_dataset(session.config.data)
    size = size or commonest_size(dataset)
    if settings.prompts is not None:
        return read_prompts(Path(settings.prompts)), size
    examples = chosen_examples(dataset, settings.max_examples)
    return list(dict.fromkeys(example.prompt for example in examples)), size


def _reward(session: Session) -> Reward | None:
    """Return the config's rewards, which a method may hold already."""
    held: Reward | None = getattr(session.method, "reward", None)
    if held is None and session.config.rewards:
        return build_reward(session.config, session.device)
    return held


def _check_digits(scene: Scene) -> None:
    """Refuse to judge what are no moving digits, or too few for a Frechet distance."""
    for prompt in scene.encoded.prompts:
        parse_caption(prompt)
    if scene.size != (SIZE, SIZE):
        raise UserError(f"evaluate.metrics moving-digits: videos must be {SIZE} x {SIZE} pixels")
    clips, pairs = len(scene.chosen()), scene.num_frames - 1
    if clips * pairs <= 2 * NUM_FEATURES:
        raise UserError(
            "evaluate.metrics moving-digits: a Frechet distance needs more than "
            f"{2 * NUM_FEATURES} pairs of frames, not {clips} clips x {pairs}: raise "
            "evaluate.num_images"
        )


def video(
    session: Session,
    models: Mapping[str, Role],
    sampling: Callable[[str], Sampling],
    scene: Scene,
    num_seeds: int,
) -> Iterator[VideoRow]:
    """Yield every metric of every model; all start from the same noise.

    Args:
        session: Gives the family.
        models: The models by name.
        sampling: How the model of a name is sampled.
        scene: What they are asked to make.
        num_seeds: Seeds of the noise.
    """
    seeds = list(range(num_seeds))
    for name, model in models.items():
        how = sampling(name)
        speed_of(session, model, name, scene, how, seed=0)  # the warm-up
        measured = [
            quality_of(session, model, name, scene, how, seed=seed)
            | speed_of(session, model, name, scene, how, seed=seed)
            for seed in seeds
        ]
        for metric in measured[0]:
            values = [found[metric] for found in measured]
            interval = confidence_interval(values)
            yield VideoRow(name, how.num_steps, metric, *interval, seeds, values)


def quality_of(
    session: Session, model: Role, name: str, scene: Scene, how: Sampling, *, seed: int
) -> dict[str, float]:
    """Return what is measured of a model's videos from one seed.

    A model that streams makes long videos, whose beginnings are its clips. Its drift is what is
    measured of their ends less that of their beginnings: of a reward (``drift/AXIS``) negative is
    worse, of the Frechet distance (``drift/frechet``) positive.
    """
    factor = scene.long_factor if streams(session, name) else 1
    encoded, length = scene.encoded, scene.num_frames * factor
    if factor > 1:
        latent = encoded.items[0]["latents"].shape[1]
        encoded = with_frames(encoded, latent * factor)
    found: list[dict[str, float]] = []
    kept: list[Tensor] = []
    size = scene.at_a_time or at_once(scene.size, length)
    for chosen in _parts(scene.chosen(), size):
        pixels = generate(
            session,
            model,
            encoded,
            num_steps=how.num_steps,
            seed=seed,
            size=scene.size,
            micro_batch=size,
            guidance=how.guidance,
            chosen=chosen,
        )
        prompts = [encoded.prompts[prompt] for prompt, _ in chosen]
        found += _each(session, scene, pixels, prompts)
        kept += [pixels] if scene.digits else []
    measured = {metric: fmean(each[metric] for each in found) for metric in found[0]}
    if scene.digits is not None:
        prompts = [encoded.prompts[prompt] for prompt, _ in scene.chosen()]
        measured |= digits_of(scene.digits, torch.cat(kept), prompts, scene.num_frames)
    return measured


def _parts(chosen: Sequence[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(chosen), size):
        yield list(chosen[start : start + size])


def _each(
    session: Session, scene: Scene, pixels: Tensor, prompts: Sequence[str]
) -> list[dict[str, float]]:
    """Return rewards, flicker and drift of each of some videos ``[N, T, 3, H, W]``."""
    clips = pixels[:, : scene.num_frames]
    found = [{"flicker": unrest(clip[None])} if len(clip) > 2 else {} for clip in clips]
    if scene.reward is None:
        return found
    first = _scores(session, scene, scene.reward, clips, prompts)
    for axis, scores in first.items():
        _add(found, f"reward/{axis}", scores)
    if pixels.shape[1] > scene.num_frames:
        ends = pixels[:, -scene.num_frames :]
        for axis, scores in _scores(session, scene, scene.reward, ends, prompts).items():
            _add(found, f"drift/{axis}", scores - first[axis])
    return found


def _scores(
    session: Session, scene: Scene, reward: Reward, clips: Tensor, prompts: Sequence[str]
) -> Mapping[str, Tensor]:
    """Return the z-scores ``[N]`` of clips ``[N, T, 3, H, W]``."""
    judged = reward.judge(
        clips.to(session.device), prompts, saliency=False, micro_batch=scene.reward_batch
    )
    return judged.scores


def _add(found: Sequence[dict[str, float]], metric: str, values: Tensor) -> None:
    for each, value in zip(found, values.tolist(), strict=True):
        each[metric] = value


def digits_of(
    judge: MovingDigitsJudge, videos: Tensor, prompts: Sequence[str], num_frames: int
) -> dict[str, float]:
    """Return how videos ``[N, T, 3, 16, 16]`` of moving digits compare with real ones.

    Their first ``num_frames`` frames are the clips.
    """
    clips = videos[:, :num_frames]
    found = {f"accuracy/{what}": share for what, share in judge.accuracy(clips, prompts).items()}
    found["frechet"] = judge.frechet(clips, prompts)
    found["flicker/real"] = judge.flicker(clips, prompts)
    if videos.shape[1] > num_frames:
        found["drift/frechet"] = judge.drift(videos, prompts, num_frames)
    return found


def speed_of(
    session: Session, model: Role, name: str, scene: Scene, how: Sampling, *, seed: int
) -> dict[str, float]:
    """Return how fast one clip of the first prompt is made and decoded."""
    time = _streamed if streams(session, name) else _at_once
    timing = time(session, model, name, scene, how, seed)
    return {"seconds to first frame": timing.first, "frames per second": timing.fps}


def _streamed(
    session: Session, model: Role, name: str, scene: Scene, how: Sampling, seed: int
) -> Timing:
    family, timing = streaming_family(session, name), Timing()
    first = Encoded(scene.encoded.prompts[:1], scene.encoded.items[:1])
    with inference(session), family.using("vae"):
        made = stream(session, model, first, num_steps=how.num_steps, seed=seed)
        blocks = num_blocks(family, scene.num_frames)
        for _ in islice(timed(made, session.device, timing), blocks):
            pass
    return timing


def _at_once(
    session: Session, model: Role, name: str, scene: Scene, how: Sampling, seed: int
) -> Timing:
    started = now(session.device)
    generate(
        session,
        model,
        scene.encoded,
        num_steps=how.num_steps,
        seed=seed,
        size=scene.size,
        guidance=how.guidance,
        chosen=[(0, 0)],
    )
    seconds = now(session.device) - started
    return Timing(seconds, seconds, scene.num_frames)

"""The ``sample`` section of a config file: of images and videos, of texts, and of answers."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from diffdistill.pipelines.unmasking import Schedule


@dataclass(kw_only=True)
class SampleSettings:
    """The pictures that are drawn during training, and the defaults of ``sample``.

    Attributes:
        every: Training steps between sample grids; None draws none.
        prompts: What to draw; empty takes the first prompts of the data.
        num_steps: Sampling steps.
        num_images: Images (or videos) for each prompt.
        size: ``(H, W)`` in pixels, for ``prompts``; None takes the first bucket of the data.
        seed: Seed of the noise.
        rollouts: Also draw student and teacher side by side at each rollout state; not of videos.
        num_frames: Frames of a video; None takes ``data.num_frames``.
        fps: Frames per second of the video files.
        teacher_steps: Sampling steps of the teacher; None takes ``num_steps``.
        teacher_guidance: Guidance of the teacher; 1 is none.
    """

    every: PositiveInt | None = None
    prompts: list[str] = field(default_factory=list)
    num_steps: PositiveInt = 4
    num_images: PositiveInt = 1
    size: tuple[int, int] | None = None
    seed: int = 0
    rollouts: bool = True
    num_frames: int | None = None
    fps: PositiveFloat = 16.0
    teacher_steps: PositiveInt | None = None
    teacher_guidance: float = 1.0


@dataclass(kw_only=True)
class TextSampleSettings:
    """The answers that are written during training, and how a text model writes them anywhere.

    Attributes:
        every: Training steps between sample answers; None writes none.
        prompts: What to ask; empty takes the first prompts of the data.
        num_prompts: Prompts to take of the data, where there are no ``prompts``.
        chat: Whether a prompt is a user's message, in the model's chat template, or a text to
            continue; None takes a model with a template for one that chats.
        num_answers: Answers to each prompt; they differ at a temperature above 0.
        max_tokens: Tokens of an answer; block diffusion takes whole blocks.
        schedule: Which hidden tokens settle at a step. ``low-confidence``: the most confident ones,
            as many at each step (LLaDA); ``random``: as many at random; ``threshold``: all above a
            confidence (Fast-dLLM); ``first-hitting``: one at random, at the exact times of the
            process (MDLM, BD3LM).
        num_steps: Steps for a block under ``low-confidence`` and ``random``; None takes one for
            each token.
        threshold: Least confidence under ``threshold``.
        temperature: 0 takes the most likely token, 1 samples from the model.
        top_p: Sample only from the most likely tokens that together have this probability.
        guidance: Classifier-free guidance away from the masked prompt, 1 is none (LLaDA's
            ``cfg_scale`` is one less).
        seed: Seed of the answers.
        batch_size: Answers that are written at a time.
    """

    every: PositiveInt | None = None
    prompts: list[str] = field(default_factory=list)
    num_prompts: PositiveInt = 4
    chat: bool | None = None
    num_answers: PositiveInt = 1
    max_tokens: PositiveInt = 128
    schedule: Schedule = "low-confidence"
    num_steps: PositiveInt | None = None
    threshold: float = 0.9
    temperature: NonNegativeFloat = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    guidance: float = 1.0
    seed: int = 0
    batch_size: PositiveInt = 8


@dataclass(kw_only=True)
class AnswerSampleSettings:
    """The answers that an autoregressive model writes, in training to look at, and anywhere else.

    Rollouts are sampled as the method says, not as this section does.

    Attributes:
        every: Training steps between sample answers; None writes none.
        prompts: Questions to ask; empty takes the first of the data.
        num_prompts: Questions to take of the data, where there are no ``prompts``.
        num_answers: Answers to each question; they differ at a temperature above 0.
        max_tokens: Tokens of an answer.
        temperature: 0 takes the most likely token, 1 samples from the model.
        top_p: Sample only from the most likely tokens that together have this probability.
        top_k: Sample only from so many most likely tokens; 0 is all.
        seed: Seed of the answers.
        batch_size: Answers that are written at a time.
    """

    every: PositiveInt | None = None
    prompts: list[str] = field(default_factory=list)
    num_prompts: PositiveInt = 4
    num_answers: PositiveInt = 1
    max_tokens: PositiveInt = 512
    temperature: NonNegativeFloat = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    seed: int = 0
    batch_size: PositiveInt = 8

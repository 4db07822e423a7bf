"""The ``data`` section of a config file."""

from dataclasses import dataclass
from typing import Literal

TEACHER_PROMPT = """{student_prompt}

For your eyes only, here is a worked solution:
--- solution begins ---
{solution}
--- solution ends ---

See for yourself why each of its steps holds. Then answer from the start, in your own words and as \
if you had not seen it, and come to the same result."""
"""What a teacher that is shown a solution is asked; the wording is ours."""


@dataclass(kw_only=True)
class DataSettings:
    """Where examples come from, and what is done to them before encoding.

    Attributes:
        path: A folder of images (or videos, see ``num_frames``) with ``metadata.jsonl`` (or
            ``.csv``, ``.parquet``) or with a ``.txt`` file beside each; or a ``.txt`` or
            ``.jsonl`` file of prompts only; or "bundled:NAME". Of text models: a ``.jsonl``,
            ``.json`` or ``.parquet`` file of chats or texts, a ``.txt``, ``.md`` or ``.py`` file
            that is one text, or a folder of such files.
        source: Instead of ``path``, whatever ``datasets.load_dataset`` can read: a hub id, or
            a builder ("json", "parquet", "imagefolder", ...) together with ``files``.
        split: The split of ``source`` to read.
        files: The files of ``source``, or one folder.
        image_column: The column of ``source`` with the target images; of questions, with the
            picture or pictures that they are about: paths from the row's file on, or image files in
            the cells of a parquet file; of questions, ``image`` is read where it is there, and any
            other name must be there. None reads prompts only.
        prompt_column: The column with the captions, of ``source`` and of metadata files.
        reference_column: The column with the source image or images of an editing pair; where
            it is given, every example must have one. None takes ``reference`` from metadata
            files that have it.
        detailed_prompt_column: The column with longer captions; where it is given, every
            example must have one. None takes ``detailed_text`` from metadata files that have it.
        batch_size: Examples in a micro-batch, on each rank.
        resolution: The area of images is at most the square of this. None crops each image to
            its own size, rounded down to ``multiple``.
        size: Instead of ``resolution``, the one size ``[H, W]`` that all images and videos are
            brought to, and that is generated where there are none.
        buckets: Whether images keep their aspect ratio (up to 1:4). False makes them square.
        multiple: Sides of images are divisible by this. Wan2.1 needs 16, Wan2.2-TI2V-5B 32.
        num_frames: Frames of each video, 1 plus a multiple of 4 for Wan. ``file_name`` is then a
            video (mp4, webm, mov, mkv, avi, gif) or a folder with an image for each frame, in
            the order of their names; prompts only ask for so many frames. None reads images.
        fps: Frames per second of a clip; the nearest stored frames are taken. A folder of frames
            needs ``fps`` in its row of the metadata. None takes each stored frame.
        clip: Which part of a longer video is taken.
        repeats: How many times an epoch goes over each example.
        prompt_dropout: The share of samples that are trained with an empty prompt.
        on_error: Whether a bad example is an error or is skipped, counted and logged.
        cache: The folder for the encoders' outputs. None is ``cache`` in the run's folder.
        max_examples: Reads only so many examples.
        skip_examples: Leaves out the first examples, so that runs can share a set and no example.
        messages_column: Of text models: the column with chats, lists of ``role`` and ``content``.
            A row without it is a plain text, in ``prompt_column``.
        turns: Which answers of a chat are learned: ``all`` in one row, where an answer sees the
            turns that follow it within its block; the ``last`` alone; or ``each``, in a row of
            its own that ends with it.
        packing: Fill rows with one text after the other, with end tokens between them.
        truncate: Cut texts that are too long; False makes them bad examples.
        solution_column: Of questions (autoregressive models): the column with worked reference
            solutions; where it is given, every question must have one. None takes ``solution`` from
            rows that have it, or else the answer that a chat ends with.
        answer_column: Of questions: the column with final answers, which answers are verified by;
            where it is given, every question must have one. None takes ``answer`` from rows that
            have it.
        student_prompt: What the student is asked, with ``{question}``; the user's last message.
        teacher_prompt: What a teacher is asked that is shown the reference solution, with
            ``{solution}``, and ``{question}`` or ``{student_prompt}``. A teacher that is shown none
            is asked what the student is.
        student_thinking: What the student's chat template is told as ``enable_thinking``; None
            tells it nothing.
        teacher_thinking: The same of the teacher's; None tells it what the student's is told.
        max_prompt: Tokens of the longest prompt.
        max_answer: Tokens of a given answer that are learned; the rest is cut off.
        skills: Of questions: instead of ``path``, a path for each of several skills, by its name. A
            micro-batch has ``batch_size`` questions of each.
        streaming: Read texts as they are needed, for sets larger than memory; nothing is cached.
        shuffle_buffer: Texts that a stream is shuffled among; 1 keeps their order.
    """

    path: str | None = None
    source: str | None = None
    split: str = "train"
    files: list[str] | None = None
    image_column: str | None = "image"
    prompt_column: str = "text"
    reference_column: str | None = None
    detailed_prompt_column: str | None = None
    batch_size: int = 1
    resolution: int | None = 1024
    size: tuple[int, int] | None = None
    buckets: bool = True
    multiple: int = 32
    num_frames: int | None = None
    fps: float | None = None
    clip: Literal["start", "center"] = "start"
    repeats: int = 1
    prompt_dropout: float = 0.0
    on_error: Literal["error", "skip"] = "error"
    cache: str | None = None
    max_examples: int | None = None
    skip_examples: int = 0
    messages_column: str = "messages"
    turns: Literal["all", "last", "each"] = "all"
    solution_column: str | None = None
    answer_column: str | None = None
    student_prompt: str = "{question}"
    teacher_prompt: str = TEACHER_PROMPT
    student_thinking: bool | None = None
    teacher_thinking: bool | None = None
    max_prompt: int = 2048
    max_answer: int = 4096
    packing: bool = False
    truncate: bool = True
    skills: dict[str, str] | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000

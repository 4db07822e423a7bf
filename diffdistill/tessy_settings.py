"""The ``tessy`` section of a config file: how a student and its teacher write data together."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from diffdistill.boundaries import WordRule
from diffdistill.errors import UserError

Mode = Literal[
    "tessy",
    "tessy-teacher-answer",
    "teacher-only",
    "teacher-think",
    "teacher-answer",
    "student-only",
    "mix",
    "best-of-n",
]


@dataclass(kw_only=True)
class FitSettings:
    """How the boundary predictors are made.

    Attributes:
        annotator: Who says what is style: a ``model`` that is asked for it (the paper), a ``rule``,
            or the file of spans that is ``given``.
        pattern: Of ``rule``: a regular expression that finds style.
        annotations: Of ``given``: a JSON lines file with a ``text``, its style ``spans`` (lists of
            start and end) and its ``author``, student or teacher.
        model: Of ``model``: the family (name, path and options) of the annotator; None asks the
            teacher (the paper; the code asks Qwen3-32B). It is asked not to think.
        num_texts: Questions about which both models think, to be annotated.
        segments: Whether a predictor learns from its ``own`` model's texts (the paper) or from
            those of ``both`` (ours: texts of two authors are like neither's).
        segment_words: Words of an annotated segment (60 in the code).
        segments_of_text: Segments of one text, at random places (100 in the code).
        num_segments: All segments of a predictor (100,000 in the paper, 10,000 in the code).
        base: The small model that becomes the predictors, a folder, a hub id or bundled:NAME.
        lr: Learning rate of AdamW.
        batch_size: Segments of a step.
        epochs: Times over all segments.
        held_out: The share of segments, of texts that are not learned, that the best epoch is
            chosen by.
        max_length: Tokens of a segment; the rest is cut off.
    """

    annotator: Literal["model", "rule", "given"] = "model"
    pattern: str = ""
    annotations: str | None = None
    model: dict[str, Any] | None = None
    num_texts: PositiveInt = 1000
    segments: Literal["own", "both"] = "own"
    segment_words: PositiveInt = 60
    segments_of_text: PositiveInt = 100
    num_segments: PositiveInt = 100_000
    base: str = "Qwen/Qwen3-0.6B-Base"
    lr: PositiveFloat = 1e-5
    batch_size: PositiveInt = 32
    epochs: PositiveInt = 3
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    max_length: PositiveInt = 512


@dataclass(kw_only=True)
class TessySettings:
    """How answers are written to learn from, by a student and a teacher or by one of them.

    ``diffdistill tessy write`` asks ``questions`` and writes ``data.path``, which ``train`` learns.

    Attributes:
        teacher: The family of the teacher (name, path and options); its tokenizer may be another.
        questions: The file of questions, read by the columns that ``data`` names; None is
            ``data.path`` itself, and the output is then to be named.
        max_questions: Reads only so many; ``data.max_examples`` is of what was written.
        skip_questions: Leaves out the first; ``data.skip_examples`` is of what was written.
        mode: ``tessy`` lets the student write style, the teacher capability and the student the
            final answer. Its ablation has the teacher answer. Baselines, of which the paper's may
            differ in detail: all by the teacher (``teacher-only``) or the student;
            ``teacher-think`` and ``teacher-answer`` split at the end of the thinking; ``mix`` has
            every other sample by the teacher alone; ``best-of-n`` is the student's sample that the
            teacher finds most likely.
        student_step: Tokens that the student writes before its predictor is asked (20 in the paper,
            5 in the code).
        teacher_step: The same of the teacher (20 in the paper, 10 in the code).
        chunk: Tokens that a model is asked for at once where it goes on alone: a final answer, or
            all of a thinking by one. A server is silent for so long (``teacher.timeout``).
        boundary: What becomes of a word that is cut where the author changes: ``discard`` (the
            paper, for two vocabularies), ``extend`` to its end (the code), or cut it ``exact``
            (ours, for models that read the same after any character).
        predictors: The folder that ``diffdistill tessy fit-predictors`` made.
        context: Tokens of the thinking, its last, that a predictor sees (200 in the code): no less
            than a step, whose first tokens it would never judge.
        opens: How the student's answers begin, before it thinks.
        closes: What comes between its thinking and its final answer.
        teacher_opens: The same of the teacher, in its own format; None is the student's.
        teacher_closes: The same of the teacher; None is the student's.
        ends: What ends the thinking when one of the models writes it; it is cut off. Special tokens
            count, also of a server (protocols vllm and sglang).
        temperature: Of both models (0.7 in the code), 0 takes the most likely token.
        top_p: Only the most likely tokens that together have this probability (0.8 in the code).
        top_k: Only so many most likely tokens; 0 is all (20 in the code).
        num_samples: Samples of each question.
        num_candidates: Samples that ``best-of-n`` chooses one of (5 in the paper).
        max_tokens: Of thinking and answer together (38,000 in the code); longer ones failed.
            ``data.max_answer`` must be as large, or training cuts them.
        check_every: Steps after which a sample is looked at for repetitions (100 in the code).
        check_characters: How much of its end is (1000 in the code).
        check_words: Words of a fragment that may repeat (3 in the code).
        check_times: How often it is there if the sample failed (8 in the code).
        retries: Further tries of a sample that failed (5 in the code). Where it is raised, those
            that failed are tried again.
        batch_size: Samples that are written at a time.
        seed: Seed of the samples.
        fit: How boundary predictors are made.
    """

    teacher: dict[str, Any] = field(default_factory=dict)
    questions: str | None = None
    max_questions: PositiveInt | None = None
    skip_questions: NonNegativeInt = 0
    mode: Mode = "tessy"
    student_step: PositiveInt = 20
    teacher_step: PositiveInt = 20
    chunk: PositiveInt = 2048
    boundary: WordRule = "discard"
    predictors: str | None = None
    context: PositiveInt = 200
    opens: str = "<think>\n"
    closes: str = "</think>\n\n"
    teacher_opens: str | None = None
    teacher_closes: str | None = None
    ends: list[str] = field(default_factory=lambda: ["</think>", "assistantfinal"])
    temperature: NonNegativeFloat = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.8
    top_k: NonNegativeInt = 20
    num_samples: PositiveInt = 1
    num_candidates: PositiveInt = 5
    max_tokens: PositiveInt = 38_000
    check_every: PositiveInt = 100
    check_characters: PositiveInt = 1000
    check_words: PositiveInt = 3
    check_times: PositiveInt = 8
    retries: NonNegativeInt = 5
    batch_size: PositiveInt = 8
    seed: int = 0
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self) -> None:
        """Check that a predictor sees all of a step.

        Raises:
            UserError: If it does not.
        """
        for name in ("student_step", "teacher_step"):
            if getattr(self, name) > self.context:
                raise UserError(
                    f"tessy.{name} is {getattr(self, name)} and tessy.context {self.context}: the "
                    "first tokens of a step would never be judged; take a shorter step or a larger "
                    "context"
                )

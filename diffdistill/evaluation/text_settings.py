"""The ``evaluate`` section of a config file of language models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt

from diffdistill.config import RunConfig
from diffdistill.evaluation.few_step import parse_settings
from diffdistill.options import parse
from diffdistill.sample_settings import AnswerSampleSettings, TextSampleSettings


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Listed = Annotated[list[str], BeforeValidator(_listed)]


@dataclass(kw_only=True)
class TextEvaluateSettings:
    """How text models are measured, by all suites.

    Attributes:
        roles: Models to measure: ``base`` (before training) and roles of the method. None takes
            the student for ``lm-eval``; for the others base, student and teacher.
        num_draws: Model calls for each text whose likelihood is bounded, each with other tokens
            hidden. dllm and LLaDA take 128.
        antithetic: Spread the numbers of hidden tokens evenly over those draws, which makes their
            mean more exact.
        seed: Seed of the hidden tokens.
        batch_size: Texts at a time.
        max_examples: For ``text`` and ``python``: texts of the data, its first; None takes all.
        tasks: For ``lm-eval``: names of tasks or groups.
        task_paths: For ``lm-eval``: folders with further tasks (its ``include_path``).
        num_fewshot: For ``lm-eval``: examples before each question; None takes the task's own.
        limit: For ``lm-eval``: questions of each task; None takes all.
        chat: For ``lm-eval``: whether a question is put as a chat, in the model's template.
        system: For ``lm-eval``: a system message before each chat.
        multiturn: For ``lm-eval``: whether examples in a chat are turns, or all in one message.
        max_length: For ``lm-eval``: tokens of prompt and answer together; what is longer loses its
            beginning. None takes all that the network's positions allow.
        allow_code: For ``lm-eval``: run the programs that models write (HumanEval, MBPP), on this
            machine and unprotected. They also need HF_ALLOW_CODE_EVAL=1 in the environment.
    """

    roles: Listed | None = None
    num_draws: PositiveInt = 32
    antithetic: bool = True
    seed: int = 0
    batch_size: PositiveInt = 8
    max_examples: PositiveInt | None = 64
    tasks: Listed = field(default_factory=list)
    task_paths: Listed = field(default_factory=list)
    num_fewshot: NonNegativeInt | None = None
    limit: PositiveInt | None = None
    chat: bool = False
    system: str | None = None
    multiturn: bool = True
    max_length: PositiveInt | None = None
    allow_code: bool = False


@dataclass(kw_only=True)
class AnswerEvaluateSettings:
    """How the answers of autoregressive models are measured.

    Attributes:
        roles: Models to measure: ``base`` (before training) and roles of the method. None takes
            base and student.
        max_examples: Questions of the data, its first; None takes all.
        num_tries: The k of pass@k, for each of which ``sample.num_answers`` must suffice. None
            takes 1 and ``sample.num_answers``.
        accepted: The least score of an answer that is right.
    """

    roles: Listed | None = None
    max_examples: PositiveInt | None = 64
    num_tries: list[PositiveInt] | None = None
    accepted: float = 1.0


def parse_text_settings(
    values: Mapping[str, Any], origin: str = "evaluate"
) -> TextEvaluateSettings:
    """Return the checked settings of an ``evaluate`` section of texts.

    Raises:
        UserError: If they are wrong.
    """
    settings: TextEvaluateSettings = parse(TextEvaluateSettings, values, origin)
    return settings


def check_evaluate(config: RunConfig) -> None:
    """Check the section ``evaluate`` of a config, of whatever it is.

    Raises:
        UserError: If it is wrong.
    """
    if isinstance(config.sample, TextSampleSettings):
        parse_text_settings(config.evaluate)
    elif isinstance(config.sample, AnswerSampleSettings):
        parse(AnswerEvaluateSettings, config.evaluate, "evaluate")
    else:
        parse_settings(config.evaluate)

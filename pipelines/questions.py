"""Questions as an autoregressive student and its teacher read them, and the student's answers."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.exposures import reveal
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.engines import Asked, Engine, Generate
from diffdistill.pipelines.prompts import prompt_condition, prompt_tokens
from diffdistill.pipelines.token_family import TokenFamily, located
from diffdistill.rollouts import Actor, Answers, Sampling, Solutions
from diffdistill.texts import Reader
from diffdistill.types import Batch, Condition, Example, State

log = logging.getLogger(__name__)

PLACE = re.compile(r"\{(question|solution|student_prompt)\}")


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        student_prompt: What the student is asked, with ``{question}``.
        teacher_prompt: What a teacher is asked that is shown the solution, with ``{solution}``, and
            ``{question}`` or ``{student_prompt}``.
        student_thinking: What the student's chat template is told as ``enable_thinking``.
        teacher_thinking: The same of the teacher's; None is what the student's is told.
        max_prompt: Tokens of the longest prompt.
        max_answer: Tokens of a given answer; the rest is cut off.
        skip: Whether a question that cannot be used is left out; else it is an error.
    """

    student_prompt: str = "{question}"
    teacher_prompt: str = "{student_prompt}\n\n{solution}"
    student_thinking: bool | None = None
    teacher_thinking: bool | None = None
    max_prompt: int = 2048
    max_answer: int = 4096
    skip: bool = False

    def __post_init__(self) -> None:
        """Check the templates and the lengths.

        Raises:
            UserError: If one does not hold what it must, or too much.
        """
        asked, shown = (set(PLACE.findall(t)) for t in (self.student_prompt, self.teacher_prompt))
        if asked != {"question"}:
            raise UserError("data.student_prompt must have {question}, and neither {solution} nor "
                            "{student_prompt}")  # fmt: skip
        if "solution" not in shown or shown == {"solution"}:
            raise UserError("data.teacher_prompt must have {solution}, and {question} or "
                            "{student_prompt}")  # fmt: skip
        for name in ("max_prompt", "max_answer"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, not {getattr(self, name)}")


@dataclass
class Questions:
    """The student's family and the teacher's, which may be the same: a ``rollouts.AnswerFamily``.

    Prompts are tokenized when they are asked for, because what a teacher is shown changes.

    Attributes:
        student: Reads and writes for the student.
        teacher: Reads for the teacher; of the same vocabulary.
        asking: How questions are put.
        engine: Writes the student's answers.
        skipped: What was wrong with the questions that were left out.
        compared: Whether tokens of the two are; else their vocabularies may differ.
        context_lengths: How many tokens the network of each reader takes, where that is known.
    """

    student: CausalLM
    teacher: TokenFamily
    asking: Asking = field(default_factory=Asking)
    engine: Engine = field(default_factory=Generate)
    skipped: list[str] = field(default_factory=list)
    compared: bool = True
    context_lengths: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that both have the same tokens.

        Raises:
            UserError: If they have not.
        """
        if self.teacher is self.student or not self.compared:
            return
        ours, theirs = (side.tokenizer.get_vocab() for side in (self.student, self.teacher))
        if ours != theirs:
            differing = len(ours.items() ^ theirs.items())
            raise UserError(
                f"the teacher {self.teacher.path} has another vocabulary than the student "
                f"{self.student.path} ({differing} tokens differ), and this method compares "
                "tokens: take one for two tokenizers (bld, alm, text-uld, text-gold)"
            )

    @property
    def device(self) -> torch.device:
        """Where batches live."""
        return self.student.device

    # what methods ask

    def repeated(self, batch: Batch, num_answers: int) -> Batch:
        """Return a batch with each row ``num_answers`` times over, one after the other."""
        numbers = torch.arange(num_answers, device=self.device)
        return {
            "ids": (batch["ids"][:, None] * num_answers + numbers).flatten(),
            "prompts": [prompt for prompt in batch["prompts"] for _ in range(num_answers)],
            "examples": [example for example in batch["examples"] for _ in range(num_answers)],
        }

    def rollout(
        self,
        actor: Actor,
        batch: Batch,
        sampling: Sampling,
        draws: Draws,
        *,
        purpose: str,
        reader: Reader = "student",
    ) -> Answers:
        """Return an answer of a model's to each question, without a graph.

        The student's are written by the engine, a teacher's by its own network.

        Raises:
            UserError: If the model only judges, as a server does.
        """
        family = self.family(reader)
        if not isinstance(family, CausalLM):
            raise UserError(f"the {reader} {family.path} judges answers, and cannot write them")
        told = self.condition(batch, reader=reader)
        engine = self.engine if reader == "student" else Generate()
        with torch.no_grad(), actor.acting(self.device):
            asked = Asked(told, batch["ids"], sampling, draws, purpose)
            return engine.answers(family, actor, asked)

    def given(self, batch: Batch) -> Answers:
        """Return the reference solutions, as the student would write them.

        Each ends as the student's template ends a turn, unless it is cut.

        Raises:
            UserError: If an example has none.
        """
        student, limit = self.student, self.asking.max_answer
        end = (student.turn_ends or [student.eos_id])[0]
        rows = []
        for example in self.examples(batch):
            with located(example.origin):
                text = solution_of(example).strip()
            tokens = student.tokenizer.encode(text, add_special_tokens=False)
            rows.append([*tokens, end][:limit])
        width = max(len(row) for row in rows)
        filled = [row + [student.pad_id] * (width - len(row)) for row in rows]
        tokens = torch.tensor(filled, dtype=torch.long, device=self.device)
        mask = torch.tensor(
            [[place < len(row) for place in range(width)] for row in rows], device=self.device
        )
        ended = torch.tensor([row[-1] == end for row in rows], device=self.device)
        return Answers(tokens, mask, None, ended)

    def state(self, answers: Answers) -> State:
        """Return where models are asked: at each token of the answers."""
        return State(
            answers.tokens,
            torch.zeros(len(answers.tokens), device=answers.tokens.device),
            answers.mask,
        )

    def condition(
        self, batch: Batch, *, reader: Reader = "student", exposure: float | None = None
    ) -> Condition:
        """Return what a model is told before the answer: see ``prompts.prompt_condition``.

        Raises:
            UserError: If there is no solution to show, or a prompt is too long.
        """
        prompts = [self.prompt(e, reader=reader, exposure=exposure) for e in self.examples(batch)]
        return prompt_condition(prompts, self.family(reader))

    def with_solutions(self, batch: Batch, solutions: Sequence[str | None]) -> Batch:
        """Return a batch with other reference solutions, one for each row."""
        pairs = zip(self.examples(batch), solutions, strict=True)
        return {**batch, "examples": [e._replace(solution=s) for e, s in pairs]}

    def examples(self, batch: Batch) -> Sequence[Example]:
        """Return the examples of a batch, a row each."""
        examples: Sequence[Example] = batch["examples"]
        return examples

    def by_skill(self, batch: Batch) -> dict[str, Batch]:
        """Return the questions of each skill, with the numbers that they have without the others.

        Args:
            batch: Of ``question_feed``: ids are those numbers times the number of skills, and the
                skill's own.
        """
        skills, examples = batch["skills"], self.examples(batch)
        numbers = batch["ids"].tolist()
        return {
            skill: self.collate(
                [example for example in examples if example.skill == skill],
                [n // len(skills) for n in numbers if n % len(skills) == place],
            )
            for place, skill in enumerate(skills)
        }

    def spelled(self, answers: Answers) -> list[str]:
        """Return the text of each answer, without special tokens."""
        rows = zip(answers.tokens, answers.mask, strict=True)
        return [self.student.decoded(tokens[mask].tolist()) for tokens, mask in rows]

    # prompts

    def family(self, reader: Reader) -> TokenFamily:
        """Return whose tokenizer and template a reader has."""
        return self.student if reader == "student" else self.teacher

    def prompt(
        self, example: Example, *, reader: Reader = "student", exposure: float | None = None
    ) -> list[int]:
        """Return the token ids of a question as a reader is asked it.

        Raises:
            UserError: If it is too long, has no solution to show, or its template refuses it.
        """
        family = self.family(reader)
        with located(example.origin):
            if example.pictures:
                raise UserError(
                    f"a question about a picture, and {family.path} reads text alone: take the "
                    "family vlm, or set data.image_column: null"
                )
            messages = self._messages(example, reader, exposure)
            tokens = prompt_tokens(family, messages, thinking=self.thinking(reader))
            self._check_length(len(tokens), reader, exposure)
        return tokens

    def thinking(self, reader: Reader) -> bool | None:
        """Return what a reader's chat template is told as ``enable_thinking``."""
        if reader == "teacher" and self.asking.teacher_thinking is not None:
            return self.asking.teacher_thinking
        return self.asking.student_thinking

    def _check_length(self, length: int, reader: Reader, exposure: float | None) -> None:
        """Refuse a prompt that is too long."""
        if length <= self.asking.max_prompt:
            return
        shown = "" if exposure is None else f" with a share {exposure:.3g} of the solution"
        raise UserError(
            f"the {reader}'s prompt{shown} has {length} tokens, and data.max_prompt is "
            f"{self.asking.max_prompt}"
        )

    def _check_room(self, length: int, reader: Reader, max_tokens: int) -> None:
        """Refuse a prompt after which an answer might not fit into the network."""
        most = self.context_lengths.get(reader)
        if most is not None and length + max_tokens > most:
            raise UserError(
                f"the {reader}'s prompt has {length} tokens, and method.max_tokens is "
                f"{max_tokens}, but its network takes {most} (max_position_embeddings): lower "
                "max_tokens, or leave out long questions with data.on_error: skip"
            )

    def _messages(
        self, example: Example, reader: Reader, exposure: float | None
    ) -> list[Mapping[str, str]]:
        assert example.messages is not None, "a question is a chat"
        *before, last = example.messages
        question = last["content"]
        text = filled(self.asking.student_prompt, {"question": question})
        if exposure is not None:
            assert reader == "teacher", "the student is shown no privileged context"
            shown = reveal(solution_of(example), exposure, example.answer)
            parts = {"question": question, "student_prompt": text, "solution": shown}
            text = filled(self.asking.teacher_prompt, parts)
        return [*before, {"role": "user", "content": text}]

    # what the data asks

    def usable(
        self,
        example: Example,
        *,
        solutions: Solutions = "unused",
        check: Callable[[Example], None] | None = None,
        max_tokens: int = 0,
    ) -> bool:
        """Return whether a question can be asked; if not, it is an error or to be left out.

        Args:
            example: The question.
            solutions: What becomes of its solution; one that is shown is tried as a whole.
            check: Refuses a question that lacks something else; None asks no more.
            max_tokens: Of the longest answer, for which the networks must have room.

        Raises:
            UserError: If it cannot be asked, and is not to be left out.
        """
        try:
            exposure = 1.0 if solutions == "shown" else None
            asked = self.prompt(example)
            shown = self.prompt(example, reader="teacher", exposure=exposure)
            with located(example.origin):
                self._check_room(len(asked), "student", max_tokens)
                self._check_room(len(shown), "teacher", max_tokens)
            if solutions == "learned":
                with located(example.origin):
                    solution_of(example)
            if check is not None:
                check(example)
        except UserError as error:
            if not self.asking.skip:
                raise
            self.skipped.append(str(error))
            return False
        return True

    def collate(self, examples: Sequence[Example], ids: Sequence[int]) -> dict[str, Any]:
        """Return a batch of questions, with their numbers."""
        return {
            "ids": torch.tensor(ids, dtype=torch.int64, device=self.device),
            "prompts": [example.prompt for example in examples],
            "examples": list(examples),
        }

    def release(self) -> None:
        """Say how many questions were left out."""
        if self.skipped:
            log.warning(
                "left out %d questions that cannot be used, such as %s",
                len(self.skipped),
                self.skipped[0],
            )
            self.skipped.clear()


def context_length(network: nn.Module) -> int | None:
    """Return how many tokens a network takes; None where that is not known.

    With a scaled rotary embedding it may be more than the network's settings say.
    """
    settings: Any = getattr(network, "config", None)
    if not isinstance(settings, PretrainedConfig):
        return None
    settings = settings.get_text_config()
    rotary = getattr(settings, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") != "default":
        return None
    found: int | None = getattr(settings, "max_position_embeddings", None)
    return found


def solution_of(example: Example) -> str:
    """Return the reference solution of a question.

    Raises:
        UserError: If it has none.
    """
    if example.solution is None or not example.solution.strip():
        raise UserError(
            "there is no reference solution to show or to learn: add a column 'solution' "
            "(data.solution_column names another), or end the chat with the assistant's answer"
        )
    return example.solution


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Return a template with its places filled; what is put in is not filled again."""
    return PLACE.sub(lambda match: parts[match[1]], template)

"""Text models in EleutherAI's lm-evaluation-harness.

Needs the package ``lm-eval``. An answer is sampled; a likelihood is a Monte Carlo bound, because a
diffusion model has no exact one.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from diffdistill.adapters import is_adapter_key
from diffdistill.answering import decoded, encoded, language_family, make_sampler
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.evaluation.likelihood import MonteCarlo, Pair, bound_pairs
from diffdistill.evaluation.text_settings import TextEvaluateSettings
from diffdistill.noising import Estimate
from diffdistill.roles import Role
from diffdistill.sample_settings import TextSampleSettings

FEWSHOT_SEED = 1234
"""The harness's own default."""


class _Asked(NamedTuple):
    """What is to be answered: its tokens, the number of its random numbers, and the length."""

    told: list[int]
    number: int
    max_tokens: int


class DiffusionLM(LM):
    """A role as the harness asks it.

    Args:
        role: The model.
        writing: How it samples; the task says where an answer ends.
        settings: How likelihoods are bounded, chats and lengths.
    """

    def __init__(
        self, role: Role, writing: TextSampleSettings, settings: TextEvaluateSettings
    ) -> None:
        super().__init__()
        self.role = role
        self.family = language_family(role)
        self.tokenizer = self.family.tokenizer
        self.writing = writing
        self.settings = settings
        self.max_length = settings.max_length or _positions(role)
        self.errors: list[float] = []

    # likelihood

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the bound of each continuation's log-likelihood, and whether it is the greedy one.

        The greedy one is what is sampled at temperature 0.
        """
        pairs = [self._pair(*request.args) for request in requests]
        values = self._bounds(pairs)
        greedy = replace(self.writing, temperature=0.0, num_answers=1)
        asked = [_Asked(pair.context, pair.number, len(pair.target)) for pair in pairs]
        answers = self._sampled(asked, greedy)
        return [
            (value, answer == pair.target)
            for pair, value, answer in zip(pairs, values, answers, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the bound of each text's log-likelihood, summed over windows of ``max_length``."""
        texts = [encoded(self.family, request.args[0]) for request in requests]
        windows = [rolling(text, self.max_length, self.family.unit) for text in texts]
        pairs = [
            Pair(context, target, _number(request.args[0], str(index)))
            for request, parts in zip(requests, windows, strict=True)
            for index, (context, target) in enumerate(parts)
        ]
        values = iter(self._bounds(pairs))
        return [sum(next(values) for _ in parts) for parts in windows]

    def _bounds(self, pairs: Sequence[Pair]) -> list[float]:
        settings = self.settings
        monte_carlo = MonteCarlo(
            num_draws=settings.num_draws,
            antithetic=settings.antithetic,
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
        found: list[Estimate] = bound_pairs(self.role, pairs, monte_carlo)
        self.errors += [float(estimate.error) for estimate in found]
        return [-float(estimate.value) for estimate in found]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Return both as tokens; spaces before the continuation are its own, as in the harness."""
        bare = context.rstrip(" ")
        told = encoded(self.family, bare)
        target = encoded(self.family, context + continuation)[len(told) :]
        if not target:
            raise UserError(f"nothing is left to score of {continuation!r} after {context[-40:]!r}")
        room = self.max_length - _filled(len(target), self.family.unit)
        return Pair(told[max(len(told) - room, 0) :], target, _number(context, continuation))

    # answers

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each context, cut where its task says."""
        seen: Counter[str] = Counter()
        asked, ends = [], []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            ends.append([until] if isinstance(until, str) else until)
            max_tokens = int(options.get("max_gen_toks", self.writing.max_tokens))
            number = _number(context, str(seen[context]))
            seen[context] += 1
            asked.append(_Asked(self._told(context, max_tokens), number, max_tokens))
        answers = self._sampled(asked, self.writing)
        return [
            cut_at(decoded(self.family, answer), until)
            for answer, until in zip(answers, ends, strict=True)
        ]

    def _told(self, context: str, max_tokens: int) -> list[int]:
        tokens = encoded(self.family, context)
        room = self.max_length - _filled(max_tokens, self.family.unit)
        if room < 1:
            raise UserError(
                f"answers of {max_tokens} tokens leave no room for a prompt in {self.max_length}: "
                "set evaluate.max_length"
            )
        return tokens[max(len(tokens) - room, 0) :]

    def _sampled(self, asked: Sequence["_Asked"], writing: TextSampleSettings) -> list[list[int]]:
        """Return the answers, in batches of the same number of tokens."""
        order = sorted(range(len(asked)), key=lambda i: (asked[i].max_tokens, -len(asked[i].told)))
        found: dict[int, list[int]] = {}
        for max_tokens, group in groupby(order, key=lambda index: asked[index].max_tokens):
            sampler = make_sampler(self.role, replace(writing, max_tokens=max_tokens))
            while part := list(islice(group, self.settings.batch_size)):
                ids = torch.tensor([asked[i].number for i in part], device=self.family.device)
                told = [asked[index].told for index in part]
                with self.role.acting(self.family.device):
                    answers = sampler.sample(told, Draws(writing.seed), ids)
                for index, answer in zip(part, answers, strict=True):
                    found[index] = answer[:max_tokens].tolist()
        return [found[index] for index in range(len(asked))]

    # chats

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness may keep prompts."""
        return self.family.path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template of the model's chats."""
        return self.tokenizer.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as text, up to where the answer begins."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text


def rolling(tokens: list[int], length: int, unit: int) -> list[tuple[list[int], list[int]]]:
    """Return windows of a text, each as context and target; every token is once in a target.

    Windows follow each other; the last has as much context as there is room for.

    Args:
        tokens: The text.
        length: Tokens of context and target together.
        unit: What a target begins at a multiple of.
    """
    windows = []
    size = max(length // unit * unit, unit)
    for start in range(0, len(tokens), size):
        target = tokens[start : start + size]
        room = size - _filled(len(target), unit)
        windows.append((tokens[max(start - room, 0) : start], target))
    return windows


def cut_at(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of some strings, without it."""
    ends = [text.find(stop) for stop in until if stop in text]
    return text[: min(ends)] if ends else text


def _filled(count: int, unit: int) -> int:
    """Return how many tokens so many take in whole blocks."""
    return -(-count // unit) * unit


def _positions(role: Role) -> int:
    config: Any = role.network.config
    return int(getattr(config, "max_position_embeddings", language_family(role).max_length))


def _number(*texts: str) -> int:
    """Return a number for the random numbers of a request, whatever is asked besides it."""
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=5)
    return int.from_bytes(digest.digest(), "little")


def run_tasks(
    role: Role, writing: TextSampleSettings, settings: TextEvaluateSettings
) -> dict[str, Any]:
    """Return what the harness finds of a role, with its own account of the tasks.

    Raises:
        UserError: If there is no such task, or it cannot be run.
    """
    lm = DiffusionLM(role, writing, settings)
    manager = _tasks(settings)
    if settings.chat and not lm.chat_template():
        raise UserError(f"evaluate.chat: the tokenizer of {lm.family.path} has no chat template")
    try:
        results: dict[str, Any] | None = simple_evaluate(
            lm,
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            limit=settings.limit,
            system_instruction=settings.system,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat and settings.multiturn,
            task_manager=manager,
            fewshot_random_seed=FEWSHOT_SEED,
            confirm_run_unsafe_code=settings.allow_code,
        )
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, UserError):
            raise
        detail = " ".join(str(error).split())[:400]
        raise UserError(f"lm-eval: {type(error).__name__}: {detail}") from error
    assert results is not None
    errors = lm.errors
    results["likelihood_error"] = sum(errors) / len(errors) if errors else None
    results["max_length"] = lm.max_length
    return results


def _tasks(settings: TextEvaluateSettings) -> Any:
    """Return the harness's table of tasks; its own thousands are read only where needed."""
    if not settings.tasks:
        raise UserError("name what to measure: evaluate.tasks=gsm8k_cot")
    for path in settings.task_paths:
        if not Path(path).is_dir():
            raise UserError(f"evaluate.task_paths: there is no folder {path}")
    own = TaskManager(include_path=list(settings.task_paths), include_defaults=False)
    if set(settings.tasks) <= set(own.all_tasks):
        return own
    whole = TaskManager(include_path=list(settings.task_paths) or None)
    missing = sorted(set(settings.tasks) - set(whole.all_tasks))
    if missing:
        raise UserError(f"lm-eval has no task {missing[0]!r}, and none is in evaluate.task_paths")
    return whole


def weights_digest(role: Role) -> str:
    """Return the SHA-256 of a role's weights: of its network, and of its own adapter."""
    digest = hashlib.sha256()
    own = {} if role.adapter is None else role.parameters()
    base = {k: v for k, v in role.network.state_dict().items() if not is_adapter_key(k)}
    for name, value in sorted((base | {f"adapter.{k}": v for k, v in own.items()}).items()):
        digest.update(name.encode())
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def account(
    role: Role, writing: TextSampleSettings, settings: TextEvaluateSettings
) -> dict[str, Any]:
    """Return all that a number depends on besides the task and the versions."""
    family = language_family(role)
    options = {k: v for k, v in vars(family).items() if isinstance(v, (str, int, float, bool))}
    return {
        "family": type(family).__name__,
        "family_options": options | {"dtype": str(family.weights_dtype)},
        "role": asdict(role.settings),
        "autocast": str(role.autocast),
        "weights_sha256": weights_digest(role),
        "sample": asdict(writing),
        "evaluate": asdict(settings),
    }

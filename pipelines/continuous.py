"""The engine ``continuous``: transformers' continuous batching."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig

from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_sampling import at_rest
from diffdistill.pipelines.engines import (
    Asked,
    Engine,
    Written,
    answers_of_rows,
    check_whole,
)
from diffdistill.rollouts import Actor, Answers, Sampling


@dataclass(kw_only=True)
class Continuous(Engine):
    """transformers' continuous batching: an answer that ends makes room for the next.

    Its random numbers are those of the batch: the same batch gets the same answers, but a row
    does not get the same in another. It samples in a thread of its own, in the type of the weights
    whatever ``train.precision`` is.

    Attributes:
        memory_share: Share of the free memory for keys and values; null is transformers' choice
            (0.8 to 0.9 on a GPU, 0.6 elsewhere), which leaves little to train in.
        batch_tokens: Tokens of one forward pass, at most; null is transformers' choice.
    """

    memory_share: float | None = 0.3
    batch_tokens: int | None = None

    adapters: ClassVar = ("lora", "dora")  # a shadow would need pages of its own

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: If one cannot be.
        """
        if self.memory_share is not None and not 0 < self.memory_share <= 1:
            raise UserError(f"memory_share must be in (0, 1], not {self.memory_share}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise UserError(f"batch_tokens must be at least 1, not {self.batch_tokens}")

    def check(self) -> None:
        """Refuse a transformers without it."""
        _settings_class()

    def answers(self, family: CausalLM, student: Actor, asked: Asked) -> Answers:
        """Return an answer to each prompt, without dropout."""
        check_whole(student, "continuous")
        settings = _settings_class()(
            return_logprobs=True,
            seed=asked.seeds[0],
            max_memory_percent=self.memory_share,
            max_batch_tokens=self.batch_tokens,
        )
        network = student.network
        devices = [network.device] if network.device.type == "cuda" else []
        with at_rest(network), torch.random.fork_rng(devices=devices):
            found = network.generate_batch(
                asked.prompts,
                generation_config=_generation(family, asked.sampling),
                continuous_batching_config=settings,
            )
        rows = [_written(answer) for answer in found.values()]
        if len(rows) < len(asked.ids):
            raise UserError(
                f"transformers' continuous batching gave {len(rows)} answers to {len(asked.ids)} "
                "prompts; its log says why: set engine: transformers, or engine.memory_share"
            )
        return answers_of_rows(rows, family, asked.sampling)


def _generation(family: CausalLM, sampling: Sampling) -> GenerationConfig:
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        eos_token_id=family.end_ids,
        pad_token_id=family.pad_id,
        **chosen,
    )


def _written(answer: Any) -> Written:
    """Return one answer.

    Raises:
        UserError: If it failed.
    """
    if answer.error is not None:
        raise UserError(
            f"transformers' continuous batching failed: {' '.join(str(answer.error).split())}: set "
            "engine: transformers, or another engine.memory_share"
        )
    return Written(answer.generated_tokens, answer.logprobs)


def _settings_class() -> Any:
    """Return the class of its settings.

    Raises:
        UserError: If transformers is too old.
    """
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        raise UserError(
            "engine continuous needs transformers 5.8 or newer: pip install -U transformers"
        ) from None
    return ContinuousBatchingConfig

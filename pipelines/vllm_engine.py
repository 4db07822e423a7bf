"""The engine ``vllm``: vLLM in the training process, on the same device."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffdistill.errors import MissingExtra, UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.completions import PLAIN
from diffdistill.pipelines.engines import (
    Asked,
    Engine,
    Written,
    answers_of_rows,
    check_whole,
)
from diffdistill.pipelines.student_weights import Handover, check_served
from diffdistill.rollouts import Actor, Answers, Sampling

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of an adapter."""


@dataclass(kw_only=True)
class Vllm(Engine):
    """vLLM in this process, which has the student's weights before each rollout.

    An adapter is loaded as one; of a student that is trained fully all weights are.

    Attributes:
        memory_share: Share of the device's memory for vLLM, its copy of the weights included (0.3
            in TRL).
        max_length: Tokens of the longest prompt with its answer; null is the model's own.
        sleep: Put vLLM's weights into the main memory, and drop its keys and values, while the
            student learns.
        folder: Where weights are handed over, such as /dev/shm; null is a temporary folder.
    """

    memory_share: float = 0.3
    max_length: int | None = None
    sleep: bool = True
    folder: str | None = None

    adapters: ClassVar = ("lora",)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: If one cannot be.
        """
        if not 0 < self.memory_share < 1:
            raise UserError(f"memory_share must be in (0, 1), not {self.memory_share}")
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length must be at least 1, not {self.max_length}")
        self._running: _Running | None = None
        self._handover = Handover(self.folder)

    def check(self) -> None:
        """Refuse where vLLM is not installed."""
        _vllm()

    def answers(self, family: CausalLM, student: Actor, asked: Asked) -> Answers:
        """Return an answer to each prompt; rows have seeds of their own."""
        if self._running is None:
            check_whole(student, "vllm")
            check_served(family, "vllm")
            self._running = _Running(self._started(family, student, asked.draws.seed), self.sleep)
        with self._running.awake():
            if self._handover.due(student):
                with self._handover.written(family, student) as folder:
                    self._running.load(folder, adapter=student.adapter is not None)
            options = _sampling(family, asked.sampling)
            seeded = [{**options, "seed": seed} for seed in asked.seeds]
            rows = self._running.written(asked.prompts, seeded)
        return answers_of_rows(rows, family, asked.sampling)

    def _started(self, family: CausalLM, student: Actor, seed: int) -> Any:
        """Return vLLM's ``LLM`` of the student's base."""
        base = family.folder_of(student.settings.path)
        options: dict[str, Any] = {}
        if student.adapter is not None:
            rank = student.settings.rank
            options = {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": next((r for r in RANKS if r >= rank), rank),
            }
        if family.quantize == "nf4":
            options["quantization"] = "bitsandbytes"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            options["distributed_executor_backend"] = "external_launcher"  # one vLLM each
        return _vllm().LLM(
            model=str(base),
            tokenizer=str(family.folder),
            dtype=str(family.weights_dtype).removeprefix("torch."),
            seed=seed,
            gpu_memory_utilization=self.memory_share,
            max_model_len=self.max_length,
            enable_sleep_mode=self.sleep,
            trust_remote_code=family.trust_remote_code,
            logprobs_mode="processed_logprobs",
            **options,
        )


@dataclass
class _Running:
    """vLLM's ``LLM``, and what it has loaded.

    Attributes:
        llm: The ``LLM``.
        sleeps: Whether it sleeps between rollouts.
        request: Asks for the adapter, if there is one.
        adapters: How many have been loaded.
    """

    llm: Any
    sleeps: bool
    request: Any = None
    adapters: int = 0

    def __post_init__(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it be awake within the block."""
        if self.sleeps:
            self.llm.wake_up()
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=1)

    def load(self, folder: Path, *, adapter: bool) -> None:
        """Load an adapter, or all weights."""
        if adapter:
            self.adapters += 1
            self.request = _request(folder.name, self.adapters, str(folder))
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()

    def written(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[Mapping[str, Any]]
    ) -> list[Written]:
        """Return what it writes to each prompt."""
        found = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [_vllm().SamplingParams(**options) for options in sampling],
            use_tqdm=False,
            lora_request=self.request,
        )
        outputs = [one.outputs[0] for one in found]
        return [
            Written(
                list(output.token_ids),
                [
                    float(places[token].logprob)
                    for token, places in zip(output.token_ids, output.logprobs, strict=True)
                ],
            )
            for output in outputs
        ]


def _sampling(family: CausalLM, sampling: Sampling) -> dict[str, Any]:
    """Return how tokens are sampled, in vLLM's words; nothing is left to the checkpoint."""
    return {
        **PLAIN,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or PLAIN["top_k"],
        "stop_token_ids": family.end_ids,
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def _request(name: str, number: int, path: str) -> Any:
    """Return what asks vLLM for an adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path)


def _vllm() -> Any:
    """Return the package.

    Raises:
        MissingExtra: If it is not installed.
    """
    try:
        import vllm
    except ImportError:
        raise MissingExtra("vllm", "engine vllm", extra="vllm") from None
    return vllm

"""The engine ``vllm-server``: vLLM in another process, asked over HTTP."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import distributed as dist

from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.completions import PLAIN, Completions
from diffdistill.pipelines.engines import (
    Asked,
    Engine,
    Written,
    answers_of_rows,
    check_whole,
)
from diffdistill.pipelines.json_server import JsonServer, Refused
from diffdistill.pipelines.reaching import Reaching, is_address, model_at
from diffdistill.pipelines.student_weights import Handover, check_served
from diffdistill.rollouts import Actor, Answers, Sampling

SURE = -1e-3
"""Of a token that was the only possible one, the log-probability as it was sampled is above it."""


@dataclass(kw_only=True)
class VllmServer(Reaching, Engine):
    """A vLLM server, which is given the student's weights before each rollout.

    Of an adapter by ``/v1/load_lora_adapter``, of all weights by ``/collective_rpc`` (vLLM's
    ``reload_weights``), both as folders that the server must see.

    Attributes:
        url: Where the server's API begins.
        model: Name of the student's base there; null is the only one.
        folder: Where weights are handed over, a folder that this process and the server both have
            under this name, such as one in /dev/shm; null is a temporary folder.
        timeout: Seconds that the server may be silent, such as while it writes or loads weights.
    """

    url: str = "http://localhost:8000/v1"
    model: str | None = None
    folder: str | None = None
    timeout: float = 600.0
    concurrency: int = 64

    adapters: ClassVar = ("lora",)

    def __post_init__(self) -> None:
        """Check the address and the options.

        Raises:
            UserError: If one cannot be.
        """
        self.check_patience()
        self.url = self.url.rstrip("/")
        if not is_address(self.url):
            raise UserError(
                "url must be the address of the server's API, such as http://localhost:8000/v1, "
                "without a key"
            )
        self._handover = Handover(self.folder)
        self._serving = ""
        self._tested = False

    def check(self) -> None:
        """Ask the server for its models.

        Raises:
            UserError: If it cannot be reached, or has another.
        """
        _ = self._base

    def answers(self, family: CausalLM, student: Actor, asked: Asked) -> Answers:
        """Return an answer to each prompt; rows have seeds of their own."""
        check_whole(student, "vllm-server")
        check_served(family, "vllm-server")
        if self._handover.due(student):
            self._serving = self._handed_over(family, student)
        name = self._base if student.adapter is None else self._serving
        options = self._sampling(family, asked.sampling)
        writer = Completions(
            self._server, name, "openai", top_k=1, words=family.words, named=_unnamed
        )
        prompts = asked.prompts
        self._test(writer, prompts[0], options, asked.sampling)
        rows = self.asked(
            lambda row: Written(*writer.continued(row[0], {**options, "seed": row[1]})),
            list(zip(prompts, asked.seeds, strict=True)),
        )
        return answers_of_rows(rows, family, asked.sampling)

    @cached_property
    def _server(self) -> JsonServer:
        return self.reached(self.url)

    @cached_property
    def _root(self) -> JsonServer:
        """What is beside the API."""
        return replace(self._server, url=self.url.removesuffix("/v1"))

    @cached_property
    def _base(self) -> str:
        return model_at(self._server, self.model)

    def _sampling(self, family: CausalLM, sampling: Sampling) -> dict[str, Any]:
        """Return how tokens are sampled, in the server's words."""
        return {
            **PLAIN,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or PLAIN["top_k"],
            "stop_token_ids": family.end_ids,
            "ignore_eos": True,
            "cache_salt": self._serving,  # keys and values of other weights are not its own
        }

    # weights

    def _handed_over(self, family: CausalLM, student: Actor) -> str:
        """Give the server the student's weights; return the name that they have from now on.

        One process does, and the others wait for it; what goes wrong there ends all.
        """
        together = dist.is_initialized() and dist.get_world_size() > 1
        told = [self._handover.label, ""]  # the name, or what went wrong
        if not together or dist.get_rank() == 0:
            try:
                told[0] = self._given(family, student)
            except UserError as error:
                if not together:
                    raise
                told[1] = str(error)
        if together:
            dist.broadcast_object_list(told, src=0)
        if told[1]:
            self._handover.failed()
            raise UserError(told[1])
        return told[0]

    def _given(self, family: CausalLM, student: Actor) -> str:
        before = self._handover.label
        with self._handover.written(family, student) as folder:
            if student.adapter is None:
                self._reload(folder)
            else:
                self._load_adapter(folder, before)
        return self._handover.label

    def _reload(self, folder: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._root.tell("/collective_rpc", body)
        except Refused as error:
            raise UserError(
                f"{error}: start it with VLLM_SERVER_DEV_MODE=1 in its environment, and let it see "
                f"{folder.parent} (engine.folder)"
            ) from None

    def _load_adapter(self, folder: Path, before: str) -> None:
        body = {"lora_name": folder.name, "lora_path": str(folder), "load_inplace": True}
        try:
            self._server.tell("/load_lora_adapter", body)
        except Refused as error:
            if "already been loaded" not in str(error):  # by a try that was not heard of
                raise UserError(
                    f"{error}: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
                    "environment, with --enable-lora and --max-lora-rank of the adapter's rank or "
                    f"more, and let it see {folder.parent} (engine.folder)"
                ) from None
        if before:
            self._forget(before)

    def _forget(self, name: str) -> None:
        with suppress(Refused):  # the server may have been started anew since
            self._server.tell("/unload_lora_adapter", {"lora_name": name})

    # log-probabilities

    def _test(
        self,
        writer: Completions,
        prompt: Sequence[int],
        asked: dict[str, Any],
        sampling: Sampling,
    ) -> None:
        """Refuse a server whose log-probabilities are not those of what was sampled, once.

        Of a token that is the only possible one it is 0.
        """
        plain = sampling.temperature == 1 and sampling.top_p == 1 and not sampling.top_k
        if self._tested or plain or sampling.temperature == 0:
            return
        _, logprobs = writer.continued(prompt, {**asked, "top_k": 1, "seed": 0, "max_tokens": 8})
        if min(logprobs, default=0.0) < SURE:
            raise UserError(
                f"the server {self.url} gives log-probabilities from before temperature, top-p and "
                "top-k: start vLLM with --logprobs-mode processed_logprobs, or set "
                "method.temperature: 1, top_p: 1 and top_k: 0"
            )
        self._tested = True


def _unnamed(text: str) -> int:
    """Refuse a token that is named by its text."""
    raise UserError(
        f"the server names tokens by their text, such as {text!r}: it does not know "
        "return_tokens_as_token_ids, as vLLM does"
    )

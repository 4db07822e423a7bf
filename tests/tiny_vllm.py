"""What stands for vLLM in tests: a tiny causal LM behind its routes, and its Python names."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.tiny_server import TinyServer, refused


@torch.no_grad()
def write(
    network: Any, prompt: Sequence[int], asked: Mapping[str, Any], *, processed: bool = True
) -> tuple[list[int], list[float]]:
    """Return sampled tokens and their log-probabilities, without any cache."""
    rng = torch.Generator().manual_seed(asked["seed"])
    warpers: list[Any] = [TemperatureLogitsWarper(float(asked["temperature"]))]
    if asked["top_k"] > 0:
        warpers.append(TopKLogitsWarper(asked["top_k"]))
    if asked["top_p"] < 1:
        warpers.append(TopPLogitsWarper(asked["top_p"]))
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < asked["max_tokens"]:
        raw = network(input_ids=torch.tensor([[*prompt, *tokens]])).logits[:, -1].float()
        chosen = raw
        for warper in warpers:
            chosen = warper(None, chosen)
        tokens.append(int(torch.multinomial(chosen.softmax(-1), 1, generator=rng)))
        given = chosen if processed else raw
        logprobs.append(float(given.log_softmax(-1)[0, tokens[-1]]))
        if tokens[-1] in asked["stop_token_ids"]:
            break
    return tokens, logprobs


def with_adapter(base: Any, path: str) -> Any:
    """Return a copy of a network with an adapter that was saved by peft."""
    copied = type(base)(base.config).eval()
    copied.load_state_dict(base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        return PeftModel.from_pretrained(copied, path).eval()


@dataclass
class WritingServer(TinyServer):
    """A server that also writes, and takes weights.

    Attributes:
        dev: Whether it was started in vLLM's development mode, which ``reload_weights`` needs.
        lora: Whether adapters may be loaded.
        shift_logprobs: Added to each log-probability.
        loads: What was loaded, in turn.
    """

    dev: bool = True
    lora: bool = True
    shift_logprobs: float = 0.0
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapters: dict[str, Any] = {}
        self.loading = threading.Lock()

    def routed(self, path: str, body: Any) -> Any:
        if path == "/collective_rpc" and self.dev:
            return self.reload(body)
        if path == "/v1/load_lora_adapter" and self.lora:
            name = body["lora_name"]
            self.adapters[name] = with_adapter(self.network, body["lora_path"])
            self.loads.append(name)
            return f"Success: LoRA adapter '{name}' added successfully."
        if path == "/v1/unload_lora_adapter" and self.lora:
            if body["lora_name"] not in self.adapters:
                raise refused(404, "The lora adapter cannot be found.")
            del self.adapters[body["lora_name"]]
            return "Success"
        if path == "/v1/completions" and "seed" in body:
            return self.written(body)
        return super().routed(path, body)

    def reload(self, body: Any) -> Any:
        assert body["method"] == "reload_weights"
        path = body["kwargs"]["weights_path"]
        self.network = AutoModelForCausalLM.from_pretrained(path).eval()
        self.loads.append(path)
        return {"results": [None]}

    def written(self, body: Any) -> Any:
        known = {**dict.fromkeys(self.names, self.network), **self.adapters}
        if body["model"] not in known:
            raise refused(404, f"The model `{body['model']}` does not exist.")
        with self.lock:
            tokens, logprobs = write(
                known[body["model"]], body["prompt"], body, processed=self.processed
            )
        as_ids = bool(body.get("return_tokens_as_token_ids")) and not self.texts
        told = {
            "tokens": [self.name(token, as_ids) for token in tokens],
            "token_logprobs": [value + self.shift_logprobs for value in logprobs],
            "top_logprobs": [{} for _ in tokens],
        }
        return {"choices": [{"index": 0, "text": "?", "logprobs": told}]}


class FakeLLM:
    """vLLM's ``LLM`` as far as the engine uses it; it refuses to write while it sleeps."""

    made: list["FakeLLM"] = []

    def __init__(self, model: str, **options: Any) -> None:
        self.options = options
        self.network = AutoModelForCausalLM.from_pretrained(model).eval()
        self.asleep = False
        self.calls: list[str] = []
        self.adapters: dict[int, Any] = {}
        FakeLLM.made.append(self)

    def sleep(self, level: int) -> None:
        assert self.options["enable_sleep_mode"]
        assert not self.asleep
        self.asleep = True
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        assert self.asleep
        self.asleep = False
        self.calls.append("wake_up")

    def collective_rpc(self, method: str, kwargs: Mapping[str, Any]) -> None:
        assert not self.asleep
        assert method == "reload_weights"
        self.network = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"]).eval()
        self.calls.append(method)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def generate(
        self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any
    ) -> list[Any]:
        assert not self.asleep
        network = self.network
        if lora_request is not None:
            assert self.options["enable_lora"]
            number = lora_request.lora_int_id
            if number not in self.adapters:
                self.adapters = {number: with_adapter(network, lora_request.lora_path)}
            network = self.adapters[number]
        self.calls.append("generate")
        pairs = zip(prompts, sampling_params, strict=True)
        found = [write(network, p["prompt_token_ids"], vars(asked)) for p, asked in pairs]
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=tokens,
                        logprobs=[
                            {token: SimpleNamespace(logprob=value)}
                            for token, value in zip(tokens, logprobs, strict=True)
                        ],
                    )
                ]
            )
            for tokens, logprobs in found
        ]


@dataclass
class LoRARequest:
    """As vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str


def fake_modules() -> dict[str, ModuleType]:
    """Return the modules that stand for vLLM's, by name."""
    names = ("vllm", "vllm.lora", "vllm.lora.request")
    modules = {name: ModuleType(name) for name in names}
    modules["vllm"].LLM = FakeLLM  # type: ignore[attr-defined]
    modules["vllm"].SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    modules["vllm.lora.request"].LoRARequest = LoRARequest  # type: ignore[attr-defined]
    return modules

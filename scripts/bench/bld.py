"""What a teacher's predictions of bytes cost beside one call of it, as ratios within one run.

    python scripts/bench/bld.py            # the bundled teacher, on held-out functions
    python scripts/bench/bld.py --full     # a random network of 1 billion parameters on a GPU
    python scripts/bench/bld.py --quick    # two texts, to see that it runs

One call is one of the network with the same texts, and the log-probabilities of all their tokens.
Beside a search's time are the calls of the network and the tokens that they were for. A random
network is sure of nothing, so that no beam is ever dropped. Both have the 1280 tokens of the
bundled teacher: what a search does for each token of a vocabulary is more with a larger one.
Writes samples/bench/bld.json, with what it ran on (bld-full.json, bld-quick.json).
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from timing import paired
from transformers import Qwen3Config, Qwen3ForCausalLM

from diffdistill.bundled import bundled
from diffdistill.byte_beam import Search
from diffdistill.config import load_config
from diffdistill.data.settings import DataSettings
from diffdistill.data.texts import open_texts
from diffdistill.pipelines.block_diffusion import project
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.projection import dense
from diffdistill.session import build

ROOT = Path(__file__).parents[2]
SEARCHES = {
    "canonical path": Search(path="canonical"),
    "K = 1": Search(num_beams=1),
    "K = 2": Search(num_beams=2),
    "K = 4": Search(num_beams=4),
}
LARGE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 32768,
}


class Bench:
    """A teacher, and the texts that it is asked about."""

    def __init__(self, count: int, large: bool) -> None:
        """Load the bundled pair; ``large`` puts a random network in the teacher's place."""
        session = build(load_config("bld/python"))
        pair = session.family
        assert isinstance(pair, CausalPair)
        pair.annotator = None
        self.pair, self.teacher = pair, session.roles["teacher"]
        if large:
            self.teacher.network = _random_network(pair.teacher)
        dataset = open_texts(DataSettings(path=str(bundled("data", "python-held-out.jsonl"))))
        self.texts = pair.encode([dataset[index] for index in range(count)])
        self.tokens = [text["teacher/tokens"].tolist() for text in self.texts]

    def called(self) -> None:
        """Call the teacher once with the texts, and have it predict all their tokens."""
        lengths = torch.tensor([len(tokens) for tokens in self.tokens])
        kept = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.zeros_like(kept, dtype=torch.long)
        tokens[kept] = torch.tensor([token for row in self.tokens for token in row])
        family, places = self.pair.teacher, torch.arange(kept.shape[1]).expand_as(tokens)
        given = [tensor.to(family.device) for tensor in (tokens, kept, places)]
        with torch.no_grad():
            dense(project(self.teacher.network, *given)).log_softmax(-1)

    def searched(self, search: Search) -> int:
        """Make the targets of a search, and return how many bytes they are of."""
        found = self.pair.byte_targets(self.teacher, self.texts, search, 16)
        return sum(int(target["bytes/known"].sum()) for target in found)

    def counted(self, search: Search) -> dict[str, Any]:
        """Return the bytes of a search, and the calls and tokens of the network it takes."""
        tokens: list[int] = []

        def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            tokens.append(kwargs["input_ids"].numel())

        network: Any = self.teacher.network
        hook = network.base_model.register_forward_hook(count, with_kwargs=True)
        num_bytes = self.searched(search)
        hook.remove()
        return {"bytes": num_bytes, "calls": len(tokens), "tokens beside": sum(tokens[1:])}


def _random_network(family: CausalLM) -> Any:
    """Return a network of a billion parameters that reads the family's tokens."""
    with torch.device(family.device):
        network = Qwen3ForCausalLM(Qwen3Config(**LARGE)).to(torch.bfloat16).eval()
    family.weights_dtype = torch.bfloat16
    return network.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="a billion parameters, on a GPU")
    parser.add_argument("--quick", action="store_true", help="two texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "samples" / "bench")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if not arguments.full else torch.get_num_threads())
    name = "bld-full" if arguments.full else "bld-quick" if arguments.quick else "bld"
    bench = Bench(2 if arguments.quick else 16, arguments.full)
    device = bench.pair.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    results: dict[str, Any] = {"device": where, "torch": torch.__version__, "searches": {}}
    for label, search in SEARCHES.items():
        found = bench.counted(search)
        times = paired(lambda s=search: bench.searched(s), bench.called, arguments.rounds)  # type: ignore[misc]
        found |= dict(zip(("seconds", "one call, seconds", "ratio"), times, strict=True))
        found["microseconds per byte"] = 1e6 * times[0] / found["bytes"]
        results["searches"][label] = found
        print(label, found, flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

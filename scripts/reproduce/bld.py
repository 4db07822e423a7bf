"""Does a teacher teach more through bytes than through chunks or sorted probabilities?

Goes on training the bundled autoregressive student `python-ar` on functions of Python's library:
alone (SFT), and with `python-ar-teacher`, which is larger and has a tokenizer of its own, by ULD,
GOLD, ALM (with SFT) and BLD. All arms share data, order, learning rate and number of steps, and are
measured on files kept from training. First the teacher's predictions of bytes are compared with
those of a beam of 32: how much is lost at 1, 2 and 4, and on the canonical path.

    python scripts/reproduce/bld.py

Writes results.json, figure.png and README.md to samples/bld. Each run is saved when it is done,
and what is there already is not run again. The teacher's predictions are kept in --cache.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from collecting import (
    Arm,
    cell,
    collect,
    deviation,
    differences,
    header,
    open_results,
    quiet,
    row,
    save_results,
    values,
    write_page,
)
from matplotlib.figure import Figure
from torch import Tensor

from diffdistill.asking import reply
from diffdistill.bundled import bundled
from diffdistill.byte_beam import Search
from diffdistill.checkpoints import restore
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.data.cache import EncodedDataset
from diffdistill.data.settings import DataSettings
from diffdistill.data.texts import open_texts
from diffdistill.evaluation.bits import bits_per_byte
from diffdistill.evaluation.python_source import completes
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.pipelines.text_rows import Reading
from diffdistill.roles import Role
from diffdistill.sampling import inference
from diffdistill.session import Session, build
from diffdistill.spellings import ALPHABET
from diffdistill.types import Example

ROOT = Path(__file__).parents[2]
BLD, ALM, SFT = "bld/python", "alm/python", "text-sft/python"
HELD_OUT = 128
"""How many chats, and texts, a model is measured on."""
SEARCHED = 24
"""How many chats the searches are compared on."""

ARMS = {
    "SFT": Arm(SFT, []),
    "ULD": Arm(ALM, ["method={name: text-uld}"]),
    "GOLD": Arm(ALM, ["method={name: text-gold}"]),
    "ALM": Arm(ALM, []),
    "ALM, temperature 1": Arm(ALM, ["method.temperature=1"]),
    "bytes of the data alone": Arm(BLD, ["method.kl_weight=0"]),
    "BLD": Arm(BLD, []),
    "BLD, KL weight 1": Arm(BLD, ["method.kl_weight=1"]),
    "BLD, teacher's bytes alone": Arm(BLD, ["method.kl_weight=1", "method.byte_weight=0"]),
    "BLD, autoregressive head": Arm(BLD, ["method.head=autoregressive"]),
    "BLD, canonical path": Arm(BLD, ["method.path=canonical"]),
    "BLD, first bytes alone": Arm(BLD, ["method.num_bytes=1"]),
    "BLD, heads as slow as the rest": Arm(BLD, ["roles.student.head_lr=null"]),
}
SHOWN = {
    "answers": "answers, bits per byte",
    "texts": "texts, bits per byte",
    "valid": "answers that parse",
    "length": "their length",
}
SEARCHES = {
    "canonical path": Search(path="canonical"),
    "1": Search(num_beams=1),
    "2": Search(num_beams=2),
    "4": Search(num_beams=4),
    "8": Search(num_beams=8),
}
EXACT = Search(num_beams=32, threshold=1e-6)


class World:
    """The held-out files."""

    def __init__(self, count: int) -> None:
        """Read so many chats and texts, of a length that all models read as a whole."""
        path = str(bundled("data", "python-held-out.jsonl"))
        dataset = open_texts(DataSettings(path=path))
        found = [dataset[index] for index in range(len(dataset))]
        self.chats = [example for example in found if example.messages is not None][:count]
        self.texts = [example for example in found if example.messages is None][:count]

    def measure(self, session: Session, name: str) -> dict[str, float]:
        """Return what a role does with the held-out files."""
        role, results = session.roles[name], dict[str, float]()
        with inference(session):
            for found in bits_per_byte(name, role, [*self.chats, *self.texts], Reading()):
                results[found.texts] = found.bits_per_byte
        return results | self._answered(session, role)

    def _answered(self, session: Session, role: Role) -> dict[str, float]:
        """Return how many sampled answers parse, and their length beside the right ones."""
        settings = session.config.replies
        settings.temperature, settings.batch_size = 1.0, 32
        asked = [_question(chat) for chat in self.chats]
        accepted, lengths = 0, list[float]()
        with inference(session):
            for draft in reply(session, role, asked, settings):
                family: Any = role.family
                text, example = family.decoded(draft.tokens), asked[draft.prompt]
                accepted += completes(example.prompt, text)
                lengths.append(len(text) / max(len(example.solution or ""), 1))
        return {"valid": accepted / len(asked), "length": statistics.fmean(lengths)}


def _question(chat: Example) -> Example:
    """Return what a chat asks, with its answer as the solution."""
    assert chat.messages is not None
    *before, last = chat.messages
    return chat._replace(messages=tuple(before), solution=last["content"])


def compared(world: World, count: int) -> dict[str, dict[str, float]]:
    """Return how far the searches are from a beam of 32, and the teacher's bits per byte."""
    session = build(load_config(BLD))
    pair, teacher = session.family, session.roles["teacher"]
    assert isinstance(pair, CausalPair)
    pair.annotator = None
    encoded = pair.encode(world.chats[:count])
    ours, bytes_ = [], []
    for target in pair.byte_targets(teacher, encoded, EXACT, ALPHABET):
        ours.append(_dense(target))
        bytes_.append(target["bytes/observed"])
    exact, observed = torch.cat(ours), torch.cat(bytes_)
    results = {}
    for name, search in SEARCHES.items():
        found = pair.byte_targets(teacher, encoded, search, ALPHABET)
        probabilities = torch.cat([_dense(target) for target in found])
        results[name] = _apart(probabilities, exact, observed)
    return results | {"32": _apart(exact, exact, observed)}


def _dense(target: Mapping[str, Tensor]) -> Tensor:
    """Return the probabilities ``[n, ALPHABET]`` of targets that are kept whole."""
    rows = torch.zeros(len(target["bytes/ids"]), ALPHABET)
    return rows.scatter(1, target["bytes/ids"].long(), target["bytes/logprobs"].float().exp())


def _apart(found: Tensor, exact: Tensor, observed: Tensor) -> dict[str, float]:
    own = found.gather(1, observed[:, None])[:, 0]
    return {
        "variation": float(0.5 * (found - exact).abs().sum(1).mean()),
        "bits": float(-own.clamp_min(1e-6).log2().mean()),
        "missed": float((own < 1e-3).float().mean()),
    }


def overrides_of(arm: Arm, steps: int, data: int, cache: Path) -> list[str]:
    """Return how an arm is run here."""
    here = [f"data.max_examples={data}", f"data.cache={cache}"]
    return [*arm.overrides, *quiet(steps), *here]


def run(arm: Arm, steps: int, data: int, held_out: int, cache: Path, seed: int) -> dict[str, float]:
    """Train one student and return its measurements."""
    torch.set_num_threads(1)
    here = [*overrides_of(arm, steps, data, cache), f"train.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        train(load_config(arm.config, here), Path(folder))
        return World(held_out).measure(restore(Path(folder)), "student")


def encode(steps: int, data: int, cache: Path) -> None:
    """Ask the teacher once for all arms that need its bytes."""
    for arm in (ARMS["BLD"], ARMS["BLD, canonical path"]):
        config = load_config(arm.config, overrides_of(arm, steps, data, cache))
        session = build(config)
        assert isinstance(session.family, CausalPair)
        texts = EncodedDataset(open_texts(config.data), session.family, cache, batch_size=32)
        texts.prepare()


def measured(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all results; what ``path`` does not hold yet is run."""
    steps, data, cache = arguments.steps, arguments.texts, arguments.cache
    held_out = 8 if arguments.quick else HELD_OUT
    results = open_results(path, {"steps": steps, "texts": data})
    if "before" not in results:
        world, session = World(held_out), build(load_config(BLD))
        results["before"] = world.measure(session, "student")
        results["teacher"] = world.measure(session, "teacher")
        results["searches"] = compared(world, 2 if arguments.quick else SEARCHED)
        save_results(path, results)
    encode(steps, data, cache)
    jobs = {name: partial(run, arm, steps, data, held_out, cache) for name, arm in ARMS.items()}
    collect(path, results, jobs, arguments.seeds, arguments.workers, SHOWN)
    return results


def draw(results: dict[str, Any], output: Path) -> None:
    """Write the figure: a panel for each number, a point for each arm."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    keys = list(SHOWN)[:3]
    for panel, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        for place, arm in enumerate(ARMS):
            found = values(results, arm, key)
            color = f"C{[SFT, ALM, BLD].index(ARMS[arm].config)}"
            panel.errorbar(
                place, statistics.fmean(found), deviation(found), marker="o", capsize=3, c=color
            )
        for name, style in (("before", ":"), ("teacher", "--")):
            panel.axhline(results[name][key], color="gray", linestyle=style, linewidth=1)
        panel.set_xticks(range(len(ARMS)), list(ARMS), rotation=90, fontsize=7)
        panel.set_title(SHOWN[key], fontsize=9)
    figure.savefig(output / "figure.png", dpi=110)


def readme(results: dict[str, Any]) -> str:
    """Return the page's tables; the reading is written by hand in reading.md."""
    seeds = len(results["SFT"])
    lines = [
        "# BLD on functions of Python's library",
        "",
        f"Made by `python scripts/reproduce/bld.py --seeds {seeds} --steps {results['steps']} "
        f"--texts {results['texts']}`. Each arm goes on from `python-ar` for {results['steps']} "
        f"steps of 16 of the first {results['texts']} texts; files kept from training, "
        f"{HELD_OUT} chats and as many texts. Mean and standard deviation over {seeds} training "
        "seeds. Answers are sampled at temperature 1, and their length is relative to that of the "
        "right ones, because a mere `return` parses too.",
        "",
        "![all arms](figure.png)",
        "",
        "*Dotted: the student before. Dashed: its teacher, `python-ar-teacher`.*",
        "",
        *header([*SHOWN.values(), "answers, against SFT"]),
    ]
    for name in ("before", "teacher"):
        lines.append(row(name, [*(f"{results[name][key]:.3f}" for key in SHOWN), ""]))
    for name in ARMS:
        against = differences(results, name, "SFT", "answers")
        told = (
            "" if name == "SFT" else f"{statistics.fmean(against):+.4f} ± {deviation(against):.4f}"
        )
        lines.append(row(name, [*(cell(values(results, name, key)) for key in SHOWN), told]))
    lines += [
        "",
        "## What a beam keeps",
        "",
        f"The teacher's predictions of the bytes of {SEARCHED} held-out answers: total variation "
        "from those of a beam of 32 (which stands for the exact cover), bits for each byte of the "
        "data, and the share of bytes that get less than 0.001. Bits of the canonical path are no "
        "likelihood: its boundaries tell what comes.",
        "",
        *header(["total variation", "bits per byte", "missed"]),
    ]
    for name, found in results["searches"].items():
        lines.append(row(name, [f"{found[key]:.4f}" for key in ("variation", "bits", "missed")]))
    return "\n".join([*lines, "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--texts", type=int, default=2048, help="of the training data, the first")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke run; give an --output too")
    parser.add_argument("--output", type=Path, default=ROOT / "samples" / "bld")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "diffdistill-bld"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.texts = 1, 2, 24
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results = measured(arguments.output / "results.json", arguments)
    draw(results, arguments.output)
    write_page(arguments.output, readme(results))


if __name__ == "__main__":
    main()

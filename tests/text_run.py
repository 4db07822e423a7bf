"""Configs of tiny language models that train in a second, and their data."""

import json
from pathlib import Path
from typing import Any

import torch

from diffdistill.pipelines.bd3lm import BD3LM
from diffdistill.pipelines.mdlm import MDLM
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.pipelines.text_rows import Reading
from diffdistill.types import Example
from tests.conftest import CPU
from tests.tiny_text import CODE, save_lm


def write_chats(file: Path, count: int = 6) -> Path:
    """Write chats about code, one of them of two turns, and one plain text."""
    rows: list[dict[str, Any]] = []
    for number in range(count - 1):
        messages = [
            {"role": "user", "content": f"write number {number}"},
            {"role": "assistant", "content": CODE[number % len(CODE)]},
        ]
        if number == 1:
            messages += [
                {"role": "user", "content": "yes"},
                {"role": "assistant", "content": "yes"},
            ]
        rows.append({"messages": messages})
    rows.append({"text": CODE[0] + CODE[1]})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def save_world(folder: Path) -> Path:
    """Save a student, a dense teacher with its tokenizer, a cross teacher, and data."""
    save_lm(folder / "student")
    save_lm(folder / "dense", seed=1, intermediate_size=64)
    save_lm(folder / "moe", "teacher", "qwen3-moe", seed=2)
    write_chats(folder / "chats.jsonl")
    return folder


def text_values(world: Path, method: str = "bd3lm", /, **sections: Any) -> dict[str, Any]:
    """Return the values of a config of ``method``; ``sections`` are merged into them."""
    teachers: dict[str, Any] = {
        "tide": {
            "teacher": {
                "family": {
                    "name": "mdlm", "path": str(world / "moe"), "block": 4, "max_length": 96
                }
            }
        }
    }  # fmt: skip
    values: dict[str, Any] = {
        "family": {"name": "bd3lm", "path": str(world / "student"), "block": 4, "max_length": 64},
        "method": {"name": method},
        "roles": teachers.get(method, {}),
        "data": {"path": str(world / "chats.jsonl"), "batch_size": 2},
        "train": {"steps": 4, "lr": 0.01, "save_every": 2},
        "tracking": {"tensorboard": False},
    }
    for name, given in sections.items():
        values[name] = values.get(name, {}) | given
    return values


def make_pair(world: Path, *, cross: bool = True, **reading: Any) -> TextPair:
    """Return the student's family, with the cross teacher's or alone."""
    student = BD3LM(path=str(world / "student"), device=CPU, block=4, max_length=64)
    teacher = MDLM(path=str(world / "moe"), device=CPU, block=4, max_length=96)
    return TextPair(student, teacher if cross else student, Reading(**reading))


def chat(answer: str, question: str = "write it", origin: str = "") -> Example:
    """Return a chat of one turn."""
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example("", messages=messages, origin=origin)


def text_batch(pair: TextPair, count: int, first_id: int = 0) -> dict[str, Any]:
    """Return a batch of chats and plain texts in turn."""
    numbers = range(first_id, first_id + count)
    texts = [CODE[number % len(CODE)] for number in numbers]
    examples = [
        chat(text) if number % 2 else Example("", text=text)
        for number, text in zip(numbers, texts, strict=True)
    ]
    batch = pair.collate(pair.encode(examples))
    return batch | {"ids": torch.tensor(numbers), "prompts": [""] * count}

"""Tiny autoregressive models that read given texts, their data and their roles."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.pipelines.text_rows import Reading
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Roles
from diffdistill.session import add_heads
from diffdistill.types import Example
from tests.conftest import CPU
from tests.text_run import chat, write_chats
from tests.tiny_text import CODE, save_lm

PLAYERS: dict[str, dict[str, Any]] = {"student": {}, "teacher": {"weights": "frozen"}}


def save_given_world(folder: Path) -> Path:
    """Save a student, a teacher with other tokens, one with the same, and chats and a text."""
    save_lm(folder / "student", is_causal=True)
    save_lm(folder / "teacher", "teacher", "llama", is_causal=True, seed=1)
    save_lm(folder / "same", is_causal=True, seed=2)
    write_chats(folder / "chats.jsonl")
    return folder


def make_causal_pair(world: Path, teacher: str | None = "teacher", **reading: Any) -> CausalPair:
    """Return the student's family with a teacher's; None is the student's own."""
    student = CausalLM(path=str(world / "student"), device=CPU, max_length=64)
    if teacher is None:
        return CausalPair(student, student, Reading(**reading))
    other = CausalLM(path=str(world / teacher), device=CPU, max_length=96)
    return CausalPair(student, other, Reading(**reading))


def make_given_roles(pair: CausalPair, settings: dict[str, Any] | None = None) -> Roles:
    parsed = {name: RoleSettings(**given) for name, given in (settings or PLAYERS).items()}
    shares = pair.teacher is pair.student or "teacher" not in parsed
    return build_roles(parsed, pair.student, others={} if shares else {"teacher": pair.teacher})


def make_given_method(cls: type[Method], pair: CausalPair, roles: Roles, **options: Any) -> Any:
    """Return a method with its heads, and let the family keep what it adds to texts."""
    players = {name: roles[name] for name in cls.roles}
    method: Any = cls(family=pair, draws=Draws(0), **players, **options)  # type: ignore[call-arg]
    add_heads(method, roles, seed=3)
    pair.annotator = method if method.annotation() else None
    return method


def examples(count: int, first: int = 0) -> list[Example]:
    """Return chats and plain texts in turn."""
    numbers = range(first, first + count)
    pairs = [(number, CODE[number % len(CODE)]) for number in numbers]
    return [chat(text) if number % 2 else Example("", text=text) for number, text in pairs]


def given_batch(pair: CausalPair, count: int = 4, first_id: int = 0) -> dict[str, Any]:
    """Return a batch of chats and plain texts in turn."""
    return collated(pair, examples(count, first_id), first_id)


def collated(pair: CausalPair, chosen: Sequence[Example], first_id: int = 0) -> dict[str, Any]:
    batch = pair.collate(pair.encode(chosen))
    ids = torch.arange(first_id, first_id + len(chosen))
    return batch | {"ids": ids, "prompts": [""] * len(chosen)}


def skipping(pair: CausalPair) -> CausalPair:
    """Return the same readers, which leave out what they cannot use."""
    return CausalPair(pair.student, pair.teacher, replace(pair.reading, skip=True))

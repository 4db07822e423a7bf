"""The losses of some steps of each method, as recorded: a change needs a reason in the commit.

``DIFFDISTILL_RECORD=1 pytest tests/test_trajectories.py`` records them again.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import catalog
from diffdistill.draws import Draws
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Roles
from diffdistill.session import add_heads
from diffdistill.types import Example, Progress
from tests.answer_run import Length, make_questions, save_answer_world
from tests.conftest import CPU, make_batch, make_roles, make_toy
from tests.given_run import (
    given_batch,
    make_causal_pair,
    make_given_roles,
    save_given_world,
)
from tests.text_run import make_pair, save_world, text_batch
from tests.tiny_streams import CLIP, Warmth, make_family, stream_batch

FOLDER = Path(__file__).parent / "trajectories"
STEPS = 20
SHORT = 6
LORA = {"adapter": "lora", "rank": 2, "alpha": 4.0}
LIVE = {"weights": "live"}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "d-opsd": (
        {"student": LORA, "teacher": {"weights": "ema", "decay": 0.9}},
        {"num_steps": 3, "weight": "sigma2"},
    ),
    "dmd": (
        {"student": LORA, "teacher": {"weights": "frozen"}, "critic": {**LORA, "head": True}},
        {"student_every": 2, "guidance": 2.0, "gan_weight": 0.1, "score_shift": 3.0},
    ),
    "off-policy": (
        {"student": {}, "teacher": {"weights": "ema", "decay": 0.9}},
        {"states": "teacher", "exposure": 0.5},
    ),
    "sft": ({"student": {}}, {"shift": 2.0}),
}
PLAYERS = {"student": LORA, "teacher": {"weights": "frozen"}, "critic": LORA}
STREAMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal-init": (
        {name: PLAYERS[name] for name in ("student", "teacher")},
        {"num_steps": 3, "num_teacher_steps": 6, "num_uses": 2},
    ),
    "self-forcing": (PLAYERS, {"num_steps": 3, "student_every": 2, "rollout_frames": CLIP + 2}),
    "stream-r1": (
        PLAYERS,
        {"num_steps": 3, "student_every": 2, "reward": Warmth(device=CPU), "balance_warmup": 1},
    ),
}
"""Of methods that stream: on the tiny Wan, in fewer steps."""
TEXTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bd3lm": ({"student": LORA}, {"stratify": 3, "resample": True, "t_low": 0.2}),
    "confidence": ({"student": LORA}, {"complementary": True}),
    "gold": ({"student": LORA, "teacher": {"weights": "frozen"}}, {"beta": 0.3}),
    "sdtt": (
        {"student": LORA, "teacher": {"weights": "ema", "decay": 1.0}},
        {"num_steps": 4, "last_steps": 2, "round_updates": 5},
    ),
    "tide": (
        {"student": LORA, "teacher": {"weights": "frozen"}},
        {"variant": "calm-tidal", "distillation_weight": 2.0},
    ),
    "uld": ({"student": LORA, "teacher": {"weights": "frozen"}}, {"pairs": "chunk"}),
}
"""Of methods for texts: on tiny language models."""
GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alm": ({"student": LORA, "teacher": {"weights": "frozen"}}, {"temperature": 5.0}),
    "bld": ({"student": LORA, "teacher": {"weights": "frozen"}}, {"kl_weight": 1.0}),
    "text-gold": ({"student": LORA, "teacher": {"weights": "frozen"}}, {}),
    "text-sft": ({"student": LORA}, {}),
    "text-uld": ({"student": LORA, "teacher": {"weights": "frozen"}}, {}),
}
"""Of methods on given texts: on tiny autoregressive models, in fewer steps."""
OTHER = {"weights": "frozen", "path": "other"}
REWARDED: dict[str, Any] = {"num_answers": 2, "reward": Length(device=CPU)}
ANSWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "atesd": (
        {"student": LORA, "teacher": {"weights": "frozen"}},
        {"hold": 2, "top_k": 0, "top_p": 1.0},
    ),
    "copd": (
        {"student": {"weights": "mean"}, "sums": LORA, "words": LORA},
        {"rewarded_steps": 1, "shared_steps": 2, "watch_every": None, **REWARDED},
    ),
    "egx": (
        {"student": LORA, "teacher": {"weights": "frozen"}, "reference": OTHER},
        {"reward_weight": 0.5, "hold": 2, "contract_probability": 0.1, **REWARDED},
    ),
    "exopd": ({"student": LORA, "teacher": OTHER, "reference": {"weights": "frozen"}}, {}),
    "grpo": (
        {"student": LORA, "reference": {"weights": "frozen"}},
        {"reference_weight": 0.1, **REWARDED},
    ),
    "opd": ({"student": LORA, "teacher": OTHER}, {"select": "soft-or", "temperature": 0.8}),
    "opsd": (
        {"student": LORA, "teacher": {"weights": "ema", "decay": 0.9}},
        {"entry_clip": 0.05, "top_k": 0, "top_p": 1.0},
    ),
    "rlsd": ({"student": LORA, "teacher": LIVE, "reference": LIVE}, REWARDED),
    "sdar": (
        {"student": LORA, "teacher": LIVE, "reference": LIVE},
        {"weight": 1.0, "gate_scale": "centered", **REWARDED},
    ),
    "sdpo": (
        {"student": LORA, "teacher": {"weights": "ema", "decay": 0.9}},
        {"right": 1.0, "support_size": 10, **REWARDED},
    ),
    "sft-answers": ({"student": LORA}, {}),
    "switch-kd": ({"student": LORA, "teacher": OTHER}, {"switch_weight": 0.0, "curve": 32}),
}
"""Of methods for answers: on tiny autoregressive models, in fewer steps."""


def text_roles(folder: Path, settings: dict[str, Any]) -> tuple[TextPair, Roles]:
    pair = make_pair(save_world(folder))
    parsed = {name: RoleSettings(**given) for name, given in settings.items()}
    others = {"teacher": pair.teacher} if "teacher" in settings else {}
    return pair, build_roles(parsed, pair.student, others=others, seed=7)


def answer_roles(folder: Path, settings: dict[str, Any]) -> tuple[Questions, Roles]:
    world = save_answer_world(folder)
    family = make_questions(world)
    parsed = {name: RoleSettings(**given) for name, given in settings.items()}
    for role in parsed.values():
        if role.path is not None:
            role.path = str(world / role.path)
    return family, build_roles(parsed, family.student, seed=7)


def question_batch(family: Questions, first_id: int, skills: Sequence[str] = ()) -> dict[str, Any]:
    """Return a batch of questions; of skills, as many of each."""
    numbers = range(first_id, first_id + 3 * max(len(skills), 1))
    examples = [
        Example(
            "",
            messages=({"role": "user", "content": f"what is {n}+{n}?"},),
            solution=f"{n}+{n}\nis\n\\boxed{{{2 * n}}}",
            answer=str(2 * n),
            skill=skills[n % len(skills)] if skills else None,
        )
        for n in numbers
    ]
    return family.collate(examples, list(numbers)) | {"skills": tuple(skills)}


def batch_of(name: str, family: Any, step: int) -> dict[str, Any]:
    """Return the batch of a step."""
    if name in TEXTS:
        return text_batch(family, 3, first_id=3 * step)
    if name in GIVEN:
        return given_batch(family, 3, first_id=3 * step)
    if name in ANSWERS:
        skills = ("sums", "words") if name == "copd" else ()
        return question_batch(family, 3 * step * max(len(skills), 1), skills)
    if name in STREAMS:
        return stream_batch(1, first_id=step)
    return make_batch(3, seed=step, first_id=3 * step)


def run(name: str, folder: Path) -> dict[str, list[float]]:
    """Return the losses of each role, in the order they came."""
    settings, options = (RUNS | STREAMS | TEXTS | GIVEN | ANSWERS)[name]
    streams = name in STREAMS
    family: Any
    if name in TEXTS:
        family, roles = text_roles(folder, settings)
    elif name in GIVEN:
        family = make_causal_pair(save_given_world(folder))
        roles = make_given_roles(family, settings)
    elif name in ANSWERS:
        family, roles = answer_roles(folder, settings)
        options = ({} if name in ("sft-answers", "switch-kd") else {"max_tokens": 6}) | options
    else:
        family = make_family(folder / "wan") if streams else make_toy(shift=2.0)
        roles = make_roles(family, **settings)
    players: dict[str, Any] = {role: roles[role] for role in settings}
    if name == "copd":
        players = {"student": players.pop("student"), "peers": players}
    method = catalog.load("method", name)(family=family, draws=Draws(0), **players, **options)
    if name in GIVEN:
        add_heads(method, roles, seed=3)
        family.annotator = method if method.annotation() else None
    short = name in STREAMS | ANSWERS | GIVEN
    lr = 0.002 if name in TEXTS | ANSWERS | GIVEN else 0.02  # more, and rounding errors grow
    optimizers = {
        role.name: torch.optim.SGD(role.parameters().values(), lr=lr) for role in roles.trained()
    }
    losses: dict[str, list[float]] = {role: [] for role in optimizers}
    steps = SHORT if short else STEPS
    for step in range(steps):
        trained = set()
        for loss in method.losses(batch_of(name, family, step), Progress(step, steps)):
            loss.value.backward()
            losses[loss.role].append(loss.value.item())
            trained.add(loss.role)
        for role in trained:
            optimizers[role].step()
            optimizers[role].zero_grad()
            roles.average(role)
        if name == "copd":
            method.observe({})  # its phases count updates
    return losses


@pytest.mark.parametrize("name", sorted(catalog.METHODS))
def test_the_losses_are_those_that_were_recorded(name: str, tmp_path: Path) -> None:
    file = FOLDER / f"{name}.json"
    found = run(name, tmp_path)
    if os.environ.get("DIFFDISTILL_RECORD"):
        lines = ",\n".join(f'  "{role}": {json.dumps(values)}' for role, values in found.items())
        file.write_text(f"{{\n{lines}\n}}\n")
    recorded = json.loads(file.read_text())
    assert list(found) == list(recorded)
    for role, values in recorded.items():
        short = name in STREAMS | ANSWERS | GIVEN
        assert len(set(values)) > (SHORT if short else STEPS) / 3
        tolerance = 1e-5 if name in RUNS else 1e-4
        assert found[role] == pytest.approx(values, rel=tolerance, abs=1e-6)

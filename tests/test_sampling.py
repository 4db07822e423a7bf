"""Pictures: whose noise, whose predictions, and how they are laid out."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.grids import draw_grid, save_grid
from diffdistill.sampling import (
    Encoded,
    base_role,
    encode_examples,
    generate,
    inference,
    prompt_batch,
    rollout_figure,
)
from diffdistill.session import Session, build
from diffdistill.types import Condition, Example, State
from tests.conftest import CPU, Spy, disturb, make_batch
from tests.toy_run import adapted

PROMPTS = ["0.1", "0.2", "0.3"]


def make_session(method: str = "d-opsd", adapter: str = "lora") -> Session:
    student = adapted(adapter, rank=2, alpha=4)
    values = {"family": {"name": "toy"}, "method": {"name": method}, "roles": {"student": student}}
    session = build(parse_config(values), CPU)
    disturb(session.roles["student"], seed=1)
    return session


def pixels(session: Session, model: object = None, **options: object) -> Tensor:
    settings = {"num_steps": 2, "seed": 3, "size": (4, 4), "num_images": 2, **options}
    return generate(session, model or session.roles["student"], PROMPTS, **settings)


def test_generate_is_the_familys_own_sampling_from_noise_keyed_by_image() -> None:
    session = make_session()
    ids = torch.tensor([(i << 20) + j for i in range(3) for j in range(2)])
    noise = Draws(3).normal("sample", ids, (3, 4, 4))
    told = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    condition = {"prompt": told, "privilege": torch.zeros(6)}
    latents = session.family.sample(session.roles["student"], condition, noise, num_steps=2)
    torch.testing.assert_close(pixels(session), latents.clamp(0, 1))


def test_the_size_of_micro_batches_changes_nothing() -> None:
    session = make_session()
    whole = pixels(session, micro_batch=6)
    torch.testing.assert_close(pixels(session, micro_batch=1), whole)
    torch.testing.assert_close(pixels(session, micro_batch=4), whole)


def test_every_model_and_number_of_steps_starts_from_the_same_noise() -> None:
    session = make_session()
    starts = []
    for name, steps in (("student", 1), ("teacher", 1), ("student", 4)):
        spy = Spy(session.roles[name])
        pixels(session, spy, num_steps=steps, micro_batch=6)
        assert len(spy.states) == steps
        starts.append(spy.states[0].x)
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0][0], starts[0][1])


def test_the_first_images_of_a_prompt_do_not_depend_on_how_many_there_are() -> None:
    session = make_session()
    two, three = pixels(session), pixels(session, num_images=3)
    assert torch.equal(two.unflatten(0, (3, 2)), three.unflatten(0, (3, 3))[:, :2])


def test_sampling_keeps_no_graph_and_puts_dropout_back() -> None:
    session = make_session()
    network = session.roles["student"].network.train()
    spy = Spy(session.roles["student"])
    with inference(session):
        assert not any(module.training for module in network.modules())
    pixels(session, spy)
    assert not any(spy.grad_enabled)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_base_is_the_model_before_training(adapter: str) -> None:
    session = make_session(adapter=adapter)
    state = State(torch.ones(1, 3, 4, 4), torch.ones(1))
    condition = {"prompt": torch.tensor([0.5]), "privilege": torch.zeros(1)}
    expected = 0.5 * state.x - 0.5
    torch.testing.assert_close(base_role(session)(state, condition), expected)
    assert not torch.allclose(session.roles["student"](state, condition), expected)


def test_what_a_student_is_shown_of_an_example_has_no_target() -> None:
    session = make_session()
    encoded = encode_examples(session, [Example("0.5", image=torch.ones(3, 4, 6))])
    assert encoded.prompts == ["0.5"]
    assert encoded.items[0]["latents"].shape == (3, 4, 6)
    assert not encoded.items[0]["latents"].any()


def test_images_of_prompts_with_references_are_made_apart() -> None:
    session = make_session()
    spy = Spy(session.roles["student"])
    item = {"prompt": torch.tensor(0.0), "latents": torch.zeros(3, 4, 4)}
    encoded = Encoded(["a", "b"], [item, item], apart=True)
    generate(session, spy, encoded, num_steps=1, seed=0, size=(4, 4), num_images=3)
    assert [len(state.x) for state in spy.states] == [3, 3]
    assert prompt_batch(session, encoded, [(1, 2)])["ids"].tolist() == [(1 << 20) + 2]


def test_a_rollout_shows_target_student_and_teacher_at_the_students_states() -> None:
    session = make_session()
    batch = make_batch(2, seed=0)
    grid = rollout_figure(session, batch, num_steps=2, seed=5)
    student, teacher = session.roles["student"], session.roles["teacher"]
    x = Draws(5).normal("rollout", batch["ids"], (3, 4, 4))
    columns = [batch["latents"]]
    for level in (1.0, 0.5):
        state = State(x, torch.full((2,), level))
        velocity = student(state, session.family.condition(batch))
        shown = teacher(state, session.family.condition(batch, exposure=1.0))
        columns += [x - level * velocity, x - level * shown]
        x = x - 0.5 * velocity
    expected = torch.stack(columns, dim=1).flatten(0, 1).clamp(0, 1)
    torch.testing.assert_close(grid.pixels, expected.detach())
    assert grid.columns == 5
    assert grid.captions == [
        "target",
        "student\nt = 1.00",
        "teacher\nt = 1.00",
        "student\nt = 0.50",
        "teacher\nt = 0.50",
    ]


def test_a_rollout_without_teacher_or_target_shows_the_student_alone() -> None:
    session = make_session("sft")
    batch = {**make_batch(2, seed=0), "latents": torch.zeros(2, 3, 4, 4)}
    grid = rollout_figure(session, batch, num_steps=3, seed=0)
    assert grid.captions == ["student\nt = 1.00", "student\nt = 0.67", "student\nt = 0.33"]
    assert len(grid.pixels) == 6


def test_a_grid_enlarges_small_images_without_smoothing(tmp_path: Path) -> None:
    images = torch.zeros(4, 3, 16, 16)
    images[1, 0] = 1.0
    save_grid(images, tmp_path / "deep" / "grid.png", columns=2)
    with Image.open(tmp_path / "deep" / "grid.png") as grid:
        assert grid.size == (2 * 96 + 3 * 4, 2 * 96 + 3 * 4)
        assert grid.getpixel((4 + 96 + 4, 4)) == (255, 0, 0)
        assert grid.getpixel((4 + 95, 4)) == (0, 0, 0)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_a_grid_makes_room_for_captions_and_reduces_large_images() -> None:
    plain = draw_grid(torch.zeros(4, 3, 200, 200), 2)
    named = draw_grid(torch.zeros(4, 3, 200, 200), 2, ["one\ntwo", ""], ["first" * 99, "second"])
    assert plain.size == (2 * 200 + 12, 2 * 200 + 12)
    assert named.size == (plain.width, plain.height + 2 * 17 + 2 * 17)
    assert draw_grid(torch.zeros(8, 3, 50, 1024), 8).width <= 4096


class Recorded(nn.Module):
    """Stands in for a model: remembers the ids' noise and predicts nothing."""

    def forward(self, state: State, condition: Condition) -> Tensor:
        return torch.zeros_like(state.x)


def test_a_model_without_velocity_returns_its_noise() -> None:
    session = make_session()
    noise = Draws(3).normal("sample", torch.tensor([0]), (3, 4, 4))
    assert torch.equal(pixels(session, Recorded())[:1], noise.clamp(0, 1))

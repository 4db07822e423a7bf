from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill.checkpoints import restore
from diffdistill.commands.export import export
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.panel import Deferred
from diffdistill.pipelines.switching import block_of
from diffdistill.pipelines.wan_pipeline import SETTINGS, StreamingPipeline
from diffdistill.session import build
from tests import tiny
from tests.tiny_streams import stream_values

SIZE = (32, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA student, trained for a moment."""
    folder = tmp_path_factory.mktemp("run")
    train(parse_config(stream_values(folder, steps=2, lr=0.3)), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return export(run, run.parent / "student", layout="pipeline")


def first_blocks(pipe: StreamingPipeline, count: int, **options: Any) -> torch.Tensor:
    return torch.cat(list(islice(pipe.stream("a red ball", size=SIZE, **options), count)))


def test_the_exported_student_streams_what_the_run_would(run: Path, exported: Path) -> None:
    pipe = StreamingPipeline.from_pretrained(exported)
    session = restore(run)
    family: Any = session.family
    condition = pipe._condition("a red ball", SIZE)
    ids = torch.zeros(1, dtype=torch.long)
    shape = (16, 2, 4, 4)
    noise = [Draws(3).normal(f"stream/{b}", ids, shape) for b in range(3)]
    sample = family.rollout(
        session.roles["student"],
        condition,
        torch.cat(noise, dim=2),
        num_steps=2,
        exits=[1] * 3,
        renoise=lambda block, step: Draws(3).normal(f"renoise/{block}/{step}", ids, shape),
    ).sample
    frames = first_blocks(pipe, 3, seed=3)
    assert frames.shape == (21, 3, 32, 32)
    torch.testing.assert_close(frames, family.decode(sample)[0], rtol=1e-4, atol=1e-4)


def test_the_exported_lora_makes_the_same_frames_as_the_merged_student(
    run: Path, exported: Path
) -> None:
    lora = export(run, run.parent / "lora", layout="lora").parent
    base = run.parent / "wan"
    pipes = [
        StreamingPipeline.from_pretrained(exported),
        StreamingPipeline.from_pretrained(base, lora=lora),
    ]
    frames = [first_blocks(pipe, 2) for pipe in pipes]
    torch.testing.assert_close(frames[0], frames[1], rtol=1e-4, atol=1e-4)
    (base / SETTINGS).write_text((exported / SETTINGS).read_text())
    untrained = first_blocks(StreamingPipeline.from_pretrained(base), 2)
    (base / SETTINGS).unlink()
    assert not torch.allclose(untrained, frames[0], atol=1e-3)


@pytest.mark.parametrize("role", ["student", "average"])
def test_an_exported_lora_is_put_on_the_transformer_that_it_was_trained_on(
    role: str, tmp_path: Path
) -> None:
    values = stream_values(tmp_path, steps=1, lr=0.3, ema=0.5)
    causal = tiny.save_wan(tmp_path / "causal", seed=7) / "transformer"
    values["roles"]["student"]["path"] = str(causal)
    train(parse_config(values), tmp_path / "run")
    lora = export(tmp_path / "run", tmp_path / "lora", layout="lora", role=role).parent
    merged = export(tmp_path / "run", tmp_path / "merged", layout="pipeline", role=role)
    base = tmp_path / "wan"
    expected = first_blocks(StreamingPipeline.from_pretrained(merged), 2)
    found = first_blocks(StreamingPipeline.from_pretrained(base, lora=lora), 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    other = StreamingPipeline.from_pretrained(base, lora=lora, base=base)
    assert not torch.allclose(first_blocks(other, 2), expected, atol=1e-3)
    moved = causal.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"the base of .*causal.*; if it is elsewhere, give base="):
        StreamingPipeline.from_pretrained(base, lora=lora)
    pipe = StreamingPipeline.from_pretrained(base, lora=lora, base=moved)
    assert torch.equal(first_blocks(pipe, 2), found)


def test_so_many_frames_as_asked_for(exported: Path) -> None:
    pipe = StreamingPipeline.from_pretrained(exported)
    frames = pipe("a red ball", num_frames=7, size=SIZE)
    assert torch.equal(frames, first_blocks(pipe, 2)[:7])
    assert len(pipe("a red ball", num_frames=1, size=SIZE)) == 1


def test_a_prompt_switch_begins_at_the_block_of_its_frame(exported: Path) -> None:
    pipe = StreamingPipeline.from_pretrained(exported)
    # blocks of two latents: frames 0-4, 5-12, 13-20
    assert [block_of(pipe.family, f) for f in (0, 4, 5, 12, 13, 20, 21)] == [0, 0, 1, 1, 2, 2, 3]
    plain = first_blocks(pipe, 3)
    switched = first_blocks(pipe, 3, switches={6: "a blue box"})
    assert torch.equal(plain[:5], switched[:5])
    assert not torch.allclose(plain[5:], switched[5:], atol=1e-4)
    with pytest.raises(UserError, match=r"switch 8:b: the block .* has a switch already"):
        first_blocks(pipe, 1, switches={6: "a", 8: "b"})
    with pytest.raises(UserError, match=r"switch 4:a: frames 0 to 4 are one block, .* first"):
        first_blocks(pipe, 1, switches={4: "a"})


def test_a_student_streams_at_the_size_that_it_was_trained_at(exported: Path) -> None:
    pipe = StreamingPipeline.from_pretrained(exported)
    assert torch.equal(next(pipe.stream("a red ball")), first_blocks(pipe, 1))
    assert pipe("a red ball", num_frames=1, size=(16, 48)).shape == (1, 3, 16, 48)
    pipe.size = None
    with pytest.raises(UserError, match=r"give size=\(H, W\)"):
        next(pipe.stream("a red ball"))


def test_a_folder_that_does_not_say_how_it_streams_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"no streaming\.json"):
        StreamingPipeline.from_pretrained(run.parent / "wan")


def test_a_run_with_a_reward_is_exported_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = stream_values(tmp_path, "stream-r1", steps=1)
    values["rewards"] = "tests.tiny_streams:Warmth"
    train(parse_config(values), tmp_path / "run")

    def missing(self: Deferred) -> None:
        raise UserError("no such weights")

    monkeypatch.setattr(Deferred, "loaded", property(missing))
    export(tmp_path / "run", tmp_path / "lora", layout="lora")
    with pytest.raises(UserError, match="no such weights"):
        train(parse_config(values), tmp_path / "again")


@pytest.mark.parametrize(("method", "family"), [("self-forcing", "wan"), ("dmd", "wan-streaming")])
def test_a_method_and_a_family_that_do_not_fit_are_named(
    method: str, family: str, tmp_path: Path
) -> None:
    values = stream_values(tmp_path, method)
    values["family"] = {"name": family, "path": values["family"]["path"]}
    with pytest.raises(UserError, match=f"method {method} .* not {family}"):
        build(parse_config(values))

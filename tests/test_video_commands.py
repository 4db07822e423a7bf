"""The commands on videos: a tiny streaming Wan, trained with a user's own reward."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from diffdistill import cli
from diffdistill.checkpoints import restore
from diffdistill.commands.evaluate import evaluate
from diffdistill.commands.sample import sample
from diffdistill.commands.stream import stream_video
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.evaluation.few_step import EvaluateSettings
from diffdistill.evaluation.moving_digits import MovingDigitsJudge, captions, film
from diffdistill.evaluation.vbench import file_name
from diffdistill.evaluation.video import digits_of, make_scene
from diffdistill.pipelines.switching import block_of, switched
from diffdistill.pipelines.wan_pipeline import StreamingPipeline
from diffdistill.pipelines.wan_streaming import WanStreaming
from diffdistill.report.build import build_report
from diffdistill.sampling import Encoded, Guided, encode_prompts, generate, inference
from diffdistill.session import Session, build
from diffdistill.streams import Timing, num_blocks, stream, timed
from diffdistill.tracking import TensorBoard
from diffdistill.types import State
from tests import tiny
from tests.conftest import CPU, disturb
from tests.tiny_streams import stream_values
from tests.toy_run import make_data, toy_values

FRAMES = 21
"""Pixel frames of a clip: 6 latent frames, 3 blocks."""
PROMPTS = ("a cat", "a dog runs")
REWARD = '''
"""A reward of the user's own."""

from dataclasses import dataclass
from typing import ClassVar

from diffdistill.rewarding import Reward


@dataclass(kw_only=True)
class Bright(Reward):
    """Mean brightness of the first frame, and of all."""

    axes: ClassVar = ("early", "all")

    def score(self, pixels, prompts):
        return {
            "early": pixels[:, :1].mean(dim=(1, 2, 3, 4)),
            "all": pixels.square().mean(dim=(1, 2, 3, 4)),
        }
'''


def values_of(folder: Path) -> dict[str, Any]:
    return {
        "family": {
            "name": "wan-streaming",
            "path": str(tiny.save_wan(folder / "model")),
            "block_frames": 2,
            "window_frames": 4,
            "sink_frames": 0,
            "max_sequence_length": 16,
        },
        "method": {"name": "stream-r1", "num_steps": 2, "student_every": 1},
        "rewards": {"name": f"{folder / 'mine.py'}:Bright", "statistics": {"all": [0.2, 0.5]}},
        "roles": {
            "student": {"adapter": "lora", "rank": 2, "alpha": 4},
            "critic": {"adapter": "lora", "rank": 2, "alpha": 4},
        },
        "data": {
            "path": str(folder / "prompts.txt"),
            "size": [32, 32],
            "multiple": 16,
            "num_frames": FRAMES,
        },
        "train": {"steps": 2, "lr": 0.05},
        "sample": {"every": 2, "num_steps": 2, "teacher_steps": 3},
        "evaluate": {"num_seeds": 2, "long_factor": 2},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(REWARD)
    (folder / "config.yaml").write_text(yaml.safe_dump(values_of(folder)))
    patch = pytest.MonkeyPatch()
    run_cli(patch, "train", folder / "config.yaml", "--output", folder / "run")
    patch.undo()
    return folder / "run"


@pytest.fixture(scope="module")
def session(run: Path) -> Session:
    return restore(run)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["diffdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0


def frames_of(path: Path) -> np.ndarray:
    with imageio.get_reader(path) as reader:
        return np.stack([frame[..., :3] for frame in reader])


def clips(session: Session, name: str = "student", **options: Any) -> Tensor:
    """The videos of both prompts."""
    settings = {"num_steps": 2, "seed": 3, "size": (32, 32), **options}
    return generate(session, session.roles[name], PROMPTS, **settings)


def made(session: Session, encoded: Encoded, blocks: int, **options: Any) -> Tensor:
    """The first blocks of a stream, ``[T, 3, H, W]``."""
    student = session.roles["student"]
    with inference(session):
        parts = stream(session, student, encoded, num_steps=2, seed=3, **options)
        return torch.cat(list(islice(parts, blocks)))


def test_training_writes_videos_metrics_and_a_still_for_tensorboard(run: Path) -> None:
    samples = run / "samples"
    assert sorted(p.name for p in samples.iterdir()) == ["step-000001.gif", "step-000002.gif"]
    frames = frames_of(samples / "step-000002.gif")
    assert frames.shape == (FRAMES, 96 + 8, 2 * 100 + 4, 3)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "reward/early/student" in line
    events = next((run / "tensorboard").glob("events*")).read_bytes()
    assert b"samples" in events


def test_tensorboard_takes_the_first_frame_of_a_video(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = TensorBoard(tmp_path, 0)
    seen: list[Tensor] = []
    monkeypatch.setattr(board.writer, "add_image", lambda name, image, step: seen.append(image))
    board.picture(1, "samples", run / "samples" / "step-000002.gif")
    board.close()
    first = frames_of(run / "samples" / "step-000002.gif")[0]
    assert np.array_equal(seen[0].movedim(0, -1).numpy(), first)


def test_a_sampled_clip_is_the_students_own_rollout(session: Session) -> None:
    family: Any = session.family
    batch = family.collate(encode_prompts(session, PROMPTS, (32, 32)).items)
    ids, draws = torch.tensor([0, 2**20]), Draws(3)

    def renoise(block: int, step: int) -> Tensor:
        return draws.normal(f"renoise/{block}/{step}", ids, (16, 2, 4, 4))

    noise = [draws.normal(f"stream/{block}", ids, (16, 2, 4, 4)) for block in range(3)]
    with inference(session):
        latents = family.rollout(
            session.roles["student"],
            family.condition(batch),
            torch.cat(noise, dim=2),
            num_steps=2,
            exits=[1, 1, 1],
            renoise=renoise,
        ).sample
    torch.testing.assert_close(clips(session), family.decode(latents))
    torch.testing.assert_close(clips(session, micro_batch=1), family.decode(latents))


def test_a_stream_begins_as_the_clip_and_is_that_of_the_exported_pipeline(
    session: Session,
) -> None:
    encoded = encode_prompts(session, PROMPTS, (32, 32))
    stream_of_five = made(session, encoded, 5)
    assert len(stream_of_five) == 1 + 4 * 9
    torch.testing.assert_close(stream_of_five[:FRAMES], clips(session)[0])
    student: Any = session.roles["student"]
    pipeline = StreamingPipeline(
        session.family,  # type: ignore[arg-type]
        student.network,
        num_steps=2,
        sampler="renoise",
    )
    pipeline._predict = student  # type: ignore[method-assign]
    told = pipeline.stream(PROMPTS[0], size=(32, 32), seed=3, switches={6: PROMPTS[1]})
    expected = torch.cat(list(islice(told, 4)))
    torch.testing.assert_close(made(session, encoded, 4, starts={1: 1}), expected)
    assert torch.equal(expected[:5], stream_of_five[:5])
    assert not torch.equal(expected[5:], stream_of_five[5 : len(expected)])


def test_a_frame_is_in_the_block_that_decodes_it(session: Session) -> None:
    family: Any = session.family
    assert [block_of(family, frame) for frame in (0, 4, 5, 12, 13)] == [0, 0, 1, 1, 2]
    assert [num_blocks(family, count) for count in (1, 5, 6, 13, 14)] == [1, 1, 2, 2, 3]
    told, starts = switched(family, [(13, "c"), (5, "b")], "a")
    assert (told, starts) == (["a", "b", "c"], {1: 1, 2: 2})
    with pytest.raises(UserError, match=r"switch 8:c: .* has a switch already; .* 8 frames"):
        switched(family, [(5, "b"), (8, "c")], "a")


def test_timing_counts_the_making_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 20.0])
    monkeypatch.setattr("diffdistill.streams.now", lambda device: next(clock))
    timing = Timing()
    assert len(list(timed(iter([torch.zeros(5), torch.zeros(8)]), CPU, timing))) == 2
    assert (timing.first, timing.seconds, timing.num_frames) == (3.0, 4.0, 13)
    assert timing.fps == 13 / 4


def test_a_guided_teacher_is_led_away_from_the_negative_prompt(session: Session) -> None:
    teacher = session.roles["teacher"]
    batch = session.family.collate(encode_prompts(session, PROMPTS, (32, 32)).items)
    told, negative = (session.family.condition(batch, negative=n) for n in (False, True))
    state = State(torch.randn(2, 16, 6, 4, 4), torch.full((2,), 0.5))
    with torch.no_grad():
        plain, away = teacher(state, told), teacher(state, negative)
        found = Guided(teacher, negative, 3.0, "teacher")(state, told)
    torch.testing.assert_close(found, away + 3 * (plain - away))
    guided = clips(session, "teacher", guidance=3.0)
    assert not torch.allclose(guided, clips(session, "teacher"))


def test_several_models_make_one_grid_that_is_a_video(
    run: Path, session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ("--prompt", "a cat", "--compare", "base,teacher,student", "--frames", "13")
    run_cli(monkeypatch, "sample", run, *arguments, "--separate", "--output", tmp_path / "grid.gif")
    assert frames_of(tmp_path / "grid.gif").shape[:3] == (13, 3 * 17 + 17 + 100 + 4, 3 * 100 + 20)
    files = sorted(path.name for path in (tmp_path / "grid").iterdir())
    assert files == [f"000-a-cat-00-{name}.gif" for name in ("base", "student", "teacher")]
    student = frames_of(tmp_path / "grid" / "000-a-cat-00-student.gif") / 255
    short = replace(session.config, sample=replace(session.config.sample, num_frames=13))
    expected = clips(replace(session, config=short), seed=0)[0].movedim(1, -1).numpy()
    assert np.abs(student - expected).mean() < 0.02


def test_the_teachers_steps_are_its_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def note(session: Session, model: Any, prompts: Any, *, num_steps: int, **_: Any) -> Tensor:
        asked.append(num_steps)
        return torch.zeros(2, 1, 3, 32, 32)

    monkeypatch.setattr("diffdistill.commands.sample.generate", note)
    path = sample(str(run), compare=["teacher", "student"], output=run / "other.gif")
    assert (asked, path) == ([3, 2], run / "other.gif")
    sample(str(run), compare=["teacher"], steps=7, output=run / "other.gif")
    assert asked[2:] == [7]


def test_a_video_is_streamed_with_a_switch(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("sample", run, "--stream", "--prompt", "a cat", "--frames", "26", "--fps", "8")
    run_cli(monkeypatch, *arguments, "--output", tmp_path / "plain.gif")
    shown = capsys.readouterr().out
    assert "26 frames; the first after" in shown
    assert "frames per second (model and decoder)" in shown
    switch = ("--switch", "6:a dog: it runs", "--switch", "20:a bird")
    run_cli(monkeypatch, *arguments, *switch, "--output", tmp_path / "switched.gif")
    plain, changed = frames_of(tmp_path / "plain.gif"), frames_of(tmp_path / "switched.gif")
    assert plain.shape == changed.shape == (26, 96, 96, 3)
    assert np.array_equal(plain[:5], changed[:5])
    assert not np.array_equal(plain[5:], changed[5:])
    run_cli(monkeypatch, *arguments, "--output", tmp_path / "plain.mp4")
    assert frames_of(tmp_path / "plain.mp4").shape == (26, 96, 96, 3)
    with imageio.get_reader(tmp_path / "plain.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 8.0


def test_a_run_is_streamed_with_another_view_of_the_past(run: Path, tmp_path: Path) -> None:
    seen = ["family.window_frames=4", "family.sink_frames=2", "family.positions=relative"]

    def streamed(name: str, *overrides: str) -> np.ndarray:
        path = tmp_path / f"{name}.gif"
        options: dict[str, Any] = {"prompts": ["a cat"], "num_frames": 45, "output": path}
        return frames_of(stream_video(str(run), overrides=overrides, **options).path)

    kept = streamed("kept", *seen, "family.sink_decay=1.0")
    averaged = streamed("averaged", *seen, "family.sink_decay=0.0")
    assert np.array_equal(kept, streamed("plain", *seen))  # what a sink at rest is
    # A block sees the sink and itself: the second one leaves before the third, of frames 13 to 20.
    assert np.array_equal(kept[:13], averaged[:13])
    assert not np.array_equal(kept[13:], averaged[13:])
    with pytest.raises(UserError, match=r"of a run, only .*family\.sink_decay.* can be changed"):
        streamed("other", "family.block_frames=3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a", "b"]}, "--stream makes one video: give one --prompt"),
        ({"switches": [(30, "b")], "num_frames": 30}, "the video has frames 0 to 29"),
        ({"switches": [(0, "b")]}, "switch 0:b: .* one block, which is told the first prompt"),
        ({"role": "teacher"}, "the teacher looks at a whole clip and does not stream"),
        ({"num_frames": 0}, "must be at least 1"),
        ({"num_frames": 300}, r"300 frames are 76 latent frames, .* absolute positions for 64"),
        ({"output": Path("video.avi")}, "is a .gif or .mp4 file"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(
    run: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stream_video(str(run), **options)


def test_a_family_of_images_does_not_stream(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(toy_values(make_data(tmp_path / "data"))))
    with pytest.raises(UserError, match="the family toy does not stream"):
        stream_video(str(config))
    with pytest.raises(UserError, match="the family toy makes images"):
        evaluate(str(config), suite="video")
    overrides = ["evaluate.prompts=list.txt"]
    with pytest.raises(UserError, match="the family toy makes no videos"):
        evaluate(str(config), suite="vbench", overrides=overrides)


def test_videos_need_a_number_of_frames(run: Path) -> None:
    overrides = ["data.num_frames=null"]
    with pytest.raises(UserError, match=r"set sample\.num_frames or data\.num_frames"):
        sample(str(run), prompts=["a"], size=(32, 32), overrides=overrides)
    with pytest.raises(UserError, match=r"name a \.gif or \.mp4 file"):
        sample(str(run), prompts=["a"], size=(32, 32), output=run / "grid.png")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (30, r"^sample\.num_frames \(--frames\): 30 frames: .* such as 29 or 33"),
        (17, r"^sample\.num_frames \(--frames\): 17 frames are 5 latent .* such as 13 or 21"),
        (1, r"1 frames are 1 latent frames, .*: choose such as 5"),
    ],
)
def test_a_number_of_frames_that_does_not_fit_is_laid_to_who_gave_it(
    run: Path, frames: int, message: str
) -> None:
    overrides = [f"sample.num_frames={frames}"]
    with pytest.raises(UserError, match=message):
        sample(str(run), prompts=["a"], size=(32, 32), overrides=overrides)


def test_a_size_that_does_not_fit_names_the_prompt(run: Path) -> None:
    with pytest.raises(UserError, match=r"^prompt 'a cat': a video of \(8, 8\) pixels"):
        sample(str(run), prompts=["a cat"], size=(8, 8))


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "self-forcing",
            {"data": {"num_frames": 17}},
            r"^data\.num_frames: 17 frames are 5 latent",
        ),
        (
            "self-forcing",
            {"method": {"rollout_frames": 9}},
            r"rollout_frames 9 must be the clip's 6",
        ),
        (
            "self-forcing",
            {"method": {"sampler": "euler"}, "family": {"context_noise": 0.1}},
            r"context_noise needs method\.sampler: renoise",
        ),
        ("causal-init", {"family": {"context_noise": 0.1}}, "causal-init has no noised past"),
    ],
)
def test_what_does_not_fit_is_found_before_the_data_is_encoded(
    method: str,
    change: dict[str, dict[str, Any]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = stream_values(tmp_path, method)
    if method == "causal-init":
        values["method"].pop("student_every")
        values["roles"].pop("critic")
    for section, options in change.items():
        values[section] |= options
    monkeypatch.setattr(WanStreaming, "encode", lambda *_, **__: pytest.fail("was encoded"))
    with pytest.raises(UserError, match=message):
        train(parse_config(values), tmp_path / "run")


def by_hand(session: Session, name: str, seed: int, frames: int, steps: int) -> dict[str, float]:
    """Rewards, drift and flicker of the two prompts' videos, in plain formulas."""
    config = replace(session.config, sample=replace(session.config.sample, num_frames=frames))
    videos = clips(replace(session, config=config), name, seed=seed, num_steps=steps)
    first, last = videos[:, :FRAMES], videos[:, -FRAMES:]

    def early(x: Tensor) -> float:
        return x[:, 0].mean().item()

    def whole(x: Tensor) -> float:
        return (x.square().mean().item() - 0.2) / 0.5

    gray = first.mean(dim=2)
    found = {
        "reward/early": early(first),
        "reward/all": whole(first),
        "flicker": (gray[:, 2:] - 2 * gray[:, 1:-1] + gray[:, :-2]).abs().mean().item(),
    }
    if frames > FRAMES:
        found["drift/early"] = early(last) - early(first)
        found["drift/all"] = whole(last) - whole(first)
    return found


def test_the_video_suite_measures_what_a_hand_would(
    run: Path, session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli(monkeypatch, "evaluate", run, "--suite", "video")
    rows = json.loads((run / "evaluation-video.json").read_text())
    found = {(row["model"], row["metric"]): row for row in rows}
    # Twice the latent frames of a clip are 12, which are 45 pixel frames.
    for name, frames, steps in (("teacher", FRAMES, 3), ("student", 45, 2)):
        expected = [by_hand(session, name, seed, frames, steps) for seed in (0, 1)]
        for metric in expected[0]:
            values = [each[metric] for each in expected]
            row = found[name, metric]
            assert row["values"] == pytest.approx(values, abs=1e-5)
            assert row["mean"] == pytest.approx(sum(values) / 2, abs=1e-5)
            assert row["low"] <= row["mean"] <= row["high"]
            assert row["num_steps"] == steps
        speed, first = (found[name, m] for m in ("frames per second", "seconds to first frame"))
        assert all(v > 0 for v in speed["values"])
        for fps, wait in zip(speed["values"], first["values"], strict=True):
            assert wait <= FRAMES / fps * (1 + 1e-6)
        assert (wait == pytest.approx(FRAMES / fps)) == (name == "teacher")
    assert ("teacher", "drift/early") not in found
    shown = capsys.readouterr().out
    assert "drift/early" in shown
    assert "teacher, 3 steps" in shown


def test_a_scene_refuses_what_it_cannot_judge(session: Session) -> None:
    with pytest.raises(UserError, match="'clip' is one of images; of videos there is moving-dig"):
        make_scene(session, EvaluateSettings(metrics=["clip"]))
    with pytest.raises(UserError, match="cannot read the caption 'a cat'"):
        make_scene(session, EvaluateSettings(metrics=["moving-digits"]))
    settings = EvaluateSettings(long_factor=1, max_examples=1)
    assert make_scene(session, settings).encoded.prompts == ["a cat"]
    with pytest.raises(UserError, match=r"the family wan-streaming makes videos: .* --suite video"):
        evaluate(str(Path(session.config.data.path or "").parent / "run"))


class Ink(MovingDigitsJudge):
    """Stands in for the judge of moving digits: knows how bright videos are."""

    def accuracy(self, videos: Tensor, texts: Sequence[str]) -> dict[str, float]:
        return {"all": float(len(videos) == len(texts) and videos.shape[1] == FRAMES)}

    def frechet(self, videos: Tensor, texts: Sequence[str], seed: int = 3) -> float:
        return videos.mean().item()

    def flicker(self, videos: Tensor, texts: Sequence[str], seed: int = 3) -> float:
        return float(len(set(texts)))


def test_moving_digits_are_judged_by_their_clips_and_the_ends_of_their_streams(
    run: Path, session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("diffdistill.evaluation.video.MovingDigitsJudge", Ink)
    texts = ["a seven moving right, fast", "an eight moving up, slowly"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    evaluate(
        str(run),
        suite="video",
        output=tmp_path / "rows.json",
        overrides=[
            "evaluate.metrics=moving-digits",
            f"evaluate.prompts={tmp_path / 'prompts.txt'}",
            "evaluate.size=[16, 16]",
            "evaluate.num_images=2",
            "evaluate.num_seeds=1",
            "evaluate.roles=[student]",
            "evaluate.micro_batch=3",
            f"rewards={{name: '{run.parent / 'mine.py'}:Bright'}}",
        ],
    )
    found = {row["metric"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    longer = replace(session.config, sample=replace(session.config.sample, num_frames=45))
    videos = generate(
        replace(session, config=longer),
        session.roles["student"],
        texts,
        num_steps=2,
        seed=0,
        size=(16, 16),
        num_images=2,
    )
    first, last = videos[:, :FRAMES].mean().item(), videos[:, -FRAMES:].mean().item()
    assert found["frechet"]["mean"] == pytest.approx(first, abs=1e-5)
    assert found["drift/frechet"]["mean"] == pytest.approx(last - first, abs=1e-5)
    assert (found["accuracy/all"]["mean"], found["flicker/real"]["mean"]) == (1.0, 2.0)
    assert found["frechet"]["low"] is None
    # Of a run, the rewards may be changed: here to one without statistics.
    whole = videos[:, :FRAMES].square().mean().item()
    assert found["reward/all"]["mean"] == pytest.approx(whole, abs=1e-5)


def test_too_few_moving_digits_or_other_canvases_are_refused(
    session: Session, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a seven moving right, fast")
    given: dict[str, Any] = {"prompts": str(tmp_path / "prompts.txt"), "metrics": ["moving-digits"]}
    with pytest.raises(UserError, match="videos must be 16 x 16 pixels"):
        make_scene(session, EvaluateSettings(**given))
    with pytest.raises(UserError, match=r"more than 48 pairs of frames, not 1 clip.* x 20"):
        make_scene(session, EvaluateSettings(size=(16, 16), **given))


def test_a_real_film_does_not_drift() -> None:
    texts = captions()[:3]
    videos = film(texts, 34, seed=1, held_out=True)
    found = digits_of(Ink(), videos, texts, 17)
    assert found["drift/frechet"] == pytest.approx(0.0, abs=0.02)
    assert "drift/frechet" not in digits_of(Ink(), videos[:, :17], texts, 17)


def make_names(folder: Path) -> Path:
    rows = [
        {"prompt_en": "a person is swimming", "dimension": ["human_action"]},
        {"prompt_en": "a 1/2 pie.", "text": "one half of a pie on a plate"},
    ]
    (folder / "VBench_full_info.json").write_text(json.dumps(rows))
    return folder / "VBench_full_info.json"


def test_vbench_gets_five_videos_of_each_prompt_and_no_more(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told: list[Sequence[str]] = []
    monkeypatch.setattr(
        "diffdistill.evaluation.vbench.encode_prompts",
        lambda session, prompts, size: (
            told.append(prompts) or encode_prompts(session, prompts, size)
        ),
    )
    arguments = ("evaluate", run, "--suite", "vbench", f"evaluate.prompts={make_names(tmp_path)}")
    arguments += ("data.num_frames=5", "--output", tmp_path / "clips")
    run_cli(monkeypatch, *arguments)
    names = [f"{p}-{i}.mp4" for p in ("a 1_2 pie.", "a person is swimming") for i in range(5)]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == names
    assert told == [["a person is swimming"], ["one half of a pie on a plate"]]
    assert "10 videos of student written, 0 were there" in capsys.readouterr().out
    gone, kept = (tmp_path / "clips" / names[i] for i in (3, 4))
    before, stamp = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    run_cli(monkeypatch, *arguments)
    assert "1 videos of student written, 9 were there" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == stamp
    # The encoder gives the same bytes for the same frames.
    assert gone.read_bytes() == before


def test_the_name_of_a_vbench_file_is_safe_and_otherwise_the_prompt() -> None:
    assert file_name('A "3D": what?, 50% *off*', 4) == 'A "3D": what?, 50% *off*-4.mp4'
    assert file_name("../../etc/passwd\n", 0) == "_._.._etc_passwd_-0.mp4"
    long = [file_name("é" * 200 + tail, 0) for tail in ("a", "b")]
    assert long[0] != long[1]
    assert all(len(name.encode()) < 240 for name in long)


def test_vbench_needs_prompts_with_different_names(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set evaluate\.prompts to VBench's"):
        evaluate(str(run), suite="vbench")
    (tmp_path / "two.txt").write_text("a/b\na_b\n")
    overrides = [f"evaluate.prompts={tmp_path / 'two.txt'}"]
    with pytest.raises(UserError, match=r"two prompts would be written to 'a_b-0\.mp4'"):
        evaluate(str(run), suite="vbench", output=tmp_path / "out", overrides=overrides)


def test_the_report_shows_clips_and_the_table_of_videos(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_cli(monkeypatch, "sample", run, "--stream", "--output", run / "samples" / "stream.mp4")
    row = {"num_steps": 2, "metric": "drift/all", "mean": 0.25, "low": 0.125, "high": 0.375}
    rows = [{**row, "model": m, "seeds": [0], "values": [0.25]} for m in ("teacher", "student")]
    stored = run / "evaluation-video.json"
    before = stored.read_text() if stored.exists() else None
    stored.write_text(json.dumps(rows))
    run_cli(monkeypatch, "report", run, "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    gif = base64.b64encode((run / "samples" / "step-000002.gif").read_bytes()).decode()
    mp4 = base64.b64encode((run / "samples" / "stream.mp4").read_bytes()).decode()
    assert f'<img alt="Samples, step 2" src="data:image/gif;base64,{gif}">' in page
    assert f'aria-label="Stream, stream" src="data:video/mp4;base64,{mp4}"></video>' in page
    assert '<th scope="row">drift/all</th><td>0.25 [0.125, 0.375]</td>' in page
    assert '<th scope="col">student, 2 steps</th>' in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "one: student, 2 steps" not in page
    two = build_report([run, run])
    assert two.count("<video") == 2
    if before is None:
        stored.unlink()
    else:
        stored.write_text(before)


def test_a_trained_average_streams_too(session: Session) -> None:
    values = yaml.safe_load(
        Path(session.config.data.path or "").with_name("config.yaml").read_text()
    )
    values["train"]["ema"] = 0.5
    average = build(parse_config(values), CPU)
    disturb(average.roles["average"], seed=1)
    with inference(average):
        encoded = encode_prompts(average, PROMPTS[:1], (32, 32))
        parts = stream(average, average.roles["average"], encoded, num_steps=2, seed=3)
        found = torch.cat(list(islice(parts, 3)))
    torch.testing.assert_close(found, clips(average, "average")[0])

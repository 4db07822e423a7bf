"""Pipelines of runs: their plan, their gates, what is counted, and how they go on."""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffdistill import cli
from diffdistill.checkpoints import Checkpoints
from diffdistill.commands.launching import launch_run
from diffdistill.commands.pipeline import dry_run, pipeline
from diffdistill.commands.train import Interrupted
from diffdistill.config import load_config, parse_config
from diffdistill.errors import UserError
from diffdistill.provenance.files import open_record
from diffdistill.question_feed import labelled_questions, seen_questions
from diffdistill.session import build
from diffdistill.stage_gates import StageSettings, gates
from diffdistill.stages import load_pipeline, merged
from diffdistill.trainer import Trainer
from tests.answer_run import save_answer_world
from tests.conftest import CPU
from tests.toy_run import forked

BRIEF = {"max_tokens": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_world(tmp_path_factory.mktemp("pipeline"))


def run_values(world: Path, name: str, **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "family": {"name": "causal-lm", "path": str(world / "student")},
        "method": {"name": name, **BRIEF},
        "rewards": "tests.answer_run:Length",
        "data": {"path": str(world / "questions.jsonl"), "batch_size": 2},
        "train": {"steps": 1, "lr": 0.01},
        "tracking": {"tensorboard": False},
    }
    return merged(values, sections)


def staged_values(world: Path) -> dict[str, Any]:
    """Return a pipeline of a teacher, a warm-up, a bridge and two ends that share them."""
    teacher = {"roles": {"teacher": {"path": "stage:teacher"}}}
    rewarded = {"num_answers": 2}
    first, last = {"max_examples": 2}, {"skip_examples": 1, "max_examples": 3, "batch_size": 3}
    warm = {"divergence": "forward-kl", "on_policy_share": 0.0, "off_policy": "teacher"}
    twice = {"steps": 2, "save_every": 1}
    changes: dict[str, dict[str, Any]] = {
        "polish": run_values(
            world, "grpo", family={"path": "stage:bridge"}, method=rewarded, data=last
        ),
        "bridge": run_values(world, "opd", family={"path": "stage:warm"}, **teacher),
        "warm": run_values(world, "opd", method=warm, train=twice, **teacher),
        "teacher": run_values(
            world, "grpo", family={"path": str(world / "other")}, method=rewarded, data=first
        ),
        "direct": run_values(world, "grpo", method=rewarded, data=first),
    }
    stages: dict[str, Any] = {name: {"change": change} for name, change in changes.items()}
    stages["teacher"] |= {"least_gain": -100.0}
    stages["bridge"] |= {"most_kl": 100.0, "least_overlap": 0.0}
    return {
        "stages": stages,
        "arms": {"whole": "polish", "bridge": "bridge", "direct": "direct"},
        "measure": {"num_questions": 2, "num_answers": 2, "top_k": 5},
    }


def written(folder: Path, values: dict[str, Any]) -> str:
    file = folder / "staged.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(file)


# the plan


def test_stages_come_after_those_that_they_need_and_arms_share_them(
    world: Path, tmp_path: Path
) -> None:
    plan = load_pipeline(written(tmp_path, staged_values(world)))
    assert list(plan.stages) == ["teacher", "warm", "bridge", "polish", "direct"]
    assert plan.stages["bridge"].needs == ("warm", "teacher")
    assert [stage.name for stage in plan.of_arm("whole")] == list(plan.stages)[:4]
    assert [stage.name for stage in plan.of_arm("direct")] == ["direct"]
    assert plan.chosen([]) == ["whole"]
    assert plan.chosen(["all"]) == ["whole", "bridge", "direct"]
    with pytest.raises(UserError, match=r"no arm 'wole', did you mean 'whole'\?"):
        plan.chosen(["wole"])


def test_a_reference_is_the_folder_of_the_other_stages_model(world: Path, tmp_path: Path) -> None:
    plan = load_pipeline(written(tmp_path, staged_values(world)))
    config = plan.stages["bridge"].run_config(tmp_path / "out")
    assert config.family["path"] == str(tmp_path / "out" / "warm" / "model")
    assert config.roles["teacher"].path == str(tmp_path / "out" / "teacher" / "model")


def test_overrides_of_a_runs_section_are_for_all_stages_and_others_for_the_pipeline(
    world: Path, tmp_path: Path
) -> None:
    overrides = ["train.seed=7", "stages.warm.change.train.steps=9", "measure.num_answers=3"]
    plan = load_pipeline(written(tmp_path, staged_values(world)), overrides)
    configs = {name: stage.run_config(tmp_path) for name, stage in plan.stages.items()}
    assert {config.train.seed for config in configs.values()} == {7}
    assert [configs[name].train.steps for name in ("warm", "bridge")] == [9, 1]
    assert plan.measure.num_answers == 3


def test_a_change_replaces_what_it_names_and_keeps_the_rest() -> None:
    base = {"train": {"steps": 5, "lr": 0.1}, "rewards": ["a", "b"], "method": {"name": "x"}}
    found = merged(base, {"train": {"steps": 7}, "rewards": ["c"]})
    assert found == {
        "train": {"steps": 7, "lr": 0.1},
        "rewards": ["c"],
        "method": {"name": "x"},
    }
    assert base["train"] == {"steps": 5, "lr": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {}}, "a pipeline has stages"),
        ({"stagse": {}}, r"unknown key 'stagse', did you mean 'stages'\?"),
        ({"arms": {"x": ["teacher"]}}, "arms.x: expected the name of its last stage"),
        ({"arms": {"x": "tacher"}}, r"arms.x: there is no stage 'tacher', did you mean 'teacher'"),
        ({"on_failed_gate": "ignore"}, "expected report or stop, got 'ignore'"),
        ({"measure": {"top_k": 0}}, "measure.top_k: .*greater than 0"),
    ],
)
def test_what_is_wrong_with_a_pipeline_is_said_in_one_line(
    change: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_pipeline(written(tmp_path, staged_values(world) | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("teacher", {"family": {"path": "stage:polish"}}, "need each other: polish -> "),
        ("teacher", {"family": {"path": "stage:brigde"}}, r"did you mean 'bridge'\?"),
        ("warm", {"train": {"stepz": 1}}, r"stage warm: train.stepz: unknown key"),
        ("teacher", {"rewards": None}, "stage teacher: .* needs rewards"),
        ("bridge", {"method": {"name": "nothing"}}, "unknown method 'nothing'"),
    ],
)
def test_what_is_wrong_with_a_stage_is_found_before_any_is_run(
    stage: str, change: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    values = staged_values(world)
    values["stages"][stage]["change"] = merged(values["stages"][stage]["change"], change)
    if change == {"rewards": None}:
        values["stages"][stage]["change"].pop("rewards")
    with pytest.raises(UserError, match=message):
        load_pipeline(written(tmp_path, values))


def test_a_gate_needs_a_teacher(world: Path, tmp_path: Path) -> None:
    values = staged_values(world)
    values["stages"]["direct"]["most_kl"] = 1.0
    with pytest.raises(UserError, match=r"stage direct: .* grpo has no teacher"):
        load_pipeline(written(tmp_path, values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roles": {"teacher": {"family": {"name": "server", "path": "t"}}}}, "not a server's"),
        ({"method": {"name": "text-uld"}}, "text-uld writes none"),
    ],
)
def test_a_gate_that_cannot_be_measured_is_refused_before_any_stage_is_run(
    change: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    values = staged_values(world)
    staged = merged(values["stages"]["bridge"]["change"], change)
    if "method" in change:
        staged |= {"method": change["method"], "rewards": None}
    values["stages"]["bridge"]["change"] = staged
    with pytest.raises(UserError, match=f"stage bridge: most_kl and least_overlap .*{message}"):
        load_pipeline(written(tmp_path, values))


def test_a_stage_trains_no_shadow(world: Path, tmp_path: Path) -> None:
    values = staged_values(world)
    values["stages"]["direct"]["change"]["roles"] = {"student": {"adapter": "shadow"}}
    with pytest.raises(UserError, match=r"stage direct: .* a shadow cannot be merged into the mod"):
        load_pipeline(written(tmp_path, values))


@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_a_stage_trains_nothing_on_a_rounded_network(
    stored: str, world: Path, tmp_path: Path
) -> None:
    values = staged_values(world)
    change = values["stages"]["direct"]["change"]
    change["roles"] = {"student": {"adapter": "lora"}}
    family = {"name": "causal-lm", "path": str(world / "student")}
    change["family"] = family | {"quantize": stored}
    with pytest.raises(UserError, match=f"stage direct: family.quantize: {stored} stores the stud"):
        load_pipeline(written(tmp_path, values))
    change["family"] = family
    load_pipeline(written(tmp_path, values))


def test_a_pipeline_is_not_a_run(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a pipeline of several runs: diffdistill pipeline"):
        load_config(written(tmp_path, staged_values(world)))


# gates


def test_gates_hold_at_their_bounds_and_not_beyond() -> None:
    settings = StageSettings(least_gain=0.1, most_kl=0.5, least_overlap=0.8)
    assert [gate.holds for gate in gates(settings)] == [None] * 3

    def holds(before: float, after: float, kl: float, overlap: float) -> list[bool | None]:
        score = {"before": before, "after": after}
        close = {"reverse_kl": kl, "overlap": overlap}
        found = gates(settings, {"score": score, "closeness": close})
        assert [gate.name for gate in found] == ["C1", "C2", "C2"]
        return [gate.holds for gate in found]

    assert holds(0.5, 0.75, 0.5, 0.8) == [True, True, True]
    assert holds(0.5, 0.55, 0.51, 0.79) == [False, False, False]
    assert gates(StageSettings()) == []
    assert gates(settings)[0].told() == "C1 not measured: gain >= 0.1"


# which questions


def test_the_questions_of_a_run_are_those_that_it_was_asked(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffdistill.commands.train import train

    asked: list[str] = []
    original = Trainer._accumulate

    def accumulate(self: Trainer, batch: Any, *args: Any, **options: Any) -> None:
        asked.extend(str(example.messages) for example in batch["examples"])
        original(self, batch, *args, **options)

    monkeypatch.setattr(Trainer, "_accumulate", accumulate)
    values = run_values(world, "grpo", method={"num_answers": 2}, train={"steps": 3})
    train(parse_config(values), tmp_path)
    session = build(parse_config(values), CPU)
    assert [str(e.messages) for e in seen_questions(session, 6)] == asked
    assert labelled_questions(session, 2) == set(asked[:2])
    values = run_values(world, "opd")
    assert labelled_questions(build(parse_config(values), CPU), 6) == set()
    values = run_values(world, "opd", method={"on_policy_share": 0.5})
    assert len(labelled_questions(build(parse_config(values), CPU), 4)) == 4


def test_given_texts_are_labels_and_other_pictures_are_other_questions(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "yes"}]}
        for q in ("2+2?", "3+5?", "hello?")
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = {"path": str(tmp_path / "chats.jsonl")}
    values = run_values(world, "grpo", method={"num_answers": 2}, data=data)
    rewarded = build(parse_config(values), CPU)
    values = {**values, "method": {"name": "text-sft"}, "rewards": None}
    given = build(parse_config(values), CPU)
    asked = {str(({"role": "user", "content": q},)) for q in ("2+2?", "3+5?", "hello?")}
    assert labelled_questions(rewarded, 4) == labelled_questions(given, 4) == asked
    assert len(labelled_questions(given, 2)) == 2
    example = next(seen_questions(rewarded, 2))
    seen = [example._replace(pictures=(picture,)) for picture in ("a", "b", "a")]  # type: ignore[arg-type]
    monkeypatch.setattr("diffdistill.question_feed.seen_questions", lambda *_: iter(seen))
    assert len(labelled_questions(rewarded, 3)) == 2


# running


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    text = pipeline(written(folder, staged_values(world)), output=folder / "out", arms=["all"])
    (folder / "told.txt").write_text(text)
    return folder


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "pipeline.json").read_text())
    return found


def test_labels_are_counted_for_each_stage_and_once_for_an_arm(done: Path) -> None:
    found = found_in(done)
    whole = {name: stage["labelled"] for name, stage in found["whole"]["stages"].items()}
    assert whole == {"teacher": 2, "warm": 0, "bridge": 0, "polish": 3}
    assert found["whole"]["labelled"] == 4  # one question is the teacher's and the student's
    assert found["bridge"]["labelled"] == 2
    assert found["direct"]["labelled"] == 2


def test_a_stage_begins_with_the_model_that_another_has_trained(done: Path) -> None:
    config = load_config(str(done / "out" / "bridge" / "config.yaml"))
    session = build(config, CPU)
    for stage, role in (("warm", "student"), ("teacher", "teacher")):
        snapshot, _, _ = Checkpoints(done / "out" / stage).load()
        trained = snapshot.tensors["role-student"]
        here = dict(session.roles[role].network.named_parameters())
        assert all(torch.equal(here[name], value) for name, value in trained.items())
    model = load_file(done / "out" / "teacher" / "model" / "model.safetensors")
    assert model
    assert open_record(done / "out" / "teacher" / "model")["result"]["name"] == "model"


def test_what_gates_measured_and_their_bounds_are_told(done: Path) -> None:
    stages = found_in(done)["whole"]["stages"]
    assert [gate["what"] for gate in stages["teacher"]["gates"]] == ["gain >= -100"]
    assert [gate["name"] for gate in stages["bridge"]["gates"]] == ["C2", "C2"]
    values = [gate["value"] for gate in stages["bridge"]["gates"]]
    assert values[0] > 0
    assert 0 <= values[1] <= 1
    assert all(gate["holds"] for stage in stages.values() for gate in stage["gates"])
    text = " ".join((done / "told.txt").read_text().split())
    assert "C1 holds" in text
    assert "direct" in text


def test_what_is_done_is_not_run_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("diffdistill.commands.pipeline.train", refused)
    before = found_in(done)
    pipeline(str(done / "staged.yaml"), output=done / "out", arms=["all"])
    assert found_in(done) == before


def test_what_is_done_is_measured_again_where_other_measures_are_asked_for(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffdistill.commands.pipeline.train", None)
    config, output = str(done / "staged.yaml"), done / "out"
    before = found_in(done)
    more = ["measure.num_answers=3", "measure.top_k=1", "stages.direct.least_gain=-100"]
    pipeline(config, output=output, arms=["bridge", "direct"], overrides=more)
    found = found_in(done)
    [gate] = found["direct"]["stages"]["direct"]["gates"]
    assert gate["holds"]
    stages, old = (which["bridge"]["stages"] for which in (found, before))
    assert stages["warm"]["score"] != old["warm"]["score"]
    assert stages["bridge"]["closeness"]["overlap"] != old["bridge"]["closeness"]["overlap"]
    pipeline(config, output=output, arms=["all"])
    assert found_in(done) == before


def test_a_stage_of_another_config_or_of_other_models_is_not_gone_on_with(done: Path) -> None:
    config, output = str(done / "staged.yaml"), done / "out"
    with pytest.raises(UserError, match=r"another config \(train.lr differ\): remove it"):
        pipeline(config, output=output, overrides=["stages.warm.change.train.lr=0.1"])
    record = output / "teacher" / "stage.json"
    content = record.read_text()
    record.write_text(json.dumps(json.loads(content) | {"weights": "others"}))
    with pytest.raises(UserError, match="went on from other models than teacher"):
        pipeline(config, output=output)
    record.write_text(content)


def test_a_dry_run_tells_the_stages_and_what_is_done(done: Path, world: Path) -> None:
    text = dry_run(str(done / "staged.yaml"), output=done / "out", overrides=[], arms=["all"])
    assert text.count("done") == 5
    text = dry_run(str(done / "staged.yaml"), output=done / "none", overrides=[], arms=["direct"])
    assert "to do" in text
    assert "bridge" not in text
    assert not (done / "none").exists()


def test_the_command_line_runs_and_plans_pipelines(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["pipeline", str(done / "staged.yaml"), "--output", str(done / "out"), "--arm", "all"]
    for more in ([], ["--dry-run"]):
        monkeypatch.setattr("sys.argv", ["diffdistill", *given, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        assert "teacher" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process, and starts others with --launch"):
        pipeline(str(done / "staged.yaml"), output=done / "out")


def stopped(config: str, output: Path) -> None:
    """Run the first arm, and be interrupted in the second step of its second stage."""
    original, begun = Trainer.train_step, []

    def train_step(self: Trainer) -> dict[str, float]:
        begun.append(self)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return original(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    pipeline(config, output=output)


def test_a_pipeline_that_was_stopped_goes_on_at_the_first_stage_that_is_not_done(
    done: Path, world: Path, tmp_path: Path
) -> None:
    config, output = written(tmp_path, staged_values(world)), tmp_path / "out"
    assert forked(lambda: stopped(config, output)) == 1
    assert (output / "teacher" / "stage.json").is_file()
    assert not (output / "warm" / "stage.json").is_file()
    assert len(Checkpoints(output / "warm").names()) == 1
    first = (output / "teacher" / "metrics.jsonl").read_bytes()
    pipeline(config, output=output)
    assert (output / "teacher" / "metrics.jsonl").read_bytes() == first
    for stage in ("warm", "bridge", "polish"):
        broken, whole = (Checkpoints(where / "out" / stage).load()[0] for where in (tmp_path, done))
        for name, value in whole.tensors["role-student"].items():
            assert torch.equal(broken.tensors["role-student"][name], value)


@pytest.mark.parametrize(
    ("stage", "bound", "begun"),
    [("teacher", {"least_gain": 1e6}, "teacher"), ("bridge", {"most_kl": -1.0}, "warm")],
)
def test_a_gate_that_does_not_hold_stops_where_it_is_to_and_is_only_told_else(
    stage: str, bound: dict[str, float], begun: str, world: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    values = staged_values(world) | {"on_failed_gate": "stop"}
    values["stages"][stage] |= bound
    config, output = written(tmp_path, values), tmp_path / "out"
    for _ in range(2):
        with pytest.raises(UserError, match=f"stage {stage}: gate C. does not hold: C"):
            pipeline(config, output=output, arms=["bridge"])
        assert Checkpoints(output / begun).names()
        assert not (output / "bridge" / "checkpoints").exists()
    pipeline(config, output=output, arms=["bridge"], overrides=["on_failed_gate=report"])
    assert "does not hold" in capsys.readouterr().err
    assert not found_in(tmp_path)["bridge"]["stages"][stage]["gates"][0]["holds"]


def test_a_stage_that_has_begun_with_other_models_is_not_gone_on_with(
    done: Path, world: Path, tmp_path: Path
) -> None:
    """One whose models are others before it has begun asks again how close its teacher is."""
    values = staged_values(world) | {"on_failed_gate": "stop"}
    values["stages"]["bridge"] |= {"most_kl": -1.0}
    config, output = written(tmp_path, values), tmp_path / "out"
    asked = output / "bridge" / "before.json"
    with pytest.raises(UserError, match="gate C2 does not hold"):
        pipeline(config, output=output, arms=["bridge"])
    first = json.loads(asked.read_text())["closeness"]
    shutil.rmtree(output / "warm")
    longer = ["stages.warm.change.train.lr=0.1"]
    with pytest.raises(UserError, match="gate C2 does not hold"):
        pipeline(config, output=output, arms=["bridge"], overrides=longer)
    assert json.loads(asked.read_text())["closeness"] != first
    pipeline(config, output=output, arms=["bridge"], overrides=[*longer, "on_failed_gate=report"])
    (output / "bridge" / "stage.json").unlink()
    (output / "bridge" / "inputs.json").write_text('{"warm": "another"}')
    with pytest.raises(UserError, match="went on from other models than warm, teacher"):
        pipeline(config, output=output, arms=["bridge"], overrides=longer)


def test_a_run_of_before_an_option_came_is_a_run_of_the_same_config(done: Path) -> None:
    file = done / "out" / "direct" / "config.yaml"
    content = file.read_text()
    values = yaml.safe_load(content)
    assert values["train"].pop("max_bad_steps")
    file.write_text(yaml.safe_dump(values))
    pipeline(str(done / "staged.yaml"), output=done / "out", arms=["direct"])
    file.write_text(content)


STUBBORN = """
import signal, sys, time
got = []
for kind in (signal.SIGTERM, signal.SIGINT):
    signal.signal(kind, lambda number, frame: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
open(sys.argv[1], "w").write(str(got))
sys.exit(128 + got[0])
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_what_was_launched_which_stops_in_its_own_time(
    kind: signal.Signals, tmp_path: Path
) -> None:
    child, told = tmp_path / "child.py", tmp_path / "told"
    child.write_text(STUBBORN)
    before = signal.getsignal(kind)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), kind)).start()
    with pytest.raises(Interrupted) as stopped:
        launch_run([sys.executable, str(child), str(told)], "stage x")
    assert stopped.value.exit_code == 128 + kind
    assert told.read_text() == f"[{int(signal.SIGTERM)}]"
    assert signal.getsignal(kind) is before


def test_what_was_launched_and_stopped_by_itself_is_interrupted_and_not_wrong() -> None:
    with pytest.raises(Interrupted):
        launch_run([sys.executable, "-c", "raise SystemExit(143)"], "stage x")
    with pytest.raises(UserError, match="stage x: cannot start no-such-program"):
        launch_run(["no-such-program"], "stage x")


@pytest.mark.slow
def test_runs_can_be_started_as_processes_of_their_own(
    done: Path, world: Path, tmp_path: Path
) -> None:
    config = written(tmp_path, staged_values(world))
    pipeline(config, output=tmp_path / "out", arms=["direct"], launch=sys.executable)
    mine, theirs = (Checkpoints(where / "out" / "direct").load()[0] for where in (tmp_path, done))
    for name, value in theirs.tensors["role-student"].items():
        assert torch.equal(mine.tensors["role-student"][name], value)
    with pytest.raises(UserError, match=r"stage teacher: false .* ended with 1"):
        pipeline(config, output=tmp_path / "out", launch="false")

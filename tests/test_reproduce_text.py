"""The scripts that reproduce the text methods on arithmetic: their arms, and how they are told."""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffdistill import catalog
from diffdistill.config import RunConfig, load_config
from diffdistill.draws import Draws
from diffdistill.stages import load_pipeline
from diffdistill.synthesis.dependence import folder_hash

FOLDER = Path(__file__).parents[1] / "scripts" / "reproduce"
NAMES = ("tip", "many_faces", "opsd", "atesd", "sdar", "cliff", "egx", "tessy")
OWN_RATE = ("opsd", "GRPO")
"""The arm with a learning rate of its own, as its page says; it is there at the others' too."""
OWN = (
    "collecting",
    "arithmetic_runs",
    "bld",
    "tide",
    "copd",
    "sparse_to_dense",
    "few_steps",
    *NAMES,
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))  # scripts import each other by name
    yield {name: importlib.import_module(name) for name in OWN}
    sys.path.remove(str(FOLDER))
    for name in OWN:
        sys.modules.pop(name, None)


def arms_of(script: ModuleType, folder: Path = Path("somewhere")) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (
        script.arms(folder) if script.__name__ == "many_faces" else script.ARMS
    )
    return found


def loaded(script: ModuleType, name: str) -> RunConfig:
    arm = arms_of(script)[name]
    return load_config(arm.config, arm.overrides)


def options_of(script: ModuleType, name: str) -> dict[str, Any]:
    return loaded(script, name).method


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_has_a_config_and_options_that_its_method_takes(
    scripts: dict[str, ModuleType], name: str
) -> None:
    for arm in arms_of(scripts[name]):
        config = loaded(scripts[name], arm)
        options = dict(config.method)
        cls = catalog.load("method", options.pop("name"))
        missing = {
            item.name: None
            for item in fields(cls)
            if item.default is MISSING and item.default_factory is MISSING
        }
        cls(**{**missing, "draws": Draws(0), **options})


def test_all_arms_of_bld_learn_from_the_same_texts_at_one_learning_rate(
    scripts: dict[str, ModuleType],
) -> None:
    script = scripts["bld"]
    configs = [
        load_config(arm.config, script.overrides_of(arm, 9, 32, Path("cache")))
        for arm in script.ARMS.values()
    ]
    for config in configs:
        options = dict(config.method)
        cls = catalog.load("method", options.pop("name"))
        parts = dict.fromkeys(("family", "student", *cls.roles))
        cls(**parts, draws=Draws(0), **options)
    assert len({str(c.data) for c in configs}) == 1
    assert len({str(c.train) for c in configs}) == 1
    assert len({str((c.method, c.roles)) for c in configs}) == len(configs)
    assert {c.family["path"] for c in configs} == {"bundled:python-ar"}


@pytest.mark.parametrize("name", NAMES)
def test_all_arms_of_a_script_learn_from_sixteen_answers_a_step_at_one_learning_rate(
    scripts: dict[str, ModuleType], name: str
) -> None:
    by_arm = {arm: loaded(scripts[name], arm) for arm in arms_of(scripts[name])}
    configs = by_arm.values()
    assert {c.data.batch_size * c.method.get("num_answers", 1) for c in configs} == {16}
    alike = [c for arm, c in by_arm.items() if (name, arm) != OWN_RATE]
    assert len({(c.train.lr, c.train.schedule) for c in alike}) == 1
    assert {c.family["path"] for c in configs} == {"bundled:arithmetic-student"}


def study_of(script: ModuleType, folder: Path = Path("somewhere")) -> Any:
    if hasattr(script, "STUDY"):
        return script.STUDY
    return script.study(folder if hasattr(script, "contexts") else dict.fromkeys(script.ARMS, 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_arms_are_compared_with_arms_and_told_apart(
    scripts: dict[str, ModuleType], name: str
) -> None:
    script, arms = scripts[name], arms_of(scripts[name])
    study = study_of(script)
    assert set(study.arms) == set(arms)
    for other, compared in study.against.items():
        assert {other, *compared} <= set(arms)
    assert set(study.drawn) <= set(study.shown)
    assert study.name == name
    assert len({(arm.config, *sorted(arm.overrides)) for arm in arms.values()}) == len(arms)


def test_each_rule_of_tip_is_taken_both_ways_with_each_share(
    scripts: dict[str, ModuleType],
) -> None:
    tip = scripts["tip"]
    assert options_of(tip, "all tokens")["select"] == "none"
    assert not options_of(tip, "all tokens")["select_sampled"]
    for rule in ("entropy", "divergence", "soft-or", "q3"):
        for share in (0.5, 0.2, 0.1):
            for how in ("highest", "drawn"):
                found = options_of(tip, f"{rule} {share:.0%}, {how}")
                wanted = (rule, share, how == "drawn")
                assert (found["select"], found["retention"], found["select_sampled"]) == wanted
    uniform = options_of(tip, "uniform 20%, drawn")
    assert (uniform["select"], uniform["retention"], uniform["select_sampled"]) == (
        "none",
        0.2,
        True,
    )
    assert len(tip.ARMS) == 1 + 4 * 3 * 2 + 3


def test_a_plain_loss_keeps_in_proportion_to_its_tokens_and_a_streamed_one_does_not(
    scripts: dict[str, ModuleType],
) -> None:
    found = scripts["tip"].memory(rows=160, vocabulary=512, channels=8)
    assert found["plain 50%"] == pytest.approx(found["plain 100%"] / 2, rel=0.05)
    assert found["plain 10%"] == pytest.approx(found["plain 100%"] / 10, rel=0.1)
    assert found["plain 100%"] > 2
    assert found["streamed 100%"] < 0.35  # two tiles of a tenth of the tokens, and small things
    assert found["streamed 10%"] > 0.5 * found["streamed 100%"]


def test_both_losses_whose_memory_is_compared_are_the_same_number(
    scripts: dict[str, ModuleType],
) -> None:
    tip, projection = scripts["tip"], importlib.import_module("diffdistill.projection").Projection
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (
        projection(torch.randn(20, 4, generator=generator), torch.randn(30, 4, generator=generator))
        for _ in range(2)
    )
    chosen = torch.arange(20) % 3 == 0
    plain, streamed = (f(ours, theirs, chosen) for f in (tip.plain_loss, tip.streamed_loss))
    torch.testing.assert_close(plain, streamed)


def test_arms_of_many_faces_are_biased_where_they_say_none(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    script = scripts["many_faces"]
    for arm in script.TRUNCATED:
        found = options_of(script, arm)
        assert found["support"] == ("full" if arm == "full" else "teacher")
        biased = arm.startswith("none")
        assert found["allow_biased"] == biased
        assert (found["correction"] == "none") == (biased or arm == "forward KL, none")
    assert options_of(script, "none, 1 token")["support_size"] == 1
    hints = tmp_path / "shared-hint.jsonl"
    script.write_hints(hints)
    rows = [json.loads(line) for line in hints.read_text().splitlines()]
    assert {row["solution"] for row in rows} == {script.HINT}
    assert len({row["messages"][0]["content"] for row in rows}) > 900
    assert script.arms(tmp_path)["shared hint"].overrides[-1] == f"data.path={hints}"


def test_sft_learns_the_solutions_that_opsd_shows(scripts: dict[str, ModuleType]) -> None:
    script = scripts["opsd"]
    sft, opsd = (loaded(script, arm) for arm in ("SFT", "OPSD"))
    assert sft.data == opsd.data
    assert sft.method["name"] == "sft-answers"
    assert set(sft.roles) == {"student"}
    assert options_of(script, "entry clip 1e-6")["entry_clip"] == 1e-6
    assert options_of(script, "entry clip 0.05")["entry_clip"] == 0.05
    assert options_of(script, "OPSD")["entry_clip"] is None


def test_the_full_arm_of_atesd_is_opsd(scripts: dict[str, ModuleType]) -> None:
    full = options_of(scripts["atesd"], "full")
    opsd = options_of(scripts["opsd"], "OPSD")
    assert (full["exposure_policy"], full["exposure"]) == ("fixed", 1.0)
    assert {key: full[key] for key in opsd if key != "name"} == {
        key: value for key, value in opsd.items() if key != "name"
    }
    assert options_of(scripts["atesd"], "ATESD")["exposure_policy"] == "learned"
    assert options_of(scripts["atesd"], "fixed 0.25")["exposure"] == 0.25


def test_grpo_of_the_script_of_sdar_has_sdars_clips_and_beta_0_no_slope(
    scripts: dict[str, ModuleType],
) -> None:
    sdar = scripts["sdar"]
    ours, theirs = options_of(sdar, "GRPO"), options_of(sdar, "SDAR")
    assert {key: theirs[key] for key in ours if key != "name"} == {
        key: value for key, value in ours.items() if key != "name"
    }
    for arm in sdar.ARMS:
        options = options_of(sdar, arm)
        if options["name"] == "sdar":
            assert (options["gate_beta"] == 0) == ("beta 0" in arm)
            assert (options["reward_weight"] == 0) == ("alone" in arm)
        if options["name"] == "rlsd":
            assert {key: options[key] for key in ours if key != "name"} == {
                key: value for key, value in ours.items() if key != "name"
            }


def test_all_arms_of_few_steps_go_on_from_one_student_on_one_set_of_texts(
    scripts: dict[str, ModuleType],
) -> None:
    few = scripts["few_steps"]
    configs = [load_config(arm.config, few.overrides_of(arm, 9)) for arm in few.ARMS.values()]
    for section in ("family", "data", "train"):
        assert len({str(getattr(config, section)) for config in configs}) == 1
    assert len({str(config.method) for config in configs}) == len(configs)
    assert configs[1].method["round_updates"] == 3


def test_arms_of_the_cliff_have_the_strength_of_their_name(scripts: dict[str, ModuleType]) -> None:
    cliff = scripts["cliff"]
    for arm in cliff.ARMS:
        config = loaded(cliff, arm)
        assert config.method["strength"] == float(arm.split(",")[0])
        assert (config.method["guard"] == "relative") == ("guarded" in arm)
        assert (config.method["divergence"] == "sampled") == ("sampled" in arm)
        assert [reward["name"] for reward in config.rewards] == ["json-answer"]
        assert config.data.path == "bundled:arithmetic-json-train.jsonl"


def test_cells_of_egx_have_the_axes_of_their_names_and_the_first_none(
    scripts: dict[str, ModuleType],
) -> None:
    egx = scripts["egx"]
    cells = egx.factorial()
    assert len(cells) == 8
    for arm in cells:
        found, on = options_of(egx, arm), arm.split(" + ")
        assert (found["exposure_policy"] == "learned") == ("exposure" in on)
        assert (found["gate_beta"] != 0) == ("gate" in on)
        assert (found["strength"] != 1) == ("strength" in on)
    neutral = options_of(egx, "OPSD")
    assert (neutral["strength"], neutral["gate_beta"], neutral["gate_scale"]) == (1, 0, "unit")
    assert (neutral["exposure_policy"], neutral["exposure"]) == ("fixed", 1)


def test_each_control_of_egx_differs_from_the_whole_in_one_thing(
    scripts: dict[str, ModuleType],
) -> None:
    egx = scripts["egx"]
    whole = options_of(egx, egx.WHOLE)
    subjects = {
        "exposure_policy": "exposure",
        "exposure": "exposure",
        "guard": "unguarded",
        "strength": "unguarded",
        "gate_on": "gate",
    }
    for arm in egx.CONTROLS:
        found = options_of(egx, arm)
        changed = {subjects[key] for key in whole if found[key] != whole[key]}
        assert len(changed) == 1, arm


def test_weights_of_egx_undo_the_ratio_of_gradient_norms(scripts: dict[str, ModuleType]) -> None:
    egx = scripts["egx"]
    norms = dict.fromkeys(egx.ARMS, 2.0) | {"gate": 0.5}
    arms = egx.study(norms).arms
    weights = {
        name: load_config(a.config, a.overrides).method["weight"] for name, a in arms.items()
    }
    assert weights["gate"] == 4.0
    assert {weight for name, weight in weights.items() if name != "gate"} == {1.0}


RESULTS = {
    "one": {"0": {"x": 1.0}, "1": {"x": 4.0}},
    "other": {"0": {"x": 0.5}, "1": {"x": 1.5}, "2": {"x": 9.0}},
}


def test_differences_are_taken_seed_by_seed(scripts: dict[str, ModuleType]) -> None:
    collecting = scripts["collecting"]
    found = collecting.differences(RESULTS, "one", "other", "x")
    assert found == [0.5, 2.5]
    assert collecting.cell(found) == "1.500 ± 1.414"
    assert collecting.cell([2.0]) == "2.000 ± 0.000"
    assert collecting.values(RESULTS, "other", "x") == [0.5, 1.5, 9.0]


def test_a_main_effect_is_the_mean_of_the_cells_with_an_axis_less_that_of_the_others(
    scripts: dict[str, ModuleType],
) -> None:
    egx = scripts["egx"]
    worth = {"exposure": 1.0, "gate": -2.0, "strength": 0.5}
    results = {
        name: {
            str(seed): {"x": seed + sum(worth[axis] for axis in name.split(" + ") if axis in worth)}
            for seed in range(2)
        }
        for name in egx.factorial()
    }
    for axis, found in worth.items():
        assert egx.effect(results, axis, "x") == pytest.approx([found, found])


def test_what_is_on_disk_is_not_run_again_and_other_settings_are_refused(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    collecting, path = scripts["collecting"], tmp_path / "results.json"
    results = collecting.open_results(path, {"steps": 3})
    assert results == {"steps": 3}
    collecting.save_results(path, results | {"one": {"0": {"x": 7.0}}})
    again = collecting.open_results(path, {"steps": 3})
    collecting.collect(path, again, {"one": None}, seeds=1, workers=1, shown=["x"])
    assert again["one"] == {"0": {"x": 7.0}}
    with pytest.raises(SystemExit, match="holds runs of 3 steps: choose another --output"):
        collecting.open_results(path, {"steps": 4})


def test_metrics_are_told_as_means_and_losses_before_and_after(
    scripts: dict[str, ModuleType],
) -> None:
    rows = [
        {"seconds": 1.0 + n % 2, "grad_norm/student": 2.0, "loss/student": float(n)}
        for n in range(40)
    ]
    found = scripts["arithmetic_runs"].told(rows)
    wanted = {"seconds": 1.5, "grad_norm": 2.0, "loss/before": 4.5, "loss/after": 34.5}
    assert found == wanted


def test_scores_are_averaged_by_level(scripts: dict[str, ModuleType]) -> None:
    answers = [
        {"question": "12+34 box", "score": 1.0},
        {"question": "99+11 box", "score": 0.0},
        {"question": "12*3 box", "score": 1.0},
    ]
    found = scripts["arithmetic_runs"].by_level(answers)
    assert found == {"level/add-2": 0.5, "level/mul-2x1": 1.0}


def test_the_page_has_all_arms_and_their_differences(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    runs, arm = scripts["arithmetic_runs"], scripts["collecting"].Arm
    shown = {"x": "an x", "moved": "moved"}
    study = runs.Study(
        name="a_study",
        title="A study",
        about="Of this and that.",
        arms={"one": arm("c", []), "other": arm("c", ["d=1"])},
        against={"one": ["other"]},
        shown=shown,
        drawn=["x"],
    )
    level = {"box/level/add-2": 0.25}
    results = {
        "steps": 5,
        "questions": 9,
        "undistilled": {"x": 0.125} | level,
        "teacher": {"x": 0.75} | level,
        "one": {str(n): {"x": 1.0 + n, "moved": 0.5} | level for n in range(2)},
        "other": {str(n): {"x": 2.0 + 3 * n, "moved": 0.5} | level for n in range(2)},
    }
    (tmp_path / "reading.md").write_text("By hand.\n")
    runs.publish(study, results, tmp_path, ["", "More."])
    page = (tmp_path / "README.md").read_text()
    assert "| teacher | 0.750 | - |" in page
    assert "| one | 1.500 ± 0.707 | 0.500 ± 0.000 |" in page
    assert "## Differences from one with the same seed" in page
    assert "| other | 2.000 ± 1.414 | 0.000 ± 0.000 |" in page
    assert "| other | 0.250 |" in page
    assert page.endswith("More.\nBy hand.\n")
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert study.folder.name == "a-study"


@pytest.mark.parametrize("name", NAMES)
def test_every_script_makes_its_page_of_what_is_on_disk_without_running_anything(
    scripts: dict[str, ModuleType], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, runs = scripts[name], scripts["arithmetic_runs"]
    arms = list(arms_of(script, tmp_path))
    shown = script.study(tmp_path).shown if name == "many_faces" else runs.SHOWN
    if name == "tessy":
        shown = script.SHOWN
        told = {"segments": 9, "accuracy": 0.99, "majority": 0.5, "epoch": 1}
        settings, models = (
            load_config(script.CONFIG).tessy,
            FOLDER.parents[1] / "samples" / "models",
        )
        assert settings is not None
        names = {"student": "arithmetic-student", "teacher": "arithmetic-words-teacher"}
        report = {
            "settings": asdict(settings),
            "predictors": {"student": told, "teacher": told},
            "revisions": {a: folder_hash(models / name) for a, name in names.items()},
        }
        monkeypatch.setattr(script, "PREDICTORS", tmp_path)
        assert not script.is_current()
        (tmp_path / "report.json").write_text(json.dumps(report))
        assert script.is_current()
        for other in ({"settings": report["settings"] | {"seed": 1}}, {"revisions": {}}):
            (tmp_path / "report.json").write_text(json.dumps(report | other))
            assert not script.is_current()
        (tmp_path / "report.json").write_text(json.dumps(report))
    numbers = dict.fromkeys([*shown, "exposure", "strength", "gate", "grad_norm"], 0.5)
    numbers |= {"box/level/add-2": 0.25, "student_mass": 0.25, "teacher_mass": 0.75}
    numbers |= {f"course/{n}/{key}": 1.0 for n in (2, 4) for key in scripts["many_faces"].COURSE}
    shares = [f"{kind} {n}%" for kind in ("plain", "streamed") for n in (100, 50, 20, 10)]
    results: dict[str, Any] = {"steps": 4, "questions": study_of(script, tmp_path).questions}
    results |= {"undistilled": numbers, "teacher": numbers, "memory": dict.fromkeys(shares, 1.0)}
    results |= {"norms": dict.fromkeys(arms, 1.0), "directions": {arm: [0.5, 0.7] for arm in arms}}
    results |= {arm: {"0": numbers, "1": numbers} for arm in arms}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    command = ["script", "--seeds", "2", "--steps", "4", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(runs, "draw", lambda *_: None)  # takes seconds, and is tested above
    script.main()
    page = (tmp_path / "README.md").read_text()
    assert all(f"| {arm} | 0.500 ± 0.000 |" in page for arm in arms)
    assert json.loads(path.read_text()) == results
    for line in page.splitlines():
        assert line.count("|") != 1


def test_all_ways_to_two_skills_take_as_many_updates_from_as_many_answers(
    scripts: dict[str, ModuleType],
) -> None:
    copd = scripts["copd"]
    configs = [load_config(arm.config, arm.overrides) for arm in copd.RUNS.values()]
    assert {c.data.batch_size * c.method["num_answers"] for c in configs} == {16}
    assert len({(c.train.lr, c.train.schedule, c.method["aggregation"]) for c in configs}) == 1
    static = load_pipeline("copd/static")
    for arm in copd.STATIC.values():
        stages = [stage.run_config(Path("x")) for stage in static.of_arm(arm)]
        assert [c.train.steps for c in stages] == [150, 150, 60]
        assert {c.data.batch_size * c.method["num_answers"] for c in stages} == {16}
    for config in configs[3:]:
        rewarded, shared = (config.method[f"{kind}_steps"] for kind in ("rewarded", "shared"))
        taught = [step % (rewarded + shared) >= rewarded for step in range(config.train.steps)]
        assert sum(taught) == round(copd.SHARED * config.train.steps) == 60
        assert taught[-1]  # experts are averaged after they were brought together


def test_every_control_of_sparse_to_dense_differs_in_one_thing(
    scripts: dict[str, ModuleType],
) -> None:
    plan = load_pipeline(scripts["sparse_to_dense"].NAME)
    stages = {name: stage.run_config(Path("x")) for name, stage in plan.stages.items()}
    steps = {
        arm: sum(stages[s.name].train.steps for s in plan.of_arm(arm) if s.name != "teacher")
        for arm in plan.arms
    }
    assert set(list(steps.values())[:5]) == {150}
    assert steps["then-student-rl"] == steps["then-replay"] == 250
    first, second = stages["teacher"].data, stages["polish"].data
    assert (first.skip_examples, first.max_examples) == (0, second.skip_examples)
    assert stages["replay"].data == stages["direct"].data == first
    raw, bridge = stages["raw-bridge"], stages["bridge"]
    assert (raw.method, raw.train) == (bridge.method, bridge.train)
    assert raw.roles["teacher"].path == "bundled:arithmetic-teacher"
    warm = stages["warm-up"].method
    assert (warm["divergence"], warm["on_policy_share"], warm["off_policy"]) == (
        "forward-kl",
        0.0,
        "teacher",
    )

"""``diffdistill pipeline``: runs that go on from each other's models, those that are not done."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from diffdistill.checkpoints import Checkpoints, restore, write_atomic
from diffdistill.commands.export import export
from diffdistill.commands.launching import launch_run
from diffdistill.commands.sessions import render
from diffdistill.commands.train import train
from diffdistill.config import RunConfig, load_config
from diffdistill.errors import UserError
from diffdistill.evaluation.stage_measures import closeness, scores
from diffdistill.question_feed import labelled_questions
from diffdistill.runs import claimed
from diffdistill.stage_gates import Gate, gates
from diffdistill.stages import Pipeline, Stage, load_pipeline, model_folder

RECORD = "stage.json"
"""What is known of a stage that is done; one without it is not."""
BEFORE = "before.json"
"""How close the teacher was before a stage."""
INPUTS = "inputs.json"
"""Which models of other stages a stage has begun with."""


def pipeline(
    name: str,
    *,
    output: Path,
    overrides: Sequence[str] = (),
    arms: Sequence[str] = (),
    launch: str | None = None,
) -> str:
    """Run the stages of some arms that are not done, and return what became of all of them.

    What is found goes, arm by arm, into ``pipeline.json`` of the folder.

    Args:
        name: The pipeline.
        output: Its folder, with one for each stage.
        overrides: Changes (see ``stages.load_pipeline``).
        arms: Which arms; none is the first, ``all`` is all.
        launch: How to start the runs, such as "accelerate launch"; None trains in this process.

    Raises:
        UserError: For anything the user can do something about, and if a gate does not hold that
            is to stop.
        Interrupted: If SIGTERM or SIGINT ended a run; the same command goes on with it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a pipeline runs in one process, and starts others with --launch")
    plan = load_pipeline(name, overrides)
    chosen = plan.chosen(arms)
    wanted = {stage.name for arm in chosen for stage in plan.of_arm(arm)}
    records: dict[str, dict[str, Any]] = {}
    with claimed(output):
        for stage in plan.stages.values():
            if stage.name in wanted:
                records[stage.name] = _Running(plan, stage, output, records, launch).record()
        found = {arm: _told(plan, arm, records) for arm in chosen}
        write_atomic(output / "pipeline.json", json.dumps(found, indent=1).encode())
    return _tables(found)


def dry_run(name: str, *, output: Path, overrides: Sequence[str], arms: Sequence[str]) -> str:
    """Return the stages of some arms: what each is, and whether it is done; nothing is built.

    Raises:
        UserError: For anything wrong in the pipeline.
    """
    plan = load_pipeline(name, overrides)
    chosen = plan.chosen(arms)
    lines = []
    for stage in plan.stages.values():
        of = [arm for arm in chosen if stage in plan.of_arm(arm)]
        if not of:
            continue
        config = stage.run_config(output)
        _check_same(stage, output / stage.name, config)
        asked = [f"{gate.name}: {gate.what}" for gate in gates(stage.settings)]
        train_, data = config.train, config.data
        cells = (
            stage.name,
            config.method["name"],
            ", ".join(stage.needs) or "-",
            str(train_.steps),
            str(train_.steps * train_.accumulate * data.batch_size * _num_skills(config)),
            "; ".join(asked) or "-",
            _status(output / stage.name),
            ", ".join(of),
        )
        lines.append(cells)
    titles = ("stage", "method", "needs", "steps", "questions", "gates", "status", "arms")
    return render(titles, lines)


def _num_skills(config: RunConfig) -> int:
    """Return how many questions a micro-batch has for each of ``data.batch_size``."""
    return len(config.data.skills or [""])


def _status(folder: Path) -> str:
    if (folder / RECORD).is_file():
        return "done"
    return "begun" if Checkpoints(folder).names() else "to do"


class _Running:
    """One stage, and what those that it needs came to."""

    def __init__(
        self,
        plan: Pipeline,
        stage: Stage,
        output: Path,
        records: Mapping[str, Mapping[str, Any]],
        launch: str | None,
    ) -> None:
        self.plan, self.stage, self.launch = plan, stage, launch
        self.folder = output / stage.name
        self.model = model_folder(output, stage.name)
        self.config = stage.run_config(output)
        self.inputs = {name: records[name]["weights"] for name in stage.needs}

    def record(self) -> dict[str, Any]:
        """Return what is known of the stage when it is done; what is not done yet is run.

        What is asked now and was not measured, or otherwise, is measured now.
        """
        _check_same(self.stage, self.folder, self.config)
        self._check_inputs()
        file, found = self.folder / RECORD, dict[str, Any]()
        if file.is_file():
            found = json.loads(file.read_text())
        close = self._before()
        if not found:
            self._train()
            found = self._after()
        found["closeness"] = close
        found["score"], found["measure"] = self._score(found), asdict(self.plan.measure)
        write_atomic(file, json.dumps(found, indent=1).encode())
        self._check_gates(found)
        return found

    def _check_inputs(self) -> None:
        """Refuse to go on with a stage that has begun with other models than there are now."""
        file, begun = self.folder / INPUTS, bool(Checkpoints(self.folder).names())
        if begun and file.is_file() and json.loads(file.read_text()) != self.inputs:
            raise UserError(
                f"{self.folder} went on from other models than {', '.join(self.inputs)} are "
                "now: remove it, or choose another --output"
            )

    def _before(self) -> dict[str, float]:
        """Return how close the teacher is before the stage, where gate C2 asks for it."""
        settings, file = self.stage.settings, self.folder / BEFORE
        if settings.most_kl is None and settings.least_overlap is None:
            return {}
        kept = json.loads(file.read_text()) if file.is_file() else {}
        measure = asdict(self.plan.measure)
        of = {"measure": measure, "inputs": self.inputs, "config": self.config.to_dict()}
        if kept.get("of") != of:
            _say(f"{self.stage.name}: how close is the teacher?")
            kept = {"of": of, "closeness": closeness(self.config, self.plan.measure)}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(kept).encode())
        found: dict[str, float] = kept["closeness"]
        self._check_gates({"closeness": found})
        return found

    def _score(self, found: Mapping[str, Any]) -> dict[str, float]:
        """Return the student's score, and what it was before where gate C1 asks for it."""
        if not self.config.rewards:
            return {}
        before = self.stage.settings.least_gain is not None
        kept: dict[str, float] = found.get("score", {})
        same = found.get("measure") == asdict(self.plan.measure)
        if same and "after" in kept and ("before" in kept or not before):
            return kept
        _say(f"{self.stage.name}: measuring")
        return scores(self.folder, self.plan.measure, before=before)

    def _train(self) -> None:
        _say(f"{self.stage.name}: training")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / INPUTS, json.dumps(self.inputs).encode())
        if self.launch is None:
            train(self.config, self.folder, "latest")
            return
        file = self.folder / "launch.yaml"
        self.config.save(file)
        command = [*shlex.split(self.launch), "-m", "diffdistill", "train", str(file)]
        command += ["--output", str(self.folder), "--resume"]
        launch_run(command, f"stage {self.stage.name}")

    def _after(self) -> dict[str, Any]:
        """Return what became of the stage's run; its model is written."""
        aside = self.folder / "writing"
        for folder in (aside, self.model):
            shutil.rmtree(folder, ignore_errors=True)
        aside.mkdir()
        export(self.folder, aside / self.model.name, layout="model")  # its record has the name
        (aside / self.model.name).rename(self.model)
        aside.rmdir()
        checkpoint = self.folder / "checkpoints" / Checkpoints(self.folder).names()[-1]
        state = json.loads((checkpoint / "state.json").read_text())
        labelled = labelled_questions(restore(self.folder), state["samples"])
        return {
            "method": self.config.method["name"],
            "updates": state["updates"],
            "questions": state["samples"] * _num_skills(self.config),
            "labelled": sorted(sha256(text.encode()).hexdigest()[:16] for text in labelled),
            "weights": sha256((checkpoint / "manifest.json").read_bytes()).hexdigest(),
        }

    def _check_gates(self, found: Mapping[str, Any]) -> None:
        """Say which gates do not hold; end the pipeline if it is to stop there."""
        for gate in gates(self.stage.settings, found):
            if gate.holds is False:
                told = f"stage {self.stage.name}: gate {gate.name} does not hold: {gate.told()}"
                if self.plan.on_failed_gate == "stop":
                    raise UserError(f"{told}; on_failed_gate=report goes on")
                _say(told)


def _check_same(stage: Stage, folder: Path, config: RunConfig) -> None:
    """Refuse to go on with a run of another config."""
    file = folder / "config.yaml"
    if not file.is_file():
        return
    before, now = load_config(str(file)).to_dict(), config.to_dict()
    if before != now:
        keys = _differing(before, now)
        raise UserError(
            f"{folder} holds a run of another config ({', '.join(keys)} differ): remove it to run "
            f"stage {stage.name} anew, or choose another --output"
        )


def _differing(first: Any, second: Any, key: str = "") -> list[str]:
    """Return the dotted keys at which nested values differ."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return [key] if first != second else []
    names = dict.fromkeys([*first, *second])
    inner = (_differing(first.get(n), second.get(n), f"{key}.{n}".strip(".")) for n in names)
    return [found for part in inner for found in part]


def _told(plan: Pipeline, arm: str, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what an arm came to; prompts that several stages learned from count once."""
    stages = plan.of_arm(arm)
    labelled = {question for stage in stages for question in records[stage.name]["labelled"]}
    told = {
        stage.name: {
            **records[stage.name],
            "labelled": len(records[stage.name]["labelled"]),
            "gates": [asdict(gate) for gate in gates(stage.settings, records[stage.name])],
        }
        for stage in stages
    }
    score = records[plan.arms[arm]].get("score", {}).get("after")
    return {"labelled": len(labelled), "score": score, "stages": told}


def _tables(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return arms and stages as text."""
    lines = []
    for arm, told in found.items():
        for name, stage in told["stages"].items():
            asked = "; ".join(Gate(**gate).told() for gate in stage["gates"])
            updates = ", ".join(str(count) for count in stage["updates"].values())
            score = stage.get("score", {}).get("after")
            cells = (arm, name, stage["method"], updates, str(stage["labelled"]))
            lines.append((*cells, _number(score), asked or "-"))
        lines.append((arm, "all", "", "", str(told["labelled"]), _number(told["score"]), ""))
    titles = ("arm", "stage", "method", "updates", "labelled prompts", "score", "gates")
    return render(titles, lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

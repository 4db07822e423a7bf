"""The report: one page with everything inside, true to the runs' files."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffdistill.commands.report import report
from diffdistill.errors import UserError
from diffdistill.evaluation.few_step import Row
from diffdistill.grids import save_grid
from diffdistill.report.build import build_report, evaluations, loss_curves, read_run
from diffdistill.report.figures import Curve, loss_figure
from tests.toy_run import toy_config

EVIL = "<script>alert('x')</script> & \"quotes\" $x$"


def make_run(folder: Path, *, steps: int = 20, student: float = 0.75, **sample: Any) -> Path:
    folder.mkdir(parents=True)
    values = toy_config(Path("data"), steps=steps).to_dict()
    values["sample"].update(sample)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    lines = [
        {"step": n, "loss/student": 1.0 / n, "seconds": 0.5, "peak_memory_gib": 0.25}
        for n in range(1, steps + 1)
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 2')
    rows = [row("base", 0.5), row("student", student)]
    (folder / "evaluation.json").write_text(json.dumps([r._asdict() for r in rows]))
    (folder / "versions.json").write_text(json.dumps({"torch": "9.9.9"}))
    for step in (1, 10, 20):
        for name in ("step", "rollout"):
            save_grid(torch.rand(2, 3, 8, 8), folder / "samples" / f"{name}-{step:06d}.png", 2)
    return folder


def row(model: str, mean: float, num_steps: int = 4) -> Row:
    return Row(model, num_steps, "accuracy", "old", mean, mean - 0.1, mean + 0.1, [0, 1], [mean])


class Page(HTMLParser):
    """Collects what a page refers to, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_everything_it_shows(tmp_path: Path) -> None:
    path = report([make_run(tmp_path / "one")], output=tmp_path / "out" / "page.html")
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "script" not in page.tags
    # two plots, three grids, three rollouts
    assert len(page.references) == 8


def test_pictures_are_those_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    text = build_report([run], figures=[("Side by side", run / "samples" / "step-000010.png")])
    content = (run / "samples" / "step-000010.png").read_bytes()
    assert text.count(base64.b64encode(content).decode()) == 2
    assert text.index("Side by side") < text.index("<h2>Runs</h2>")


def test_what_users_write_cannot_become_html(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", prompts=[EVIL])
    text = build_report([run], title=EVIL)
    assert "<script>" not in text
    assert "<b>run" not in text
    assert "&lt;script&gt;" in text
    assert Page(text).open == []


def test_the_summary_tells_method_roles_steps_and_final_loss(tmp_path: Path) -> None:
    summary = read_run(make_run(tmp_path / "one"), "one").summary
    assert summary["method"] == "d-opsd, num_steps 2, weight uniform"
    assert summary["role student"] == "trained, LoRA of rank 2"
    assert summary["role teacher"] == "ema of student, decay 0.9"
    assert summary["steps"] == "20 of 20"
    assert summary["loss of student"] == f"{(1 / 19 + 1 / 20) / 2:.4g} over the last 10% of steps"
    assert summary["seconds per step"] == "0.5"
    assert summary["peak memory"] == "0.25 GiB"


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    metrics = read_run(make_run(tmp_path / "one", steps=3), "one").metrics
    assert [step["step"] for step in metrics] == [1, 2, 3]


def test_losses_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one", steps=3), "one")
    run.metrics[1]["loss/student"] = float("nan")
    (curve,) = loss_curves([run])["loss of student"]
    assert (curve.x, curve.y) == ([1, 3], [1.0, pytest.approx(1 / 3)])


def test_several_runs_stand_side_by_side_and_share_an_equal_base(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / name, student=value), name)
        for name, value in (("sft", 0.25), ("d-opsd", 0.75))
    ]
    columns = evaluations(runs)["accuracy, old"]
    assert list(columns) == ["base", "sft: student", "d-opsd: student"]
    assert [rows[0].mean for rows in columns.values()] == [0.5, 0.25, 0.75]
    runs[1].evaluation[0] = row("base", 0.6)
    assert "d-opsd: base" in evaluations(runs)["accuracy, old"]
    text = build_report([tmp_path / "sft", tmp_path / "d-opsd"])
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells == ["0.5 [0.4, 0.6]", "0.25 [0.15, 0.35]", "0.75 [0.65, 0.85]"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / folder / "run", steps=2) for folder in ("a", "b")]
    text = build_report(paths)
    assert all(f"Config of {path}" in text for path in paths)


def test_a_run_that_only_began_has_a_page_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    for name in ("metrics.jsonl", "evaluation.json", "versions.json"):
        (run / name).unlink()
    page = Page(build_report([run]))
    assert page.open == []
    assert len(page.references) == 6


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder: it has no config"):
        build_report([tmp_path])
    with pytest.raises(UserError, match="name at least one"):
        build_report([])
    run = make_run(tmp_path / "one")
    with pytest.raises(UserError, match="cannot read the picture"):
        build_report([run], figures=[("None", tmp_path / "none.png")])
    (run / "evaluation.json").write_text("[{}]")
    with pytest.raises(UserError, match="cannot read the run"):
        build_report([run])


def test_many_pictures_are_thinned_to_the_first_the_last_and_some_between(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    for step in range(30, 200, 10):
        save_grid(torch.zeros(1, 3, 8, 8), run / "samples" / f"step-{step:06d}.png", 1)
    titles = [picture.title for picture in read_run(run, "one").grids]
    assert len(titles) == 6
    assert (titles[0], titles[-1]) == ("step 1", "step 190")


def test_long_curves_stay_small() -> None:
    steps = [float(step) for step in range(20_000)]
    uri = loss_figure({"loss": [Curve("a", steps, [1.0 + step % 7 for step in steps])]})
    assert len(uri) < 200_000

"""``diagnose`` and ``calibrate-lambda`` on tiny models saved to disk."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from diffdistill import cli
from diffdistill.commands.calibrate import calibrate, parse_strengths
from diffdistill.commands.diagnose import diagnose
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.evaluation import contexts, diagnosis
from diffdistill.evaluation.calibration import contract_of
from diffdistill.evaluation.means import Means
from diffdistill.evaluation.prefix_probe import written
from diffdistill.evaluation.subject import Subject, first_questions, subject_of
from diffdistill.evaluation.target_sampling import target_answers
from diffdistill.evaluation.verdicts import AGREE, BIASED, CUT_OFF
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.engines import Asked, Engine
from diffdistill.projection import dense
from diffdistill.rollouts import Actor, Answers, Sampling
from diffdistill.sampling import inference
from diffdistill.session import Session, build, questions
from diffdistill.supports import top_logprobs
from diffdistill.types import Example
from diffdistill.verifying import AnswerReward
from tests.answer_run import ROWS, answer_values, save_answer_world
from tests.conftest import CPU
from tests.tiny_text import words

LENGTH = "tests.answer_run:Length"
HALVES = "tests.test_diagnose:Halves"


@dataclass(kw_only=True)
class Halves(AnswerReward):
    """Answers with an even number of characters are right; those that begin with a letter parse."""

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        return torch.tensor([float(len(answer) % 2 == 0) for answer in answers])

    def parses(self, answers: Sequence[str]) -> Tensor:
        return torch.tensor([answer[:1].isalpha() for answer in answers])


@dataclass(kw_only=True)
class Serving(Engine):
    """An engine that another run's training is using."""

    def answers(self, family: CausalLM, student: Actor, asked: Asked) -> Answers:
        raise AssertionError("it would be given other weights")


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_world(tmp_path_factory.mktemp("diagnose"))


def values_of(world: Path, method: str, rewards: str | None = HALVES, **options: Any) -> Any:
    roles: dict[str, Any] = {}
    if method != "grpo":
        roles["teacher"] = {"path": str(world / "other"), "weights": "frozen"}
    values = answer_values(world, method={"name": method, "max_tokens": 6, **options}, roles=roles)
    return values | ({} if rewards is None else {"rewards": rewards})


def config_of(folder: Path, values: Any) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def started(values: Any, **options: Any) -> tuple[Session, Subject, list[Example]]:
    session = build(parse_config(values), CPU)
    return session, subject_of(session, **options), first_questions(session, 4)


@pytest.fixture(scope="module")
def built_opsd(world: Path) -> tuple[Session, Subject, list[Example]]:
    return started(values_of(world, "opsd", temperature=1.3), num_answers=3)


@pytest.fixture(scope="module")
def built_exopd(world: Path) -> tuple[Session, Subject, list[Example]]:
    return started(sharp_exopd(world))


def sharp_exopd(world: Path) -> Any:
    """Return ExOPD whose teacher is the student with larger logits: their first tokens agree."""
    network = AutoModelForCausalLM.from_pretrained(str(world / "student"))
    with torch.no_grad():
        network.model.norm.weight *= 3.0
    network.save_pretrained(str(world / "sharp"))
    words("student").save_pretrained(str(world / "sharp"))
    values = values_of(world, "exopd", contract_probability=0.3)
    values["roles"]["teacher"]["path"] = str(world / "sharp")
    return values


@pytest.fixture
def opsd(built_opsd: Any) -> Iterator[Any]:
    with inference(built_opsd[0]):
        yield built_opsd


@pytest.fixture
def exopd(built_exopd: Any) -> Iterator[Any]:
    with inference(built_exopd[0]):
        yield built_exopd


def test_answers_are_written_by_generate_whatever_the_engine_of_the_run(world: Path) -> None:
    values = values_of(world, "opsd", num_answers=2)
    session, subject, asked = started(values | {"engine": "tests.test_diagnose:Serving"})
    assert isinstance(questions(session).engine, Serving)
    with inference(session):
        found = subject.attempt(asked, 0).answers
    _, plain, _ = started(values)
    assert torch.equal(found.tokens, plain.attempt(asked, 0).answers.tokens)


# measures against brute force


def test_every_map_is_the_mean_over_tokens_of_what_dense_logits_say(opsd: Any) -> None:
    _, subject, asked = opsd
    found = diagnosis.diagnose(subject, asked, quiet).measures
    sides, tokens, lengths, ended = [], [], [], []
    for start in (0, 2):
        attempt = subject.attempt(asked[start : start + 2], start)
        mask = attempt.answers.mask
        pair = (attempt.prediction, subject.judgment(attempt))
        sides.append([F.log_softmax(dense(side)[mask].double() / 1.3, -1) for side in pair])
        tokens.append(attempt.answers.tokens[mask])
        lengths += mask.sum(1).tolist()
        ended += attempt.answers.ended.tolist()
    ours, theirs = (torch.cat(side) for side in zip(*sides, strict=True))
    p, q, answer = ours.exp(), theirs.exp(), torch.cat(tokens)
    tops = [side.topk(20, -1).indices for side in (ours, theirs)]
    common = (tops[0][:, :, None] == tops[1][:, None, :]).any(1)
    ranks = 1 + (theirs > theirs.gather(1, answer[:, None])).sum(1)
    expected = {
        "length": sum(lengths) / 12,
        "ended": sum(ended) / 12,
        "entropy": -(p * ours).sum(1),
        "teacher_entropy": -(q * theirs).sum(1),
        "reverse_kl": (p * (ours - theirs)).sum(1),
        "forward_kl": (q * (theirs - ours)).sum(1),
        "student_mass": p.gather(1, tops[1]).sum(1),
        "teacher_mass": q.gather(1, tops[1]).sum(1),
        "overlap": common.double().mean(1),
        "outside_top": (ranks > 20).double(),
        "rank": ranks.median().double(),
    }
    for name, value in expected.items():
        mean = value if isinstance(value, float) else value.mean().item()
        assert found[name] == pytest.approx(mean, rel=1e-4), name
    assert 0 < found["overlap"] < 1
    assert found["questions"] == 4


def test_a_solution_of_another_question_is_shown_in_the_control(opsd: Any) -> None:
    _, subject, asked = opsd
    others = contexts.shuffled(subject, asked)
    assert [o.solution for o in others if o] == [asked[i].solution for i in (1, 2, 3, 0)]
    assert [o.answer for o in others if o] == ["8", "2", "7", "4"]
    assert [o.messages for o in others if o] == [example.messages for example in asked]
    alike = [asked[0], asked[0]]
    assert contexts.shuffled(subject, alike) == [None, None]
    found = diagnosis.diagnose(subject, asked, quiet).measures
    assert found["context_kl"] == pytest.approx(found["reverse_kl"])
    assert found["shuffled_kl"] != pytest.approx(found["reverse_kl"], rel=1e-3)


def test_solutions_of_one_question_and_right_answers_are_its_contexts(opsd: Any) -> None:
    _, subject, asked = opsd
    twice = [asked[0], asked[0]._replace(solution="Count: 1, 2, 3, 4.\n\\boxed{4}")]
    looking = contexts.Contexts(subject, twice, Means())
    attempt = subject.attempt(twice, 0)
    texts = subject.family.spelled(attempt.answers)
    looking.consensus(attempt, texts, None, 0)
    found = looking.means.found() | looking.found()
    mask, teachers = attempt.answers.mask, []
    for example in twice:
        batch = subject.family.with_solutions(attempt.batch, [example.solution] * 6)
        judged = dense(subject.judgment(attempt, batch)) / 1.3
        teachers.append(F.log_softmax(judged[mask].double(), -1))
    gap = -torch.stack(teachers).mean(0).logsumexp(-1)
    assert found["consensus_gap"] == pytest.approx(gap.mean().item(), rel=1e-3)
    assert 0 < found["irreducible_share"] < 1
    assert found["consensus_questions"] == 2
    one = contexts.Contexts(subject, asked, Means())
    one.consensus(attempt, texts, [True, False, False] * 2, 0)
    assert one.found()["consensus_questions"] == 2  # the solution, and one right answer
    none = contexts.Contexts(subject, asked, Means())
    none.consensus(attempt, texts, [False] * 6, 0)
    assert none.found() == {}
    assert "no question has two contexts" in none.notes()[-1]


def test_a_teacher_that_goes_on_with_its_own_words_writes_the_same(opsd: Any) -> None:
    _, subject, asked = opsd
    read, role = subject.family, subject.teacher
    alone = written(subject, asked, [[]] * 4, 0)
    told = read.condition(read.collate(asked, range(4)), reader="teacher", exposure=1.0)
    with role.acting(CPU):
        found = role.family.sample(
            role.network, told, torch.arange(4), Sampling(6, 0.0), subject.draws, purpose="x"
        )
    assert alone == read.spelled(found)
    for length in (1, 3, 6):
        prefixes = [row[mask][:length].tolist() for row, mask in zip(*found[:2], strict=True)]
        assert written(subject, asked, prefixes, 0) == alone
    assert written(subject, asked, [[5] * 6] * 4, 0) == [read.student.decoded([5] * 6)] * 4


class Server:
    """A teacher that gives its first tokens only, and cannot write."""

    def __init__(self, role: Any, k: int) -> None:
        self.role, self.family, self.k = role, None, k

    def __call__(self, state: Any, condition: Any) -> Any:
        found = self.role(state, condition)
        return top_logprobs(found, self.k, tokens=state.x, temperature=1.3)


def test_of_a_server_divergences_are_lower_bounds_and_the_rest_is_skipped(opsd: Any) -> None:
    _, subject, asked = opsd
    whole = diagnosis.diagnose(subject, asked, quiet).measures
    server: Any = Server(subject.teacher, 20)
    found, notes = diagnosis.diagnose(replace(subject, teacher=server), asked, quiet)
    for name in ("forward_kl", "reverse_kl", "shuffled_kl"):
        assert 0 < found[name] < whole[name]
    for name in ("student_mass", "teacher_mass", "overlap", "outside_top", "entropy"):
        assert found[name] == pytest.approx(whole[name])
    assert "teacher_entropy" not in found
    assert any("lower bounds" in note for note in notes)
    assert any("cannot write" in note for note in notes)


# the target


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("strength", "name"), [(1.0, "teacher"), (0.0, "reference")])
def test_the_target_at_strength_1_writes_as_the_teacher_and_at_0_as_the_reference(
    strength: float, name: str, temperature: float, exopd: Any
) -> None:
    session, subject, asked = exopd
    sampling = Sampling(6, temperature)
    found = target_answers(subject, asked, 0, strength, sampling)
    read, role = questions(session), session.roles[name]
    told = read.condition(read.collate(asked, range(4)), reader="teacher")
    with role.acting(CPU):
        expected = read.student.sample(
            role.network, told, torch.arange(4), sampling, subject.draws, purpose="target"
        )
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.ended, expected.ended)


def test_p_and_b_are_of_the_tokens_that_both_take_for_the_first(exopd: Any) -> None:
    session, subject, asked = exopd
    found = contract_of(subject, asked, quiet)
    p, b, count = [], [], 0
    for start in (0, 2):
        attempt = subject.attempt(asked[start : start + 2], start)
        mask = attempt.answers.mask
        told = subject.family.condition(attempt.batch)
        base = dense(session.roles["reference"](attempt.state, told))
        theirs = dense(session.roles["teacher"](attempt.state, told))
        theirs, base = (F.log_softmax(side[mask].double(), -1) for side in (theirs, base))
        sure, first = theirs.max(-1)
        chosen = (sure >= torch.tensor(0.3).log()) & (base.argmax(-1) == first)
        p.append(sure[chosen])
        b.append(base.gather(1, first[:, None])[:, 0][chosen])
        count += int(mask.sum())
    torch.testing.assert_close(found.teacher, torch.cat(p), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.reference, torch.cat(b), rtol=1e-4, atol=1e-5)
    assert found.num_tokens == count
    assert 0 < len(found.teacher) < count


# commands


def test_a_trained_run_is_diagnosed_with_what_it_logged(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = {"support": "teacher", "support_size": 5, "correction": "none", "allow_biased": True}
    values = values_of(world, "opd", **options)
    values["train"] |= {"steps": 2}
    train(parse_config(values), tmp_path)
    monkeypatch.setattr("sys.argv", ["diffdistill", "diagnose", str(tmp_path), "--max-examples=3"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert f"verdict: {BIASED}: correction none" in told
    assert f"verdict: {CUT_OFF}: only" in told
    assert "note: the teacher is shown no context" in told
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert found["diagnose"] == {"max_examples": 3, "num_answers": 1, "seed": 0, "top_k": 5}
    assert found["measures"]["questions"] == 3
    assert {"student_mass_before", "answer_tokens_after", "alone_right"} <= set(found["measures"])
    assert BIASED in [verdict["mode"] for verdict in found["verdicts"]]
    assert found["method"]["name"] == "opd"


def test_a_teacher_that_is_the_student_and_is_shown_nothing_has_nothing_to_teach(
    world: Path, tmp_path: Path
) -> None:
    values = values_of(world, "opd", None)
    values["roles"] = {}
    output = tmp_path / "found.json"
    told = diagnose(config_of(tmp_path, values), output=output)
    assert f"verdict: {AGREE}" in told
    assert "note: no reward" in told
    assert "note: no prefix probe" in told
    assert json.loads(output.read_text())["measures"]["overlap"] == 1.0


def test_a_method_without_a_teacher_has_its_student_measured(world: Path, tmp_path: Path) -> None:
    told = diagnose(config_of(tmp_path, values_of(world, "grpo", num_answers=2)))
    assert "note: no role is called teacher" in told
    assert "answers in the format" in told
    assert "KL(" not in told


def test_a_teacher_that_is_shown_siblings_is_asked_where_one_was_right(
    world: Path, tmp_path: Path
) -> None:
    values = values_of(world, "sdpo", num_answers=4)
    values["roles"] = {}
    output = tmp_path / "found.json"
    diagnose(config_of(tmp_path, values), output=output)
    found = json.loads(output.read_text())["measures"]
    assert 0 < found["taught"] <= 1
    assert found["reverse_kl"] > 0
    assert found["consensus_questions"] > 0
    assert "context_kl" not in found
    told = diagnose(config_of(tmp_path, values | {"rewards": "boxed"}), output=output)
    found = json.loads(output.read_text())["measures"]
    assert found["taught"] == 0
    assert "reverse_kl" not in found
    assert "note: where no other answer was right, the teacher is not asked" in told


def test_a_strength_is_recommended_and_the_target_tried_at_others(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    values = sharp_exopd(world)
    output = tmp_path / "found.json"
    arguments = [config_of(tmp_path, values), "--sweep", "1.0,3", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["diffdistill", "calibrate-lambda", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["recommended"] > 1
    assert f"recommended strength for all tokens: {found['recommended']:.4g}" in told
    assert "tau(c) of the Extrapolation Cliff (arXiv:2605.08737) is not known to us" in told
    assert "is a proxy of ours" in told
    assert [row["strength"] for row in found["sweep"]] == [1.0, 3.0]
    assert all(0 <= row["parse_rate"] <= 1 for row in found["sweep"])
    assert len(found["bounds"]) == 7
    assert found["calibrate"]["sampling"]["max_tokens"] == 6


def test_without_a_contract_position_nothing_is_bounded(world: Path, tmp_path: Path) -> None:
    values = values_of(world, "exopd", None, contract_probability=1.0)
    output = tmp_path / "found.json"
    assert "no strength is bounded here" in calibrate(config_of(tmp_path, values), output=output)
    found = json.loads(output.read_text())
    assert found["recommended"] is None
    assert found["quantiles"]["p, teacher"] == [None] * 5


def test_what_cannot_be_measured_is_said_in_one_line(world: Path, tmp_path: Path) -> None:
    follow = config_of(tmp_path, answer_values(world))
    with pytest.raises(UserError, match="Follow: this is for methods whose student answers"):
        diagnose(follow)
    opd = config_of(tmp_path, values_of(world, "opd"))
    with pytest.raises(UserError, match="a method with a strength: exopd or egx"):
        calibrate(opd)
    bare = config_of(tmp_path, values_of(world, "exopd", None))
    with pytest.raises(UserError, match="--sweep asks a reward"):
        calibrate(bare, strengths=[1.0])
    with pytest.raises(UserError, match="no usable question"):
        diagnose(opd, overrides=["data.max_prompt=1", "data.on_error=skip"])
    for text in ("", "1.0,x", "-1", "inf"):
        with pytest.raises(UserError, match="expected strengths"):
            parse_strengths(text)
    assert parse_strengths("1,1.25") == [1.0, 1.25]
    assert len(ROWS) == 4

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from diffdistill import checkpoints
from diffdistill.checkpoints import (
    Checkpoints,
    Snapshot,
    load_optimizer,
    load_role,
    optimizer_tensors,
    restore,
)
from diffdistill.commands.train import train
from diffdistill.errors import UserError
from diffdistill.session import build
from tests.toy_run import make_data, toy_config


def snapshot(value: float) -> Snapshot:
    return Snapshot({"role-student": {"w": torch.full((4,), value)}}, {"step": int(value)})


def value_of(found: Snapshot) -> float:
    return float(found.tensors["role-student"]["w"][0])


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, snapshot(1))
    newest = kept.save(2, snapshot(2)) / "role-student.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    found, path, problems = kept.load()
    assert (value_of(found), path.name) == (1.0, "step-000001")
    assert len(problems) == 1
    assert "step-000002" in problems[0]
    assert "bytes instead of" in problems[0]


def test_a_checkpoint_with_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    weights = kept.save(1, snapshot(1)) / "role-student.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"no usable checkpoint.*has changed since"):
        kept.load()


def test_a_damaged_checkpoint_that_is_named_is_an_error(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, snapshot(1))
    (kept.save(2, snapshot(2)) / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged checkpoint .*step-000002"):
        kept.load("step-000002")
    assert value_of(kept.load("step-000001")[0]) == 1.0


def test_a_full_disk_leaves_the_old_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, snapshot(1))

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match=r"No space left.*step-000001 is intact"):
        kept.save(2, snapshot(2))
    assert value_of(kept.load()[0]) == 1.0
    assert sorted(p.name for p in kept.folder.iterdir()) == ["latest", "step-000001"]


def test_folders_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-000004", "step-old", "step-1000000", "step-000004.bak", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.names() == ["step-000004", "step-1000000"]
    checkpoints.abandon_after(4)
    assert checkpoints.names() == ["step-000004"]
    assert (tmp_path / "checkpoints" / "step-old").is_dir()


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable checkpoint"):
        Checkpoints(tmp_path).load()
    with pytest.raises(UserError, match=r"no checkpoint .*step-000009"):
        Checkpoints(tmp_path).load("step-000009")


def test_weights_of_another_shape_or_name_are_those_of_another_model(tmp_path: Path) -> None:
    role = build(toy_config(make_data(tmp_path / "data"))).roles["student"]
    own = {name: parameter.detach() for name, parameter in role.parameters().items()}
    with pytest.raises(UserError, match=r"of another model.*is \(7,\), here \(2, 3\)"):
        load_role(role, own | {"mix.lora_A.weight": torch.zeros(7)}, "there")
    with pytest.raises(
        UserError, match=r"there: a checkpoint of another model.*1 weights.*'other'"
    ):
        load_role(role, own | {"other": torch.zeros(1)}, "there")


def test_resuming_a_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    train(toy_config(data), tmp_path / "run")
    other = toy_config(data)
    other.roles["student"].rank = 3
    with pytest.raises(UserError, match="a checkpoint of another model"):
        train(other, tmp_path / "run", "latest")


def test_a_restored_session_predicts_as_the_trained_one(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    train(toy_config(data), tmp_path / "run")
    session = restore(tmp_path / "run")
    saved, _, _ = Checkpoints(tmp_path / "run").load()
    for name in ("student", "teacher"):
        for key, parameter in session.roles[name].parameters().items():
            assert torch.equal(parameter, saved.tensors[f"role-{name}"][key])
    student = session.roles["student"].parameters()["mix.lora_B.weight"]
    assert student.abs().sum() > 0


def test_a_checkpoint_holds_only_safetensors_json_and_a_card(tmp_path: Path) -> None:
    train(toy_config(make_data(tmp_path / "data")), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-000008"
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json", ".md"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {p.name for p in folder.iterdir()} - {"manifest.json"}


def test_a_folder_that_is_no_run_cannot_be_restored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        restore(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", ["fused", "capturable", "foreach"])
def test_an_optimizer_goes_on_with_its_state_where_torch_would_put_it(
    kind: str, device: str
) -> None:
    shapes = {"weight": (2, 3), "scale": ()}
    before = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    saved = torch.optim.AdamW(before.values())
    for parameter in before.values():
        parameter.grad = torch.ones_like(parameter)
    saved.step()
    saved.param_groups[0][kind] = True
    states = []
    for by_torch in (True, False):
        parameters = {n: nn.Parameter(p.detach().to(device)) for n, p in before.items()}
        optimizer = torch.optim.AdamW(parameters.values())
        optimizer.param_groups[0][kind] = True  # a constructor refuses it on these devices
        if by_torch:
            optimizer.load_state_dict(saved.state_dict())
        else:
            load_optimizer(optimizer, parameters, *optimizer_tensors(saved, before))
        states.append([optimizer.state[p] for p in parameters.values()])
    for expected, found in zip(*states, strict=True):
        assert found.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in expected.items():
            assert (found[key].device, found[key].dtype) == (value.device, value.dtype)
            if device == "cpu":
                assert torch.equal(found[key], value)

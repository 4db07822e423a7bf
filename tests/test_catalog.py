from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest

from diffdistill import catalog
from diffdistill.errors import UserError
from diffdistill.method import Method
from diffdistill.methods.sft import SFT
from diffdistill.pipelines.flow import FlowFamily
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.role_settings import RoleSettings


@pytest.mark.parametrize("name", sorted(catalog.METHODS))
def test_every_method_is_a_method_whose_roles_are_fields_without_a_default(name: str) -> None:
    method = catalog.load("method", name)
    assert issubclass(method, Method)
    required = {k for k, f in method.__dataclass_fields__.items() if not has_default(f)}
    assert required - {"reward", "peers"} == {"family", "draws", *method.roles}
    settings = {role: RoleSettings(**given) for role, given in method.roles.items()}
    assert settings["student"].weights in ("trained", "mean")


def has_default(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is not MISSING or field.default_factory is not MISSING


@pytest.mark.parametrize("name", sorted(catalog.FAMILIES))
def test_every_family_is_a_complete_family(name: str) -> None:
    family = catalog.load("family", name)
    assert issubclass(family, FlowFamily | TokenFamily)
    assert not family.__abstractmethods__
    assert family.adapter_targets or name == "server"  # whose layers are not ours
    if issubclass(family, FlowFamily):
        assert isinstance(family.views, tuple)


def test_a_class_can_be_given_by_its_address() -> None:
    assert catalog.load("method", "diffdistill.methods.sft:SFT") is SFT


def test_an_unknown_name_is_an_error_that_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(UserError, match=r"unknown method 'd-opds', did you mean 'd-opsd'\?; known") as caught:  # fmt: skip # noqa: E501
        catalog.load("method", "d-opds")
    assert ", ".join(sorted(catalog.METHODS)) in str(caught.value)


@pytest.mark.parametrize("address", ["no_such_module:X", "diffdistill.methods.sft:NoSuchClass"])
def test_an_address_that_leads_nowhere_is_an_error_that_names_it(address: str) -> None:
    with pytest.raises(UserError, match=f"cannot load the method '{address}'"):
        catalog.load("method", address)


def test_other_packages_add_names_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(group: str) -> Any:
        if group == "diffdistill.methods":
            return [EntryPoint(n, "diffdistill.methods.sft:SFT", group) for n in ("theirs", "opd")]
        return entry_points(group=group)

    monkeypatch.setattr(catalog, "entry_points", found)
    assert catalog.load("method", "theirs") is SFT
    assert catalog.load("method", "opd") is not SFT
    assert catalog.names("method")["opd"] == catalog.METHODS["opd"]
    assert "theirs" not in catalog.names("family")
    assert "sft" in catalog.names("method")


def test_near_says_nothing_where_nothing_resembles_the_name() -> None:
    assert catalog.near("xyz", {"student": 1}) == ""
    assert catalog.near("studnet", {"student": 1, "critic": 2}) == ", did you mean 'student'?"

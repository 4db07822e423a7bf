"""The same questions to every family of language models, on tiny random ones loaded from disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill import catalog
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.projection import dense
from diffdistill.types import Example, State
from tests.tiny_text import save_lm

CPU = torch.device("cpu")
BLOCK = 4
CASES = {
    "bd3lm": {},
    "mdlm": {},
    "mdlm-shift": {"shift": True},
    "llada2": {},
    "llada2-native": {"convention": "native"},
    "wedlm": {},
    "wedlm-native": {"convention": "native"},
}
KINDS = {"llada2": "qwen3-moe"}
HIDDEN = (5, 6, 8, 10, 11)
"""Masked places of a row of three blocks: none of the first, and known ones between them."""

CHATS = (
    "print(1)",
    "def add(first, second):\n    return first + second\n",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint for every family."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("text")
    for name in ("bd3lm", "mdlm", "llada2", "wedlm"):
        save_lm(folder / name, name=KINDS.get(name, "qwen3"))
    return folder


def family_of(case: str, root: Path, **options: Any) -> LanguageFamily:
    """Return the family of a case."""
    name = case.split("-", maxsplit=1)[0]
    options = {"block": BLOCK, "max_length": 64, **CASES[case], **options}
    family: LanguageFamily = catalog.load("family", name)(
        path=str(root / name), device=CPU, **options
    )
    return family


def row_of(family: LanguageFamily, *, pads: int = 0) -> tuple[Tensor, Tensor]:
    """Return a row ``[1, L]`` with masks and without, after so much padding."""
    clean = torch.arange(20, 32)[None]
    noised = clean.clone()
    noised[0, list(HIDDEN)] = family.mask_id
    fill = torch.full((1, pads), family.pad_id)
    return torch.cat([fill, noised], 1), torch.cat([fill, clean], 1)


def ask(
    family: LanguageFamily, network: nn.Module, noised: Tensor, clean: Tensor, pads: int = 0
) -> Tensor:
    """Return logits ``[B, L, V]``."""
    state = State(noised, torch.full((len(noised),), 0.5))
    padding = torch.zeros_like(clean, dtype=torch.bool)
    padding[:, :pads] = True
    told = family.condition(clean, padding)
    return dense(family.predict(network, state, told))


def reach(case: str, place: int) -> set[tuple[str, int]]:
    """Return which tokens, of which copy, a prediction depends on, from the papers' words."""
    places, first = range(12), place // BLOCK * BLOCK
    if case in ("mdlm", "mdlm-shift", "llada2"):
        return {("noised", i) for i in places}
    past = {("clean", i) for i in range(first)}
    block = range(first, first + BLOCK)
    if case == "wedlm-native":
        block = [i for i in block if i not in HIDDEN or i <= place]
    return past | {("noised", i) for i in block}


def called(case: str) -> list[tuple[str, int]]:
    """Return the tokens of a row in the order in which its network is given them."""
    noised, clean = ([(copy, i) for i in range(12)] for copy in ("noised", "clean"))
    if case in ("mdlm", "mdlm-shift", "llada2"):
        return noised
    if case == "wedlm-native":
        noised.sort(key=lambda token: (token[1] // BLOCK, token[1] in HIDDEN, token[1]))
    return clean + noised if case.startswith("wedlm") else noised + clean


@pytest.mark.parametrize("case", CASES)
def test_a_prediction_depends_on_what_it_should_and_on_nothing_else(case: str, root: Path) -> None:
    family = family_of(case, root)
    network = family.network()
    vectors: list[Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        vectors.append(output.detach().requires_grad_())
        return vectors[-1]

    network.get_input_embeddings().register_forward_hook(watch)
    for place in HIDDEN:
        vectors.clear()
        logits = ask(family, network, *row_of(family))
        logits[0, place, : family.mask_id].sum().backward()
        [given] = vectors
        reached = given.grad[0].abs().sum(1).nonzero()[:, 0].tolist()
        assert {called(case)[i] for i in reached} == reach(case, place)


@pytest.mark.parametrize("case", CASES)
def test_predictions_are_about_their_own_place(case: str, root: Path) -> None:
    """A network that does nothing says at each place which token it was given there."""
    family = family_of(case, root)
    network = family.network()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        table = network.get_input_embeddings().weight
        table.copy_(nn.functional.normalize(table, dim=1))
        network.get_output_embeddings().weight.copy_(table)
    noised, clean = row_of(family)
    said = ask(family, network, noised, clean)[0].argmax(-1).tolist()
    given = noised[0].tolist()
    if case == "mdlm-shift":  # which predicts the next token at each place
        given = [given[0], *given[:-1]]
    for there, token in zip(said, given, strict=True):
        assert token in (there, family.mask_id)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing_and_is_never_nan(
    case: str, dtype: str, attention: str, root: Path
) -> None:
    family = family_of(case, root, attention=attention, dtype=dtype)
    network = family.network()
    with torch.no_grad():
        expected = ask(family, network, *row_of(family))
        for filler in (family.pad_id, 40):
            rows = [row.clone() for row in row_of(family, pads=2 * BLOCK)]
            for row in rows:
                row[:, : 2 * BLOCK] = filler
            found = ask(family, network, *rows, pads=2 * BLOCK)
            assert not found.isnan().any()
            tolerance = 1e-4 if dtype == "fp32" else 0.3
            torch.testing.assert_close(
                found[:, 2 * BLOCK :], expected, rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("case", CASES)
def test_a_text_is_read_alike_alone_and_beside_a_longer_one(case: str, root: Path) -> None:
    family = family_of(case, root)
    network, pair = family.network(), TextPair(family, family)
    examples = [
        Example("", messages=({"role": "user", "content": "x" * 3 * i},
                              {"role": "assistant", "content": content}))
        for i, content in enumerate(CHATS)
    ]  # fmt: skip
    rows = pair.encode(examples)
    whole = _predicted(pair, network, rows)
    for index, row in enumerate(rows):
        [alone] = _predicted(pair, network, [row])
        torch.testing.assert_close(whole[index], alone, rtol=1e-4, atol=1e-4)


def _predicted(pair: TextPair, network: nn.Module, rows: Any) -> list[Tensor]:
    """Return the logits at every other token of each row's answer."""
    batch = pair.collate(rows)
    text = pair.text(batch)
    places = [row.nonzero()[::2, 0] for row in text.maskable]
    mask = torch.zeros_like(text.maskable)
    for row, chosen in zip(mask, places, strict=True):
        row[chosen] = True
    state = pair.noised(batch, torch.full((len(mask),), 0.5), mask)
    with torch.no_grad():
        logits = dense(pair.student.predict(network, state, pair.condition(batch)))
    return [row[chosen] for row, chosen in zip(logits, places, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_all_attentions_predict_the_same(case: str, root: Path) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        family = family_of(case, root, attention=attention)
        with torch.no_grad():
            found.append(ask(family, family.network(), *row_of(family, pads=3), pads=3))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_reaches_every_weight_and_none_is_kept_without_one(
    case: str, root: Path
) -> None:
    family = family_of(case, root)
    network = family.network()
    with torch.no_grad():
        assert not ask(family, network, *row_of(family)).requires_grad
    assert not any(weight.requires_grad for weight in network.parameters())
    network.requires_grad_(True)
    logits = ask(family, network, *row_of(family))
    logits[0, list(HIDDEN)].log_softmax(-1)[..., 7].sum().backward()
    missing = [name for name, weight in network.named_parameters() if weight.grad is None]
    assert not missing
    with torch.no_grad():
        assert not ask(family, network, *row_of(family)).requires_grad


@pytest.mark.parametrize("case", CASES)
def test_the_mask_token_is_never_predicted(case: str, root: Path) -> None:
    family = family_of(case, root)
    with torch.no_grad():
        logits = ask(family, family.network(), *row_of(family))
    assert (logits.softmax(-1)[..., family.mask_id] == 0).all()

"""Bounds on the likelihood of texts, against the sum over all ways to hide them."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from diffdistill.answering import language_family
from diffdistill.commands.evaluate import evaluate
from diffdistill.config import parse_config
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.evaluation.likelihood import MonteCarlo, Pair, bound_pairs, held_out
from diffdistill.noising import likelihood_bound
from diffdistill.pipelines.block_diffusion import lay_out_prompts
from diffdistill.pipelines.block_sampling import Past
from diffdistill.pipelines.masked_sampling import denoise_all
from diffdistill.projection import dense
from diffdistill.roles import Role
from diffdistill.session import Session, build
from tests.conftest import CPU
from tests.text_run import save_world, text_values
from tests.tiny_text import CODE

BLOCK = 4
CONTEXT, SHORT, LONG = [20, 21, 22, 23, 24], [30, 31, 32], [30, 31, 32, 33, 34, 35]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_world(tmp_path_factory.mktemp("world"))


def session_of(world: Path, method: str = "bd3lm", /, **sections: Any) -> Session:
    return build(parse_config(text_values(world, method, **sections)), CPU)


def monte_carlo(**changes: Any) -> MonteCarlo:
    defaults = {"num_draws": 8, "antithetic": True, "seed": 0, "batch_size": 4}
    return MonteCarlo(**(defaults | changes))


def over_all_masks(ask: Any, tokens: list[int]) -> float:
    """Return the mean over counts k of ``n / k`` times the mean error of all sets of k tokens."""
    count, total = len(tokens), 0.0
    for size in range(1, count + 1):
        sets = list(combinations(range(count), size))
        errors = [-sum(float(ask(hidden)[i, tokens[i]]) for i in hidden) for hidden in sets]
        total += count / size * sum(errors) / len(sets) / count
    return total


@torch.no_grad()
def exact_of_blocks(role: Role, context: list[int], target: list[int]) -> float:
    """Return the bound of a block-diffusion model, as it samples: block by block on a cache."""
    family = language_family(role)
    rows, pads = lay_out_prompts([context], block=BLOCK, pad_id=family.pad_id, device=CPU)
    past = Past(role.network, BLOCK, pads, "sdpa")
    past.append(rows)
    total = 0.0
    for start in range(0, len(target), BLOCK):
        part = target[start : start + BLOCK]

        def ask(hidden: tuple[int, ...], part: list[int] = part) -> Tensor:
            seen = [family.mask_id if i in hidden else token for i, token in enumerate(part)]
            tail = [family.mask_id] * (BLOCK - len(part))
            return _logprobs(past.logits(torch.tensor([seen + tail]))[0], family.mask_id)

        total += over_all_masks(ask, part)
        past.append(torch.tensor([part + [family.mask_id] * (BLOCK - len(part))]))
    return total


@torch.no_grad()
def exact_of_rows(role: Role, context: list[int], target: list[int]) -> float:
    """Return the bound of a model that sees a whole row."""
    family = language_family(role)

    def ask(hidden: tuple[int, ...]) -> Tensor:
        seen = [family.mask_id if i in hidden else token for i, token in enumerate(target)]
        tail = [family.mask_id] * (-len(target) % BLOCK)
        logits = dense(denoise_all(role.network, torch.tensor([context + seen + tail])))
        return _logprobs(logits[0, len(context) :], family.mask_id)

    return over_all_masks(ask, target)


def _logprobs(logits: Tensor, mask_id: int) -> Tensor:
    logits = logits.clone()
    logits[:, mask_id] = -torch.inf
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("context", [CONTEXT, []])
@pytest.mark.parametrize("target", [SHORT, LONG])
@pytest.mark.parametrize("family", ["bd3lm", "mdlm"])
def test_the_bound_is_that_over_all_ways_to_hide_the_target(
    family: str, target: list[int], context: list[int], world: Path
) -> None:
    role = session_of(world, family={"name": family}).roles["student"]
    exact = (exact_of_blocks if family == "bd3lm" else exact_of_rows)(role, context, target)
    for antithetic in (False, True):
        chosen = monte_carlo(num_draws=400, antithetic=antithetic)
        [found] = bound_pairs(role, [Pair(context, target, 7)], chosen)
        assert abs(float(found.value) - exact) < 4 * float(found.error)
        assert float(found.error) < 0.05 * exact
        assert int(found.num_tokens) == len(target)


def test_the_bound_of_one_token_has_no_error(world: Path) -> None:
    role = session_of(world).roles["student"]
    [found] = bound_pairs(role, [Pair(CONTEXT, [30], 3)], monte_carlo(num_draws=2))
    torch.testing.assert_close(
        float(found.value), exact_of_blocks(role, CONTEXT, [30]), rtol=1e-5, atol=1e-5
    )
    assert float(found.error) < 1e-6


@pytest.mark.parametrize("family", ["bd3lm", "mdlm"])
def test_a_bound_does_not_depend_on_what_else_is_asked(family: str, world: Path) -> None:
    role = session_of(world, family={"name": family}).roles["student"]
    pairs = [Pair(CONTEXT, LONG, 1), Pair([], SHORT, 2), Pair(CONTEXT * 3, SHORT, 3)]
    together = bound_pairs(role, pairs, monte_carlo())
    for pair, found in zip(pairs, together, strict=True):
        [alone] = bound_pairs(role, [pair], monte_carlo(batch_size=1))
        torch.testing.assert_close(found.value, alone.value, rtol=1e-4, atol=1e-4)


def test_antithetic_draws_hide_each_number_of_tokens_equally_often(world: Path) -> None:
    clean, ids = torch.arange(4)[None].repeat(3, 1), torch.tensor([0, 1, 5])
    counts: list[Tensor] = []

    def logprob(noised: Tensor, masked: Tensor) -> Tensor:
        counts.append(masked.sum(1))
        return torch.zeros(masked.shape)

    likelihood_bound(
        logprob, clean, clean >= 0, Draws(0), ids,
        mask_id=9, block=None, num_draws=8, spread="draws",
    )  # fmt: skip
    for row in torch.stack(counts, 1).tolist():
        assert sorted(row) == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("spread", ["draws", "none"])
def test_where_only_the_number_of_hidden_tokens_matters_antithetic_draws_are_exact(
    spread: Any,
) -> None:
    """Each hidden token costs as much as there are hidden ones: n / k times k^2, for k = 1..4."""
    clean = torch.arange(4)[None].repeat(5, 1)
    found = likelihood_bound(
        lambda _, masked: -(masked * masked.sum(1, keepdim=True)).double(),
        clean, clean >= 0, Draws(0), torch.arange(5),
        mask_id=9, block=None, num_draws=8, spread=spread,
    )  # fmt: skip
    exact = torch.full((5,), 4 * (1 + 2 + 3 + 4) / 4, dtype=torch.float64)
    assert torch.allclose(found.value, exact) == (spread == "draws")
    assert (found.error > 1.0).all()


# held-out texts


def test_held_out_texts_are_bounded_per_token_and_per_byte(world: Path) -> None:
    session = session_of(world, data={"path": str(world / "texts.jsonl")})
    texts = [CODE[0], CODE[1]]
    (world / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = held_out(session, "student", session.roles["student"], monte_carlo(), None)
    assert found.num_texts == 2
    assert found.num_bytes == sum(len(text.encode()) for text in texts)
    total = found.nelbo * found.num_tokens
    assert found.bits_per_byte == pytest.approx(total / torch.tensor(2.0).log() / found.num_bytes)
    assert found.perplexity == pytest.approx(float(torch.tensor(found.nelbo).exp()), rel=1e-4)
    again = held_out(session, "x", session.roles["student"], monte_carlo(batch_size=1), None)
    assert again.nelbo == pytest.approx(found.nelbo, rel=1e-5)
    first = held_out(session, "x", session.roles["student"], monte_carlo(), 1)
    assert first.num_bytes == len(texts[0].encode())


def test_a_text_is_as_likely_held_out_as_scored_with_its_end(world: Path) -> None:
    session = session_of(world, data={"path": str(world / "one.txt")})
    (world / "one.txt").write_text("x = 1")
    role = session.roles["student"]
    family = language_family(role)
    tokens = family.tokenizer.encode("x = 1", add_special_tokens=False)
    tokens += [family.eos_id] * (-len(tokens) % BLOCK or BLOCK)
    chosen = monte_carlo(num_draws=5)
    found = held_out(session, "student", role, chosen, None)
    [expected] = bound_pairs(role, [Pair([], tokens, 0)], chosen)
    assert found.nelbo * found.num_tokens == pytest.approx(float(expected.value), rel=1e-5)
    assert found.num_tokens == len(tokens)


def test_packed_texts_are_measured_to_their_ends(world: Path) -> None:
    (world / "long.txt").write_text(CODE[0] * 9)
    data = {"path": str(world / "long.txt")}
    whole = session_of(world, data=data | {"packing": True})
    found = held_out(whole, "x", whole.roles["student"], monte_carlo(), None)
    assert found.num_bytes == len(CODE[0] * 9)
    cut = session_of(world, data=data)
    assert held_out(cut, "x", cut.roles["student"], monte_carlo(), None).num_bytes < 250


def test_the_suite_measures_models_with_their_own_tokenizers(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(text_values(world, "tide", evaluate={"num_draws": 2})))
    output = tmp_path / "found.json"
    told = evaluate(str(path), output=output, overrides=["evaluate.max_examples=3"])
    found = json.loads(output.read_text())
    assert [row["model"] for row in found["rows"]] == ["base", "student", "teacher"]
    base, student, teacher = found["rows"]
    assert base["nelbo"] == student["nelbo"]
    assert student["num_tokens"] != teacher["num_tokens"]
    assert student["num_bytes"] == sum(len(CODE[n % 4].encode()) for n in range(3))
    assert found["evaluate"]["num_draws"] == 2
    assert found["versions"]["torch"]
    assert "first 3 texts; 2 draws, antithetic True, seed 0" in told
    assert f"{teacher['bits_per_byte']:.4f}" in told


def test_suites_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(text_values(world)))
    with pytest.raises(
        UserError, match=r"no suite 'video' for texts; there is text, python, lm-eval"
    ):
        evaluate(str(path), suite="video")
    with pytest.raises(
        UserError, match=r"no suite 'text' for images and videos; there is few-step"
    ):
        evaluate("d-opsd/digits", suite="text")
    with pytest.raises(
        UserError, match=r"evaluate\.num_draw: unknown key, did you mean 'num_draws"
    ):
        evaluate(str(path), overrides=["evaluate.num_draw=3"])

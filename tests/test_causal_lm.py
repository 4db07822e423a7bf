"""Autoregressive language models: predictions beside answers, and answers that are sampled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_sampling import answers_of, sample_answers
from diffdistill.pipelines.prompts import prompt_condition
from diffdistill.projection import dense, token_logprob
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import enable_checkpointing
from diffdistill.rollouts import Answers, Sampling
from diffdistill.types import State
from tests.conftest import CPU, disturb, gradients
from tests.tiny_text import NAMES, save_lm, words

PROMPTS = ([5, 9, 30, 31, 7], [12], [40, 41, 42])
ANSWERS = ([50, 60, 70, 80], [51, 61, 71, 81], [52, 62, 72, 82])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    for name in NAMES:
        save_lm(folder / name, name=name, is_causal=True)
    return folder


def family_of(root: Path, name: str = "qwen3", **options: Any) -> CausalLM:
    return CausalLM(path=str(root / name), device=CPU, **options)


def state_of(rows: Any = ANSWERS) -> State:
    tokens = torch.tensor(rows)
    return State(tokens, torch.zeros(len(tokens)), torch.ones_like(tokens).bool())


def plain(network: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Return the logits of a full forward pass of one row about its answer."""
    tokens = torch.tensor([[*prompt, *answer]])
    logits = network(input_ids=tokens).logits[0].detach()
    return logits[len(prompt) - 1 : -1]


# predictions


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in NAMES]
    + [(name, torch.float64) for name in NAMES if name != "qwen3-moe"],  # its experts take none
)
def test_logits_are_those_of_a_full_forward_of_each_row_alone(
    name: str, dtype: torch.dtype, root: Path
) -> None:
    family = family_of(root, name)
    network: Any = family.network().to(dtype)
    found = dense(family.predict(network, state_of(), prompt_condition(PROMPTS, family)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        expected = plain(network, prompt, answer)
        torch.testing.assert_close(found[row].to(dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prediction_sees_its_prompt_and_the_answer_before_it_and_nothing_else(
    attention: Any, root: Path
) -> None:
    family = family_of(root, attention=attention)
    network = family.network()
    vectors: list[Tensor] = []

    def watch(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        vectors.append(output.detach().requires_grad_())
        return vectors[-1]

    network.get_input_embeddings().register_forward_hook(watch)
    logits = dense(family.predict(network, state_of(), prompt_condition(PROMPTS, family)))
    logits[1, 2].square().sum().backward()
    reached = vectors[0].grad.abs().sum(-1)
    assert reached.isfinite().all()
    assert reached[1].nonzero()[:, 0].tolist() == [4, 5, 6]  # one token of prompt, two of answer
    assert reached[[0, 2]].sum() == 0


def test_what_fills_up_an_answer_does_not_alter_what_counts(root: Path) -> None:
    family = family_of(root)
    network, told = family.network(), prompt_condition(PROMPTS, family)
    cut = [row[:2] + [family.pad_id] * 2 for row in ANSWERS]
    found, expected = (
        dense(family.predict(network, state_of(rows), told)) for rows in (cut, ANSWERS)
    )
    torch.testing.assert_close(found[:, :3], expected[:, :3])
    assert not torch.allclose(found[:, 3], expected[:, 3])


def test_the_head_is_cut_to_the_words_of_the_tokenizer(root: Path, tmp_path: Path) -> None:
    count = len(words("student"))
    save_lm(tmp_path / "wide", is_causal=True, vocab_size=count + 5)
    family = CausalLM(path=str(tmp_path / "wide"), device=CPU)
    network: Any = family.network()
    found = dense(family.predict(network, state_of(), prompt_condition(PROMPTS, family)))
    assert found.shape[-1] == count
    expected = plain(network, PROMPTS[0], ANSWERS[0])[:, :count]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the most likely of all are no words
        network.get_output_embeddings().weight[count:] = 1e3 * torch.randn(5, 32)
    answers = sampled(family, network, Sampling(max_tokens=8))
    assert answers.tokens.max() < count


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_gradients_are_the_same_when_blocks_are_recomputed(adapter: Any, root: Path) -> None:
    family = family_of(root)
    found = []
    for recompute in (False, True):
        settings = {
            "student": RoleSettings(adapter=adapter, rank=2),
            "teacher": RoleSettings(weights="ema"),
        }
        roles = build_roles(settings, family)
        disturb(roles["student"], seed=1, scale=0.05)
        if recompute:
            enable_checkpointing(roles["student"].network)
        state, told = state_of(), prompt_condition(PROMPTS, family)
        loss = token_logprob(roles["student"](state, told), state.x).sum()
        with torch.no_grad():
            roles["teacher"](state, told)  # another adapter of the base acts before the backward
        loss.backward()
        found.append(gradients(roles["student"]))
    plain_, recomputed = found
    assert plain_.keys() == recomputed.keys()
    assert any(value.abs().max() > 0 for value in plain_.values())
    for name, value in plain_.items():
        torch.testing.assert_close(value, recomputed[name], rtol=1e-4, atol=1e-6)


# answers


def sampled(
    family: CausalLM, network: Any, sampling: Sampling, rows: Any = (0, 1, 2), **changes: Any
) -> Answers:
    told = prompt_condition([PROMPTS[row] for row in rows], family)
    ids = torch.tensor(rows)
    return family.sample(network, told, ids, sampling, Draws(3), purpose="rollout", **changes)


WARPED = Sampling(max_tokens=6, temperature=0.7, top_p=0.8, top_k=40)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", [Sampling(max_tokens=6), WARPED])
def test_an_answer_is_the_same_alone_and_in_any_batch(
    name: str, sampling: Sampling, root: Path
) -> None:
    family = family_of(root, name)
    network = family.network()
    together = sampled(family, network, sampling)
    for rows in ((0,), (1,), (2, 1)):
        apart = sampled(family, network, sampling, rows)
        for place, row in enumerate(rows):
            count = int(apart.mask[place].sum())
            assert count == int(together.mask[row].sum())
            assert torch.equal(apart.tokens[place, :count], together.tokens[row, :count])
            torch.testing.assert_close(
                apart.logprobs[place, :count], together.logprobs[row, :count], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_log_probability_is_what_the_model_says_of_the_token_at_that_temperature(
    temperature: float, root: Path
) -> None:
    family = family_of(root)
    network = family.network()
    answers = sampled(family, network, Sampling(max_tokens=6, temperature=temperature))
    state = State(answers.tokens, torch.zeros(3), answers.mask)
    found = family.predict(network, state, prompt_condition(PROMPTS, family))
    expected = token_logprob(found, answers.tokens, mask=answers.mask, temperature=temperature)
    torch.testing.assert_close(answers.logprobs, expected.detach(), rtol=1e-4, atol=1e-5)


def test_tokens_are_where_the_nucleus_adds_up_to_the_rows_number(root: Path) -> None:
    """A brute force of temperature, top-k and top-p, in that order, on the logits of each row."""
    family = family_of(root)
    network = family.network()
    answers = sampled(family, network, WARPED)
    numbers = Draws(3).uniform("rollout", torch.arange(3), (6,))
    for row, prompt in enumerate(PROMPTS):
        tokens = answers.tokens[row][answers.mask[row]].tolist()
        for place, logits in enumerate(plain(network, list(prompt), tokens).double()):
            probs = F.softmax(logits / WARPED.temperature, -1)
            best = probs.argsort(descending=True)[: WARPED.top_k].tolist()
            total, kept = sum(float(probs[t]) for t in best), []
            for token in best:
                if sum(float(probs[t]) for t in kept) < WARPED.top_p * total:
                    kept.append(token)
            mass = sum(float(probs[t]) for t in kept)
            sums, expected = 0.0, -1
            for token in sorted(kept):
                sums += float(probs[token]) / mass
                if sums > float(numbers[row, place]) and expected < 0:
                    expected = token
            assert tokens[place] == expected
            logprob = (probs[expected] / mass).log().float()
            torch.testing.assert_close(answers.logprobs[row, place], logprob, rtol=1e-4, atol=1e-5)


def test_temperature_zero_is_transformers_greedy_search(root: Path) -> None:
    family = family_of(root)
    network: Any = family.network()
    answers = sampled(family, network, Sampling(max_tokens=8, temperature=0.0))
    config = GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=family.end_ids, pad_token_id=family.pad_id
    )
    for row, prompt in enumerate(PROMPTS):
        expected = network.generate(torch.tensor([prompt]), generation_config=config)
        count = expected.shape[1] - len(prompt)
        assert torch.equal(answers.tokens[row, :count], expected[0, len(prompt) :])
    assert torch.equal(answers.logprobs, torch.zeros_like(answers.logprobs))


def test_what_a_checkpoint_says_about_generation_has_no_say(root: Path) -> None:
    family = family_of(root)
    network: Any = family.network()
    expected = sampled(family, network, Sampling(max_tokens=6))
    network.generation_config = said = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=9.0, max_length=3
    )
    found = sampled(family, network, Sampling(max_tokens=6))
    assert torch.equal(found.tokens, expected.tokens)
    assert network.generation_config is said


def test_rollouts_have_no_dropout_and_keep_their_cache_when_blocks_are_recomputed(
    root: Path,
) -> None:
    family = family_of(root)
    settings = {"student": RoleSettings(adapter="lora", rank=2, dropout=0.9)}
    role = build_roles(settings, family)["student"]
    disturb(role, seed=1)
    role.network.eval()
    with role.acting(CPU):
        expected = sampled(family, role.network, Sampling(max_tokens=6))
    enable_checkpointing(role.network)
    role.network.train()
    calls: list[int] = []
    role.network.base_model.register_forward_pre_hook(
        lambda _module, _inputs, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with role.acting(CPU):
        found = sampled(family, role.network, Sampling(max_tokens=6))
    assert torch.equal(found.tokens, expected.tokens)
    assert all(module.training for module in role.network.modules())
    assert calls == [5, 1, 1, 1, 1, 1]


def test_other_ids_and_purposes_give_other_answers(root: Path) -> None:
    family = family_of(root)
    network = family.network()
    told = prompt_condition([PROMPTS[0]] * 2, family)
    sampling, ids = Sampling(max_tokens=8), torch.tensor([4, 5])
    first, second = (
        family.sample(network, told, ids, sampling, Draws(0), purpose=purpose).tokens
        for purpose in ("one", "two")
    )
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_answers_are_drawn_in_proportion_to_the_models_probabilities(root: Path) -> None:
    family = family_of(root)
    network: Any = family.network()
    count = 2000
    told = prompt_condition([PROMPTS[0]] * count, family)
    numbers = Draws(0).uniform("many", torch.arange(count), (1,))
    answers = sample_answers(
        network, told["prompt"], told["pads"], numbers, Sampling(max_tokens=1, top_k=4),
        end_ids=family.end_ids, pad_id=family.pad_id, words=family.words,
    )  # fmt: skip
    logits = plain(network, list(PROMPTS[0]), [0])[0]
    best = logits.topk(4).indices
    shares = torch.stack([(answers.tokens[:, 0] == token).float().mean() for token in best])
    torch.testing.assert_close(shares, logits[best].softmax(-1), rtol=0, atol=0.04)


END, TURN, WORD = 1, 2, 9


@pytest.mark.parametrize("pad_id", [0, END])
def test_an_answer_ends_with_its_first_end_token_even_where_that_is_the_padding(
    pad_id: int,
) -> None:
    tokens = torch.tensor(
        [
            [WORD, END, END, END],
            [WORD, WORD, TURN, pad_id],
            [TURN, END, WORD, WORD],
            [WORD, WORD, WORD, WORD],
            [WORD, pad_id, WORD, TURN] if pad_id != END else [WORD, WORD, WORD, TURN],
        ]
    )
    found = answers_of(tokens, -torch.ones(5, 4), [END, TURN], pad_id)
    assert found.mask.sum(1).tolist() == [2, 3, 1, 4, 4]
    assert found.ended.tolist() == [True, True, True, False, True]
    assert found.tokens[~found.mask].tolist() == [pad_id] * 6
    assert torch.equal(found.logprobs, -found.mask.float())
    short = answers_of(tokens[[0, 2]], None, [END, TURN], pad_id)
    assert short.tokens.tolist() == [[WORD, END], [TURN, pad_id]]
    assert short.logprobs is None


def test_generation_stops_at_the_end_of_a_turn_as_well_as_of_the_text(root: Path) -> None:
    family = family_of(root)
    network: Any = family.network()
    assert len(family.end_ids) == 2
    assert family.end_ids[1] == family.tokenizer.convert_tokens_to_ids("<|end|>")
    for end in family.end_ids:
        with torch.no_grad():
            network.lm_head.weight.zero_()
            network.lm_head.bias = torch.nn.Parameter(torch.zeros(network.config.vocab_size))
            network.lm_head.bias[end] = 50.0
        answers = sampled(family, network, Sampling(max_tokens=5))
        assert answers.tokens.tolist() == [[end]] * 3
        assert answers.ended.all()


# errors


def test_a_diffusion_model_is_not_taken_for_an_autoregressive_one(tmp_path: Path) -> None:
    save_lm(tmp_path)
    with pytest.raises(UserError, match="is_causal: false, so it is a diffusion model: use"):
        CausalLM(path=str(tmp_path), device=CPU).network()


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    save_lm(tmp_path, is_causal=True, vocab_size=100)
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens, and the network 100"):
        CausalLM(path=str(tmp_path), device=CPU).network()


def test_logits_that_are_not_those_of_the_head_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3ForCausalLM

    forward = Qwen3ForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found.logits = 2.0 * found.logits
        return found

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", doubled)
    with pytest.raises(UserError, match="Qwen3ForCausalLM makes its logits otherwise than"):
        family_of(root).network()


def test_attention_for_block_masks_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="flex_attention is for the block masks of diffusion"):
        family_of(root, attention="flex_attention")

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.block_diffusion import causal_mask, chat_tokens, positions_of, project
from diffdistill.pipelines.block_sampling import BlockSampler
from diffdistill.pipelines.conversion import check_network, to_block_diffusion
from diffdistill.projection import dense
from tests.tiny import edit_json, tokenizer
from tests.tiny_text import NAMES, causal_lm


def save_causal(folder: Path, name: str = "qwen3", **changes: Any) -> Path:
    """Save an ordinary, causal LM with its tokenizer."""
    words = tokenizer()
    sizes = {"vocab_size": len(words), "is_causal": True} | changes
    network = causal_lm(name, **sizes)
    network.save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_converted_model_computes_what_it_did_under_a_causal_mask(
    name: str, tied: bool, tmp_path: Path
) -> None:
    source = save_causal(tmp_path / "source", name, tie_word_embeddings=tied)
    target = to_block_diffusion(str(source), tmp_path / "out" / "target")
    assert sorted(p.name for p in target.parent.iterdir()) == ["target"]
    assert (target / "model.safetensors").is_file()
    before = AutoModelForCausalLM.from_pretrained(str(source))
    after = AutoModelForCausalLM.from_pretrained(str(target))
    assert type(after) is type(before)
    assert AutoConfig.from_pretrained(str(target)).is_causal is False
    tokens, none = torch.tensor([[5, 60, 7, 80, 90]]), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        expected = before(tokens).logits
        found = project(after, tokens, causal_mask(none, 0, 5, 1), positions_of(none, 0, 5))
        free = after(tokens).logits
    known = expected.shape[-1]
    torch.testing.assert_close(dense(found)[..., :known], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(free[:, 0, :known], expected[:, 0], atol=1e-3)


@pytest.mark.parametrize("spare", [0, 9])
def test_the_mask_token_is_new_and_starts_as_the_mean_token(spare: int, tmp_path: Path) -> None:
    num_known = len(tokenizer())
    source = save_causal(
        tmp_path / "source", vocab_size=num_known + spare, tie_word_embeddings=False
    )
    target = to_block_diffusion(str(source), tmp_path / "target")
    words = AutoTokenizer.from_pretrained(str(target))
    network = AutoModelForCausalLM.from_pretrained(str(target))
    assert words.mask_token == "<|mask|>"
    assert words.mask_token_id == network.config.mask_token_id == num_known
    assert words("a<|mask|>b").input_ids[1] == num_known
    assert network.config.vocab_size == num_known + max(spare, 1)
    original = AutoModelForCausalLM.from_pretrained(str(source))
    for kind in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(original, kind)().weight, getattr(network, kind)().weight
        torch.testing.assert_close(after[num_known], before[:num_known].mean(0))
        assert torch.equal(after[:num_known], before[:num_known])


def test_a_mask_token_that_is_there_is_used(tmp_path: Path) -> None:
    source = save_causal(tmp_path / "source")
    words = AutoTokenizer.from_pretrained(str(source))
    words.add_special_tokens({"mask_token": "<|image_pad|>"})
    words.save_pretrained(str(source))
    target = to_block_diffusion(str(source), tmp_path / "target")
    config = AutoConfig.from_pretrained(str(target))
    assert config.mask_token_id == words.convert_tokens_to_ids("<|image_pad|>")
    assert config.vocab_size == len(words)


def test_the_chat_template_is_kept_and_the_result_samples(tmp_path: Path) -> None:
    source = save_causal(tmp_path / "source")
    target = to_block_diffusion(str(source), tmp_path / "target", dtype="bf16")
    words = AutoTokenizer.from_pretrained(str(target))
    network = AutoModelForCausalLM.from_pretrained(str(target))
    assert network.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "hi"}]
    assert chat_tokens(words, chat) == chat_tokens(tokenizer(), chat)
    sampler = BlockSampler(
        network=network, block=4, mask_id=words.mask_token_id, pad_id=words.pad_token_id,
        eos_ids=[words.eos_token_id], max_tokens=8,
    )  # fmt: skip
    [answer] = sampler.sample([chat_tokens(words, chat)], Draws(0), torch.tensor([0]))
    assert 1 <= len(answer) <= 8
    assert words.mask_token_id not in answer.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "found Qwen3ForSequence"),
        ({"architectures": None}, "found no architecture"),
        ({"auto_map": {"AutoModel": "x.y"}}, "not part of transformers"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"is_causal": False}, "already sees in both directions"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding window"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save_causal(tmp_path / "source")
    edit_json(source / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        to_block_diffusion(str(source), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_target_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    source = save_causal(tmp_path / "source")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("here")
    with pytest.raises(UserError, match="in use"):
        to_block_diffusion(str(source), tmp_path / "target")
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert to_block_diffusion(str(source), tmp_path / "empty") == tmp_path / "empty"


def test_a_folder_without_weights_or_tokenizer_is_one_line(tmp_path: Path) -> None:
    source = save_causal(tmp_path / "source")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the language model"):
        to_block_diffusion(str(source), tmp_path / "target")
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        to_block_diffusion(str(tmp_path / "none"), tmp_path / "target")


def test_an_ordinary_token_does_not_become_the_mask(tmp_path: Path) -> None:
    source = save_causal(tmp_path / "source")
    with pytest.raises(UserError, match="'a' is an ordinary token"):
        to_block_diffusion(str(source), tmp_path / "target", mask_token="a")


def test_a_network_that_ignores_its_mask_is_refused() -> None:
    network = causal_lm()
    stock = network.model.forward

    def forward(input_ids: Any, attention_mask: Any, position_ids: Any, **kwargs: Any) -> Any:
        return stock(input_ids=input_ids, position_ids=position_ids, **kwargs)

    check_network(network, "tiny")
    network.model.forward = forward
    with pytest.raises(UserError, match="tiny: Qwen3ForCausalLM does not follow 4-D"):
        check_network(network, "tiny")


def test_the_config_on_disk_says_what_changed(tmp_path: Path) -> None:
    source = save_causal(tmp_path / "source")
    target = to_block_diffusion(str(source), tmp_path / "target")
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, target))
    differing = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert differing == {"is_causal", "mask_token_id", "vocab_size"}

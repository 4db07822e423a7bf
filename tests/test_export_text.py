"""Text models exported for transformers and peft, and asked there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffdistill.checkpoints import restore
from diffdistill.commands.export import export
from diffdistill.commands.sample_text import sample_text
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.errors import UserError
from diffdistill.pipelines.block_diffusion import denoise
from diffdistill.projection import dense
from diffdistill.roles import Role
from tests.text_run import save_world, text_values
from tests.tiny_text import save_lm

LORA = {"student": {"adapter": "lora", "rank": 2, "alpha": 6}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = save_world(tmp_path_factory.mktemp("world"))
    for name, roles, ema in (("full", {}, 0.5), ("lora", LORA, 0.5)):
        values = text_values(folder, roles=roles, train={"ema": ema, "lr": 0.05})
        train(parse_config(values), folder / name)
    return folder


@torch.no_grad()
def logits_of(network: Any) -> Tensor:
    clean = torch.arange(20, 36)[None]
    noised = clean.clone()
    noised[:, ::2] = 2
    return dense(denoise(network, noised, clean, block=4))


@torch.no_grad()
def role_logits(role: Role) -> Tensor:
    with role.acting(torch.device("cpu")):
        return logits_of(role.network)


@pytest.mark.parametrize("role", ["student", "average"])
@pytest.mark.parametrize("run", ["full", "lora"])
def test_a_folder_for_transformers_computes_what_the_role_does(
    run: str, role: str, world: Path, tmp_path: Path
) -> None:
    written = export(world / run, tmp_path / "model", layout="model", role=role)
    opened = AutoModelForCausalLM.from_pretrained(str(written)).eval()
    own = restore(world / run).roles[role]
    torch.testing.assert_close(logits_of(opened), role_logits(own), rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(str(world / "student")).eval()
    assert (logits_of(opened) - logits_of(base)).abs().max() > 0.01
    assert not any("lora" in name for name, _ in opened.named_parameters())


def test_the_folder_says_how_it_is_called(world: Path, tmp_path: Path) -> None:
    written = export(world / "full", tmp_path / "model")
    config = json.loads((written / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(str(written))
    assert config["is_causal"] is False
    assert config["block_size"] == 4
    assert config["mask_token_id"] == tokenizer.mask_token_id
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert tokenizer.chat_template
    assert (written / "generation_config.json").is_file()


def test_an_exported_model_is_a_family_again_that_answers_alike(
    world: Path, tmp_path: Path
) -> None:
    written = export(world / "lora", tmp_path / "model", layout="model")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(text_values(world, family={"path": str(written)})))
    sampled = ["sample.max_tokens=8"]
    [found] = sample_text(str(path), prompts=["go"], overrides=sampled)
    [expected] = sample_text(str(world / "lora"), prompts=["go"], overrides=sampled)
    assert found == expected


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_lora_opens_in_peft_on_its_base(world: Path, tmp_path: Path) -> None:
    written = export(world / "lora", tmp_path / "adapter")
    assert sorted(f.name for f in written.glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((written / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    base = AutoModelForCausalLM.from_pretrained(str(world / "student")).eval()
    merged = PeftModel.from_pretrained(base, str(written)).merge_and_unload()
    own = restore(world / "lora").roles["student"]
    torch.testing.assert_close(logits_of(merged), role_logits(own), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(str(written)).chat_template


@pytest.mark.parametrize("layout", ["lora", "model"])
def test_exports_name_no_folder_of_this_machine(layout: str, world: Path, tmp_path: Path) -> None:
    written = export(world / "lora", tmp_path / "out", layout=layout)
    files = [file for file in written.iterdir() if file.suffix != ".safetensors"]
    assert len(files) > 2
    assert not [file.name for file in files if str(world) in file.read_text()]


def test_a_network_with_a_head_of_its_own_is_whole(world: Path, tmp_path: Path) -> None:
    save_lm(tmp_path / "untied", tie_word_embeddings=False)
    values = text_values(world, family={"path": str(tmp_path / "untied")}, train={"steps": 1})
    train(parse_config(values), tmp_path / "run")
    written = export(tmp_path / "run", tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(str(written)).eval()
    own = restore(tmp_path / "run").roles["student"]
    torch.testing.assert_close(logits_of(opened), role_logits(own), rtol=1e-4, atol=1e-5)


def test_a_named_mask_token_and_template_become_the_tokenizers_own(
    world: Path, tmp_path: Path
) -> None:
    source = save_lm(tmp_path / "source")
    kept = json.loads((source / "tokenizer_config.json").read_text())
    kept.pop("mask_token")
    (source / "tokenizer_config.json").write_text(json.dumps(kept))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    family = {
        "path": str(source),
        "mask_token": "<mask>",
        "chat_template": str(tmp_path / "chat.jinja"),
    }
    train(parse_config(text_values(world, family=family, train={"steps": 1})), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(str(export(tmp_path / "run", tmp_path / "model")))
    assert tokenizer.mask_token == "<mask>"
    assert tokenizer.chat_template == (tmp_path / "chat.jinja").read_text()


def test_what_cannot_be_exported_is_one_line(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layout 'pipeline' is for images and videos, not for bd3"):
        export(world / "full", tmp_path / "x", layout="pipeline")
    with pytest.raises(UserError, match="student was trained fully: export it as model"):
        export(world / "full", tmp_path / "x", layout="lora")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for run in ("full", "lora"):
        with pytest.raises(UserError, match="is not empty: export into a new folder"):
            export(world / run, tmp_path / "used")

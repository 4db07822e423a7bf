"""DoRA as an option of LoRA adapters."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from diffdistill.checkpoints import restore
from diffdistill.commands.export import export
from diffdistill.commands.train import train
from diffdistill.config import parse_config
from tests.answer_run import answer_values, save_answer_world
from tests.conftest import CPU, generator

DORA = {"adapter": "lora", "rank": 2, "alpha": 4, "dora": True}


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")
def test_a_dora_trains_its_lengths_and_is_the_same_model_in_every_export(tmp_path: Path) -> None:
    world = save_answer_world(tmp_path)
    values = answer_values(world, roles={"student": DORA}, train={"steps": 2, "lr": 0.05})
    train(parse_config(values), tmp_path / "run")
    role = restore(tmp_path / "run").roles["student"]
    lengths = {n: p for n, p in role.parameters().items() if "magnitude" in n}
    assert 2 * len(lengths) == sum(".lora_A." in n or ".lora_B." in n for n in role.parameters())
    name, length = next(iter(lengths.items()))
    base = AutoModelForCausalLM.from_pretrained(str(world / "student"))
    before = base.get_submodule(name.partition(".lora_")[0]).weight.norm(dim=1)
    assert not torch.allclose(length, before)
    tokens = torch.randint(0, 36, (2, 7), generator=generator(1))
    with torch.no_grad(), role.acting(CPU):
        expected = role.network.eval()(input_ids=tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(
        str(export(tmp_path / "run", tmp_path / "merged", layout="model"))
    )
    torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    opened = PeftModel.from_pretrained(base, str(export(tmp_path / "run", tmp_path / "adapter")))
    torch.testing.assert_close(opened(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)

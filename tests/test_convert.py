"""The command ``convert``, on tiny causal LMs saved to disk."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from diffdistill import catalog, cli
from diffdistill.commands.convert import convert
from diffdistill.pipelines.block_diffusion import causal_mask
from diffdistill.pipelines.conversion import check_network
from diffdistill.projection import dense
from diffdistill.provenance.files import dumped, open_record
from diffdistill.provenance.settings import ProvenanceSettings
from diffdistill.provenance.sources import describe_model
from diffdistill.provenance.terms import obligations
from diffdistill.types import State
from tests.tiny import edit_json, tokenizer
from tests.tiny_text import causal_lm

ZERO = torch.zeros(1, dtype=torch.long)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["diffdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return an ordinary causal LM without a mask token, with a chat template."""
    folder = tmp_path / "source"
    causal_lm(vocab_size=len(tokenizer()), is_causal=True).save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder


def test_a_converted_model_says_what_it_was_made_from(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    (source / "LICENSE").write_text("the license")
    convert(str(source), tmp_path / "Llama-target")
    assert (tmp_path / "Llama-target" / "LICENSE").read_text() == "the license"
    record = open_record(tmp_path / "Llama-target")
    assert (record["method"]["name"], record["student"]["id"]) == ("convert", "source")
    assert str(tmp_path) not in dumped(record)
    assert "| student | source | init |" in (tmp_path / "Llama-target" / "README.md").read_text()
    entry = describe_model("Llama-target", tmp_path / "Llama-target", None, hashed=True)
    assert entry["as_recorded"] is True
    further = {"student": {"role": "student", **entry}, "teachers": [], "judges": []}
    asked = {item["id"] for item in obligations(further, ProvenanceSettings())}
    assert "llama-3.1/name" in asked
    assert not any(name.startswith("unknown") for name in asked)


@pytest.mark.parametrize("to", ["bd3lm", "mdlm"])
def test_a_converted_model_loads_everywhere_and_computes_what_it_did(
    to: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    target = tmp_path / "target"
    assert run_cli(monkeypatch, "convert", source, target, "--to", to) == 0
    printed = capsys.readouterr().out
    before = AutoModelForCausalLM.from_pretrained(str(source))
    after = AutoModelForCausalLM.from_pretrained(str(target))
    words = AutoTokenizer.from_pretrained(str(target))
    assert words.chat_template == tokenizer().chat_template
    for said in (f"(id {words.mask_token_id})", "Qwen3ForCausalLM", f"name: {to}", str(target)):
        assert said in printed
    tokens = torch.tensor([[5, 60, 7, 80, 90]])
    with torch.no_grad():
        expected = before(tokens).logits
        found = after(tokens, attention_mask=causal_mask(ZERO, 0, 5, 1)).logits
    known = expected.shape[-1]
    torch.testing.assert_close(found[..., :known], expected, rtol=1e-5, atol=1e-5)
    family = catalog.load("family", to)(path=str(target), device=torch.device("cpu"))
    told = family.condition(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    with torch.no_grad():
        logits = dense(family.predict(family.network(), State(tokens, torch.ones(1)), told))
    assert logits.shape == (1, 5, known + 1)
    assert logits[..., :known].isfinite().all()


def test_words_dtype_and_default_can_be_chosen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    target = tmp_path / "target"
    options = ("--mask-token", "<hidden>", "--dtype", "bf16")
    assert run_cli(monkeypatch, "convert", source, target, *options) == 0
    assert "mask token <hidden>" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(str(target)).mask_token == "<hidden>"
    assert AutoModelForCausalLM.from_pretrained(str(target)).dtype == torch.bfloat16


def without_end(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def classifier(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["Qwen3ForSequenceClassification"])


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_end, "no end token"),
        (without_tokenizer, "cannot load the tokenizer"),
        (classifier, "needs a causal language model"),
        (gone, "neither a folder nor a hub id"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    spoil: Any, message: str, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    spoil(source)
    assert run_cli(monkeypatch, "convert", source, tmp_path / "target") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "bd3ml"), "did you mean 'bd3lm'?"),
        (("--dtype", "int3"), "--dtype 'int3': expected bf16, fp16, fp32"),
        (("--mask-token", "a"), "'a' is an ordinary token"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: tuple[str, ...], message: str, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    assert run_cli(monkeypatch, "convert", source, tmp_path / "target", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_nothing_is_overwritten(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("here")
    assert run_cli(monkeypatch, "convert", source, tmp_path / "target") == 2
    assert "in use" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["mine"]
    assert run_cli(monkeypatch, "convert", source, source / "config.json") == 2
    assert run_cli(monkeypatch, "convert", source, source / "config.json" / "below") == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(self: Any, folder: str) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert run_cli(monkeypatch, "convert", source, tmp_path / "out" / "target") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_masked_diffusion_needs_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    network = causal_lm()
    stock = network.model.forward

    def forward(input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: bool) -> Any:
        return stock(input_ids, attention_mask, position_ids, use_cache=use_cache)

    monkeypatch.setattr(network.model, "forward", forward)
    check_network(network, "tiny", blocks=False)
    with pytest.raises(Exception, match="and a cache, which diffusion needs"):
        check_network(network, "tiny")
